"""A connection that fails says why, in the words of the far end, and within its connect_timeout."""

import collections.abc
import contextlib
import os
import pathlib
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time

import mitogen.parent
import mitogen.ssh
import psutil
import pytest
import silent_side
from reach import Context, Fails

import support
from inmanta_plugins.mitogen import (
    Cause,
    ConnectError,
    Proxy,
    PythonNotFoundError,
    RemoteException,
)
from pytest_inmanta_mitogen import SshHost, SshHostFactory

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("idle_sockets")]

LOCAL: Context = {"method_name": "local", "name": "", "python_path": [sys.executable]}


@pytest.fixture(params=["here", "behind a hop"])
def local(request: pytest.FixtureRequest) -> Context:
    """
    The context of an interpreter on this machine.
    """
    return dict(LOCAL) if request.param == "here" else {**LOCAL, "via": dict(LOCAL)}


@pytest.fixture(autouse=True)
def nothing_stays(idle_sockets: None) -> collections.abc.Iterator[None]:
    before = support.Snapshot.take()
    yield
    before.settle()


def script(code: str) -> list[str]:
    """
    A python_path that runs a shell script before the interpreter, which it has in "$@".
    """
    return ["/bin/sh", "-c", f'{code}; exec "$0" "$@"', sys.executable]


def test_a_hop_may_run_python_2(tmp_path: pathlib.Path) -> None:
    old = support.find_interpreter(2, 7)
    if old is None:
        pytest.skip("needs Python 2.7, in pyenv or on the PATH")
    with Proxy({**LOCAL, "via": {**LOCAL, "python_path": [old.path]}}, call_timeout=20) as proxy:
        proxy.put(f"{tmp_path}/file", b"content")
        assert proxy.run("cat", [f"{tmp_path}/file"])[0] == "content"


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
    with pytest.raises(ConnectError):
        Proxy({**LOCAL, "python_path": script(code)}).connect()


def test_a_shell_that_prints_much_or_a_long_line_connects() -> None:
    code = f"{sys.executable} -c \"print('x' * 30000); print(('y' * 99 + '\\n') * 10000)\""
    with Proxy({**LOCAL, "python_path": script(code)}) as proxy:
        assert proxy.run("echo", ["there"])[0] == "there"


# Interpreters that start and end, or hang


def test_an_interpreter_with_too_few_descriptors_fails_at_once(local: Context) -> None:
    with pytest.raises(ConnectError, match="Bad file descriptor") as caught:
        Proxy({**local, "python_path": script("ulimit -n 32")}).connect()
    assert caught.value.cause is Cause.PYTHON_FAILED


def test_an_interpreter_with_too_little_memory_fails_at_once(local: Context) -> None:
    with pytest.raises(ConnectError) as caught:
        Proxy({**local, "python_path": script("ulimit -v 20000")}).connect()
    assert caught.value.cause is Cause.NO_ROOM


@pytest.mark.parametrize("module", ["pty", "fcntl", "termios", "socket", "math", "zlib"])
def test_a_python_that_lacks_a_module_says_which(
    local: Context, module: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / f"{module}.py").write_text(
        f'raise ModuleNotFoundError("No module named {module!r}")\n'
    )
    if module in sys.builtin_module_names:
        pytest.skip(f"{module} is part of this interpreter")
    with pytest.raises(ConnectError, match=f"lacks the module {module}: install") as caught:
        Proxy({**local, "python_path": script(f"export PYTHONPATH={tmp_path}")}).connect()
    assert caught.value.cause is Cause.PYTHON_FAILED


def test_a_module_that_shadows_the_standard_library_is_named(
    local: Context, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "socket.py").touch()
    with pytest.raises(ConnectError, match=f"{tmp_path}/socket.py takes the place") as caught:
        Proxy({**local, "python_path": script(f"export PYTHONPATH={tmp_path}")}).connect()
    assert caught.value.cause is Cause.PYTHON_FAILED


def test_what_is_not_python_is_told_without_the_program_that_it_was_given(local: Context) -> None:
    with pytest.raises(ConnectError, match="not a Python interpreter") as caught:
        Proxy({**local, "python_path": ["/bin/echo"]}).connect()
    assert "import" not in str(caught.value)


def test_an_unanswered_question_is_shown_when_the_time_is_over(local: Context) -> None:
    asks = script("echo Bonjour; printf 'Mot de passe : '; sleep 60")
    with pytest.raises(ConnectError, match="Bonjour\nit waits after: Mot de passe :") as caught:
        Proxy({**local, "python_path": asks, "connect_timeout": 1}).connect()
    assert caught.value.cause is Cause.PASSWORD_REQUIRED


