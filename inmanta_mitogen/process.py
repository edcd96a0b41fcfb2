"""
Runs programs on this host.
"""

import contextlib
import errno
import io
import math
import os
import re
import selectors
import signal
import stat
import subprocess
import threading
import time
from typing import (
    IO,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

from inmanta_mitogen.names import AnyPath, encode, native

#: As much as a pipe holds on Linux, pipe(7).
_CHUNK = 1 << 16

#: How often to look whether a command that prints nothing has ended, in seconds. That it closes its
#: output tells the same at once, so this matters for commands that leave a daemon behind only.
_POLL = 0.1

#: How long nothing has to come, once the command itself has ended, until those who still hold its
#: output are not waited for any longer; and for how long they are listened to at most. In seconds.
_QUIET = 0.5
_LINGER = 2.0

#: How long to wait for a killed process to be gone, in seconds. One that waits for a dead network
#: file system can't even be killed.
_REAP = 5.0

#: How much of what a command printed is quoted in an exception, in bytes.
_QUOTED_START = 1000
_QUOTED_END = 3000

#: How often to look for processes that were started while others were being stopped.
_ROUNDS = 20

#: How many killed processes are named in an exception.
_NAMED = 20

_CONTROL = {code: f"\\x{code:02x}" for code in [*range(32), 127] if chr(code) not in "\t\n"}


class Output(NamedTuple):
    """
    What came of a command.

    :attr stdout: What it printed, as it is.
    :attr stderr: What it printed as errors, as it is.
    :attr returncode: Its exit status, or the negative number of the signal that ended it.
    """

    stdout: bytes
    stderr: bytes
    returncode: int


class CommandTimeoutError(subprocess.TimeoutExpired):
    """
    A command did not end in time, and was killed with all its children.

    The text names the command (not its arguments, which may be secret), what was killed, and the
    first 1,000 and last 3,000 bytes of what had been printed on each stream, with what is no
    printable text written as ``\\xNN``.

    :attr output: All it had printed, in bytes; ``stdout`` is the same.
    :attr stderr: All it had printed as errors, in bytes.
    :attr killed: The processes that were killed, as texts.
    :attr survivors: The processes that could not be killed, as texts, with the reason.
    """

    def __init__(
        self,
        cmd: Sequence[AnyPath],
        timeout: float,
        output: bytes = b"",
        stderr: bytes = b"",
        killed: Sequence[str] = (),
        survivors: Sequence[str] = (),
    ) -> None:
        super().__init__(cmd, timeout, output, stderr)
        self.killed = killed
        self.survivors = survivors

    def __str__(self) -> str:
        command = os.fsdecode(encode_argument(self.cmd[0], "The command"))
        lines = [
            f"The command {command!r} (with {len(self.cmd) - 1} arguments) did not end within"
            f" {self.timeout:g} seconds.",
            f"Killed: {_enumerate(self.killed)}.",
        ]
        if self.survivors:
            lines.append(f"Still running: {_enumerate(self.survivors)}.")
        for name, raw in (("stdout", self.output), ("stderr", self.stderr)):
            if raw:
                lines.append(f"Its {name} until then:\n{_quote(raw)}")
            else:
                lines.append(f"Nothing on {name} until then.")
        return "\n".join(lines)


# What stands for a byte that is no UTF-8 after decoding with surrogateescape.
_ESCAPED = re.compile("[\udc80-\udcff]")


def run(
    command: str,
    arguments: Sequence[str] = [],
    env: Optional[Mapping[str, str]] = None,
    cwd: Optional[str] = None,
    timeout: Optional[float] = None,
    *,
    stdin: Union[str, bytes, None] = None,
) -> Tuple[str, str, int]:
    """
    Runs a command, without a shell, in a session of its own, and waits for its end.

    The end is that of the command itself. What is running in the background after that, such as
    a daemon which it started, is left alone. It is listened to until nothing has come for half
    a second, or for two seconds in all, if it kept the command's output open; printing to that
    later is an error (EPIPE) for it.

    :param command: The program: a path, or a name to look for on the PATH (that of ``env`` if it
        has one). A relative path is relative to ``cwd``.
    :param arguments: Its arguments.
    :param env: What to add to the environment. An inherited PYTHONPATH, which is this
        interpreter's own, is dropped unless it is given here.
    :param cwd: The directory to run it in, by default this process's.
    :param timeout: The seconds after which it is killed, with its children: its process group, its
        session, the processes that descend from it, and those it started that still hold its
        output. A daemon that has cut all these ties is not found. By default there is no limit.
    :param stdin: What it can read: bytes, or text, which is sent as UTF-8. By default nothing, an
        empty input.
    :return: What it printed, what it printed as errors, and its exit status, or the negative number
        of the signal that ended it. Both texts are UTF-8, without white space around them. A byte
        that is no UTF-8 is shown as U+FFFD and its value, ``\ufffd\\xe9``: a text without U+FFFD
        holds none. (Surrogates, as :pep:`383` has them, would be exact, and the orchestrator's
        database refuses them: a handler that logs such a text would never finish deploying.)
    :raises CommandTimeoutError: When it was killed at the timeout.
    :raises FileNotFoundError: When the command, or what it needs to start, or ``cwd``, is not
        there; the text says which of them, and where it was looked for.
    :raises PermissionError: When this user may not execute the command or enter ``cwd``.
    :raises OSError: When it can't be started for another reason.
    :raises TypeError: When an argument, a variable or the input is no string.
    :raises ValueError: When one of them is a string that no program can be given, with a NUL.
    """
    stdout, stderr, returncode = run_raw(command, arguments, env, cwd, timeout, stdin=stdin)
    return decode_output(stdout), decode_output(stderr), returncode


def decode_output(raw: bytes) -> str:
    """
    The text of what a command printed, as :func:`run` returns it.
    """
    try:
        return raw.decode("utf-8").strip()
    except UnicodeDecodeError:
        text = raw.decode("utf-8", "surrogateescape").strip()
        return _ESCAPED.sub(lambda match: "\ufffd\\x%02x" % (ord(match.group()) & 0xFF), text)


def run_raw(
    command: AnyPath,
    arguments: Sequence[AnyPath] = (),
    env: Optional[Mapping[str, str]] = None,
    cwd: Optional[AnyPath] = None,
    timeout: Optional[float] = None,
    *,
    stdin: Union[str, bytes, None] = None,
    max_size: Optional[int] = None,
) -> Output:
    """
    As :func:`run`, with the bytes that the command printed.

    :param max_size: The most bytes it may print, on both streams together. By default there is no
        limit.
    :raises OSError: Also when it printed more, and was killed for that with all its children.
    """
    _check_timeout(timeout)
    content = _stdin_bytes(stdin)
    argv = _arguments(command, arguments)
    process = _start(argv, _environment(env), cwd, content is not None)
    deadline = None if timeout is None else time.monotonic() + timeout
    streams = _Streams(process, content)
    try:
        try:
            with _ended_by_sigterm():
                in_time = _finish(argv, process, streams, deadline, max_size)
        except _Terminated:
            _kill(process, streams.pipes)
            os.kill(os.getpid(), signal.SIGTERM)
            raise
        except BaseException:
            _kill(process, streams.pipes)
            raise
        if in_time:
            return Output(streams.stdout.getvalue(), streams.stderr.getvalue(), process.wait())
        killed, survivors = _kill(process, streams.pipes)
        _drain(streams, time.monotonic() + _LINGER)
    finally:
        streams.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_REAP)
    # Without a timeout it can only be in time.
    assert timeout is not None
    raise CommandTimeoutError(
        [command, *arguments],
        timeout,
        streams.stdout.getvalue(),
        streams.stderr.getvalue(),
        killed,
        survivors,
    )


