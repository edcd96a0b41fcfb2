"""The agent's end of what is too large for one message; the host's is inmanta_mitogen.chunks."""

import contextlib
import hashlib
import io
import itertools
import queue
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Self

import inmanta_mitogen.chunks as host
from inmanta_mitogen.dispatch import CHUNK_SIZE, KEPT, RAW, WHOLE
from inmanta_plugins.mitogen import settings
from inmanta_plugins.mitogen.calls import request
from inmanta_plugins.mitogen.calls.call import Call
from inmanta_plugins.mitogen.calls.results import lost, nonsense, result_of
from inmanta_plugins.mitogen.connections.connection import Answer, Connection, Function
from inmanta_plugins.mitogen.errors import NotDeliveredError, RemoteException

if TYPE_CHECKING:
    from inmanta_mitogen.staged import StagedWrite

WINDOW = WHOLE // CHUNK_SIZE
"""The most chunks on the way: no more than a host may send in one message."""

Progress = Callable[[int, int], object]

_numbers = itertools.count(1)


class Transfer:
    """
    The calls that move one content, some of them in flight. Leaving the ``with`` block ends it.

    :param call: The call that it belongs to, whose clock runs.
    :param connection: The connection of the call.
    :param number: Its number on the host, where the host has begun it.
    """

    def __init__(self, call: Call, connection: Connection, number: int | None = None) -> None:
        self._call = call
        self._connection = connection
        self._number = next(_numbers) if number is None else number
        self._has_begun = number is not None
        self._inbox: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self.in_flight = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(RemoteException):
            self.ask(host.close)

    def ask(self, function: Function, *args: object) -> None:
        """
        Call a function of the host's end, and don't wait for its end.

        :param function: The function.
        :param args: Its arguments behind the number of the transfer.
        :raises RemoteException: The connection was lost.
        """
        size = self._connection.max_message_size
        packed = request.request(function, (self._number, *args), {}, size)
        with self._once_begun():
            self._connection.send((function, packed, self._inbox.put))
        self.in_flight += 1

    @contextlib.contextmanager
    def _once_begun(self) -> Iterator[None]:
        """Let nobody repeat what the host has begun."""
        try:
            yield
        except NotDeliveredError:
            if self._has_begun:
                raise lost(self._call.function, "it ended in the middle") from None
            raise

    def next(self) -> Answer:
        """
        Return the next answer.

        :raises CallTimeoutError: The call has taken longer than it may.
        """
        answer = self._call.next(self._inbox)
        self.in_flight -= 1
        if self._call.overdue:
            raise self._call.time_out()
        return answer

    def result(self, answer: Answer | None = None) -> object:
        """
        Return the result of one of its calls.

        :param answer: What came back for it, by default the next answer.
        :raises RemoteException: The host could not do it, or was lost.
        """
        with self._once_begun():
            result = _result(self._call, answer or self.next())
        self._has_begun = True
        return result


def upload(
    call: Call,
    connection: Connection,
    path: str,
    chunks: Iterator[bytes],
    size: int,
    in_place: bool,
    progress: Progress | None = None,
) -> None:
    """
    Write a file on the host.

    :param call: The call that it is.
    :param connection: Its connection.
    :param path: The file's path there.
    :param chunks: Its content. When it raises, the host's file stays as it is.
    :param size: How many bytes there are.
    :param in_place: As for :func:`inmanta_mitogen.put`.
    :param progress: Called with the bytes that were sent so far, and `size`; likewise.
    :raises OSError: `chunks` holds another number of bytes.
    :raises RemoteException: The host could not do it; its file is untouched.
    """
    digest = hashlib.sha1(usedforsecurity=False)
    sent = 0
    with Transfer(call, connection) as transfer:
        begun = time.monotonic()
        transfer.ask(host.receive, path, size, in_place)
        transfer.result()
        is_near = time.monotonic() - begun < settings.NEAR_SECONDS
        window = settings.NEAR_WINDOW if is_near else WINDOW
        for chunk in chunks:
            sent += len(chunk)
            if sent > size:
                continue  # whether it was changed is known at its end
            while transfer.in_flight >= window:
                transfer.result()
            transfer.ask(host.write, chunk)
            digest.update(chunk)
            if progress is not None:
                progress(sent, size)
        if sent != size:
            raise OSError(f"What is sent to {path!r} does not hold the {size} bytes it claims to")
        transfer.ask(host.write, digest.digest())
        while transfer.in_flight:
            transfer.result()


