"""Which Python interpreters a host has: asking it, reading its answer, letting it choose.

A ``python_path`` is a list that mitogen puts before its own arguments, so it may as well start a
shell script, which then runs on the host as the context's user, whichever method leads there. The
scripts here are data: nothing in this file connects to anything.

- :func:`probe_command` makes a ``python_path`` that reports on an interpreter and ends. What it
  prints comes back in the text of mitogen's error; :func:`parse_report` finds it there.
- :func:`auto_command` makes a ``python_path`` that picks the best interpreter and starts it.
"""

import dataclasses
import enum
import re
from collections.abc import Sequence

#: The oldest Python that runs the host's half of this module. (mitogen 0.3.45 to 0.3.54 themselves
#: start on 2.7 and on 3.6 and newer, by their metadata and by trying.)
MINIMUM = (3, 6)

#: The ``python_path`` that stands for "the best one there is".
AUTO = "auto"

#: What an interpreter may be called, apart from ``python3.N``.
UNVERSIONED_NAMES = ("python3", "python", "platform-python")

#: ``python3.N``, newest first.
VERSIONED_NAMES = tuple(f"python3.{minor}" for minor in range(20, MINIMUM[1] - 1, -1))

#: Where interpreters are looked for, after the directories on the user's PATH.
PLACES = (
    "/usr/local/bin",
    "/usr/bin",
    "/bin",
    "/usr/libexec",
    "/usr/local/python*/bin",
    "/opt/*/bin",
    "/opt/python/*/bin",
    "/opt/rh/*/root/usr/bin",
    "/usr/pkg/bin",
    "/snap/bin",
    "/run/current-system/sw/bin",
)

#: The same, below the user's home directory.
HOME_PLACES = (".local/bin", ".pyenv/versions/*/bin", ".local/share/uv/python/*/bin")

# How long one interpreter may take to tell its version, in seconds; how many that do not answer in
# that time, and how many in all, are tried. With two that hang, and the requested one hanging too,
# the answer is there after 15 s, half of mitogen's default connect_timeout.
_PATIENCE = 5
_MOST_SILENT = 2
_MOST_TRIED = 16

# How much of what a failing interpreter printed comes back, from its end, in bytes.
_MOST_OUTPUT = 1500

# Runs on any Python since 2.5. It imports what mitogen's first stages do and a build may lack (pty:
# not in Debian's python3-minimal) and writes: rank, version, executable. The rank is 0 for one that
# is too old; among the others the higher the better, with 100 more for a released CPython that is
# no debug build. Links are resolved since mitogen starts the interpreter anew with an argv[0] that
# does not exist, from which a relocated one (uv's) finds its library only by the real path. Not so
# for a virtual environment, which would be lost.
_PYTHON = (
    "import sys;sys.path=[p for p in sys.path if p];"
    "import binascii,fcntl,logging,math,os,pickle,pty,select,socket,termios,threading,zlib;"
    "d=os.path.dirname;"
    "b=[m.__file__ for m in (pickle,pty,socket,threading) if d(m.__file__)!=d(os.__file__)];"
    "b and sys.exit(b[0]+' takes the place of a module of the standard library');"
    "v=sys.version_info;e=sys.executable;g=getattr;"
    f"r=v[0]==3 and v[:2]>={MINIMUM} and v[1]+100*(v[3]=='final' and"
    " sys.implementation.name=='cpython' and not hasattr(sys,'gettotalrefcount'));"
    "e=sys.prefix==g(sys,'base_prefix',sys.prefix) and os.path.realpath(e) or e;"
    "n=chr(10);"
    "os.write(1,(n+'@py@%d %d.%d.%d '%((r,)+v[:3])).encode()+g(os,'fsencode',str)(e)+n.encode())"
)

