"""
Measures this module, the published 0.2.5, mitogen itself, execnet, asyncssh and ssh in turn, in one
run; prints a table and writes docs/benchmarks.md and docs/benchmarks.svg.
"""

import argparse
import contextlib
import datetime
import functools
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import typing

from benchmarks import deployment, report
from benchmarks.report import ASYNCSSH, EXECNET, MITOGEN, OURS, PUBLISHED, SSH
from pytest_inmanta_mitogen import SshHost
from testbed.processes import no_orphans, working_directory

HERE = pathlib.Path(__file__).parent
# Compiled modules are kept, as where this module is installed.
ENVIRONMENT = {
    name: text
    for name, text in os.environ.items()
    if name not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")
}
MB = 10**6
# Each way; there and back it is twice that.
LATENCY = 0.025

Context = dict[str, typing.Any]
MODULES = (OURS, PUBLISHED)
FIRST = ["exists", "stat", "hash", "read 1 kB", "put 1 kB", "run true"]
SMALL = [*FIRST[:4], "chmod", *FIRST[4:], "call", "mitogen's call", "exists + stat + hash"]
TYPES = ("fs::File", "files::TextFile", "fs::Symlink")


def python_of(environment: str) -> str:
    """Return the interpreter of an environment that nox made."""
    return str(HERE.parent / ".nox" / environment / "bin" / "python")


KINDS = {
    OURS: (python_of("bench"), "inmanta"),
    PUBLISHED: (python_of("peer"), "inmanta"),
    MITOGEN: (python_of("bench"), "mitogen"),
    EXECNET: (python_of("rivals"), "execnet"),
    ASYNCSSH: (python_of("rivals"), "asyncssh"),
    SSH: (python_of("rivals"), "ssh"),
}


