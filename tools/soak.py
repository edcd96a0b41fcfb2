"""
Works through a host for some minutes while everything around it fails, and counts what came of it.

Puts, runs and reads go over ssh and over sudo behind ssh, from several threads. Meanwhile, at
random, interpreters, ssh clients, sudos and sessions are killed, the host freezes, and the server
restarts. At the end it prints a tally and checks that no file was ever partial, that nothing ran
twice, that nothing waited forever and that nothing is left. It exits with 0 only if all of this
holds.

The host is a throwaway ssh server on this machine; sudo to root has to need no password.
"""

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import getpass
import hashlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import mitogen.core
import psutil

from inmanta_plugins.mitogen import (
    CallTimeoutError,
    ConnectError,
    Proxy,
    PythonNotFoundError,
    RemoteException,
)
from pytest_inmanta_mitogen import SshHost

FILES = 6
THREADS_PER_PROXY = 2
PROXIES_PER_METHOD = 2
CALL_TIMEOUT = 5.0
# More than a CALL_TIMEOUT at times, so that some calls are terminated.
LONGEST_FREEZE = 8.0
LARGEST_CONTENT = 2_000_000
# How long an operation may take: to find out that the connection is lost, and to reconnect.
WAIT_SECONDS = 120.0


def content(rng: random.Random) -> bytes:
    """Return what tells by itself whether all of it is there."""
    body = rng.randbytes(int(rng.random() ** 4 * LARGEST_CONTENT))
    return hashlib.sha256(body).digest() + body


def is_whole(raw: bytes) -> bool:
    digest = hashlib.sha256(raw[32:]).digest()
    return raw[:32] == digest


@dataclasses.dataclass
class Tally:
    """What was done, and what came of it."""

    outcomes: collections.Counter[tuple[str, str]] = dataclasses.field(
        default_factory=collections.Counter
    )
    faults: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)
    looked: int = 0
    slowest: float = 0.0
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def count(self, operation: str, outcome: str, seconds: float) -> None:
        with self.lock:
            self.outcomes[operation, outcome] += 1
            self.slowest = max(self.slowest, seconds)


class Work:
    """The operations, each with all that it has to check."""

    def __init__(self, directory: pathlib.Path, tally: Tally) -> None:
        self.directory = directory
        self.log = directory / "log"
        self.tally = tally
        self.answered: set[str] = set()
        self.asked: set[str] = set()

    def path(self, rng: random.Random) -> pathlib.Path:
        return self.directory / f"file-{rng.randrange(FILES)}"

    def put(self, proxy: Proxy, rng: random.Random) -> None:
        proxy.put(str(self.path(rng)), content(rng))

    def read(self, proxy: Proxy, rng: random.Random) -> None:
        path = self.path(rng)
        if not is_whole(proxy.read_binary(str(path))):
            self.tally.wrong.append(f"{path} was read in part")

    def run(self, proxy: Proxy, rng: random.Random) -> None:
        name = uuid.UUID(bytes=rng.randbytes(16)).hex
        self.asked.add(name)
        # One write, which the kernel appends as a whole.
        stdout, stderr, code = proxy.run("sh", ["-c", 'echo "$0" >>"$1"', name, str(self.log)])
        if (stdout, stderr, code) != ("", "", 0):
            self.tally.wrong.append(f"the command answered {(stdout, stderr, code)}")
        self.answered.add(name)

    def look(self) -> None:
        """Check the files from beside, as another process of the host sees them."""
        for number in range(FILES):
            path = self.directory / f"file-{number}"
            self.tally.looked += 1
            if not is_whole(path.read_bytes()):
                self.tally.wrong.append(f"{path} was partial")

    def check_runs(self) -> None:
        ran = collections.Counter(self.log.read_text().split())
        for name, times in ran.items():
            if times > 1:
                self.tally.wrong.append(f"the command {name} ran {times} times")
            if name not in self.asked:
                self.tally.wrong.append(f"the command {name} ran, and nobody asked for it")
        if lost := self.answered - ran.keys():
            self.tally.wrong.append(f"{len(lost)} commands answered and had not run")

    def check_directory(self) -> None:
        expected = {"log", *(f"file-{number}" for number in range(FILES))}
        if more := {path.name for path in self.directory.iterdir()} - expected:
            self.tally.wrong.append(f"left in the directory: {', '.join(sorted(more))}")


