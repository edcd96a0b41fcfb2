"""Asking a host which Pythons it has, and letting it choose, through real mitogen connections."""

import collections.abc
import os
import pathlib
import platform
import shlex
import shutil
import sys
import tempfile
from typing import TypeAlias

import mitogen.core
import mitogen.master
import mitogen.parent
import pytest

import support
from inmanta_plugins.mitogen.connections import interpreters
from inmanta_plugins.mitogen.connections.interpreters import Interpreter, Report, Status
from inmanta_plugins.mitogen.contexts import options

Command = list[str]
Router: TypeAlias = mitogen.master.Router

SHELLS = [
    pytest.param(name, marks=support.requires(name))
    for name in ("dash", "bash", "busybox", "zsh", "mksh")
]

AS_NOBODY = (
    ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
)
"""A user who owns nothing here, when the tests run as root; then permissions would mean nothing."""


@pytest.fixture(scope="module")
def router() -> collections.abc.Iterator[Router]:
    router = Router()
    yield router
    router.broker.shutdown()
    router.broker.join()


def report_of(router: Router, command: Command) -> Report:
    """Return what comes back of a command that must not connect."""
    with pytest.raises(mitogen.core.StreamError) as caught:
        router.local(python_path=command)
    report = interpreters.parse_report(str(caught.value))
    assert report is not None, caught.value
    return report


@pytest.fixture(scope="module", autouse=True)
def few_interpreters() -> collections.abc.Iterator[None]:
    """
    Leave some interpreters only, and at least one: this user's home may have dozens, and each of
    them takes its time.
    """
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        pathlib.Path(directory, "python3").symlink_to(sys.executable)
        patch.setenv("PATH", directory, prepend=os.pathsep)
        patch.setenv("HOME", "/nonexistent")
        yield


def ask(router: Router, python_path: Command, *before: str, shell: str = "/bin/sh") -> Report:
    """Return the report on an interpreter, through a program that comes before the shell."""
    _, *probe = interpreters.probe_command(python_path)
    return report_of(router, [*before, shell, *probe])


# A machine with all sorts of interpreters


def script(path: pathlib.Path, text: str, mode: int = 0o755) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(mode)


def real_python() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def pretend(path: pathlib.Path, version: str, *, real: str, more: str = "") -> None:
    """
    Return an interpreter that works and says it is another version.

    :param version: As in ``3.12.1`` or ``3.15.0a2``.
    :param more: Python code to run in it first.
    """
    site = path.parent / f".{path.name}"
    site.mkdir(parents=True)
    numbers, _, alpha = version.partition("a")
    level = ("alpha", int(alpha)) if alpha else ("final", 0)
    info = (*map(int, numbers.split(".")), *level)
    (site / "sitecustomize.py").write_text(f"import sys\nsys.version_info = {info}\n{more}\n")
    script(
        path,
        f"export PYTHONPATH={shlex.quote(str(site))} PICKED={shlex.quote(str(path))}\n"
        f'exec {shlex.quote(real)} "$@"',
    )


@pytest.fixture(scope="module")
def there() -> collections.abc.Iterator[pathlib.Path]:
    """A directory that everybody can search, with what may be at a python_path."""
    with support.public_directory() as directory:
        fill(directory)
        yield directory
        (directory / "private").chmod(0o700)


def fill(directory: pathlib.Path) -> None:
    (directory / "good").symlink_to(sys.executable)
    pretend(directory / "old", "3.5.2", real=sys.executable)
    pretend(directory / "chatty", "3.9.9", real=sys.executable, more="print('@py@ hello', end='')")
    script(directory / "plain", "exit 0", mode=0o644)
    (directory / "directory").mkdir()
    (directory / "dangling").symlink_to("nowhere")
    (directory / "loop").symlink_to("loop")
    script(directory / "exits3", "echo 'user@host: Permission denied, password:' >&2; exit 3")
    script(directory / "exits127", "echo 'shim: no such version' >&2; exit 127")
    script(directory / "latin1", "printf 'introuvable \\351\\n'; exit 1")
    (directory / "headless").write_text("#!/nonexistent/python\n")
    (directory / "headless").chmod(0o755)
    script(directory / "café à deux" / "exits3", "exit 3")
    script(directory / "silent", "exec sleep 60")
    private = directory / "private"
    private.mkdir()
    shutil.copy(directory / "exits3", private / "python")
    (directory / "into-private").symlink_to("private/python")
    script(directory / "not-for-you", "exit 0", mode=0o710 if AS_NOBODY else 0o011)
    private.chmod(0o700 if AS_NOBODY else 0)