# The scripts are POSIX sh for dash, bash, busybox, zsh, mksh, ksh and yash. Their texts and
# messages are never looked at, only exit statuses and files, so that no locale matters.
#
# t runs a command for a limited time. Not every host has timeout, and busybox's old one takes other
# arguments.
#
# say prints one line of the report. What isn't plain goes in hexadecimal: mitogen fails on bytes
# that aren't UTF-8, and its ssh, sudo and su methods act on words like "Permission denied" and
# "password" wherever these appear.
#
# told reads what _PYTHON wrote. each tries the interpreters called $N; pyenv's and asdf's shims are
# passed over for what they stand for. P becomes the best one. With A=1, for versioned names in
# falling order, it stops as soon as nothing better can come; with A=2, for the other names after
# these, what links to a versioned name beside it is no news. A home directory counts only when the
# user owns it: one who became root may have kept the home of another.
_COMMON = r"""
set +f +e +u +x +v +C
C="{python}"
T=$(PATH=/usr/bin:/bin:$PATH; command -v timeout) && "$T" -k 1 9 /bin/sh -c : 2>/dev/null || T=
t() {
if [ "$T" ]; then "$T" -k 1 {patience} "$@" </dev/null; return; fi
"$@" </dev/null & c=$!
(exec >/dev/null 2>&1; sleep {patience} & z=$!; trap "kill $z" TERM; wait $z && kill -9 $c) & z=$!
wait $c; c=$?; kill $z 2>/dev/null; return $c
}
enc() {
LC_ALL=C; PATH=$PATH:/usr/bin:/bin
case $1 in
*[!A-Za-z0-9/._+:@,=~-]*|"")
printf %%; printf %s "$1" | tail -c {output} | od -An -v -tx1 | tr -d " \n";;
*) printf %s "$1";;
esac
}
say() { L=; for q; do L="$L $(enc "$q")"; done; printf "\n[[inmanta-python%s]]\n" "$L"; }
told() {
case $o in *@py@[0-9]*) ;; *) return 1;; esac
x=${o##*@py@}; x=${x%%"
"*}; r=${x%% *}; x=${x#* }; v=${x%% *}; x=${x#* }
}
known() {
I=$IFS; IFS=:
for q in $S; do IFS=$I; [ "$q" -ef "$1" ] && return; done
IFS=$I; return 1
}
each() {
I=$IFS; IFS=:; set -- $D; IFS=$I
for n in $N; do for d; do
case $d in */shims|*/shims/) continue;; /*) ;; *) continue;; esac
f=${d%/}/$n
[ -f "$f" ] && [ -x "$f" ] && ! known "$f" || continue
case $A$P in 2/*) for q in $V; do [ "$f" -ef "${f%/*}/$q" ] && continue 2; done;; esac
S=$S:$f; l=$((l+1)); [ $l -gt {tried} ] && return
o=$(t "$f" -c "$C" 2>/dev/null); s=$?
if told; then
F=$F$(say found $v "$f")
[ $r -gt $b ] && b=$r && P=$f && [ "$x" -ef "$f" ] && P=$x
case $A in 1) [ $r -ge $((100+${n#*.})) ] && return;; esac
else
F=$F$(say broken $s "$f")
case $s in 124|137|143) w=$((w+1)); [ $w -ge {silent} ] && return;; esac
fi
done; done
}
F= P= S= A= l=0 b=0 w=0
D=$PATH:{places}
[ -O "$HOME" ] && D=$D:{homes}
"""

