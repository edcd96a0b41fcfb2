"""Calls in flight: what their callers do not wait for is finished here as the answers come."""

import collections
import functools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeVar

import mitogen.core
from inmanta_plugins.mitogen.calls.batch import CallBatches
from inmanta_plugins.mitogen.calls.request import Answer
from inmanta_plugins.mitogen.connections.hub import Connection


class Pending(Protocol):
    """A call under way."""

    @property
    def patience(self) -> float:
        """The seconds until it has to be looked at, answer or not."""

    @property
    def overdue(self) -> bool:
        """Whether it took longer than it may."""

    @property
    def lost(self) -> bool:
        """Whether no answer can come any more."""


C = TypeVar("C", bound=Pending)


class SentAgainError(Exception):
    """The answer was that the call never reached the host; it has been sent again."""


class PendingCalls(Generic[C]):
    """
    Finishes the calls of one proxy in one thread, which lives as long as there are any.

    :param settle: Makes a result, or the exception it raises, of a call and its answer; of None
        instead of the answer when the call is overdue.
    """

    def __init__(self, settle: Callable[[C, Answer | None], object]) -> None:
        self._settle = settle
        self._answers: queue.SimpleQueue[tuple[C, Answer]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        # The first of a plain dict takes the longer to find the more before it have gone.
        self._pending: collections.OrderedDict[C, Future[Any]] = collections.OrderedDict()
        self._running = False
        self._batches: CallBatches | None = None

    def send(self, call: C, send: Callable[[C], object]) -> Future[Any]:
        """
        :param call: A call; its answer goes to :meth:`deliver`.
        :param send: Sends it.
        :return: What it will come to. It can't be cancelled: the host may run it already.
        """
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            self._pending[call] = future
        try:
            send(call)
        except BaseException as error:
            with self._lock:
                del self._pending[call]
            if not isinstance(error, Exception):
                raise
            future.set_exception(error)
            return future
        self._run()
        return future

    def send_soon(
        self, connection: Connection, function: Callable[..., object], request: bytes, call: C
    ) -> None:
        """
        Send a request in one message with others that come at the same time.

        :param connection: The connection to send it over.
        :param function: The function that it calls.
        :param request: The request.
        :param call: Its call.
        :raises NotDeliveredError: The connection was closed meanwhile.
        """
        deliver = functools.partial(self.deliver, call)
        if connection.may_call(function, deliver):
            if self._batches is None or self._batches.connection is not connection:
                self._batches = CallBatches(connection)
            self._batches.put(request, deliver)

    def deliver(self, call: C, answer: Answer) -> None:
        """
        :param call: A call.
        :param answer: The answer to it.
        """
        self._answers.put((call, answer))

    def _run(self) -> None:
        with self._lock:
            if self._running or not self._pending:
                return
            self._running = True
        # A daemon: with the process the connections end, and so the calls.
        threading.Thread(target=self._collect, name="inmanta-mitogen-calls", daemon=True).start()

    def _collect(self) -> None:
        while True:
            with self._lock:
                first = next(iter(self._pending), None)
                if first is None:
                    self._running = False
                    return
            try:
                call, answer = self._answers.get(timeout=first.patience)
            except queue.Empty:
                self._look_after_all()
            else:
                self._finish(call, answer)

    def _look_after_all(self) -> None:
        with self._lock:
            pending = list(self._pending)
        for call in pending:
            if call.overdue:
                self._finish(call, None)
            elif call.lost and self._answers.empty():
                self._finish(call, mitogen.core.Message.dead("the connection has ended"))

    def _finish(self, call: C, answer: Answer | None) -> None:
        with self._lock:
            future = self._pending.get(call)
        if future is None:
            return  # it was given up before it was answered
        result, error = None, None
        try:
            result = self._settle(call, answer)
        except SentAgainError:
            return
        except BaseException as raised:
            error = raised
        with self._lock:
            del self._pending[call]
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
