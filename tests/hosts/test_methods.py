"""
Every way to reach a host reaches it, with every option it has.
"""

import getpass
import hashlib
import os
import pathlib
import sys
import uuid

import pytest
from hosts.container import Container, in_podman
from hosts.stand_ins import StandIns

import support
from inmanta_plugins.mitogen import Proxy
from pytest_inmanta_mitogen import SshHost
from support import LOCAL, Context

pytestmark = pytest.mark.timeout(60)

COMMON: Context = {
    "name": "somewhere",
    "remote_name": "agent",
    "connect_timeout": 20.0,
    "unidirectional": True,
}
"""What every method can be told, apart from its interpreter, profiling and debugging."""


def use(proxy: Proxy, user: str) -> None:
    """
    Do a little of everything there.

    :param user: Whom the calls have to run as.
    """
    assert proxy.run("id", ["-un"]) == (user, "", 0)
    moin = proxy.run("sh", ["-c", "echo $GREETING; exit 3"], env={"GREETING": "moin"})
    assert moin == ("moin", "", 3)
    directory = f"/tmp/{uuid.uuid4()}"
    proxy.mkdir(directory)
    try:
        use_files(proxy, user, directory)
    finally:
        proxy.rmdir(directory)
    assert not proxy.file_exists(directory)


def use_files(proxy: Proxy, user: str, directory: str) -> None:
    """Do everything that can be done with files, in an empty directory there."""
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


# Local


def logs_of(pid: int, kind: str) -> list[pathlib.Path]:
    """Return what mitogen wrote about a process that it started."""
    return list(pathlib.Path("/tmp").glob(f"mitogen.{kind}{pid}.*.log"))


def test_local_with_debug_writes_mitogens_own_log() -> None:
    with Proxy({**LOCAL, **COMMON, "debug": True}) as proxy:
        use(proxy, getpass.getuser())
        [log] = logs_of(proxy.remote_call(os.getpid), "")
        assert "mitogen" in log.read_text()
    log.unlink()


def test_local_with_profiling_writes_a_profile() -> None:
    # mitogen profiles two threads at once, which Python refuses since 3.12.
    older = [one for one in support.find_interpreters() if one.version < (3, 12)]
    if not older:
        pytest.skip("needs a Python older than 3.12")
    with Proxy({**LOCAL, "python_path": [older[-1].path], "profiling": True}) as proxy:
        pid = proxy.remote_call(os.getpid)
    support.wait_until(lambda: support.is_gone(pid), "the interpreter ends")
    logs = logs_of(pid, "stats.")
    assert {log.name.split(".")[4] for log in logs} == {"child_main", "broker"}
    for log in logs:
        log.unlink()
        log.with_suffix(".pstats").unlink()


# Ssh


def test_ssh_with_a_key(mitogen_ssh_host: SshHost) -> None:
    more = {**COMMON, "ssh_path": "ssh", "compression": True, "identities_only": True}
    with Proxy(mitogen_ssh_host.serialized(**more)) as proxy:
        use(proxy, getpass.getuser())


def test_ssh_with_a_password(server: SshHost, user: support.User) -> None:
    more = {"identity_file": None, "compression": False, "identities_only": True}
    context = server.serialized(**COMMON, **more, username=user.name, password=user.password)
    with Proxy(context) as proxy:
        use(proxy, user.name)
    assert f"Accepted password for {user.name} " in server.log()


def test_ssh_learns_a_host_key_and_then_knows_it(
    mitogen_ssh_host: SshHost, tmp_path: pathlib.Path
) -> None:
    known_hosts = tmp_path / "known_hosts"
    arguments = ["-F", "/dev/null", "-o", f"UserKnownHostsFile={known_hosts}"]
    arguments += ["-o", "HashKnownHosts=no"]
    for policy in ("accept", "enforce"):
        more = {"check_host_keys": policy, "ssh_args": arguments}
        with Proxy(mitogen_ssh_host.serialized(**more)) as proxy:
            use(proxy, getpass.getuser())
        assert known_hosts.read_text() == mitogen_ssh_host.known_hosts_line


def test_ssh_with_a_banner_keepalive_and_a_verbose_client() -> None:
    keepalive = {"keepalive_enabled": True, "keepalive_interval": 5, "keepalive_count": 2}
    with (
        SshHost(banner="Authorised personnel only, password: none\n") as host,
        Proxy(host.serialized(**keepalive, ssh_debug_level=2)) as proxy,
    ):
        use(proxy, getpass.getuser())


def test_ssh_to_a_noisy_login_shell(server: SshHost, noisy_user: support.User) -> None:
    with Proxy(server.serialized(username=noisy_user.name)) as proxy:
        use(proxy, noisy_user.name)


@pytest.mark.parametrize("minor", range(6, 14), ids=lambda minor: f"3.{minor}")
def test_ssh_to_a_host_with_python(mitogen_ssh_host: SshHost, minor: int) -> None:
    interpreter = support.find_interpreter(3, minor)
    if interpreter is None:
        pytest.skip(f"needs Python 3.{minor}, in pyenv or on the PATH")
    with Proxy(mitogen_ssh_host.serialized(python_path=[interpreter.path])) as proxy:
        assert proxy.remote_call(eval, "__import__('sys').version_info[1]") == minor
        use(proxy, getpass.getuser())


