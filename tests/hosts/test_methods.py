"""
Every way to reach a host reaches it, with every option it has.
"""

import getpass
import hashlib
import os
import pathlib
import sys
import typing
import uuid

import pytest
from hosts.container import Container
from hosts.stand_ins import StandIns
from reach import Context, Reach

import support
from inmanta_plugins.mitogen import Proxy
from pytest_inmanta_mitogen import SshHost

pytestmark = pytest.mark.timeout(60)

#: What every method can be told, apart from its interpreter and profiling.
COMMON: Context = {
    "name": "somewhere",
    "remote_name": "agent",
    "connect_timeout": 20.0,
    "unidirectional": True,
    "debug": True,
}


def use(proxy: Proxy, user: str) -> None:
    """
    Does a little of everything there.

    :param user: Whom the calls have to run as.
    """
    assert proxy.run("id", ["-un"]) == (user, "", 0)
    assert proxy.run("sh", ["-c", "echo $GREETING; exit 3"], env={"GREETING": "moin"}) == (
        "moin",
        "",
        3,
    )
    directory = f"/tmp/{uuid.uuid4()}"
    proxy.mkdir(directory)
    try:
        use_files(proxy, user, directory)
    finally:
        proxy.rmdir(directory)
    assert not proxy.file_exists(directory)


def use_files(proxy: Proxy, user: str, directory: str) -> None:
    """
    Does everything that can be done with files, in an empty directory there.
    """
    file, link = f"{directory}/file", f"{directory}/link"
    content = bytes(range(256)) * 1000
    proxy.put(file, content)
    proxy.chmod(file, "640")
    proxy.symlink(file, link)
    stat = proxy.file_stat(link)
    assert (stat["owner"], stat["permissions"]) == (user, 640)
    assert proxy.is_symlink(link)
    assert proxy.readlink(link) == file
    assert proxy.read_binary(link) == content
    proxy.put(file, "grüße\n".encode())
    assert proxy.read(file) == "grüße\n"
    assert proxy.hash_file(file) == hashlib.sha1("grüße\n".encode()).hexdigest()
    assert proxy.run("cat", ["link"], cwd=directory, timeout=10) == ("grüße", "", 0)
    proxy.remove(link)
    assert not proxy.file_exists(link)


def variables(proxy: Proxy) -> dict[str, str]:
    """
    :return: The environment of what runs there.
    """
    stdout, _, _ = proxy.run("env")
    return dict(line.split("=", 1) for line in stdout.splitlines() if "=" in line)


def as_user(server: SshHost, user: support.User) -> Context:
    """
    :return: The context of a user who logs in with the server's key.
    """
    return server.serialized(name="login", username=user.name)


# Local


def test_local(reach: Reach) -> None:
    context = {**COMMON, "method_name": "local", "python_path": [sys.executable]}
    with reach(context) as proxy:
        use(proxy, getpass.getuser())


def logs_of(pid: int, kind: str) -> list[pathlib.Path]:
    """
    :return: What mitogen wrote about a process that it started.
    """
    return list(pathlib.Path("/tmp").glob(f"mitogen.{kind}{pid}.*.log"))


def test_local_with_debug_writes_mitogens_own_log(reach: Reach) -> None:
    context = {"method_name": "local", "python_path": [sys.executable], "debug": True}
    with reach(context) as proxy:
        [log] = logs_of(proxy.remote_call(os.getpid), "")
        assert "mitogen" in log.read_text()


def test_local_with_profiling_writes_a_profile(reach: Reach) -> None:
    # mitogen profiles two threads at once, which Python refuses since 3.12.
    older = [one for one in support.find_interpreters() if one.version < (3, 12)]
    if not older:
        pytest.skip("needs a Python older than 3.12")
    context = {"method_name": "local", "python_path": [older[-1].path], "profiling": True}
    with reach(context) as proxy:
        pid = proxy.remote_call(os.getpid)
    support.wait_until(lambda: support.is_gone(pid), "the interpreter ends")
    logs = logs_of(pid, "stats.")
    assert {log.name.split(".")[4] for log in logs} == {"child_main", "broker"}
    for log in logs:
        log.unlink()
        log.with_suffix(".pstats").unlink()


