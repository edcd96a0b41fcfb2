"""Calls in flight: those that nobody waits for."""

import collections
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

LOGGER = logging.getLogger(__name__)


class PendingCalls:
    """
    Finishes the submitted calls of one proxy, one after another as the host runs them, in a thread
    that lives as long as there are any.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: collections.deque[tuple[Future[Any], Callable[[], object]]]
        self._pending = collections.deque()

    def add(self, finish: Callable[[], object]) -> Future[Any]:
        """
        Return what a call will come to. It can't be cancelled: the host may run it already.

        :param finish: Waits for the answer to the call that was sent, and makes its result.
        :raises RuntimeError: There can be no more threads.
        """
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if not self._pending:
                # A daemon: with the process the connections end, and so the calls.
                name = "inmanta-mitogen-calls"
                threading.Thread(target=self._finish_all, name=name, daemon=True).start()
            self._pending.append((future, finish))
        return future

    def _finish_all(self) -> None:
        more = True
        while more:
            with self._lock:
                future, finish = self._pending[0]
            try:
                _finish(future, finish)
            except BaseException:
                # A callback that calls sys.exit() must not end the thread of all other calls.
                LOGGER.exception("A callback of a submitted call raised an exception")
            with self._lock:
                self._pending.popleft()
                more = bool(self._pending)


def _finish(future: Future[Any], finish: Callable[[], object]) -> None:
    try:
        result = finish()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
