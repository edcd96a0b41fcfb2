"""
The parts of the demo that need no orchestrator: what it takes for success, what it shows, and that
it leaves nothing behind.
"""

import io
import os
import pathlib
import signal
import subprocess
import sys
import time

import psutil
import pytest
import rich.console

from demo import scenario
from demo.hosts import login_host
from demo.show import Show
from pytest_inmanta_mitogen import SshHost
from testbed.client import LogRecord, Resource
from testbed.environments import source_environment
from testbed.processes import Interrupted, interruptible, no_orphans, start, working_directory
from testbed.servers import Postgres, trouble

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


def test_a_resource_that_failed_is_told(deployed: Deployed, tmp_path: pathlib.Path) -> None:
    resource, log = deployed[0]
    deployed[0] = Resource(resource.id, resource.type, resource.agent, "x", "failed"), log

    assert problems(deployed, tmp_path) == "fs::File[this-machine] is failed, not deployed."


def test_a_resource_that_is_not_there_is_told(deployed: Deployed, tmp_path: pathlib.Path) -> None:
    assert "There are resources for" in problems(deployed[1:], tmp_path)


def test_a_resource_without_logged_calls_is_told(
    deployed: Deployed, tmp_path: pathlib.Path
) -> None:
    deployed[3] = deployed[3][0], []

    assert problems(deployed, tmp_path) == "The log of fs::File[by-ssh] has no calls."


def test_another_error_than_the_missing_interpreter_is_told(
    deployed: Deployed, tmp_path: pathlib.Path
) -> None:
    error = LogRecord("ERROR", "deploy", "failed (exception: EofError('EOF on stream'))", {})
    deployed[-1] = deployed[-1][0], [error]

    assert problems(deployed, tmp_path) == (
        "The log of the file on no-python has no PythonNotFoundError."
    )


@pytest.mark.parametrize("name", ["by-ssh.txt", "by-ssh.ran", "by-ssh.env"])
def test_a_file_that_is_not_on_disk_is_told(
    deployed: Deployed, tmp_path: pathlib.Path, name: str
) -> None:
    (tmp_path / name).unlink()

    assert "by-ssh" in problems(deployed, tmp_path)


def test_a_command_that_did_not_go_over_ssh_is_told(
    deployed: Deployed, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "by-ssh.ran").write_text("me\n")

    assert "in another way" in problems(deployed, tmp_path)


# What is shown


def shown(deployed: Deployed, directory: str, width: int = 80) -> str:
    output = io.StringIO()
    show = Show(rich.console.Console(file=output, width=width))
    show.resources(
        deployed, ways=scenario.WAYS, wanted_state=scenario.wanted_state, directory=directory
    )
    return output.getvalue()


def test_each_call_is_shown_with_its_arguments_and_result(deployed: Deployed) -> None:
    log = [
        called("inmanta_mitogen.lexists", "/tmp/x/a.txt", result=False),
        called("os.chmod", "/tmp/x/a.txt", 0o644),
        called("inmanta_mitogen.put", "/tmp/x/a.txt", r"b'hello\n'"),
    ]
    deployed[0] = deployed[0][0], log

    text = shown(deployed, "/tmp/x")

    assert "lexists('…/a.txt') → False" in text
    assert "os.chmod('…/a.txt', 0o644) → None" in text
    assert r"put('…/a.txt', b'hello\n') → None" in text


def test_the_name_of_a_function_is_never_cut(deployed: Deployed) -> None:
    name = "inmanta_plugins.envfile.remote.write_the_variables_of_a_file"
    deployed[0] = deployed[0][0], [called(name, "x" * 200)]

    lines = shown(deployed, "/tmp/x", width=80).splitlines()

    assert any(name in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_an_expected_failure_is_called_that(deployed: Deployed) -> None:
    text = " ".join(shown(deployed, "/tmp/x").split())

    assert "failed as expected fs::File x" in text
    assert "PythonNotFoundError: [Errno 2] No such python interpreter on host there" in text


def test_an_unexpected_state_is_shown_with_the_one_that_was_wanted(deployed: Deployed) -> None:
    resource, log = deployed[0]
    deployed[0] = Resource(resource.id, resource.type, resource.agent, "x", "skipped"), log

    assert "skipped, not deployed" in shown(deployed, "/tmp/x")


def test_square_brackets_in_a_log_are_shown_as_they_are(deployed: Deployed) -> None:
    deployed[0] = deployed[0][0], [called("os.stat", "a [bold]x[/bold]")]

    assert "os.stat('a [bold]x[/bold]')" in shown(deployed, "/tmp/x")


def test_of_a_log_the_warnings_and_errors_are_shown_with_their_tracebacks() -> None:
    log = """\
2026-01-01 10:00:00,000 INFO     a.b fine
2026-01-01 10:00:00,001 ERROR    a.b broken
Traceback (most recent call last):
ValueError
2026-01-01 10:00:00,002 DEBUG    a.b more
2026-01-01 10:00:00,003 WARNING  a.b careful
"""
    wanted = [log.splitlines()[number] for number in (1, 2, 3, 5)]

    assert trouble(log, 10).splitlines() == wanted
    assert trouble(log, 1).splitlines() == wanted[-1:]


# What is left behind


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid):
            return True
        time.sleep(0.01)
    return False


def pid_in(path: pathlib.Path) -> int:
    deadline = time.monotonic() + 20
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return int(path.read_text())


def test_a_daemon_and_the_directory_end_with_the_one_that_started_them() -> None:
    with working_directory() as directory, no_orphans(patience=0.2):
        script = f"setsid sh -c 'trap \"\" TERM; echo $$ > {directory}/pid; sleep 1000' & exit"
        start(["sh", "-c", script], log=directory / "log").wait()
        pid = pid_in(directory / "pid")
        assert psutil.pid_exists(pid)

    assert gone(pid)
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


def test_an_orchestrators_environment_has_inmanta_but_no_modules(tmp_path: pathlib.Path) -> None:
    python = source_environment(tmp_path / "env")
    code = "import inmanta, importlib.util as u; print(u.find_spec('inmanta_plugins'))"

    done = subprocess.run(
        [python, "-c", code],
        cwd=tmp_path,
        env={name: text for name, text in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout == "None\n"


def test_the_database_is_up_inside_and_gone_after() -> None:
    before = set(psutil.Process().children())
    with working_directory() as directory, no_orphans():
        with Postgres(directory / "database") as database:
            assert int(database.version.split(".")[0]) >= 16
            assert list(pathlib.Path(database.host).glob(".s.PGSQL.*"))
        assert not (directory / "database").exists()
        assert not set(psutil.Process().children()) - before


def test_the_login_host_runs_commands_for_whoever_has_its_key() -> None:
    ssh = ["ssh", "-oStrictHostKeyChecking=no", "-oUserKnownHostsFile=/dev/null", "-oBatchMode=yes"]
    with (
        working_directory() as directory,
        no_orphans(),
        login_host(directory) as (host, variables),
    ):
        done = subprocess.run(
            [*ssh, "-p", str(host.port), f"{host.username}@{host.hostname}", "cat; exit 3"],
            env={**os.environ, **variables},
            input=b"\x00" * 300_000,
            capture_output=True,
            timeout=60,
        )

    assert done.returncode == 3
    assert done.stdout == b"\x00" * 300_000


def test_the_demo_says_how_it_is_used() -> None:
    run = pathlib.Path(scenario.__file__).with_name("run.py")

    done = subprocess.run(
        [sys.executable, str(run), "--help"], capture_output=True, text=True, check=True, cwd="/"
    )

    assert "--keep" in done.stdout
    assert "--stop" in done.stdout
