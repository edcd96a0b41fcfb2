"""Run commands on this host."""

import contextlib
import io
import math
import os
import select
import signal
import subprocess
import threading
import time
from typing import IO, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from inmanta_mitogen.names import encode

MAX_SIZE = 1 << 30
"""The most bytes that a command may print, on both streams together, by default."""

# What a pipe holds, pipe(7), in bytes.
_CHUNK = 1 << 16
# How often to look whether a command that prints nothing has ended, in seconds.
_TICK = 0.1
# How long to wait for more output when the command itself has ended, in seconds.
_SILENCE = 5.0
# How long a command may take to end after SIGTERM, and after SIGKILL, in seconds.
_GRACE = 5.0

# Ends the process group of a command that still runs after a number of seconds.
_END_LATER = (
    "n=$2; while kill -s 0 $1 && [ $n -gt 0 ]; do sleep 1; n=$((n - 1)); done;"
    " kill -s 0 $1 && kill -s TERM -- -$1 && sleep 5 && kill -s KILL -- -$1"
)
# The standard input of what a shell runs in the background would be /dev/null.
_IN_BACKGROUND = "exec 3<&0; {{ {}; }} <&3 3<&- &"


def run(
    command: str,
    arguments: Sequence[str] = [],
    env: Optional[Mapping[str, str]] = None,
    cwd: Optional[str] = None,
    timeout: Optional[float] = None,
    *,
    stdin: Union[str, bytes, None] = None,
    max_size: Optional[int] = MAX_SIZE,
    call_timeout: Optional[float] = None,
) -> Tuple[str, str, int]:
    """
    Run a command, without a shell and in a session of its own, and wait for its end.

    Only the two timeouts and `max_size` end it: its process group gets SIGTERM, and SIGKILL five
    seconds later. When the connection is lost, or this interpreter is told to end, the command goes
    on. What it printed then is read and dropped. The same holds for what it leaves running in the
    background: after the command's own end this waits for the end of the output, or for five
    seconds without any.

    :param command: The program: a path, or a name to look for on the PATH (that of ``env`` if it
        has one). A relative path is relative to ``cwd``.
    :param arguments: Its arguments.
    :param env: What to add to the environment. An inherited PYTHONPATH, which is this
        interpreter's own, is dropped unless it is given here.
    :param cwd: The directory to run it in, by default this process's.
    :param timeout: The seconds after which it is ended. By default there is no limit.
    :param stdin: Its standard input: bytes, or text, which is sent as UTF-8. Empty by default.
    :param max_size: The most bytes it may print, on both streams together; None for any number.
    :param call_timeout: As `timeout`, for a caller who does not wait any longer than that.
    :return: Its standard output, its standard error, and its exit status, or the negative number of
        the signal that ended it. Both texts are UTF-8 without white space around them; U+FFFD
        replaces bytes that are not UTF-8.
    :raises inmanta_mitogen.failures.CommandTimeoutError: It was ended at the timeout.
    :raises FileNotFoundError: The command, what it needs to start, or ``cwd`` is missing; the text
        says which.
    :raises PermissionError: This user may not execute the command or enter ``cwd``.
    :raises OSError: It can't be started for another reason, or it printed more than `max_size`.
    :raises TypeError: An argument, a variable or the input is not a string.
    :raises ValueError: One of them holds a NUL or can't be encoded.
    """
    limits = [seconds for seconds in (timeout, call_timeout) if seconds is not None]
    limit = min(limits, default=math.inf)
    deadline = time.monotonic() + limit
    if isinstance(arguments, (str, bytes)):
        raise TypeError("The arguments must be a list of strings, not one string")
    argv = [encode(part) for part in [command, *arguments]]
    most = math.inf if max_size is None else max_size
    with _outlived_by_command() as told:
        process = _start(argv, _environment(env), cwd, stdin)
        running = _Command(process, deadline, most, told)
        try:
            in_time = running.follow()
            survived = not (in_time or running.end())
        finally:
            running.leave()
    if running.size > most:
        raise OSError(
            f"The output of {command!r} has more than the {max_size} bytes that are accepted, and"
            " it was ended: have it print less, or raise max_size"
        )
    stdout, stderr = (buffer.getvalue() for buffer in running.buffers)
    if in_time:
        return _text(stdout), _text(stderr), process.returncode
    from inmanta_mitogen.failures import CommandTimeoutError

    raise CommandTimeoutError([command, *arguments], limit, stdout, stderr, survived)


def _text(raw: bytes) -> str:
    return raw.strip().decode("utf-8", "replace")


@contextlib.contextmanager
def _outlived_by_command() -> Iterator[List[int]]:
    """
    Hold back SIGTERM and SIGHUP, which end an interpreter whose connection is lost.

    :return: The signals that came. This process dies of the first one when the block ends.
    """
    told = []  # type: List[int]
    # Other threads can't set handlers.
    settable = threading.current_thread() is threading.main_thread()
    if settable and signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        # Inherited from the agent's environment; every exit status would be lost.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if settable and signal.getsignal(number) == signal.SIG_DFL
    ]
    for number in numbers:
        signal.signal(number, lambda number, frame: told.append(number))
    try:
        yield told
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        if told:
            os.kill(os.getpid(), told[0])


# Start


