"""
The published modules that are built on this one work on it, unchanged: real resources of theirs are
compiled, exported and deployed.
"""

import collections.abc
import dataclasses
import grp
import json
import os
import pathlib
import pwd
import secrets
import stat
import subprocess
import sys
import typing

import pytest
from inmanta import const
from pytest_inmanta.plugin import Project

import support

Check = collections.abc.Callable[[pathlib.Path], bool]

HERE = f"""
host = std::Host(
    name="here",
    os=std::linux,
    via=mitogen::Local(name="here", python_path=[{json.dumps(sys.executable)}]),
)
# podman for inmanta-core 14 wants one for each host, later ones ignore it.
std::AgentConfig(agentname="here")
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """
    A resource of a published module.

    :param type: its type in the model
    :param attributes: those beside host and purged; DIR stands for the test's directory
    :param created: whether a deploy did what the resource says, in that directory
    :param purged: whether a deploy of it as purged did, or None where it can't be purged
    """

    type: str
    attributes: str
    created: Check
    purged: Check | None
    imports: tuple[str, ...] = ()

    def model(self, directory: pathlib.Path, purged: bool) -> str:
        modules = ["mitogen", self.type.split("::")[0], *self.imports]
        return (
            "".join(f"import {module}\n" for module in modules)
            + HERE
            + f"{self.type}(host=host, purged={str(purged).lower()}, "
            + self.attributes.replace("DIR", str(directory))
            + ")\n"
        )


def has(name: str, content: str, mode: int | None = None) -> Check:
    """
    A check that a file has this content and mode.
    """

    def check(directory: pathlib.Path) -> bool:
        path = directory / name
        found = stat.S_IMODE(path.stat().st_mode)
        return path.read_text("utf-8") == content and mode in (None, found)

    return check


def lacks(name: str) -> Check:
    """
    A check that there is nothing of this name.
    """
    return lambda directory: not os.path.lexists(directory / name)


ME = pwd.getpwuid(os.geteuid()).pw_name

CASES = [
    Case(
        "fs::File",
        f'path="DIR/motd", content="welcome\\n", mode=640, owner="{ME}"',
        has("motd", "welcome\n", 0o640),
        lacks("motd"),
    ),
    Case(
        "fs::Directory",
        'path="DIR/conf.d", mode=750',
        lambda directory: stat.S_IMODE((directory / "conf.d").stat().st_mode) == 0o750,
        lacks("conf.d"),
    ),
    Case(
        "fs::Symlink",
        'src="/etc/hostname", dst="DIR/link"',
        lambda directory: os.readlink(directory / "link") == "/etc/hostname",
        lacks("link"),
    ),
    Case(
        "fs::JsonFile",
        'path="DIR/app.json", mode=600, '
        'values=[fs::JsonObject(path="server", value={"port": 8080, "tls": true})]',
        lambda directory: (
            json.loads((directory / "app.json").read_text())
            == {"server": {"port": 8080, "tls": True}}
        ),
        lacks("app.json"),
    ),
    Case(
        "files::TextFile",
        'path="DIR/notes", content="\\u00fcn\\u00efcode", permissions=600',
        has("notes", "ünïcode", 0o600),
        lacks("notes"),
    ),
    Case(
        "files::HostFile",
        'path="DIR/hosts", permissions=644, '
        'entries=[files::host::Entry(hostname="db.example", address4="192.0.2.7")]',
        lambda directory: (
            ["192.0.2.7", "db.example"]
            in [line.split() for line in (directory / "hosts").read_text().splitlines()]
        ),
        lacks("hosts"),
        ("files::host",),
    ),
    Case(
        "files::SystemdUnitFile",
        'path="DIR/probe.service", permissions=644, '
        'unit=files::systemd_unit::Unit(description="A probe"), '
        'service=files::systemd_unit::Service(exec_start="/bin/true", type="oneshot")',
        lambda directory: (
            {"[Unit]", "Description=A probe", "[Service]", "ExecStart=/bin/true", "Type=oneshot"}
            <= set((directory / "probe.service").read_text().splitlines())
        ),
        lacks("probe.service"),
        ("files::systemd_unit",),
    ),
    Case(
        "exec::Run",
        'command=exec::in_shell("echo $GREETING >>DIR/ran"), creates="DIR/ran", '
        'environment={"GREETING": "hello"}',
        # Once only: a second run would have added a line.
        has("ran", "hello\n"),
        None,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.type)
def test_a_resource_is_deployed_and_a_second_deploy_changes_nothing(
    case: Case, project: Project, tmp_path: pathlib.Path
) -> None:
    project.compile(case.model(tmp_path, purged=False))

    dry = project.dryrun_resource(case.type)
    assert dry
    assert list(tmp_path.iterdir()) == []

    project.deploy_resource(case.type, change=const.Change.created)
    assert case.created(tmp_path)

    assert project.dryrun_resource(case.type) == {}
    project.deploy_resource(case.type, change=const.Change.nochange)
    assert case.created(tmp_path)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.purged], ids=lambda case: case.type
)
def test_a_purged_resource_is_removed_and_a_second_deploy_changes_nothing(
    case: Case, project: Project, tmp_path: pathlib.Path
) -> None:
    assert case.purged is not None
    project.compile(case.model(tmp_path, purged=False))
    project.deploy_resource(case.type)
    assert not case.purged(tmp_path)

    project.compile(case.model(tmp_path, purged=True))
    project.deploy_resource(case.type, change=const.Change.purged)
    assert case.purged(tmp_path)
    project.deploy_resource(case.type, change=const.Change.nochange)


def test_a_file_that_was_changed_by_hand_is_put_right(
    project: Project, tmp_path: pathlib.Path
) -> None:
    file = next(case for case in CASES if case.type == "fs::File")
    project.compile(file.model(tmp_path, purged=False))
    project.deploy_resource(file.type)
    path = tmp_path / "motd"
    path.write_text("defaced")
    path.chmod(0o666)

    assert set(project.dryrun_resource(file.type)) == {"hash", "permissions"}
    project.deploy_resource(file.type, change=const.Change.updated)

    assert file.created(tmp_path)


def test_a_command_that_fails_fails_its_resource(project: Project, tmp_path: pathlib.Path) -> None:
    project.compile(
        f"import mitogen\nimport exec\n{HERE}\n"
        "exec::Run(host=host, command=exec::in_shell('echo no space left >&2; exit 3'))"
    )

    project.deploy_resource("exec::Run", status=const.ResourceState.failed)

    assert project.ctx is not None
    assert "no space left" in logged(project)


def test_authorized_keys_are_deployed(project: Project, tmp_path: pathlib.Path) -> None:
    group = grp.getgrgid(os.getegid()).gr_name
    project.compile(
        f"import mitogen\nimport ssh\n{HERE}\n"
        f'ssh::SSHUser(host=host, home_dir="{tmp_path}", user="{ME}", group="{group}",\n'
        '    ssh_keys=[ssh::Key(name="laptop", public_key="AAAAC3Nz")])'
    )

    project.deploy_resource("fs::Directory", change=const.Change.created)
    project.deploy_resource("fs::File", change=const.Change.created)
    project.deploy_resource("fs::File", change=const.Change.nochange)

    keys = tmp_path / ".ssh" / "authorized_keys"
    assert "AAAAC3Nz" in keys.read_text()
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600


@support.requires("groupadd")
@support.requires_root
def test_a_group_is_made_once(project: Project) -> None:
    name = f"mitogen-{secrets.token_hex(4)}"
    project.compile(f'import mitogen\nimport user\n{HERE}\nuser::Group(host=host, name="{name}")')

    try:
        with support.machine_lock("users"):
            project.deploy_resource("exec::Run")
        assert grp.getgrnam(name)
        with support.machine_lock("users"):
            project.deploy_resource("exec::Run")
    finally:
        subprocess.run([str(support.find_program("groupdel")), name], check=False)


@support.requires("dpkg")
def test_an_installed_apt_package_needs_no_change(project: Project) -> None:
    project.compile(f'import mitogen\nimport apt\n{HERE}\napt::Package(host=host, name="dpkg")')

    project.deploy_resource("apt::Package", name="dpkg", change=const.Change.nochange)


@support.requires("podman")
@support.requires_root
def test_a_podman_network_is_created_and_removed(project: Project) -> None:
    name = f"mitogen-{secrets.token_hex(4)}"
    show = [str(support.find_program("podman")), "network", "exists", name]

    def model(purged: str) -> str:
        return (
            f"import mitogen\nimport podman\n{HERE}\n"
            # Not each of podman's network back-ends has names for containers.
            f'podman::Network(host=host, name="{name}", driver="bridge", dns_enabled=false, '
            f"purged={purged})"
        )

    try:
        project.compile(model("false"))
        project.deploy_resource("podman::Network", change=const.Change.created)
        assert subprocess.run(show, check=False).returncode == 0
        project.deploy_resource("podman::Network", change=const.Change.nochange)

        project.compile(model("true"))
        project.deploy_resource("podman::Network", change=const.Change.purged)
        assert subprocess.run(show, check=False).returncode == 1
    finally:
        subprocess.run([*show[:2], "rm", "-f", name], check=False, capture_output=True)


EXPORTED = {
    "apt::Package": 'import apt\napt::Package(host=host, name="nginx", via=other)',
    "fs::ConfigFile": (
        'import apt\napt::Repository(host=host, name="r", base_url="http://r.example", '
        'release="stable", repo="main", via=other)'
    ),
    "yum::Package": 'import yum\nyum::Package(host=host, name="nginx", via=other)',
    "yum::PackagesBatch": (
        'import yum\nyum::PackagesBatch(host=host, name="web", packages=["nginx"], via=other)'
    ),
    "podman::Network": 'import podman\npodman::Network(host=host, name="n", via=other)',
    "podman::ImageFromRegistry": (
        'import podman\npodman::ImageFromRegistry(host=host, name="docker.io/debian:12", via=other)'
    ),
}


@pytest.mark.parametrize("resource_type", EXPORTED)
def test_a_resource_is_exported_with_its_own_context(resource_type: str, project: Project) -> None:
    project.compile(
        f"import mitogen\n{HERE}\n"
        'other = mitogen::Sudo(name="root there", username="root",\n'
        '    via=mitogen::Ssh(name="there", hostname="192.0.2.1", port=2222))\n'
        + EXPORTED[resource_type]
    )

    resource = project.get_resource(resource_type)

    assert resource is not None
    assert resource.serialize()["via"] == {
        "method_name": "sudo",
        "name": "root there",
        "username": "root",
        "via": {"method_name": "ssh", "name": "there", "hostname": "192.0.2.1", "port": 2222},
    }


def test_a_file_is_deployed_over_ssh(
    project: Project, mitogen_ssh_host: typing.Any, tmp_path: pathlib.Path
) -> None:
    logins = mitogen_ssh_host.logins()
    path = tmp_path / "motd"
    project.compile(
        f"import mitogen\nimport fs\n"
        f'host = std::Host(name="there", os=std::linux, via={mitogen_ssh_host.model()})\n'
        f'fs::File(host=host, path="{path}", content="over ssh")'
    )

    project.deploy_resource("fs::File", change=const.Change.created)

    assert path.read_text() == "over ssh"
    assert mitogen_ssh_host.logins() > logins


def logged(project: Project) -> str:
    """
    All that the last deploy sent to the orchestrator's log of its resource.
    """
    assert project.ctx is not None
    return "\n".join(
        json.dumps(log.to_dict(), default=repr, ensure_ascii=False) for log in project.ctx.logs
    )


@pytest.fixture
def user() -> collections.abc.Iterator[support.User]:
    support.need("useradd", "chpasswd", root=True)
    with support.temporary_user() as made:
        yield made


REFERENCE = 'std::create_environment_reference("THE_PASSWORD")'


def deploy_as(
    project: Project, via: str, directory: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> str:
    """
    Deploy a file through a context, and give the name of the user who owns it.
    """
    caplog.set_level(0)
    path = directory / "made"
    project.compile(
        "import mitogen\nimport fs\n"
        f'host = std::Host(name="there", os=std::linux, via={via})\n'
        f'fs::File(host=host, path="{path}", content="x")'
    )
    project.deploy_resource("fs::File", change=const.Change.created)
    return path.owner()


def assert_is_nowhere(secret: str, project: Project, caplog: pytest.LogCaptureFixture) -> None:
    """
    The secret is in none of what the orchestrator stores, nor in the agent's log at any level.
    """
    exported = json.dumps([resource.serialize() for resource in project.resources.values()])
    # A record's arguments count too: another handler may format all of them.
    agent = "\n".join(repr(vars(record)) for record in caplog.records)
    for text in (exported, logged(project), agent):
        assert text
        assert secret not in text


@pytest.mark.needs_core(15)
def test_a_sudo_password_given_as_a_reference_reaches_sudo_and_no_log(
    project: Project,
    mitogen_ssh_host: typing.Any,
    user: support.User,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    support.need("sudo", root=True)
    monkeypatch.setenv("THE_PASSWORD", user.password)
    python = support.interpreter_for_everyone()
    assert python is not None, "no interpreter that each user may run"
    ssh = mitogen_ssh_host.model(username=user.name, python_path=[python])

    with support.sudo_rule(user, password=True):
        owner = deploy_as(
            project,
            f'mitogen::Sudo(username="root", password={REFERENCE}, via={ssh})',
            user.home,
            caplog,
        )

    assert owner == "root"
    assert_is_nowhere(user.password, project, caplog)


@pytest.mark.needs_core(15)
def test_an_ssh_password_given_as_a_reference_reaches_ssh_and_no_log(
    project: Project,
    mitogen_ssh_host_factory: typing.Any,
    user: support.User,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("THE_PASSWORD", user.password)
    python = support.interpreter_for_everyone()
    assert python is not None, "no interpreter that each user may run"
    server = mitogen_ssh_host_factory(
        username=user.name, python_path=[python], password_authentication=True
    )
    model = server.model(identity_file=None, identities_only=True)

    owner = deploy_as(
        project, model.removesuffix(")") + f", password={REFERENCE})", user.home, caplog
    )

    assert owner == user.name
    assert f"Accepted password for {user.name}" in server.log()
    assert_is_nowhere(user.password, project, caplog)
