"""Calls that nobody waits for one by one: those that come together travel together."""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import inmanta_mitogen.calls
import mitogen.core
from inmanta_plugins.mitogen import calls

Deliver = Callable[[calls.Answer], object]


class Line(Protocol):
    """What an outbox needs of a connection."""

    def call_soon(self, function: Callable[[], object]) -> None:
        """
        :param function: Called on the broker's thread.
        :raises NotDeliveredError: The connection was closed.
        """

    def listen(self, deliver: Callable[[mitogen.core.Message], object]) -> int:
        """
        :param deliver: Gets each message for the handle.
        :return: The handle.
        """

    def unlisten(self, handle: int) -> None:
        """
        :param handle: What :meth:`listen` returned.
        """

    def post(self, message: mitogen.core.Message) -> None:
        """
        :param message: Sent as it is.
        """


class Outbox:
    """
    Sends calls when the broker's thread gets to it, as many in one message as wait by then.

    A message costs both ends several times what a call in it does. Nothing waits for there to be
    more: a call that comes alone goes alone.

    :param line: The connection.
    """

    def __init__(self, line: Line) -> None:
        self._line = line
        self._waiting: collections.deque[tuple[bytes, Deliver]] = collections.deque()
        self._is_called = False

    def put(self, request: bytes, deliver: Deliver) -> None:
        """
        :param request: What asks for a call.
        :param deliver: Gets the answer, once, on the broker's thread.
        :raises NotDeliveredError: The connection was closed.
        """
        self._waiting.append((request, deliver))
        if not self._is_called:
            self._is_called = True
            self._line.call_soon(self._send)

    def _send(self) -> None:
        # Whatever is put from here on calls it again.
        self._is_called = False
        while self._waiting:
            pack = list(self._next_pack())
            requests, delivers = zip(*pack, strict=True)
            _Pack(self._line, delivers).send(requests)

    def _next_pack(self) -> Iterator[tuple[bytes, Deliver]]:
        size = 0
        while self._waiting:
            request, _ = self._waiting[0]
            if size and size + len(request) > inmanta_mitogen.calls.PACK:
                return
            size += len(request)
            yield self._waiting.popleft()


class _Pack:
    """Calls that were sent in one message; all of this runs on the broker's thread."""

    def __init__(self, line: Line, delivers: Sequence[Deliver]) -> None:
        self._line = line
        self._delivers = collections.deque(delivers)
        self._handle = line.listen(self._on_message)

    def send(self, requests: Sequence[bytes]) -> None:
        """
        :param requests: What asks for the calls.
        """
        message = calls.request_as_is(inmanta_mitogen.calls.call_each, list(requests), self._handle)
        message.reply_to = self._handle
        try:
            self._line.post(message)
        except Exception as error:
            # Any exception that leaves this thread ends it, with all connections of the process.
            self._end(mitogen.core.Message.dead(f"it could not be sent: {error!r}"))

    def _on_message(self, message: mitogen.core.Message) -> None:
        if message.is_dead:
            self._end(message)
        elif message.enc != mitogen.core.Message.ENC_BIN:
            # The host's part has ended, and so answered all of them.
            self._end(mitogen.core.Message.dead("it was not answered"))
        else:
            self._take(message.data)

    def _take(self, data: bytes) -> None:
        try:
            for answer in inmanta_mitogen.calls.unpack_answers(data):
                self._delivers.popleft()(calls.AnswerAmongOthers(answer))
        except (ValueError, IndexError):
            self._end(
                mitogen.core.Message.dead("the host's answers are not those to what was sent")
            )

    def _end(self, message: mitogen.core.Message) -> None:
        # What the host sends from now on is nothing that was asked for.
        self._line.unlisten(self._handle)
        while self._delivers:
            self._delivers.popleft()(message)