class _Terminated(BaseException):
    """
    This interpreter is told to end.
    """


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """
    Within it SIGTERM raises an exception, and ends this process afterwards as it always does.

    So ends an interpreter that the agent gave up or lost (mitogen sends it the signal itself), and
    the command that nobody waits for any more has to go with it.
    """
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    )
    if not ours:
        yield
        return

    def terminate(number: int, frame: object) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# Starting


def encode_argument(value: object, what: str) -> bytes:
    """
    :param what: How to name the value in an error, which does not show the value itself.
    """
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise TypeError(f"{what} must be a string, not {type(value).__name__}")
    try:
        raw = encode(value)
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} can't be encoded: {error.reason}") from None
    if b"\0" in raw:
        raise ValueError(f"{what} holds a NUL, which no program can be given")
    return raw


def _check_timeout(timeout: object) -> None:
    if timeout is None:
        return
    if not isinstance(timeout, (int, float)):
        kind = type(timeout).__name__
        raise TypeError(f"The timeout must be a number of seconds, not {kind}")
    if math.isnan(timeout):
        raise ValueError("The timeout must be a number of seconds, not NaN")


def _arguments(command: AnyPath, arguments: Sequence[AnyPath]) -> List[bytes]:
    if isinstance(arguments, (str, bytes)):
        kind = type(arguments).__name__
        raise TypeError(f"The arguments must be a list of strings, not one {kind}")
    argv = [encode_argument(command, "The command")]
    for number, argument in enumerate(arguments, 1):
        argv.append(encode_argument(argument, f"Argument {number}"))
    return argv


