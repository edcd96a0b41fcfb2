"""Calls that nobody waits for one by one: those that come together travel together."""

import collections
from collections.abc import Callable, Sequence

import inmanta_mitogen.dispatch
import mitogen.core
from inmanta_mitogen.dispatch import Packer
from inmanta_plugins.mitogen import _mitogen
from inmanta_plugins.mitogen.calls import request as calls
from inmanta_plugins.mitogen.connections.hub import Connection

Deliver = Callable[[calls.Answer], object]


class CallBatches:
    """
    Sends requests over one connection, those that come together in one message.

    :param connection: The connection.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._packer = Packer[Deliver](
            connection.call_soon, lambda requests: CallBatch(connection, requests)
        )

    def put(self, request: bytes, deliver: Deliver) -> None:
        """
        Send a request soon.

        :param request: The request.
        :param deliver: Gets the answer: once, on the broker's thread, so it must not block.
        :raises NotDeliveredError: The connection was closed.
        """
        self._packer.put(request, deliver)


class CallBatch:
    """Calls that were sent in one message; all of this runs on the broker's thread."""

    def __init__(self, connection: Connection, pack: Sequence[tuple[bytes, Deliver]]) -> None:
        self._connection = connection
        self._delivers = collections.deque(deliver for _, deliver in pack)
        self._handle = connection.listen(self._on_message)
        requests = [request for request, _ in pack]
        message = _mitogen.order(inmanta_mitogen.dispatch.call_each, requests, self._handle)
        message.reply_to = self._handle
        try:
            connection.post(message)
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
            for answer in inmanta_mitogen.dispatch.unpack_answers(data):
                self._delivers.popleft()(calls.AnswerAmongOthers(answer))
        except (ValueError, IndexError):
            self._end(
                mitogen.core.Message.dead("the host's answers are not those to what was sent")
            )

    def _end(self, message: mitogen.core.Message) -> None:
        # What the host sends from now on is nothing that was asked for.
        self._connection.unlisten(self._handle)
        while self._delivers:
            self._delivers.popleft()(message)
