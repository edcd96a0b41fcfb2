"""Calls that nobody waits for one by one: those that come together travel together."""

import collections
from collections.abc import Callable, Sequence
from typing import Protocol

import inmanta_mitogen.calls
import mitogen.core
from inmanta_mitogen.calls import Packer
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


def outbox(line: Line) -> Packer[Deliver]:
    """
    :param line: A connection.
    :return: Where requests for calls over it are put, each with what gets the answer: once, on the
        broker's thread. It raises :class:`NotDeliveredError` when the connection was closed.
    """
    return Packer(line.call_soon, lambda pack: _Pack(line, pack))


class _Pack:
    """Calls that were sent in one message; all of this runs on the broker's thread."""

    def __init__(self, line: Line, pack: Sequence[tuple[bytes, Deliver]]) -> None:
        self._line = line
        self._delivers = collections.deque(deliver for _, deliver in pack)
        self._handle = line.listen(self._on_message)
        requests = [request for request, _ in pack]
        message = calls.request_as_is(inmanta_mitogen.calls.call_each, requests, self._handle)
        message.reply_to = self._handle
        try:
            line.post(message)
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
