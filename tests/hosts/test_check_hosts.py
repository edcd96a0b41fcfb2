"""The operator's command ``check`` on real hosts: what it says of those that cannot be reached."""

import json
import socket
import sys
from typing import Any

import pytest

import support
from inmanta_plugins.mitogen import Cause
from pytest_inmanta_mitogen import SshHost

pytestmark = pytest.mark.timeout(120)


def check(
    host: SshHost, user: str, *arguments: str, port: int | None = None
) -> tuple[int, dict[str, Any]]:
    """
    Run the command as an operator does, who names the host; its exit status, and what it found out
    about the last hop that it tried.
    """
    done = support.execute(
        *(sys.executable, "-m", "inmanta_plugins.mitogen", "check"),
        f"ssh://{user}@{host.hostname}:{port or host.port}",
        *("--check-host-keys", "ignore", "--json", *arguments),
        timeout=60,
    )
    assert done.stderr == ""
    last: dict[str, Any] = json.loads(done.stdout)["hops"][-1]
    return done.returncode, last


def test_a_good_chain_and_that_its_commands_run_by_hand(
    server: SshHost, trusted: support.User, python: str
) -> None:
    arguments = ["--identity", server.identity_file, "--python", python, "--sudo", "--speed"]
    logins = server.logins()
    status, hop = check(server, trusted.name, *arguments)

    assert status == 0, hop
    assert server.logins() == logins + 2  # the hops, and a proxy that measures
    assert hop["hop"] == "sudo root"
    assert hop["user"] == "root (0)"
    assert min(hop["round_trip_ms"], hop["put_mb_s"], hop["read_mb_s"]) > 0
    by_hand = support.execute("sh", "-c", hop["command"])
    assert by_hand.stdout == f"Python {hop['version']}\n", by_hand.stderr


def test_a_key_that_a_server_with_passwords_does_not_accept(server: SshHost) -> None:
    other_key = f"{server.directory}/host_key"
    status, hop = check(server, server.username, "--identity", other_key)

    assert (status, hop["cause"]) == (1, "AUTHENTICATION")
    assert "a key of the agent's user" in hop["advice"]


def test_sudo_that_asks_for_a_password(server: SshHost, asked: support.User, python: str) -> None:
    arguments = ["--identity", server.identity_file, "--python", python, "--sudo"]
    status, hop = check(server, asked.name, *arguments)

    assert (status, hop["cause"]) == (1, "PASSWORD_REQUIRED")
    assert hop["hop"] == "sudo root"
    assert hop["advice"] == Cause.PASSWORD_REQUIRED.value


def test_a_host_that_hangs(server: SshHost) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        status, hop = check(server, "root", "--timeout", "1", port=silent.getsockname()[1])

    assert (status, hop["cause"]) == (1, "TIMEOUT")
    assert hop["seconds"] < 30