def test_a_second_factor_is_a_matter_of_authentication(local: Context) -> None:
    asks = script("printf 'Verification code: '; sleep 60")
    with pytest.raises(ConnectError, match="Verification code:") as caught:
        Proxy({**local, "python_path": asks, "connect_timeout": 1}).connect()
    assert caught.value.cause is Cause.AUTHENTICATION


# What sudo allows


@contextlib.contextmanager
def sudoers(text: str) -> collections.abc.Iterator[None]:
    """
    More rules for sudo.
    """
    path = pathlib.Path(f"/etc/sudoers.d/causes-{os.getpid()}")
    path.write_text(text)
    path.chmod(0o440)
    try:
        yield
    finally:
        path.unlink()


def root_through(user: support.User, python: str, **options: object) -> Context:
    """
    Root of this machine, by way of a user.
    """
    sudo = {"method_name": "sudo", "name": "", "python_path": [python]}
    return {**sudo, **options, "via": {**sudo, "username": user.name}}


def test_a_sudo_that_lets_nothing_start_a_program_says_so(
    fails: Fails, python: str, trusted: support.User
) -> None:
    with sudoers(f"Defaults:{trusted.name} noexec\n"):
        error = fails(root_through(trusted, python), ConnectError)
    assert error.cause is Cause.NOT_ALLOWED
    assert "NOEXEC" in str(error)


@pytest.mark.parametrize(
    ("method", "what", "when"),
    [("sudo", "-E", "1"), ("su", "-E", "1"), ("su", "-d", "0")],
    ids=["sudo, account", "su, account", "su, password"],
)
def test_an_account_or_a_password_that_has_expired_is_told(
    fails: Fails, python: str, method: str, what: str, when: str
) -> None:
    support.need("chage", "sudo", root=True)
    with support.temporary_user() as user, support.sudo_rule(user, password=True):
        subprocess.run(["chage", what, when, user.name], check=True)
        to_user = {"method_name": "su", "username": user.name, "python_path": [python]}
        to_root = root_through(user, python, password=user.password)
        error = fails(to_root if method == "sudo" else to_user, ConnectError)
    assert error.cause is Cause.EXPIRED


def test_an_interpreter_that_sudos_user_may_not_execute_is_told(
    fails: Fails, user: support.User, public: pathlib.Path, python: str
) -> None:
    support.need("sudo", root=True)
    closed = public / "python"
    closed.write_text(f'#!/bin/sh\nexec {python} "$@"\n')
    closed.chmod(0o700)
    context = {"method_name": "sudo", "username": user.name, "python_path": [str(closed)]}
    error = fails(context, ConnectError)
    assert error.cause is Cause.PYTHON_DENIED
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
    context: Context = {"method_name": "ssh", "name": "web", "hostname": "127.0.0.1", "via": local}
    context["port"] = support.free_port()
    with pytest.raises(ConnectError, match=r"to web \(ssh 127.0.0.1:\d+\) via local") as caught:
        Proxy(context).connect()
    assert caught.value.hop == f"web (ssh 127.0.0.1:{context['port']})"
    with pytest.raises(PythonNotFoundError, match="on host local via local") as missing:
        Proxy({**LOCAL, "python_path": ["/nope/python"], "via": local}).connect()
    assert str(missing.value).endswith("for the best one that can be found.")


def test_a_missing_identity_file_is_told_before_ssh_is_started() -> None:
    context = {"method_name": "ssh", "name": "", "hostname": "127.0.0.1", "ssh_path": "/nope/ssh"}
    with pytest.raises(ConnectError, match="identity file /nope/key does not exist") as caught:
        Proxy({**context, "identity_file": "/nope/key"}).connect()
    assert caught.value.cause is Cause.AUTHENTICATION
    # The hop's files are not ours to look at, and a password may do as well.
    for more in ({"via": dict(LOCAL)}, {"password": "secret"}):
        with pytest.raises(ConnectError) as other:
            Proxy({**context, "identity_file": "/nope/key", **more}).connect()
        assert other.value.cause is Cause.PROGRAM_MISSING