def outcome_of(error: Exception) -> str:
    """Return what an operation ended in, where that may happen; empty for all else."""
    if isinstance(error, CallTimeoutError):
        return "timed out"
    if isinstance(error, RemoteException):
        if isinstance(error.remote_exception, ConnectError | PythonNotFoundError):
            return "cannot connect"
        if isinstance(error.remote_exception, mitogen.core.ChannelError):
            return "lost under way"
    return ""


def worker(proxy: Proxy, work: Work, seed: str, stop: threading.Event) -> None:
    rng = random.Random(seed)
    operations: list[Callable[[Proxy, random.Random], None]] = [work.put, work.read, work.run]
    while not stop.is_set():
        operation = rng.choice(operations)
        started = time.monotonic()
        outcome = "done"
        try:
            operation(proxy, rng)
        except Exception as error:
            outcome = outcome_of(error)
            if not outcome:
                outcome = "unexpected"
                work.tally.wrong.append(f"{operation.__name__}: {type(error).__name__}: {error}")
        work.tally.count(operation.__name__, outcome, time.monotonic() - started)
        if outcome != "done":
            time.sleep(0.05)  # a host that is down is not asked all the time


# Faults


def command_lines(pids: Iterable[int]) -> dict[int, str]:
    """Return the command lines of processes, without those that have ended."""
    found = {}
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            if line := psutil.Process(pid).cmdline():
                found[pid] = " ".join(line)
    return found


def descendants() -> dict[int, str]:
    return command_lines(child.pid for child in psutil.Process().children(recursive=True))


def kill_one(rng: random.Random, processes: dict[int, str], text: str) -> None:
    if pids := sorted(pid for pid, line in processes.items() if text in line):
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(pids), signal.SIGKILL)


def faults(host: SshHost, rng: random.Random) -> dict[str, tuple[int, Callable[[], None]]]:
    """Return what can be done to the host, each with how often it is."""

    def server_away() -> None:
        host.stop()
        time.sleep(rng.random() * 3)
        host.start()

    def host_frozen() -> None:
        host.freeze()
        try:
            time.sleep(rng.random() * LONGEST_FREEZE)
        finally:
            host.thaw()

    return {
        "interpreter killed": (
            6,
            lambda: kill_one(rng, command_lines(host.session_pids()), "(mitogen:"),
        ),
        "sudo killed": (3, lambda: kill_one(rng, command_lines(host.session_pids()), "sudo ")),
        "ssh killed": (5, lambda: kill_one(rng, descendants(), host.identity_file)),
        "sessions killed": (2, host.kill_sessions),
        "server restarted": (2, host.restart),
        "server away": (1, server_away),
        "host frozen": (1, host_frozen),
    }


# All of it


def contexts(host: SshHost) -> list[dict[str, Any]]:
    ssh = host.serialized()
    methods = [ssh]
    if not subprocess.run(["sudo", "-n", "true"], capture_output=True).returncode:
        sudo = {"method_name": "sudo", "name": "root", "python_path": host.python_path, "via": ssh}
        methods.append(sudo)
    return [
        {**context, "name": f"{context['method_name']} {number}"}
        for context in methods
        for number in range(PROXIES_PER_METHOD)
    ]


