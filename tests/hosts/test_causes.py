"""A connection that fails says why, in the words of the far end, and within its connect_timeout."""

import contextlib
import pathlib
import pickle
import re
import sys
import time

import mitogen.parent
import mitogen.ssh
import psutil
import pytest

import support
from benchmarks import relay
from inmanta_plugins.mitogen import Cause, ConnectError, Proxy, PythonNotFoundError, RemoteException
from pytest_inmanta_mitogen import SshHost, SshHostFactory
from support import LOCAL, Context, call_fails_with, connect_error, fails_with
from testbed.servers import free_port

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("idle_sockets", "nothing_left")]


@pytest.fixture(params=["here", "behind a hop"])
def local(request: pytest.FixtureRequest) -> Context:
    """The context of an interpreter on this machine."""
    return LOCAL if request.param == "here" else {**LOCAL, "via": LOCAL}


def script(code: str) -> list[str]:
    """
    Return a python_path that runs a shell script before the interpreter, which it has in "$@".
    """
    return ["/bin/sh", "-c", f'{code}; exec "$0" "$@"', sys.executable]


def test_a_hop_may_run_python_2(tmp_path: pathlib.Path) -> None:
    old = support.find_interpreter(2, 7)
    if old is None:
        pytest.skip("needs Python 2.7, in pyenv or on the PATH")
    with Proxy({**LOCAL, "via": {**LOCAL, "python_path": [old.path]}}, call_timeout=20) as proxy:
        proxy.put(f"{tmp_path}/file", b"content")
        assert proxy.run("cat", [f"{tmp_path}/file"])[0] == "content"


def test_an_interpreter_that_was_chosen_and_does_not_run_is_not_missing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = tmp_path / "python3.20"
    answer = f'case "$*" in *@py@*) exec {sys.executable} "$@" ;; esac'
    chosen.write_text(f"#!/bin/sh\n{answer}\necho out of order\nexit 3\n")
    chosen.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    error = fails_with(Cause.OTHER, {**LOCAL, "python_path": ["auto"]})
    assert "out of order" in error.detail


# Texts that a host chooses


@pytest.mark.timeout(15)
@pytest.mark.parametrize(
    "words",
    [
        "'ssh: connect to host ' * 380 + ': ' * 4000",
        "'error occurred on host ' * 5000",
        "('x@' * 2000 + '\\n') * 50",
        "'\\n\\nNote: many versions of ' * 3000",
        "'Child start failed: ' * 5000",
        "'[[inmanta-python ' + 'a ' * 9000",
    ],
)
def test_what_a_host_writes_is_understood_in_little_time(words: str) -> None:
    code = f'{sys.executable} -c "print({words})"; exit 1'
    connect_error({**LOCAL, "python_path": script(code)}, ConnectError)


def test_an_error_shows_the_last_lines_and_the_start_of_each() -> None:
    code = """for n in $(seq 99); do echo line $n; done >&2
    printf '%0700d\\nToo many open files\\n' 7 >&2
    exit 3"""
    error = connect_error({**LOCAL, "python_path": script(code)}, ConnectError)
    shown = error.detail.splitlines()
    assert shown == [*(f"line {n}" for n in range(90, 100)), "0" * 500, "Too many open files"]


def test_a_shell_that_prints_much_or_a_long_line_connects() -> None:
    code = f"{sys.executable} -c \"print('x' * 30000); print(('y' * 99 + '\\n') * 10000)\""
    with Proxy({**LOCAL, "python_path": script(code)}) as proxy:
        assert proxy.run("echo", ["there"])[0] == "there"


# Interpreters that start and end, or hang

QUICK = {"connect_timeout": 1}
FAILING: dict[str, tuple[list[str], Context, Cause, str]] = {
    "too few descriptors": (
        script("ulimit -n 32"), {}, Cause.PYTHON_FAILED, "Bad file descriptor"
    ),
    "too little memory": (script("ulimit -v 20000"), {}, Cause.NO_ROOM, ""),
    "not Python": (["/bin/echo"], {}, Cause.PYTHON_FAILED, "not a Python interpreter"),
    "a question that nobody answers": (
        script("echo Bonjour; printf 'Mot de passe : '; sleep 60"),
        QUICK,
        Cause.PASSWORD_REQUIRED,
        "Bonjour\nit waits after: Mot de passe :",
    ),
    "a second factor": (
        script("printf 'Verification code: '; sleep 60"),
        QUICK,
        Cause.AUTHENTICATION,
        "Verification code:",
    ),
}  # fmt: skip
"""What comes before the interpreter, the cause that it leads to, and what the error says."""