def test_an_unknown_cause_shows_the_command_and_no_secret(local: Context) -> None:
    context = {"method_name": "sudo", "name": "", "sudo_path": "/bin/false", "password": "canary"}
    with pytest.raises(ConnectError, match="command was: /bin/false .*-u root -- ") as caught:
        Proxy({**context, "via": local}).connect()
    assert caught.value.cause is Cause.OTHER
    assert "canary" not in f"{caught.value}{caught.value!r}"


def test_mitogens_exception_classes_catch_what_they_did(
    fails: Fails, server: SshHost, user: support.User
) -> None:
    context = server.serialized(username=user.name, identity_file=None)
    error = fails({**context, "password": "Wr0ng-as-can-be"}, ConnectError)
    assert isinstance(error, mitogen.ssh.PasswordError)
    ended = fails({**LOCAL, "python_path": script("exit 3")}, ConnectError)
    assert isinstance(ended, mitogen.parent.EofError)
    missing = fails({**LOCAL, "python_path": script("exec /nope/python")}, PythonNotFoundError)
    assert isinstance(missing, mitogen.parent.EofError)
    assert isinstance(missing, FileNotFoundError)
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, mitogen.ssh.PasswordError)
    assert (str(copy), copy.cause) == (str(error), error.cause)


# ssh


def test_ssh_tells_its_own_reason(fails: Fails, mitogen_ssh_host_factory: SshHostFactory) -> None:
    host = mitogen_ssh_host_factory(config=["KexAlgorithms curve25519-sha256"])
    context = host.serialized()
    context["ssh_args"] = [*context["ssh_args"], "-o", "KexAlgorithms=ecdh-sha2-nistp256"]
    error = fails(context, ConnectError)
    assert "no matching key exchange method found" in str(error)
    behind = fails({**context, "via": dict(LOCAL)}, ConnectError)
    assert "no matching key exchange method found" in str(behind)


@pytest.mark.parametrize("options", [{}, {"check_host_keys": "accept"}])
def test_a_banner_is_not_taken_for_a_prompt(
    mitogen_ssh_host_factory: SshHostFactory, options: Context
) -> None:
    host = mitogen_ssh_host_factory(banner="Change your password")
    with Proxy(host.serialized(**options)) as proxy:
        assert proxy.run("echo", ["there"])[0] == "there"


def test_a_user_configuration_of_ssh_does_not_disturb_connections(
    mitogen_ssh_host: SshHost, tmp_path: pathlib.Path
) -> None:
    config = tmp_path / "config"
    config.write_text(
        "RequestTTY force\nRemoteCommand echo no\nControlMaster auto\n"
        f"ControlPath {tmp_path}/%C\nControlPersist 5\n"
    )
    context = mitogen_ssh_host.serialized()
    args = [str(config) if arg == "/dev/null" else arg for arg in context["ssh_args"]]
    assert args != context["ssh_args"]
    with Proxy({**context, "ssh_args": args}) as proxy:
        assert proxy.run("echo", ["there"])[0] == "there"
    assert [path.name for path in tmp_path.iterdir()] == ["config"]


@pytest.fixture
def busy_server(mitogen_ssh_host: SshHost) -> collections.abc.Iterator[int]:
    """
    The port of a server that resets its first three connections, as one beyond its MaxStartups.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for _ in range(3):
                connection = server.accept()[0]
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()
            near = server.accept()[0]
            far = socket.create_connection((mitogen_ssh_host.hostname, mitogen_ssh_host.port))
            back = threading.Thread(target=copy, args=(far, near))
            back.start()
            copy(near, far)
            back.join()

        def copy(source: socket.socket, target: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    target.sendall(data)
                target.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


@pytest.mark.parametrize("hops", [0, 1])
def test_a_server_that_has_too_many_connections_is_tried_again(
    mitogen_ssh_host: SshHost, busy_server: int, hops: int
) -> None:
    context = mitogen_ssh_host.serialized(port=busy_server)
    with Proxy({**context, "via": dict(LOCAL)} if hops else context) as proxy:
        assert proxy.run("echo", ["there"])[0] == "there"


@pytest.mark.parametrize("timeout", [1, 2])
def test_a_host_that_boots_and_is_silent_then_times_out(local: Context, timeout: int) -> None:
    silent = [sys.executable, silent_side.__file__, sys.executable]
    proxy = Proxy({**local, "python_path": silent, "connect_timeout": timeout})
    with proxy, pytest.raises(RemoteException, match="timed out") as caught:
        proxy.file_exists("/")
    error = caught.value.remote_exception
    assert isinstance(error, ConnectError)
    assert error.cause is Cause.TIMEOUT