def fetch_file(
    call: Call,
    connection: Connection,
    path: str,
    sink: "StagedWrite",
    max_size: int | None,
    progress: Progress | None,
) -> None:
    """
    Fetch a file of the host.

    :param call: The call that it is.
    :param connection: Its connection.
    :param path: The file's path.
    :param sink: Gets the content, in chunks.
    :param max_size: The most bytes to accept, None for any number.
    :param progress: Called with the bytes that were received so far, and those in all.
    :raises RemoteException: The host could not do it, sent something else or too much, or the sha1
        of what arrived differs.
    """
    digest = hashlib.sha1(usedforsecurity=False)
    with Transfer(call, connection) as transfer:
        transfer.ask(host.send, path, max_size)
        chunks = _Chunks(transfer, max_size)
        size = transfer.result()
        if not isinstance(size, int):
            raise nonsense(call.function, "it answered without a file")
        for chunk in chunks:
            digest.update(chunk)
            sink.write(chunk)
            if progress is not None:
                progress(chunks.received, max(size, chunks.received))
    if chunks.last != digest.hexdigest():
        raise RemoteException(
            OSError("What arrived from the host is not what it sent, the sha1 differs: try again.")
        )


class _Chunks:
    """
    The content that a host sends; a part of it is on the way meanwhile.

    :param transfer: The transfer.
    :param max_size: The most bytes to accept, None for any number.
    """

    def __init__(self, transfer: Transfer, max_size: int | None) -> None:
        self._transfer = transfer
        self._max_size = max_size
        self.received = 0
        """How many bytes came so far."""
        self.last: object = None
        """What followed them."""
        for _ in range(WINDOW):
            transfer.ask(host.next_chunk)

    def __iter__(self) -> Iterator[bytes]:
        while not (answer := self._transfer.next()).is_dead and answer.data[:1] == RAW:
            self.received += len(answer.data) - 1
            if self._max_size is not None and self.received > self._max_size:
                text = host.too_large("What the host sends", self._max_size)
                raise RemoteException(OSError(text))
            yield answer.data[1:]
            self._transfer.ask(host.next_chunk)
        self.last = self._transfer.result(answer)


def whole_result(call: Call, answer: Answer) -> object:
    """
    Return the result of a call, after fetching it where it waits on the host.

    :param call: The call.
    :param answer: What came back for it.
    :raises RemoteException: As :func:`result_of`, or it can't be fetched.
    """
    if answer.is_dead or answer.data[:1] != KEPT:
        return _result(call, answer)
    assert call.connection is not None  # the answer came through it
    if len(answer.data) != 1 + host.TICKET.size:
        raise nonsense(call.function, "it keeps an answer, and does not say which")
    kind, number, _ = host.TICKET.unpack_from(answer.data, 1)
    asked = call.kwargs.get("max_size")
    limit = max(settings.max_size(), asked if isinstance(asked, int) else 0)
    with Transfer(call, call.connection, number) as transfer:
        # In one piece while it grows: it may be large.
        content = io.BytesIO()
        for chunk in _Chunks(transfer, limit):
            content.write(chunk)
    data = content.getvalue()
    return data if kind == RAW else _result(call, answer._replace(data=data))


def _result(call: Call, answer: Answer) -> object:
    # Nobody has waited for the interpreter to be prepared: the first call may be who finds out.
    if call.connection is not None and call.connection.link.failure is not None:
        raise RemoteException(call.connection.link.failure)
    return result_of(call.function, answer)
