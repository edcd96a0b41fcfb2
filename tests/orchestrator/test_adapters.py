"""
The published modules that are built on this one work on it, unchanged: real resources of theirs are
compiled, exported and deployed.
"""

import collections.abc
import grp
import json
import os
import pathlib
import pwd
import secrets
import stat
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


def has(content: str, mode: int | None = None) -> Check:
    """Return a check that a file has this content and mode."""
    return lambda path: path.read_text("utf-8") == content and mode in (None, mode_of(path))


def mode_of(path: pathlib.Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


ME = pwd.getpwuid(os.geteuid()).pw_name

CASES: dict[str, tuple[str, str, Check]] = {
    "fs::File": (
        f'path="DIR/motd", content="welcome\\n", mode=640, owner="{ME}"',
        "motd",
        has("welcome\n", 0o640),
    ),
    "fs::Directory": (
        'path="DIR/conf.d", mode=750',
        "conf.d",
        lambda path: mode_of(path) == 0o750,
    ),
    "fs::Symlink": (
        'src="/etc/hostname", dst="DIR/link"',
        "link",
        lambda path: os.readlink(path) == "/etc/hostname",
    ),
    "fs::JsonFile": (
        'path="DIR/app.json", mode=600, '
        'values=[fs::JsonObject(path="server", value={"port": 8080, "tls": true})]',
        "app.json",
        lambda path: json.loads(path.read_text()) == {"server": {"port": 8080, "tls": True}},
    ),
    "files::TextFile": (
        'path="DIR/notes", content="\\u00fcn\\u00efcode", permissions=600',
        "notes",
        has("ünïcode", 0o600),
    ),
    "files::HostFile": (
        'path="DIR/hosts", permissions=644, '
        'entries=[files::host::Entry(hostname="db.example", address4="192.0.2.7")]',
        "hosts",
        lambda path: path.read_text().split()[-2:] == ["192.0.2.7", "db.example"],
    ),
    "exec::Run": (
        'command=exec::in_shell("echo $GREETING >>DIR/ran"), creates="DIR/ran", '
        'environment={"GREETING": "hello"}',
        "ran",
        # Once only: a second run would have added a line.
        has("hello\n"),
    ),
}
"""Resources by their type: the attributes beside host and purged, where DIR stands for the test's
directory; the name of what it makes there; and whether that is as it should be."""


def model(directory: pathlib.Path, types: list[str], purged: str) -> str:
    modules = ("exec", "files::host", "files", "fs", "mitogen")
    resources = [f"{each}(host=host, purged={purged}, {CASES[each][0]})" for each in types]
    text = "\n".join([*(f"import {name}" for name in modules), HERE, *resources, ""])
    return text.replace("DIR", str(directory))


def deployed(project: Project) -> set[tuple[str, const.Change]]:
    """Deploy all resources, and return their types, each with what had to be done."""
    done = project.deploy_all()
    done.assert_all()
    return {(resource.id.entity_type, ctx.change) for resource, ctx in done.results.items()}


def test_resources_are_deployed_once_and_removed_once(
    project: Project, tmp_path: pathlib.Path
) -> None:
    project.compile(model(tmp_path, list(CASES), purged="false"))
    for change in (const.Change.created, const.Change.nochange):
        assert deployed(project) == {(each, change) for each in CASES}
        wrong = [made for _, made, is_right in CASES.values() if not is_right(tmp_path / made)]
        assert wrong == []

    # What a command did can't be undone.
    removable = [each for each in CASES if each != "exec::Run"]
    project.compile(model(tmp_path, removable, purged="true"))
    for change in (const.Change.purged, const.Change.nochange):
        assert deployed(project) == {(each, change) for each in removable}
        assert os.listdir(tmp_path) == ["ran"]


def test_a_file_that_was_changed_by_hand_is_put_right_over_ssh(
    project: Project, mitogen_ssh_host: typing.Any, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "motd"
    project.compile(
        "import mitogen\nimport fs\n"
        f'host = std::Host(name="there", os=std::linux, via={mitogen_ssh_host.model()})\n'
        f'fs::File(host=host, path="{path}", content="over ssh", mode=640)'
    )
    path.write_text("defaced")
    path.chmod(0o666)
    logins = mitogen_ssh_host.logins()

    assert set(project.dryrun_resource("fs::File")) == {"hash", "permissions"}
    assert path.read_text() == "defaced"
    project.deploy_resource("fs::File", change=const.Change.updated)

    assert has("over ssh", 0o640)(path)
    assert mitogen_ssh_host.logins() > logins


def test_a_command_that_fails_fails_its_resource(project: Project) -> None:
    project.compile(
        f"import mitogen\nimport exec\n{HERE}\n"
        "exec::Run(host=host, command=exec::in_shell('echo no space left >&2; exit 3'))"
    )

    project.deploy_resource("exec::Run", status=const.ResourceState.failed)

    assert "no space left" in logged(project)


def test_authorized_keys_are_deployed(project: Project, tmp_path: pathlib.Path) -> None:
    group = grp.getgrgid(os.getegid()).gr_name
    project.compile(
        f"import mitogen\nimport ssh\n{HERE}\n"
        f'ssh::SSHUser(host=host, home_dir="{tmp_path}", user="{ME}", group="{group}",\n'
        '    ssh_keys=[ssh::Key(name="laptop", public_key="AAAAC3Nz")])'
    )

    for change in (const.Change.created, const.Change.nochange):
        assert deployed(project) == {("fs::Directory", change), ("fs::File", change)}

    keys = tmp_path / ".ssh" / "authorized_keys"
    assert "AAAAC3Nz" in keys.read_text()
    assert mode_of(keys) == 0o600


@support.requires("dpkg")
def test_an_installed_apt_package_needs_no_change(project: Project) -> None:
    project.compile(f'import mitogen\nimport apt\n{HERE}\napt::Package(host=host, name="dpkg")')

    project.deploy_resource("apt::Package", name="dpkg", change=const.Change.nochange)


@support.requires("podman")
@support.requires_root
def test_a_podman_network_is_created_and_removed(project: Project) -> None:
    name = f"mitogen-{secrets.token_hex(4)}"
    # Not each of podman's network back-ends has names for containers.
    attributes = f'name="{name}", driver="bridge", dns_enabled=false'

    def status_after(purged: str, change: const.Change) -> int:
        network = f"podman::Network(host=host, {attributes}, purged={purged})"
        project.compile(f"import mitogen\nimport podman\n{HERE}\n{network}")
        project.deploy_resource("podman::Network", change=change)
        return support.execute("podman", "network", "exists", name).returncode

    try:
        assert status_after("false", const.Change.created) == 0
        assert status_after("false", const.Change.nochange) == 0
        assert status_after("true", const.Change.purged) == 1
    finally:
        support.execute("podman", "network", "rm", "-f", name)


EXPORTED = {
    "apt::Package": 'apt::Package(host=host, name="nginx", via=other)',
    "fs::ConfigFile": 'apt::Repository(host=host, name="r", base_url="http://r.example", '
    'release="stable", repo="main", via=other)',
    "yum::Package": 'yum::Package(host=host, name="nginx", via=other)',
    "yum::PackagesBatch": 'yum::PackagesBatch(host=host, name="w", packages=["nginx"], via=other)',
    "podman::Network": 'podman::Network(host=host, name="n", via=other)',
    "podman::ImageFromRegistry": "podman::ImageFromRegistry("
    'host=host, name="docker.io/debian:12", via=other)',
}
"""Resources that have a context of their own, by what makes them."""


def test_resources_are_exported_with_their_own_context(project: Project) -> None:
    project.compile(
        f"import mitogen\nimport apt\nimport yum\nimport podman\n{HERE}\n"
        'other = mitogen::Sudo(name="root there", username="root",\n'
        '    via=mitogen::Ssh(name="there", hostname="192.0.2.1", port=2222))\n'
        + "\n".join(EXPORTED.values())
    )
    context = {
        "method_name": "sudo",
        "name": "root there",
        "username": "root",
        "via": {"method_name": "ssh", "name": "there", "hostname": "192.0.2.1", "port": 2222},
    }

    for resource_type in EXPORTED:
        resource = project.get_resource(resource_type)
        assert resource is not None, resource_type
        assert resource.serialize()["via"] == context, resource_type


def logged(project: Project) -> str:
    """All that the last deploy sent to the orchestrator's log of its resource."""
    assert project.ctx is not None
    return repr([log.to_dict() for log in project.ctx.logs])


@pytest.fixture
def user() -> collections.abc.Iterator[support.User]:
    support.need("useradd", "chpasswd", "sudo", root=True)
    with support.temporary_user() as made, support.sudo_rule(made, password=True):
        yield made


@pytest.mark.needs_core(15)
def test_passwords_given_as_references_reach_ssh_and_sudo_and_no_log(
    project: Project,
    mitogen_ssh_host_factory: typing.Any,
    user: support.User,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(0)
    monkeypatch.setenv("THE_PASSWORD", user.password)
    server = mitogen_ssh_host_factory(
        username=user.name,
        python_path=[support.interpreter_for_everyone()],
        password_authentication=True,
    )
    password = 'password=std::create_environment_reference("THE_PASSWORD")'
    ssh = server.model(identity_file=None, identities_only=True).removesuffix(")")
    path = user.home / "made"
    project.compile(
        "import mitogen\nimport fs\n"
        f'via = mitogen::Sudo(username="root", {password}, via={ssh}, {password}))\n'
        'host = std::Host(name="there", os=std::linux, via=via)\n'
        f'fs::File(host=host, path="{path}", content="x")'
    )

    project.deploy_resource("fs::File", change=const.Change.created)

    assert path.owner() == "root"
    assert f"Accepted password for {user.name}" in server.log()
    # It is in none of what the orchestrator stores, nor in the agent's log at any level. A record's
    # arguments count too: another handler may format all of them.
    exported = json.dumps([resource.serialize() for resource in project.resources.values()])
    agent = "\n".join(repr(vars(record)) for record in caplog.records)
    for text in (exported, logged(project), agent):
        assert text
        assert user.password not in text
