"""
Causes each fault for this module and for the published one, and prints what comes of it as a table.

    python tools/faults_table.py [--peer-version 0.2.5] [--only TEXT] [--write docs/faults.md]

The published module gets a virtual environment of its own, .venv-peer, made when it is missing. Run
it as root, which it takes for a full disk and a frozen interpreter of another user.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from pytest_inmanta_mitogen import SshHost

ROOT = pathlib.Path(__file__).parent.parent
# What takes longer is said to wait for ever. Everything that this module promises takes less.
FOR_EVER = 25.0
FOREVER = f"waits (given up after {FOR_EVER:.0f} s)"


class Subject:
    """A process with one of the two modules, which does what it is told."""

    def __init__(self, python: str, home: pathlib.Path) -> None:
        path = {"PYTHONPATH": str(ROOT)} if python == sys.executable else {}
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | path
        script = home / "subject.py"  # beside it there must be none of this module's packages
        script.write_bytes((ROOT / "tools" / "faults_subject.py").read_bytes())
        self._process = subprocess.Popen(
            [python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(b'{"error": "the process ended"}')

    def start(self, do: str, *args: object, **options: object) -> None:
        assert self._process.stdin is not None
        request = {"do": do, "args": args, "options": options}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        try:
            reply = json.loads(self._answers.get(timeout=FOR_EVER))
        except queue.Empty:
            raise Waits from None
        if "error" in reply:
            raise SubjectError(reply["error"])
        return reply["ok"]

    def do(self, do: str, *args: object, **options: object) -> Any:
        self.start(do, *args, **options)
        return self.answer()

    def told(self, do: str, *args: object, **options: object) -> str:
        """The answer, or the error, as a text."""
        try:
            return short(self.do(do, *args, **options))
        except SubjectError as error:
            return short(error)

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self) -> None:
        # Its session: what it left running as well.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class SubjectError(Exception):
    """The subject raised."""


class Waits(Exception):  # noqa: N818  # tells what happened, and is no error
    """The subject does not come back."""


def short(value: object) -> str:
    # Of a command that went well, what it printed.
    if isinstance(value, list) and len(value) == 3 and value[1:] == ["", 0]:
        value = f"works ({value[0]})" if value[0] else "works"
    text = str(value).replace("|", "/").replace("\n", " ")
    return text if len(text) <= 110 else text[:107] + "…"


@dataclasses.dataclass
class Bench:
    """What a scenario works with."""

    subject: Subject
    host: SshHost
    directory: pathlib.Path

    def open(self, key: str = "p", **options: object) -> None:
        self.subject.do("open", key, self.host.serialized(), **options)

    def run(self, *command: object, key: str = "p") -> str:
        return self.subject.told("method", key, "run", *command)

    def in_flight(self, fault: Callable[[], object]) -> str:
        """A call of 20 minutes, and a fault once it runs."""
        trace = self.directory / "trace"
        self.subject.start("method", "p", "run", "sh", ["-c", f"echo ran >>{trace}; sleep 1200"])
        wait_for(trace.exists)
        fault()
        try:
            told = short(self.subject.answer())
        except SubjectError as error:
            told = short(error)
        ran = len(trace.read_text().split())
        return f"{told} (ran {ran} times)" if ran > 1 else told

    def pid(self, key: str = "p") -> int:
        return int(self.subject.do("remote", key, "os", "getpid"))

    def held(self) -> dict[str, int]:
        counts: dict[str, int] = self.subject.do("count")
        return counts

    def grown(self, before: dict[str, int]) -> str:
        time.sleep(1.5)  # children are waited for now and then
        now = self.held()
        more = [f"{now[key] - was} {key}" for key, was in before.items() if now[key] > was]
        return ", ".join(more) or "nothing left"


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + FOR_EVER
    while not condition():
        if time.monotonic() > deadline:
            raise Waits
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


# Scenarios


def rebooted(bench: Bench) -> str:
    bench.open()
    bench.run("true")
    bench.host.restart()
    time.sleep(1)
    return f"next call: {bench.run('echo', ['back'])}; the one after: {bench.run('true')}"


def killed_in_a_call(bench: Bench) -> str:
    bench.open()
    pid = bench.pid()
    told = bench.in_flight(lambda: os.kill(pid, signal.SIGKILL))
    return f"{told}; next call: {bench.run('echo', ['back'])}"


def server_down(bench: Bench) -> str:
    bench.open()
    bench.run("true")
    bench.host.stop()
    time.sleep(1)
    told = bench.run("true")
    before = bench.held()
    for _ in range(5):
        bench.run("true")
    told += f"; after 5 more: {bench.grown(before)}"
    bench.host.start()
    return f"{told}; once it is back: {bench.run('echo', ['back'])}"


def frozen_host(bench: Bench) -> str:
    bench.open(call_timeout=20)
    bench.run("true")
    bench.subject.told("timeout", "p", 1.0)
    bench.host.freeze()
    try:
        return bench.run("true")
    finally:
        bench.host.thaw()


def stuck_call(bench: Bench) -> str:
    bench.open(call_timeout=20)
    bench.run("true")
    bench.subject.told("timeout", "p", 1.0)
    told = bench.subject.told("remote", "p", "time", "sleep", 1200)
    bench.subject.told("timeout", "p", 20)
    return f"{told}; next call: {bench.run('echo', ['back'])}"


def frozen_behind_sudo(bench: Bench) -> str:
    sudo = {"method_name": "sudo", "name": "root", "python_path": bench.host.python_path}
    context = {**sudo, "via": bench.host.serialized()}
    bench.subject.do("open", "p", context, call_timeout=20)
    pid = bench.pid()
    os.kill(pid, signal.SIGSTOP)
    bench.subject.told("timeout", "p", 1.0)
    try:
        told = bench.run("true")
        bench.subject.told("timeout", "p", 20)
        told += f"; next call: {bench.run('echo', ['back'])}"
        time.sleep(2)
        return told + f"; the frozen one is {'still there' if alive(pid) else 'gone'}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def silent_port(bench: Bench) -> str:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        context = {"method_name": "ssh", "name": "", "hostname": "127.0.0.1", "port": port}
        return bench.subject.told("open", "p", {**context, "connect_timeout": 2})


def failed_connects(bench: Bench) -> str:
    context = {"method_name": "ssh", "name": "", "hostname": "127.0.0.1", "port": 1}
    bench.subject.told("open", "p", context)
    before = bench.held()
    for number in range(20):
        bench.subject.told("open", f"p{number}", context)
    return f"left by 20: {bench.grown(before)}"


def connect_cycles(bench: Bench) -> str:
    def once() -> None:
        bench.open("q")
        bench.run("true", key="q")
        bench.subject.do("close", "q")

    once()
    before = bench.held()
    for _ in range(10):
        once()
    return f"left by 10: {bench.grown(before)}"


def full_disk(bench: Bench) -> str:
    bench.open()
    mounted = bench.directory / "disk"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", mounted], check=True)
    try:
        path = mounted / "file"
        path.write_text("old content")
        told = bench.subject.told("method", "p", "put", str(path), 1_000_000)
        kept = path.read_bytes() == b"old content"
        return f"{told}; the file is {'as it was' if kept else 'destroyed'}"
    finally:
        subprocess.run(["umount", mounted], check=True)


def large_put(bench: Bench) -> str:
    bench.open()
    path = bench.directory / "large"
    told = bench.subject.told("method", "p", "put", str(path), 150 * 2**20)
    size = path.stat().st_size if path.exists() else 0
    return f"{told}; {size / 2**20:.0f} MB are there"


def large_result(bench: Bench) -> str:
    bench.open()
    told = bench.subject.told("odd", "p", "large")
    return f"{told}; next call: {bench.run('echo', ['on'])}"


def command_timeout(bench: Bench) -> str:
    bench.open()
    noted = bench.directory / "pid"
    script = f"sleep 1200 & echo $! >{noted}; wait"
    told = bench.subject.told("method", "p", "run", "sh", ["-c", script], None, None, 1)
    child = int(noted.read_text())
    time.sleep(0.5)
    left = alive(child)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return f"{told}; its child is {'still running' if left else 'gone'}"


def no_utf8(bench: Bench) -> str:
    bench.open()
    return bench.run("printf", ["caf\\351"])


def daemon(bench: Bench) -> str:
    bench.open()
    try:
        return bench.run("sh", ["-c", "sleep 300 & echo started"])
    finally:
        bench.host.kill_sessions()


def odd_call(what: str) -> Callable[[Bench], str]:
    def scenario(bench: Bench) -> str:
        bench.open()
        told = bench.subject.told("odd", "p", what)
        return f"{told}; next call: {bench.run('echo', ['on'])}"

    return scenario


def many_threads(bench: Bench) -> str:
    bench.open()
    return str(bench.subject.told("many", "p", 32, 320))


def many_threads_on_a_dead_host(bench: Bench) -> str:
    bench.subject.do("open", "p", bench.host.serialized(connect_timeout=2))
    bench.run("true")
    bench.host.stop()
    time.sleep(1)
    with socket.create_server((bench.host.hostname, bench.host.port), backlog=64):
        return f"all came back: {bench.subject.told('many', 'p', 32, 32)}"


def fork(bench: Bench) -> str:
    bench.open()
    pid = bench.pid()
    told = bench.subject.told("fork", "p")
    told = "a connection of its own" if told.isdigit() and int(told) != pid else told
    return f"in the child: {told}; in the parent: {bench.run('echo', ['on'])}"


def interrupted_connect(bench: Bench) -> str:
    bench.open("other")
    before = bench.held()
    slow = ["/bin/sh", "-c", 'sleep 2; exec "$0" "$@"', *bench.host.python_path]
    context = bench.host.serialized(python_path=slow, name="slow")
    told = bench.subject.told("interrupted", "p", context, 1.0)
    time.sleep(3)
    return f"{told}: {bench.grown(before)}"


@dataclasses.dataclass(frozen=True)
class Scenario:
    """
    A fault.

    :attr promise: What is promised to come of it.
    :attr test: The test that holds this module to it.
    """

    fault: str
    promise: str
    test: str
    run: Callable[[Bench], str]


_FAULTS = "tests/hosts/test_faults.py::test_"
_LEAKS = "tests/connections/test_leaks.py::test_"
_PROXY = "tests/test_proxy.py::test_"
_PROCESS = "tests/on_host/test_process.py::test_"
_FILES = "tests/on_host/test_files.py::test_"
_RESULT = "a_result_that_cannot_travel_is_named_and_the_interpreter_stays"

SCENARIOS = [
    Scenario(
        "the host rebooted between two calls",
        "the next call reconnects and works",
        f"{_FAULTS}a_connection_lost_between_calls_is_made_anew",
        rebooted,
    ),
    Scenario(
        "the interpreter is killed in a call",
        "`RemoteException`, the call is not repeated, the next one works",
        f"{_FAULTS}a_call_under_way_fails_and_is_not_repeated",
        killed_in_a_call,
    ),
    Scenario(
        "the server stays down",
        "`RemoteException` of `ConnectError` at each call, nothing left, works once it is back",
        f"{_FAULTS}a_server_that_is_down_fails_each_call_until_it_is_back",
        server_down,
    ),
    Scenario(
        "the host hangs (`call_timeout` of 1 s)",
        "`CallTimeoutError`",
        f"{_FAULTS}a_frozen_host_is_found_by_the_call_timeout",
        frozen_host,
    ),
    Scenario(
        "a call hangs (`call_timeout` of 1 s)",
        "`CallTimeoutError`, the next call works",
        f"{_PROXY}a_call_over_its_time_ends_and_the_next_one_works",
        stuck_call,
    ),
    Scenario(
        "root's interpreter hangs behind sudo",
        "`CallTimeoutError`, the next call works, the hung one is killed",
        f"{_FAULTS}an_interpreter_frozen_behind_a_hop_is_killed_and_the_hop_stays",
        frozen_behind_sudo,
    ),
    Scenario(
        "the port accepts and never answers (`connect_timeout` of 2 s)",
        "`ConnectError` that says so",
        f"{_FAULTS}a_port_that_never_answers_costs_no_more_than_the_connect_timeout",
        silent_port,
    ),
    Scenario(
        "connecting fails, 20 times",
        "nothing is left",
        f"{_LEAKS}fifty_failed_connections_leave_nothing",
        failed_connects,
    ),
    Scenario(
        "connect, call, disconnect, 10 times",
        "nothing is left",
        f"{_LEAKS}connections_over_ssh_leave_nothing",
        connect_cycles,
    ),
    Scenario(
        "the disk is full when a file is put",
        "`RemoteException`, the old file untouched",
        f"{_FILES}put_keeps_the_old_file_when_the_disk_is_full",
        full_disk,
    ),
    Scenario(
        "a file of 150 MB is put",
        "it is there",
        "tests/calls/test_transfer.py::test_contents_and_outputs_may_exceed_what_one_message_carries",
        large_put,
    ),
    Scenario(
        "a result is larger than a message may be",
        "`RemoteException` that names the limit, the next call works",
        f"{_PROXY}what_is_too_large_for_a_message_names_the_limit",
        large_result,
    ),
    Scenario(
        "a command takes longer than its `timeout`",
        "`RemoteException`, the command and its children killed",
        f"{_PROCESS}a_timeout_kills_the_command_and_all_its_children",
        command_timeout,
    ),
    Scenario(
        "a command prints no UTF-8",
        "decoded all the same",
        f"{_PROCESS}output_that_is_not_utf8_is_told_from_real_text_and_can_be_stored",
        no_utf8,
    ),
    Scenario(
        "a command leaves a daemon that holds its output",
        "the call ends with the command",
        f"{_PROCESS}a_daemon_that_holds_the_output_does_not_hang_run",
        daemon,
    ),
    Scenario(
        "a lambda is called",
        "`TypeError` before the call",
        f"{_PROXY}what_cannot_be_called_or_sent_is_named",
        odd_call("lambda"),
    ),
    Scenario(
        "an argument can't be sent",
        "`TypeError` that names it, before the call",
        f"{_PROXY}what_cannot_be_called_or_sent_is_named",
        odd_call("argument"),
    ),
    Scenario(
        "a result can't be sent",
        "`RemoteException` that names the function, the next call works",
        f"{_PROXY}{_RESULT}",
        odd_call("result"),
    ),
    Scenario(
        "32 threads share a proxy",
        "all answers right",
        f"{_FAULTS}one_proxy_over_ssh_serves_many_threads",
        many_threads,
    ),
    Scenario(
        "32 threads call a dead host (`connect_timeout` of 2 s)",
        "all fail at once",
        f"{_FAULTS}many_threads_on_a_dead_host_share_one_attempt_to_reconnect",
        many_threads_on_a_dead_host,
    ),
    Scenario(
        "a forked child calls",
        "it gets a connection of its own, the parent's goes on",
        f"{_FAULTS}forked_children_connect_for_themselves_while_the_parent_works",
        fork,
    ),
    Scenario(
        "connecting is interrupted (KeyboardInterrupt)",
        "nothing is left",
        f"{_LEAKS}an_interrupted_connect_leaves_nothing",
        interrupted_connect,
    ),
]


def outcome(scenario: Scenario, python: str) -> str:
    with contextlib.ExitStack() as stack:
        directory = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # Killed shells would leave locks in the home of whoever runs this.
        host = stack.enter_context(SshHost(name="host", environment={"HOME": str(directory)}))
        subject = Subject(python, directory)
        stack.callback(subject.end)
        try:
            return scenario.run(Bench(subject, host, directory))
        except Waits:
            return FOREVER
        except SubjectError as error:
            return short(error)


def peer_python(version: str, directory: pathlib.Path) -> str:
    """The interpreter of a virtual environment with the published module."""
    python = directory / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        wanted = [f"inmanta-module-mitogen=={version}"]
        for name in ("inmanta-core", "mitogen"):  # the same of both
            wanted.append(f"{name}=={importlib.metadata.version(name)}")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    return str(python)


def rows(scenarios: list[Scenario], peer: str) -> Iterator[str]:
    yield "| fault | promise | this module | published | test |"
    yield "| --- | --- | --- | --- | --- |"
    for scenario in scenarios:
        print(f"… {scenario.fault}", file=sys.stderr, flush=True)
        ours, theirs = outcome(scenario, sys.executable), outcome(scenario, peer)
        cells = (scenario.fault, scenario.promise, ours, theirs, f"`{scenario.test}`")
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0].strip())
    parser.add_argument("--peer-version", default="0.2.5")
    parser.add_argument("--peer", type=pathlib.Path, default=ROOT / ".venv-peer")
    parser.add_argument("--only", default="", help="the faults with this in their description")
    parser.add_argument("--write", type=pathlib.Path, help="replace the table in this file")
    arguments = parser.parse_args()
    peer = peer_python(arguments.peer_version, arguments.peer)
    chosen = [scenario for scenario in SCENARIOS if arguments.only in scenario.fault]
    table = "\n".join(rows(chosen, peer))
    print(table)
    if arguments.write:
        text = arguments.write.read_text()
        start, end = text.index("| fault |"), text.rindex("|\n") + 2
        arguments.write.write_text(f"{text[:start]}{table}\n{text[end:]}")


if __name__ == "__main__":
    main()
