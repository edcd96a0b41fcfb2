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
from typing import (
    IO,
    Container,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Union,
)

from inmanta_mitogen.names import AnyPath, encode

#: The most bytes that a command may print, on both streams together, by default.
MAX_SIZE = 1 << 30

# What a pipe holds, pipe(7), in bytes.
_CHUNK = 1 << 16
# How often to look whether a command that prints nothing has ended, in seconds.
_TICK = 0.1
# How long to wait for more output when the command itself has ended, in seconds.
_SILENCE = 5.0
# How long a command may take to end after SIGTERM, and after SIGKILL, in seconds.
_GRACE = 5.0


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
    for seconds in limits:
        _check_timeout(seconds)
    limit = min(limits, default=math.inf)
    argv = _encode_arguments(command, arguments)
    environment = _environment(env)
    directory = None if cwd is None else _encode(cwd, "The cwd")
    content = _stdin_bytes(stdin)
    most = math.inf if max_size is None else max_size
    with _outlived_by_command() as told:
        process = _start(argv, environment, directory, content is not None)
        running = _Command(process, content, time.monotonic() + limit, most, told)
        try:
            in_time = running.follow()
            survived = not (in_time or running.end())
        finally:
            running.leave()
    if running.size > running.max_size:
        from inmanta_mitogen.failures import too_much_output

        raise too_much_output(argv, max_size)
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
    if threading.current_thread() is not threading.main_thread():
        # Others can't set handlers.
        yield told
        return
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        # Inherited from the agent's environment; every exit status would be lost.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) == signal.SIG_DFL
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


def _check_timeout(timeout: object) -> None:
    if not isinstance(timeout, (int, float)):
        kind = type(timeout).__name__
        raise TypeError(f"The timeout must be a number of seconds, not {kind}")
    if math.isnan(timeout):
        raise ValueError("The timeout must be a number of seconds, not NaN")


def _encode(value: object, what: str) -> bytes:
    # The errors don't show the value, which may be secret.
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise TypeError(f"{what} must be a string, not {type(value).__name__}")
    try:
        raw = encode(value)
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} can't be encoded: {error.reason}") from None
    if b"\0" in raw:
        raise ValueError(f"{what} holds a NUL, which no program can be given")
    return raw


def _encode_arguments(command: AnyPath, arguments: Sequence[AnyPath]) -> List[bytes]:
    if isinstance(arguments, (str, bytes)):
        kind = type(arguments).__name__
        raise TypeError(f"The arguments must be a list of strings, not one {kind}")
    argv = [_encode(command, "The command")]
    for number, argument in enumerate(arguments, 1):
        argv.append(_encode(argument, f"Argument {number}"))
    return argv


def _environment(env: Optional[Mapping[str, str]]) -> Dict[bytes, bytes]:
    environment = dict(os.environb)
    environment.pop(b"PYTHONPATH", None)
    for name, value in (env or {}).items():
        raw = _encode(name, f"The name {name!r} of an environment variable")
        if not raw or b"=" in raw:
            raise ValueError(f"{name!r} can't be the name of an environment variable")
        environment[raw] = _encode(value, f"The environment variable {name!r}")
    return environment


def _stdin_bytes(stdin: Union[str, bytes, None]) -> Optional[bytes]:
    if stdin is None or isinstance(stdin, (bytes, bytearray, memoryview)):
        return stdin
    if not isinstance(stdin, str):
        raise TypeError(f"The stdin must be bytes or text, not {type(stdin).__name__}")
    return stdin.encode("utf-8", "surrogateescape")


