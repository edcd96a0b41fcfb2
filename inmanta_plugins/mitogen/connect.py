"""From a serialized context to a connected one: the router of this process and its hops.

All the proxies of a process share one :class:`Hub`: one mitogen router with one broker thread. A
hop that several contexts go through is connected once and counted; the context that a proxy runs
its calls in is its own, since a context runs one call at a time. The hub's router starts with its
first connection and ends with its last, and a forked child begins with a new hub.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import select
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future

import inmanta_mitogen
import inmanta_mitogen.calls
import mitogen.core
import mitogen.master
import mitogen.parent
from inmanta_plugins.mitogen import calls, interpreters, outbox
from inmanta_plugins.mitogen.answers import UnreadableError, read_answer
from inmanta_plugins.mitogen.diagnose import HopLost, diagnose, unprepared
from inmanta_plugins.mitogen.logs import quiet_mitogen
from inmanta_plugins.mitogen.modules import Stamp
from inmanta_plugins.mitogen.options import SECRET_OPTIONS, hops_of
from inmanta_plugins.mitogen.router import AgentRouter, max_message_size
from inmanta_plugins.mitogen.serve import PREPARE_HOST, ServedModules
from inmanta_plugins.mitogen.validate import apply_host_key_policy, validate_context

Serialized = Mapping[str, object]
Deliver = Callable[[mitogen.core.Message], object]

# What a hop's answer may take beyond the connect_timeout that it itself watches over.
HOP_GRACE = 5.0
# How long an interpreter that is given up may take to leave by itself before it is cut off.
LEAVE_TIMEOUT = 0.5
# How long the last user of a hop waits for it to leave.
HOP_LEAVE_TIMEOUT = 5.0


def context_hash(serialized_context: Serialized) -> str:
    """
    :param serialized_context: A serialized context.
    :return: The md5 hex digest of its JSON text with sorted keys: equal for equal contexts. A key
        for caches, no protection of anything.
    """
    text = json.dumps(serialized_context, sort_keys=True)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def build_context(
    serialized_context: dict[str, object], *, router: mitogen.master.Router
) -> mitogen.parent.Context:
    """
    Connect a context, hop by hop.

    :param serialized_context: The serialized context; it is not changed.
    :param router: The router to connect it on. It stays the caller's: contexts end when it does,
        or by their ``shutdown()``.
    :return: The connected context.
    :raises ContextError: The serialized context has the wrong form; a :class:`ValueError`.
    :raises PythonNotFoundError: A hop has no Python at its ``python_path``.
    :raises ConnectError: A hop could not be connected; a mitogen ``StreamError``. The hops before
        it have been ended.
    """
    validate_context(serialized_context)
    link: Link | None = None
    for hop in hops_of(apply_host_key_policy(serialized_context)):
        try:
            link = Link(hop, via=link, router=router)
        except BaseException:
            while link is not None:
                link.end(HOP_LEAVE_TIMEOUT)
                link = link.via
            raise
    assert link is not None  # a valid context has at least itself for a hop
    return link.context


def mitogen_options(hop: Serialized) -> dict[str, object]:
    """
    :param hop: A serialized context.
    :return: What mitogen's ``Router.connect`` takes for it, without the method and the hop before.
    """
    options = {
        key: value
        for key, value in hop.items()
        if value is not None and key not in ("method_name", "name", "via")
    }
    for key in SECRET_OPTIONS & options.keys():
        # Masks itself wherever mitogen, here or on a hop, logs the arguments of a connection.
        options[key] = mitogen.core.Secret(options[key])
    if interpreters.is_auto(options.get("python_path")):
        options["python_path"] = interpreters.auto_command()
    options["name"] = hop.get("name") or None
    return options


class Link:
    """
    One connected hop: whether it lives, and how it is ended.

    :param hop: The serialized context of the hop.
    :param via: The hop before it, None for one that is next to the agent.
    :param router: The router to connect it on.
    :raises PythonNotFoundError: The hop has no Python at its ``python_path``.
    :raises ConnectError: The hop could not be connected.
    """

    def __init__(
        self, hop: Serialized, *, via: "Link | None", router: mitogen.master.Router
    ) -> None:
        self.via = via
        self.router = router
        self._pid = os.getpid()
        self._gone = threading.Event()
        # A hop runs one call at a time: its deadline must not start while it serves another.
        self._connecting = threading.Lock()
        self._has_connected = False
        self._loaded: dict[str, Stamp] = {}
        self._adopt(self._connect(hop))

    def _adopt(self, context: mitogen.parent.Context) -> None:
        self.context = context
        mitogen.core.listen(context, "disconnect", self._gone.set)
        mitogen.core.listen(context, "disconnect", self._forget)
        if self._stream() is None:
            self._gone.set()  # it went before anyone listened

    def _disown(self, context: mitogen.parent.Context) -> None:
        """End a context that was connected after all, when nobody waited for it any more."""
        with contextlib.suppress(mitogen.core.Error):  # the router may have ended first
            self._adopt(context)
            self.end(LEAVE_TIMEOUT)

    def prepare(self, hop: Serialized) -> None:
        """
        Make the interpreter ready for calls, and end it when it can't be.

        :param hop: The serialized context of the hop.
        :raises ConnectError: It is too old for what is called there, or was lost again.
        """
        bounded = _BoundedHop(self.context, _seconds(hop))
        # Before the question, so that the host has what it is told to load and need not ask for it.
        self.allow(inmanta_mitogen.calls.call)
        self.allow(inmanta_mitogen.lexists)
        try:
            bounded.call(exec, PREPARE_HOST)
        except mitogen.core.Error as error:
            failure = error
        except BaseException:
            self.cut()
            raise
        else:
            return
        version: object = ""
        with contextlib.suppress(mitogen.core.Error):
            version = bounded.call(platform.python_version)
        self.end(LEAVE_TIMEOUT)
        # Python 2 calls bytes a string.
        text = version.decode() if isinstance(version, bytes) else str(version)
        raise unprepared(hop, failure, text) from None

    def _forget(self) -> None:
        served = self.router.responder.policy
        if self.via is None and isinstance(served, ServedModules):
            served.forget(self.context.context_id)

    def allow(self, function: Callable[..., object]) -> bool:
        """
        Let the host have the modules that a function needs, where the router holds them back.

        :param function: The function that is about to be called there.
        :return: Whether the interpreter can run it as it is now: not when it may have loaded
            modules that have been changed on the agent since.
        :raises UnservableError: The function's file needs what hosts don't have.
        """
        next_to_agent = self
        while next_to_agent.via is not None:
            next_to_agent = next_to_agent.via
        served = self.router.responder.policy
        if not isinstance(served, ServedModules):
            return True
        return served.allow(
            next_to_agent.context.context_id, self.context.context_id, function, self._loaded
        )

    def _connect(self, hop: Serialized) -> mitogen.parent.Context:
        method = str(hop["method_name"])
        options = mitogen_options(hop)
        start = functools.partial(self._start, method)
        try:
            return start(options)
        except (mitogen.core.Error, OSError) as error:
            failure = error

        def probe() -> str:
            requested = self._python_argv(method, options)
            if requested:
                try:
                    start(options | {"python_path": interpreters.probe_command(requested)})
                except (mitogen.core.Error, OSError) as report:
                    return str(report)
            return ""

        # From None: the diagnosis holds what came back, and mitogen's own text is a stream dump.
        raise diagnose(hop, failure, probe) from None

    def _python_argv(self, method: str, options: Mapping[str, object]) -> list[str]:
        """What mitogen starts for the interpreter; empty where only the hop before knows that."""
        argv = options.get("python_path")
        if not argv:
            argv = mitogen.parent.get_connection_class(method).options_class.python_path
            if self.via is not None and argv == mitogen.parent.Options.python_path:
                return []
        return list(argv) if isinstance(argv, list | tuple) else [str(argv)]

    def _start(self, method: str, options: dict[str, object]) -> mitogen.parent.Context:
        def connect() -> mitogen.parent.Context:
            if self.via is None:
                return self.router.connect(method, **options)
            deadline = _seconds(options) + HOP_GRACE
            with self.via.serving(deadline) as via:
                return self.router.connect(method, via=via, **options)

        return _undisturbed(connect, self._disown)

    @contextlib.contextmanager
    def serving(self, seconds: float) -> Iterator["_BoundedHop"]:
        """Hold this hop for one connection through it; one that doesn't answer is cut off."""
        with self._connecting:
            if self._has_connected:
                # Not before there can be anything to forget: the hop would have to fetch it first.
                self._order(inmanta_mitogen.calls.forget_ended)
            try:
                yield _BoundedHop(self.context, seconds)
                self._has_connected = True
            except mitogen.core.TimeoutError:
                self.cut_if_silent()
                raise HopLost(f"it did not answer for {seconds:.0f} seconds") from None

    def _order(self, function: Callable[..., object], *args: object) -> None:
        """Have the interpreter call a function once it can, and wait for nothing."""
        self.allow(function)
        self.context.send(calls.request_as_is(function, *args))

    def cut_if_silent(self) -> None:
        """Cut this link, and each one before it that doesn't answer a simple call either."""
        self.cut()
        link = self.via
        while link is not None and not link._connecting.locked():
            with link._connecting:
                try:
                    _BoundedHop(link.context, 2.0).call(os.getpid)
                    return
                except mitogen.core.Error:
                    link.cut()
            link = link.via

    @property
    def inherited(self) -> bool:
        """Whether it belongs to the process that this one was forked from."""
        return self._pid != os.getpid()

    @property
    def ended(self) -> bool:
        """Whether nothing more will come through it."""
        return self.inherited or self._gone.is_set() or not _serves(self.router)

    @property
    def alive(self) -> bool:
        """Whether something can be sent through it, as far as this side knows."""
        return not self.ended and not self._hung_up()

    def _hung_up(self) -> bool:
        """Whether the other end has gone, which the broker's thread may not have seen yet."""
        stream = self._stream()
        if stream is None or stream.receive_side.closed:
            return True
        poll = select.poll()
        poll.register(stream.receive_side.fd, 0)  # asks for errors and hang-ups alone
        return bool(poll.poll(0))

    def _stream(self) -> mitogen.core.Stream | None:
        return self.router.stream_by_id(self.context.context_id)

    def end(self, timeout: float) -> bool:
        """
        Ask the interpreter to leave; cut it off when it doesn't.

        :param timeout: How long it may take, in seconds.
        :return: Whether it left by itself in time.
        """
        if self.ended:
            return True
        self.context.shutdown(wait=False)
        left = self._gone.wait(timeout)
        if not left:
            self.cut()
        return left

    def cut(self) -> None:
        """End the link on this side, or have the hop before it do so, whatever the host does."""
        stream = self._stream()
        if stream is not None and stream.protocol.remote_id == self.context.context_id:
            self.router.disconnect_stream(stream)
            # Mitogen would end it as well, but politely first, and the broker waits for that.
            inmanta_mitogen.calls.kill_started(stream.conn.proc)
        elif stream is not None and self.via is not None:
            with contextlib.suppress(mitogen.core.Error):  # the router may be ending
                self.via._order(inmanta_mitogen.calls.cut, self.context.context_id)
        self._gone.set()