# kind says what a path is. One that is not seen is followed, up its directories and along its
# links, to the first thing that is: when that is a directory which the user may not search, nobody
# can say that the interpreter is missing. lookup finds a name on PATH; a closed directory there
# (U=1) denies nothing by itself, even if programs take it for that and end with 126.
#
# word finds the interpreter among the arguments of a program that starts it (env, nice, sh -c).
# judge runs the requested command as mitogen would, with $C instead of mitogen's code. A status of
# 127 says "not there" for whatever a program or a script (of pyenv, or one whose own interpreter is
# gone) was to start; an executable that ends with it by itself did start.
_PROBE = r"""
{common}
kind() {
if [ -d "$1" ]; then K=directory
elif [ -f "$1" ] && [ -x "$1" ]; then K=ok
elif [ -e "$1" ]; then
case $(PATH=/usr/bin:/bin:$PATH; ls -ldL "$1" 2>/dev/null) in
-??[xs]*|-?????[xs]*|-????????[xt]*) K=denied;; *) K=plain;;
esac
else
x=$1; c=0; K=missing; [ -L "$x" ] && K=dangling
until [ -e "$x" ] || [ "$x" = . ]; do
c=$((c+1))
if [ $c -lt 40 ] && [ -L "$x" ] && y=$(PATH=$PATH:/usr/bin:/bin; readlink "$x"); then
case $y in /*) x=$y;; *) x=${x%/*}/$y;; esac
else
case ${x%/*} in "") x=/;; "$x") x=.;; *) x=${x%/*};; esac
fi
done
[ -d "$x" ] && ! [ -x "$x" ] && K=denied
fi
}
lookup() {
case $1 in */*) f=$1; kind "$f"; return;; esac
B=missing; U=; n=$1; I=$IFS; IFS=:; set -f; set -- $PATH; set +f; IFS=$I
for d; do
f=${d:-.}/$n
kind "$f"; [ $K = ok ] && return
if [ -e "$f" ] || [ -L "$f" ]; then [ $B = missing ] && B=$K; elif [ $K = denied ]; then U=1; fi
done
K=$B
}
word() {
shift; set -f
for q in $*; do
case $q in
-*|*=*|[0-9]*|exec|*[\"\;\$]*) ;;
*python*|*pypy*) W=$q; break;;
*) [ "$W" ] || W=$q;;
esac
done
set +f
}
judge() {
W=$1; s=-; v=; r=0; o=; lookup "$1"; [ $K = ok ] || return
o=$(t "$@" -c "$C" 2>&1); s=$?
if told; then K=python; o=; return; fi
K=failed; S=$f
case $s in 126|127) ;; *) return;; esac
case ${1##*/} in *python*|*pypy*) ;; *) W=; word "$@"; : "${W:=$1}";; esac
if [ "$W" != "$1" ]; then
if [ $s = 127 ]; then K=missing; return; fi
U=
lookup "$W"; case $K$U in ok*|missing) K=failed;; esac; return
fi
y=; { IFS= read -r y <"$f"; } 2>/dev/null
case $y in "#!"*) ;; *) return;; esac
y=${y#??}; set -- $y; [ $s = 127 ] || ! [ -e "$1" ] && K=missing
}
k=$1; shift; n=$k
while [ $n -gt 0 ]; do set -- "$@" "$1"; shift; n=$((n-1)); done
shift $(($# - k))
judge "$@"
say requested $K $s "$v" "$W" "$o"
[ $r -gt 0 ] && exit 1
N="{names}"
each 2>/dev/null
printf "%s\n" "$F"
say searched "$PATH"
exit 1
"""

# In a subshell, so that no variable of the search is left in the environment of the interpreter. In
# a function, since bash before version 4 can't read a "case" right inside of "$(...)".
_AUTO = r"""
search() {
{common}
V="{versioned}"
A=1; N=$V; each
A=2; N="{unversioned}"; each
if [ "$P" ]; then printf %s "$P"; return; fi
say requested missing - "" {auto} ""
printf "%s\n" "$F"
say searched "$PATH"
}
set -- "$(search 2>/dev/null)" "$@"
case $1 in /*) exec "$@";; esac
printf "%s\n" "$1"
exit 127
"""


class Status(enum.Enum):
    """What became of a requested interpreter."""

    USABLE = "usable"
    MISSING = "missing"
    #: A file that nobody may execute: it has no x bit.
    NOT_EXECUTABLE = "not executable"
    DIRECTORY = "a directory"
    DANGLING = "a dangling symlink"
    #: The user may not execute it, though others may, or may not search the directory it is in.
    PERMISSION_DENIED = "permission denied"
    #: It runs, and is older than :data:`MINIMUM`.
    TOO_OLD = "too old"
    #: It starts, and ends without having run any code; also when it does not answer.
    FAILED = "failed"


_MISSING = frozenset({Status.MISSING, Status.NOT_EXECUTABLE, Status.DIRECTORY, Status.DANGLING})

_KINDS = {
    "missing": Status.MISSING,
    "plain": Status.NOT_EXECUTABLE,
    "directory": Status.DIRECTORY,
    "dangling": Status.DANGLING,
    "denied": Status.PERMISSION_DENIED,
    "failed": Status.FAILED,
}


@dataclasses.dataclass(frozen=True)
class Requested:
    """
    What a host said about the interpreter it was asked for.

    :attr status: Whether it can be used, and if not, why.
    :attr name: The interpreter, which is not always the first element of the ``python_path``:
        ``python9`` of ``["/usr/bin/env", "python9"]``. :data:`AUTO` after a search without success.
    :attr version: Its version, as in ``"3.11.2"``; None unless the status is USABLE or TOO_OLD.
    :attr exit_status: What it ended with, as a shell counts (128 and more for a signal); None
        where it was not started.
    :attr output: The end of what it printed, when it failed; else empty.
    """

    status: Status
    name: str
    version: str | None = None
    exit_status: int | None = None
    output: str = ""

    @property
    def is_missing(self) -> bool:
        """Whether there is no such interpreter, rather than one that can't be used."""
        return self.status in _MISSING


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """
    An interpreter of a host, which ran.

    :attr path: Its absolute path.
    :attr version: Its version, as in ``"3.11.2"``.
    """

    path: str
    version: str

    @property
    def version_info(self) -> tuple[int, ...]:
        """The version as numbers."""
        return _numbers(self.version)

    def __str__(self) -> str:
        return f"{self.path} ({self.version})"


