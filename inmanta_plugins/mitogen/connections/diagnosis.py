"""Why a connection failed: from what came back to the exception that says so."""

import re
from collections.abc import Callable, Mapping

import mitogen.core
from inmanta_plugins.mitogen.connections import interpreters
from inmanta_plugins.mitogen.errors import (
    Cause,
    ConnectError,
    PythonNotFoundError,
    first_of_python_path,
)
from inmanta_plugins.mitogen.hosts.streams import NoisyError
from inmanta_plugins.mitogen.texts import address_of, describe_hop, user_of

# How many of the last lines that came back an error shows.
SHOWN_LINES = 12

# What mitogen puts before the lines that it received, and before an error on a hop.
_WRAPPING = re.compile(
    r"error occurred on host [^:\n]*: |EOF on stream; last 100 lines received:\n"
)
_HINT = re.compile(r"\n\nNote: many versions of .* for more information\.$", re.DOTALL)

# The words of programs (in the C locale, or untranslated in any) and of mitogen. First match wins.
_SIGNS: tuple[tuple[Cause, tuple[str, ...]], ...] = (
    (
        Cause.HOST_KEY,
        (
            r"Host key verification failed",
            r"SSH reported an unrecognized or mismatching",
            r"SSH requested permission to accept unknown host key",
        ),
    ),
    (
        Cause.PASSWORD_REQUIRED,
        (
            r"password is required",
            r"password was requested, but none specified",
            r"(sudo|doas): a (terminal|tty) is required",
        ),
    ),
    (
        Cause.PASSWORD_WRONG,
        (r"password is incorrect", r"Authentication failure", r"Authentication failed"),
    ),
    (
        Cause.AUTHENTICATION,
        (
            r"SSH authentication is incorrect",
            r"^([^@\s]+@[^:]+: )?Permission denied \(",
            r"Too many authentication failures",
        ),
    ),
    (Cause.UNKNOWN_HOST, (r"Could not resolve hostname",)),
    (Cause.REFUSED, (r"ssh: connect to host .*: Connection refused",)),
    (
        Cause.UNREACHABLE,
        (r"ssh: connect to host .*: (.*timed out|No route to host|.*unreachable)",),
    ),
    (Cause.TIMEOUT, (r"\AConnection timed out\.\Z", r"Failed to setup connection after")),
    (
        Cause.NO_ROOM,
        (
            r"Failed to create a PTY",
            r"Resource temporarily unavailable",
            r"Cannot allocate memory",
            r"Too many open files",
            r"No space left on device",
        ),
    ),
    (
        Cause.NOT_ALLOWED,
        (
            r"is not in the sudoers file",
            r"is not allowed to (execute|run)",
            r"may not run sudo",
            r"doas: Operation not permitted",
            r"su: Permission denied",
            r"setns\(.*not permitted",
        ),
    ),
    (
        Cause.UNKNOWN_USER,
        (
            r"unknown user",
            r"[Uu]ser \S+ does not exist",
            r"unable to find user",
            r"[Nn]o such user",
        ),
    ),
    (
        Cause.NO_CONTAINER,
        (
            r"[Nn]o such container",
            r"no container with name",
            r"pods? \S+ not found",
            r"[Cc]ontainer \S+ is not running",
            r"container state improper",
            r"Instance not found",
            r"jail \S+ not found",
            r"failed to get (the )?init pid",
        ),
    ),
    (
        Cause.HOP_LOST,
        (
            r"respondent Context has disconnected",
            r"no route to \d+, my ID is",
            r"Broker (has exitted|began to shut down)",
        ),
    ),
)
_SIGN_PATTERNS = tuple(
    (cause, re.compile("|".join(f"(?:{sign})" for sign in signs), re.MULTILINE))
    for cause, signs in _SIGNS
)

_NOT_STARTED = re.compile(r"Child start failed: (?P<why>.*?)\. Command was: ", re.DOTALL)


class HopLost(mitogen.core.StreamError):  # type: ignore[misc]  # mitogen is not typed
    """The hop before the one to connect hung or went."""


