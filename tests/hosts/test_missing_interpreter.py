"""
A failed connection says what is wrong: that there is no such interpreter, wherever it is missing,
and never so when it is anything else.
"""

import collections.abc
import pathlib
import shutil
import subprocess
import tempfile

import mitogen.core
import pytest
from hosts.container import Container
from reach import Context, Fails, Reach

import support
from inmanta_plugins.mitogen import Proxy, PythonNotFoundError
from inmanta_plugins.mitogen.errors import Cause, ConnectError
from pytest_inmanta_mitogen import SshHost, SshHostFactory

pytestmark = pytest.mark.timeout(60)


# What is wrong with the interpreter


class Oddities:
    """
    Files that look like an interpreter and are none, in a directory that every user can enter.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        directory.chmod(0o755)
        (directory / "directory").mkdir()
        (directory / "not-executable").write_text("#!/bin/sh\n")
        (directory / "dangling").symlink_to("nowhere")
        self._script("exits-with-3", "exit 3")
        self._script("denied", "exit 0").chmod(0o700)

    def _script(self, name: str, code: str) -> pathlib.Path:
        script = self.directory / name
        script.write_text(f"#!/bin/sh\n{code}\n")
        script.chmod(0o755)
        return script

    def path(self, name: str) -> str:
        return str(self.directory / name)


@pytest.fixture(scope="session")
def oddities() -> collections.abc.Iterator[Oddities]:
    with tempfile.TemporaryDirectory(prefix="oddities-") as directory:
        yield Oddities(pathlib.Path(directory))


#: How an interpreter can be missing. A name with {} is one of the oddities.
MISSING = {
    "absolute path": ["/nonexistent/bin/python3"],
    "bare name": ["python9"],
    "through env": ["/usr/bin/env", "python9"],
    "directory": ["{directory}"],
    "no x bit": ["{not-executable}"],
    "dangling symlink": ["{dangling}"],
}


@pytest.fixture(params=MISSING)
def missing(request: pytest.FixtureRequest, oddities: Oddities) -> list[str]:
    """
    The python_path of an interpreter that is not there.
    """
    return [
        oddities.path(element[1:-1]) if element.startswith("{") else element
        for element in MISSING[request.param]
    ]


def assert_missing(error: PythonNotFoundError, missing: list[str], hop: str) -> None:
    """
    :param hop: What the error has to call the place where the interpreter is missing.
    """
    assert isinstance(error, FileNotFoundError)
    assert error.filename == missing[0]
    assert error.missing == missing[-1]
    assert repr(missing[-1]) in str(error)
    assert hop in str(error)
    assert "found on that host: " in str(error)


def test_local(fails: Fails, missing: list[str]) -> None:
    context = {"method_name": "local", "name": "here", "python_path": missing}
    error = fails(context, PythonNotFoundError)
    assert_missing(error, missing, "here")


@pytest.fixture(scope="session")
def french_host(
    tmp_path_factory: pytest.TempPathFactory, python: str
) -> collections.abc.Iterator[SshHost]:
    """
    A host that sends a banner, and whose programs speak French.
    """
    support.need("sshd", "ssh", root=True)
    with tempfile.TemporaryDirectory(prefix="locale-") as directory:
        pathlib.Path(directory).chmod(0o755)
        environment = support.french_locale(pathlib.Path(directory))
        banner = "Accès réservé. python3: not found\n"
        with SshHost(
            name="hôte", python_path=[python], environment=environment, banner=banner
        ) as host:
            yield host


@pytest.fixture(scope="session", params=["bash", "dash", "zsh"])
def noisy_user(request: pytest.FixtureRequest) -> collections.abc.Iterator[support.User]:
    """
    A user whose login shell prints things that it was not asked for.
    """
    support.need("useradd", request.param, root=True)
    path = support.find_program(request.param)
    assert path is not None
    with support.temporary_user(shell=path) as user:
        for file in (".bashrc", ".zshenv", ".profile"):
            user.write(file, "echo 'Bienvenue: python3: command not found'; echo 'été' >&2\n")
        yield user


def test_ssh_with_a_french_noisy_login_shell(
    fails: Fails, french_host: SshHost, noisy_user: support.User, missing: list[str]
) -> None:
    context = french_host.serialized(username=noisy_user.name, python_path=missing)
    error = fails(context, PythonNotFoundError)
    assert_missing(error, missing, "hôte")


@pytest.fixture(scope="module")
def login(server: SshHost, trusted: support.User, python: str) -> collections.abc.Iterator[Context]:
    """
    The context of a user who may become anyone.
    """
    context = server.serialized(name="bastion", username=trusted.name)
    # Whoever goes through it shares it, and need not wait for a login.
    with Proxy({"method_name": "doas", "python_path": [python], "via": context}):
        yield context


def test_sudo(fails: Fails, login: Context, missing: list[str]) -> None:
    context = {"method_name": "sudo", "name": "admin", "python_path": missing, "via": login}
    error = fails(context, PythonNotFoundError)
    assert_missing(error, missing, "admin")


def test_su_with_a_password(
    fails: Fails, login: Context, asked: support.User, missing: list[str]
) -> None:
    context = {
        "method_name": "su",
        "name": "other",
        "python_path": missing,
        "username": asked.name,
        "password": asked.password,
        "via": login,
    }
    error = fails(context, PythonNotFoundError)
    assert_missing(error, missing, "other")


def test_doas(fails: Fails, login: Context, missing: list[str]) -> None:
    context = {"method_name": "doas", "name": "admin", "python_path": missing, "via": login}
    error = fails(context, PythonNotFoundError)
    assert_missing(error, missing, "admin")


@pytest.fixture(scope="session")
def odd_container(container: Container, oddities: Oddities) -> Container:
    """
    The container, with the oddities at the same place.
    """
    target = container.root / oddities.path("").lstrip("/")
    shutil.copytree(oddities.directory, target, symlinks=True)
    return container


def in_podman(container: Container, python_path: list[str], via: Context | None = None) -> Context:
    context = {
        "method_name": "podman",
        "name": "pod",
        "container": container.name,
        "podman_path": container.podman_path,
        "python_path": python_path,
    }
    return {**context, "via": via} if via else context


def test_podman(fails: Fails, odd_container: Container, missing: list[str]) -> None:
    error = fails(in_podman(odd_container, missing), PythonNotFoundError)
    assert_missing(error, missing, "pod")


@pytest.fixture(scope="module")
def chain(
    login: Context, odd_container: Container, python: str
) -> collections.abc.Iterator[Context]:
    """
    The context of a user in a container who may become root there with su.
    """
    sudo = {"method_name": "sudo", "name": "admin", "python_path": [python], "via": login}
    podman = {**in_podman(odd_container, [python], sudo), "username": odd_container.user}
    with Proxy(become_root(podman, odd_container, [python])):
        yield podman


def become_root(podman: Context, container: Container, python_path: list[str]) -> Context:
    return {
        "method_name": "su",
        "name": "inner",
        "python_path": python_path,
        "password": container.root_password,
        "via": podman,
    }


def test_the_last_hop_of_a_chain(
    fails: Fails, chain: Context, odd_container: Container, missing: list[str]
) -> None:
    error = fails(become_root(chain, odd_container, missing), PythonNotFoundError)
    assert_missing(error, missing, "inner")


def test_a_hop_in_the_middle_of_a_chain(
    fails: Fails, login: Context, container: Container, python: str
) -> None:
    missing = ["/nonexistent/bin/python3"]
    sudo = {"method_name": "sudo", "name": "admin", "python_path": missing, "via": login}
    context = in_podman(container, [python], sudo)
    error = fails(context, PythonNotFoundError)
    assert_missing(error, missing, "admin")
    assert "pod" not in str(error)


def test_the_error_names_the_interpreters_that_are_there(
    fails: Fails, server: SshHost, user: support.User, python: str
) -> None:
    version = "import platform; print(platform.python_version())"
    expected = subprocess.run(
        [python, "-c", version], check=True, capture_output=True, text=True
    ).stdout.strip()
    context = server.serialized(username=user.name, python_path=["python9"])
    assert f"{python} ({expected})" in str(fails(context, PythonNotFoundError))


# Choosing the interpreter


def test_auto_finds_an_interpreter_with_one_login(reach: Reach, mitogen_ssh_host: SshHost) -> None:
    before = mitogen_ssh_host.logins()
    with reach(mitogen_ssh_host.serialized(python_path=["auto"])) as proxy:
        assert proxy.remote_call(len, "four") == 4
    assert mitogen_ssh_host.logins() == before + 1


@pytest.mark.parametrize("method", ["sudo", "doas"])
def test_auto_finds_an_interpreter_as_another_user(
    reach: Reach, login: Context, method: str
) -> None:
    with reach({"method_name": method, "python_path": ["auto"], "via": login}) as proxy:
        assert proxy.run("id", ["-un"]) == ("root", "", 0)


def test_auto_finds_an_interpreter_in_a_container(reach: Reach, container: Container) -> None:
    with reach(in_podman(container, ["auto"])) as proxy:
        assert proxy.file_exists("/run/.containerenv")


def test_auto_says_where_it_looked_when_there_is_none(
    fails: Fails, container_without_python: Container
) -> None:
    error = fails(in_podman(container_without_python, ["auto"]), PythonNotFoundError)
    assert "looked for" in str(error)
    assert "/usr/bin" in str(error)


def test_an_interpreter_is_missing_where_there_is_no_other(
    fails: Fails, container_without_python: Container
) -> None:
    error = fails(in_podman(container_without_python, ["python9"]), PythonNotFoundError)
    assert error.missing == "python9"
    assert "looked for" in str(error)


# Everything else that can be wrong


def assert_failed(
    error: ConnectError, cause: Cause, *, method: str, user: str | None, address: str = ""
) -> None:
    assert isinstance(error, mitogen.core.StreamError)
    assert (error.cause, error.method, error.user) == (cause, method, user)
    assert address in error.address
    assert error.hop in str(error)
    assert cause.value in str(error)


def test_refused(fails: Fails, mitogen_ssh_host: SshHost) -> None:
    context = mitogen_ssh_host.serialized(port=support.free_port())
    error = fails(context, ConnectError)
    assert_failed(error, Cause.REFUSED, method="ssh", user=context["username"], address="127.0.0.1")


@pytest.fixture
def isolated_ssh(tmp_path: pathlib.Path) -> str:
    """
    An ssh client in a network namespace that has no routes.
    """
    support.need("unshare", "ssh", root=True)
    client = tmp_path / "ssh"
    client.write_text('#!/bin/sh\nexec unshare --net -- ssh "$@"\n')
    client.chmod(0o755)
    return str(client)


def test_unreachable(fails: Fails, mitogen_ssh_host: SshHost, isolated_ssh: str) -> None:
    context = mitogen_ssh_host.serialized(hostname="192.0.2.1", ssh_path=isolated_ssh)
    error = fails(context, ConnectError)
    assert_failed(
        error, Cause.UNREACHABLE, method="ssh", user=context["username"], address="192.0.2.1"
    )


def test_a_host_that_does_not_answer(
    fails: Fails, mitogen_ssh_host_factory: SshHostFactory
) -> None:
    host = mitogen_ssh_host_factory()
    host.freeze()
    error = fails(host.serialized(connect_timeout=1.0), ConnectError)
    assert_failed(error, Cause.TIMEOUT, method="ssh", user=host.username)


def test_an_unknown_host_name(fails: Fails, mitogen_ssh_host: SshHost, isolated_ssh: str) -> None:
    name = "nowhere.invalid"
    context = mitogen_ssh_host.serialized(hostname=name, ssh_path=isolated_ssh)
    error = fails(context, ConnectError)
    assert_failed(error, Cause.UNKNOWN_HOST, method="ssh", user=context["username"], address=name)


def checked_by(known_hosts: pathlib.Path, host: SshHost) -> Context:
    arguments = ["-F", "/dev/null", "-o", f"UserKnownHostsFile={known_hosts}"]
    return host.serialized(check_host_keys="enforce", ssh_args=arguments)


def test_a_changed_host_key(
    fails: Fails, mitogen_ssh_host: SshHost, tmp_path: pathlib.Path
) -> None:
    another = pathlib.Path(mitogen_ssh_host.identity_file + ".pub").read_text().split()[1]
    kind, _, _ = mitogen_ssh_host.known_hosts_line.rpartition(" ")
    known_hosts = tmp_path / "known_hosts"
    known_hosts.write_text(f"{kind} {another}\n")
    error = fails(checked_by(known_hosts, mitogen_ssh_host), ConnectError)
    assert_failed(error, Cause.HOST_KEY, method="ssh", user=mitogen_ssh_host.username)


def test_an_unknown_host_key(
    fails: Fails, mitogen_ssh_host: SshHost, tmp_path: pathlib.Path
) -> None:
    error = fails(checked_by(tmp_path / "known_hosts", mitogen_ssh_host), ConnectError)
    assert_failed(error, Cause.HOST_KEY, method="ssh", user=mitogen_ssh_host.username)


def test_a_key_that_the_host_does_not_accept(
    fails: Fails, mitogen_ssh_host: SshHost, mitogen_ssh_host_factory: SshHostFactory
) -> None:
    other = mitogen_ssh_host_factory()
    context = mitogen_ssh_host.serialized(identity_file=other.identity_file)
    error = fails(context, ConnectError)
    assert_failed(error, Cause.AUTHENTICATION, method="ssh", user=context["username"])


def test_a_wrong_password_over_ssh(fails: Fails, server: SshHost, user: support.User) -> None:
    context = server.serialized(username=user.name, identity_file=None, password="Wr0ng-as-can-be")
    error = fails(context, ConnectError)
    assert_failed(error, Cause.PASSWORD_WRONG, method="ssh", user=user.name)


#: The methods that ask who calls them for a password.
ASKING = {
    "sudo": {"username": "root"},
    "su": {"username": "root"},
    "doas": {"username": "root"},
}


@pytest.mark.parametrize("method", ASKING)
def test_a_wrong_password(
    fails: Fails, server: SshHost, asked: support.User, python: str, method: str
) -> None:
    context = {
        "method_name": method,
        "python_path": [python],
        "password": "Wr0ng-as-can-be",
        **ASKING[method],
        "via": server.serialized(username=asked.name),
    }
    error = fails(context, ConnectError)
    assert_failed(error, Cause.PASSWORD_WRONG, method=method, user="root")


@pytest.mark.parametrize("method", ASKING)
def test_a_password_is_asked_for_and_none_given(
    fails: Fails, server: SshHost, asked: support.User, python: str, method: str
) -> None:
    context = {
        "method_name": method,
        "python_path": [python],
        **ASKING[method],
        "via": server.serialized(username=asked.name),
    }
    error = fails(context, ConnectError)
    assert_failed(error, Cause.PASSWORD_REQUIRED, method=method, user="root")


@pytest.mark.parametrize("method", ["sudo", "doas"])
def test_a_user_who_is_not_allowed_to(
    fails: Fails, server: SshHost, user: support.User, python: str, method: str
) -> None:
    context = {
        "method_name": method,
        "python_path": [python],
        "username": "root",
        "password": user.password,
        "via": server.serialized(username=user.name),
    }
    error = fails(context, ConnectError)
    assert_failed(error, Cause.NOT_ALLOWED, method=method, user="root")


@pytest.mark.parametrize("method", ["sudo", "su", "doas"])
def test_a_user_who_does_not_exist(fails: Fails, login: Context, python: str, method: str) -> None:
    context = {
        "method_name": method,
        "python_path": [python],
        "username": "nobody-of-that-name",
        "via": login,
    }
    error = fails(context, ConnectError)
    assert_failed(error, Cause.UNKNOWN_USER, method=method, user="nobody-of-that-name")


def test_a_python_that_the_user_may_not_execute(
    fails: Fails, server: SshHost, user: support.User, oddities: Oddities
) -> None:
    path = oddities.path("denied")
    context = server.serialized(username=user.name, python_path=[path])
    error = fails(context, ConnectError)
    assert_failed(error, Cause.PYTHON_DENIED, method="ssh", user=user.name)
    assert path in str(error)


def test_a_python_that_exits_with_3(
    fails: Fails, mitogen_ssh_host: SshHost, oddities: Oddities
) -> None:
    context = mitogen_ssh_host.serialized(python_path=[oddities.path("exits-with-3")])
    error = fails(context, ConnectError)
    assert_failed(error, Cause.PYTHON_FAILED, method="ssh", user=context["username"])
    assert "status 3" in str(error)


def test_a_python_that_is_too_old(fails: Fails, mitogen_ssh_host: SshHost) -> None:
    old = support.find_interpreter(2, 7)
    if old is None:
        pytest.skip("needs Python 2.7, in pyenv or on the PATH")
    context = mitogen_ssh_host.serialized(python_path=[old.path])
    error = fails(context, ConnectError)
    assert_failed(error, Cause.PYTHON_TOO_OLD, method="ssh", user=context["username"])
    assert "2.7." in str(error)
    assert "3.6" in str(error)


def test_a_container_that_does_not_exist(fails: Fails, container: Container, python: str) -> None:
    context = {**in_podman(container, [python]), "container": "no-such-box"}
    error = fails(context, ConnectError)
    assert_failed(error, Cause.NO_CONTAINER, method="podman", user=None, address="no-such-box")


def test_a_program_that_is_not_installed(fails: Fails, python: str) -> None:
    context = {
        "method_name": "docker",
        "python_path": [python],
        "container": "box",
        "docker_path": "/nonexistent/docker",
    }
    error = fails(context, ConnectError)
    assert_failed(error, Cause.PROGRAM_MISSING, method="docker", user=None, address="box")
