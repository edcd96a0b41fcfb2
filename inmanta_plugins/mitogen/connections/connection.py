"""The open connection of a proxy: its calls, in the order in which the host runs them."""

import collections
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import inmanta_mitogen.dispatch
import mitogen.core
from inmanta_mitogen.dispatch import LENGTH, Batcher
from inmanta_plugins.mitogen import _mitogen, settings
from inmanta_plugins.mitogen.connections.link import Link
from inmanta_plugins.mitogen.errors import NotDeliveredError

Function = Callable[..., object]


class Answer(NamedTuple):
    """
    What came back for a call.

    :param data: The answer, or the reason of one that is dead.
    :param came: When it came, by the monotonic clock.
    :param is_dead: Whether it says that there will be no answer.
    """

    data: bytes
    came: float
    is_dead: bool = False


def dead(reason: str) -> Answer:
    """
    Return what is delivered for a call that gets no answer.

    :param reason: Why.
    """
    return Answer(reason.encode(), time.monotonic(), is_dead=True)


Deliver = Callable[[Answer], object]


class Connection:
    """
    A proxy's own context, and its share of the hops before it.

    Calls that come at the same time share a message, and so do their answers. The host runs them in
    the order in which they were sent, and answers in that order; so an answer needs no name.

    :param link: The connected context.
    :param leave: Called when it is closed, to give the hops back.
    """

    def __init__(self, link: Link, leave: Callable[[], object]) -> None:
        self.link = link
        self._leave = leave
        self._lock = threading.Lock()
        self._closed = False
        self._allowed: set[Function] = set()
        # What gets the answers of each message that was sent. On the broker's thread alone.
        self._waiting: collections.deque[collections.deque[Deliver]] = collections.deque()
        self._outbox: Batcher[Deliver] = Batcher(link.router.broker.defer, self._send)
        self._handle = link.router.add_handler(self._on_message, respondent=link.context)

    @property
    def max_message_size(self) -> int:
        """What a message may carry, in bytes."""
        return int(self.link.router.max_message_size)

    def send(self, *calls: tuple[Function, bytes, Deliver]) -> None:
        """
        Send calls, in one message where they are not too large for that.

        :param calls: The function of each call, its request, and what gets its answer: once, on the
            broker's thread, so it must not block. A dead answer tells that there will be none.
        :raises NotDeliveredError: The connection was closed meanwhile.
        """
        if all(self._may_call(function) for function, _, _ in calls):
            try:
                self._outbox.put([(request, deliver) for _, request, deliver in calls])
            except mitogen.core.Error as error:
                raise NotDeliveredError(error) from None
            return
        # The next attempt gets an interpreter that has loaded nothing.
        self.link.end(settings.LEAVE_TIMEOUT)
        for _, _, deliver in calls:
            deliver(dead(_mitogen.NO_ROUTE))

    def _may_call(self, function: Function) -> bool:
        """Let the host have what a function needs. Return whether it can be called now."""
        if function not in self._allowed:
            if not (self.link.allow(inmanta_mitogen.dispatch.call) and self.link.allow(function)):
                return False
            self._allowed.add(function)
        return True

    # On the broker's thread, which any exception would end, with all connections

    def _send(self, calls: Sequence[tuple[bytes, Deliver]]) -> None:
        batch = collections.deque(deliver for _, deliver in calls)
        self._waiting.append(batch)
        if self.link.ended:
            self._end(_mitogen.NO_ROUTE)
            return
        try:
            requests = [request for request, _ in calls]
            message = (
                _mitogen.order(inmanta_mitogen.dispatch.call_each, requests, self._handle)
                if len(requests) > 1
                else _mitogen.call_message(requests[0])
            )
            message.reply_to = self._handle
            self.post(message)
        except Exception as error:
            if batch:  # they have not been told otherwise
                self._waiting.pop()
                _deliver(batch, dead(f"it could not be sent: {error!r}"))

    def post(self, message: mitogen.core.Message) -> None:
        """
        Send a message as it is.

        :param message: The message.
        """
        self.link.context.send(message)

    def _on_message(self, message: mitogen.core.Message) -> None:
        if message.is_dead:
            self._end(message.data.decode("utf-8", "replace"))
            self.link.cut()
        elif message.enc == mitogen.core.Message.ENC_BIN and message.data:
            self._take(message)
        elif self._waiting and message.data:
            # The answer to a call that was sent alone, or mitogen's own that there are none.
            _deliver(self._waiting.popleft(), Answer(message.data, time.monotonic()))
        else:
            self._refuse(message)

    def _refuse(self, message: mitogen.core.Message) -> None:
        router = self.link.router
        router.reject(router.host_of(message), "that nothing waits for")

    def _take(self, message: mitogen.core.Message) -> None:
        now = time.monotonic()
        try:
            for answer in unpack_answers(message.data):
                if not self._waiting:
                    self._refuse(message)
                    return
                deliver = self._waiting[0].popleft()
                if not self._waiting[0]:
                    self._waiting.popleft()
                deliver(Answer(answer, now))
        except ValueError:
            self._end("the host's answers are not those to what was sent")
            self.link.cut()

    def _end(self, reason: str) -> None:
        while self._waiting:
            # What never left is the last that was sent.
            left = len(self._waiting) > 1 and reason.startswith(_mitogen.NO_ROUTE)
            _deliver(self._waiting.popleft(), dead("the connection has ended" if left else reason))

    def close(self, timeout: float) -> bool:
        """
        End it. Closing it again does nothing.

        :param timeout: How long the host may take, in seconds.
        :return: Whether the host left by itself in time; False when it had to be cut off.
        """
        if self.link.inherited:
            return True  # the other process's to close; its locks may be held forever here
        with self._lock:
            if self._closed:
                return True
            self._closed = True
        left = self.link.end(timeout)
        self._leave()
        return left


def unpack_answers(data: bytes) -> Iterator[bytes]:
    """
    Yield the answers of :func:`inmanta_mitogen.dispatch.call_each` that are in one message.

    :param data: The message.
    :raises ValueError: It holds something else.
    """
    at = 0
    while at < len(data):
        start = at + LENGTH.size
        if start > len(data):
            raise ValueError("it ends in the middle of a length")
        at = start + LENGTH.unpack_from(data, at)[0]
        if at > len(data):
            raise ValueError("it ends in the middle of an answer")
        yield data[start:at]


def _deliver(batch: collections.deque[Deliver], answer: Answer) -> None:
    while batch:
        batch.popleft()(answer)
