"""
Real hosts to connect to: ssh, users with what they may do, a container, and stand-ins for the
programs that can't run here.
"""

import collections.abc
import contextlib

import pytest
from hosts.container import Container, running_container
from hosts.stand_ins import StandIns

import support
from pytest_inmanta_mitogen import SshHost


@pytest.fixture(scope="session")
def python() -> str:
    """
    An interpreter that every user of this machine can execute.
    """
    path = support.interpreter_for_everyone()
    if path is None:
        pytest.skip("needs a Python that every user can execute: none in /usr/bin, /usr/local/bin")
    return path


@pytest.fixture(scope="session")
def user() -> collections.abc.Iterator[support.User]:
    """
    A user with bash for a login shell who may do nothing special.
    """
    support.need("useradd", "bash", root=True)
    with support.temporary_user(shell="/bin/bash") as user:
        yield user


@pytest.fixture(scope="session", params=["bash", "zsh"])
def noisy_user(request: pytest.FixtureRequest) -> collections.abc.Iterator[support.User]:
    """
    A user whose login shell prints things that it was not asked for.
    """
    support.need("useradd", request.param, root=True)
    with support.temporary_user(shell=support.find_program(request.param) or "") as user:
        for file in (".bashrc", ".zshenv"):
            user.write(file, "echo 'Bienvenue: python3: command not found'; echo 'été' >&2\n")
        yield user


@contextlib.contextmanager
def privileged_user(*, password: bool) -> collections.abc.Iterator[support.User]:
    support.need("useradd", "sudo", "doas", root=True)
    with (
        support.temporary_user() as user,
        support.sudo_rule(user, password=password),
        support.doas_rule(user, password=password),
    ):
        yield user


@pytest.fixture(scope="session")
def trusted() -> collections.abc.Iterator[support.User]:
    """
    A user who may run everything with sudo and doas, and is not asked for a password.
    """
    with privileged_user(password=False) as user:
        yield user


@pytest.fixture(scope="session")
def asked() -> collections.abc.Iterator[support.User]:
    """
    A user who may run everything with sudo and doas, and is asked for his password each time.
    """
    with privileged_user(password=True) as user:
        yield user


@pytest.fixture(scope="session")
def server(python: str) -> collections.abc.Iterator[SshHost]:
    """
    An ssh server for all users of this machine, with their passwords too.
    """
    support.need("sshd", "ssh", root=True)
    with SshHost(name="server", python_path=[python], password_authentication=True) as server:
        yield server


@pytest.fixture(scope="session")
def container(asked: support.User) -> collections.abc.Iterator[Container]:
    """
    A real container, run by podman. Its root has the password of `asked`.
    """
    with running_container(asked) as container:
        yield container


@pytest.fixture(scope="session")
def container_without_python(asked: support.User) -> collections.abc.Iterator[Container]:
    """
    A real container in which there is no Python.
    """
    with running_container(asked, with_python=False) as container:
        yield container


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> StandIns:
    """
    Stand-ins for programs that can't run here. Their container is this machine itself.
    """
    stand_ins = StandIns(tmp_path_factory.mktemp("stand-ins"))
    stand_ins.install(leader=1)
    return stand_ins


@pytest.fixture(scope="session")
def leader_stand_ins(tmp_path_factory: pytest.TempPathFactory, container: Container) -> StandIns:
    """
    Stand-ins that tell the process id of the real container's first process.
    """
    stand_ins = StandIns(tmp_path_factory.mktemp("stand-ins"))
    stand_ins.install(container.leader)
    return stand_ins
