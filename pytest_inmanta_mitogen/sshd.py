"""
A real OpenSSH server that needs no preparation and leaves nothing behind. Linux only: it looks
processes up in ``/proc``.
"""

import collections.abc
import contextlib
import json
import os
import pathlib
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import typing

# sbin directories are on no ordinary user's PATH.
_SBIN = ("/usr/sbin", "/usr/local/sbin", "/sbin", "/usr/lib/ssh", "/usr/libexec")

# How long a server may take to answer, or a killed process to disappear, on a very busy machine. In
# seconds.
_PATIENCE = 20.0

_MARKER = "INMANTA_MITOGEN_SSH_HOST"


class SshdNotFoundError(Exception):
    """OpenSSH's server, or the program that makes its keys, is not installed."""


def find_sshd() -> str:
    """
    Return the absolute path of OpenSSH's server (it refuses to be started by any other).

    :raises SshdNotFoundError: When the server or ``ssh-keygen`` is not installed.
    """
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_SBIN])
    sshd = shutil.which("sshd", path=path)
    if sshd is None or shutil.which("ssh-keygen") is None or shutil.which("ssh") is None:
        raise SshdNotFoundError(
            "needs OpenSSH: sshd, ssh and ssh-keygen (Debian: openssh-server, openssh-client)"
        )
    return os.path.abspath(sshd)


