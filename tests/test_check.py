"""The operator's command ``check``: what it takes, what it prints, and how it ends."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import support
from inmanta_plugins.mitogen.__main__ import main
from inmanta_plugins.mitogen.check import check_hops
from inmanta_plugins.mitogen.connections.programs import shown_command
from testbed.servers import free_port

SECRET = "canary-7f3a"
URL = {"method_name": "ssh", "hostname": f"deploy:{SECRET}@10.0.0.5"}
ENVIRONMENT = "8f7e5f0e-5b0a-4f7e-9b0a-8f7e5f0e5b0a"


COMMAND = [sys.executable, "-m", "inmanta_plugins.mitogen", "check"]


def check(*arguments: str, stdin: object = None) -> subprocess.CompletedProcess[str]:
    """Run the command as an operator does; a context for standard input is given as JSON."""
    command = (sys.executable, "-m", "inmanta_plugins.mitogen", "check", *arguments)
    return support.execute(*command, input=json.dumps(stdin) if stdin else None, timeout=60)


def test_each_hop_is_shown_and_the_status_is_0() -> None:
    done = check("--context", "-", stdin={**support.LOCAL, "name": "inner", "via": support.LOCAL})

    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.split("\n1 of 2: ")[1].split("\n2 of 2: ")
    for shown, name in ((first, "here (local)"), (second, "inner (local)")):
        assert shown.startswith(name)
        for row in ("command", "connected", "user", "Python", "round trip", "temporary"):
            assert f"\n  {row:<12}" in shown
    assert ".".join(map(str, sys.version_info[:3])) in first


def test_json_holds_what_was_found_about_each_hop_and_its_throughput(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    file = tmp_path / "context.json"
    file.write_text(json.dumps(support.LOCAL))

    done = check("--context", str(file), "--json", "--speed")

    document = json.loads(done.stdout)
    (hop,) = document.pop("hops")
    assert document == {"context": "here (local)", "works": True}
    assert hop["works"] is True
    assert hop["hop"] == "here (local)"
    assert hop["python"] == sys.executable
    assert hop["tmp"] == str(temporary)
    assert hop["tmp_free"] > 0
    assert min(hop[name] for name in ("seconds", "round_trip_ms", "put_mb_s", "read_mb_s")) > 0
    assert list(temporary.iterdir()) == []


def test_the_first_hop_that_fails_ends_the_check_with_status_1() -> None:
    missing = {"method_name": "local", "name": "gone", "python_path": ["/nonexistent/python"]}

    done = check("--context", "-", "--json", stdin={**support.LOCAL, "via": missing})

    document = json.loads(done.stdout)
    assert (done.returncode, document["works"]) == (1, False)
    (hop,) = document["hops"]
    assert hop["cause"] == "PYTHON_NOT_FOUND"
    assert "found on that host" in hop["detail"]
    assert "python_path" in hop["advice"]
    assert hop["command"] == "/nonexistent/python -V"


def test_a_hop_that_does_not_answer_once_it_is_connected_has_failed() -> None:
    *_, connected, failed, came_back, _ = check_hops(support.LOCAL, 1e-6, False)

    assert (connected[0], failed[0]) == ("connected", "failed")
    assert came_back[2]["cause"] == "TIMEOUT"
    assert "did not answer" in came_back[1]


WRONG = {
    "nothing to check": [],
    "two things to check": ["host", "--context", "file"],
    "no host and no resource": ["--environment", ENVIRONMENT],
    "a host and a resource": ["--environment", ENVIRONMENT, "--host", "a", "--resource", "b"],
    "an option of ssh for a file": ["--context", "/dev/null", "--sudo"],
    "an option of the orchestrator for a host": ["host", "--resource", "a"],
    "a password in the host": [f"deploy:{SECRET}@host"],
    "a password as an option": ["host", f"--password={SECRET}"],
    "a password as a word": ["host", SECRET],
    "a password as a value": ["host", "--check-host-keys", SECRET],
    "a password as a number": ["host", "--timeout", SECRET],
    "another scheme": [f"ftp://{SECRET}@host"],
    "a port that cannot be": ["host:70000"],
    "a host that is an option of ssh": ["--", "-oProxyCommand=true"],
    "no time at all": ["host", "--timeout", "0"],
    "a lost file": ["--context", "/nonexistent/file"],
}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG.keys())
def test_wrong_usage_ends_with_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", *arguments])

    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: " in err
    assert SECRET not in err


def test_a_password_in_the_place_of_the_command_is_not_repeated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([f"ssh://deploy:{SECRET}@host"])

    assert ended.value.code == 2
    assert SECRET not in capsys.readouterr().err


@pytest.mark.parametrize(
    "context",
    [[1], "text", {}, {"method_name": "ssh"}, {"method_name": "local", "passwort": SECRET}, URL],
)
def test_a_wrong_context_ends_with_status_2(
    context: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "context.json"
    file.write_text(json.dumps(context))

    with pytest.raises(SystemExit) as ended:
        main(["check", "--context", str(file)])

    assert ended.value.code == 2
    assert SECRET not in "".join(capsys.readouterr())


def test_text_that_the_terminal_cannot_show_is_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    context = {"method_name": "local", "name": "Gerät →", "python_path": ["/nonexistent/python"]}
    (tmp_path / "context.json").write_text(json.dumps(context, ensure_ascii=False), "utf-8")

    done = check("--context", str(tmp_path / "context.json"))

    assert (done.returncode, done.stderr) == (1, "")
    assert r"Ger\xe4t \u2192 (local)" in done.stdout


def test_a_ctrl_c_ends_it_with_status_130_and_no_traceback() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        subprocess.Popen(
            [*COMMAND, f"127.0.0.1:{silent.getsockname()[1]}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process,
    ):
        silent.settimeout(60)
        client, _ = silent.accept()
        with client:
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)

    assert (process.returncode, errors) == (130, b"")


def test_an_orchestrator_that_cannot_be_reached_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".inmanta.cfg").write_text(
        f"[cmdline_rest_transport]\nhost=127.0.0.1\nport={free_port()}\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))

    done = check("--environment", ENVIRONMENT, "--host", "web")

    assert done.returncode == 2
    assert "Connection refused" in done.stderr
    assert "Traceback" not in done.stderr


SSH: dict[str, Any] = {
    "method_name": "ssh",
    "hostname": "10.0.0.5",
    "username": "deploy",
    "password": SECRET,
    "python_path": ["/opt/py/python3"],
}
COMMANDS = {
    "ssh": (SSH, "10.0.0.5 /opt/py/python3 -V"),
    "sudo": ({"method_name": "sudo", "password": SECRET, "via": SSH}, "-u root -- /far/python -V"),
    "docker": ({"method_name": "docker", "container": "web"}, "docker exec --interactive web"),
    "auto": ({**SSH, "python_path": ["auto"]}, "10.0.0.5 python3 -V"),
    "without a command": ({"method_name": "setns", "container": "a", "kind": "lxc"}, ""),
    "refused by mitogen": ({"method_name": "sudo", "sudo_args": ["-Z"]}, ""),
}


@pytest.mark.parametrize(("context", "end"), COMMANDS.values(), ids=COMMANDS.keys())
def test_the_command_to_run_by_hand_is_mitogens(context: dict[str, Any], end: str) -> None:
    command = shown_command(context, "/far/python")

    assert end in command
    assert bool(command) == bool(end)
    assert SECRET not in command