# Another user


Way = tuple[support.User | None, str, Context, dict[str, bool]]
"""The login by ssh before, none for the user who runs the tests, and whom the calls run as; the
options; and what the environment there has, or has not."""


def ways(trusted: support.User, asked: support.User, user: support.User) -> dict[str, Way]:
    """Return ways to become another user."""
    sudo: Context = {"sudo_path": "/usr/bin/sudo", "set_home": True, "preserve_env": True}
    asking: Context = {"username": user.name, "preserve_env": False, "set_home": False}
    # sudo ignores the role and the type on machines without SELinux.
    selinux = {"selinux_role": "unconfined_r", "selinux_type": "unconfined_t"}
    su: Context = {"su_path": "/bin/su", "username": asked.name, "password_prompt": "Password:"}
    su["incorrect_prompts"] = ["su: Authentication failure"]
    doas: Context = {"username": "root", "password_prompt": "password:"}
    doas["incorrect_prompts"] = ["doas: Authentication failed"]
    password = {"password": asked.password}
    in_sudo = {"HOME=/root\n": True, "SSH_CONNECTION=": True}
    login = {"username": user.name, "login": True}
    arguments = {"sudo_args": ["-H", "-u", user.name], **selinux}
    return {
        "sudo": (trusted, "root", {**COMMON, **sudo}, in_sudo),
        "sudo with a password": (asked, user.name, asking | password, {"SSH_CONNECTION=": False}),
        "sudo with a login shell": (trusted, user.name, login, {"FROM_PROFILE=yes\n": True}),
        "sudo with arguments and SELinux": (trusted, user.name, arguments, {}),
        "su with a password": (user, asked.name, {**COMMON, **su, **password}, {}),
        "su of root": (None, user.name, {"username": user.name}, {}),
        "doas": (trusted, "root", {**COMMON, "doas_path": "/usr/bin/doas"}, {}),
        "doas with a password": (asked, "root", doas | password, {}),
    }


BECOMING = (
    *("sudo", "sudo with a password", "sudo with a login shell", "sudo with arguments and SELinux"),
    *("su with a password", "su of root", "doas", "doas with a password"),
)


@pytest.mark.parametrize("way", BECOMING)
def test_becoming_another_user(
    server: SshHost,
    trusted: support.User,
    asked: support.User,
    user: support.User,
    python: str,
    way: str,
) -> None:
    user.write(".profile", "export FROM_PROFILE=yes\n")
    login, becomes, options, wanted = ways(trusted, asked, user)[way]
    via = server.serialized(username=login.name) if login else LOCAL
    context = {"method_name": way.split()[0], "python_path": [python], "via": via, **options}
    with Proxy(context) as proxy:
        use(proxy, becomes)
        environment, _, _ = proxy.run("env")
    assert {text: text in environment for text in wanted} == wanted


# Containers


def inside(proxy: Proxy, container: Container) -> bool:
    """Return whether it is the container's own file system that the calls see."""
    name = f"tmp/{uuid.uuid4()}"
    proxy.put(f"/{name}", b"here")
    path: pathlib.Path = container.root / name
    return path.read_bytes() == b"here"


def test_podman(container: Container, python: str) -> None:
    with Proxy({**in_podman(container, [python], container.user), **COMMON}) as proxy:
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
        "container": "box",
        "username": container.user,
        option: leader_stand_ins.path(program),
    }
    with Proxy(context) as proxy:
        use(proxy, container.user)
        assert inside(proxy, container)


def test_a_chain_of_ssh_sudo_podman_and_su(
    server: SshHost, trusted: support.User, container: Container, python: str
) -> None:
    login = server.serialized(username=trusted.name)
    sudo = {"method_name": "sudo", "python_path": [python], "via": login}
    podman = {**in_podman(container, [python], container.user), "via": sudo}
    su = {"method_name": "su", "python_path": [python], "password": container.root_password}
    with Proxy({**su, "via": podman}) as proxy:
        use(proxy, "root")
        assert inside(proxy, container)


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


@pytest.mark.parametrize("case", STUBBED)
def test_a_program_gets_arguments_that_it_takes(
    stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    program, option, options = STUBBED[case]
    context = {
        **COMMON,
        "method_name": case.partition(" ")[0],
        "python_path": [support.interpreter_for_everyone() or sys.executable],
        option: stand_ins.path(program),
        **options,
    }
    if "username" in context and os.geteuid() != 0:
        pytest.skip("needs root, to run as another user like a container manager's daemon")
    monkeypatch.setenv("OF_THE_CALLER", "yes")
    with Proxy(context) as proxy:
        use(proxy, context.get("username", getpass.getuser()))
        # Of these, lxc alone can be told to give the container nothing of the caller's environment.
        assert ("OF_THE_CALLER=yes" in proxy.run("env")[0]) == (case != "lxc")