@pytest.mark.parametrize("what", FAILING)
def test_an_interpreter_that_does_not_start_tells_why(local: Context, what: str) -> None:
    python_path, options, cause, words = FAILING[what]
    error = fails_with(cause, {**local, "python_path": python_path, **options})
    assert words in str(error)
    assert "import" not in str(error)  # the program that it was given


@pytest.mark.parametrize("module", ["pty", "fcntl", "socket", "zlib"])
def test_a_python_that_lacks_a_module_says_which(
    local: Context, module: str, tmp_path: pathlib.Path
) -> None:
    if module in sys.builtin_module_names:
        pytest.skip(f"{module} is part of this interpreter")
    lacks = f'raise ModuleNotFoundError("No module named {module!r}")\n'
    (tmp_path / f"{module}.py").write_text(lacks)
    python_path = script(f"export PYTHONPATH={tmp_path}")
    error = fails_with(Cause.PYTHON_FAILED, {**local, "python_path": python_path})
    assert f"lacks the module {module}: install" in str(error)


def test_a_module_that_shadows_the_standard_library_is_named(
    local: Context, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "socket.py").touch()
    python_path = script(f"export PYTHONPATH={tmp_path}")
    error = fails_with(Cause.PYTHON_FAILED, {**local, "python_path": python_path})
    assert f"{tmp_path}/socket.py takes the place" in str(error)


# What sudo allows


def root_through(user: support.User, python: str, **options: object) -> Context:
    """Root of this machine, by way of a user."""
    sudo = {"method_name": "sudo", "name": "", "python_path": [python]}
    return {**sudo, **options, "via": {**sudo, "username": user.name}}


def test_a_sudo_that_lets_nothing_start_a_program_says_so(
    python: str, trusted: support.User
) -> None:
    with support.sudo_setting(trusted, "noexec"):
        error = fails_with(Cause.NOT_ALLOWED, root_through(trusted, python))
    assert "NOEXEC" in str(error)


@pytest.mark.parametrize(
    ("method", "what", "when"),
    [("sudo", "-E", "1"), ("su", "-E", "1"), ("su", "-d", "0")],
    ids=["sudo, account", "su, account", "su, password"],
)
def test_an_account_or_a_password_that_has_expired_is_told(
    python: str, method: str, what: str, when: str
) -> None:
    support.need("chage", "sudo", root=True)
    with support.temporary_user() as user, support.sudo_rule(user, password=True):
        support.execute("chage", what, when, user.name, check=True)
        to_user = {"method_name": "su", "username": user.name, "python_path": [python]}
        to_root = root_through(user, python, password=user.password)
        fails_with(Cause.EXPIRED, to_root if method == "sudo" else to_user)


def test_an_interpreter_that_sudos_user_may_not_execute_is_told(
    user: support.User, public: pathlib.Path, python: str
) -> None:
    support.need("sudo", root=True)
    closed = public / "python"
    closed.write_text(f'#!/bin/sh\nexec {python} "$@"\n')
    closed.chmod(0o700)
    context = {"method_name": "sudo", "username": user.name, "python_path": [str(closed)]}
    error = fails_with(Cause.PYTHON_DENIED, context)
    assert f"may not execute {closed}" in str(error)


def test_a_call_whose_sudo_is_killed_ends_at_once(python: str, trusted: support.User) -> None:
    with Proxy(root_through(trusted, python)) as proxy:
        call = proxy.submit(time.sleep, 60)
        # Those that are behind one that was killed may be gone first.
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() == "sudo":
                    process.kill()
        with pytest.raises(RemoteException, match="connection was lost"):
            call.result(timeout=10)


# Messages


def test_an_error_names_each_hop_on_the_way(local: Context) -> None:
    ssh = {"method_name": "ssh", "name": "web", "hostname": "127.0.0.1", "via": local}
    port = free_port()
    error = connect_error({**ssh, "port": port}, ConnectError)
    assert error.hop == f"web (ssh 127.0.0.1:{port})"
    assert f"to {error.hop} via here (local)" in str(error)
    context = {**LOCAL, "python_path": ["/nope/python"], "via": local}
    missing = str(connect_error(context, PythonNotFoundError))
    assert "on host here (local) via here (local)" in missing
    assert missing.endswith("for the best one that can be found.")


