"""
What a real orchestrator, with its database and its agents, makes of a module and a model.
"""

import collections.abc
import contextlib
import json
import pathlib
import subprocess
import sys
import textwrap

from testbed.client import LogRecord, Project, Resource
from testbed.environments import Wheel, derived_environment, pip_settings, source_environment
from testbed.processes import no_orphans, working_directory
from testbed.servers import InmantaServer, Postgres

#: Of each resource what became of it, and its log; by the values of their identifying attributes.
Deployed = dict[str, tuple[Resource, list[LogRecord]]]

_METADATA = """
    [metadata]
    name = inmanta-module-{name}
    version = 1.0.0
    license = Apache 2.0

    [options]
    packages = find_namespace:
    install_requires = inmanta-module-mitogen

    [options.package_data]
    * = model/*.cf, setup.cfg
"""

_BUILD = """
    [build-system]
    requires = ["setuptools>=65", "wheel"]
    build-backend = "setuptools.build_meta"
"""

_PROJECT = """
    name: {name}
    modulepath: libs
    downloadpath: libs
    install_mode: release
    pip:
      use_system_config: true
"""


def host(python: str) -> str:
    """
    :param python: The path of an interpreter of this machine.
    :return: The part of a model that has this machine as ``here``.
    """
    return textwrap.dedent(
        f"""
        import mitogen

        here = std::Host(
            name="here",
            os=std::linux,
            via=mitogen::Local(name="here", python_path=[{json.dumps(python)}]),
        )
        """
    )


def deploy(name: str, module: collections.abc.Mapping[str, str], model: str) -> Deployed:
    """
    Have resources of a module deployed by an agent that installs it, and this module, from wheels.

    :param name: The module's name.
    :param module: The texts of the files of ``inmanta_plugins.NAME``, by their paths there.
    :param model: The model; each line that begins with the module's name is a resource. Its host is
        ``here``.
    :return: What became of the resources.
    """
    metadata = _METADATA.format(name=name)
    sources = {f"inmanta_plugins/{name}/{path}": text for path, text in module.items()}
    sources |= {"setup.cfg": metadata, f"inmanta_plugins/{name}/setup.cfg": metadata}
    sources |= {"pyproject.toml": _BUILD}
    project_files = {
        "project.yml": _PROJECT.format(name=name),
        "requirements.txt": f"inmanta-module-{name}\n",
        "main.cf": f"import {name}\n{model}",
    }
    count = sum(line.startswith(f"{name}::") for line in model.splitlines())
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(working_directory())
        stack.enter_context(no_orphans())
        wheel = Wheel(directory)
        database = stack.enter_context(Postgres(directory / "postgres"))
        python = source_environment(directory / "server-env")
        built = wheel.wait()
        _write(directory / name, sources)
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps"),
                *("--wheel-dir", str(built.parent), str(directory / name)),
            ],
            check=True,
        )
        variables = pip_settings(built)
        server = stack.enter_context(
            InmantaServer(directory / "server", database, python=python, variables=variables)
        )
        compiler = derived_environment(directory / "compiler-env", directory / "server-env")
        project = Project(directory / "project", compiler, variables)
        client = server.client
        environment = client.create_environment(name)
        client.start_agents(environment, ["here"])
        _write(project.directory, project_files)
        project.install()
        project.export(client, environment)
        resources = client.wait(environment, count=count, timeout=120)
        if any(resource.state != "deployed" for resource in resources):
            print(server.log_tails())
        return {
            resource.value: (resource, client.log(environment, resource.id))
            for resource in resources
        }


def _write(directory: pathlib.Path, files: collections.abc.Mapping[str, str]) -> None:
    """
    Write files, given by their paths, without the indentation that their texts have in common.
    """
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip())