def _environment(env: Optional[Mapping[str, str]]) -> Dict[bytes, bytes]:
    environment = dict(os.environb)
    environment.pop(b"PYTHONPATH", None)
    for name, value in (env or {}).items():
        environment[encode(name)] = encode(value)
    return environment


def _start(
    argv: List[bytes],
    env: Dict[bytes, bytes],
    cwd: Optional[str],
    stdin: Union[str, bytes, None],
) -> "subprocess.Popen[bytes]":
    directory = None if cwd is None else encode(cwd)
    with _stdin_file(stdin) as source:
        try:
            return subprocess.Popen(
                argv,
                bufsize=0,
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=directory,
                env=env,
                start_new_session=True,
            )
        except OSError as error:
            from inmanta_mitogen.failures import start_error

            raise start_error(error, argv[0], directory) from error


def _stdin_file(content: Union[str, bytes, None]) -> IO[bytes]:
    """Return a file without a name: unlike a pipe, it needs nobody who goes on writing."""
    if content is None:
        return open(os.devnull, "rb")
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogateescape")
    view = memoryview(content)
    if hasattr(os, "memfd_create"):
        file = open(os.memfd_create("stdin"), "w+b")  # noqa: SIM115  # closed by the caller
    else:
        import tempfile

        file = tempfile.TemporaryFile()  # noqa: SIM115
    file.write(view)
    file.seek(0)
    return file


# Follow


class _Command:
    """
    A running command, and this process's ends of its pipes.

    :param deadline: When to end it, on the monotonic clock.
    :param told: As soon as something is in it, this process has to end.
    """

    def __init__(
        self,
        process: "subprocess.Popen[bytes]",
        deadline: float,
        max_size: float,
        told: Sequence[int],
    ) -> None:
        self.size = 0
        self.buffers = (io.BytesIO(), io.BytesIO())
        self._max_size = max_size
        self._process = process
        self._deadline = deadline
        self._told = told
        self._poll = select.poll()
        self._pipes = {}  # type: Dict[int, Tuple[IO[bytes], io.BytesIO]]
        for pipe, buffer in zip((process.stdout, process.stderr), self.buffers):
            assert pipe is not None
            self._pipes[pipe.fileno()] = (pipe, buffer)
            self._poll.register(pipe, select.POLLIN)

    def follow(self) -> bool:
        """
        Read until the command and its output have ended.

        :return: False when it has to be ended: at its deadline, or as it printed too much.
        """
        heard = time.monotonic()
        # A process ends some microseconds after its output.
        pause = 2e-5
        while not self._told:
            now = time.monotonic()
            ended = self._process.poll() is not None
            if ended and (not self._pipes or now >= min(heard + _SILENCE, self._deadline)):
                break
            if self.size > self._max_size or (now >= self._deadline and not ended):
                return False
            wait = max(0.0, min(_TICK, self._deadline - now))
            if not self._pipes:
                time.sleep(min(pause, wait))
                pause *= 2
            elif self._read(wait) or not ended:
                heard = time.monotonic()
        return True

    def end(self) -> bool:
        """
        Send SIGTERM to its process group, and SIGKILL if there is something left of it later.

        :return: Whether it has ended.
        """
        pid = self._process.pid
        with contextlib.suppress(ProcessLookupError, PermissionError):
            for number in (signal.SIGTERM, signal.SIGKILL):
                os.killpg(pid, number)
                until = time.monotonic() + _GRACE
                while time.monotonic() < until:
                    if self._told:
                        self._deadline = 0.0
                        return False
                    self._read(_TICK / 2)
                    if self._process.poll() is not None and number == signal.SIGKILL:
                        break
                    # An error when nothing is left.
                    os.killpg(pid, 0)
        self._deadline = math.inf
        return self._process.poll() is not None

    def leave(self) -> None:
        """
        Leave what is still open, and the deadline, to other processes.

        Without a reader the next line that it prints would end a program by SIGPIPE.
        """
        ended = {number for number, event in self._poll.poll(0) if event & select.POLLHUP}
        for number, (pipe, _) in self._pipes.items():
            if number not in ended:
                _leave_behind("cat", stdin=pipe)
            pipe.close()
        if self._deadline < math.inf and self._process.poll() is None:
            left = max(0, math.ceil(self._deadline - time.monotonic()))
            _leave_behind(_END_LATER, self._process.pid, left)

    def _read(self, timeout: float) -> bool:
        """Return whether there was something to read, after `timeout` seconds at most."""
        ready = self._poll.poll(math.ceil(timeout * 1000))
        for descriptor, _ in ready:
            pipe, buffer = self._pipes[descriptor]
            chunk = os.read(descriptor, _CHUNK)
            if not chunk:
                self._poll.unregister(pipe)
                del self._pipes[descriptor]
                pipe.close()
            elif self.size <= self._max_size:
                self.size += len(chunk)
                buffer.write(chunk)
        return bool(ready)


def _leave_behind(
    script: str, *arguments: int, stdin: Union[int, IO[bytes]] = subprocess.DEVNULL
) -> None:
    with contextlib.suppress(OSError):
        # In a session of its own, out of reach of whoever ends this one.
        subprocess.call(
            ["/bin/sh", "-c", _IN_BACKGROUND.format(script), "sh", *map(str, arguments)],
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