class Peer:
    """
    One of those that are compared, in a process of its own.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        python, kind = KINDS[name]
        self._process = subprocess.Popen(
            [python, str(HERE / "subject.py"), kind],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("BENCH_DEBUG") else subprocess.DEVNULL,
            text=True,
            cwd=tempfile.gettempdir(),  # where no module of the checkout is found
        )

    def ask(self, do: str, **arguments: typing.Any) -> typing.Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended while it measured {do}")
        return json.loads(answer)

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.communicate(timeout=60)


class Bench:
    """
    The parts, each a method, and what they measured.
    """

    def __init__(
        self, host: SshHost, directory: pathlib.Path, stack: contextlib.ExitStack, quick: bool
    ) -> None:
        self.host, self.directory, self.quick = host, directory, quick
        self.rounds = 1 if quick else 3
        self.scale = 100 if quick else 1
        self.figures = report.Figures()
        self.peers = {name: stack.enter_context(Peer(name)) for name in KINDS}
        self.known = str(directory / "known")
        pathlib.Path(self.known).write_text("x" * 1000)

    def note(self, place: str, figure: str, name: str, answer: typing.Any) -> None:
        if not isinstance(answer, dict):
            self.figures.add(place, figure, name, answer)
        elif "error" in answer:
            self.figures.fail(place, figure, name, answer["error"])
        else:
            for key, value in answer.items():
                shown = ": ".join(filter(None, (figure, key)))
                self.figures.add(place, shown, name, value)

    def measure(self, place: str, figure: str, name: str, do: str, **arguments: object) -> None:
        self.note(place, figure, name, self.peers[name].ask(do, **arguments))

    def path(self, name: str, what: str) -> str:
        return str(self.directory / f"{name.split()[0]}-{what}".replace(" ", "-"))

    def local(self) -> Context:
        return {"method_name": "local", "name": "here", "python_path": self.host.python_path}

    def distant(self, seconds: float, *counter: str) -> Context:
        """Return the context of the host behind a relay that may count round trips."""
        command = " ".join([deployment.relay(seconds), *counter])
        args = ["-F", "/dev/null", "-o", f"ProxyCommand={command}"]
        return self.host.serialized(ssh_args=args, compression=False)

    # The parts

    def round_trips(self) -> None:
        """Round trips of each operation, counted."""
        for attempt in range(self.rounds):
            for name in MODULES:
                counter = Counter(self.directory / f"trips-{attempt}-{name.split()[0]}")
                context = self.distant(LATENCY, str(counter.path))
                with Peer(name) as peer:
                    self._count(peer, counter, context)
            with Peer(MITOGEN) as peer:
                counter = Counter(self.directory / f"trips-{attempt}-mitogen")
                context = self.distant(LATENCY, str(counter.path))
                for figure, do, arguments in (
                    ("connect", "open", {"context": context}),
                    ("first call", "first_call", {}),
                ):
                    self._trips(peer, counter, figure, do, **arguments)

    def _trips(
        self, peer: Peer, counter: "Counter", figure: str, do: str, **arguments: object
    ) -> None:
        before = counter.settled()
        answer = peer.ask(do, **arguments)
        if isinstance(answer, dict) and "error" in answer:
            self.figures.fail(report.TRIPS, figure, peer.name, answer["error"])
        else:
            self.figures.add(report.TRIPS, figure, peer.name, counter.read() - before)

    def _count(self, peer: Peer, counter: "Counter", context: Context) -> None:
        trips = functools.partial(self._trips, peer, counter)
        trips("connect", "open", key="a", context=context)
        for figure, what in [("first call", "exists"), *zip(SMALL, SMALL, strict=True)]:
            trips(figure, "small", key="a", what=what, path=self.known, count=1)
        peer.ask("shut", key="a")
        for kind in TYPES:
            paths = [
                str(self.directory / f"{counter.path.name}-{kind.replace(':', '')}-{number}")
                for number in range(2)
            ]
            # The first of each two is what the agent learns from.
            for what in ("new", "converged"):
                peer.ask("deploy", type=kind, path=paths[0], context=context)
                trips(f"{what} {kind}", "deploy", type=kind, path=paths[1], context=context)

    def cold(self) -> None:
        """Measure the first connection of a process, and the first of each operation."""
        places = {"local": self.local(), "ssh": self.host.serialized()}
        for _ in range(2 if self.quick else 10):
            for place, context in places.items():
                for name in (*MODULES, MITOGEN):
                    with Peer(name) as peer:
                        arguments = {"context": context, "path": self.known, "operations": FIRST}
                        self.note(f"{place}, new process", "", name, peer.ask("cold", **arguments))
        for _ in range(self.rounds * 3):
            for name in MODULES:
                command = [KINDS[name][0], str(HERE / "subject.py"), "import"]
                options: dict[str, typing.Any] = {"env": ENVIRONMENT, "cwd": "/"}
                done = subprocess.run(command, check=True, capture_output=True, **options)
                seconds = json.loads(done.stdout)["seconds"]
                self.figures.add("agent", "import, beyond inmanta and mitogen", name, seconds)

    def small(self) -> None:
        """Measure the operations that handlers use all the time, on a connection that is up."""
        places = {"local": self.local(), "ssh": self.host.serialized()}
        for _ in range(3 if self.quick else 12):
            for place, context in places.items():
                # A new connection each time: on which processors its two ends run decides much.
                for name in MODULES:
                    self.peers[name].ask("open", key="a", context=context)
                for what in SMALL:
                    for name in MODULES:
                        arguments = {"key": "a", "what": what, "path": self.known, "count": 25}
                        self.measure(place, what, name, "small", **arguments)
                for name in MODULES:
                    self.peers[name].ask("shut", key="a")

    def transfers(self) -> None:
        """Large contents, and large answers."""
        places = {
            "local": self.local(),
            "ssh": self.host.serialized(),
            report.PLAIN_SSH: self.host.serialized(compression=False),
        }
        sizes = {"1 MB": MB // self.scale, "20 MB": 20 * MB // self.scale}
        for _ in range(self.rounds):
            for place, context in places.items():
                for name in MODULES:
                    self.peers[name].ask("open", key="a", context=context)
                    self._put_and_read(place, name, sizes, key="a")
                    count = 20_000 // self.scale
                    self.measure(
                        place, "answer of 20,000 dicts", name, "answer", key="a", count=count
                    )
                    self.peers[name].ask("shut", key="a")
                self._others(place, context, sizes)
        self._huge(report.PLAIN_SSH, places[report.PLAIN_SSH])

    def _put_and_read(
        self, place: str, name: str, sizes: dict[str, int], **arguments: object
    ) -> None:
        for label, size in sizes.items():
            more = {"path": self.path(name, label), "size": size, **arguments}
            self.measure(place, f"put {label}", name, "put", **more)
            self.measure(place, f"read {label}", name, "read", **more)

    def _others(self, place: str, context: Context, sizes: dict[str, int]) -> None:
        spec = f"popen//python={self.host.python_path[0]}"
        if place != "local":
            options = f"-F /dev/null -p {self.host.port} -i {self.host.identity_file}"
            options += " -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
            options += " -o LogLevel=ERROR" + (" -C" if place == "ssh" else "")
            address = f"{self.host.username}@{self.host.hostname}"
            spec = f"ssh={options} {address}//python={self.host.python_path[0]}"
        for name in (EXECNET, ASYNCSSH):
            if name == EXECNET or place != "local":
                how = {"spec": spec} if name == EXECNET else {"context": context}
                self.peers[name].ask("open", **how)
                self._put_and_read(place, name, sizes)
                self.peers[name].ask("close")
        if place == report.PLAIN_SSH:
            source, target = self.path(OURS, "20 MB"), self.path(SSH, "20 MB")
            self.measure(place, "put 20 MB", SSH, "put", context=context, local=source, path=target)
            size = sizes["20 MB"]
            self.measure(place, "read 20 MB", SSH, "read", context=context, path=target, size=size)

    def _huge(self, place: str, context: Context) -> None:
        source, target = self.path("huge", "source"), self.path("huge", "target")
        with open(source, "wb") as file:
            file.truncate(report.HUGE // self.scale)
        for _ in range(self.rounds):
            self.peers[OURS].ask("open", key="a", context=context)
            ask = functools.partial(self.measure, place, name=OURS, do="extra_memory", key="a")
            ask(report.PUT_HUGE, what="put_file", local=source, path=target)
            ask(report.GET_HUGE, what="get_file", path=target, local=source)
            self.peers[OURS].ask("shut", key="a")
        for name in MODULES:
            self.peers[name].ask("open", key="a", context=context)
            ask = functools.partial(self.measure, place, name=name, do="extra_memory", key="a")
            size = 20 * MB // self.scale
            ask("put 20 MB, memory", what="put", path=target, size=size)
            ask("read 20 MB, memory", what="read", path=target, size=size)
            self.peers[name].ask("shut", key="a")

    def connections(self) -> None:
        """Many calls and many connections, near and far."""
        many, count = 500 // min(self.scale, 10), 2 if self.quick else 20
        far = f"ssh, {2 * LATENCY * 1000:.0f} ms there and back"
        for place, context in (("ssh", self.host.serialized()), (far, self.distant(LATENCY))):
            for name in MODULES:
                self.measure(place, "connect", name, "open", key="a", context=context)
                self.measure(place, "connect once more", name, "open", key="b", context=context)
                self.measure(
                    place, f"{many // 10} calls", name, "one_by_one", key="a", count=many // 10
                )
                if name == OURS:
                    figure = f"{many} calls in flight"
                    self.measure(place, figure, name, "in_flight", key="a", count=many)
                for key in "ab":
                    self.peers[name].ask("shut", key=key)
                arguments = {"context": context, "count": count, "threads": 8}
                self.measure(place, f"{count} connections, each", name, "many", **arguments)

    def orchestrator(self) -> None:
        """Real orchestrators, one with each module, that deploy files through sudo over ssh."""
        if os.geteuid() or not shutil.which("sudo"):
            self.figures.skipped.append("orchestrator: needs root and sudo")
            return
        versions = {OURS: None, PUBLISHED: "0.2.5"}
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(working_directory())
            stack.enter_context(no_orphans())
            running = {}
            for number, (name, version) in enumerate(versions.items()):
                own = directory / str(number)
                own.mkdir(mode=0o755)
                running[name] = stack.enter_context(
                    deployment.Orchestration(own, self.host, version)
                )
            for hosts, files in ((2, 3),) if self.quick else ((4, 50), (40, 3)):
                for seconds in (0.0, LATENCY):
                    far = f"{2 * seconds * 1000:.0f} ms"
                    place = f"orchestrator, {hosts} hosts x {files} files, {far}"
                    relay = deployment.relay(seconds) if seconds else None
                    job = deployment.Job(hosts, files, relay)
                    for name in MODULES:
                        print(f"  {place}, {name}", file=sys.stderr, flush=True)
                        self.note(place, "", name, running[name].measure(job))


class Counter:
    """
    The round trips that a relay counted.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def read(self) -> int:
        return int(self.path.read_text()) if self.path.exists() else 0

    def settled(self) -> int:
        # What comes late of one operation is not to be counted to the next.
        time.sleep(4 * LATENCY)
        return self.read()


PARTS = ("round_trips", "cold", "small", "connections", "transfers", "orchestrator")


def machine() -> str:
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    ssh = subprocess.run(["ssh", "-V"], capture_output=True, text=True).stderr.strip()
    return (
        f"{when}, {os.cpu_count()} processors ({platform.machine()}), Linux {platform.release()},"
        f" Python {platform.python_version()}, {ssh.split(',')[0]}; load before the run: {load}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench BENCH_ARGS=...", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="only these parts, and no page")
    parser.add_argument("--quick", action="store_true", help="all of it once, small, and no page")
    arguments = parser.parse_args()
    before, start = machine(), time.monotonic()
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(SshHost(config=["Subsystem sftp internal-sftp"]))
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
        bench = Bench(host, pathlib.Path(directory), stack, arguments.quick)
        for name in arguments.only or PARTS:
            begin = time.monotonic()
            print(f"{name} ...", file=sys.stderr, flush=True)
            getattr(bench, name)()
            print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    print(report.as_text(bench.figures))
    if not arguments.only and not arguments.quick:
        minutes = (time.monotonic() - start) / 60
        report.write(
            pathlib.Path("docs"), bench.figures, f"{before}; it took {minutes:.0f} minutes"
        )


if __name__ == "__main__":
    main()
