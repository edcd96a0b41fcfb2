"""Variables in files of NAME=value lines: the resource and its handler, which run in the agent."""

import inmanta.agent.handler
import inmanta.resources
from inmanta.agent.handler import HandlerContext, ResourcePurged

from inmanta_plugins.envfile import on_host
from inmanta_plugins.mitogen.abc import HandlerABC, ResourceABC


@inmanta.resources.resource("envfile::Variable", id_attribute="key", agent="host.name")
class Variable(ResourceABC):
    """A variable in a file."""

    fields = ("key", "path", "name", "value")
    key: str
    path: str
    name: str
    value: str

    @classmethod
    def get_key(cls, _: object, entity: "Variable") -> str:
        """Return what tells this resource from the others of its agent."""
        return f"{entity.path}:{entity.name}"


@inmanta.agent.handler.provider("envfile::Variable", name="")
class VariableHandler(HandlerABC[Variable]):
    """Reads and changes the file with the functions in ``on_host``."""

    call_timeout = 60.0

    def read_resource(self, ctx: HandlerContext, resource: Variable) -> None:
        value = self.proxy.remote_call(on_host.get, resource.path, resource.name)
        if value is None:
            raise ResourcePurged()
        resource.value = value

    def create_resource(self, ctx: HandlerContext, resource: Variable) -> None:
        self.proxy.remote_call(on_host.assign, resource.path, resource.name, resource.value)
        ctx.set_created()

    def update_resource(
        self, ctx: HandlerContext, changes: dict[str, dict[str, object]], resource: Variable
    ) -> None:
        self.proxy.remote_call(on_host.assign, resource.path, resource.name, resource.value)
        ctx.set_updated()

    def delete_resource(self, ctx: HandlerContext, resource: Variable) -> None:
        self.proxy.remote_call(on_host.remove, resource.path, resource.name)
        ctx.set_purged()
