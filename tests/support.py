"""
What tests share: the interpreters and programs of this machine, throwaway users, and counting what
was left behind.
"""

import collections.abc
import contextlib
import dataclasses
import fcntl
import functools
import os
import pathlib
import pwd
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from typing import Any, TypeVar

import inmanta.agent.handler
import psutil
import pytest

from inmanta_plugins.mitogen import Cause, ConnectError, Proxy, RemoteException
from inmanta_plugins.mitogen.connections.connection import Connection

Context = dict[str, Any]

LOCAL: Context = {
    "method_name": "local",
    "name": "here",
    "python_path": [sys.executable],
}
"""The context of an interpreter on this machine, started by nothing in between."""

IMPLICIT: Context = {
    "method_name": "ssh",
    "name": "web",
    "hostname": "10.0.0.1",
    "username": "root",
    "port": 22,
    "check_host_keys": "ignore",
    "ssh_args": ["-o", "UserKnownHostsFile=/dev/null", "-o", "PasswordAuthentication=no"],
    "python_path": ["python"],
}
"""The implicit context of a host whose name is web and whose ip is 10.0.0.1."""

SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")


class Recorder(inmanta.agent.handler.LoggerABC):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.records: list[tuple[int, str, dict[str, Any]]] = []

    def _log_msg(
        self, level: int, msg: str, *args: object, exc_info: bool = False, **kwargs: object
    ) -> None:
        self.records.append((level, msg, kwargs))

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [kwargs for _, _, kwargs in self.records if "function" in kwargs]


class Messages(list[int]):
    """The sizes of the messages that were sent to hosts."""

    def taken(self) -> int:
        """Return how many were sent since the last time."""
        sent = len(self)
        self.clear()
        return sent


def connection_of(proxy: Proxy) -> Connection:
    """Return the open connection of a proxy, which it tells nobody else about."""
    assert proxy._connection is not None
    return proxy._connection


E = TypeVar("E", bound=Exception)


def connect_error(context: Context, expected: type[E]) -> E:
    """
    Try to connect, which has to fail.

    :param context: The serialized context that can't be connected.
    :param expected: The exception that this should raise.
    :return: The exception. No password of the context is in its text.
    """
    with pytest.raises(expected) as raised:
        Proxy(context).connect()
    error = raised.value
    hop: Context | None = context
    while hop:
        for text in (str(error), repr(error), *getattr(error, "__notes__", ())):
            assert hop.get("password", "\0") not in text
        hop = hop.get("via")
    return error


def fails_with(cause: Cause, context: Context) -> ConnectError:
    """Try to connect, which has to fail for this reason."""
    error = connect_error(context, ConnectError)
    assert error.cause is cause
    return error


def call_fails_with(cause: Cause, proxy: Proxy) -> None:
    """Make a call for which it can't connect, for this reason."""
    with pytest.raises(RemoteException) as raised:
        proxy.file_exists("/")
    error = raised.value.remote_exception
    assert isinstance(error, ConnectError)
    assert error.cause is cause


def kill(pids: collections.abc.Collection[int]) -> None:
    """Kill processes, of which there has to be one, and wait until they are gone."""
    assert pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: all(map(is_gone, pids)), f"{pids} are gone")


def freeze(pid: int) -> None:
    """Stop a process, as a host that hangs."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: is_stopped(pid), f"{pid} is stopped")


@contextlib.contextmanager
def together(proxy: Proxy) -> collections.abc.Iterator[None]:
    """Whatever is submitted to a proxy meanwhile is sent afterwards."""
    done = threading.Event()
    connection_of(proxy).link.router.broker.defer(lambda: done.wait(60))
    try:
        yield
    finally:
        done.set()


# Programs


def find_program(name: str) -> str | None:
    """Return the absolute path of a program, also when it is one that only root has on the PATH."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *SBIN]))


