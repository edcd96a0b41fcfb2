"""Bases for the resources and handlers of adapter modules."""

from collections.abc import Sequence
from typing import Generic, TypeVar

import inmanta.agent.handler
import inmanta.execute.proxy
import inmanta.export
import inmanta.resources

from inmanta_plugins.mitogen.connections.hub import context_hash
from inmanta_plugins.mitogen.contexts.serialize import get_resource_context
from inmanta_plugins.mitogen.proxy import Proxy


class Resource(inmanta.resources.Resource):
    """
    A resource that is deployed through a mitogen context.

    Its field ``via`` holds the serialized context: that of the entity's own ``via``, else of its
    host's, else the implicit one of its ``std::Host``.
    """

    fields: Sequence[str] = ("via",)
    via: dict[str, object]

    @classmethod
    def get_via(
        cls, _: inmanta.export.Exporter, entity: inmanta.execute.proxy.DynamicProxy
    ) -> dict[str, object]:
        """
        Return the serialized context of a resource.

        :param entity: The instance of the model.
        :raises NotImplementedError: The model gives it none.
        """
        return get_resource_context(entity)


R = TypeVar("R", bound=Resource)


def _disconnect(proxy: Proxy) -> None:
    proxy.disconnect(best_effort=True)


class Handler(inmanta.agent.handler.HandlerAPI[R], Generic[R]):
    """
    A handler with an open proxy to where its resource is deployed.

    ``self.proxy`` is set from :meth:`pre` to the end of :meth:`post`. Connections are kept in the
    agent's cache and shared by all the resources of an agent that have the same context.
    """

    proxy: Proxy
    proxy_previous_logger: inmanta.agent.handler.LoggerABC
    """The logger that the proxy gets back in :meth:`post`."""

    call_timeout: float | None = None
    """
    The seconds that each remote call of this handler may take; None leaves it to the environment
    variable INMANTA_MITOGEN_CALL_TIMEOUT.
    """

    # Untyped in inmanta-core 14.
    @inmanta.agent.handler.cache(  # type: ignore[untyped-decorator, unused-ignore]
        ignore=["serialized_context"], call_on_delete=_disconnect
    )
    def get_proxy(self, serialized_context: dict[str, object], hash: str, agent_name: str) -> Proxy:
        """
        Get the connected proxy of a context from the agent's cache, which disconnects it when it
        has not been used for a while.

        :param serialized_context: The serialized context.
        :param hash: Its :func:`context_hash`, the key in the cache.
        :param agent_name: The agent's name, the other part of the key.
        :return: The connected proxy.
        :raises ContextError: The serialized context has the wrong form.
        :raises PythonNotFoundError: A hop has no Python at its ``python_path``.
        :raises ConnectError: A hop could not be connected.
        """
        proxy = Proxy(serialized_context)
        proxy.connect()
        return proxy

    def pre(self, ctx: inmanta.agent.handler.HandlerContext, resource: R) -> None:
        """
        Open the proxy, and let it log to the resource's own log.

        :param ctx: What the agent does with the resource.
        :param resource: The resource.
        """
        super().pre(ctx, resource)
        # An override may name the first parameter otherwise.
        self.proxy = self.get_proxy(
            resource.via,
            hash=context_hash(resource.via),
            agent_name=resource.id.get_agent_name(),
        )
        self.proxy_previous_logger = self.proxy.logger
        self.proxy.logger = ctx
        self._proxy_call_timeout = self.proxy.call_timeout
        if self.call_timeout is not None:
            self.proxy.call_timeout = self.call_timeout
        self.proxy.begin_resource(resource.id.entity_type)

    def post(self, ctx: inmanta.agent.handler.HandlerContext, resource: R) -> None:
        """
        Give the proxy its former logger back.

        :param ctx: What the agent does with the resource.
        :param resource: The resource.
        """
        # Also called after a pre that failed before there was a proxy.
        if hasattr(self, "proxy") and hasattr(self, "proxy_previous_logger"):
            self.proxy.end_resource()
            self.proxy.logger = self.proxy_previous_logger
            self.proxy.call_timeout = self._proxy_call_timeout
        super().post(ctx, resource)


class ResourceABC(Resource, inmanta.resources.PurgeableResource):
    """A resource with a ``via`` that can be purged."""

    # inmanta merges the fields of all bases. Its own type says there are never more than two.
    fields: Sequence[str] = ()  # type: ignore[assignment]


PR = TypeVar("PR", bound=ResourceABC)


class HandlerABC(Handler[PR], inmanta.agent.handler.CRUDHandler[PR], Generic[PR]):
    """A handler that reads, creates, updates and deletes its resource through ``self.proxy``."""