def test_a_missing_identity_file_is_told(mitogen_ssh_host: SshHost) -> None:
    context = mitogen_ssh_host.serialized(identity_file="/nope/key", ssh_args=["-F", "none"])
    error = fails_with(Cause.AUTHENTICATION, context)
    assert "Identity file /nope/key not accessible: No such file" in str(error)


def test_an_unknown_cause_shows_the_command_and_no_secret(local: Context) -> None:
    context = {"method_name": "sudo", "name": "", "sudo_path": "/bin/false", "password": "canary"}
    error = fails_with(Cause.OTHER, {**context, "via": local})
    assert re.search("command was: /bin/false .*-u root -- ", str(error))


def test_mitogens_exception_classes_catch_what_they_did(
    server: SshHost, user: support.User
) -> None:
    context = server.serialized(username=user.name, identity_file=None)
    error = connect_error({**context, "password": "Wr0ng-as-can-be"}, ConnectError)
    assert error.cause is Cause.PASSWORD_WRONG
    assert isinstance(error, mitogen.ssh.PasswordError)
    ended = connect_error({**LOCAL, "python_path": script("exit 3")}, ConnectError)
    assert isinstance(ended, mitogen.parent.EofError)
    python_path = script("exec /nope/python")
    missing = connect_error({**LOCAL, "python_path": python_path}, PythonNotFoundError)
    assert isinstance(missing, mitogen.parent.EofError)
    assert isinstance(missing, FileNotFoundError)
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, mitogen.ssh.PasswordError)
    assert (str(copy), copy.cause) == (str(error), error.cause)


# ssh


def test_ssh_tells_its_own_reason(mitogen_ssh_host: SshHost) -> None:
    context = mitogen_ssh_host.serialized()
    context["ssh_args"] = [*context["ssh_args"], "-o", "MACs=hmac-md5", "-c", "aes128-ctr"]
    for via in ({}, {"via": LOCAL}):
        error = connect_error({**context, **via}, ConnectError)
        assert "no matching MAC found" in str(error)


@pytest.mark.parametrize("policy", ["ignore", "accept"])
def test_a_banner_is_not_taken_for_a_prompt(
    mitogen_ssh_host_factory: SshHostFactory, policy: str
) -> None:
    host = mitogen_ssh_host_factory(banner="Change your password")
    with Proxy(host.serialized(check_host_keys=policy)) as proxy:
        assert proxy.run("echo", ["there"])[0] == "there"


def test_a_user_configuration_of_ssh_does_not_disturb_connections(
    mitogen_ssh_host: SshHost, tmp_path: pathlib.Path
) -> None:
    config = tmp_path / "config"
    config.write_text(
        "RequestTTY force\nRemoteCommand echo no\nControlMaster auto\n"
        f"ControlPath {tmp_path}/%C\nControlPersist 5\n"
    )
    with Proxy(mitogen_ssh_host.serialized(ssh_args=["-F", str(config)])) as proxy:
        assert proxy.run("echo", ["there"])[0] == "there"
    assert [path.name for path in tmp_path.iterdir()] == ["config"]


@pytest.mark.parametrize("hops", [0, 1])
def test_a_server_that_has_too_many_connections_is_tried_again(
    mitogen_ssh_host: SshHost, tmp_path: pathlib.Path, hops: int
) -> None:
    # Closes the first three connections, as a server beyond its MaxStartups does.
    busy = tmp_path / "busy"
    busy.write_text(
        f"#!/bin/sh\necho try >>$0.log; [ $(wc -l <$0.log) -le 3 ] ||"
        f' exec {sys.executable} {relay.__file__} 0 "$@"\n'
    )
    busy.chmod(0o755)
    ssh_args = ["-F", "/dev/null", "-o", f"ProxyCommand={busy} %h %p"]
    context = mitogen_ssh_host.serialized(ssh_args=ssh_args)
    with Proxy({**context, "via": LOCAL} if hops else context) as proxy:
        assert proxy.run("echo", ["there"])[0] == "there"


def test_a_host_that_boots_and_is_silent_then_times_out(local: Context) -> None:
    # What it says ends with mitogen's last mark.
    silent = ["/bin/sh", "-c", '"$0" "$@" | sed -u /^MITO002/q; exec sleep 600', sys.executable]
    proxy = Proxy({**local, "python_path": silent, "connect_timeout": 1})
    with proxy:
        call_fails_with(Cause.TIMEOUT, proxy)