# What was requested

REQUESTED = [
    (["HERE/good"], Status.USABLE, "HERE/good", 0),
    (["HERE/chatty"], Status.USABLE, "HERE/chatty", 0),
    (["env", "PATH=HERE", "good"], Status.USABLE, "env", 0),
    (["/bin/sh", "-c", 'exec HERE/good "$@"', "sh"], Status.USABLE, "/bin/sh", 0),
    (["HERE/old"], Status.TOO_OLD, "HERE/old", 0),
    (["HERE/missing"], Status.MISSING, "HERE/missing", None),
    (["HERE/no/such/directory/python3"], Status.MISSING, "HERE/no/such/directory/python3", None),
    (["HERE/plain/python3"], Status.MISSING, "HERE/plain/python3", None),
    (["python9"], Status.MISSING, "python9", None),
    (["python 9's $HOME !"], Status.MISSING, "python 9's $HOME !", None),
    ([""], Status.MISSING, " ", None),
    (["/usr/bin/env", "python9"], Status.MISSING, "python9", 127),
    (["/usr/bin/env", "-S", "python9 -E"], Status.MISSING, "python9", 127),
    (["/usr/bin/env", "P=/a/python/b", "python9"], Status.MISSING, "python9", 127),
    (["nice", "-n", "5", "python9", "-E"], Status.MISSING, "python9", 127),
    (["/bin/sh", "-c", 'exec python9 "$@"', "sh"], Status.MISSING, "python9", 127),
    (["source", "HERE/missing", "&&", "python3"], Status.FAILED, "/bin/sh", 2),
    (["HERE/exits127"], Status.MISSING, "HERE/exits127", 127),
    (["HERE/headless"], Status.MISSING, "HERE/headless", 127),
    (["HERE/plain"], Status.MISSING, "HERE/plain", None),
    (["/usr/bin/env", "HERE/plain"], Status.MISSING, "HERE/plain", 126),
    (["HERE/directory"], Status.MISSING, "HERE/directory", None),
    (["/usr/bin/env", "HERE/directory"], Status.MISSING, "HERE/directory", 126),
    (["HERE/dangling"], Status.MISSING, "HERE/dangling", None),
    (["HERE/loop"], Status.MISSING, "HERE/loop", None),
    (["HERE/private/python"], Status.PERMISSION_DENIED, "HERE/private/python", None),
    (["HERE/into-private"], Status.PERMISSION_DENIED, "HERE/into-private", None),
    (["HERE/not-for-you"], Status.PERMISSION_DENIED, "HERE/not-for-you", None),
    (["env", "HERE/not-for-you"], Status.PERMISSION_DENIED, "HERE/not-for-you", 126),
    (["HERE/exits3"], Status.FAILED, "HERE/exits3", 3),
    (["/usr/bin/env", "HERE/exits3"], Status.FAILED, "/usr/bin/env", 3),
    (["HERE/café à deux/exits3"], Status.FAILED, "HERE/café à deux/exits3", 3),
    (["HERE/latin1"], Status.FAILED, "HERE/latin1", 1),
]
"""The python_path (HERE is the directory with all sorts), what it is, its name, its exit status."""


