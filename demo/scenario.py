"""
The demo from beginning to end: what it starts, what it deploys, and what has to come of it.
"""

import collections.abc
import contextlib
import dataclasses
import pathlib
import re
import sys
import time

import rich.markup

from demo.hosts import login_host, sudo_description
from demo.show import Show
from pytest_inmanta_mitogen import SshHost
from testbed.client import LogRecord, Project, Resource
from testbed.environments import Wheel, pip_settings, tutorial_wheel
from testbed.processes import ProcessFailedError, ignore_interrupts, no_orphans, working_directory
from testbed.servers import InmantaServer, Postgres, orchestrator

WAYS = {
    "this-machine": "mitogen::Local",
    "by-ssh": "mitogen::Ssh",
    "by-address": "std::Host with an ip",
    "no-python": "no such python_cmd",
}
"""The agents of the model, with how each of them reaches its host."""

WITHOUT_PYTHON = "no-python"
"""The agent whose host does not have the interpreter that the model names."""

_DEPLOYED = tuple(agent for agent in WAYS if agent != WITHOUT_PYTHON)

_TYPES = ("fs::File", "exec::Run", "envfile::Variable")

_MODEL = [
    *((agent, type) for agent in _DEPLOYED for type in _TYPES),
    (WITHOUT_PYTHON, "fs::File"),
]

RESOURCES = len(_MODEL)
"""The number of resources in the model."""

# How long the deployment may take. In seconds.
_TIMEOUT = 300.0


@dataclasses.dataclass(frozen=True)
class Kept:
    """What is up once all is deployed."""

    server: InmantaServer
    """The orchestrator."""
    environment: str
    """The id of its environment."""
    project: Project
    """Where the model is."""


class DemoError(Exception):
    """
    Something that the demo needs failed, or a resource did not end as it should, while there were
    logs to look at.

    :param what: What failed.
    :param output: The ends of the logs.
    """

    def __init__(self, what: str, output: str) -> None:
        super().__init__(what)
        self.output = output


def run(show: Show, when_done: collections.abc.Callable[[Kept], None]) -> None:
    """
    Run the demo. Whatever it starts is gone when this returns.

    :param show: What shows it.
    :param when_done: Called in the end, with all of it still up.
    :raises ProcessFailedError: When a program fails.
    :raises DemoError: When a resource did not end as it should, or something else fails once there
        is an orchestrator.
    """
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(working_directory())
        # Before the directory goes, so must all those that may still write to it.
        stack.enter_context(no_orphans())
        try:
            when_done(_deploy_all(show, stack, directory))
        except BaseException:
            ignore_interrupts()
            show.say("[dim]  Cleaning up ...[/]")
            raise
        ignore_interrupts()
        with show.stage("Cleaning up") as stage:
            stack.close()
            stage.outcome = "Nothing is left of it"


def _deploy_all(show: Show, stack: contextlib.ExitStack, directory: pathlib.Path) -> Kept:
    begin = time.monotonic()
    # Both go on while the rest starts.
    wheel = Wheel(directory)
    tutorial = tutorial_wheel(directory)

    with show.stage("Starting PostgreSQL") as stage:
        database = stack.enter_context(Postgres(directory / "postgres"))
        stage.outcome = f"PostgreSQL {database.version}, from a wheel"

    with show.stage("Starting a throwaway ssh host") as stage:
        (directory / "ssh").mkdir()
        host, agent_variables = stack.enter_context(login_host(directory / "ssh"))
        stage.outcome = f"ssh host for {host.username} at {host.hostname}:{host.port}"

    with show.stage("Building this module's wheel, and the tutorial's") as stage:
        built = wheel.wait()
        stage.outcome = f"{built.name}, {tutorial.wait().name}"

    with show.stage("Starting an orchestrator") as stage:
        variables = pip_settings(built) | agent_variables | _variables(directory, host)
        server, project = stack.enter_context(orchestrator(directory, database, variables))
        environment = server.client.create_environment("demo")
        server.client.start_agents(environment, WAYS)
        stage.outcome = f"inmanta-core {server.client.version()} at {server.url}"

    kept = Kept(server, environment, project)
    try:
        _deploy(show, kept)
        problems = _outcome(show, kept, directory / "out", host)
        name, version = built.name.split("-")[:2]
        if not any(server.directory.rglob(f"{name}-{version}.dist-info")):
            problems.append(f"The agents did not install {built.name}.")
    except ProcessFailedError:
        # It comes with the log that matters.
        raise
    except Exception as error:
        raise DemoError(str(error), server.log_tails()) from error
    if problems:
        raise DemoError("\n".join(problems), server.log_tails())
    show.say(
        f"[bold green]✔[/] {RESOURCES} resources ended as they should, "
        f"{time.monotonic() - begin:.1f} s after the start."
    )
    return kept


