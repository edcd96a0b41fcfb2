"""Why a command failed, for :mod:`inmanta_mitogen.process`; a host gets it when one did."""

import errno
import os
import subprocess
from typing import Optional, Sequence

from inmanta_mitogen.names import AnyPath, decode

# How much of each stream an error quotes, in bytes.
_QUOTED = 2000


class CommandTimeoutError(subprocess.TimeoutExpired):
    """
    A command did not end in time.

    Its process group got SIGTERM, and SIGKILL five seconds later if it was still there. The text
    has the command's name, without its arguments as these may be secret, and the last 2,000 bytes
    of each stream; `output` and `stderr` have all that it had printed.
    """

    def __init__(
        self,
        cmd: Sequence[AnyPath],
        timeout: float,
        output: bytes = b"",
        stderr: bytes = b"",
        survived: bool = False,
    ) -> None:
        self.survived = survived
        """Whether it could not be ended."""
        super().__init__(cmd, timeout, output, stderr)

    def __str__(self) -> str:
        outcome = "it could not be ended and is still running" if self.survived else "it was ended"
        lines = [f"Command {self.cmd[0]!r} timed out after {self.timeout:g} seconds; {outcome}"]
        for name, raw in (("stdout", self.output), ("stderr", self.stderr)):
            if raw:
                text = raw[-_QUOTED:].decode("utf-8", "backslashreplace").rstrip("\n")
                cut = "The end of its" if len(raw) > _QUOTED else "Its"
                lines.append(f"{cut} {name}:\n{text}")
        return "\n".join(lines)


def start_error(failure: OSError, command: bytes, directory: Optional[bytes]) -> OSError:
    """Return the error for a command that can't be started in a directory; it says why."""
    # That is the directory, where it can't be entered.
    name = failure.filename or command
    reason = os.strerror(failure.errno or errno.EIO)
    is_there = b"/" in command and os.path.isfile(os.path.join(directory or b"", command))
    if failure.errno == errno.ENOENT and name == command and is_there:
        reason = "The interpreter of its first line, or the loader of the program, is missing"
    return OSError(failure.errno, reason, decode(name))