@pytest.mark.parametrize(("python_path", "status", "name", "exit_status"), REQUESTED)
@support.requires("setpriv")
def test_the_report_says_what_is_at_the_requested_path(
    router: Router,
    there: pathlib.Path,
    python_path: Command,
    status: Status,
    name: str,
    exit_status: int | None,
) -> None:
    here = [element.replace("HERE", str(there)) for element in python_path]
    # The interpreter of the tests may be in root's home.
    runs = status in (Status.USABLE, Status.TOO_OLD)
    before = [] if runs else [*AS_NOBODY, "env", "PATH=/usr/local/bin:/usr/bin:/bin"]
    requested = ask(router, here, *before)

    found = (requested.status, requested.name, requested.exit_status)
    assert found == (status, name.replace("HERE", str(there)), exit_status), requested


def test_a_name_is_looked_up_on_the_whole_path(router: Router, there: pathlib.Path) -> None:
    nothing = there / "directory"
    path = f"PATH={nothing}:/nonexistent:{there}:{os.environ['PATH']}"
    for name, status in [
        ("good", Status.USABLE),
        ("plain", Status.MISSING),
        ("directory", Status.MISSING),
        ("dangling", Status.MISSING),
        ("exits3", Status.FAILED),
    ]:
        assert ask(router, [name], "env", path).status is status, name


@support.requires("setpriv")
def test_a_directory_on_the_path_that_is_closed_to_the_user_makes_no_name_denied(
    router: Router, there: pathlib.Path
) -> None:
    path = f"PATH={there}/private:{os.environ['PATH']}"
    for python_path in ["python9"], ["/usr/bin/env", "python9"], ["nice", "python9"]:
        report = ask(router, python_path, *AS_NOBODY, "env", path)
        assert (report.status, report.name) == (Status.MISSING, "python9")


def test_the_output_of_a_failing_interpreter_comes_back_as_it_was(
    router: Router, there: pathlib.Path
) -> None:
    output = ask(router, [str(there / "exits3")]).output
    assert output == "user@host: Permission denied, password:"
    # Bytes that are no UTF-8 would end mitogen's broker thread.
    assert ask(router, [str(there / "latin1")]).output == "introuvable \N{REPLACEMENT CHARACTER}"


def test_a_long_output_comes_back_from_its_end(router: Router) -> None:
    command = ["/bin/sh", "-c", "seq 10000; echo the end; exit 7"]
    requested = ask(router, command)
    assert requested.exit_status == 7
    assert requested.output.endswith("9999\n10000\nthe end")
    assert 1000 < len(requested.output) < 2000


@pytest.fixture
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> collections.abc.Iterator[None]:
    """Have hosts wait for an interpreter's answer for two seconds instead of five."""
    monkeypatch.setattr("inmanta_plugins.mitogen.settings.PROBE_SECONDS", 2)
    interpreters._command.cache_clear()
    yield
    interpreters._command.cache_clear()


@pytest.mark.usefixtures("short_timeout")
def test_a_silent_interpreter_is_killed(router: Router, there: pathlib.Path) -> None:
    requested = ask(router, [str(there / "silent")])
    assert requested.status is Status.FAILED
    assert "no answer" in requested.output


# Shells, locales, noise


