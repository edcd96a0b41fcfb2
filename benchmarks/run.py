"""
Measures this module, the published 0.2.5, mitogen itself, execnet, asyncssh and ssh in turn, in one
run; prints a table and writes docs/benchmarks.md and docs/benchmarks.svg.

BENCH_QUICK=1 does everything once, with small contents: it shows that the benchmarks work.
"""

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

import report

from pytest_inmanta_mitogen import SshHost

HERE = pathlib.Path(__file__).parent
QUICK = bool(os.environ.get("BENCH_QUICK"))
ROUNDS = 1 if QUICK else 5
CALLS = 20 if QUICK else 500
IN_FLIGHT = 50 if QUICK else 500
CONNECTIONS = [1, 2] if QUICK else [1, 10, 50]
FILES = 5 if QUICK else 200
SCALE = 100 if QUICK else 1
SIZES = {"1 kB": 1000, "1 MB": 10**6, "20 MB": 20 * 10**6 // SCALE}
HUGE = 200 * 10**6 // SCALE
# Compiled modules are kept, as where this module is installed.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
# Each way; there and back it is twice that.
LATENCY = 0.025

OURS, PUBLISHED = "this module", "published 0.2.5"
MITOGEN, EXECNET, ASYNCSSH, SSH = "mitogen", "execnet", "asyncssh", "ssh cat"


def pythons() -> dict[str, str]:
    """The interpreters of the environments that nox made."""
    names = {"ours": "bench", "published": "peer", "others": "rivals"}
    return {key: str(HERE.parent / ".nox" / name / "bin/python") for key, name in names.items()}


class Peer:
    """
    One of those that are compared, in a process of its own.
    """

    def __init__(self, name: str, python: str, kind: str) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [python, str(HERE / "subject.py"), kind],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not os.environ.get("BENCH_DEBUG") else None,
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

    def end(self) -> None:
        self._process.communicate(timeout=60)


class Bench:
    def __init__(self, host: SshHost, directory: pathlib.Path, stack: contextlib.ExitStack) -> None:
        self.host = host
        self.directory = directory
        self.figures = report.Figures()
        python = pythons()
        kinds = {
            OURS: (python["ours"], "inmanta"),
            PUBLISHED: (python["published"], "inmanta"),
            MITOGEN: (python["ours"], "mitogen"),
            EXECNET: (python["others"], "execnet"),
            ASYNCSSH: (python["others"], "asyncssh"),
            SSH: (python["others"], "ssh"),
        }
        self.peers = {name: Peer(name, *kind) for name, kind in kinds.items()}
        for peer in self.peers.values():
            stack.callback(peer.end)

    def measure(
        self, place: str, figure: str, name: str, do: str, **arguments: typing.Any
    ) -> typing.Any:
        answer = self.peers[name].ask(do, **arguments)
        if isinstance(answer, dict) and "error" in answer:
            self.figures.fail(place, figure, name, answer["error"])
        elif isinstance(answer, dict):
            for key, value in answer.items():
                self.figures.add(place, f"{figure}: {key}" if key else figure, name, value)
        else:
            self.figures.add(place, figure, name, answer)
        return answer

    def path(self, name: str, what: str) -> str:
        return str(self.directory / f"{name.split()[0]}-{what}".replace(" ", "-"))

    # What is measured

    def contexts(self) -> dict[str, dict[str, typing.Any]]:
        python = self.host.python_path
        places = {
            "local": {"method_name": "local", "name": "here", "python_path": python},
            "ssh": self.host.serialized(),
            "ssh, compression off": self.host.serialized(compression=False),
        }
        if os.geteuid() == 0 and shutil.which("sudo"):
            sudo = {"method_name": "sudo", "name": "root", "python_path": python}
            places["sudo via ssh"] = {**sudo, "via": self.host.serialized()}
        else:
            self.figures.skipped.append("sudo via ssh: needs root and sudo")
        return places

    def modules(self, place: str, context: dict[str, typing.Any]) -> None:
        for name in (OURS, PUBLISHED):
            measure = functools.partial(self.measure, place, name=name)
            measure("connect, the first", do="open", key="a", context=context)
            measure("first call, on the first", do="first_call", key="a")
            measure("connect, the second", do="open", key="b", context=context)
            measure("first call, on the second", do="first_call", key="b")
            self.peers[name].ask("shut", key="b")
            measure("call", do="call", key="a", count=CALLS)
            measure(f"{IN_FLIGHT} calls, one by one", do="one_by_one", key="a", count=IN_FLIGHT)
            if name == OURS:
                for _ in range(3):
                    figure = f"{IN_FLIGHT} calls, in flight"
                    measure(figure, do="in_flight", key="a", count=IN_FLIGHT)
            measure("run true, the first", do="run_true", key="a")
            measure("run true", do="run_true", key="a")
            measure("exists + stat + hash", do="trio", key="a")
            for label, size in SIZES.items():
                if label == "1 kB":
                    path = self.path(name, "first")
                    measure("put 1 kB, the first", do="put", key="a", path=path, size=size)
                if name == PUBLISHED and label == "20 MB" and "off" in place:
                    continue  # to spare time: nothing is compared with it
                path = self.path(name, label)
                measure(f"put {label}", do="put", key="a", path=path, size=size)
                measure(f"read {label}", do="read", key="a", path=path, size=size)
            self.peers[name].ask("shut", key="a")
        self.measure(place, "connect, the first", MITOGEN, "open", context=context)

    def others(self, place: str, context: dict[str, typing.Any]) -> None:
        python = self.host.python_path[0]
        spec = f"popen//python={python}"
        names = [EXECNET]
        if place != "local":
            options = f"-F /dev/null -p {self.host.port} -i {self.host.identity_file}"
            options += " -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
            options += " -o LogLevel=ERROR" + (" -C" if place == "ssh" else "")
            spec = f"ssh={options} {self.host.username}@127.0.0.1//python={python}"
            names.append(ASYNCSSH)
        for name in names:
            how = {"spec": spec} if name == EXECNET else {"context": context}
            self.measure(place, "connect, the first", name, "open", **how)
            self.measure(place, "call: call", name, "call")
            for label, size in SIZES.items():
                path = self.path(name, label)
                self.measure(place, f"put {label}", name, "put", path=path, size=size)
                self.measure(place, f"read {label}", name, "read", path=path, size=size)
            self.peers[name].ask("close")

    def floor(self, place: str, context: dict[str, typing.Any]) -> None:
        source = self.path(OURS, "20 MB")
        target = self.path(SSH, "20 MB")
        self.measure(place, "connect, the first", SSH, "true", context=context)
        self.measure(place, "put 20 MB", SSH, "put", context=context, local=source, path=target)
        size = SIZES["20 MB"]
        self.measure(place, "read 20 MB", SSH, "read", context=context, path=target, size=size)

    def huge(self, place: str, context: dict[str, typing.Any], rounds: int) -> None:
        source, target = self.path("huge", "source"), self.path("huge", "target")
        with open(source, "wb") as file:
            file.truncate(HUGE)
        for _ in range(rounds):
            self.peers[OURS].ask("open", key="a", context=context)
            ask = functools.partial(self.measure, place, name=OURS, do="extra_memory", key="a")
            ask("put_file 200 MB", what="put_file", local=source, path=target)
            ask("get_file 200 MB", what="get_file", path=target, local=source)
            self.peers[OURS].ask("shut", key="a")
        for name in (OURS, PUBLISHED):
            self.peers[name].ask("open", key="a", context=context)
            ask = functools.partial(self.measure, place, name=name, do="extra_memory", key="a")
            for label, size in (("20 MB", SIZES["20 MB"]), ("200 MB", HUGE)):
                ask(f"put {label}, memory", what="put", path=target, size=size)
                if os.path.getsize(target) == size:
                    ask(f"read {label}, memory", what="read", path=target, size=size)
            self.peers[name].ask("shut", key="a")
        os.unlink(source)
        os.unlink(target)

    def connections(self, place: str, context: dict[str, typing.Any]) -> None:
        for count in CONNECTIONS:
            for threads in (1, 8):
                if count == 1 and threads > 1:
                    continue
                how = "one by one" if threads == 1 else f"from {threads} threads"
                for name in (OURS, PUBLISHED):
                    figure = f"{count} connections {how}, each"
                    arguments = {"context": context, "count": count, "threads": threads}
                    self.measure(place, figure, name, "many", **arguments)

    def slow_link(self) -> None:
        relay = f"{sys.executable} {HERE / 'relay.py'} {LATENCY} %h %p"
        place = f"ssh, {2 * LATENCY * 1000:.0f} ms there and back"
        args = ["-F", "/dev/null", "-o", f"ProxyCommand={relay}"]
        context = self.host.serialized(ssh_args=args, compression=False)
        for name in (OURS, PUBLISHED):
            measure = functools.partial(self.measure, place, name=name)
            measure("connect, the first", do="open", key="a", context=context)
            measure("first call, on the first", do="first_call", key="a")
            measure("exists + stat + hash", do="trio", key="a")
            measure("50 calls, one by one", do="one_by_one", key="a", count=50)
            if name == OURS:
                measure(f"{IN_FLIGHT} calls, in flight", do="in_flight", key="a", count=IN_FLIGHT)
            for label, size in SIZES.items():
                path = self.path(name, "slow " + label)
                measure(f"put {label}", do="put", key="a", path=path, size=size)
                measure(f"read {label}", do="read", key="a", path=path, size=size)
            self.peers[name].ask("shut", key="a")

    def imports(self) -> None:
        python = pythons()
        for _ in range(ROUNDS):
            for name, key in ((OURS, "ours"), (PUBLISHED, "published")):
                command = [python[key], str(HERE / "subject.py"), "import"]
                done = subprocess.run(
                    command, check=True, capture_output=True, cwd="/", env=ENVIRONMENT
                )
                seconds = json.loads(done.stdout)["seconds"]
                self.figures.add("agent", "import, beyond inmanta and mitogen", name, seconds)

    def deploys(self) -> None:
        python = pythons()
        for name, key in ((OURS, "ours"), (PUBLISHED, "published")):
            module = self.directory / f"module-{key}"
            files = self.directory / f"files-{key}"
            for directory in (module / "model", module / "tests", files):
                directory.mkdir(parents=True)
            (module / "module.yml").write_text("name: bench\nversion: 1.0\nlicense: none\n")
            (module / "model" / "_init.cf").write_text("")
            shutil.copy(HERE / "deploy.py", module / "tests" / "test_deploy.py")
            result = self.directory / f"result-{key}"
            via = self.host.model()
            job = {"directory": str(files), "count": FILES, "result": str(result), "via": via}
            done = subprocess.run(
                [python[key], "-m", "pytest", "-q", "tests"],
                cwd=module,
                env=ENVIRONMENT
                | {"BENCH_DEPLOY": json.dumps(job), "INMANTA_PIP_USE_SYSTEM_CONFIG": "true"},
                capture_output=True,
                text=True,
            )
            figure = f"deploy {FILES} fs::File"
            if done.returncode:
                lines = done.stdout.strip().splitlines() or [done.stderr]
                self.figures.fail("ssh", figure, name, lines[-1])
            else:
                self.figures.add("ssh", figure, name, json.loads(result.read_text()))

    def run(self) -> None:
        places = self.contexts()
        for number in range(ROUNDS):
            for place, context in places.items():
                print(f"round {number + 1} of {ROUNDS}: {place}", file=sys.stderr, flush=True)
                self.modules(place, context)
                if not place.startswith("sudo"):
                    self.others(place, context)
                if "off" in place:
                    self.floor(place, context)
        print("large contents", file=sys.stderr, flush=True)
        self.huge("ssh, compression off", places["ssh, compression off"], ROUNDS)
        print("many connections", file=sys.stderr, flush=True)
        self.connections("ssh", places["ssh"])
        print("a slow link", file=sys.stderr, flush=True)
        self.slow_link()
        print("imports and deploys", file=sys.stderr, flush=True)
        self.imports()
        self.deploys()

    def profiles(self, missed: list[report.Target]) -> dict[str, str]:
        """Where the time goes in what did not reach its target."""
        profiles = {}
        for target in missed:
            context = self.contexts().get(target.place)
            if context is None or not target.profile:
                continue
            self.peers[OURS].ask("open", key="p", context=context)
            arguments = dict(target.profile)
            if arguments["figure"] in ("put", "read"):
                arguments["path"] = self.path(OURS, "20 MB")
            answer = self.peers[OURS].ask("profile", key="p", **arguments)
            profiles[target.title] = answer if isinstance(answer, str) else json.dumps(answer)
            self.peers[OURS].ask("shut", key="p")
        return profiles


def machine() -> str:
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    ssh = subprocess.run(["ssh", "-V"], capture_output=True, text=True).stderr.strip()
    return (
        f"{when}, {os.cpu_count()} processors ({platform.machine()}), Linux {platform.release()},"
        f" Python {platform.python_version()}, {ssh.split(',')[0]}; load before the run: {load}"
    )


def main() -> None:
    before, start = machine(), time.monotonic()
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(SshHost(config=["Subsystem sftp internal-sftp"]))
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
        bench = Bench(host, pathlib.Path(directory), stack)
        bench.run()
        targets = report.targets(bench.figures, IN_FLIGHT, HUGE)
        profiles = bench.profiles([target for target in targets if not target.met])
    minutes = (time.monotonic() - start) / 60
    text = report.as_text(bench.figures, targets)
    print(text)
    if QUICK:
        return
    about = f"{before}; it took {minutes:.0f} minutes, medians of {ROUNDS} rounds in turn"
    report.write(pathlib.Path("docs"), bench.figures, targets, profiles, about)


if __name__ == "__main__":
    main()
