"""Why a command failed, for :mod:`inmanta_mitogen.process`; a host gets it when one did."""

import errno
import os
import subprocess
from typing import Dict, List, Optional, Sequence

from inmanta_mitogen.names import AnyPath

# How much of each stream an error quotes, in bytes.
_QUOTED = 2000

# The arguments that an error may show: no others, as they may be secret.
_SUBCOMMANDS = (
    "build",
    "container",
    "image",
    "install",
    "network",
    "pod",
    "pull",
    "push",
    "update",
)
_CONTROL = {code: f"\\x{code:02x}" for code in [*range(32), 127] if code not in b"\t\n"}


class CommandTimeoutError(subprocess.TimeoutExpired):
    """
    A command did not end in time.

    Its process group got SIGTERM, and SIGKILL five seconds later if it was still there. The text
    has the command's name, without its arguments as these may be secret, and the last 2,000 bytes
    of each stream.

    :attr output: All it had printed on standard output; ``stdout`` is the same.
    :attr stderr: All it had printed on standard error.
    :attr survived: Whether it could not be ended.
    """

    def __init__(
        self,
        cmd: Sequence[AnyPath],
        timeout: float,
        output: bytes = b"",
        stderr: bytes = b"",
        survived: bool = False,
    ) -> None:
        super().__init__(cmd, timeout, output, stderr)
        self.survived = survived

    def __str__(self) -> str:
        first = f"Command {_title(self.cmd)!r} timed out after {self.timeout:g} seconds"
        outcome = "it could not be ended and is still running" if self.survived else "it was ended"
        lines = [f"{first}; {outcome}"]
        for name, raw in (("stdout", self.output), ("stderr", self.stderr)):
            if raw:
                text = raw[-_QUOTED:].decode("utf-8", "backslashreplace").rstrip("\n")
                cut = "The end of its" if len(raw) > _QUOTED else "Its"
                lines.append(f"{cut} {name}:\n{text.translate(_CONTROL)}")
        return "\n".join(lines)


def _title(argv: Sequence[AnyPath]) -> str:
    words = [_text(argv[0])]
    for argument in map(_text, argv[1:]):
        if argument not in _SUBCOMMANDS:
            break
        words.append(argument)
    return " ".join(words)


def _text(value: AnyPath) -> str:
    value = os.fspath(value)
    return value if isinstance(value, str) else value.decode("utf-8", "backslashreplace")


def too_much_output(argv: Sequence[AnyPath], max_size: Optional[int]) -> OSError:
    """Return the error for a command that printed more than `max_size` bytes."""
    return OSError(
        f"The output of {_title(argv)!r} has more than the {max_size} bytes that are accepted,"
        " and it was ended: have it print less, or raise max_size"
    )


def start_error(
    failure: OSError, argv: List[bytes], env: Dict[bytes, bytes], directory: Optional[bytes]
) -> OSError:
    """Return the error for a command that can't be started in a directory; it says why."""
    if directory is not None:
        try:
            os.stat(os.path.join(directory, b"."))
        except OSError as error:
            text = f"{error.strerror}: the directory to run {_text(argv[0])!r} in"
            return OSError(error.errno, text, _text(directory))
    return OSError(failure.errno, _reason(failure, argv, env, directory), _text(argv[0]))


def _reason(
    error: OSError, argv: List[bytes], env: Dict[bytes, bytes], directory: Optional[bytes]
) -> str:
    # The types know of text alone; get_exec_path takes bytes for bytes.
    path = [] if b"/" in argv[0] else os.get_exec_path(env)  # type: ignore[arg-type]
    where = f" on the PATH {os.pathsep.join(map(os.fsdecode, path))}" if path else ""
    candidates = [
        os.path.join(directory or b"", os.fsencode(entry), argv[0]) for entry in path or [""]
    ]
    found = next(filter(os.path.lexists, candidates), None)
    if error.errno == errno.ENOENT and found is not None:
        return (
            f"The command is there ({_text(found)}), but the interpreter of its first line, or the"
            " loader of the program, is not"
        )
    if error.errno == errno.ENOENT:
        words = _text(argv[0]).split()
        if len(words) < 2:
            return f"No such command{where}"
        return (
            "No such command: this is a command with its arguments in one string, pass them as a"
            f" list, run({words[0]!r}, [...])"
        )
    if error.errno == errno.EACCES:
        return f"Not allowed to execute the command{where}"
    if error.errno == errno.ENOEXEC:
        return "Not a program, nor a script with an interpreter (#!) in its first line"
    if error.errno == errno.E2BIG:
        size = sum(map(len, argv)) + sum(map(len, env)) + sum(map(len, env.values()))
        return f"Arguments and environment too large ({size} bytes): use stdin or a file"
    return f"{error.strerror}, when starting the command"
