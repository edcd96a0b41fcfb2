"""
What a real orchestrator, with its database and its agents, makes of the logs of remote calls.
"""

import collections.abc
import contextlib
import json
import pathlib
import subprocess
import sys
import textwrap
import typing

import pytest

from demo.environments import Wheel, derived_environment, pip_settings, source_environment
from demo.orchestrator import Call, Project
from demo.processes import no_orphans, working_directory
from demo.services import InmantaServer, Postgres

pytestmark = pytest.mark.timeout(600)

#: Values that a handler passes to a function on the host, as expressions.
VALUES = {
    "nul": r"'a\x00b'",
    "surrogate": r"'a\ud800b'",
    "nan": "[float('nan'), float('inf')]",
    "tuple-keys": "{(1, 2): 3, None: 4}",
    "bytes": r"b'\x00\xff'",
}

PROJECT = {
    "project.yml": """
        name: odd-values
        modulepath: libs
        downloadpath: libs
        install_mode: release
        pip:
          use_system_config: true
    """,
    "requirements.txt": """
        inmanta-module-odd
    """,
}

METADATA = """
    [metadata]
    name = inmanta-module-odd
    version = 1.0.0
    license = Apache 2.0

    [options]
    packages = find_namespace:
    install_requires = inmanta-module-mitogen

    [options.package_data]
    * = model/*.cf, setup.cfg
"""

#: The sources of a module whose handler calls functions with odd values.
MODULE = {
    "setup.cfg": METADATA,
    "inmanta_plugins/odd/setup.cfg": METADATA,
    "pyproject.toml": """
        [build-system]
        requires = ["setuptools>=65", "wheel"]
        build-backend = "setuptools.build_meta"
    """,
    "inmanta_plugins/odd/model/_init.cf": """
        import mitogen

        entity Value extends std::PurgeableResource:
            string name
            string expression
        end
        Value.host [1] -- std::Host
        index Value(host, name)
        implement Value using std::none
    """,
    "inmanta_plugins/odd/__init__.py": """
        import copy

        import inmanta.agent.handler
        import inmanta.resources
        import inmanta_plugins.mitogen.abc


        @inmanta.resources.resource("odd::Value", agent="host.name", id_attribute="name")
        class Value(inmanta_plugins.mitogen.abc.ResourceABC):
            fields = ("name", "expression")
            name: str
            expression: str


        @inmanta.agent.handler.provider("odd::Value", name="odd")
        class ValueHandler(inmanta_plugins.mitogen.abc.HandlerABC[Value]):
            def read_resource(self, ctx, resource):
                value = eval(resource.expression)
                self.proxy.remote_call(copy.copy, value)
                try:
                    self.proxy.remote_call(copy.copy, value, value, **{"a": value})
                except Exception:
                    ctx.info("Refused, as it should be")
                raise inmanta.agent.handler.ResourcePurged()

            def create_resource(self, ctx, resource):
                ctx.set_created()
    """,
}


class Deployed(typing.NamedTuple):
    """
    A resource that was deployed, or was meant to be.
    """

    state: str
    calls: list[Call]


@pytest.fixture(scope="module")
def orchestrator() -> collections.abc.Iterator[tuple[InmantaServer, Project]]:
    """
    An orchestrator whose agents install this module's wheel, and an empty project for it.
    """
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(working_directory())
        stack.enter_context(no_orphans())
        wheel = Wheel(directory)
        database = stack.enter_context(Postgres(directory / "postgres"))
        python = source_environment(directory / "server-env")
        built = wheel.wait()
        write(directory / "odd", MODULE)
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps"),
                *("--wheel-dir", str(built.parent), str(directory / "odd")),
            ],
            check=True,
        )
        variables = pip_settings(built)
        server = stack.enter_context(
            InmantaServer(directory / "server", database, python=python, variables=variables)
        )
        compiler = derived_environment(directory / "compiler-env", directory / "server-env")
        (directory / "project").mkdir()
        yield server, Project(directory / "project", compiler, variables)


@pytest.fixture(scope="module")
def deployed(orchestrator: tuple[InmantaServer, Project]) -> dict[str, Deployed]:
    """
    What became of a resource for each of the values. Its handler has the value in the arguments and
    in the result of a call, and in the arguments of a call that raises an exception.
    """
    server, project = orchestrator
    client = server.client
    environment = client.create_environment("odd", "odd")
    client.start_agents(environment, ["here"])
    write(project.directory, {**PROJECT, "main.cf": model()})
    project.install()
    project.export(client, environment)
    resources = client.wait(environment, count=len(VALUES), timeout=120)
    if any(resource.state != "deployed" for resource in resources):
        print(server.log_tails())
    return {
        resource.value: Deployed(
            resource.state,
            [record.call for record in client.log(environment, resource.id) if record.call],
        )
        for resource in resources
    }


def model() -> str:
    """
    A model with a resource for each of the values, on this machine.
    """
    host = f"""
        import mitogen
        import odd

        here = std::Host(
            name="here",
            os=std::linux,
            via=mitogen::Local(name="here", python_path=[{json.dumps(sys.executable)}]),
        )
    """
    values = [
        f'odd::Value(host=here, name="{name}", expression=r"{text}")'
        for name, text in VALUES.items()
    ]
    return "\n".join([textwrap.dedent(host), *values, ""])


def write(directory: pathlib.Path, files: dict[str, str]) -> None:
    """
    Write files, given by their paths, without the indentation that their texts have in common.
    """
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip())


@pytest.mark.parametrize("name", VALUES)
def test_a_resource_whose_calls_have_odd_values_is_deployed_and_logged(
    deployed: dict[str, Deployed], name: str
) -> None:
    state, calls = deployed[name]

    assert state == "deployed"
    assert [call.function for call in calls] == ["copy.copy", "copy.copy"]
    returned, raised = calls
    assert returned.exception is None
    assert returned.result == returned.args[0]
    assert raised.exception is not None
    assert raised.args[0] == returned.args[0]
    assert raised.kwargs == {"a": returned.args[0]}


@pytest.mark.parametrize(("name", "told"), [("nul", "b"), ("surrogate", "d800"), ("nan", "nan")])
def test_what_is_logged_of_an_odd_value_tells_what_it_was(
    deployed: dict[str, Deployed], name: str, told: str
) -> None:
    assert told in str(deployed[name].calls[0].args[0])
