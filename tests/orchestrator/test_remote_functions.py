"""
A function beside its handler runs on a host without inmanta, when a real agent has the handler from
the exported model.
"""

import pytest
from orchestrator.deployment import Deployed, deploy, host

import support

pytestmark = pytest.mark.timeout(600)

#: A module whose handlers call functions of the files beside them.
BESIDE = {
    "model/_init.cf": """
        import mitogen

        entity Probe extends std::PurgeableResource:
            string name
        end
        Probe.host [1] -- std::Host
        index Probe(host, name)
        implement Probe using std::none
    """,
    "__init__.py": """
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
    "remote.py": """
        from inmanta_plugins.beside import words

        def probe():
            try:
                import inmanta
            except ImportError:
                return words.WITHOUT
            return words.WITH
    """,
    "words.py": """
        WITHOUT = "a host without inmanta"
        WITH = "a host with inmanta"
    """,
    "needy.py": """
        import inmanta.const

        def probe():
            return str(inmanta.const.Change.created)
    """,
}


@pytest.fixture(scope="module")
def deployed() -> Deployed:
    """
    What became of a resource for each of the handlers' functions.
    """
    python = support.interpreter_for_everyone()
    assert python is not None
    probes = [f'beside::Probe(host=here, name="{name}")' for name in ("good", "needy")]
    return deploy("beside", BESIDE, "\n".join([host(python), *probes, ""]))


def test_a_function_beside_its_handler_runs_on_a_host_without_inmanta(deployed: Deployed) -> None:
    resource, log = deployed["good"]
    assert resource.state == "deployed"
    assert any("Said: a host without inmanta" in str(vars(record)) for record in log)


def test_a_function_whose_file_needs_inmanta_says_what_to_do(deployed: Deployed) -> None:
    resource, log = deployed["needy"]
    assert resource.state == "failed"
    told = " ".join(str(vars(record)) for record in log)
    assert "imports inmanta, which" in told