def _start(
    argv: List[bytes],
    env: Dict[bytes, bytes],
    directory: Optional[bytes],
    with_stdin: bool,
) -> "subprocess.Popen[bytes]":
    try:
        return subprocess.Popen(
            argv,
            bufsize=0,
            stdin=subprocess.PIPE if with_stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=directory,
            env=env,
            start_new_session=True,
        )
    except OSError as error:
        from inmanta_mitogen.failures import start_error

        raise start_error(error, argv, env, directory) from error


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
        stdin: Optional[bytes],
        deadline: float,
        max_size: float,
        told: Sequence[int],
    ) -> None:
        self.size = 0
        self.max_size = max_size
        self.buffers = (io.BytesIO(), io.BytesIO())
        self._process = process
        self._deadline = deadline
        self._told = told
        self._is_keeper = False
        self._unsent = memoryview(stdin or b"")
        self._poll = select.poll()
        self._pipes = {}  # type: Dict[int, Tuple[IO[bytes], Optional[io.BytesIO]]]
        for pipe, buffer in zip((process.stdout, process.stderr), self.buffers):
            assert pipe is not None
            self._pipes[pipe.fileno()] = (pipe, buffer)
            self._poll.register(pipe, select.POLLIN)
        if process.stdin is not None:
            os.set_blocking(process.stdin.fileno(), False)
            self._pipes[process.stdin.fileno()] = (process.stdin, None)
            self._poll.register(process.stdin, select.POLLOUT)

    def follow(self) -> bool:
        """
        Move data until the command and its output have ended.

        :return: False when it has to be ended: at its deadline, or as it printed too much.
        """
        heard = time.monotonic()
        while not self._told:
            tick = max(0.0, min(_TICK, self._deadline - time.monotonic()))
            moved = bool(self._pipes) and self._move(tick)
            if not self._pipes and self._has_ended(tick):
                break
            now = time.monotonic()
            if self.size > self.max_size:
                self._deadline = now
                return False
            if moved and now < self._deadline:
                heard = now
            elif not self._has_ended():
                heard = now
                if now >= self._deadline:
                    return False
            elif now >= min(heard + _SILENCE, self._deadline):
                break
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
                        return False
                    self._move(_TICK / 2)
                    if self._has_ended() and number == signal.SIGKILL:
                        break
                    # An error when nothing is left.
                    os.killpg(pid, 0)
        self._deadline = math.inf
        return self._has_ended()

    def leave(self) -> None:
        """
        Leave what is still open to another process, which reads it until its end.

        Without a reader the next line that it prints would end a program by SIGPIPE. The other
        process keeps the deadline too.
        """
        if self._pipes or (self._deadline < math.inf and not self._has_ended()):
            with contextlib.suppress(OSError):
                self._fork_keeper()
        for pipe, _ in list(self._pipes.values()):
            self._close(pipe)

    def _has_ended(self, timeout: float = 0) -> bool:
        if self._is_keeper:
            # Not its child any more, and whoever is notices its end.
            with contextlib.suppress(PermissionError):
                try:
                    os.kill(self._process.pid, 0)
                except ProcessLookupError:
                    return True
            return False
        # Popen.wait would sleep half a millisecond at first.
        delay = 2e-5
        while self._process.poll() is None and timeout > 0 and not self._told:
            time.sleep(min(delay, timeout))
            timeout -= delay
            delay *= 2
        return self._process.returncode is not None

    def _move(self, timeout: Optional[float]) -> bool:
        """Return whether there was something to move, after `timeout` seconds at most."""
        ready = self._poll.poll(None if timeout is None else math.ceil(timeout * 1000))
        for descriptor, _ in ready:
            pipe, buffer = self._pipes[descriptor]
            if buffer is None:
                self._send(pipe)
                continue
            chunk = os.read(descriptor, _CHUNK)
            if not chunk:
                self._close(pipe)
            elif self.size <= self.max_size:
                self.size += len(chunk)
                buffer.write(chunk)
        return bool(ready)

    def _send(self, pipe: IO[bytes]) -> None:
        try:
            sent = os.write(pipe.fileno(), self._unsent[:_CHUNK])
        except BlockingIOError:
            return
        except BrokenPipeError:
            # The command does not want it, which is its own business.
            sent = len(self._unsent)
        self._unsent = self._unsent[sent:]
        if not self._unsent:
            self._close(pipe)

    def _close(self, pipe: IO[bytes]) -> None:
        self._poll.unregister(pipe)
        del self._pipes[pipe.fileno()]
        pipe.close()

    def _fork_keeper(self) -> None:
        child = os.fork()
        if child:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)
            return
        try:
            # Out of reach of whoever ends the session, and nobody's child.
            os.setsid()
            if not os.fork():
                self._keep()
        finally:
            os._exit(0)

    def _keep(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.chdir("/")
        _close_others(self._pipes)
        self._is_keeper = True
        self._told = ()
        self.max_size = -1
        for buffer in self.buffers:
            buffer.close()
        while self._pipes or self._deadline < math.inf:
            self._move(None if self._deadline == math.inf else _TICK)
            if self._deadline < math.inf and self._has_ended():
                self._deadline = math.inf
            elif time.monotonic() >= self._deadline:
                self.end()


def _close_others(kept: Container[int]) -> None:
    # Whoever waits for the end of this interpreter's connection must not wait for the keeper.
    null = os.open(os.devnull, os.O_RDWR)
    try:
        descriptors = list(map(int, os.listdir("/proc/self/fd")))
    except OSError:
        descriptors = list(range(1024))
    for descriptor in descriptors:
        if descriptor not in kept:
            with contextlib.suppress(OSError):
                if descriptor < 3:
                    os.dup2(null, descriptor)
                else:
                    os.close(descriptor)