def problems_of(
    deployed: collections.abc.Iterable[tuple[Resource, list[LogRecord]]],
    target: pathlib.Path,
    host: SshHost,
) -> list[str]:
    """
    Return what is not as the model says, a sentence each.

    :param deployed: The resources, each with its log.
    :param target: The directory that they were deployed in.
    :param host: The ssh host that they were deployed on.
    """
    problems = []
    found = {(each.agent, each.type): (each, log) for each, log in deployed}
    wanted = {(agent, type): wanted_state(agent) for agent, type in _MODEL}
    if found.keys() != wanted.keys():
        problems.append(f"There are resources for {sorted(found)}, not for {sorted(wanted)}.")
    for key, state in wanted.items():
        if key not in found:
            continue
        resource, log = found[key]
        if resource.state != state:
            problems.append(f"{resource.id} is {resource.state}, not {state}.")
        elif state == "deployed" and not any(record.call for record in log):
            problems.append(f"The log of {resource.id} has no calls.")

    _, log = found.get((WITHOUT_PYTHON, "fs::File"), (None, []))
    missing = r"PythonNotFoundError.*No such python interpreter on host"
    if not any(re.search(missing, record.message, re.S) for record in log):
        problems.append(f"The log of the file on {WITHOUT_PYTHON} has no PythonNotFoundError.")
    return problems + _problems_on_disk(target, host)


def wanted_state(agent: str) -> str:
    """
    Return the state that its resources have to end in.

    :param agent: An agent of the model.
    """
    return "failed" if agent == WITHOUT_PYTHON else "deployed"


def _problems_on_disk(target: pathlib.Path, host: SshHost) -> list[str]:
    problems = []
    over_ssh = [host.hostname, str(host.port)]
    ways: dict[str, list[list[str]]] = {
        "this-machine": [[]],
        "by-ssh": [over_ssh],
        # sudo, where it comes in, takes away what tells that it was ssh.
        "by-address": [[], over_ssh],
    }
    for agent in _DEPLOYED:
        contents = {"txt": f"Deployed on {agent}.\n", "env": "MANAGED_BY=the tutorial's module\n"}
        for suffix, wanted in contents.items():
            content = _read(target / f"{agent}.{suffix}")
            if content != wanted:
                problems.append(f"{target / agent}.{suffix} has the content {content!r}.")
        output = _read(target / f"{agent}.ran")
        # The user, and the addresses and ports of the ssh client and server.
        words = (output or "").split()
        if not words or words[3:] not in ways[agent]:
            problems.append(f"The command on {agent} did not run in its way: {output!r}.")
    if (target / f"{WITHOUT_PYTHON}.txt").exists():
        problems.append(f"There is a file of {WITHOUT_PYTHON}, where nothing can be deployed.")
    return problems


def _variables(directory: pathlib.Path, host: SshHost) -> dict[str, str]:
    """Return the environment variables that the model reads."""
    (directory / "out").mkdir()
    known_hosts = directory / "known_hosts"
    known_hosts.write_text(host.known_hosts_line)
    return {
        "DEMO_DIRECTORY": str(directory / "out"),
        # That of a virtual environment may be one that not every user can run.
        "DEMO_PYTHON": getattr(sys, "_base_executable", sys.executable),
        "DEMO_SSH_USER": host.username,
        "DEMO_SSH_PORT": str(host.port),
        "DEMO_SSH_KEY": host.identity_file,
        "DEMO_SSH_KNOWN_HOSTS": f"UserKnownHostsFile={known_hosts}",
        # That of whoever runs the demo says nothing about its hosts.
        "SSH_CONNECTION": "",
    }


def _deploy(show: Show, kept: Kept) -> None:
    client = kept.server.client
    with show.stage("Installing the modules that the model uses") as stage:
        # The file module's newer versions need inmanta-core 15, and do not say so.
        limit = "<1.1.1" if int(client.version().split(".")[0]) < 15 else ""
        packages = [f"inmanta-module-{name}" for name in ("mitogen", "envfile", "exec")]
        model = pathlib.Path(__file__).with_name("main.cf").read_text()
        kept.project.write(model, *packages, f"inmanta-module-fs{limit}")
        kept.project.install()
        stage.outcome = "modules mitogen, envfile, fs, exec and std for the compiler"
    with show.stage("Compiling and exporting main.cf"):
        kept.project.export(client, kept.environment)
    with show.stage("Deploying") as stage:

        def progress(resources: list[Resource]) -> None:
            done = sum(resource.final for resource in resources)
            text = f"{done} of {RESOURCES} resources are done"
            stage.progress(text if done else "the agents install the modules")

        client.wait(kept.environment, count=RESOURCES, timeout=_TIMEOUT, progress=progress)
        stage.outcome = f"{RESOURCES} resources on {len(WAYS)} hosts"


def _outcome(show: Show, kept: Kept, target: pathlib.Path, host: SshHost) -> list[str]:
    """
    Show what became of the resources.

    :return: What is not as it should be, a sentence each.
    """
    client = kept.server.client
    resources = client.resources(kept.environment)
    deployed = [(each, client.log(kept.environment, each.id)) for each in resources]
    show.say()
    show.resources(deployed, ways=WAYS, wanted_state=wanted_state, directory=str(target))
    show.say(f"[dim]… is {target}; by-address goes over ssh, with {sudo_description()}.[/]")
    show.say()
    for path in sorted(target.iterdir()):
        text = rich.markup.escape((_read(path) or "").strip())
        show.say(f"  [bold]{path.name}[/]  [dim]{text}[/]")
    show.say()
    return problems_of(deployed, target, host)


def _read(path: pathlib.Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None