def soak(minutes: float, seed: str) -> Tally:
    tally = Tally()
    rng = random.Random(seed)
    with (
        tempfile.TemporaryDirectory(prefix="mitogen-soak-") as files,
        # Killed shells would leave locks in the home of whoever runs this.
        tempfile.TemporaryDirectory(prefix="mitogen-soak-home-") as home,
        SshHost(name="soak", environment={"HOME": home}) as host,
    ):
        work = Work(pathlib.Path(files), tally)
        for number in range(FILES):
            (work.directory / f"file-{number}").write_bytes(content(rng))
        work.log.touch()
        stop = threading.Event()
        proxies = [Proxy(context, call_timeout=CALL_TIMEOUT) for context in contexts(host)]
        print(f"{len(proxies)} proxies: {', '.join(map(str, proxies))}", flush=True)
        for proxy in proxies:
            proxy.connect()
        threads = [
            threading.Thread(
                target=worker, args=(proxy, work, f"{seed}-{p}-{t}", stop), daemon=True
            )
            for p, proxy in enumerate(proxies)
            for t in range(THREADS_PER_PROXY)
        ]
        for thread in threads:
            thread.start()
        fail_at_random(host, work, rng, minutes)
        stop.set()
        finish(proxies, threads, work, host)
    return tally


def fail_at_random(host: SshHost, work: Work, rng: random.Random, minutes: float) -> None:
    known = faults(host, rng)
    weights = [weight for weight, _ in known.values()]
    end = time.monotonic() + minutes * 60
    while time.monotonic() < end:
        time.sleep(rng.expovariate(1 / 1.2))
        (name,) = rng.choices(list(known), weights)
        known[name][1]()
        work.tally.faults[name] += 1
        work.look()


def finish(
    proxies: list[Proxy], threads: list[threading.Thread], work: Work, host: SshHost
) -> None:
    tally = work.tally
    deadline = time.monotonic() + WAIT_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if hung := [thread.name for thread in threads if thread.is_alive()]:
        tally.wrong.append(f"still waiting after {WAIT_SECONDS:.0f} s: {', '.join(hung)}")
        faulthandler.dump_traceback()
        return
    # All faults are over: now everything has to work.
    for proxy in proxies:
        # The last fault may have hit a connection that nobody used since.
        with contextlib.suppress(RemoteException):
            work.read(proxy, random.Random())
        for operation in (work.put, work.read, work.run):
            try:
                operation(proxy, random.Random())
            except Exception as error:
                tally.wrong.append(f"at the end {operation.__name__} on {proxy}: {error!r}")
        proxy.disconnect(best_effort=True)
    work.look()
    work.check_runs()
    work.check_directory()
    check_nothing_runs(host, tally)


def check_nothing_runs(host: SshHost, tally: Tally) -> None:
    def left() -> dict[int, str]:
        here = {pid: line for pid, line in descendants().items() if "sshd" not in line}
        return command_lines(host.session_pids()) | here

    deadline = time.monotonic() + 30
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid, line in left().items():
        tally.wrong.append(f"still running: {pid} {line}")
    threads = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
    if threads:
        tally.wrong.append(f"threads still running: {', '.join(threads)}")


def show(tally: Tally) -> None:
    operations = sorted({operation for operation, _ in tally.outcomes})
    outcomes = sorted({outcome for _, outcome in tally.outcomes})
    print(f"\n{tally.outcomes.total()} operations, the slowest took {tally.slowest:.1f} s")
    print(f"{'':8}" + "".join(f"{outcome:>16}" for outcome in outcomes))
    for operation in operations:
        numbers = (tally.outcomes[operation, outcome] for outcome in outcomes)
        print(f"{operation:8}" + "".join(f"{number:16}" for number in numbers))
    print(f"\n{tally.faults.total()} faults")
    for fault, count in sorted(tally.faults.items()):
        print(f"{count:8} {fault}")
    print(f"\nfiles looked at from beside: {tally.looked}")
    if tally.wrong:
        print(f"{len(tally.wrong)} WRONG:")
        for trouble in tally.wrong[:50]:
            print(f"  {trouble}")
    else:
        print("no file was ever partial, nothing ran twice, nothing waits, nothing is left")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0].strip())
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", default=str(random.SystemRandom().randrange(10**9)))
    arguments = parser.parse_args()
    print(
        f"seed {arguments.seed}, {arguments.minutes:g} minutes, as {getpass.getuser()},"
        f" Python {sys.version.split()[0]}, mitogen {'.'.join(map(str, mitogen.__version__))}",
        flush=True,
    )
    tally = soak(arguments.minutes, arguments.seed)
    show(tally)
    return 1 if tally.wrong or not tally.outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
