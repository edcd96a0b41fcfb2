"""
The parts of the demo that need no orchestrator: what it takes for success, what it shows, and that
it leaves nothing behind.
"""

import dataclasses
import io
import os
import pathlib
import signal
import sys
import time

import psutil
import pytest
import rich.console

import support
from demo import scenario
from demo.show import Show
from pytest_inmanta_mitogen import SshHost
from testbed.client import LogRecord, Resource
from testbed.environments import CHECKOUT
from testbed.processes import Interrupted, interruptible, no_orphans, start, working_directory

HOST = SshHost(username="me")
HOST.port = 2222

# What success is

Deployed = list[tuple[Resource, list[LogRecord]]]


def called(function: str, *args: object, result: object = None) -> LogRecord:
    return LogRecord(
        level="DEBUG",
        action="deploy",
        message="Calling function",
        values={
            "function": function,
            "context_name": "here",
            "args": list(args),
            "kwargs": {},
            "result": result,
        },
    )


def missing_interpreter() -> LogRecord:
    error = "PythonNotFoundError('[Errno 2] No such python interpreter on host there: nope')"
    return LogRecord("ERROR", "deploy", f"failed (exception: {error})", {"exception": error})


@pytest.fixture
def deployed(tmp_path: pathlib.Path) -> Deployed:
    """
    All that the demo's model asks for, as it should be.
    """
    for agent in ("this-machine", "by-ssh", "by-address"):
        (tmp_path / f"{agent}.txt").write_text(f"Deployed on {agent}.\n")
        ssh = "" if agent == "this-machine" else " 127.0.0.1 40000 127.0.0.1 2222"
        (tmp_path / f"{agent}.ran").write_text(f"me{ssh}\n")
        (tmp_path / f"{agent}.env").write_text("MANAGED_BY=the tutorial's module\n")
    found: Deployed = [
        (Resource(f"{type}[{agent}]", type, agent, "x", "deployed"), [called("os.stat", "x")])
        for agent in ("this-machine", "by-ssh", "by-address")
        for type in ("fs::File", "exec::Run", "envfile::Variable")
    ]
    broken = Resource("fs::File[no-python]", "fs::File", "no-python", "x", "failed")
    return [*found, (broken, [missing_interpreter()])]


def problems(deployed: Deployed, tmp_path: pathlib.Path) -> str:
    return "\n".join(scenario.problems_of(deployed, tmp_path, HOST))


def test_nothing_is_wrong_when_all_ended_as_told(
    deployed: Deployed, tmp_path: pathlib.Path
) -> None:
    assert problems(deployed, tmp_path) == ""


def test_a_resource_that_is_missing_or_did_not_end_as_it_should_is_told(
    deployed: Deployed, tmp_path: pathlib.Path
) -> None:
    eof = LogRecord("ERROR", "deploy", "failed (exception: EofError('EOF on stream'))", {})
    changed = [
        (dataclasses.replace(deployed[1][0], state="failed"), deployed[1][1]),
        (deployed[2][0], []),
        *deployed[3:-1],
        (deployed[-1][0], [eof]),
    ]

    told = problems(changed, tmp_path).splitlines()

    assert told[0].startswith("There are resources for")
    assert told[1:] == [
        "exec::Run[this-machine] is failed, not deployed.",
        "The log of envfile::Variable[this-machine] has no calls.",
        "The log of the file on no-python has no PythonNotFoundError.",
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [("by-ssh.txt", ""), ("by-ssh.ran", ""), ("by-ssh.env", ""), ("by-ssh.ran", "me")],
)
def test_what_is_not_on_disk_or_did_not_go_over_ssh_is_told(
    deployed: Deployed, tmp_path: pathlib.Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)

    assert "by-ssh" in problems(deployed, tmp_path)


# What is shown


def test_calls_and_states_are_shown(deployed: Deployed) -> None:
    log = [
        called("inmanta_mitogen.lexists", "/tmp/x/a.txt", result=False),
        called("os.chmod", "/tmp/x/a.txt", 0o644),
        called("os.stat", "a [bold]x[/bold]"),
    ]
    deployed[0] = dataclasses.replace(deployed[0][0], state="skipped"), log
    output = io.StringIO()

    Show(rich.console.Console(file=output, width=80)).resources(
        deployed, ways=scenario.WAYS, wanted_state=scenario.wanted_state, directory="/tmp/x"
    )

    text = " ".join(output.getvalue().split())
    for wanted in (
        "lexists('…/a.txt') → False",
        "os.chmod('…/a.txt', 0o644) → None",
        "os.stat('a [bold]x[/bold]')",
        "skipped, not deployed",
        "failed as expected fs::File x",
        "PythonNotFoundError: [Errno 2] No such python interpreter on host there",
    ):
        assert wanted in text


# What is left behind


def test_a_daemon_and_the_directory_end_with_the_one_that_started_them() -> None:
    with working_directory() as directory, no_orphans(timeout=0.2):
        file = directory / "pid"
        script = f"setsid sh -c 'trap \"\" TERM; echo $$ > {file}; sleep 1000' & exit"
        start(["sh", "-c", script], log=directory / "log").wait()
        support.wait_until(lambda: file.exists() and file.read_text().endswith("\n"), "it runs")
        pid = int(file.read_text())
        assert psutil.pid_exists(pid)

    support.wait_until(lambda: not psutil.pid_exists(pid), "the daemon is gone")
    assert not directory.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_only_the_first_signal_interrupts(number: signal.Signals) -> None:
    ends = []

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(20)
            ends.append("not interrupted")
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            ends.append("cleaned up")

    with pytest.raises(Interrupted) as raised, interruptible():
        work()

    assert ends == ["cleaned up"]
    assert raised.value.exit_code == 128 + number


# What it starts


def test_the_demo_says_how_it_is_used() -> None:
    done = support.execute(sys.executable, "-m", "demo", "--help", cwd=CHECKOUT)

    assert "--keep" in done.stdout
