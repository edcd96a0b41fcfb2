"""The router that all hosts of a process are connected to, and what a host may send to it.

Mitogen trusts what is connected to it: a child may claim the ids of its siblings, answer calls that
were made to others, create loggers, and make its parent write an error for each wrong message.
Here a host may answer what it was called for, ask for modules, forward its log, and tell of the
contexts behind it that it was asked to connect. The first message that is anything else is logged,
and a host that goes on with it is cut off.
"""

import logging
from collections.abc import Callable
from typing import Any

import mitogen.core
import mitogen.master
import mitogen.parent
from inmanta_plugins.mitogen import settings
from inmanta_plugins.mitogen.hosts.host_log import ForwardedLog
from inmanta_plugins.mitogen.hosts.served import Served, ServedModules
from inmanta_plugins.mitogen.hosts.streams import guarded
from inmanta_plugins.mitogen.texts import bounded_text

LOGGER = logging.getLogger(__name__)


class HostState:
    """What is known of the host at the other end of a stream."""

    def __init__(self, id: int, name: str, stream: mitogen.core.Stream) -> None:
        self.id = id
        self.name = name
        self.stream = stream
        self.connects = 0
        """How many contexts it was asked to connect, itself or one behind it."""
        self.blocks: list[range] = []
        """The ids that it may give to them."""
        self.routes = 0
        """How often it told of one."""
        self.log = ForwardedLog(name)
        self.served = Served()
        self.rejected = 0
        self.logged = False
        self.cut = False

    def may_name(self, context_id: object) -> bool:
        """Return whether an id is one that it may give to a context behind it."""
        return type(context_id) is int and any(context_id in block for block in self.blocks)


class _AllowingChain(mitogen.parent.CallChain):  # type: ignore[misc]  # mitogen is not typed
    """Lets the host have what a function needs before it is called."""

    def make_msg(
        self, fn: Callable[..., object], *args: object, **kwargs: object
    ) -> mitogen.core.Message:
        """As mitogen's own."""
        self.context.router.allow(self.context, fn)
        return super().make_msg(fn, *args, **kwargs)


class AgentContext(mitogen.parent.Context):  # type: ignore[misc]  # mitogen is not typed
    """A context whose host may have what is called in it."""

    call_chain_class = _AllowingChain
    changes_before: int | None = None


