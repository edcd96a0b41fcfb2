"""Why a connection failed: from what came back to the exception that says so."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence

import mitogen.core
from inmanta_mitogen.hop import WAITING
from inmanta_plugins.mitogen import settings
from inmanta_plugins.mitogen.connections import interpreters
from inmanta_plugins.mitogen.errors import (
    Cause,
    ConnectError,
    PythonNotFoundError,
    combined,
    first_of_python_path,
)
from inmanta_plugins.mitogen.hosts.streams import NoisyError

# The words of programs (in the C locale, or untranslated in any) and of mitogen, as they stand in
# one line. The last line that matches any wins. A host chooses what it says: no pattern may
# take more than linear time, so none has two parts of open length.
_SIGNS = {
    Cause.HOST_KEY: r"""
        Host key verification failed
        SSH reported an unrecognized or mismatching
        SSH requested permission to accept unknown host key
    """,
    Cause.PASSWORD_REQUIRED: r"""
        password is required
        (sudo|doas): a (terminal|tty) is required
    """,
    Cause.PASSWORD_WRONG: r"""
        password is incorrect
        Authentication failure
        Authentication failed
    """,
    Cause.AUTHENTICATION: r"""
        SSH authentication is incorrect
        SSH password was requested, but none specified
        ^([^@\s]{1,64}@[^:]{1,255}: )?Permission denied \(
        Too many authentication failures
    """,
    Cause.UNKNOWN_HOST: r"""
        Could not resolve hostname
    """,
    Cause.REFUSED: r"""
        ^ssh: connect to host .*: Connection refused
    """,
    Cause.UNREACHABLE: r"""
        ^ssh: connect to host .*(timed out|No route to host|unreachable)
    """,
    Cause.NO_ROOM: r"""
        Failed to create a PTY
        Resource temporarily unavailable
        Cannot allocate memory
        ^MemoryError
        failed to map segment from shared object
        Too many open files
        No space left on device
    """,
    Cause.NOT_ALLOWED: r"""
        is not in the sudoers file
        is not allowed to (execute|run)
        may not run sudo
        doas: Operation not permitted
        su: Permission denied
        setns\(.*not permitted
    """,
    Cause.UNKNOWN_USER: r"""
        unknown user
        [Uu]ser \S{1,64} does not exist
        unable to find user
        [Nn]o such user
    """,
    Cause.NO_CONTAINER: r"""
        [Nn]o such container
        no container with name
        pods? \S{1,300} not found
        [Cc]ontainer \S{1,300} is not running
        container state improper
        Instance not found
        jail \S{1,300} not found
        failed to get (the )?init pid
    """,
    Cause.HOP_LOST: r"""
        ^it did not answer for \d{1,10} seconds
        respondent Context has disconnected
        no route to \d{1,20}, my ID is
        Broker (has exitted|began to shut down)
    """,
}
_SIGN_PATTERNS = {
    cause: re.compile("|".join(f"(?:{sign.strip()})" for sign in signs.strip().splitlines()))
    for cause, signs in _SIGNS.items()
}

_EXPIRED = re.compile(
    r"(account|[Pp]assword) (or password )?(has|is) expired|required to change your password"
    r"|[Aa]uthentication token is no longer valid|account validation failure"
)

# A server that has more to do than it accepts (MaxStartups), or that is just being started.
_TRY_AGAIN = re.compile(
    r"^((kex|ssh)_exchange_identification: (read: )?Connection (reset|closed)|Connection reset by "
    r"|banner exchange: Connection to \S{1,300} port \d{1,5}: (Broken pipe|Connection reset))"
)

# What mitogen puts before what it received, once for each hop; and before an error of the system.
_ON_HOST = re.compile(r"error occurred on host [^:\n]{0,300}: ")
_END_OF_STREAM = "EOF on stream; last 100 lines received:\n"
_NOT_STARTED = "Child start failed: "
_TIMED_OUT = "Connection timed out."
# What mitogen adds for some methods; its own marks, and what ssh says when all is well.
_HINT = "\n\nNote: many versions of "
_OF_NO_USE = re.compile(
    r"(MITO00[012]$|\[\[Python |Warning: Permanently added |Authenticated to "
    r"|Transferred: |Bytes per sec)"
)

_MISSING_MODULE = re.compile(r"^(?:ModuleNotFound|Import)Error: No module named '?([\w.]{1,100})")
_TRACED_FILE = re.compile(r'^\s{0,4}File "([^"]{1,400})/(\w{1,50})\.py"')
# The end of the first statement of mitogen's first stage, and of the probe: who shows it was given
# it as an argument, and could make nothing of it.
_SOURCE = "sys.path=[p for p in sys.path"


class _Said:
    """What came back from a connection that failed, in lines of bounded length."""

    def __init__(self, text: str) -> None:
        while wrapping := _ON_HOST.match(text):
            text = text[wrapping.end() :]
        text = text.removeprefix(_END_OF_STREAM)
        self.not_started = text.startswith(_NOT_STARTED)
        if self.not_started:
            text = text[len(_NOT_STARTED) :].partition(". Command was: ")[0]
        text = text.rpartition(_HINT)[0] or text
        lines = [line[: settings.LONGEST_SHOWN_LINE] for line in text.strip().splitlines()]
        self.timed_out = lines[:1] == [_TIMED_OUT]
        self.lines = [line for line in lines if not _OF_NO_USE.match(line)]

    def __str__(self) -> str:
        return _shown(self.lines) or "the connection was closed without a word"

    @property
    def waiting(self) -> str:
        """The prompt at which it waited when it timed out."""
        last = self.lines[-1] if self.timed_out and self.lines else ""
        return last.removeprefix(WAITING) if last.startswith(WAITING) else ""

    def cause(self) -> Cause:
        """Return the cause, as far as it stands in the words."""
        # Before a time-out anything may have come, such as the host's message of the day.
        lines = self.lines[-3:] if self.timed_out else self.lines
        if any(map(_EXPIRED.search, lines)):
            return Cause.EXPIRED  # whatever is asked for then
        for line in reversed(lines):
            for cause, pattern in _SIGN_PATTERNS.items():
                if pattern.search(line):
                    return cause
        if self.waiting:
            second_factor = re.search(r"(?i)code|token|otp|factor|passcode", self.waiting)
            return Cause.AUTHENTICATION if second_factor else Cause.PASSWORD_REQUIRED
        if any(line.startswith("Traceback (most recent call last)") for line in self.lines):
            return Cause.PYTHON_FAILED
        if self.timed_out:
            return Cause.TIMEOUT
        return Cause.PROGRAM_MISSING if self.not_started else Cause.OTHER


def _shown(lines: Sequence[str]) -> str:
    kept = [line[: settings.LONGEST_SHOWN_LINE] for line in lines if _SOURCE not in line]
    if len(kept) < len(lines):
        kept.append("it is not a Python interpreter: it does not take -c with a program")
    return "\n".join([*kept[-settings.SHOWN_LINES :], *filter(None, [_about_python(kept)])])


def _about_python(lines: Sequence[str]) -> str:
    """Say what is wrong with a Python that ended with a traceback, where that can be known."""
    for line in lines:
        if missing := _MISSING_MODULE.match(line):
            return (
                f"This Python lacks the module {missing[1]}: install its whole standard library"
                " (python3-minimal of Debian and Ubuntu lacks it, the package python3 has it)."
            )
    for line in lines:
        file = _TRACED_FILE.match(line)
        if file and file[2] in sys.stdlib_module_names and "python" not in file[1].lower():
            return (
                f"{file[1]}/{file[2]}.py takes the place of a module of the standard library:"
                " rename it, or take its directory out of PYTHONPATH."
            )
    return ""


def try_again(failure: Exception) -> bool:
    """
    Return whether a server closed the connection before it asked for anything.

    :param failure: What mitogen raised.
    """
    return any(map(_TRY_AGAIN.match, _Said(str(failure)).lines))


def diagnose(
    hop: Mapping[str, object], failure: Exception, probe: Callable[[], str], command: str
) -> ConnectError | PythonNotFoundError:
    """
    Return the exception to raise for a hop that could not be connected.

    :param hop: The serialized context of the hop.
    :param failure: What mitogen raised.
    :param probe: Runs :func:`interpreters.probe_command` on the hop and returns what came back.
        Called only where the failure may be the interpreter's: it is a connection of its own.
    :param command: What was run to connect it.
    """
    if isinstance(failure, NoisyError):
        return ConnectError(hop, Cause.OTHER, str(failure))
    error = _diagnose(hop, str(failure), probe, command)
    # Who catches mitogen's exceptions by their class goes on to catch them.
    error.__class__ = combined(type(error), type(failure))
    return error


def _diagnose(
    hop: Mapping[str, object], text: str, probe: Callable[[], str], command: str
) -> ConnectError | PythonNotFoundError:
    said = _Said(text)
    cause = said.cause()
    # What a local hop could not start is the interpreter: ask which ones are there.
    not_started = said.not_started and hop["method_name"] == "local"
    if cause not in (Cause.OTHER, Cause.PYTHON_FAILED) and not not_started:
        unknown = said.waiting and hop.get("password") and hop["method_name"] in ("su", "doas")
        more = "\nIf that asks for the password, set password_prompt to it." if unknown else ""
        return ConnectError(hop, cause, f"{said}{more}")
    # A search for an interpreter ("auto") that ended without one has reported already.
    report = interpreters.parse_report(text) or interpreters.parse_report(probe())
    if report and (error := _from_report(hop, report)):
        return error
    shown = f"{said}\nThe command was: {command}" if command and cause is Cause.OTHER else str(said)
    return ConnectError(hop, cause, shown)


def too_old(hop: Mapping[str, object], program: str, version: str, found: str = "") -> ConnectError:
    """
    Return the exception to raise for a Python that can't run the host's part of this module.

    :param hop: The serialized context of the hop.
    :param program: The interpreter.
    :param version: Its version.
    :param found: Which others there are, where that is known.
    """
    needed = ".".join(map(str, interpreters.MINIMUM))
    detail = f"{program} is Python {version}, at least {needed} is needed"
    return ConnectError(hop, Cause.PYTHON_TOO_OLD, f"{detail}; {found}" if found else detail)


def _from_report(
    hop: Mapping[str, object], report: interpreters.Report
) -> ConnectError | PythonNotFoundError | None:
    found = interpreters.describe_found(report)
    program = report.name or first_of_python_path(hop)
    status = report.status
    if status is interpreters.Status.MISSING:
        return PythonNotFoundError(hop, found=found, missing=program)
    if status is interpreters.Status.TOO_OLD:
        return too_old(hop, program, report.version, found)
    if status is interpreters.Status.PERMISSION_DENIED:
        detail = f"the user may not execute {program}; {found}"
        return ConnectError(hop, Cause.PYTHON_DENIED, detail)
    if status is interpreters.Status.USABLE:
        return None
    if report.exit_status == 126 and hop["method_name"] == "sudo" and not report.found:
        detail = "sudo lets what it starts start no other programs (NOEXEC in sudoers)"
        return ConnectError(hop, Cause.NOT_ALLOWED, detail)
    output = _shown(report.output.splitlines())
    said = f" ({output})" if output else ""
    detail = f"{program} ended with status {report.exit_status}{said}; {found}"
    return ConnectError(hop, Cause.PYTHON_FAILED, detail)


def unprepared(hop: Mapping[str, object], failure: Exception) -> ConnectError:
    """
    Return the exception to raise for an interpreter that was connected, and can't be used.

    :param hop: The serialized context of the hop.
    :param failure: What came of preparing it.
    """
    if isinstance(failure, mitogen.core.TimeoutError):
        return ConnectError(hop, Cause.TIMEOUT, f"{_TIMED_OUT} Its Python runs, and is silent.")
    said = _Said(str(failure))
    return ConnectError(hop, said.cause(), str(said))
