"""
The demo from beginning to end: what it starts, what it deploys, and what has to come of it.
"""

import collections.abc
import contextlib
import dataclasses
import pathlib
import re
import shutil
import sys
import time

import rich.markup

from demo.hosts import login_host, sudo_description
from demo.show import Show
from pytest_inmanta_mitogen import SshHost
from testbed.client import LogRecord, Orchestrator, Project, Resource
from testbed.environments import (
    Wheel,
    derived_environment,
    pip_settings,
    source_environment,
    tutorial_wheel,
)
from testbed.processes import (
    ProcessFailedError,
    ignore_interrupts,
    no_orphans,
    working_directory,
)
from testbed.servers import InmantaServer, Postgres

#: The agents of the model, with how each of them reaches its host.
WAYS = {
    "this-machine": "mitogen::Local",
    "by-ssh": "mitogen::Ssh",
    "by-address": "std::Host with an ip",
    "no-python": "no such python_cmd",
}

#: The agent whose host does not have the interpreter that the model names.
WITHOUT_PYTHON = "no-python"

_DEPLOYED = tuple(agent for agent in WAYS if agent != WITHOUT_PYTHON)

_TYPES = ("fs::File", "exec::Run", "envfile::Variable")

_MODEL = [
    *((agent, type) for agent in _DEPLOYED for type in _TYPES),
    (WITHOUT_PYTHON, "fs::File"),
]

#: The number of resources in the model.
RESOURCES = len(_MODEL)

# How long the deployment may take. In seconds.
_TIMEOUT = 300.0

_HERE = pathlib.Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Kept:
    """
    What is up once all is deployed.

    :attr server: The orchestrator.
    :attr environment: The id of its environment.
    :attr project: Where the model is.
    """

    server: InmantaServer
    environment: str
    project: Project


class UnexpectedOutcomeError(Exception):
    """
    The deployment ended otherwise than it should.
    """

    def __init__(self, problems: collections.abc.Sequence[str]) -> None:
        """
        :param problems: What is wrong, a sentence each.
        """
        super().__init__("\n".join(problems))


class DemoError(Exception):
    """
    Something that the demo needs failed while there were logs to look at.
    """

    def __init__(self, cause: Exception, logs: str) -> None:
        """
        :param cause: What failed.
        :param logs: The ends of the logs.
        """
        super().__init__(str(cause))
        self.logs = logs


def run(
    show: Show,
    when_done: collections.abc.Callable[[Kept], None] = lambda kept: None,
) -> None:
    """
    Run the demo. Whatever it starts is gone when this returns.

    :param show: What shows it.
    :param when_done: Called in the end, with all of it still up.
    :raises UnexpectedOutcomeError: When a resource did not end as it should.
    :raises ProcessFailedError: When a program fails.
    :raises DemoError: When something else fails once there is an orchestrator.
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
        python = source_environment(directory / "server-env")
        variables = {
            **pip_settings(built),
            **agent_variables,
            # That of whoever runs the demo says nothing about its hosts.
            "SSH_CONNECTION": "",
        }
        server = stack.enter_context(
            InmantaServer(directory / "server", database, python=python, variables=variables)
        )
        client = server.client
        version = client.version()
        environment = client.create_environment("demo")
        client.start_agents(environment, WAYS)
        stage.outcome = f"inmanta-core {version} at {server.url}"

    target = directory / "out"
    target.mkdir()
    project = _project(directory, target, host, variables, version)
    try:
        _deploy(show, project, client, environment)
        resources = client.resources(environment)
        deployed = [(each, client.log(environment, each.id)) for each in resources]
        _tell(show, deployed, target)
        problems = problems_of(deployed, target, host)
        name, version = built.name.split("-")[:2]
        if not any(server.directory.rglob(f"{name}-{version}.dist-info")):
            problems.append(f"The agents did not install {built.name}.")
        if problems:
            raise UnexpectedOutcomeError(problems)
    except ProcessFailedError:
        # It comes with the log that matters.
        raise
    except Exception as error:
        raise DemoError(error, server.log_tails()) from error
    show.say(
        f"[bold green]✔[/] {RESOURCES} resources ended as they should, "
        f"{time.monotonic() - begin:.1f} s after the start."
    )
    return Kept(server, environment, project)


def problems_of(
    deployed: collections.abc.Iterable[tuple[Resource, list[LogRecord]]],
    target: pathlib.Path,
    host: SshHost,
) -> list[str]:
    """
    :param deployed: The resources, each with its log.
    :param target: The directory that they were deployed in.
    :param host: The ssh host that they were deployed on.
    :return: What is not as the model says, a sentence each.
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

    if not _interpreter_missed(found.get((WITHOUT_PYTHON, "fs::File"))):
        problems.append(f"The log of the file on {WITHOUT_PYTHON} has no PythonNotFoundError.")
    return problems + _problems_on_disk(target, host)