# Ssh


def test_ssh_with_a_key(reach: Reach, mitogen_ssh_host: SshHost) -> None:
    context = mitogen_ssh_host.serialized(
        **COMMON, ssh_path="ssh", compression=True, identities_only=True
    )
    with reach(context) as proxy:
        use(proxy, getpass.getuser())


def test_ssh_with_a_password(reach: Reach, server: SshHost, user: support.User) -> None:
    context = server.serialized(
        **COMMON,
        username=user.name,
        password=user.password,
        identity_file=None,
        compression=False,
        identities_only=True,
    )
    with reach(context) as proxy:
        use(proxy, user.name)
    assert f"Accepted password for {user.name} " in server.log()


def test_ssh_with_a_known_host_key(
    reach: Reach, mitogen_ssh_host: SshHost, tmp_path: pathlib.Path
) -> None:
    known_hosts = tmp_path / "known_hosts"
    known_hosts.write_text(mitogen_ssh_host.known_hosts_line)
    arguments = ["-F", "/dev/null", "-o", f"UserKnownHostsFile={known_hosts}"]
    context = mitogen_ssh_host.serialized(check_host_keys="enforce", ssh_args=arguments)
    with reach(context) as proxy:
        use(proxy, getpass.getuser())


def test_ssh_accepts_a_host_key_that_is_not_known_yet(
    reach: Reach, mitogen_ssh_host: SshHost, tmp_path: pathlib.Path
) -> None:
    known_hosts = tmp_path / "known_hosts"
    arguments = [
        *("-F", "/dev/null", "-o", f"UserKnownHostsFile={known_hosts}"),
        *("-o", "HashKnownHosts=no"),
    ]
    context = mitogen_ssh_host.serialized(check_host_keys="accept", ssh_args=arguments)
    with reach(context) as proxy:
        use(proxy, getpass.getuser())
    assert known_hosts.read_text() == mitogen_ssh_host.known_hosts_line


def test_ssh_with_a_banner_keepalive_and_a_verbose_client(
    reach: Reach, server: SshHost, python: str
) -> None:
    with SshHost(banner="Authorised personnel only, password: none\n") as host:
        context = host.serialized(
            ssh_debug_level=2, keepalive_enabled=True, keepalive_interval=5, keepalive_count=2
        )
        with reach(context) as proxy:
            use(proxy, getpass.getuser())


@pytest.mark.parametrize("shell", ["bash", "dash", "zsh"])
def test_ssh_to_a_noisy_login_shell(reach: Reach, server: SshHost, shell: str) -> None:
    support.need(shell)
    path = support.find_program(shell)
    assert path is not None
    with support.temporary_user(shell=path) as user:
        for file in (".bashrc", ".zshenv", ".profile"):
            user.write(file, "echo 'Welcome to this host'; echo 'Mind the gap' >&2\n")
        with reach(as_user(server, user)) as proxy:
            use(proxy, user.name)


@pytest.mark.parametrize("minor", range(6, 14), ids=lambda minor: f"3.{minor}")
def test_ssh_to_a_host_with_python(reach: Reach, mitogen_ssh_host: SshHost, minor: int) -> None:
    interpreter = support.find_interpreter(3, minor)
    if interpreter is None:
        pytest.skip(f"needs Python 3.{minor}, in pyenv or on the PATH")
    with reach(mitogen_ssh_host.serialized(python_path=[interpreter.path])) as proxy:
        version = f"import sys; sys.exit(sys.version_info[:2] != (3, {minor}))"
        assert proxy.run(interpreter.path, ["-c", version])[2] == 0
        use(proxy, getpass.getuser())


# Another user


