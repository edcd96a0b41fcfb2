"""
A failed connection says what is wrong: that there is no such interpreter, wherever it is missing,
and never so when it is anything else.
"""

import collections.abc
import pathlib

import mitogen.core
import pytest
from hosts.container import Container, in_podman

import support
from inmanta_plugins.mitogen import Proxy, PythonNotFoundError
from inmanta_plugins.mitogen.errors import Cause
from pytest_inmanta_mitogen import SshHost
from support import Context, connect_error, fails_with

pytestmark = pytest.mark.timeout(60)


# What is wrong with the interpreter


def assert_missing(context: Context, missing: list[str]) -> PythonNotFoundError:
    """
    Connect to an interpreter that is missing.

    :param context: That of an interpreter, all but its python_path.
    :param missing: The python_path.
    """
    error = connect_error({**context, "python_path": missing}, PythonNotFoundError)
    assert isinstance(error, FileNotFoundError)
    assert error.filename == missing[0]
    assert error.missing == missing[-1]
    assert repr(missing[-1]) in str(error)
    assert context["name"] in str(error)
    assert "found on that host: " in str(error)
    return error


@pytest.fixture(scope="session")
def french_host(python: str) -> collections.abc.Iterator[SshHost]:
    """A host that sends a banner, and whose programs speak French."""
    support.need("sshd", "ssh", root=True)
    with support.public_directory() as directory:
        environment = support.french_locale(directory)
        banner = "Accès réservé. python3: not found\n"
        with SshHost(
            name="hôte", python_path=[python], environment=environment, banner=banner
        ) as host:
            yield host


each_missing = pytest.mark.parametrize(
    "missing", [["/nonexistent/bin/python3"], ["/usr/bin/env", "python9"]], ids=["path", "env"]
)
"""An interpreter that is missing itself, and one that another program does not find."""


@each_missing
def test_missing_behind_a_french_noisy_login_shell(
    french_host: SshHost, noisy_user: support.User, missing: list[str]
) -> None:
    assert_missing(french_host.serialized(username=noisy_user.name), missing)


@pytest.fixture(scope="module")
def login(server: SshHost, trusted: support.User, python: str) -> collections.abc.Iterator[Context]:
    """The context of a user who may become anyone."""
    context = server.serialized(name="bastion", username=trusted.name)
    # Whoever goes through it shares it, and need not wait for a login.
    with Proxy({"method_name": "doas", "python_path": [python], "via": context}):
        yield context


@pytest.fixture(scope="module")
def chain(login: Context, container: Container, python: str) -> collections.abc.Iterator[Context]:
    """The context of a user in a container who may become root there with su."""
    sudo = {"method_name": "sudo", "name": "admin", "python_path": [python], "via": login}
    podman = {**in_podman(container, [python], container.user), "via": sudo}
    su = {"method_name": "su", "python_path": [python], "password": container.root_password}
    with Proxy({**su, "via": podman}):
        yield podman


PLACES = ["local", "sudo", "su", "doas", "podman", "chain"]


@pytest.fixture(params=PLACES)
def place(
    request: pytest.FixtureRequest,
    login: Context,
    asked: support.User,
    container: Container,
    chain: Context,
) -> Context:
    """The context of an interpreter somewhere, without its python_path."""
    other = {"username": asked.name, "password": asked.password}
    root = {"password": container.root_password}
    contexts: dict[str, Context] = {
        "local": {"method_name": "local", "name": "here"},
        "sudo": {"method_name": "sudo", "name": "admin", "via": login},
        "su": {"method_name": "su", "name": "other", **other, "via": login},
        "doas": {"method_name": "doas", "name": "admin", "via": login},
        "podman": in_podman(container, []),
        "chain": {"method_name": "su", "name": "inner", **root, "via": chain},
    }
    return contexts[request.param]


@each_missing
def test_missing_by_any_method(place: Context, missing: list[str]) -> None:
    assert_missing(place, missing)


def test_a_hop_in_the_middle_of_a_chain_is_the_one_that_is_named(
    login: Context, container: Container, python: str
) -> None:
    missing = ["/nonexistent/bin/python3"]
    sudo = {"method_name": "sudo", "name": "admin", "python_path": missing, "via": login}
    context = {**in_podman(container, [python]), "via": sudo}
    error = connect_error(context, PythonNotFoundError)
    assert "admin" in str(error)
    assert "pod" not in str(error)


# Choosing the interpreter


def test_auto_finds_an_interpreter_with_one_login(mitogen_ssh_host: SshHost) -> None:
    before = mitogen_ssh_host.logins()
    with Proxy(mitogen_ssh_host.serialized(python_path=["auto"])) as proxy:
        assert proxy.remote_call(len, "four") == 4
    assert mitogen_ssh_host.logins() == before + 1


@pytest.mark.parametrize("method", ["sudo", "doas"])
def test_auto_finds_an_interpreter_as_another_user(login: Context, method: str) -> None:
    with Proxy({"method_name": method, "python_path": ["auto"], "via": login}) as proxy:
        assert proxy.run("id", ["-un"]) == ("root", "", 0)