def _seconds(options: Mapping[str, object]) -> float:
    timeout = options.get("connect_timeout") or mitogen.parent.Options.connect_timeout
    return float(timeout)  # type: ignore[arg-type]  # a number, the context is valid


def _undisturbed(
    connect: Callable[[], mitogen.parent.Context],
    disown: Callable[[mitogen.parent.Context], object],
) -> mitogen.parent.Context:
    """
    Connect, and if that is interrupted end what comes of it.

    Mitogen's broker goes on to connect when the thread that waits for it is interrupted, and then
    nobody would know of the connection.
    """
    if threading.current_thread() is not threading.main_thread():
        return connect()  # only the main thread gets a KeyboardInterrupt
    outcome: Future[mitogen.parent.Context] = Future()

    def run() -> None:
        try:
            outcome.set_result(connect())
        except BaseException as error:
            outcome.set_exception(error)

    def undo(outcome: Future[mitogen.parent.Context]) -> None:
        if outcome.exception() is None:
            disown(outcome.result())

    threading.Thread(target=run, name="inmanta-mitogen-connect", daemon=True).start()
    try:
        return outcome.result()
    except BaseException as error:
        if not (outcome.done() and outcome.exception() is error):
            outcome.add_done_callback(undo)
        raise


class _BoundedHop:
    """
    Stands in for the hop in mitogen's ``Router.connect(via=…)``, which would wait without end for
    one that hangs.
    """

    def __init__(self, context: mitogen.parent.Context, seconds: float) -> None:
        self.name = context.name
        self.context_id = context.context_id
        self._context = context
        self._seconds = seconds

    def call(self, function: Callable[..., object], *args: object, **kwargs: object) -> object:
        receiver = self._context.call_async(function, *args, **kwargs)
        try:
            answer = receiver.get(timeout=self._seconds)
        except mitogen.core.TimeoutError:
            receiver.close()
            raise
        try:
            value = read_answer(answer.data)
        except UnreadableError as error:
            raise mitogen.core.StreamError(f"its answer cannot be read: {error}") from None
        if isinstance(value, mitogen.core.CallError):
            raise value
        return value