@pytest.fixture
def shell(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> str:
    """A /bin/sh that is another shell."""
    program = support.find_program(request.param)
    assert program is not None
    path = tmp_path / "sh"
    path.symlink_to(program)
    return str(path)


@pytest.mark.parametrize("shell", SHELLS, indirect=True)
def test_any_shell_can_report(router: Router, there: pathlib.Path, shell: str) -> None:
    for name, status in [
        ("good", Status.USABLE),
        ("missing", Status.MISSING),
        ("plain", Status.MISSING),
        ("loop", Status.MISSING),
        ("old", Status.TOO_OLD),
        ("headless", Status.MISSING),
        ("café à deux/exits3", Status.FAILED),
    ]:
        report = ask(router, [str(there / name)], shell=shell)
        assert (report.status, report.name) == (status, str(there / name))
        # The interpreter that runs this is one of those in the usual places, or on PATH.
        assert report.found or status is Status.USABLE


@pytest.mark.parametrize("shell", SHELLS, indirect=True)
def test_any_shell_can_choose(router: Router, shell: str) -> None:
    context = router.local(python_path=[shell, *interpreters.auto_command()[1:]])
    assert context.call(platform.python_version) in [
        each.version for each in ask(router, ["python9"]).found
    ]


@pytest.mark.parametrize("shell", SHELLS, indirect=True)
def test_options_that_a_shell_takes_from_its_environment_do_no_harm(
    router: Router, shell: str
) -> None:
    options = "SHELLOPTS=braceexpand:errexit:noclobber:noglob:nounset:verbose:xtrace"
    report = ask(router, ["python9"], "env", "-u", "HOME", options, shell=shell)
    assert report.status is Status.MISSING
    assert report.found


BANNER = "*" * 60
NOISE = [
    "printf 'no end of line'",
    f"for i in $(seq 300); do echo '{BANNER}'; done",
    "printf '[[inmanta-python requested failed 3 %% x %%'",
    "echo '[[inmanta-python]] [[inmanta-python requested]] [[inmanta-python x y]]'",
    "(sleep 0.05; echo later; echo later >&2) & echo now",
]


@pytest.mark.parametrize("noise", NOISE)
def test_noise_does_not_hide_the_report(router: Router, noise: str) -> None:
    report = ask(router, ["python9"], "/bin/sh", "-c", f'{noise}; exec "$@"', "sh")
    assert report.status is Status.MISSING
    assert report.name == "python9"
    assert report.found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "EOF on stream; last 100 lines received:\nbash: python9: command not found",
        " ".join(interpreters.probe_command(["python9"])),
        str(mitogen.parent.Argv(interpreters.auto_command())),
        pathlib.Path(interpreters.__file__).with_name("probe.sh").read_text(),
        "[[inmanta-python requested no-such-kind 1 % x %]]",
        "[[inmanta-python found 3.11.2 /usr/bin/python3]]",
        "[[inmanta-python requested python three % python3 %]]",
    ],
)
def test_what_is_no_report_is_not_taken_for_one(text: str) -> None:
    assert interpreters.parse_report(text) is None


def test_a_report_that_no_script_would_make_does_no_harm() -> None:
    number = "9" * 10_000
    line = f"[[inmanta-python requested failed {number} {number} {number} %]]"
    report = interpreters.parse_report(f"{line}\n[[inmanta-python found {number}.1.1 /p]]")
    assert report is not None
    assert (report.status, report.found) == (Status.FAILED, ())


@pytest.mark.parametrize(
    "command", [interpreters.probe_command(["x"]), interpreters.auto_command()]
)
def test_the_commands_have_nothing_that_a_layer_of_quoting_breaks(command: Command) -> None:
    text = " ".join(command)
    assert text.isascii()
    # A line's end is lost in sudo's login shells, "!" and "`" in su's; "\\" and "\'" in fish.
    assert not set("\n`!") & set(text)
    assert "\\\\" not in text
    assert "\\'" not in text
    # sudo's login shells expand what looks like a variable.
    assert text.count("$") == text.count("$(") == 1
    # Linux takes 128 KiB in one argument; su's quoting and mitogen's own code have to fit beside.
    assert len(str(mitogen.parent.Argv(command))) < 16 * 1024


# What there is