def wanted_state(agent: str) -> str:
    """
    :param agent: An agent of the model.
    :return: The state that its resources have to end in.
    """
    return "failed" if agent == WITHOUT_PYTHON else "deployed"


def _problems_on_disk(target: pathlib.Path, host: SshHost) -> list[str]:
    problems = []
    for agent in _DEPLOYED:
        content = _read(target / f"{agent}.txt")
        if content != f"Deployed on {agent}.\n":
            problems.append(f"{target / agent}.txt has the content {content!r}.")

        variables = _read(target / f"{agent}.env")
        if variables != "MANAGED_BY=the tutorial's module\n":
            problems.append(f"{target / agent}.env has the content {variables!r}.")

        output = _read(target / f"{agent}.ran")
        words = (output or "").split()
        if not words:
            problems.append(f"The command on {agent} did not run: its output is {output!r}.")
            continue
        by_ssh = {
            "this-machine": words[1:] == [],
            "by-ssh": words[3:] == [host.hostname, str(host.port)],
            # sudo, where it comes in, takes away what tells that it was ssh.
            "by-address": words[1:] == [] or words[3:] == [host.hostname, str(host.port)],
        }
        if not by_ssh[agent]:
            problems.append(f"The command on {agent} was reached in another way: {output!r}.")
    if (target / f"{WITHOUT_PYTHON}.txt").exists():
        problems.append(f"There is a file of {WITHOUT_PYTHON}, where nothing can be deployed.")
    return problems


def _interpreter_missed(found: tuple[Resource, list[LogRecord]] | None) -> bool:
    return found is not None and any(
        re.search(r"PythonNotFoundError.*No such python interpreter on host", record.message, re.S)
        for record in found[1]
    )


def _project(
    directory: pathlib.Path,
    target: pathlib.Path,
    host: SshHost,
    variables: dict[str, str],
    version: str,
) -> Project:
    project = directory / "project"
    project.mkdir()
    for name in ("project.yml", "main.cf"):
        shutil.copy(_HERE / name, project)
    # The file module's newer versions need inmanta-core 15, and do not say so.
    limit = "<1.1.1" if int(version.split(".")[0]) < 15 else ""
    (project / "requirements.txt").write_text(
        "inmanta-module-mitogen\ninmanta-module-envfile\ninmanta-module-exec\n"
        f"inmanta-module-fs{limit}\n"
    )
    known_hosts = directory / "known_hosts"
    known_hosts.write_text(host.known_hosts_line)
    return Project(
        project,
        derived_environment(directory / "compiler-env", directory / "server-env"),
        {
            **variables,
            "DEMO_DIRECTORY": str(target),
            # That of a virtual environment may be one that not every user can run.
            "DEMO_PYTHON": getattr(sys, "_base_executable", sys.executable),
            "DEMO_SSH_USER": host.username,
            "DEMO_SSH_PORT": str(host.port),
            "DEMO_SSH_KEY": host.identity_file,
            "DEMO_SSH_KNOWN_HOSTS": f"UserKnownHostsFile={known_hosts}",
        },
    )


def _deploy(
    show: Show,
    project: Project,
    client: Orchestrator,
    environment: str,
) -> None:
    with show.stage("Installing the modules that the model uses") as stage:
        project.install()
        stage.outcome = "modules mitogen, envfile, fs, exec and std for the compiler"
    with show.stage("Compiling and exporting main.cf"):
        project.export(client, environment)
    with show.stage("Deploying") as stage:

        def progress(resources: list[Resource]) -> None:
            done = sum(resource.final for resource in resources)
            if not done:
                stage.progress("the agents install the modules")
            else:
                stage.progress(f"{done} of {RESOURCES} resources are done")

        client.wait(environment, count=RESOURCES, timeout=_TIMEOUT, progress=progress)
        stage.outcome = f"{RESOURCES} resources on {len(WAYS)} hosts"


def _tell(
    show: Show, deployed: list[tuple[Resource, list[LogRecord]]], target: pathlib.Path
) -> None:
    show.say()
    show.resources(deployed, ways=WAYS, wanted_state=wanted_state, directory=str(target))
    show.say(f"[dim]… is {target}; by-address goes over ssh, with {sudo_description()}.[/]")
    show.say()
    for path in sorted(target.iterdir()):
        text = rich.markup.escape((_read(path) or "").strip())
        show.say(f"  [bold]{path.name}[/]  [dim]{text}[/]")
    show.say()


def _read(path: pathlib.Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None
