"""The agent's end of what is too large for one message; the host's is inmanta_mitogen.chunks."""

import contextlib
import hashlib
import io
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import Protocol, Self

import inmanta_mitogen.chunks as host
import mitogen.core
from inmanta_mitogen.dispatch import KEPT, RAW
from inmanta_plugins.mitogen import settings
from inmanta_plugins.mitogen.calls import request
from inmanta_plugins.mitogen.calls.call import Answer, AnswerAmongOthers, Call
from inmanta_plugins.mitogen.calls.results import lost, nonsense, result_of
from inmanta_plugins.mitogen.connections.hub import Connection
from inmanta_plugins.mitogen.errors import NotDeliveredError, RemoteException

# What is on the way to a host whose first acknowledgement takes no longer than that, in bytes and
# seconds. It need not be more there; and sshd (9.2) takes in all that there is before it passes
# anything on, in a buffer whose growth to 2 MiB takes it 50 ms.
_NEAR_WINDOW = host.WINDOW // 2
NEAR = 0.025

Progress = Callable[[int, int], object]


class Exchange:
    """
    What a host sends to a handle of its own while chunks move, a bounded amount at a time.

    :param call: The call that it belongs to, whose clock runs.
    :param connection: The connection of the call.
    """

    def __init__(self, call: Call, connection: Connection) -> None:
        self._call = call
        self._connection = connection
        self._handle = 0
        self._peer = 0
        self._unread = 0
        self._flooded = False
        self._answer: Answer | None = None

    def __enter__(self) -> Self:
        self._handle = self._connection.listen(self._deliver)
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.unlisten(self._handle)
        if self._answer is not None:
            return
        if self._peer:
            with contextlib.suppress(NotDeliveredError):
                self._connection.post(mitogen.core.Message.dead("given up", handle=self._peer))
        else:
            # It waits for what nobody will send.
            self._connection.link.end(settings.LEAVE_TIMEOUT)

    def _deliver(self, message: mitogen.core.Message) -> None:
        # On the broker's thread.
        self._unread += len(message.data) + settings.MESSAGE_COST
        if self._unread > settings.MOST_UNREAD:
            if not self._flooded:
                self._flooded = True
                self._call.inbox.put(mitogen.core.Message.dead("too much at once"))
        else:
            self._call.inbox.put(message)

    def upload(self, path: str, size: int, *, in_place: bool) -> None:
        """
        Have the host write a file with what is posted from then on.

        :param path: The file.
        :param size: How many bytes will be posted.
        :param in_place: As for :func:`inmanta_mitogen.put`.
        :raises RemoteException: The host refuses.
        """
        message = request.request(
            host.receive,
            (path, size, self._handle, in_place),
            {},
            self._connection.link.router.max_message_size,
        )
        self._connection.send(host.receive, message, self._call.inbox.put)
        self.fetch_from(self.expect())

    def fetch_from(self, ticket: bytes) -> tuple[bytes, int]:
        """
        Return what the host has to send, and how much of it.

        :param ticket: What it said.
        :raises RemoteException: It said something else.
        """
        try:
            kind, self._peer, size = host.unpack_ticket(ticket)
        except ValueError as error:
            raise nonsense(self._call.function, str(error)) from None
        return kind, size

    def post(self, data: bytes, *, reply: bool = False) -> None:
        """
        Send bytes to the host, as they are.

        :param data: The bytes.
        :param reply: Whether to tell where the host is to send to.
        """
        enc = mitogen.core.Message.ENC_BIN
        message = mitogen.core.Message(data=data, enc=enc, handle=self._peer)
        if reply:
            message.reply_to = self._handle
        try:
            self._connection.post(message)
        except NotDeliveredError as error:
            # The call itself was delivered.
            raise RemoteException(error.remote_exception) from None

    def next(self) -> bytes | None:
        """
        Return the next bytes from the host, None at the end.

        :raises RemoteException: The host sends more than was agreed.
        :raises CallTimeoutError: The call has taken longer than it may.
        """
        if self._answer is not None:
            return None
        message = self._call.next()
        if self._flooded:
            self._connection.link.cut()
            what = "it sent more than was agreed, without waiting"
            raise nonsense(self._call.function, what)
        if not self._is_chunk(message):
            self._answer = message
            return None
        self._unread -= len(message.data) + settings.MESSAGE_COST
        if self._call.overdue:
            raise self._call.time_out()
        return message.data

    def _is_chunk(self, message: Answer) -> bool:
        return (
            isinstance(message, mitogen.core.Message)
            and message.handle == self._handle
            and message.enc == mitogen.core.Message.ENC_BIN
            and not message.is_dead
        )

    def expect(self) -> bytes:
        """
        Return the next bytes from the host.

        :raises RemoteException: It failed, or has ended without them.
        """
        data = self.next()
        if data is None:
            self.result()
            raise nonsense(self._call.function, "it ended before it received everything")
        return data

    def result(self) -> object:
        """
        Return what the host answered at the end.

        :raises RemoteException: It failed, or the connection was lost.
        """
        while self.next() is not None:
            pass
        assert self._answer is not None  # next says so
        try:
            return _result(self._call, self._answer)
        except NotDeliveredError:
            if self._peer:
                raise lost(self._call.function, "it ended in the middle") from None
            raise