class Host:
    """
    This machine as another: with no interpreter at the usual places but those put there.

    :param router: What connects to it.
    :param root: A directory for what is put there.
    """

    REPLACED = ("/opt", "/usr/local/bin", "/usr/libexec")
    """What is mounted elsewhere than it is."""

    def __init__(self, router: Router, root: pathlib.Path) -> None:
        self.router = router
        self.root = root
        self.home = root / "home"
        self.hidden: list[str] = []
        self.path = "/usr/bin:/bin"
        self.real = str(root / "interpreter")
        """The interpreter of the tests, by a name that nobody looks for."""
        pathlib.Path(self.real).touch()
        for place in (*self.REPLACED, "/home"):
            self.at(place).mkdir(parents=True, exist_ok=True)
        for place in (
            "/usr/bin",
            "/bin",
            "/usr/pkg/bin",
            "/snap/bin",
            "/run/current-system/sw/bin",
        ):
            for path in pathlib.Path(place).glob("*python*"):
                if path.is_file() and not path.is_symlink():
                    self.hidden.append(str(path))

    def at(self, path: str) -> pathlib.Path:
        """Where to put what the host has at a path."""
        return self.root / path.lstrip("/")

    def put(self, path: str, version: str, more: str = "") -> None:
        """Give the host an interpreter."""
        pretend(self.at(path), version, real=self.real, more=more)

    @property
    def command(self) -> Command:
        """What runs a command on that host."""
        q = shlex.quote
        steps = [
            f"mount --bind {q(real_python())} {q(self.real)}",
            *(f"mount --bind /dev/null {q(path)}" for path in self.hidden),
            *(f"mount --bind {q(str(self.at(place)))} {place}" for place in self.REPLACED),
            'exec "$@"',
        ]
        own = [] if os.geteuid() == 0 else ["--map-root-user"]
        return [
            *("unshare", *own, "--mount", "/bin/sh", "-c", " && ".join(steps), "sh"),
            *("env", "-i", f"PATH={self.path}", f"HOME={self.home}"),
        ]

    def choose(self) -> mitogen.parent.Context:
        run_in = ["env", "-C", str(self.root)]
        return self.router.local(python_path=[*run_in, *self.command, *interpreters.auto_command()])

    def chosen(self) -> str:
        """Return the path of the interpreter that the host chooses."""
        picked: str = self.choose().call(os.getenv, "PICKED")
        return picked.removeprefix(str(self.root))

    def report(self) -> Report:
        """Return what the host says when it has nothing to choose."""
        return report_of(self.router, [*self.command, *interpreters.auto_command()])


@pytest.fixture
def host(router: Router, tmp_path: pathlib.Path) -> Host:
    support.need("unshare", "mount")
    host = Host(router, tmp_path)
    probe = support.execute(*host.command, "true")
    if probe.returncode:
        pytest.skip(f"needs a mount namespace of its own: {probe.stderr}")
    return host


CHOICES = [
    ("", "/opt/a/bin/python3.9 3.9.1"),
    ("", "/usr/libexec/platform-python 3.6.8"),
    ("", "/opt/rh/x/root/usr/bin/python3 3.6.9"),
    ("", "/home/.local/bin/python3.11 3.11.0"),
    ("", "/opt/a/bin/python3.12 3.12.1, /usr/local/bin/python3.9 3.9.1"),
    ("", "/usr/local/bin/python3.10 3.10.1, /usr/local/bin/python3.9 3.9.9"),
    ("", "/usr/local/bin/python3 3.9.1, /usr/libexec/platform-python 3.6.8"),
    ("", "/opt/b/bin/python3 3.7.4, /usr/local/bin/python 2.7.18"),
    ("", "/usr/libexec/platform-python 3.6.8, /usr/local/bin/python3 3.5.2"),
    # A name promises nothing.
    ("", "/opt/b/bin/python3.11 3.11.4, /usr/local/bin/python3.12 3.8.1"),
    ("", "/opt/b/bin/python3.11 3.11.4, /usr/local/bin/python3.15 3.15.0a3"),
    ("", "/usr/local/bin/python3.15 3.15.0a3"),
    # Among equals the first on the PATH wins.
    ("", "/opt/a/bin/python3.9 3.9.1, /opt/b/bin/python3.9 3.9.1"),
    ("/opt/b/bin:", "/opt/b/bin/python3.9 3.9.1, /opt/a/bin/python3.9 3.9.1"),
    # Shims and relative directories are passed over.
    ("/opt/x/shims:", "/opt/a/bin/python3.9 3.9.1, /opt/x/shims/python3.12 3.12.1"),
    ("elsewhere::.:", "/opt/a/bin/python3.9 3.9.1, /elsewhere/python3.12 3.12.1"),
]
"""How the PATH begins, and the interpreters of a host: path and version. It chooses the first."""


@pytest.mark.parametrize(("path", "there_are"), CHOICES)
def test_a_host_chooses_its_newest_interpreter(host: Host, path: str, there_are: str) -> None:
    host.path = path + host.path
    interpreters = [words.split() for words in there_are.split(", ")]
    for interpreter, version in interpreters:
        host.put(interpreter, version)
    assert host.chosen().endswith(interpreters[0][0])