class _ConnectorInterrupted(Exception):  # noqa: N818  # tells what happened, and is no error
    """The thread that connected a hop was interrupted: others who need it connect it themselves."""


class _SharedHop:
    """A hop, how many use it, and the hop before it."""

    def __init__(self) -> None:
        self.users = 0
        self.via: _SharedHop | None = None
        self.link: Future[Link] = Future()

    @staticmethod
    def link_of(hop: "_SharedHop | None") -> Link | None:
        """The link of a hop that is connected; None for none."""
        return None if hop is None else hop.link.result()

    @property
    def lost(self) -> bool:
        if not self.link.done():
            return False
        return self.link.exception() is not None or not self.link.result().alive


class Connection:
    """A proxy's own context together with its share of the hops before it; made by a hub."""

    def __init__(self, hub: "Hub", link: Link, via: _SharedHop | None) -> None:
        self._hub = hub
        self._via = via
        self.link = link
        self._lock = threading.Lock()
        self._closed = False
        self._allowed: set[Callable[..., object]] = set()
        self._outbox = outbox.Outbox(self)

    @property
    def alive(self) -> bool:
        """Whether calls can be sent through it, as far as this side knows."""
        return self.link.alive

    @property
    def ended(self) -> bool:
        """Whether no answer can come through it any more."""
        return self.link.ended

    def send(
        self, function: Callable[..., object], message: mitogen.core.Message, deliver: Deliver
    ) -> None:
        """
        :param function: A function.
        :param message: The request to call it.
        :param deliver: Gets the answer, once, on the broker's thread, so it must not block. A dead
            message tells that there will be none.
        :raises UnservableError: The function's file needs what hosts don't have.
        :raises NotDeliveredError: The connection was closed meanwhile.
        """
        if self._may_call(function):
            message.reply_to = self._listen(deliver, persist=False)
            self.post(message)
        else:
            deliver(mitogen.core.Message.dead(calls.NOT_DELIVERED))

    def send_soon(
        self, function: Callable[..., object], request: bytes, deliver: outbox.Deliver
    ) -> None:
        """
        As :meth:`send`, in one message with others that come at the same time.

        :param function: A function.
        :param request: What asks for it, among others.
        :param deliver: As for :meth:`send`.
        :raises UnservableError: As :meth:`send`.
        :raises NotDeliveredError: As :meth:`send`.
        """
        if self._may_call(function):
            self._outbox.put(request, deliver)
        else:
            deliver(mitogen.core.Message.dead(calls.NOT_DELIVERED))

    def _may_call(self, function: Callable[..., object]) -> bool:
        if function not in self._allowed:
            if not (self.link.allow(inmanta_mitogen.calls.call) and self.link.allow(function)):
                # The next attempt gets an interpreter that has loaded nothing.
                self.link.end(LEAVE_TIMEOUT)
                return False
            self._allowed.add(function)
        return True

    def post(self, message: mitogen.core.Message) -> None:
        """
        :param message: Sent to the host as it is.
        :raises NotDeliveredError: The connection was closed meanwhile.
        """
        try:
            self.link.context.send(message)
        except mitogen.core.Error as error:
            raise calls.NotDeliveredError(error) from None

    def listen(self, deliver: Deliver) -> int:
        """
        :param deliver: Gets each message for the handle, on the broker's thread, until it is
            unlistened; a dead one when the connection ends.
        :return: A handle for the host to send to.
        """
        return self._listen(deliver, persist=True)

    def _listen(self, deliver: Deliver, *, persist: bool) -> int:
        handle: int = self.link.router.add_handler(
            deliver, persist=persist, respondent=self.link.context
        )
        return handle

    def unlisten(self, handle: int) -> None:
        """
        :param handle: What :meth:`listen` returned.
        """

        def forget() -> None:
            with contextlib.suppress(KeyError):  # with the connection it went already
                self.link.router.del_handler(handle)

        # On the broker's thread, which walks through the handles when a connection ends.
        self.defer(forget)

    def defer(self, function: Callable[[], object]) -> None:
        """
        :param function: Called on the broker's thread, unless the broker has ended.
        """
        with contextlib.suppress(calls.NotDeliveredError):
            self.call_soon(function)

    def call_soon(self, function: Callable[[], object]) -> None:
        """
        :param function: Called on the broker's thread.
        :raises NotDeliveredError: The connection was closed meanwhile.
        """
        try:
            self.link.router.broker.defer(function)
        except mitogen.core.Error as error:
            raise calls.NotDeliveredError(error) from None

    def close(self, timeout: float) -> bool:
        """
        End it. Closing it again does nothing.

        :param timeout: How long the host may take, in seconds.
        :return: Whether the host left by itself in time; False when it had to be cut off.
        """
        if self.link.inherited:
            return True  # the other process's to close; its locks may be held for ever here
        with self._lock:
            if self._closed:
                return True
            self._closed = True
        left = self.link.end(timeout)
        self._hub.leave(self._via)
        return left


