"""
What a real orchestrator, with its database and its agents, makes of the logs of remote calls.
"""

import sys

import pytest
from orchestrator.deployment import Deployed, deploy, host

pytestmark = pytest.mark.timeout(600)

#: Values that a handler passes to a function on the host, as expressions.
VALUES = {
    "nul": r"'a\x00b'",
    "surrogate": r"'a\ud800b'",
    "nan": "[float('nan'), float('inf')]",
    "tuple-keys": "{(1, 2): 3, None: 4}",
    "bytes": r"b'\x00\xff'",
}

#: A module whose handler calls functions with odd values.
MODULE = {
    "model/_init.cf": """
        import mitogen

        entity Value extends std::PurgeableResource:
            string name
            string expression
        end
        Value.host [1] -- std::Host
        index Value(host, name)
        implement Value using std::none
    """,
    "__init__.py": """
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


@pytest.fixture(scope="module")
def deployed() -> Deployed:
    """
    What became of a resource for each of the values. Its handler has the value in the arguments and
    in the result of a call, and in the arguments of a call that raises an exception.
    """
    values = [
        f'odd::Value(host=here, name="{name}", expression=r"{text}")'
        for name, text in VALUES.items()
    ]
    return deploy("odd", MODULE, "\n".join([host(sys.executable), *values, ""]))


@pytest.mark.parametrize("name", VALUES)
def test_a_resource_whose_calls_have_odd_values_is_deployed_and_logged(
    deployed: Deployed, name: str
) -> None:
    resource, log = deployed[name]
    calls = [record.call for record in log if record.call]

    assert resource.state == "deployed"
    assert [call.function for call in calls] == ["copy.copy", "copy.copy"]
    returned, raised = calls
    assert returned.exception is None
    assert returned.result == returned.args[0]
    assert raised.exception is not None
    assert raised.args[0] == returned.args[0]
    assert raised.kwargs == {"a": returned.args[0]}


@pytest.mark.parametrize(("name", "told"), [("nul", "b"), ("surrogate", "d800"), ("nan", "nan")])
def test_what_is_logged_of_an_odd_value_tells_what_it_was(
    deployed: Deployed, name: str, told: str
) -> None:
    _, log = deployed[name]
    first = next(record.call for record in log if record.call)
    assert told in str(first.args[0])