class SshHost:
    """
    An OpenSSH server on the loopback address, with its own configuration, keys, log and port. The
    machine's ssh server and the user's own ssh files have no part in it.

    Use it as a context manager: the server starts on entry; on exit it is gone, along with every
    session it had and every file it used.

    :param name: The name of the contexts that :meth:`serialized` and :meth:`model` describe.
    :param username: The user that they log in as, by default the current one. A server that root
        started lets in any user of the machine whose account is not locked, one that another user
        started only that user.
    :param python_path: The interpreter that they start, by default the one that runs the tests,
        without the packages of its virtual environment: hosts have none of these. Another user than
        root may not be allowed to execute that one.
    :param password_authentication: Whether the server accepts passwords too. It can check them only
        when root started it.
    :param environment: Variables that are set in each session.
    :param banner: A text that the server sends before authentication.
    :param config: More lines for the server's configuration, which take precedence over those made
        here.
    """

    hostname: str = "127.0.0.1"
    """The address that the server listens on."""

    def __init__(
        self,
        *,
        name: str = "ssh-host",
        username: str | None = None,
        python_path: collections.abc.Sequence[str] | None = None,
        password_authentication: bool = False,
        environment: collections.abc.Mapping[str, str] | None = None,
        banner: str | None = None,
        config: collections.abc.Sequence[str] = (),
    ) -> None:
        self.name = name
        self.username = username or pwd.getpwuid(os.geteuid()).pw_name
        self.python_path = list(python_path or [_bare_interpreter()])
        self.port = 0
        self._password_authentication = password_authentication
        self._environment = {**(environment or {}), _MARKER: secrets.token_hex(8)}
        self._banner = banner
        self._config = list(config)
        self._server: subprocess.Popen[bytes] | None = None
        self._directory: pathlib.Path | None = None

    # Life and death

    def __enter__(self) -> typing.Self:
        # Not pytest's own temporary directory, which only the current user can enter: the server
        # reads the authorized keys with the rights of the user who logs in.
        self._directory = pathlib.Path(tempfile.mkdtemp(prefix="ssh-host-"))
        try:
            self._directory.chmod(0o755)
            self._write_files()
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self._directory is not None:
            shutil.rmtree(self._directory)
            self._directory = None

    def start(self) -> None:
        """
        Start the server, at the port it had before if there was one.

        :raises RuntimeError: When the server is running already, or does not come up; the text
            holds its log.
        """
        if self._server is not None:
            raise RuntimeError(f"The ssh host on port {self.port} is running already")

        if os.geteuid() == 0:
            # Compiled into Debian's server, and made at boot by its service only.
            os.makedirs("/run/sshd", mode=0o755, exist_ok=True)

        # Another process may take the free port just before the server does.
        fixed, attempts = self.port, 5
        for _ in range(attempts):
            self.port = fixed or _free_port(self.hostname)
            self._server = self._spawn()
            if self._answers(self._server):
                return
            self.stop()
            if "Address already in use" not in self.log() or fixed:
                break
        raise RuntimeError(f"The ssh host does not come up at port {self.port}: {self.log()}")

    def stop(self) -> None:
        """
        Kill the server and all its sessions at once, as if the host were switched off. Nothing
        happens when it does not run.
        """
        if self._server is None:
            return
        # Killed before its sessions, so that it can start no new ones.
        self._server.kill()
        self.kill_sessions()
        self._server.wait(_PATIENCE)
        self._server = None

    def restart(self) -> None:
        """
        As if the host were rebooted: all sessions die, and it is back with the same address, port
        and keys.
        """
        self.stop()
        self.start()

    def kill_sessions(self) -> None:
        """Kill all the processes of all the sessions; the server goes on."""
        self._signal_sessions(signal.SIGKILL, unless="")

    def freeze(self) -> None:
        """
        Stop the server and all the processes of its sessions, with their connections open:
        a host that hangs.
        """
        if self._server is not None:
            # First, so that it can start no new sessions.
            _signal([self._server.pid], signal.SIGSTOP)
        self._signal_sessions(signal.SIGSTOP, unless="T")

    def _signal_sessions(self, number: signal.Signals, *, unless: str) -> None:
        # Again and again: they may be starting others, and a signal takes its time.
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            states = _processes()
            pids = [pid for pid in self.session_pids() if states.get(pid, (0, "X"))[1] != unless]
            if not pids:
                return
            _signal(pids, number)
            time.sleep(0.01)

    def thaw(self) -> None:
        """Let what :meth:`freeze` stopped go on."""
        _signal(self.session_pids(), signal.SIGCONT)
        if self._server is not None:
            _signal([self._server.pid], signal.SIGCONT)

    # What happened so far

    def session_pids(self) -> list[int]:
        """
        Return the processes that run on behalf of those logged in: the server's own for each
        connection, and everything that was started in a session, even if it was detached from it
        since.

        Without those that ended and were not yet waited for.
        """
        processes = _processes()
        marker = f"{_MARKER}={self._environment[_MARKER]}".encode()
        found = {pid for pid in processes if marker in _environment(pid)}
        if self._server is not None:
            found.add(self._server.pid)
        while more := {pid for pid, (parent, _) in processes.items() if parent in found} - found:
            found |= more
        if self._server is not None:
            found.discard(self._server.pid)
        return sorted(found)

    def log(self) -> str:
        """
        Return what the server wrote to its log since it was first started, at OpenSSH's level
        VERBOSE.
        """
        try:
            return (self.directory / "log").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def logins(self) -> int:
        """
        Return how many times someone was authenticated, by key or by password, since the server was
        first started.
        """
        return len(re.findall(r"^Accepted \S+ for ", self.log(), flags=re.MULTILINE))

    # How to get there

    @property
    def directory(self) -> pathlib.Path:
        """
        The directory that holds everything of this server.

        :raises RuntimeError: When the context manager was not entered, or was left.
        """
        if self._directory is None:
            raise RuntimeError("The ssh host is not started: use it in a with statement")
        return self._directory

    @property
    def identity_file(self) -> str:
        """The path of the private key that the server accepts."""
        return str(self.directory / "identity")

    @property
    def known_hosts_line(self) -> str:
        """The line that makes this server a known one, for a ``known_hosts`` file."""
        key = (self.directory / "host_key.pub").read_text().split()
        return f"[{self.hostname}]:{self.port} {key[0]} {key[1]}\n"

    def serialized(self, **overrides: typing.Any) -> dict[str, typing.Any]:
        """
        Return the serialized context that connects to this host.

        :param overrides: Options to add or to replace; None leaves an option out.
        """
        options = {
            "method_name": "ssh",
            "name": self.name,
            "hostname": self.hostname,
            "port": self.port,
            "username": self.username,
            "identity_file": self.identity_file,
            "check_host_keys": "ignore",
            # The configuration of whoever runs the tests should not decide how they end.
            "ssh_args": ["-F", "/dev/null"],
            "python_path": self.python_path,
            **overrides,
        }
        return {key: value for key, value in options.items() if value is not None}

    def model(self, **overrides: typing.Any) -> str:
        """
        Return the constructor of the ``mitogen::Ssh`` entity that connects to this host, for an
        inmanta model.

        :param overrides: Attributes to add or to replace; None leaves an attribute out.
        """
        options = self.serialized(**overrides)
        del options["method_name"]
        attributes = (f"{name}={json.dumps(value)}" for name, value in options.items())
        return f"mitogen::Ssh({', '.join(attributes)})"

    # Details

    def _write_files(self) -> None:
        for name in ("host_key", "identity"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.directory / name)],
                check=True,
                stdin=subprocess.DEVNULL,
                capture_output=True,
            )
        shutil.copy(self.directory / "identity.pub", self.directory / "authorized_keys")
        (self.directory / "authorized_keys").chmod(0o644)
        if self._banner is not None:
            (self.directory / "banner").write_text(self._banner)

    def _config_lines(self) -> list[str]:
        password = "yes" if self._password_authentication else "no"
        return [
            # The first value counts.
            *self._config,
            f"ListenAddress {self.hostname}",
            f"Port {self.port}",
            f"HostKey {self.directory}/host_key",
            f"AuthorizedKeysFile {self.directory}/authorized_keys",
            "AuthenticationMethods any",
            "PubkeyAuthentication yes",
            f"PasswordAuthentication {password}",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin yes",
            "UsePAM no",
            "UseDNS no",
            "StrictModes no",
            "PidFile none",
            "LogLevel VERBOSE",
            "PrintMotd no",
            "PrintLastLog no",
            "MaxStartups 200",
            "MaxSessions 200",
            "AllowTcpForwarding yes",
            *([f"Banner {self.directory}/banner"] if self._banner is not None else []),
            "SetEnv " + " ".join(f'"{name}={text}"' for name, text in self._environment.items()),
        ]

    def _spawn(self) -> subprocess.Popen[bytes]:
        sshd, config = find_sshd(), self.directory / "sshd_config"
        # Since OpenSSH 9.8 a server locks out an address after failed logins, and here they all
        # have the same one. Older servers do not know the setting and refuse it.
        for extra in (["PerSourcePenalties no"], []):
            config.write_text("\n".join([*self._config_lines(), *extra, ""]))
            check = subprocess.run(
                [sshd, "-t", "-f", str(config)], check=False, capture_output=True, text=True
            )
            if "PerSourcePenalties" not in check.stderr:
                break

        command = [sshd, "-D", "-f", str(config), "-E", str(self.directory / "log")]
        if setpriv := shutil.which("setpriv"):
            # A test run that is killed takes its server along.
            command = [setpriv, "--pdeathsig", "TERM", *command]
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _answers(self, server: subprocess.Popen[bytes]) -> bool:
        deadline = time.monotonic() + _PATIENCE
        while server.poll() is None and time.monotonic() < deadline:
            with (
                contextlib.suppress(OSError),
                socket.create_connection((self.hostname, self.port), timeout=5) as client,
            ):
                # Another process may have the port, and the server be about to find out.
                if client.recv(4) == b"SSH-" and server.poll() is None:
                    return True
            time.sleep(0.02)
        return False


def _bare_interpreter() -> str:
    # What a virtual environment was made from. Without one it is sys.executable.
    return str(getattr(sys, "_base_executable", sys.executable))


def _free_port(hostname: str) -> int:
    with socket.socket() as listener:
        listener.bind((hostname, 0))
        port: int = listener.getsockname()[1]
        return port


def _signal(pids: collections.abc.Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _processes() -> dict[int, tuple[int, str]]:
    """
    Return each process of the machine that has not ended: its parent, and its state as the kernel's
    letter.
    """
    processes = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                stat = pathlib.Path("/proc", entry, "stat").read_text(errors="replace")
                # The second field, the command's name in parentheses, may hold anything, spaces and
                # parentheses too.
                state, parent = stat.rpartition(")")[2].split()[:2]
                if state not in ("Z", "X"):
                    processes[int(entry)] = (int(parent), state)
    return processes


def _environment(pid: int) -> list[bytes]:
    try:
        return pathlib.Path("/proc", str(pid), "environ").read_bytes().split(b"\0")
    except OSError:
        # It ended, or belongs to another user.
        return []
