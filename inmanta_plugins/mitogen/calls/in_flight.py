"""Calls in flight: those that nobody waits for."""

import collections
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from inmanta_plugins.mitogen.calls.call import Call
from inmanta_plugins.mitogen.connections.connection import Answer, dead

LOGGER = logging.getLogger(__name__)


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
                self._finish(call, dead("the connection has ended"))

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
