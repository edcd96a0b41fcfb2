"""
A command goes on when its connection, its interpreter or the agent is gone, by any method.
"""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator

import psutil
import pytest
from hosts.container import Container, in_podman

import support
from pytest_inmanta_mitogen import SshHost
from support import LOCAL, Context, kill

pytestmark = [pytest.mark.timeout(90), support.requires("sshd", "ssh", "ssh-keygen")]

COMMAND = """
    umask 0
    echo >$DIR/started
    until [ -e $DIR/go ]; do sleep 0.05; done
    n=0
    while [ $n -lt 25 ]; do head -c 10000 /dev/zero || exit; n=$((n + 1)); sleep 0.1; done
    echo >$DIR/done
"""
"""Prints more than a pipe holds, for longer than sudo waits before it kills what hung up."""

AGENT = """
import json, sys, threading
from inmanta_plugins.mitogen import Proxy
def run(proxy, command):
    proxy.connect()
    proxy.run("sh", ["-c", command])
jobs = [(Proxy(context), command) for context, command in json.loads(sys.argv[1])]
for job in jobs:
    threading.Thread(target=run, args=job, daemon=True).start()
sys.stdin.readline()
for proxy, _ in jobs:
    proxy.disconnect()
"""
"""Connects to hosts, and runs a command on each until it is told to disconnect."""

Agent = subprocess.Popen[str]
End = Callable[[Agent, SshHost], None]


@pytest.fixture(scope="module")
def contexts(
    server: SshHost,
    trusted: support.User,
    asked: support.User,
    container: Container,
    python: str,
) -> Iterator[dict[str, Context]]:
    login = server.serialized(username=trusted.name)
    other_login = server.serialized(username=asked.name)

    def becoming(method: str, via: Context, **options: object) -> Context:
        return {"method_name": method, "name": "", "python_path": [python], "via": via, **options}

    with support.sudo_setting(trusted, "!use_pty"), support.sudo_setting(asked, "use_pty"):
        yield {
            "local": LOCAL,
            "ssh": login,
            "sudo": becoming("sudo", login),
            "sudo with use_pty": becoming("sudo", other_login, password=asked.password),
            "doas": becoming("doas", login),
            "su": becoming("su", login, username=asked.name, password=asked.password),
            "podman": in_podman(container, [python], container.user),
        }


@contextlib.contextmanager
def running_by(
    contexts: dict[str, Context], container: Container
) -> Iterator[tuple[Agent, dict[str, pathlib.Path]]]:
    """
    Run the command on each host, by an agent that is a process of its own.

    :return: The agent, and where the commands leave their traces.
    """
    traces, jobs = {}, []
    for name, context in contexts.items():
        directory = pathlib.Path("tmp", f"goes-on-{uuid.uuid4()}")
        traces[name] = (container.root if name == "podman" else pathlib.Path("/")) / directory
        traces[name].mkdir()
        traces[name].chmod(0o777)
        jobs.append((context, COMMAND.replace("$DIR", f"/{directory}")))
    command = [sys.executable, "-c", AGENT, json.dumps(jobs)]
    agent = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
    try:
        for name, trace in traces.items():
            support.wait_until((trace / "started").exists, f"{name} runs it")
        yield agent, traces
    finally:
        agent.kill()
        agent.communicate()
        for trace in traces.values():
            shutil.rmtree(trace)


def disconnect(agent: Agent, server: SshHost) -> None:
    assert agent.stdin is not None
    agent.stdin.write("\n")
    agent.stdin.flush()
    assert agent.wait(30) == 0


def kill_agent(agent: Agent, server: SshHost) -> None:
    kill([agent.pid])


def kill_client(agent: Agent, server: SshHost) -> None:
    """Kill what the agent itself started: ssh and podman."""
    started = psutil.Process(agent.pid).children(recursive=True)
    kill([child.pid for child in started if child.name() in ("ssh", "podman")])


def kill_sshd(agent: Agent, server: SshHost) -> None:
    kill_sessions_programs(server, "sshd", "sshd:", "sshd-session:")


def kill_sudo(agent: Agent, server: SshHost) -> None:
    kill_sessions_programs(server, "sudo", "doas", "su")


def kill_sessions_programs(server: SshHost, *names: str) -> None:
    lines = {pid: support.command_line(pid).split() for pid in server.session_pids()}
    kill([pid for pid, line in lines.items() if line and os.path.basename(line[0]) in names])


BECOMING = ("sudo", "sudo with use_pty", "doas", "su")


@pytest.mark.parametrize(
    ("end", "methods"),
    [
        (disconnect, ("local", "ssh", *BECOMING, "podman")),
        (kill_agent, ("local", "ssh", *BECOMING, "podman")),
        (kill_client, ("ssh", "podman")),
        (kill_sshd, ("ssh", *BECOMING)),
        # With use_pty, what is left of a killed sudo kills the interpreter before it can react.
        (kill_sudo, ("sudo", "doas", "su")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_command_goes_on_to_its_end(
    contexts: dict[str, Context],
    server: SshHost,
    container: Container,
    end: End,
    methods: tuple[str, ...],
) -> None:
    chosen = {method: contexts[method] for method in methods}
    with running_by(chosen, container) as (agent, traces):
        end(agent, server)
        for trace in traces.values():
            (trace / "go").touch()
        for method, trace in traces.items():
            support.wait_until((trace / "done").exists, f"the command by {method} ended by itself")
    support.wait_until(lambda: not server.session_pids(), "nothing runs on the host")