def diagnose(
    hop: Mapping[str, object], failure: Exception, probe: Callable[[], str]
) -> ConnectError | PythonNotFoundError:
    """
    :param hop: The serialized context that could not be connected.
    :param failure: What mitogen raised.
    :param probe: Runs :func:`interpreters.probe_command` on the hop and returns what came back.
        Called only where the failure may be the interpreter's: it is a connection of its own.
    :return: The exception to raise.
    """
    text = str(failure)
    if isinstance(failure, NoisyError):
        return _connect_error(hop, Cause.OTHER, text)
    cause = _cause_of(hop, failure, text)
    if cause is not Cause.OTHER:
        return _connect_error(hop, cause, _what_came_back(text))
    # A search for an interpreter ("auto") that ended without one has reported already.
    report = interpreters.parse_report(text) or interpreters.parse_report(probe())
    if report is None:
        return _connect_error(hop, Cause.OTHER, _what_came_back(text))
    return _from_report(hop, report, text)


def unprepared(hop: Mapping[str, object], failure: Exception, version: str) -> ConnectError:
    """
    :param hop: The serialized context whose interpreter was connected, and could not be prepared.
    :param failure: What came of that.
    :param version: The version of its Python, empty where it could not tell.
    :return: The exception to raise.
    """
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers and numbers < interpreters.MINIMUM:
        return _too_old(hop, first_of_python_path(hop), version)
    return _connect_error(hop, _cause_of(hop, failure, str(failure)), _what_came_back(str(failure)))


def _too_old(
    hop: Mapping[str, object], program: str, version: str, found: str = ""
) -> ConnectError:
    needed = ".".join(map(str, interpreters.MINIMUM))
    detail = f"{program} is Python {version}, at least {needed} is needed"
    return _connect_error(hop, Cause.PYTHON_TOO_OLD, f"{detail}; {found}" if found else detail)


def _from_report(
    hop: Mapping[str, object], report: interpreters.Report, text: str
) -> ConnectError | PythonNotFoundError:
    requested = report.requested
    found = interpreters.describe_found(report)
    program = requested.name or first_of_python_path(hop)
    if requested.is_missing:
        return PythonNotFoundError(hop, found=found, missing=program)
    if requested.status is interpreters.Status.TOO_OLD:
        return _too_old(hop, program, str(requested.version), found)
    if requested.status is interpreters.Status.PERMISSION_DENIED:
        detail = f"the user may not execute {program}; {found}"
        return _connect_error(hop, Cause.PYTHON_DENIED, detail)
    if requested.status is interpreters.Status.FAILED:
        said = f" ({requested.output})" if requested.output else ""
        detail = f"{program} ended with status {requested.exit_status}{said}; {found}"
        return _connect_error(hop, Cause.PYTHON_FAILED, detail)
    return _connect_error(hop, Cause.OTHER, _what_came_back(text))


def _cause_of(hop: Mapping[str, object], failure: Exception, text: str) -> Cause:
    if isinstance(failure, HopLost):
        return Cause.HOP_LOST
    not_started = _NOT_STARTED.search(text)
    if not_started and hop["method_name"] == "local":
        return Cause.OTHER  # what could not be started is the interpreter: ask which ones are there
    bare = _WRAPPING.sub("", text)
    for cause, pattern in _SIGN_PATTERNS:
        if pattern.search(bare):
            return cause
    return Cause.PROGRAM_MISSING if not_started else Cause.OTHER


def _what_came_back(text: str) -> str:
    not_started = _NOT_STARTED.search(text)
    if not_started:
        return not_started["why"]
    lines = _HINT.sub("", _WRAPPING.sub("", text)).strip().splitlines()
    return "\n".join(lines[-SHOWN_LINES:]) or "the connection was closed without a word"


def _connect_error(hop: Mapping[str, object], cause: Cause, detail: str) -> ConnectError:
    return ConnectError(
        hop=describe_hop(hop),
        method=str(hop["method_name"]),
        address=address_of(hop),
        user=user_of(hop),
        cause=cause,
        detail=detail,
    )