class Hub:
    """The router of a process, the hops on it, and the count of those who use them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._router: mitogen.master.Router | None = None
        self._users = 0
        self._hops: dict[str, _SharedHop] = {}

    def open(self, serialized_context: Serialized) -> Connection:
        """
        Connect a context of its own for the caller, through shared hops.

        :param serialized_context: A serialized context.
        :return: The connection; the caller closes it.
        :raises ContextError: The serialized context has the wrong form.
        :raises PythonNotFoundError: A hop has no Python at its ``python_path``.
        :raises ConnectError: A hop could not be connected.
        """
        validate_context(serialized_context)
        hop = apply_host_key_policy(serialized_context)
        router = self._enter()
        via: _SharedHop | None = None
        link: Link | None = None
        try:
            via = self._acquire(hop.get("via"), router)
            link = Link(hop, via=_SharedHop.link_of(via), router=router)
            link.prepare(hop)
            return Connection(self, link, via)
        except BaseException:
            if link is not None:
                link.cut()
            self.leave(via)
            raise

    def _enter(self) -> mitogen.master.Router:
        with self._lock:
            if self._router is None or not _serves(self._router):
                quiet_mitogen()
                size = max_message_size()
                # No watcher: it would end the broker with the thread that happens to come first.
                broker = mitogen.master.Broker(install_watcher=False)
                self._router = AgentRouter(broker, size)
            self._users += 1
            # A router that always has some user lives for months.
            self._router.broker.defer(inmanta_mitogen.calls.forget_ended_now, self._router)
            return self._router

    def leave(self, via: _SharedHop | None) -> None:
        """Give back a share of the hops and of the router; the last to leave ends them."""
        self._release(via)
        with self._lock:
            self._users -= 1
            router = self._router
            if self._users or router is None:
                return
            self._router = None
        _end_router(router)

    def _acquire(self, serialized: object, router: mitogen.master.Router) -> _SharedHop | None:
        if not isinstance(serialized, Mapping):
            return None
        key = context_hash(serialized)
        with self._lock:
            hop = self._hops.get(key)
            first = hop is None or hop.lost
            if hop is None or first:
                hop = self._hops[key] = _SharedHop()
            hop.users += 1
        if first:
            try:
                hop.via = self._acquire(serialized.get("via"), router)
                before = _SharedHop.link_of(hop.via)
                hop.link.set_result(Link(serialized, via=before, router=router))
            except Exception as error:
                hop.link.set_exception(error)
            except BaseException:
                hop.link.set_exception(_ConnectorInterrupted())
                self._release(hop)
                raise
        try:
            hop.link.result()
        except _ConnectorInterrupted:
            self._release(hop)
            return self._acquire(serialized, router)
        except BaseException:
            self._release(hop)
            raise
        return hop

    def _release(self, hop: _SharedHop | None) -> None:
        while hop is not None:
            with self._lock:
                hop.users -= 1
                if hop.users:
                    return
                for key in [key for key, other in self._hops.items() if other is hop]:
                    del self._hops[key]
            if not hop.lost:
                hop.link.result().end(HOP_LEAVE_TIMEOUT)
            hop = hop.via

    def end(self) -> None:
        """End the router at once, with all that is connected on it."""
        with self._lock:
            router, self._router = self._router, None
        if router is not None:
            _end_router(router)


def _serves(router: mitogen.master.Router) -> bool:
    """Whether its broker runs: mitogen ends it over any exception on its thread that is a bug."""
    return bool(router.broker._alive)  # private, and nothing else tells


def _end_router(router: mitogen.master.Router) -> None:
    router.broker.shutdown()
    router.broker.join()


_hub = Hub()
# Proxies that a forked child inherits: their locks may be held by threads that it has not.
_inherited: weakref.WeakSet["ForkAware"] = weakref.WeakSet()


class ForkAware:
    """What holds locks that a forked child must not inherit as they are."""

    def after_fork_in_child(self) -> None:
        """Put new locks in the place of those that another thread may hold."""
        raise NotImplementedError


def hub() -> Hub:
    """
    :return: The hub of this process.
    """
    return _hub


def watch_forks(what: ForkAware) -> None:
    """
    :param what: Told in each child that this process forks, for as long as it lives.
    """
    _inherited.add(what)


def _after_fork_in_child() -> None:
    global _hub
    _hub = Hub()
    # What mitogen itself does in a child that it forks: the descriptors are the parent's.
    mitogen.core.Latch._on_fork()
    mitogen.core.Side._on_fork()
    for what in list(_inherited):
        what.after_fork_in_child()


def _end_at_exit() -> None:
    """End the broker of a process that exits with connections open: Python waits for threads."""
    # Private, and the only hook that runs before Python waits; concurrent.futures rests on it.
    threading._register_atexit(lambda: hub().end())  # type: ignore[attr-defined]  # not in typeshed


def _history_in_any_encoding(streams: Iterable[mitogen.core.Stream | None]) -> str:
    lines = [
        line
        for stream in streams
        if stream
        for line in getattr(stream.protocol, "logged_lines", ())
    ]
    return b"\n".join(line for _, line in sorted(lines)).decode("utf-8", "replace")


# Mitogen's own takes all for UTF-8. What a host in another locale said before it failed raises then
# on the broker's thread, and whoever waits for that connection waits for ever.
mitogen.parent.get_history = _history_in_any_encoding
os.register_at_fork(after_in_child=_after_fork_in_child)
_end_at_exit()
