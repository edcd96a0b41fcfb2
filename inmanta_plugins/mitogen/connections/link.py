"""One hop of a context: how it is connected, whether it lives, and how it is ended."""

import contextlib
import functools
import os
import random
import select
import sys
import threading
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

import inmanta_mitogen
import inmanta_mitogen.dispatch
import inmanta_mitogen.hop
import mitogen.core
import mitogen.master
import mitogen.parent
from inmanta_mitogen.names import native
from inmanta_plugins.mitogen import _mitogen, settings
from inmanta_plugins.mitogen.connections.programs import mitogen_options, python_argv, shown_command
from inmanta_plugins.mitogen.errors import ConnectError, first_of_python_path
from inmanta_plugins.mitogen.hosts.answers import UnreadableError, read_answer
from inmanta_plugins.mitogen.hosts.router import AgentRouter
from inmanta_plugins.mitogen.hosts.served import PREPARE_HOST

Serialized = Mapping[str, object]

# Handles count up from 1000 on each host; mitogen's own are below 200.
_NO_HANDLE = 999


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
        # All that is tried to connect it has to be over by then.
        self._deadline = time.monotonic() + _seconds(hop)
        self._gone = threading.Event()
        # A hop runs one call at a time: its deadline must not start while it serves another.
        self.connecting = threading.Lock()
        self._has_connected = False
        self.failure: ConnectError | None = None
        """Why the interpreter can't be used after all, once it is known."""
        self.context = self._connect(hop)
        mitogen.core.listen(self.context, "disconnect", self._gone.set)
        if self._stream() is None:
            self._gone.set()  # it went before anyone listened

    @property
    def is_too_old(self) -> bool:
        """Whether its Python can be a hop and nothing else: 2.7, as far as this is known."""
        version = getattr(self.context, "python_version", "")
        return version.split(".")[0] == "2"

    def prepare(self, hop: Serialized) -> None:
        """
        Make the interpreter ready for calls, without waiting for it. What comes of that is in
        `failure` before any call that is made from now on is answered.

        :param hop: The serialized context of the hop.
        :raises ConnectError: Its Python is too old.
        """
        if self.is_too_old:
            from inmanta_plugins.mitogen.connections.diagnosis import too_old

            raise too_old(hop, first_of_python_path(hop), self.context.python_version)
        # Before the order, so that the host has what it is told to load and need not ask for it.
        for needed in (inmanta_mitogen.dispatch.call, inmanta_mitogen.lexists, native):
            self.allow(needed)
        message = _mitogen.order(exec, PREPARE_HOST)
        broker = self.router.broker

        timer: Any = None

        def fail(error: Exception) -> None:
            from inmanta_plugins.mitogen.connections.diagnosis import unprepared

            self.failure = unprepared(hop, error)
            self.cut()

        def on_answer(answer: mitogen.core.Message) -> None:
            timer.cancel()
            if answer.is_dead:
                return  # it is lost, as it could be at any time
            try:
                value_of(answer)
            except mitogen.core.Error as error:
                fail(error)

        def send() -> None:
            nonlocal timer
            timer = broker.timers.schedule(
                mitogen.core.now() + self._seconds_left(), lambda: fail(mitogen.core.TimeoutError())
            )
            message.reply_to = self.router.add_handler(
                on_answer, persist=False, respondent=self.context
            )
            self.context.send(message)

        broker.defer(send)

    def allow(self, function: Callable[..., object]) -> bool:
        """
        Let the host have the modules that a function needs, where the router holds them back.

        :param function: The function that is about to be called there.
        :return: Whether the interpreter can run it as it is now: not when it may have loaded
            modules that have been changed on the agent since.
        """
        if not isinstance(self.router, AgentRouter):
            return True
        return self.router.allow(self.context, function)

    def _connect(self, hop: Serialized) -> mitogen.parent.Context:
        method = str(hop["method_name"])
        options = mitogen_options(hop)

        def start(**more: object) -> mitogen.parent.Context:
            return self._start(method, {**options, "connect_timeout": self._seconds_left(), **more})

        for attempt in range(settings.MOST_ATTEMPTS):
            try:
                return start()
            except (mitogen.core.Error, OSError) as error:
                failure = error
            # Imported late: most connections work.
            from inmanta_plugins.mitogen.connections.diagnosis import diagnose, try_again

            pause = random.uniform(0.5, 1) * 0.2 * 2**attempt  # noqa: S311  # no secret
            if not try_again(failure) or pause > self._seconds_left():
                break
            time.sleep(pause)

        def probe() -> str:
            from inmanta_plugins.mitogen.connections import interpreters

            # Which Python a hop runs itself, the default of some methods, is not known here.
            own = "" if self.via else sys.executable
            requested = python_argv(method, options.get("python_path"), own)
            try:
                if all(requested):
                    start(python_path=interpreters.probe_command(requested))
            except (mitogen.core.Error, OSError) as report:
                return str(report)
            return ""

        # From None: the diagnosis holds what came back, and mitogen's own text is a stream dump.
        raise diagnose(hop, failure, probe, shown_command(hop)) from None

    def _seconds_left(self) -> float:
        return max(settings.LEAST_TIMEOUT, self._deadline - time.monotonic())

    def _start(self, method: str, options: dict[str, object]) -> mitogen.parent.Context:
        if self.via is None:
            return self.router.connect(method, **options)
        via = self.via
        ask = functools.partial(via.ask, _seconds(options) + settings.HOP_GRACE)
        # In the place of the context, which would wait without end for a hop that hangs.
        name, number = via.context.name, via.context.context_id
        stand_in = types.SimpleNamespace(name=name, context_id=number, call=ask)
        with via.connecting:
            context = self.router.connect(method, via=stand_in, **options)
        context.via = via.context
        return context

    def ask(self, seconds: float, function: Callable[..., object], **kwargs: object) -> object:
        """
        Do what mitogen's ``Context.call`` does to connect an interpreter through this one.

        :param seconds: How long it may take; then this one is cut off.
        :param function: mitogen's function for it.
        :param kwargs: Its arguments.
        :raises StreamError: It took too long.
        """
        if not self.is_too_old:
            if self._has_connected:
                self.context.send(_mitogen.order_own(_mitogen.forget_ended))
            function = inmanta_mitogen.hop.connect  # it tells more of a failure
            self.allow(function)
        receiver = self.context.call_async(function, **kwargs)
        try:
            answer = receiver.get(timeout=seconds)
        except mitogen.core.TimeoutError:
            receiver.close()
            self.cut()
            text = f"it did not answer for {seconds:.0f} seconds"
            raise mitogen.core.StreamError(text) from None
        self._has_connected = True
        return value_of(answer)

    def _order(self, function: Callable[..., object], *args: object) -> None:
        """Have the interpreter call a function once it can, and wait for nothing."""
        self.allow(function)
        self.context.send(_mitogen.order(function, *args))

    @property
    def inherited(self) -> bool:
        """Whether it belongs to the process that this one was forked from."""
        return self._pid != os.getpid()

    @property
    def ended(self) -> bool:
        """Whether nothing more will come through it."""
        return self.inherited or self._gone.is_set() or not _mitogen.broker_runs(self.router)

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
        answered = threading.Event()
        with contextlib.suppress(mitogen.core.Error):  # the router may end first
            # To a handle that is not there: the host's broker refuses it, then leaves.
            question = mitogen.core.Message(handle=_NO_HANDLE)
            question.reply_to = self.router.add_handler(
                lambda _: answered.set(), persist=False, respondent=self.context
            )
            self.context.send(question)
        self.context.shutdown(wait=False)
        left = self._gone.wait(min(timeout, settings.CLOSE_TIMEOUT))
        if not left:
            # A process that a login shell has started may hold the connection open.
            left = answered.is_set() or self._gone.wait(timeout - settings.CLOSE_TIMEOUT)
            self.cut()
        return left

    def cut(self) -> None:
        """End the link on this side, or have the hop before it do so, whatever the host does."""
        stream, context_id = self._stream(), self.context.context_id
        # What there is goes through the broker and the hops, and these may be ending.
        with contextlib.suppress(mitogen.core.Error):
            if stream is not None and stream.protocol.remote_id == context_id:
                broker = self.router.broker
                broker.defer(inmanta_mitogen.hop.end, stream.conn, broker)
            elif stream is not None and self.via is not None and not self.via.is_too_old:
                self.via._order(inmanta_mitogen.hop.cut, context_id)
        self._gone.set()


def value_of(answer: mitogen.core.Message) -> Any:
    """
    Return the result of a call that mitogen made.

    :param answer: What came back for it.
    :raises CallError: It failed.
    :raises StreamError: The answer can't be read.
    """
    try:
        value = read_answer(answer.data)
    except UnreadableError as error:
        raise mitogen.core.StreamError(f"its answer cannot be read: {error}") from None
    if isinstance(value, mitogen.core.CallError):
        raise value
    return value


def _seconds(options: Mapping[str, object]) -> float:
    timeout = options.get("connect_timeout") or mitogen.parent.Options.connect_timeout
    return float(timeout)  # type: ignore[arg-type]  # a number, the context is valid
