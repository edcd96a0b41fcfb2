"""
Processes that end together with the one that started them, whatever happens in between.
"""

import collections.abc
import contextlib
import ctypes
import os
import pathlib
import secrets
import shutil
import signal
import subprocess
import tempfile
import types
import typing

import psutil

END_TIMEOUT = 10.0
"""How long a process has to end by itself before it is killed. In seconds."""

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_CHILD_SUBREAPER = 36


class Interrupted(BaseException):
    """
    Someone asked this process to end, with Ctrl-C or a signal.

    :param number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What a shell would report for a process that this signal ended."""
        return 128 + self.number


class ProcessFailedError(Exception):
    """
    A program that was started here ended otherwise than it should.

    :param what: What the program was meant to do.
    :param returncode: Its exit status, None when it did not end.
    :param output: The end of what it wrote.
    """

    def __init__(self, what: str, returncode: int | None, output: str) -> None:
        state = "does not answer" if returncode is None else f"ended with {returncode}"
        super().__init__(f"{what}: the program {state}")
        self.output = output
        self.add_note(output)


@contextlib.contextmanager
def interruptible() -> collections.abc.Iterator[None]:
    """
    Inside, SIGINT, SIGTERM and SIGHUP raise :class:`Interrupted`, wherever the main thread is.
    Only the first one does: the clean-up that follows is not to be interrupted in its turn.
    """

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        ignore_interrupts()
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in _INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_interrupts() -> None:
    """From here on nothing but SIGKILL stops this process: what follows is the clean-up."""
    for number in _INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def working_directory() -> collections.abc.Iterator[pathlib.Path]:
    """
    A new directory, removed in the end with all that is in it. Temporary files of this process and
    of its children are made in there too.

    Its path is short, as those of sockets have to be. Other users can enter it but not list it: the
    database does not run as root.
    """
    parent = tempfile.gettempdir()
    if len(parent) > 40:
        parent = "/tmp"
    # Known before it exists, so that no signal can come between the making and the remembering.
    path = pathlib.Path(parent, f"mitogen-demo-{secrets.token_hex(3)}")
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    try:
        path.mkdir(mode=0o711)
        path.chmod(0o711)
        os.environ["TMPDIR"] = tempfile.tempdir = str(path)
        yield path
    finally:
        if before[0] is None:
            os.environ.pop("TMPDIR", None)
        else:
            os.environ["TMPDIR"] = before[0]
        tempfile.tempdir = before[1]
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def no_orphans(*, timeout: float = END_TIMEOUT) -> collections.abc.Iterator[None]:
    """
    Whatever was started inside is gone at the end, daemons too: Linux hands the orphans among the
    descendants of this process to it.

    :param timeout: How long they have to end by themselves before they are killed. In seconds.
    """
    _adopt_orphans(True)
    before = {process.pid for process in psutil.Process().children()}
    try:
        yield
    finally:
        # Twice, as a process may have started another while the first ones were ended.
        for _ in range(2):
            orphans = [p for p in psutil.Process().children() if p.pid not in before]
            end(orphans, timeout=timeout)
        _adopt_orphans(False)


def start(
    command: collections.abc.Sequence[str],
    *,
    log: pathlib.Path,
    **options: typing.Any,
) -> subprocess.Popen[bytes]:
    """
    Start a program that runs in the background. A Ctrl-C at the terminal does not reach it.

    :param command: The program and its arguments.
    :param log: The file that gets what it writes.
    :param options: More keyword arguments of :class:`subprocess.Popen`.
    """
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **options,
        )


def neutral_environment() -> dict[str, str]:
    """
    Return the environment variables of this process without those that tell Python where to find
    packages, or inmanta how it is configured: what is started here is not to be mixed up with what
    else there is on this machine.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME")
        and (not name.startswith("INMANTA_") or name.startswith("INMANTA_MITOGEN_"))
    }


def finish(
    process: subprocess.Popen[bytes], *, what: str, log: pathlib.Path, timeout: float = 600.0
) -> None:
    """
    Wait for a program that was started with :func:`start`.

    :param process: The program.
    :param what: What it is meant to do, for the error.
    :param log: The file that gets what it writes.
    :param timeout: How long it may take. In seconds.
    :raises ProcessFailedError: When it ends with another status than 0, or not in time.
    """
    try:
        returncode = process.wait(timeout)
    except subprocess.TimeoutExpired:
        end([process])
        raise ProcessFailedError(what, None, tail(log)) from None
    if returncode != 0:
        raise ProcessFailedError(what, returncode, tail(log))


def end(
    processes: collections.abc.Sequence[subprocess.Popen[bytes] | psutil.Process],
    *,
    first: signal.Signals = signal.SIGTERM,
    timeout: float = END_TIMEOUT,
) -> None:
    """
    End processes along with all their descendants, and wait until they are gone.

    :param processes: The ones to end. Those that ended already are left out.
    :param first: The signal that asks them to end. Descendants that outlive them get SIGTERM.
    :param timeout: How long they have before they are killed. In seconds.
    """
    roots = [found for each in processes if (found := _find(each)) is not None]
    family = {member for root in roots for member in (root, *_descendants(root))}
    _send(roots, first)
    psutil.wait_procs(roots, timeout=timeout)
    family |= {member for known in list(family) for member in _descendants(known)}
    _send(family, signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=timeout / 2)
    _send(alive, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=timeout)
    for each in processes:
        if isinstance(each, subprocess.Popen):
            # psutil may have taken the exit status; Popen is to know that there is none left.
            each.poll()


def tail(path: pathlib.Path, lines: int = 40) -> str:
    """
    Return the end of a log, empty when there is none.

    :param path: The log.
    :param lines: How many of its last lines to return.
    """
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def _adopt_orphans(adopt: bool) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def _find(process: subprocess.Popen[bytes] | psutil.Process) -> psutil.Process | None:
    if isinstance(process, psutil.Process):
        return process
    if process.poll() is not None:
        return None
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid)
    return None


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def _send(processes: collections.abc.Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process.send_signal(number)
