"""
What a real orchestrator, with its database and its agents, makes of remote calls and their logs.
"""

import contextlib
import json

import pytest

import support
from testbed.client import LogRecord, Resource
from testbed.environments import CHECKOUT, Wheel, pip_settings
from testbed.processes import no_orphans, working_directory
from testbed.servers import Postgres, orchestrator

pytestmark = pytest.mark.timeout(600)

VALUES = {
    "nul": r"'a\x00b'",
    "surrogate": r"'a\ud800b'",
    "nan": "[float('nan'), float('inf')]",
    "tuple-keys": "{(1, 2): 3, None: 4}",
    "bytes": r"b'\x00\xff'",
}
"""Values that a handler passes to a function on the host, as expressions."""

FUNCTIONS = {"good": "remote.probe", "needy": "needy.probe"}
"""Functions in files beside the handler."""

MODULE = {
    "model/_init.cf": """
        import mitogen

        entity Probe extends std::PurgeableResource:
            string name
            string expression
        end
        Probe.host [1] -- std::Host
        index Probe(host, name)
        implement Probe using std::none
    """,
    "inmanta_plugins/probe/__init__.py": """
        import contextlib
        import copy

        import inmanta.agent.handler
        import inmanta.resources
        import inmanta_plugins.mitogen.abc
        from inmanta_plugins.probe import needy, remote


        @inmanta.resources.resource("probe::Probe", agent="host.name", id_attribute="name")
        class Probe(inmanta_plugins.mitogen.abc.ResourceABC):
            fields = ("name", "expression")
            name: str
            expression: str


        @inmanta.agent.handler.provider("probe::Probe", name="probe")
        class ProbeHandler(inmanta_plugins.mitogen.abc.HandlerABC[Probe]):
            def read_resource(self, ctx, resource):
                value = eval(resource.expression)
                if callable(value):
                    ctx.info("Said: %(said)s", said=self.proxy.remote_call(value))
                else:
                    self.proxy.remote_call(copy.copy, value)
                    with contextlib.suppress(Exception):
                        self.proxy.remote_call(copy.copy, value, value, a=value)
                raise inmanta.agent.handler.ResourcePurged()

            def create_resource(self, ctx, resource):
                ctx.set_created()
    """,
    "inmanta_plugins/probe/remote.py": """
        from inmanta_plugins.probe import words

        def probe():
            try:
                import inmanta
            except ImportError:
                return words.WITHOUT
            return words.WITH
    """,
    "inmanta_plugins/probe/words.py": """
        WITHOUT = "a host without inmanta"
        WITH = "a host with inmanta"
    """,
    "inmanta_plugins/probe/needy.py": """
        import inmanta.const

        def probe():
            return str(inmanta.const.Change.created)
    """,
}
"""The files of a module whose handler calls functions with odd values, and functions of its own. It
is packaged as that of the tutorial."""

Deployed = dict[str, tuple[Resource, list[LogRecord]]]
"""Of each resource, by its name, what became of it, and its log."""


def model(python: str) -> str:
    """Return the model: this machine, which runs calls with that interpreter, and its resources."""
    here = f'mitogen::Local(name="here", python_path=[{json.dumps(python)}])'
    resources = [
        f'probe::Probe(host=here, name="{name}", expression=r"{text}")'
        for name, text in (VALUES | FUNCTIONS).items()
    ]
    host = f'here = std::Host(name="here", os=std::linux, via={here})'
    return "\n".join(["import mitogen", "import probe", host, *resources, ""])


@pytest.fixture(scope="module")
def deployed() -> Deployed:
    """
    What became of a resource for each value and function. Its agent installs the module, and this
    one, from wheels. A value is in the arguments and in the result of a call, and in the arguments
    of a call that raises an exception.
    """
    python = support.interpreter_for_everyone()
    assert python is not None
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(working_directory())
        stack.enter_context(no_orphans())
        support.write_files(directory / "source", files_of_module())
        wheels = [
            Wheel(directory, source=directory / "source", name="inmanta-module-probe"),
            Wheel(directory),
        ]
        database = stack.enter_context(Postgres(directory / "postgres"))
        *_, built = [wheel.wait() for wheel in wheels]
        server, project = stack.enter_context(
            orchestrator(directory, database, pip_settings(built))
        )
        environment = server.client.create_environment("probe")
        server.client.start_agents(environment, ["here"])
        project.write(model(python), "inmanta-module-probe")
        project.install()
        project.export(server.client, environment)
        count = len(VALUES | FUNCTIONS)
        resources = server.client.wait(environment, count=count, timeout=120)
        print(server.log_tails())
        # Not from the environment of these tests.
        assert list(server.directory.rglob(f"{built.name.split('-py3')[0]}.dist-info"))
        return {each.value: (each, server.client.log(environment, each.id)) for each in resources}


def files_of_module() -> dict[str, str]:
    """Return the files of the module, with those that package it."""
    tutorial = CHECKOUT / "docs" / "tutorial" / "envfile"
    return MODULE | {
        name: (tutorial / name).read_text().replace("envfile", "probe")
        for name in ("setup.cfg", "pyproject.toml", "MANIFEST.in")
    }


@pytest.mark.parametrize("name", VALUES)
def test_a_resource_whose_calls_have_odd_values_is_deployed_and_logged(
    deployed: Deployed, name: str
) -> None:
    resource, log = deployed[name]
    calls = [record.call for record in log if record.call]

    assert resource.state == "deployed"
    # An agent that is slow to start may deploy it a second time.
    functions = ["copy.copy", "copy.copy"] * (len(calls) // 2)
    assert [call.function for call in calls] == functions
    returned, raised = calls[:2]
    assert returned.exception is None
    assert returned.result == returned.args[0]
    assert raised.exception is not None
    assert raised.args[0] == returned.args[0]
    assert raised.kwargs == {"a": returned.args[0]}


def test_a_function_beside_its_handler_runs_on_a_host_without_inmanta(deployed: Deployed) -> None:
    resource, log = deployed["good"]
    assert resource.state == "deployed"
    assert any("Said: a host without inmanta" in str(vars(record)) for record in log)


def test_a_function_whose_file_needs_inmanta_says_what_to_do(deployed: Deployed) -> None:
    resource, log = deployed["needy"]
    assert resource.state == "failed"
    told = " ".join(str(vars(record)) for record in log)
    assert "imports inmanta, which" in told
