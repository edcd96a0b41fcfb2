"""
A function beside its handler runs on a host without inmanta, when a real agent has the handler from
the exported model.
"""

import collections.abc
import contextlib
import json
import pathlib
import subprocess
import sys

import pytest
from test_server import METADATA, MODULE, write

import support
from demo.environments import Wheel, derived_environment, pip_settings, source_environment
from demo.orchestrator import LogRecord, Project, Resource
from demo.processes import no_orphans, working_directory
from demo.services import InmantaServer, Postgres

pytestmark = pytest.mark.timeout(600)

METADATA = METADATA.replace("module-odd", "module-beside")

#: A module whose handlers call functions of the files beside them.
BESIDE = {
    "setup.cfg": METADATA,
    "inmanta_plugins/beside/setup.cfg": METADATA,
    "pyproject.toml": MODULE["pyproject.toml"],
    "inmanta_plugins/beside/model/_init.cf": """
        import mitogen

        entity Probe extends std::PurgeableResource:
            string name
        end
        Probe.host [1] -- std::Host
        index Probe(host, name)
        implement Probe using std::none
    """,
    "inmanta_plugins/beside/__init__.py": """
        import inmanta.agent.handler
        import inmanta.resources
        import inmanta_plugins.mitogen.abc
        from inmanta_plugins.beside import needy, remote


        @inmanta.resources.resource("beside::Probe", agent="host.name", id_attribute="name")
        class Probe(inmanta_plugins.mitogen.abc.ResourceABC):
            fields = ("name",)
            name: str


        @inmanta.agent.handler.provider("beside::Probe", name="probe")
        class ProbeHandler(inmanta_plugins.mitogen.abc.HandlerABC[Probe]):
            def read_resource(self, ctx, resource):
                function = {"good": remote.probe, "needy": needy.probe}[resource.name]
                ctx.info("Said: %(said)s", said=self.proxy.remote_call(function))
                raise inmanta.agent.handler.ResourcePurged()

            def create_resource(self, ctx, resource):
                ctx.set_created()
    """,
    "inmanta_plugins/beside/remote.py": """
        from inmanta_plugins.beside import words

        def probe():
            try:
                import inmanta
            except ImportError:
                return words.WITHOUT
            return words.WITH
    """,
    "inmanta_plugins/beside/words.py": """
        WITHOUT = "a host without inmanta"
        WITH = "a host with inmanta"
    """,
    "inmanta_plugins/beside/needy.py": """
        import inmanta.const

        def probe():
            return str(inmanta.const.Change.created)
    """,
}

PROJECT = {
    "project.yml": """
        name: beside
        modulepath: libs
        downloadpath: libs
        install_mode: release
        pip:
          use_system_config: true
    """,
    "requirements.txt": "inmanta-module-beside\n",
}

Deployed = dict[str, tuple[Resource, list[LogRecord]]]


@pytest.fixture(scope="module")
def deployed() -> collections.abc.Iterator[Deployed]:
    """
    What became of the resources, by their names.
    """
    python = support.interpreter_for_everyone()
    assert python is not None
    with contextlib.ExitStack() as stack:
        directory: pathlib.Path = stack.enter_context(working_directory())
        stack.enter_context(no_orphans())
        wheel = Wheel(directory)
        database = stack.enter_context(Postgres(directory / "postgres"))
        server_python = source_environment(directory / "server-env")
        built = wheel.wait()
        write(directory / "beside", BESIDE)
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps"),
                *("--wheel-dir", str(built.parent), str(directory / "beside")),
            ],
            check=True,
        )
        variables = pip_settings(built)
        server = stack.enter_context(
            InmantaServer(directory / "server", database, python=server_python, variables=variables)
        )
        compiler = derived_environment(directory / "compiler-env", directory / "server-env")
        project = Project(directory / "project", compiler, variables)
        client = server.client
        environment = client.create_environment("beside", "beside")
        client.start_agents(environment, ["here"])
        write(directory / "project", {**PROJECT, "main.cf": model(python)})
        project.install()
        project.export(client, environment)
        resources = client.wait(environment, count=2, timeout=120)
        yield {
            resource.value: (resource, client.log(environment, resource.id))
            for resource in resources
        }


def model(python: str) -> str:
    """
    A model with a resource for each of the handlers' functions.
    """
    return f"""
        import mitogen
        import beside

        here = std::Host(
            name="here",
            os=std::linux,
            via=mitogen::Local(name="here", python_path=[{json.dumps(python)}]),
        )
        beside::Probe(host=here, name="good")
        beside::Probe(host=here, name="needy")
    """


def test_a_function_beside_its_handler_runs_on_a_host_without_inmanta(deployed: Deployed) -> None:
    resource, log = deployed["good"]
    assert resource.state == "deployed"
    assert any("Said: a host without inmanta" in str(vars(record)) for record in log)


def test_a_function_whose_file_needs_inmanta_says_what_to_do(deployed: Deployed) -> None:
    resource, log = deployed["needy"]
    assert resource.state == "failed"
    told = " ".join(str(vars(record)) for record in log)
    assert "imports inmanta.const, which hosts do not have. Move it to a file that" in told
