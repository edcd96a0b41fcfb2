"""
What a real orchestrator takes to deploy files on many hosts, with either module.
"""

import collections.abc
import contextlib
import dataclasses
import datetime
import json
import pathlib
import statistics
import sys
import time

import psutil

from pytest_inmanta_mitogen import SshHost
from testbed.environments import Wheel, pip_settings
from testbed.servers import Postgres, orchestrator

_HERE = """
import fs
import mitogen

here = std::Host(name="here", os=std::linux, via=mitogen::Local(name="here"))
fs::File(host=here, path="{target}/here", mode=644, content="x")
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """What to deploy."""

    hosts: int
    """On how many hosts."""
    files: int
    """How many files on each."""
    relay: str | None
    """The ssh ProxyCommand that makes the hosts distant, or None."""


class Orchestration:
    """
    An orchestrator that uses one version of the module. Use it as a context manager.

    :param directory: An empty directory with a short path.
    :param host: What all the hosts are.
    :param published: The published version to use, or None for that of this checkout.
    """

    def __init__(self, directory: pathlib.Path, host: SshHost, published: str | None) -> None:
        self._directory, self._host = directory, host
        self._wheel = Wheel(directory, published)
        self._stack = contextlib.ExitStack()
        self._runs = 0

    def __enter__(self) -> "Orchestration":
        database = self._stack.enter_context(Postgres(self._directory / "postgres"))
        variables = pip_settings(self._wheel.wait())
        self._server, self._project = self._stack.enter_context(
            orchestrator(self._directory, database, variables)
        )
        modules = ("inmanta-module-mitogen", "inmanta-module-fs")
        self._project.write("import fs\nimport mitogen\n", *modules)
        self._project.install()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def measure(self, job: Job) -> dict[str, float]:
        """
        Deploy the files, and then all of them again.

        :return: Seconds, bytes and numbers, by what they are.
        """
        self._runs += 1
        target = self._directory / f"files-{self._runs}"
        target.mkdir()
        client, count = self._server.client, job.hosts * job.files
        environment = client.create_environment(f"run-{self._runs}")
        names = [f"host{number}" for number in range(job.hosts)]
        client.start_agents(environment, ["here", *names])
        # The agents' process is up, with the modules installed, before the clock runs.
        here = _HERE.format(target=target)
        self._export(environment, here, 1)
        before = self._processor_time()
        since = self._export(environment, here + self._model(job, target), count + 1)
        first = client.deployments(environment, "fs::File", since)
        assert len(list(target.iterdir())) == count + 1
        held = {
            "processor time of the agents": self._processor_time() - before,
            "memory of the agents": float(sum(p.memory_full_info().uss for p in self._agents())),
            "threads of the agents": float(sum(p.num_threads() for p in self._agents())),
        }
        since = _now()
        client.repair(environment)
        deadline = time.monotonic() + 300
        while len(again := client.deployments(environment, "fs::File", since)) <= count:
            if time.monotonic() > deadline:
                raise RuntimeError(f"Only {len(again)} of {count} files were repaired")
            time.sleep(0.5)
        client.delete_environment(environment)
        return {**_times("first deploy", first), **_times("repair", again), **held}

    def _export(self, environment: str, model: str, count: int) -> str:
        """
        Have a model deployed.

        :return: When it began, by the server's clock, which is this machine's.
        """
        (self._project.directory / "main.cf").write_text(model)
        since = _now()
        client = self._server.client
        self._project.export(client, environment)
        resources = client.wait(environment, count=count, timeout=300)
        if bad := [each.id for each in resources if each.state != "deployed"]:
            raise RuntimeError(f"{len(bad)} of {count} files were not deployed, e.g. {bad[0]}")
        return since

    def _model(self, job: Job, target: pathlib.Path) -> str:
        lines = []
        for number in range(job.hosts):
            # What tells one host from the other: all of them are one machine.
            ssh_args = ["-F", "/dev/null", "-o", f"HostKeyAlias=host{number}"]
            if job.relay:
                ssh_args += ["-o", f"ProxyCommand={job.relay}"]
            via = self._host.model(ssh_args=ssh_args)
            python = json.dumps(self._host.python_path)
            via = f'mitogen::Sudo(username="root", python_path={python}, via={via})'
            name = f"host{number}"
            lines.append(f'{name} = std::Host(name="{name}", os=std::linux, via={via})')
            lines += [
                f'fs::File(host={name}, path="{target}/{number}-{file}", mode=644, content="x")'
                for file in range(job.files)
            ]
        return "\n".join([*lines, ""])

    def _agents(self) -> list[psutil.Process]:
        """Return the processes that run the handlers, as inmanta-core 15 and later have them."""
        found = []
        for process in self._server.descendants():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "executor process" in process.cmdline()[0]:
                    found.append(process)
        return found

    def _processor_time(self) -> float:
        times = [process.cpu_times() for process in self._agents()]
        return sum(each.user + each.system for each in times)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat()


def _times(
    name: str, runs: collections.abc.Sequence[tuple[datetime.datetime, datetime.datetime]]
) -> dict[str, float]:
    whole = max(end for _, end in runs) - min(start for start, _ in runs)
    each = statistics.median((end - start).total_seconds() for start, end in runs)
    return {name: whole.total_seconds(), f"{name}, median of one file": each}


def relay(seconds: float) -> str:
    """Return an ssh ProxyCommand that delays what it carries, each way."""
    return f"{sys.executable} {pathlib.Path(__file__).with_name('relay.py')} {seconds} %h %p"
