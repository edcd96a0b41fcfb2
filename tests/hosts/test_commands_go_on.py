"""
A command goes on when its connection, its interpreter or the agent is gone, by any method.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping

import psutil
import pytest
from hosts.container import Container
from reach import Context

import support
from pytest_inmanta_mitogen import SshHost

pytestmark = [pytest.mark.timeout(90), support.requires("sshd", "ssh", "ssh-keygen")]

#: Prints more than a pipe holds, for longer than sudo waits before it kills what hung up.
COMMAND = """
    umask 0
    echo >$DIR/started
    n=0
    while [ $n -lt 35 ]; do head -c 10000 /dev/zero || exit; n=$((n + 1)); sleep 0.1; done
    echo >$DIR/done
"""

#: Connects, and runs the command until it is told to disconnect.
AGENT = """
import json, sys, threading
from inmanta_plugins.mitogen import Proxy
proxy = Proxy(json.loads(sys.argv[1]))
proxy.connect()
arguments = ("sh", ["-c", sys.argv[2]])
threading.Thread(target=proxy.run, args=arguments, daemon=True).start()
sys.stdin.readline()
proxy.disconnect()
"""


Agents = Mapping[str, "subprocess.Popen[str]"]
End = Callable[[Agents, SshHost], None]


@pytest.fixture
def with_pty(asked: support.User) -> Iterator[support.User]:
    """A user whose sudo runs commands on a terminal of their own."""
    path = pathlib.Path("/etc/sudoers.d", f"{asked.name}-pty")
    path.write_text(f"Defaults:{asked.name} use_pty\n")
    path.chmod(0o440)
    try:
        yield asked
    finally:
        path.unlink()


@pytest.fixture
def contexts(
    server: SshHost,
    trusted: support.User,
    with_pty: support.User,
    container: Container,
    python: str,
) -> dict[str, Context]:
    login = server.serialized(username=trusted.name)

    def as_root(method: str, via: Context, **options: object) -> Context:
        return {"method_name": method, "name": "", "python_path": [python], "via": via, **options}

    return {
        "local": {"method_name": "local", "name": ""},
        "ssh": login,
        "sudo": as_root("sudo", login),
        "sudo with use_pty": as_root(
            "sudo", server.serialized(username=with_pty.name), password=with_pty.password
        ),
        "doas": as_root("doas", login),
        "su": as_root("su", login, username=with_pty.name, password=with_pty.password),
        "podman": {
            "method_name": "podman",
            "name": "",
            "python_path": [python],
            "container": container.name,
            "podman_path": container.podman_path,
            "username": container.user,
        },
    }


@contextlib.contextmanager
def running_by(
    contexts: Mapping[str, Context], container: Container
) -> Iterator[tuple[dict[str, "subprocess.Popen[str]"], dict[str, pathlib.Path]]]:
    """
    Run the command on each host, each by an agent that is a process of its own.

    :return: The agents, and where the commands leave their traces.
    """
    agents: dict[str, subprocess.Popen[str]] = {}
    traces: dict[str, pathlib.Path] = {}
    try:
        for name, context in contexts.items():
            directory = pathlib.Path("tmp", f"goes-on-{uuid.uuid4()}")
            traces[name] = (container.root if name == "podman" else pathlib.Path("/")) / directory
            traces[name].mkdir()
            traces[name].chmod(0o777)
            command = COMMAND.replace("$DIR", f"/{directory}")
            agents[name] = subprocess.Popen(
                [sys.executable, "-c", AGENT, json.dumps(context), command],
                stdin=subprocess.PIPE,
                text=True,
            )
        for name, trace in traces.items():
            support.wait_until((trace / "started").exists, f"{name} runs it")
        yield agents, traces
    finally:
        for agent in agents.values():
            agent.kill()
            agent.communicate()


def kill(pids: list[int]) -> None:
    assert pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def disconnect(agents: Agents, server: SshHost) -> None:
    for agent in agents.values():
        assert agent.stdin is not None
        agent.stdin.write("\n")
        agent.stdin.flush()
    assert [agent.wait(30) for agent in agents.values()] == [0] * len(agents)


def kill_agent(agents: Agents, server: SshHost) -> None:
    kill([agent.pid for agent in agents.values()])


def kill_client(agents: Agents, server: SshHost) -> None:
    """Kill what the agents themselves started: ssh and podman."""
    kill(
        [
            child.pid
            for agent in agents.values()
            for child in psutil.Process(agent.pid).children(recursive=True)
            if child.name() in ("ssh", "podman")
        ]
    )


def kill_sshd(agents: Agents, server: SshHost) -> None:
    kill_sessions_programs(server, "sshd", "sshd:", "sshd-session:")


def kill_sudo(agents: Agents, server: SshHost) -> None:
    kill_sessions_programs(server, "sudo", "doas", "su")


def kill_sessions_programs(server: SshHost, *names: str) -> None:
    lines = {pid: support.command_line(pid).split() for pid in server.session_pids()}
    kill([pid for pid, line in lines.items() if line and os.path.basename(line[0]) in names])


@pytest.mark.parametrize("end", [disconnect, kill_agent, kill_client, kill_sshd, kill_sudo])
def test_a_command_goes_on_to_its_end(
    contexts: dict[str, Context], server: SshHost, container: Container, end: End
) -> None:
    with running_by(contexts, container) as (agents, traces):
        end(agents, server)
        for name, trace in traces.items():
            support.wait_until((trace / "done").exists, f"the command by {name} ended by itself")
    support.wait_until(lambda: not server.session_pids(), "nothing runs on the host")
