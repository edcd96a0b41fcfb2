"""Which Python interpreters a host has: asking it, reading its answer, letting it choose.

A ``python_path`` is a list that mitogen puts before its own arguments, so it may as well start a
shell script, which then runs on the host as the context's user, whichever method leads there. The
scripts are files beside this one. Nothing here connects to anything.

- :func:`probe_command` makes a ``python_path`` that reports on an interpreter and ends. What it
  prints comes back in the text of mitogen's error; :func:`parse_report` finds it there.
- :func:`auto_command` makes a ``python_path`` that picks the best interpreter and starts it.
"""

import dataclasses
import enum
import functools
import pathlib
import re
from collections.abc import Sequence

from inmanta_plugins.mitogen import settings

MINIMUM = (3, 6)
"""The oldest Python that runs the host's half of this module. (mitogen 0.3.45 to 0.3.54 themselves
start on 2.7 and on 3.6 and newer, by their metadata and by trying.)"""


class Status(enum.Enum):
    """What became of a requested interpreter, by the word that the scripts have for it."""

    USABLE = "usable"
    MISSING = "missing"
    """Nothing is there, or nothing that anybody could execute."""
    PERMISSION_DENIED = "denied"
    """The user may not execute it, though others may, or may not search the directory it is in."""
    TOO_OLD = "old"
    """It runs, and is older than :data:`MINIMUM`."""
    FAILED = "failed"
    """It starts, and ends without having run any code; also when it does not answer."""


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """An interpreter of a host, which ran."""

    path: str
    """Its absolute path."""
    version: str
    """Its version, as in ``"3.11.2"``."""

    @property
    def version_info(self) -> tuple[int, ...]:
        """The version as numbers."""
        return tuple(map(int, self.version.split(".")))

    def __str__(self) -> str:
        return f"{self.path} ({self.version})"


@dataclasses.dataclass(frozen=True)
class Report:
    """What a host said about its interpreters."""

    status: Status
    """Whether the one that it was asked for can be used, and if not, why."""
    exit_status: int | None
    """What that ended with, as a shell counts (128 and more for a signal); None where it was not
    started."""
    version: str
    """Its version, as in ``"3.11.2"``; empty when it did not tell."""
    name: str
    """Its name, which is not always the first element of the ``python_path``: ``python9`` of
    ``["/usr/bin/env", "python9"]``. ``auto`` after a search without success."""
    output: str
    """The end of what it printed, when it failed; else empty."""
    found: tuple[Interpreter, ...] = ()
    """All that run, newest first; each once, whatever number of names it has. Empty when the
    requested one is usable: then no other was looked for."""
    broken: tuple[str, ...] = ()
    """The paths of those that were found and do not run."""
    places: tuple[str, ...] = ()
    """The directories and patterns of directories that were searched, the user's PATH first. Empty
    when none was."""


def probe_command(python_path: Sequence[str]) -> list[str]:
    """
    Return a ``python_path`` to connect with, by the same method and to the same hop.

    The connection fails always, since it starts no mitogen; the text of the error is for
    :func:`parse_report`. It is an authentication of its own. It takes as long as the interpreters
    need to tell their versions, at most about 15 seconds.

    :param python_path: The interpreter in question, with its arguments: what mitogen would start.
    """
    # An empty argument would get lost on the way through su.
    requested = [element for element in python_path if element] or [" "]
    if "&&" in requested:
        # mitogen's ssh method leaves this one to the login shell: it would end the probe's command.
        line = " ".join("." if element == "source" else element for element in requested)
        requested = ["/bin/sh", "-c", f'{line} "$@"', "sh"]
    return [*_command("probe.sh"), str(len(requested)), *requested]


def auto_command() -> list[str]:
    """
    Return a ``python_path`` that starts the best interpreter of the host: the newest Python 3, at
    least :data:`MINIMUM`, among the usual names and places.

    Only those that really run count; a debug build, a pre-release or another implementation than
    CPython only where there is nothing else. Among equals the one that is first on PATH. Where
    there is none, the connection fails, and :func:`parse_report` finds in its text that it is
    missing.
    """
    return list(_command("auto.sh"))