def execute(*command: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    """
    Run a program to its end.

    :param options: More keyword arguments of :func:`subprocess.run`.
    :return: How it ended, and what it printed.
    """
    program, *arguments = map(str, command)
    words = [find_program(program) or program, *arguments]
    try:
        return subprocess.run(words, capture_output=True, text=True, **options)
    except subprocess.CalledProcessError as error:
        error.add_note(error.stderr)
        raise


def missing_programs(*names: str) -> str | None:
    """Return the reason to skip what needs all these programs, or None when they are there."""
    missing = [name for name in names if find_program(name) is None]
    return f"needs {', '.join(missing)}, not installed here" if missing else None


def requires(*programs: str) -> pytest.MarkDecorator:
    """Mark a test that needs programs of the machine."""
    reason = missing_programs(*programs)
    return pytest.mark.skipif(reason is not None, reason=reason or "")


requires_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
"""Marks a test that only root can run."""


def need(*programs: str, root: bool = False) -> None:
    """
    Skip the calling test or fixture, with a reason that names what is missing.

    :param programs: The programs that have to be installed.
    :param root: Whether it also has to run as root.
    """
    if root and os.geteuid() != 0:
        pytest.skip("needs root")
    if reason := missing_programs(*programs):
        pytest.skip(reason)


# Files


@contextlib.contextmanager
def public_directory() -> collections.abc.Iterator[pathlib.Path]:
    """A directory that every user may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="inmanta-mitogen-test-") as name:
        path = pathlib.Path(name)
        path.chmod(0o755)
        yield path


def write_files(directory: pathlib.Path, files: collections.abc.Mapping[str, str]) -> None:
    """Write files, without the indentation that their texts have in common."""
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip())


# Interpreters


@dataclasses.dataclass(frozen=True, order=True)
class Interpreter:
    """A Python of this machine."""

    version: tuple[int, int]
    """Its major and minor version."""
    path: str
    """The absolute path of its executable."""

    def __str__(self) -> str:
        return ".".join(map(str, self.version))


def _candidates(version: str) -> collections.abc.Iterator[str]:
    # pyenv's shims are on the PATH even for a version that isn't chosen, so the real ones come
    # first.
    root = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"))
    for path in sorted(root.glob(f"versions/{version}.*/bin/python{version}")):
        yield str(path)
    for directory in [*os.get_exec_path(), "/usr/bin", "/usr/local/bin"]:
        yield os.path.join(directory, f"python{version}")


@functools.cache
def find_interpreter(major: int, minor: int) -> Interpreter | None:
    """
    Return an interpreter of that version which the current user can run, from pyenv or from the
    PATH.
    """
    code = "import sys; print('%d %d' % sys.version_info[:2])"
    for path in filter(shutil.which, _candidates(f"{major}.{minor}")):
        if execute(path, "-c", code).stdout.split() == [str(major), str(minor)]:
            return Interpreter((major, minor), path)
    return None


@functools.cache
def find_interpreters() -> tuple[Interpreter, ...]:
    """
    Return one interpreter of each version that hosts may have, as far as this machine has it, the
    oldest first.
    """
    found = (find_interpreter(3, minor) for minor in range(6, 14))
    return tuple(interpreter for interpreter in found if interpreter is not None)


@functools.cache
def interpreter_for_everyone() -> str | None:
    """Return the path of an interpreter that every user of this machine can execute."""
    for name in ("python3", *(f"python3.{minor}" for minor in range(13, 5, -1))):
        for directory in ("/usr/bin", "/usr/local/bin", "/opt/python/bin"):
            path = os.path.join(directory, name)
            if os.path.exists(path) and _open_to_everyone(os.path.realpath(path)):
                return path
    return None


def _open_to_everyone(path: str) -> bool:
    return all(
        parent.stat().st_mode & stat.S_IXOTH
        for parent in (pathlib.Path(path), *pathlib.Path(path).parents)
    )


# Counting what is left behind


class Snapshot:
    """
    What a process holds at one moment: threads, files, and the processes that descend from it. One
    that ended and was not waited for counts too.

    :param pid: The process to look at, by default this one.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._pid = os.getpid() if pid is None else pid
        self._held = dict(_held(self._pid))

    def added(self) -> list[str]:
        """Return what the process holds now, and did not hold when this snapshot was taken."""
        return [f"{key}: {text}" for key, text in _held(self._pid) if key not in self._held]

    def settle(self, timeout: float = 10.0) -> None:
        """
        Wait until the process holds nothing more than when this snapshot was taken.

        :param timeout: How long to wait, in seconds.
        :raises AssertionError: When it still does by then; the text tells what.
        """
        deadline = time.monotonic() + timeout
        while more := self.added():
            assert time.monotonic() < deadline, f"Still there after {timeout} s: {more}"
            time.sleep(0.02)


def _held(pid: int) -> collections.abc.Iterator[tuple[tuple[object, ...], str]]:
    """Return what tells each thing that a process holds from all others, and a text about it."""
    process = psutil.Process(pid)
    for child in process.children(recursive=True):
        yield ("process", child.pid), command_line(child.pid)
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    for thread in process.threads():
        yield ("thread", thread.id), names.get(thread.id, "")
    for file in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        # That of the listing itself is closed again.
        with contextlib.suppress(FileNotFoundError):
            yield ("file", file.name, os.readlink(file)), ""


def is_gone(pid: int) -> bool:
    """Return whether a process has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped, as by SIGSTOP."""
    return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)