DEFECTS = {
    "does not start": "os._exit(1)",
    "is a shim of a version that is not there": "os.write(2, b'shim: no version'); os._exit(127)",
    "says nothing and ends well": "os._exit(0)",
    "lacks zlib": "sys.modules['zlib'] = None",
    "lacks pty": "sys.modules['pty'] = None",
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_an_interpreter_that_does_not_run_or_lacks_what_mitogen_needs_is_not_chosen(
    host: Host, defect: str
) -> None:
    host.put("/usr/local/bin/python3.13", "3.13.1", more=f"import os; {DEFECTS[defect]}")
    host.put("/opt/a/bin/python3.9", "3.9.1")
    assert host.chosen().endswith("/opt/a/bin/python3.9")


def test_a_debug_build_is_chosen_only_where_there_is_nothing_else(host: Host) -> None:
    host.put("/usr/local/bin/python3.12", "3.12.1", more="sys.gettotalrefcount = lambda: 0")
    assert host.chosen().endswith("/usr/local/bin/python3.12")
    host.put("/opt/a/bin/python3.7", "3.7.1")
    assert host.chosen().endswith("/opt/a/bin/python3.7")


def test_noise_of_the_interpreters_does_not_hide_their_versions(host: Host) -> None:
    noise = "import os\nif not os.environ.get('ARGV0'): print('@ @@py welcome', end='')"
    host.put("/usr/local/bin/python3.12", "3.12.1", more=noise)
    host.put("/usr/local/bin/python3.9", "3.9.1")
    assert host.chosen().endswith("/usr/local/bin/python3.12")


def test_no_interpreter_is_started_that_can_not_be_better(host: Host) -> None:
    started = host.root / "started"
    host.put("/opt/a/bin/python3.12", "3.12.1")
    host.put("/opt/b/bin/python3.9", "3.9.1", more=f"open({str(started)!r}, 'a').close()")
    host.at("/opt/b/bin/python3").symlink_to("python3.9")
    assert host.chosen().endswith("/opt/a/bin/python3.12")
    assert not started.exists()


@support.requires_root
def test_interpreters_in_the_home_of_another_user_are_passed_over(host: Host) -> None:
    host.put("/home/.local/bin/python3.12", "3.12.1")
    host.put("/opt/a/bin/python3.9", "3.9.1")
    os.chown(host.home, 65534, 65534)
    assert host.chosen().endswith("/opt/a/bin/python3.9")


def test_a_linked_interpreter_is_started_by_its_own_path(host: Host) -> None:
    # mitogen starts it anew with an argv[0] that does not exist: a relocated Python finds its
    # library from there only by its real path.
    link = host.at("/opt/a/bin/python3")
    link.parent.mkdir(parents=True)
    link.symlink_to(host.real)
    assert host.choose().call(eval, "__import__('sys').executable") == host.real


def test_a_virtual_environment_is_not_left(host: Host) -> None:
    environment = host.at("/opt/app")
    link = environment / "bin" / "python3"
    link.parent.mkdir(parents=True)
    link.symlink_to(host.real)
    (environment / "pyvenv.cfg").write_text(f"home = {host.root}\n")
    context = host.choose()
    assert context.call(eval, "__import__('sys').executable") == "/opt/app/bin/python3"
    assert context.call(eval, "__import__('sys').prefix") == "/opt/app"


def test_the_search_leaves_no_trace_in_the_environment(host: Host) -> None:
    host.put("/opt/a/bin/python3.9", "3.9.1")
    names = list("ABCDFIKLNPSTVWbcdfklnoqrsvwxyz")
    before = ["env", *(f"{name}=unchanged" for name in names)]
    context = host.router.local(python_path=[*host.command, *before, *interpreters.auto_command()])
    unchanged = dict.fromkeys(names, "unchanged")
    assert {name: context.call(os.getenv, name) for name in names} == unchanged
    assert context.call(os.getenv, "PATH") == host.path


def test_a_host_without_an_interpreter_says_where_it_looked(host: Host) -> None:
    host.path = f"/opt/tools/bin:{host.path}"
    report = host.report()
    assert report.status is Status.MISSING
    assert report.name == "auto"
    assert (report.found, report.broken) == ((), ())
    assert report.places[:3] == ("/opt/tools/bin", "/usr/bin", "/bin")
    assert {"/usr/libexec", "/opt/rh/*/root/usr/bin"} < {*report.places}
    text = interpreters.describe_found(report)
    assert text.startswith("no Python 3.6 or newer was found on that host; looked for python3, ")
    assert all(place in text for place in report.places)


def test_a_host_with_old_and_broken_interpreters_only_says_so(host: Host) -> None:
    host.put("/opt/a/bin/python3", "3.5.2")
    script(host.at("/opt/b/bin/python3.9"), "exit 1")
    report = host.report()
    assert report.status is Status.MISSING
    assert report.found == (Interpreter("/opt/a/bin/python3", "3.5.2"),)
    assert report.broken == ("/opt/b/bin/python3.9",)
    text = interpreters.describe_found(report)
    assert text.startswith("no Python 3.6 or newer was found")
    assert "too old: /opt/a/bin/python3 (3.5.2)" in text
    assert "/opt/b/bin/python3.9" in text.rpartition("not working")[2]


def test_the_interpreters_that_are_there_are_named_newest_first_and_once(host: Host) -> None:
    host.put("/usr/local/bin/python3", "3.9.9")
    host.at("/usr/local/bin/python3.9").symlink_to("python3")
    host.at("/usr/local/bin/python").symlink_to("python3")
    host.put("/opt/a b/bin/python3.12", "3.12.1")
    host.put("/opt/é/bin/python3.10", "3.10.1")
    script(host.at("/opt/c/bin/python3.13"), "exit 1")
    report = ask(host.router, ["python9"], *host.command)
    assert report.found == (
        Interpreter("/opt/a b/bin/python3.12", "3.12.1"),
        Interpreter("/opt/é/bin/python3.10", "3.10.1"),
        Interpreter("/usr/local/bin/python3", "3.9.9"),
    )
    assert report.found[0].version_info == (3, 12, 1)
    assert report.broken == ("/opt/c/bin/python3.13",)
    assert interpreters.describe_found(report).startswith(
        "found on that host: /opt/a b/bin/python3.12 (3.12.1), /opt/é/bin/python3.10 (3.10.1),"
        " /usr/local/bin/python3 (3.9.9)"
    )


def test_interpreters_without_end_are_not_all_tried(host: Host) -> None:
    for number in range(40):
        script(host.at(f"/opt/{number:02}/bin/python3.9"), f"echo x >>{host.root}/tried; exit 1")
    assert host.report().status is Status.MISSING
    assert len((host.root / "tried").read_text().split()) == 16


@pytest.mark.parametrize("has_timeout", [True, False])
@pytest.mark.usefixtures("short_timeout")
def test_silent_interpreters_are_killed(host: Host, has_timeout: bool) -> None:
    if not has_timeout:
        timeout = support.find_program("timeout")
        host.hidden.append(timeout or "/usr/bin/timeout")
    script(host.at("/usr/local/bin/python3.13"), f"echo $$ >{host.root}/pid; exec sleep 600")
    host.put("/opt/a/bin/python3.9", "3.9.1")
    assert host.chosen().endswith("/opt/a/bin/python3.9")
    pid = int((host.root / "pid").read_text())
    assert support.is_gone(pid)


# Small things


def test_only_the_word_alone_is_auto() -> None:
    assert all(map(options.is_auto, [["auto"], ("auto",), "auto"]))
    others: list[object] = [None, [], ["/usr/bin/auto"], ["auto", "-E"], ["python3"], "python3"]
    assert not any(map(options.is_auto, others))


def test_nothing_is_said_about_what_was_not_looked_for(router: Router, there: pathlib.Path) -> None:
    report = ask(router, [str(there / "good")])
    assert (report.found, report.places, interpreters.describe_found(report)) == ((), (), "")