def test_sudo(reach: Reach, server: SshHost, trusted: support.User, python: str) -> None:
    context = {
        **COMMON,
        "method_name": "sudo",
        "python_path": [python],
        "sudo_path": "/usr/bin/sudo",
        "set_home": True,
        "preserve_env": True,
        "via": as_user(server, trusted),
    }
    with reach(context) as proxy:
        use(proxy, "root")
        assert variables(proxy)["HOME"] == "/root"
        assert "SSH_CONNECTION" in variables(proxy)


def test_sudo_with_a_password(
    reach: Reach, server: SshHost, asked: support.User, user: support.User, python: str
) -> None:
    context = {
        "method_name": "sudo",
        "python_path": [python],
        "username": user.name,
        "password": asked.password,
        "preserve_env": False,
        "set_home": False,
        "via": as_user(server, asked),
    }
    with reach(context) as proxy:
        use(proxy, user.name)
        assert "SSH_CONNECTION" not in variables(proxy)


def test_sudo_with_a_login_shell(
    reach: Reach, server: SshHost, trusted: support.User, user: support.User, python: str
) -> None:
    user.write(".profile", "export FROM_PROFILE=yes\n")
    context = {
        "method_name": "sudo",
        "python_path": [python],
        "username": user.name,
        "login": True,
        "via": as_user(server, trusted),
    }
    with reach(context) as proxy:
        use(proxy, user.name)
        assert variables(proxy)["FROM_PROFILE"] == "yes"


def test_sudo_with_arguments_and_an_selinux_context(
    reach: Reach, server: SshHost, trusted: support.User, user: support.User, python: str
) -> None:
    context = {
        "method_name": "sudo",
        "python_path": [python],
        "sudo_args": ["-H", "-u", user.name],
        # Ignored by sudo on machines without SELinux.
        "selinux_role": "unconfined_r",
        "selinux_type": "unconfined_t",
        "via": as_user(server, trusted),
    }
    with reach(context) as proxy:
        use(proxy, user.name)


def test_su_with_a_password(
    reach: Reach, server: SshHost, asked: support.User, user: support.User, python: str
) -> None:
    context = {
        **COMMON,
        "method_name": "su",
        "python_path": [python],
        "su_path": "/bin/su",
        "username": asked.name,
        "password": asked.password,
        "password_prompt": "Password:",
        "incorrect_prompts": ["su: Authentication failure"],
        "via": as_user(server, user),
    }
    with reach(context) as proxy:
        use(proxy, asked.name)


def test_su_of_root_needs_no_password(
    reach: Reach, mitogen_local_context: Context, user: support.User, python: str
) -> None:
    context = {
        "method_name": "su",
        "python_path": [python],
        "username": user.name,
        "via": mitogen_local_context,
    }
    with reach(context) as proxy:
        use(proxy, user.name)


def test_doas(reach: Reach, server: SshHost, trusted: support.User, python: str) -> None:
    context = {
        **COMMON,
        "method_name": "doas",
        "python_path": [python],
        "doas_path": "/usr/bin/doas",
        "via": as_user(server, trusted),
    }
    with reach(context) as proxy:
        use(proxy, "root")


def test_doas_with_a_password(
    reach: Reach, server: SshHost, asked: support.User, python: str
) -> None:
    context = {
        "method_name": "doas",
        "python_path": [python],
        "username": "root",
        "password": asked.password,
        "password_prompt": "password:",
        "incorrect_prompts": ["doas: Authentication failed"],
        "via": as_user(server, asked),
    }
    with reach(context) as proxy:
        use(proxy, "root")


# Containers


def inside(proxy: Proxy, container: Container) -> bool:
    """
    :return: Whether it is the container's own file system that the calls see.
    """
    name = f"tmp/{uuid.uuid4()}"
    proxy.put(f"/{name}", b"here")
    path: pathlib.Path = container.root / name
    return path.read_bytes() == b"here"