def wait_until(
    condition: collections.abc.Callable[[], object], what: str, timeout: float = 20.0
) -> None:
    """
    Wait until a condition holds.

    :param what: What it waits for, for the error's text.
    :param timeout: How long to wait, in seconds.
    :raises AssertionError: When it does not hold by then.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"Waited {timeout} s, and it is not so yet that {what}")
        time.sleep(0.02)


def command_line(pid: int) -> str:
    """
    Return the command line of a process, or its name where it has none; empty when it is gone.
    """
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        with contextlib.suppress(psutil.ZombieProcess):
            if line := process.cmdline():
                return " ".join(line)
        return process.name()
    return ""


# Users


@dataclasses.dataclass(frozen=True)
class User:
    """A user of this machine who exists for the duration of a test."""

    name: str
    password: str
    uid: int
    gid: int
    home: pathlib.Path

    def write(self, path: str, text: str, mode: int = 0o644) -> pathlib.Path:
        """
        Write a file that belongs to the user.

        :param path: Where, from the home directory.
        """
        target = self.home / path
        target.write_text(text)
        target.chmod(mode)
        os.chown(target, self.uid, self.gid)
        return target


@contextlib.contextmanager
def machine_lock(name: str) -> collections.abc.Iterator[None]:
    """Hold a lock that all test runs on this machine share, for what exists once a machine."""
    path = pathlib.Path(tempfile.gettempdir(), f"inmanta-mitogen-tests-{name}.lock")
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def temporary_user(*, shell: str = "/bin/sh") -> collections.abc.Iterator[User]:
    """
    A user with a name and a password of his own and an empty home directory. At the end his
    processes are killed, and he and his home are gone. Only root can call it.

    :param shell: The absolute path of his login shell.
    """
    name = f"mitogen-{secrets.token_hex(4)}"
    password = secrets.token_urlsafe(12)
    try:
        with machine_lock("users"):
            options = ("--create-home", "--skel", "/nonexistent", "--shell", shell)
            execute("useradd", *options, name, check=True)
            execute("chpasswd", input=f"{name}:{password}\n", check=True)
        entry = pwd.getpwnam(name)
        home = pathlib.Path(entry.pw_dir)
        home.chmod(0o755)
        yield User(name, password, entry.pw_uid, entry.pw_gid, home)
    finally:
        with contextlib.suppress(KeyError):
            _kill_processes(pwd.getpwnam(name).pw_uid)
            with machine_lock("users"):
                execute("userdel", "--force", "--remove", name, check=True)


def _kill_processes(uid: int) -> None:
    def running() -> list[psutil.Process]:
        return [
            process
            for process in psutil.process_iter(["uids", "status"])
            if process.info["uids"] and process.info["uids"].effective == uid
            if process.info["status"] != psutil.STATUS_ZOMBIE
        ]

    deadline = time.monotonic() + 10
    while (left := running()) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.01)


# What users may do


@contextlib.contextmanager
def sudo_setting(user: User, setting: str, *rules: str) -> collections.abc.Iterator[None]:
    """
    Change a setting of sudo for a user. Only root can call it.

    :param setting: As in ``use_pty`` or ``!use_pty``.
    :param rules: More lines.
    """
    path = pathlib.Path("/etc/sudoers.d", f"{user.name}-{secrets.token_hex(4)}")
    try:
        # It takes effect as a whole, since sudo skips names with a dot.
        unfinished = path.with_suffix(".new")
        unfinished.write_text("\n".join([f"Defaults:{user.name} {setting}", *rules, ""]))
        unfinished.chmod(0o440)
        unfinished.rename(path)
        yield
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def sudo_rule(user: User, *, password: bool) -> collections.abc.Iterator[None]:
    """
    Let a user run everything with sudo. Only root can call it.

    :param password: Whether sudo asks him for his password, each time anew.
    """
    tag = "PASSWD" if password else "NOPASSWD"
    with sudo_setting(user, "timestamp_timeout=0", f"{user.name} ALL=(ALL) {tag}:SETENV: ALL"):
        yield


@contextlib.contextmanager
def doas_rule(user: User, *, password: bool) -> collections.abc.Iterator[None]:
    """
    Let a user run everything with doas. There is one file of rules only: this one's line is added
    to what others have there, and taken out again. Only root can call it.

    :param password: Whether doas asks him for his password.
    """
    rule = f"permit {'' if password else 'nopass '}{user.name} as root\n"
    try:
        _edit_doas_conf(lambda text: text + ("" if text[-1:] in ("", "\n") else "\n") + rule)
        yield
    finally:
        _edit_doas_conf(lambda text: text.replace(rule, "", 1))


def _edit_doas_conf(edit: collections.abc.Callable[[str], str]) -> None:
    path = pathlib.Path("/etc/doas.conf")
    with machine_lock("doas"):
        text = edit(path.read_text() if path.exists() else "")
        if not text:
            path.unlink(missing_ok=True)
            return
        unfinished = path.with_suffix(".new")
        unfinished.touch(mode=0o600)
        if path.exists():
            shutil.copymode(path, unfinished)
        unfinished.write_text(text)
        unfinished.rename(path)


# Locales


def french_locale(directory: pathlib.Path) -> dict[str, str]:
    """
    Compile the French locale, which need not be installed for it.

    :param directory: Where to put it.
    :return: The environment that makes programs speak French. Skips the test where the locale's
        sources or the translations of the C library are missing.
    """
    need("localedef")
    language = "fr_FR.UTF-8"
    done = execute("localedef", "-i", "fr_FR", "-f", "UTF-8", directory / language)
    if not (directory / language).exists():
        pytest.skip(f"needs the sources of the French locale: {done.stderr}")
    environment = {"LOCPATH": str(directory), "LC_ALL": language, "LANGUAGE": "fr"}
    spoken = execute("/bin/ls", "/nonexistent", env=environment)
    if not re.search("Aucun fichier", spoken.stderr):
        pytest.skip(f"needs the French translations of the C library: {spoken.stderr}")
    return environment