def test_auto_finds_an_interpreter_in_a_container(container: Container) -> None:
    with Proxy(in_podman(container, ["auto"])) as proxy:
        assert proxy.file_exists("/run/.containerenv")


@pytest.mark.parametrize("missing", ["auto", "python9"])
def test_where_there_is_no_interpreter_the_error_says_where_it_was_looked_for(
    container_without_python: Container, missing: str
) -> None:
    error = connect_error(in_podman(container_without_python, [missing]), PythonNotFoundError)
    assert error.missing == missing
    assert "looked for" in str(error)
    assert "/usr/bin" in str(error)


# Everything else that can be wrong


def assert_fails(context: Context, cause: Cause, user: str | None, address: str = "") -> str:
    error = fails_with(cause, context)
    assert isinstance(error, mitogen.core.StreamError)
    assert (error.method, error.user) == (context["method_name"], user)
    assert address in error.address
    assert error.hop in str(error)
    assert cause.value in str(error)
    return str(error)


@pytest.fixture
def wrong_options(
    mitogen_ssh_host: SshHost, tmp_path: pathlib.Path
) -> dict[str, tuple[Cause, Context]]:
    """Options of ssh that can't connect to the host, and why."""
    isolated = tmp_path / "ssh"
    isolated.write_text('#!/bin/sh\nexec unshare --net -- ssh "$@"\n')
    isolated.chmod(0o755)
    key = tmp_path / "key"
    support.execute("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key, check=True)
    changed = tmp_path / "changed"
    address = mitogen_ssh_host.known_hosts_line.split()[0]
    changed.write_text(f"{address} {key.with_suffix('.pub').read_text()}")

    def enforcing(known_hosts: pathlib.Path) -> Context:
        arguments = ["-F", "/dev/null", "-o", f"UserKnownHostsFile={known_hosts}"]
        return {"check_host_keys": "enforce", "ssh_args": arguments}

    isolation = {"ssh_path": str(isolated)}
    return {
        "no route": (Cause.UNREACHABLE, {"hostname": "192.0.2.1", **isolation}),
        "unknown name": (Cause.UNKNOWN_HOST, {"hostname": "nowhere.invalid", **isolation}),
        "changed host key": (Cause.HOST_KEY, enforcing(changed)),
        "unknown host key": (Cause.HOST_KEY, enforcing(tmp_path / "known_hosts")),
        "key that is not accepted": (Cause.AUTHENTICATION, {"identity_file": str(key)}),
    }


@pytest.mark.parametrize(
    "wrong",
    [
        "no route",
        "unknown name",
        "changed host key",
        "unknown host key",
        "key that is not accepted",
    ],
)
def test_why_ssh_fails(
    mitogen_ssh_host: SshHost, wrong_options: dict[str, tuple[Cause, Context]], wrong: str
) -> None:
    support.need("unshare", root=True)
    cause, options = wrong_options[wrong]
    context = mitogen_ssh_host.serialized(**options)
    assert_fails(context, cause, context["username"], context["hostname"])


NOT_BECOMING: list[tuple[Cause, str, str, Context]] = [
    (Cause.PASSWORD_WRONG, "sudo su doas", "asked", {"password": "Wr0ng-as-can-be"}),
    (Cause.PASSWORD_REQUIRED, "sudo su doas", "asked", {}),
    (Cause.NOT_ALLOWED, "sudo doas", "user", {}),
    (Cause.UNKNOWN_USER, "sudo su doas", "trusted", {"username": "nobody-of-that-name"}),
]
"""Why one can't become another user: the cause, the methods, who logs in, and the options."""


@pytest.mark.parametrize(
    ("cause", "method", "login_of", "options"),
    [
        pytest.param(cause, method, login_of, options, id=f"{cause.name}-{method}")
        for cause, methods, login_of, options in NOT_BECOMING
        for method in methods.split()
    ],
)
def test_why_one_cannot_become_another_user(
    request: pytest.FixtureRequest,
    server: SshHost,
    python: str,
    cause: Cause,
    method: str,
    login_of: str,
    options: Context,
) -> None:
    login: support.User = request.getfixturevalue(login_of)
    context: Context = {"method_name": method, "python_path": [python], "username": "root"}
    if cause is Cause.NOT_ALLOWED:
        context["password"] = login.password
    context |= {"via": server.serialized(username=login.name), **options}
    assert_fails(context, cause, context["username"])


def test_a_python_that_is_too_old(mitogen_ssh_host: SshHost) -> None:
    old = support.find_interpreter(2, 7)
    if old is None:
        pytest.skip("needs Python 2.7, in pyenv or on the PATH")
    context = mitogen_ssh_host.serialized(python_path=[old.path])
    text = assert_fails(context, Cause.PYTHON_TOO_OLD, context["username"])
    assert "2.7." in text
    assert "3.6" in text


def test_a_container_that_does_not_exist(container: Container, python: str) -> None:
    context = {**in_podman(container, [python]), "container": "no-such-box"}
    assert_fails(context, Cause.NO_CONTAINER, "root", address="no-such-box")