def _environment(env: Optional[Mapping[str, str]]) -> Dict[bytes, bytes]:
    environment = dict(os.environb)
    environment.pop(b"PYTHONPATH", None)
    for name, value in ({} if env is None else env).items():
        raw = encode_argument(name, f"The name {name!r} of an environment variable")
        if not raw or b"=" in raw:
            raise ValueError(f"{name!r} is no name for an environment variable")
        environment[raw] = encode_argument(value, f"The environment variable {name!r}")
    return environment


def _stdin_bytes(stdin: Union[str, bytes, None]) -> Optional[bytes]:
    if stdin is None or isinstance(stdin, (bytes, bytearray, memoryview)):
        return stdin
    if not isinstance(stdin, str):
        raise TypeError(f"The stdin must be bytes or text, not {type(stdin).__name__}")
    return stdin.encode("utf-8", "surrogateescape")


def _start(
    argv: List[bytes], env: Dict[bytes, bytes], cwd: Optional[AnyPath], with_stdin: bool
) -> "subprocess.Popen[bytes]":
    directory = None if cwd is None else encode_argument(cwd, "The cwd")
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
        name = os.fsdecode(argv[0])
        problem = None if cwd is None else _problem_of_cwd(native(cwd), name)
        raise problem or _problem_of_command(error, argv, env, directory) from error


def _problem_of_cwd(cwd: Union[str, bytes], command: str) -> Optional[OSError]:
    number = 0
    try:
        if not stat.S_ISDIR(os.stat(cwd).st_mode):
            number = errno.ENOTDIR
        elif not os.access(cwd, os.X_OK):
            number = errno.EACCES
    except OSError as error:
        number = error.errno or errno.EIO
    if not number:
        return None
    text = f"{os.strerror(number)}: the directory to run {command!r} in"
    return OSError(number, text, os.fsdecode(cwd))


def _problem_of_command(
    error: OSError, argv: List[bytes], env: Dict[bytes, bytes], cwd: Optional[bytes]
) -> OSError:
    command = os.fsdecode(argv[0])
    # The types know of text alone; get_exec_path takes bytes for bytes.
    searched = os.get_exec_path(env)  # type: ignore[arg-type]
    path = None if b"/" in argv[0] else searched
    found = next(_candidates(argv[0], path, cwd), None)
    where = "" if path is None else f" on the PATH {os.pathsep.join(map(os.fsdecode, path))}"
    if error.errno == errno.ENOENT and found is None:
        text = f"No such command{where}"
    elif error.errno == errno.ENOENT:
        text = (
            "The command is there ({}), but the interpreter of its first line, or the loader of the"
            " program, is not".format(os.fsdecode(found or b""))
        )
    elif error.errno == errno.EACCES:
        text = f"Not allowed to execute the command{where}"
    elif error.errno == errno.ENOEXEC:
        text = "Not a program, nor a script with an interpreter (#!) in its first line"
    elif error.errno == errno.E2BIG:
        size = sum(map(len, argv)) + sum(len(name) + len(value) for name, value in env.items())
        text = f"Arguments and environment too large ({size} bytes): use stdin or a file"
    else:
        text = f"{error.strerror}, when starting the command"
    return OSError(error.errno, text, command)


def _candidates(
    command: bytes, path: Optional[Sequence[Union[str, bytes]]], cwd: Optional[bytes]
) -> Iterator[bytes]:
    for directory in [b""] if path is None else map(os.fsencode, path):
        candidate = os.path.join(cwd or b"", directory, command)
        if os.path.lexists(candidate):
            yield candidate


# Listening