@dataclasses.dataclass(frozen=True)
class Report:
    """
    What a host said about its interpreters.

    :attr requested: The one that it was asked for.
    :attr found: All that run, newest first; each once, whatever number of names it has. Empty when
        the requested one is usable: then no other was looked for.
    :attr broken: The paths of those that were found and do not run.
    :attr places: The directories and patterns of directories that were searched, the user's PATH
        first. Empty when none was.
    """

    requested: Requested
    found: tuple[Interpreter, ...] = ()
    broken: tuple[str, ...] = ()
    places: tuple[str, ...] = ()

    @property
    def is_missing(self) -> bool:
        """See :attr:`Requested.is_missing`."""
        return self.requested.is_missing

    @property
    def searched(self) -> tuple[str, ...]:
        """The names and the places that were looked at."""
        if not self.places:
            return ()
        return (UNVERSIONED_NAMES[0], *VERSIONED_NAMES, *UNVERSIONED_NAMES[1:], *self.places)


def is_auto(python_path: object) -> bool:
    """
    :param python_path: The ``python_path`` of a context, or None.
    :return: Whether it leaves the choice of the interpreter to the host.
    """
    if isinstance(python_path, str):
        return python_path == AUTO
    return isinstance(python_path, list | tuple) and list(python_path) == [AUTO]


def probe_command(python_path: Sequence[str]) -> list[str]:
    """
    :param python_path: The interpreter in question, with its arguments: what mitogen would start.
    :return: A ``python_path`` to connect with, by the same method and to the same hop. The
        connection fails always, since it starts no mitogen; the text of the error is for
        :func:`parse_report`. It is an authentication of its own. It takes as long as the
        interpreters need to tell their versions, at most about 15 seconds.
    """
    # An empty argument would get lost on the way through su.
    requested = [element for element in python_path if element] or [" "]
    if "&&" in requested:
        # mitogen's ssh method leaves this one to the login shell: it would end the probe's command.
        line = " ".join("." if element == "source" else element for element in requested)
        requested = ["/bin/sh", "-c", f'{line} "$@"', "sh"]
    return [*_PROBE_COMMAND, str(len(requested)), *requested]


def auto_command() -> list[str]:
    """
    :return: A ``python_path`` that starts the best interpreter of the host: the newest Python 3, at
        least :data:`MINIMUM`, among the usual names and places. Only those that really run count; a
        debug build, a pre-release or another implementation than CPython only where there is
        nothing else. Among equals the one that is first on PATH. Where there is none, the
        connection fails, and :func:`parse_report` finds in its text that it is missing.
    """
    return list(_AUTO_COMMAND)


def parse_report(text: str) -> Report | None:
    """
    :param text: The text of the error that the connection failed with; it may hold anything else.
    :return: What the host reported, None where no report is in the text: then the command of
        :func:`probe_command` or :func:`auto_command` was not run, or found an interpreter.
    """
    requested: Requested | None = None
    found: dict[str, Interpreter] = {}
    broken: list[str] = []
    places: tuple[str, ...] = ()
    for line in _LINE.finditer(text):
        match [_decode(field) for field in line["fields"].split()]:
            case ["requested", kind, exit_status, version, name, output]:
                requested = _requested(kind, exit_status, version, name, output) or requested
            case ["found", version, path] if _VERSION.fullmatch(version):
                found[path] = Interpreter(path, version)
            case ["broken", _, path]:
                broken.append(path)
            case ["searched", path]:
                places = _places(path)
    if requested is None:
        return None
    newest_first = sorted(found.values(), key=lambda each: each.version_info, reverse=True)
    return Report(requested, tuple(newest_first), tuple(broken), places)


