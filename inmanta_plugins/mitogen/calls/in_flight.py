"""Calls in flight: several in one message, and those that nobody waits for."""

import collections
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import inmanta_mitogen.dispatch
import mitogen.core
from inmanta_mitogen.dispatch import Packer
from inmanta_plugins.mitogen import _mitogen
from inmanta_plugins.mitogen.calls.call import Answer, AnswerAmongOthers, Call
from inmanta_plugins.mitogen.connections.hub import Connection

LOGGER = logging.getLogger(__name__)

Deliver = Callable[[Answer], object]


class CallBatch:
    """
    Calls that are sent in one message.

    :param connection: The connection to send them over.
    :param calls: Their requests, each with what gets its answer: once, on the broker's thread, so
        it must not block.
    :raises NotDeliveredError: The connection was closed.
    """

    def __init__(self, connection: Connection, calls: Sequence[tuple[bytes, Deliver]]) -> None:
        self._connection = connection
        self._delivers = collections.deque(deliver for _, deliver in calls)
        self._handle = connection.listen(self._on_message)
        requests = [request for request, _ in calls]
        message = _mitogen.order(inmanta_mitogen.dispatch.call_each, requests, self._handle)
        message.reply_to = self._handle
        try:
            connection.post(message)
        except BaseException:
            connection.unlisten(self._handle)
            raise

    def _on_message(self, message: mitogen.core.Message) -> None:
        if message.is_dead:
            self._end(message)
        elif message.enc != mitogen.core.Message.ENC_BIN:
            # The host's part has ended, and so answered all of them.
            self._end(mitogen.core.Message.dead("it was not answered"))
        else:
            self._take(message.data)

    def _take(self, data: bytes) -> None:
        now = time.monotonic()
        try:
            for answer in inmanta_mitogen.dispatch.unpack_answers(data):
                self._delivers.popleft()(AnswerAmongOthers(answer, now))
        except (ValueError, IndexError):
            self._end(
                mitogen.core.Message.dead("the host's answers are not those to what was sent")
            )

    def _end(self, message: mitogen.core.Message) -> None:
        # What the host sends from now on is nothing that was asked for.
        self._connection.unlisten(self._handle)
        while self._delivers:
            self._delivers.popleft()(message)


def _send_batch(connection: Connection, calls: Sequence[tuple[bytes, Deliver]]) -> None:
    try:
        CallBatch(connection, calls)
    except Exception as error:
        # Any exception that leaves the broker's thread ends it, with all connections.
        for _, deliver in calls:
            deliver(mitogen.core.Message.dead(f"it could not be sent: {error!r}"))


class SentAgainError(Exception):
    """The answer was that the call never reached the host; it has been sent again."""


class PendingCalls:
    """
    Finishes the calls of one proxy in one thread, which lives as long as there are any.

    :param settle: Makes a result, or the exception it raises, of a call and its answer; of None
        instead of the answer when the call is overdue.
    """

    def __init__(self, settle: Callable[[Call, Answer | None], object]) -> None:
        self._settle = settle
        # None has the thread look at what is pending.
        self._answers: queue.SimpleQueue[tuple[Call, Answer] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        # The first of a plain dict takes the longer to find the more before it have gone.
        self._pending: collections.OrderedDict[Call, Future[Any]] = collections.OrderedDict()
        self._running = False
        self._packer: tuple[Connection, Packer[Deliver]] | None = None

    def send(self, call: Call, send: Callable[[Call], object]) -> Future[Any]:
        """
        Send a call, and return what it will come to. It can't be cancelled: the host may run it
        already.

        :param call: The call; its answer goes to :meth:`deliver`.
        :param send: Sends it.
        """
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            is_first = not self._pending
            self._pending[call] = future
        try:
            self._run()
            send(call)
        except BaseException as error:
            with self._lock:
                del self._pending[call]
            if not isinstance(error, Exception):
                raise
            future.set_exception(error)
        finally:
            if is_first:
                # The thread may have looked at it before its clock ran, or it is gone again.
                self._answers.put(None)
        return future

    def send_soon(self, connection: Connection, request: bytes, call: Call) -> None:
        """
        Send a request in one message with others that come at the same time.

        :param connection: The connection to send it over.
        :param request: The request.
        :param call: Its call.
        :raises NotDeliveredError: The connection was closed meanwhile.
        """
        deliver = functools.partial(self.deliver, call)
        if connection.may_call(call.function, deliver):
            if self._packer is None or self._packer[0] is not connection:
                send = functools.partial(_send_batch, connection)
                self._packer = connection, Packer(connection.call_soon, send)
            self._packer[1].put(request, deliver)

    def deliver(self, call: Call, answer: Answer) -> None:
        """
        Take the answer to a call.

        :param call: The call.
        :param answer: The answer.
        """
        self._answers.put((call, answer))

    def _run(self) -> None:
        with self._lock:
            if self._running:
                return
            # A daemon: with the process the connections end, and so the calls.
            thread = threading.Thread(
                target=self._collect, name="inmanta-mitogen-calls", daemon=True
            )
            thread.start()
            self._running = True

    def _collect(self) -> None:
        while True:
            with self._lock:
                first = next(iter(self._pending), None)
                if first is None:
                    self._running = False
                    return
            try:
                answered = self._answers.get(timeout=first.seconds_until_check)
            except queue.Empty:
                self._check_all()
            else:
                if answered is not None:
                    self._finish(*answered)

    def _check_all(self) -> None:
        with self._lock:
            pending = list(self._pending)
        for call in pending:
            if call.overdue:
                self._finish(call, None)
            elif call.lost and self._answers.empty():
                self._finish(call, mitogen.core.Message.dead("the connection has ended"))

    def _finish(self, call: Call, answer: Answer | None) -> None:
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
        try:
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
        except BaseException:
            # A callback that calls sys.exit() must not end the thread of all other calls.
            LOGGER.exception("A callback of a submitted call raised an exception")