def test_podman(reach: Reach, container: Container, python: str) -> None:
    context = {
        **COMMON,
        "method_name": "podman",
        "python_path": [python],
        "container": container.name,
        "podman_path": container.podman_path,
        "username": container.user,
    }
    with reach(context) as proxy:
        use(proxy, container.user)
        assert inside(proxy, container)


@pytest.mark.parametrize(
    ("kind", "option", "program"),
    [
        ("docker", "docker_path", "docker"),
        ("lxc", "lxc_info_path", "lxc-info"),
        ("lxd", "lxc_path", "lxc"),
        ("machinectl", "machinectl_path", "machinectl"),
    ],
)
def test_setns(
    reach: Reach,
    container: Container,
    leader_stand_ins: StandIns,
    python: str,
    kind: str,
    option: str,
    program: str,
) -> None:
    context = {
        **COMMON,
        "method_name": "setns",
        "python_path": [python],
        "kind": kind,
        "container": leader_stand_ins.container,
        "username": container.user,
        option: leader_stand_ins.path(program),
    }
    with reach(context) as proxy:
        use(proxy, container.user)
        assert inside(proxy, container)


def test_a_chain_of_ssh_sudo_podman_and_su(
    reach: Reach, server: SshHost, trusted: support.User, container: Container, python: str
) -> None:
    login = as_user(server, trusted)
    sudo = {"method_name": "sudo", "python_path": [python], "via": login}
    podman = {
        "method_name": "podman",
        "python_path": [python],
        "container": container.name,
        "podman_path": container.podman_path,
        "username": container.user,
        "via": sudo,
    }
    su = {
        "method_name": "su",
        "python_path": [python],
        "password": container.root_password,
        "via": podman,
    }
    with reach(su) as proxy:
        use(proxy, "root")
        assert inside(proxy, container)
    with reach(podman) as proxy:
        use(proxy, container.user)


# Programs that can't run here

STUBBED: dict[str, tuple[str, str, Context]] = {
    "docker": ("docker", "docker_path", {"container": "box", "username": "nobody"}),
    "docker image": ("docker", "docker_path", {"image": "debian", "username": "nobody"}),
    "buildah": ("buildah", "buildah_path", {"container": "box", "username": "nobody"}),
    "kubectl": (
        "kubectl",
        "kubectl_path",
        {"pod": "box", "kubectl_args": ["--namespace", "prod", "--context=test"]},
    ),
    "lxc": ("lxc-attach", "lxc_attach_path", {"container": "box"}),
    "lxd": ("lxc", "lxc_path", {"container": "box"}),
    "incus": ("incus", "incus_path", {"container": "box"}),
    "jail": ("jexec", "jexec_path", {"container": "box", "username": "nobody"}),
}


def stubbed_context(stand_ins: StandIns, case: str, **overrides: typing.Any) -> Context:
    """
    :return: The context of a case of `STUBBED`.
    """
    program, option, options = STUBBED[case]
    context = {
        **COMMON,
        "method_name": case.partition(" ")[0],
        "python_path": [support.interpreter_for_everyone() or sys.executable],
        option: stand_ins.path(program),
        **options,
        **overrides,
    }
    return {key: value for key, value in context.items() if value is not None}


@pytest.mark.parametrize("case", STUBBED)
def test_a_program_gets_arguments_that_it_takes(
    reach: Reach, stand_ins: StandIns, case: str
) -> None:
    context = stubbed_context(stand_ins, case)
    if context.get("username") and os.geteuid() != 0:
        pytest.skip("needs root, to run as another user like a container manager's daemon")
    with reach(context, kind="stub") as proxy:
        use(proxy, context.get("username", getpass.getuser()))
        assert stand_ins.last_call()[0] == STUBBED[case][0]


def test_lxc_gives_the_container_nothing_of_the_callers_environment(
    reach: Reach, stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_THE_CALLER", "yes")
    with reach(stubbed_context(stand_ins, "lxc"), kind="stub") as proxy:
        assert "OF_THE_CALLER" not in variables(proxy)