def describe_found(report: Report) -> str:
    """
    :param report: What a host reported.
    :return: A phrase for people: which interpreters there are, or where none was found, and what
        was looked for. Empty when none was looked for.
    """
    usable = [each for each in report.found if each.version_info >= MINIMUM]
    parts = []
    if usable:
        parts.append(f"found on that host: {_listed(usable)}")
    elif report.places:
        parts.append(
            f"no Python {_dotted(MINIMUM)} or newer was found on that host; looked for"
            f" {UNVERSIONED_NAMES[0]}, {VERSIONED_NAMES[0]} to {VERSIONED_NAMES[-1]},"
            f" {_listed(UNVERSIONED_NAMES[1:])} in {_listed(report.places)}"
        )
    if too_old := [each for each in report.found if each not in usable]:
        parts.append(f"too old: {_listed(too_old)}")
    if report.broken:
        parts.append(f"there, but not working: {_listed(report.broken)}")
    return "; ".join(parts)


def _requested(
    kind: str, exit_status: str, version: str, name: str, output: str
) -> Requested | None:
    ended_with = int(exit_status) if exit_status.isdecimal() else None
    if kind == "python" and _VERSION.fullmatch(version):
        status = Status.USABLE if _numbers(version) >= MINIMUM else Status.TOO_OLD
        return Requested(status, name, version=version, exit_status=ended_with)
    if kind not in _KINDS:
        return None
    lines = [output.strip()] if output.strip() else []
    if kind == "failed" and ended_with in _GIVEN_UP:
        lines.insert(0, f"no answer within {_PATIENCE} seconds, or killed")
    return Requested(_KINDS[kind], name, exit_status=ended_with, output="\n".join(lines))


def _places(path: str) -> tuple[str, ...]:
    # What each() passes over.
    directories = [
        directory.rstrip("/") or "/"
        for directory in path.split(":")
        if directory.startswith("/") and not directory.rstrip("/").endswith("/shims")
    ]
    homes = [f"~/{place}" for place in HOME_PLACES]
    return tuple(dict.fromkeys([*directories, *PLACES, *homes]))


def _listed(things: Sequence[object]) -> str:
    return ", ".join(map(str, things))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))


# What timeout ends with, or what was killed by it, with TERM or with KILL.
_GIVEN_UP = (124, 137, 143)

_VERSION = re.compile(r"\d{1,4}(\.\d{1,4}){2}")

# The report's own characters only: the script, should something show it, has none of these lines.
_FIELD = r"(?:%[0-9a-f]*|[A-Za-z0-9/._+:@,=~-]+)"
_LINE = re.compile(rf"\[\[inmanta-python(?P<fields>(?: {_FIELD}){{2,6}})\]\]")


def _decode(field: str) -> str:
    if not field.startswith("%"):
        return field
    digits = field[1:]
    return bytes.fromhex(digits[: len(digits) // 2 * 2]).decode("utf-8", "replace")


def _shell(script: str) -> list[str]:
    """
    :param script: A script for sh.
    :return: The command that runs it. It passes unharmed through the layers of quoting on the way:
        mitogen's for ssh (single quotes) and for su (double quotes, where a backslash keeps ``!``
        from nothing), sudo's for a login shell (a backslash before everything but letters, digits
        and ``$``; one before a line's end swallows it) and login shells that are no POSIX shells.
    """
    encoded = re.sub(r"[$\"'`!\\\n]", lambda match: f"\\0{ord(match[0]):03o}", script.strip())
    return ["/bin/sh", "-c", f"eval \"$(printf %b '{encoded}')\"", "inmanta-python"]


def _fill(script: str, **values: str) -> str:
    # No str.format: shells love braces.
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), script)


_COMMON_FILLED = _fill(
    _COMMON.strip(),
    python=_PYTHON,
    patience=str(_PATIENCE),
    silent=str(_MOST_SILENT),
    tried=str(_MOST_TRIED),
    output=str(_MOST_OUTPUT),
    places=":".join(PLACES),
    homes=":".join(f"$HOME/{place}" for place in HOME_PLACES),
)
_PROBE_COMMAND = _shell(
    _fill(
        _PROBE,
        common=_COMMON_FILLED,
        names=" ".join([UNVERSIONED_NAMES[0], *VERSIONED_NAMES, *UNVERSIONED_NAMES[1:]]),
    )
)
_AUTO_COMMAND = _shell(
    _fill(
        _AUTO,
        common=_COMMON_FILLED,
        versioned=" ".join(VERSIONED_NAMES),
        unversioned=" ".join(UNVERSIONED_NAMES),
        auto=AUTO,
    )
)