# To the host


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
    :raises RemoteException: The host could not do it; its file is untouched.
    """
    digest = hashlib.sha1(usedforsecurity=False)
    sent = received = 0
    window = _NEAR_WINDOW
    with Exchange(call, connection) as exchange:
        exchange.upload(path, size, in_place=in_place)
        begun = time.monotonic()
        for chunk in chunks:
            while sent + len(chunk) - received > window:
                received, before = _count(call, exchange.expect(), sent), received
                if not before and time.monotonic() - begun > NEAR:
                    window = host.WINDOW
            exchange.post(chunk)
            digest.update(chunk)
            sent += len(chunk)
            if progress is not None:
                progress(sent, size)
        exchange.post(digest.digest())
        exchange.result()


def _count(call: Call, data: bytes, sent: int) -> int:
    try:
        return min(sent, host.unpack_count(data))
    except ValueError as error:
        raise nonsense(call.function, str(error)) from None


def slices(content: memoryview) -> Iterator[bytes]:
    """
    Return some bytes in the pieces that are sent.

    :param content: The bytes.
    """
    for start in range(0, len(content), host.CHUNK):
        yield bytes(content[start : start + host.CHUNK])


class LocalFile:
    """
    A file of the agent that is to be sent, and must stay as it is meanwhile.

    :param path: Its path.
    :raises OSError: It can't be read, or is not a regular file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        # A FIFO would wait for its writer.
        self._file = open(path, "rb", buffering=0, opener=host.open_at_once)  # noqa: SIM115  # closed by __exit__
        self._state = os.fstat(self._file.fileno())
        if not stat.S_ISREG(self._state.st_mode):
            self._file.close()
            raise OSError(f"{self.path!r} on the agent is not a regular file")
        self.size = self._state.st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def chunks(self) -> Iterator[bytes]:
        """
        Return the content, from its start.

        :raises OSError: It is not what it was when it was opened.
        """
        self._file.seek(0)
        left = self.size
        while chunk := self._file.read(min(host.CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                break
            yield chunk
        host.check_unchanged(self.path, self._state, os.fstat(self._file.fileno()))
        if left:
            raise OSError(f"{self.path!r} does not hold the {self.size} bytes that it claims to")


# From the host


class Sink(Protocol):
    """Where a content goes."""

    def write(self, chunk: bytes, /) -> object:
        """
        Add to it.

        :param chunk: The next bytes.
        """
        ...


def fetch(
    call: Call,
    connection: Connection,
    ticket: bytes,
    sink: Sink,
    max_size: int | None,
    progress: Progress | None = None,
) -> object:
    """
    Fetch what waits on the host, and return what follows it.

    :param call: The call that it is the result of.
    :param connection: The connection of the call.
    :param ticket: What the host answered.
    :param sink: Gets the content, in chunks.
    :param max_size: The most bytes to accept, None for any number.
    :param progress: Called with the bytes that were received so far, and those in all.
    :raises RemoteException: The host could not do it, or sent something else or too much.
    """
    received = acknowledged = 0
    with Exchange(call, connection) as exchange:
        _, size = exchange.fetch_from(ticket)
        exchange.post(host.pack_count(0), reply=True)
        while (chunk := exchange.next()) is not None:
            received += len(chunk)
            if max_size is not None and received > max_size:
                raise RemoteException(OSError(host.too_large("What the host sends", max_size)))
            sink.write(chunk)
            if progress is not None:
                progress(received, max(size, received))
            if received - acknowledged >= host.ACKNOWLEDGE:
                acknowledged = received
                exchange.post(host.pack_count(received))
        return exchange.result()


def fetch_file(
    call: Call,
    connection: Connection,
    sink: Sink,
    max_size: int | None,
    progress: Progress | None,
) -> None:
    """
    Fetch the file that a call of :func:`inmanta_mitogen.chunks.send` offers, as :func:`fetch` does.

    :raises RemoteException: As :func:`fetch`, or the sha1 of what arrived differs.
    """
    answer = call.next()
    if answer.is_dead or answer.data[:1] != RAW:
        _result(call, answer)
        raise nonsense(call.function, "it answered without a file")
    digest = hashlib.sha1(usedforsecurity=False)

    class Digesting:
        def write(self, chunk: bytes) -> None:
            digest.update(chunk)
            sink.write(chunk)

    sha1 = fetch(call, connection, answer.data, Digesting(), max_size, progress)
    if sha1 != digest.hexdigest():
        raise RemoteException(
            OSError("What arrived from the host is not what it sent, the sha1 differs: try again.")
        )


def whole_result(call: Call, answer: Answer) -> object:
    """
    Return the result of a call, after fetching it where it waits on the host.

    :param call: The call.
    :param answer: What came back for it.
    :raises RemoteException: As :func:`result_of`, or it can't be fetched.
    """
    if answer.is_dead or answer.data[:1] not in (KEPT, RAW):
        return _result(call, answer)
    assert call.connection is not None  # the answer came through it
    content = io.BytesIO()
    asked = call.kwargs.get("max_size")
    limit = max(settings.max_size(), asked if isinstance(asked, int) else 0)
    fetch(call, call.connection, answer.data, content, limit)
    if answer.data[:1] == RAW:
        return content.getvalue()
    return _result(call, AnswerAmongOthers(content.getvalue(), 0.0))


def _result(call: Call, answer: Answer) -> object:
    # Nobody has waited for the interpreter to be prepared: the first call may be who finds out.
    if call.connection is not None and call.connection.link.failure is not None:
        raise RemoteException(call.connection.link.failure)
    return result_of(call.function, answer)