def parse_report(text: str) -> Report | None:
    """
    Return what the host reported, None where no report is in the text: then the command of
    :func:`probe_command` or :func:`auto_command` was not run, or found an interpreter.

    :param text: The text of the error that the connection failed with; it may hold anything else.
    """
    requested: tuple[Status, int | None, str, str, str] | None = None
    found: dict[str, Interpreter] = {}
    broken: list[str] = []
    places: dict[str, None] = {}
    for line in _LINE.finditer(text):
        match [_decode(field) for field in line["fields"].split()]:
            case ["requested", word, status, version, name, output] if word in _STATUSES:
                exit_status = int(status[:9]) if status.isdecimal() else None
                requested = (Status(word), exit_status, version, name, output.strip())
            case ["found", version, path] if _VERSION.fullmatch(version):
                found[path] = Interpreter(path, version)
            case ["broken", _, path]:
                broken.append(path)
            case ["searched", searched]:
                # Those that the script passes over are not among them.
                absolute = (each for each in searched.split(":") if each.startswith("/"))
                places = dict.fromkeys(each for each in absolute if not each.endswith(_SHIMS))
    if requested is None:
        return None
    newest_first = sorted(found.values(), key=lambda each: each.version_info, reverse=True)
    return Report(*requested, tuple(newest_first), tuple(broken), tuple(places))


def describe_found(report: Report) -> str:
    """
    Return a phrase for people: which interpreters there are, or where none was found, and what was
    looked for.

    Empty when none was looked for.

    :param report: What a host reported.
    """
    usable = [each for each in report.found if each.version_info >= MINIMUM]
    parts = []
    if usable:
        parts.append(f"found on that host: {_listed(usable)}")
    elif report.places:
        parts.append(
            f"no Python {'.'.join(map(str, MINIMUM))} or newer was found on that host; looked for"
            f" python3, python3.N, python and platform-python in {_listed(report.places)}"
        )
    if too_old := [each for each in report.found if each not in usable]:
        parts.append(f"too old: {_listed(too_old)}")
    if report.broken:
        parts.append(f"there, but not working: {_listed(report.broken)}")
    return "; ".join(parts)


def _listed(things: Sequence[object]) -> str:
    return ", ".join(map(str, things))


_STATUSES = {status.value for status in Status}
_SHIMS = ("/shims", "/shims/")
_VERSION = re.compile(r"\d{1,4}(\.\d{1,4}){2}")

# The report's own characters only: the script, should something show it, has none of these lines.
_FIELD = r"(?:%[0-9a-f]*|[A-Za-z0-9/._+:@,=~*-]+)"
_LINE = re.compile(rf"\[\[inmanta-python(?P<fields>(?: {_FIELD}){{2,6}})\]\]")


def _decode(field: str) -> str:
    if not field.startswith("%"):
        return field
    digits = field[1:]
    return bytes.fromhex(digits[: len(digits) // 2 * 2]).decode("utf-8", "replace")


def _script(name: str) -> str:
    """Return a script beside this file, with what it includes and without what only people need."""
    text = pathlib.Path(__file__).with_name(name).read_text()
    code = re.sub(r"^ *(#.*)?\n|^ +", "", text, flags=re.MULTILINE)
    include = ". interpreters.sh\n"
    if include in code:
        code = _settings() + code.replace(include, _script("interpreters.sh"))
    return code


def _settings() -> str:
    """Return lines that set what the scripts take from here."""
    return (
        f'MINIMUM="{MINIMUM[0]}, {MINIMUM[1]}"\n'
        f"PROBE_SECONDS={settings.PROBE_SECONDS}\n"
        f"MOST_SILENT={settings.PROBED_SILENT}\n"
        f"MOST_TRIED={settings.PROBED}\n"
        f"MOST_OUTPUT={settings.PROBE_OUTPUT}\n"
    )


@functools.cache
def _command(name: str) -> tuple[str, ...]:
    """
    Return the command that runs a script on a host.

    It passes unharmed through the layers of quoting on the way: mitogen's for ssh (single quotes)
    and for su (double quotes, where a backslash keeps ``!`` from nothing), sudo's for a login shell
    (a backslash before everything but letters, digits and ``$``; one before a line's end swallows
    it) and login shells that are no POSIX shells.

    :param name: The name of a script beside this file.
    """
    encoded = re.sub(
        r"[$\"'`!\\\n]", lambda match: f"\\0{ord(match[0]):03o}", _script(name).strip()
    )
    return ("/bin/sh", "-c", f"eval \"$(printf %b '{encoded}')\"", "inmanta-python")
