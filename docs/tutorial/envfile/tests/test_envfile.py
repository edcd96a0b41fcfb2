"""Deploys variables on this machine, and on a throwaway ssh host on the loopback address."""

import json
import pathlib
import sys

import pytest
from inmanta import const
from pytest_inmanta.plugin import Project

from pytest_inmanta_mitogen import SshHost

LOCAL = f'mitogen::Local(name="here", python_path=[{json.dumps(sys.executable)}])'


@pytest.fixture(params=["local", "ssh"])
def via(request: pytest.FixtureRequest) -> str:
    """The context to deploy in, as the model has it."""
    if request.param == "local":
        return LOCAL
    host: SshHost = request.getfixturevalue("mitogen_ssh_host")
    return host.model()


def model(via: str, path: pathlib.Path, value: str = "-O2", purged: bool = False) -> str:
    return f"""
        import mitogen
        import envfile

        host = std::Host(name="web", os=std::linux, via={via})
        envfile::Variable(
            host=host,
            path={json.dumps(str(path))},
            name="OPTIONS",
            value={json.dumps(value)},
            purged={json.dumps(purged)},
        )
    """


def test_a_variable_is_created_once(project: Project, via: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "daemon"
    project.compile(model(via, path))

    project.deploy_resource("envfile::Variable", change=const.Change.created)
    assert path.read_text() == "OPTIONS=-O2\n"

    project.deploy_resource("envfile::Variable", change=const.Change.nochange)


def test_the_other_lines_stay(project: Project, via: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "daemon"
    path.write_text("# Of the daemon\nOPTIONS=-O0\nOPTIONS_MORE=x\n")
    path.chmod(0o640)

    project.compile(model(via, path))
    project.deploy_resource("envfile::Variable", change=const.Change.updated)
    assert path.read_text() == "# Of the daemon\nOPTIONS=-O2\nOPTIONS_MORE=x\n"
    assert path.stat().st_mode & 0o777 == 0o640

    project.compile(model(via, path, purged=True))
    project.deploy_resource("envfile::Variable", change=const.Change.purged)
    assert path.read_text() == "# Of the daemon\nOPTIONS_MORE=x\n"


def test_a_dry_run_changes_nothing(project: Project, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "daemon"
    path.write_text("OPTIONS=-O0\n")
    project.compile(model(LOCAL, path))

    changes = project.dryrun_resource("envfile::Variable")

    assert changes["value"].desired == "-O2"
    assert path.read_text() == "OPTIONS=-O0\n"