class _Streams:
    """
    The ends of a command's pipes that this process holds.

    :attr stdout: What it has printed so far.
    :attr stderr: What it has printed as errors so far.
    :attr pipes: The pipes it prints to, as procfs names them.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", stdin: Optional[bytes]) -> None:
        self.stdout = io.BytesIO()
        self.stderr = io.BytesIO()
        self.pipes: Set[str] = set()
        self._stdin = process.stdin
        self._unsent = memoryview(stdin or b"")
        # Not epoll, which needs a descriptor of its own.
        self._selector = selectors.PollSelector()
        self._files: List[IO[bytes]] = []
        for file, buffer in ((process.stdout, self.stdout), (process.stderr, self.stderr)):
            # Both were asked for, so both are there.
            assert file is not None
            self.pipes.add(f"pipe:[{os.fstat(file.fileno()).st_ino}]")
            self._files.append(file)
            self._selector.register(file, selectors.EVENT_READ, (file, buffer))
        if self._stdin is not None:
            os.set_blocking(self._stdin.fileno(), False)
            self._files.append(self._stdin)
            self._selector.register(self._stdin, selectors.EVENT_WRITE)

    @property
    def open(self) -> bool:
        """
        Whether there is still something to listen to, or to send.
        """
        return bool(self._selector.get_map())

    @property
    def size(self) -> int:
        """
        How many bytes it has printed so far.
        """
        return self.stdout.tell() + self.stderr.tell()

    def pump(self, timeout: float) -> bool:
        """
        Moves what can be moved.

        :param timeout: How many seconds to wait until something can.
        :return: Whether something was.
        """
        ready = self._selector.select(max(timeout, 0))
        for key, _ in ready:
            if key.data is None:
                self._send()
            else:
                self._receive(*key.data)
        return bool(ready)

    def stop_sending(self) -> None:
        """
        Closes the command's input.
        """
        if self._stdin is not None:
            self._close(self._stdin)
            self._stdin = None

    def close(self) -> None:
        """
        Closes everything.
        """
        for file in list(self._files):
            self._close(file)
        self._selector.close()

    def _receive(self, file: IO[bytes], buffer: io.BytesIO) -> None:
        chunk = os.read(file.fileno(), _CHUNK)
        if chunk:
            buffer.write(chunk)
        else:
            self._close(file)

    def _send(self) -> None:
        assert self._stdin is not None
        try:
            sent = os.write(self._stdin.fileno(), self._unsent[:_CHUNK])
        except BlockingIOError:
            return
        except BrokenPipeError:
            # The command does not want it, which is its own business.
            sent = len(self._unsent)
        self._unsent = self._unsent[sent:]
        if not self._unsent:
            self.stop_sending()

    def _close(self, file: IO[bytes]) -> None:
        if file in self._files:
            self._files.remove(file)
            self._selector.unregister(file)
            file.close()


def _finish(
    argv: List[bytes],
    process: "subprocess.Popen[bytes]",
    streams: _Streams,
    deadline: Optional[float],
    max_size: Optional[int],
) -> bool:
    """
    Listens until the command has ended.

    :return: Whether it did so in time.
    :raises OSError: It printed more than `max_size` bytes, and is to be killed for that.
    """
    looked = time.monotonic()
    while streams.open:
        now = time.monotonic()
        rest = math.inf if deadline is None else deadline - now
        if rest <= 0 or now - looked >= _POLL:
            looked = now
            if _has_ended(process):
                _drain(streams, now + min(rest, _LINGER))
                return True
            if rest <= 0:
                return False
        streams.pump(min(rest, _POLL))
        if max_size is not None and streams.size > max_size:
            raise OSError(
                f"The output of {os.fsdecode(argv[0])!r} has more than the {max_size} bytes that"
                " are accepted, and it was killed: have it print less, or raise max_size"
            )
    try:
        process.wait(None if deadline is None else deadline - time.monotonic())
    except subprocess.TimeoutExpired:
        return False
    return True


def _has_ended(process: "subprocess.Popen[bytes]") -> bool:
    if not hasattr(os, "waitid"):
        return process.poll() is not None
    try:
        # Its process id stays its own until it is waited for, so that nobody else can be killed in
        # its place.
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _drain(streams: _Streams, until: float) -> None:
    """
    Takes what the command left in its pipes, and what comes in from others while it comes.
    """
    streams.stop_sending()
    while streams.open:
        now = time.monotonic()
        if not streams.pump(min(_QUIET, until - now)) or now >= until:
            return


# Killing


class _Process(NamedTuple):
    """
    What proc(5) says of a process.
    """

    pid: int
    name: str
    state: str
    parent: int
    group: int
    session: int
    started: int

    def __str__(self) -> str:
        return f"{self.name} ({self.pid})"


def _kill(
    process: "subprocess.Popen[bytes]", pipes: Set[str]
) -> Tuple[Sequence[str], Sequence[str]]:
    """
    Kills a command and its children.

    :return: Which processes were killed, and which could not be.
    """
    if process.returncode is not None:
        return (), ()
    found: Dict[int, _Process] = {}
    for _ in range(_ROUNDS):
        fresh = _relatives(process.pid, found, pipes)
        if not fresh:
            break
        # A stopped process starts no others, so the rounds come to an end before the killing, which
        # makes orphans, begins.
        for relative in fresh:
            _signal(relative, signal.SIGSTOP)
            found[relative.pid] = relative
    survivors = [
        f"{relative}, as user {os.geteuid()} may not kill it"
        for relative in found.values()
        if not _signal(relative, signal.SIGKILL)
    ]
    # Where there is no procfs, this is all that can be done.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if not found:
        return [f"process group {process.pid}"], survivors
    left = {survivor.split(",")[0] for survivor in survivors}
    return [str(relative) for relative in found.values() if str(relative) not in left], survivors


def _signal(relative: _Process, number: signal.Signals) -> bool:
    """
    :return: Whether it got the signal, or is gone.
    """
    now = _read_process(relative.pid)
    if now is None or now.started != relative.started:
        return True
    try:
        os.kill(relative.pid, number)
    except ProcessLookupError:
        pass
    except PermissionError:
        return False
    return True


def _relatives(root: int, found: Mapping[int, _Process], pipes: Set[str]) -> List[_Process]:
    """
    :return: The living processes that belong to a command and are not among the ones found before:
        its process group and session, those that it started and that hold its output, and whatever
        descends from any of them.
    """
    table = {process.pid: process for process in _processes()}
    if root not in table:
        return []
    family = {root, *found}
    for process in table.values():
        ours = root in (process.group, process.session)
        if ours or (process.started >= table[root].started and _holds(process.pid, pipes)):
            family.add(process.pid)
    family -= {1, os.getpid()}
    while True:
        children = {process.pid for process in table.values() if process.parent in family}
        if children <= family:
            break
        family |= children
    return [
        process
        for process in table.values()
        if process.pid in family and process.pid not in found and process.state not in "ZX"
    ]


def _processes() -> Iterator[_Process]:
    try:
        entries = os.listdir("/proc")
    except OSError:
        return
    for entry in entries:
        if entry.isdigit():
            process = _read_process(int(entry))
            if process is not None:
                yield process


def _read_process(pid: int) -> Optional[_Process]:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read().decode("utf-8", "backslashreplace")
    except OSError:
        return None
    # The name is in parentheses and may hold some itself.
    name, _, rest = text.partition("(")[2].rpartition(")")
    fields = rest.split()
    parent, group, session = map(int, fields[1:4])
    return _Process(
        pid, name.translate(_CONTROL), fields[0], parent, group, session, int(fields[19])
    )


def _holds(pid: int, pipes: Set[str]) -> bool:
    """
    Whether a process can write to one of the pipes. This process and its forks can read from them.
    """
    directory = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for descriptor in os.listdir(directory):
            path = os.path.join(directory, descriptor)
            with contextlib.suppress(OSError):
                if os.readlink(path) in pipes and os.lstat(path).st_mode & stat.S_IWUSR:
                    return True
    return False


# Telling


def _enumerate(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    named = ", ".join(names[:_NAMED]) or "nothing"
    return named if more <= 0 else f"{named} and {more} more"


def _quote(raw: bytes) -> str:
    cut = len(raw) - _QUOTED_START - _QUOTED_END
    if cut > 0:
        middle = f"\n[{cut} bytes left out]\n".encode()
        raw = raw[:_QUOTED_START] + middle + raw[-_QUOTED_END:]
    return raw.decode("utf-8", "backslashreplace").rstrip("\n").translate(_CONTROL)
