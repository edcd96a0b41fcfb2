"""
The throwaway host that the demo logs in to over ssh, whatever this machine has of OpenSSH.
"""

import collections.abc
import contextlib
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from pytest_inmanta_mitogen.sshd import SshdNotFoundError, SshHost, find_sshd
from testbed.processes import PATIENCE, ProcessFailedError, end, start, tail
from testbed.servers import SshAgent

# On the throwaway host of a user who may not use sudo without a password: the command is run,
# but by that same user.
_SUDO_STAND_IN = """#!/bin/sh
while [ $# -gt 0 ] && [ "$1" != -- ]; do shift; done
shift
exec "$@"
"""

# For a machine without OpenSSH's client.
_SSH_STAND_IN = """#!/bin/sh
DEMO_SSH_KEY={key} PYTHONPATH={checkout} exec {python} -m demo.ssh_client "$@"
"""


@dataclasses.dataclass(frozen=True)
class LoginHost:
    """
    A host to log in to as the current user.
    """

    #: What it is, for people.
    description: str
    hostname: str
    port: int
    username: str
    #: The path of the private key that it accepts.
    key: str
    #: The line of a known_hosts file that makes it a known one.
    known_hosts_line: str
    #: The environment variables with which ``ssh`` gets there with no key named.
    variables: dict[str, str]


@contextlib.contextmanager
def login_host(
    directory: pathlib.Path, *, openssh: bool = True
) -> collections.abc.Iterator[LoginHost]:
    """
    A host that is there inside only. It is one of OpenSSH where that is installed and lets the
    current user in, else one of asyncssh.

    :param directory: An empty directory for its files.
    :param openssh: False leaves OpenSSH alone, its client too.
    """
    with contextlib.ExitStack() as stack:
        host = None
        if openssh:
            with contextlib.suppress(SshdNotFoundError):
                host = _openssh_host(stack, directory)
        yield host or _asyncssh_host(stack, directory, openssh=openssh)


def sudo_description() -> str:
    """
    How the host's users become root.
    """
    if os.geteuid() == 0:
        return "no sudo, it is root that logs in"
    if _sudo_works():
        return "sudo"
    return "a stand-in for sudo that runs commands as you: sudo would ask for your password"


def _openssh_host(stack: contextlib.ExitStack, directory: pathlib.Path) -> LoginHost | None:
    find_sshd()
    host = SshHost(environment={"PATH": _host_path(directory)})
    with contextlib.ExitStack() as attempt:
        attempt.enter_context(host)
        agent = attempt.enter_context(SshAgent(directory, host.identity_file))
        # An account without a password counts as locked for some servers.
        if not _lets_in(host):
            return None
        stack.push(attempt.pop_all())
        return LoginHost(
            description="OpenSSH",
            hostname=host.hostname,
            port=host.port,
            username=host.username,
            key=host.identity_file,
            known_hosts_line=host.known_hosts_line,
            variables=agent.variables,
        )


def _asyncssh_host(
    stack: contextlib.ExitStack, directory: pathlib.Path, *, openssh: bool
) -> LoginHost:
    import asyncssh

    files = pathlib.Path(tempfile.mkdtemp(dir=directory, prefix="asyncssh-"))
    for name in ("host_key", "identity"):
        key = asyncssh.generate_private_key("ssh-ed25519")
        key.write_private_key(str(files / name))
        (files / name).chmod(0o600)
        key.write_public_key(str(files / f"{name}.pub"))
    server = start(
        [sys.executable, "-m", "demo.ssh_server", str(files)],
        log=files / "log",
        cwd=pathlib.Path(__file__).resolve().parent.parent,
        env={**os.environ, "PATH": _host_path(directory)},
    )
    stack.callback(end, [server])
    deadline = time.monotonic() + PATIENCE * 6
    while not (files / "address").exists():
        if server.poll() is not None or time.monotonic() > deadline:
            raise ProcessFailedError("starting the ssh host", server.poll(), tail(files / "log"))
        time.sleep(0.02)
    hostname, port, username = (files / "address").read_text().split()
    algorithm, text = (files / "host_key.pub").read_text().split()[:2]

    key_path = str(files / "identity")
    if openssh and all(map(shutil.which, ("ssh", "ssh-agent", "ssh-add"))):
        client, variables = "", stack.enter_context(SshAgent(directory, key_path)).variables
    else:
        client, variables = ", its client too", _ssh_stand_in(files, key_path)
    return LoginHost(
        description="asyncssh" + client,
        hostname=hostname,
        port=int(port),
        username=username,
        key=key_path,
        known_hosts_line=f"[{hostname}]:{port} {algorithm} {text}\n",
        variables=variables,
    )


def _lets_in(host: SshHost) -> bool:
    options = ["BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null"]
    answer = subprocess.run(
        ["ssh", "-F", "/dev/null", "-i", host.identity_file, "-p", str(host.port)]
        + [f"-o{option}" for option in options]
        + [f"{host.username}@{host.hostname}", "true"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE * 6,
    )
    return answer.returncode == 0


def _host_path(directory: pathlib.Path) -> str:
    path = os.environ.get("PATH", os.defpath)
    if os.geteuid() == 0 or _sudo_works():
        return path
    programs = directory / "host-bin"
    _write_program(programs / "sudo", _SUDO_STAND_IN)
    return f"{programs}{os.pathsep}{path}"


def _ssh_stand_in(directory: pathlib.Path, key: str) -> dict[str, str]:
    text = _SSH_STAND_IN.format(
        key=key, python=sys.executable, checkout=pathlib.Path(__file__).resolve().parent.parent
    )
    _write_program(directory / "bin" / "ssh", text)
    return {"PATH": f"{directory / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}


def _write_program(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def _sudo_works() -> bool:
    if shutil.which("sudo") is None:
        return False
    answer = subprocess.run(["sudo", "-n", "true"], stdin=subprocess.DEVNULL, capture_output=True)
    return answer.returncode == 0
