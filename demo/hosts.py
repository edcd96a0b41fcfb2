"""
The throwaway host that the demo logs in to over ssh.
"""

import collections.abc
import contextlib
import os
import pathlib
import shutil
import subprocess

from pytest_inmanta_mitogen.sshd import SshHost
from testbed.servers import SshAgent

# On the throwaway host of a user who may not use sudo without a password: the command is run,
# but by that same user.
_SUDO_STAND_IN = """#!/bin/sh
while [ $# -gt 0 ] && [ "$1" != -- ]; do shift; done
shift
exec "$@"
"""


@contextlib.contextmanager
def login_host(
    directory: pathlib.Path,
) -> collections.abc.Iterator[tuple[SshHost, dict[str, str]]]:
    """
    A host to log in to as the current user.

    :param directory: An empty directory for its files.
    :return: The host, and the environment variables with which ssh gets there with no key named.
    :raises SshdNotFoundError: OpenSSH is not installed.
    """
    with (
        SshHost(environment={"PATH": _host_path(directory)}) as host,
        SshAgent(directory, host.identity_file) as agent,
    ):
        yield host, agent.variables


def sudo_description() -> str:
    """
    How the host's users become root.
    """
    if os.geteuid() == 0:
        return "no sudo: root logs in"
    if _sudo_works():
        return "sudo"
    return "a stand-in for sudo that runs commands as you: sudo would ask for your password"


def _host_path(directory: pathlib.Path) -> str:
    path = os.environ.get("PATH", os.defpath)
    if os.geteuid() == 0 or _sudo_works():
        return path
    program = directory / "host-bin" / "sudo"
    program.parent.mkdir()
    program.write_text(_SUDO_STAND_IN)
    program.chmod(0o755)
    return f"{program.parent}{os.pathsep}{path}"


def _sudo_works() -> bool:
    if shutil.which("sudo") is None:
        return False
    answer = subprocess.run(["sudo", "-n", "true"], stdin=subprocess.DEVNULL, capture_output=True)
    return answer.returncode == 0