class AgentRouter(mitogen.master.Router):  # type: ignore[misc]  # mitogen is not typed
    """
    A router whose hosts can reach the agent alone, and there no more than they need.

    :param broker: The broker to use.
    :param max_message_size: How large a message may be, in bytes.
    """

    # Its hosts may message nobody but the agent: mitogen checks it too, here and on each hop.
    unidirectional = True
    context_class = AgentContext

    def __init__(self, broker: mitogen.master.Broker, max_message_size: int) -> None:
        self._hosts: dict[mitogen.core.Stream, HostState] = {}
        super().__init__(broker, max_message_size=max_message_size)
        self.served = ServedModules(self)
        core, monitor = mitogen.core, self.route_monitor
        for handle, handler in (
            (core.ADD_ROUTE, self._checked_route(monitor._on_add_route)),
            (core.DEL_ROUTE, self._checked_route(monitor._on_del_route)),
            (core.ALLOCATE_ID, self._on_allocate_id),
            (core.FORWARD_LOG, self._on_forward_log),
        ):
            self.add_handler(handler, handle=handle, overwrite=True)
        # A host that says it detaches would be left running when its connection ends.
        self.del_handler(core.DETACHING)

    # Connecting, on the caller's thread

    def _connect(self, klass: type[Any], **options: Any) -> mitogen.parent.Context:
        return super()._connect(guarded(klass), **options)  # type: ignore[arg-type]  # a class can be hashed

    def proxy_connect(
        self,
        via_context: Any,
        method_name: str,
        name: str | None = None,
        **options: Any,
    ) -> mitogen.parent.Context:
        """As mitogen's own, but that a hop can't pass off another host as the one behind it."""
        hop: mitogen.core.Stream = self.stream_by_id(via_context.context_id)
        host = self._hosts.get(hop)
        if host is None:
            raise mitogen.core.StreamError(mitogen.core.Router.respondent_disconnect_msg)
        host.connects += 1
        answer = via_context.call(
            mitogen.parent._proxy_connect,
            name=name,
            method_name=method_name,
            kwargs=mitogen.core.Kwargs(options),
        )
        new, its_name = self._new_behind(host, answer)
        if self._stream_by_id.get(new) is not hop:
            raise mitogen.core.StreamError(mitogen.core.Router.respondent_disconnect_msg)
        context = self.context_by_id(new, via_id=via_context.context_id)
        context.via = via_context
        context.name = f"{via_context.name}.{its_name}"
        context.python_version = bounded_text(str(answer.get("python", "")), 20)
        return context

    def allow(self, context: AgentContext, function: Callable[..., object]) -> bool:
        """
        Let the host of a context have what a function needs.

        :param context: The context that the function is to be called in.
        :param function: The function.
        :return: Whether the context can run it as it is now: not when it may have loaded modules
            that have been changed on the agent since.
        """
        host = self._hosts.get(self.stream_by_id(context.context_id))
        return host is None or self.served.allow(host, context, function)

    def _new_behind(self, host: HostState, answer: object) -> tuple[int, str]:
        if not isinstance(answer, dict):
            raise mitogen.core.StreamError(f"{host.name} answered nonsense when it was to connect")
        if isinstance(answer.get("msg"), str):
            # What came through a terminal ends its lines as terminals do.
            text = answer["msg"].replace("\r\n", "\n").rstrip("\r")
            raise mitogen.core.StreamError(bounded_text(text, 100_000))
        new: Any = answer.get("id")
        if not host.may_name(new):
            raise mitogen.core.StreamError(f"{host.name} named a context that is not its own")
        return new, bounded_text(str(answer.get("name")), 200)

    # On the broker's thread

    def register(self, context: mitogen.parent.Context, stream: mitogen.core.Stream) -> None:
        """As mitogen's own, which calls it for each connection that is complete."""
        host = HostState(context.context_id, context.name or str(context.context_id), stream)
        self._hosts[stream] = host
        super().register(context, stream)
        mitogen.core.listen(stream, "disconnect", lambda: self._on_gone(stream))

    def _on_gone(self, stream: mitogen.core.Stream) -> None:
        host = self._hosts.pop(stream, None)
        if host is None:
            return

        def forget() -> None:
            for known in list(self._context_by_id):
                if known == host.id or host.may_name(known):
                    self._context_by_id.pop(known, None)

        # Later: those who watch the stream look its contexts up, to tell them.
        self.broker.defer(forget)

    def _async_route(
        self, msg: mitogen.core.Message, in_stream: mitogen.core.Stream | None = None
    ) -> None:
        if in_stream is not None:
            host = self._hosts.get(in_stream)
            if host is None or host.cut:
                return
            trouble = self._trouble_with(msg, in_stream)
            if trouble:
                self._refuse(msg, host, trouble)
                return
        super()._async_route(msg, in_stream)

    def _trouble_with(self, msg: mitogen.core.Message, stream: mitogen.core.Stream) -> str:
        """Return what is wrong with a message that came on a stream, empty when nothing is."""
        if msg.dst_id != mitogen.context_id:
            return "for another than its agent"
        routes = self._stream_by_id
        if routes.get(msg.src_id) is not stream or routes.get(msg.auth_id) is not stream:
            return "in the name of another"
        known = self._handle_map.get(msg.handle)
        if known is None:
            return "that nothing waits for"
        respondent = known[3]
        if respondent is None:
            return ""
        # The end of a context behind a hop is told by the hop.
        source = respondent.context_id if not msg.is_dead else msg.src_id
        if msg.src_id != source or routes.get(respondent.context_id) is not stream:
            return "in answer to a call that was made to another"
        return ""

    def reject(self, host: HostState | None, what: str, *, log: bool = True) -> None:
        """
        Count a message that a host should not have sent; cut the host off when there are too many.

        :param host: The host, if it is still connected.
        :param what: What is wrong with the message, to complete "it sent a message …".
        :param log: Whether to log the first one.
        """
        if host is None:
            return
        host.rejected += 1
        if log and not host.logged:
            host.logged = True
            LOGGER.warning("Host %s sent a message %s: refused.", host.name, what)
        elif host.rejected > settings.MOST_REJECTED and not host.cut:
            host.cut = True
            LOGGER.error(
                "Host %s sent more than %d messages that were refused, the last one %s:"
                " it is cut off.",
                host.name,
                settings.MOST_REJECTED,
                what,
            )
            self.broker.defer(host.stream.on_disconnect, self.broker)

    def _refuse(self, msg: mitogen.core.Message, host: HostState, what: str) -> None:
        if msg.reply_to and not msg.is_dead and not host.rejected > settings.MOST_REJECTED:
            # One reason for all: another would tell which ids and handles are in use.
            refusal = mitogen.core.Message.dead(
                "refused: a host reaches only its agent, and what that waits for",
                dst_id=msg.src_id,
                handle=msg.reply_to,
            )
            if self._stream_by_id.get(msg.src_id) is host.stream:
                host.stream.protocol._send(refusal)
        self.reject(host, what)

    def host_of(self, msg: mitogen.core.Message) -> HostState | None:
        """
        Return the host at the other end of the stream on which a message came.

        :param msg: A message that was received.
        """
        return self._hosts.get(self._stream_by_id.get(msg.src_id))

    def _checked_route(self, handler: Any) -> Any:
        def on_route(msg: mitogen.core.Message) -> None:
            host = self.host_of(msg)
            if host is None or msg.is_dead:
                return
            # A number of ten digits at most, and a name, which is in the answer to connecting it.
            number = msg.data[:11].partition(b":")[0]
            target = int(number) if number.isdigit() else -1
            # Each that it is to connect comes once, and goes once.
            host.routes += 1
            if (
                host.routes > 2 * host.connects
                or msg.src_id != host.id
                or not host.may_name(target)
            ):
                self.reject(host, "about a context that is not its own")
                return
            msg.data = number
            handler(msg)

        return on_route

    def _on_allocate_id(self, msg: mitogen.core.Message) -> None:
        host = self.host_of(msg)
        if host is None or msg.is_dead:
            return
        # Each context that it is to connect may be the first of one more hop behind it.
        if len(host.blocks) >= host.connects:
            self.reject(host, "to get ids, which it was given no use for")
            msg.reply(mitogen.core.Message.dead("refused"))
            return
        first, end = self.id_allocator.allocate_block()
        host.blocks.append(range(first, end))
        msg.reply((first, end))

    def _on_forward_log(self, msg: mitogen.core.Message) -> None:
        host = self.host_of(msg)
        if host is not None and not msg.is_dead:
            host.log.log(msg.data)
