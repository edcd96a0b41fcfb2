"""The agent's end of what is too large for one message; the host's is inmanta_mitogen.chunks."""

import hashlib
import io
import os
import queue
import stat
import time
from collections.abc import Callable, Iterator
from typing import Protocol, Self

import inmanta_mitogen.chunks as host
import mitogen.core
from inmanta_mitogen.process import decode_output
from inmanta_mitogen.staged import StagedWrite
from inmanta_plugins.mitogen.calls import request as calls
from inmanta_plugins.mitogen.connections.hub import Connection
from inmanta_plugins.mitogen.errors import RemoteException

# What a host may have sent and this end not yet looked at. A host that keeps to the window never
# gets near; one that does not would fill the agent's memory.
_FLOOD = 2 * host.WINDOW

# What is on the way to a host whose first acknowledgement takes no longer than that, in bytes and
# seconds. It need not be more there; and sshd (9.2) takes in all that there is before it passes
# anything on, in a buffer whose growth to 2 MiB takes it 50 ms.
_NEAR_WINDOW = host.WINDOW // 2
_NEAR = 0.025

Progress = Callable[[int, int], object]


class Exchange:
    """
    A remote call during which raw chunks move, a bounded number of them at a time.

    :param connection: The connection to the host.
    :param function: The function that the user called, as errors name it.
    :param inbox: Gets all that comes, the answer last.
    :param wait: Waits for the next message in it; raises when the call has taken too long.
    """

    def __init__(
        self,
        connection: Connection,
        function: Callable[..., object],
        inbox: queue.SimpleQueue[mitogen.core.Message],
        wait: Callable[[], mitogen.core.Message],
    ) -> None:
        self._connection = connection
        self._function = function
        self._inbox = inbox
        self._wait = wait
        self._handle = 0
        self._peer = 0
        self._arrived = 0
        self._taken = 0
        self._flooded = False
        self._answered = False
        self._abandoned = False
        self._answer: mitogen.core.Message | None = None

    def __enter__(self) -> Self:
        self._handle = self._connection.listen(self._deliver)
        return self

    def __exit__(self, *_: object) -> None:
        if self._answer is None:
            # On the broker's thread, so that nothing arrives in between.
            self._connection.defer(self._abandon)
        else:
            self._connection.unlisten(self._handle)

    # On the broker's thread

    def _deliver(self, message: mitogen.core.Message) -> None:
        if self._abandoned:
            self._turn_down(message)
            return
        self._arrived += len(message.data)
        if self._arrived - self._taken > _FLOOD:
            if self._flooded:
                return
            self._flooded = True
            message = mitogen.core.Message.dead("too much at once")
        self._inbox.put(message)

    def _deliver_answer(self, message: mitogen.core.Message) -> None:
        self._answered = True
        if self._abandoned:
            self._connection.unlisten(self._handle)
        self._inbox.put(message)

    def _abandon(self) -> None:
        """Have the host give up, now or when it says where it listens."""
        self._abandoned = True
        if self._answered:
            self._connection.unlisten(self._handle)
        elif self._peer:
            self._post_dead()
        while not self._inbox.empty():
            self._turn_down(self._inbox.get())

    def _turn_down(self, message: mitogen.core.Message) -> None:
        if self._peer or message.handle != self._handle or message.is_dead:
            return
        try:
            self._peer, _ = host.unpack_begin(message.data)
        except ValueError:
            return
        self._post_dead()

    def _post_dead(self) -> None:
        self._connection.post(mitogen.core.Message.dead("given up", handle=self._peer))

    # On the caller's

    def start(self, function: Callable[..., object], *args: object, **kwargs: object) -> None:
        """
        Call a function of the host's end.

        :param function: The function.
        :param args: Its arguments.
        :param kwargs: More of them; ``sender`` is added.
        :raises TypeError: An argument can't travel.
        :raises ValueError: The arguments take more than one message carries.
        """
        kwargs["sender"] = mitogen.core.Sender(self._connection.link.router.myself(), self._handle)
        self._send(function, args, kwargs)

    def call(self, function: Callable[..., object], *args: object) -> object:
        """
        Call a function without any chunks.

        :param function: The function.
        :param args: Its arguments.
        :return: The result.
        :raises TypeError: An argument can't travel.
        :raises RemoteException: It failed.
        """
        self._send(function, args, {})
        return self.result()

    def _send(
        self, function: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        limit = self._connection.link.router.max_message_size
        message = calls.request(function, args, kwargs, limit)
        self._connection.send(function, message, self._deliver_answer)

    def next(self) -> bytes | None:
        """
        :return: The next bytes from the host, None when it has answered.
        :raises RemoteException: The host sends more than was agreed.
        """
        if self._answer is not None:
            return None
        message = self._wait()
        if self._flooded:
            self._connection.link.cut()
            raise self.nonsense("it sent more than was agreed, without waiting")
        if message.is_dead or message.handle != self._handle:
            self._answer = message
            return None
        data: bytes = message.data
        self._taken += len(data)
        return data

    def begun(self) -> int | None:
        """
        :return: The size that the host announces for what follows, None when it has answered.
        :raises RemoteException: The host sends something else.
        """
        data = self.next()
        if data is None:
            return None
        try:
            self._peer, size = host.unpack_begin(data)
        except ValueError as error:
            raise self.nonsense(str(error)) from None
        return size

    def count(self) -> int | None:
        """
        :return: How many bytes the host has received, None when it has answered.
        :raises RemoteException: The host sends something else.
        """
        data = self.next()
        if data is None:
            return None
        try:
            return host.unpack_count(data)
        except ValueError as error:
            raise self.nonsense(str(error)) from None

    def post(self, data: bytes) -> None:
        """
        :param data: Sent to the host as it is.
        """
        enc = mitogen.core.Message.ENC_BIN
        self._connection.post(mitogen.core.Message(data=data, enc=enc, handle=self._peer))

    def result(self) -> object:
        """
        :return: The result of the function.
        :raises RemoteException: It failed, or the connection was lost.
        """
        while self.next() is not None:
            pass
        assert self._answer is not None  # next says so
        return calls.result_of(self._function, self._answer)

    def nonsense(self, what: str) -> RemoteException:
        """
        :param what: What the host did.
        :return: The error to raise for it.
        """
        name = calls.function_name(self._function)
        return RemoteException(ValueError(f"the host's part in {name} cannot be right: {what}"))


# To the host


def upload(
    exchange: Exchange,
    path: str,
    size: int,
    chunks: Iterator[bytes],
    progress: Progress | None = None,
) -> None:
    """
    Write a file on the host.

    :param exchange: A new one.
    :param path: The file's path there.
    :param size: How many bytes there are.
    :param chunks: Those bytes. When it raises, the host's file stays as it is.
    :param progress: Called with the bytes that were sent so far, and `size`; likewise.
    :raises RemoteException: The host could not do it; its file is untouched.
    """
    exchange.start(host.receive, path, size)
    if exchange.begun() is None:
        exchange.result()
        raise exchange.nonsense("it ended before it received anything")
    digest = hashlib.sha1(usedforsecurity=False)
    sent = received = 0
    window = _NEAR_WINDOW
    begun = time.monotonic()
    for chunk in chunks:
        while sent + len(chunk) - received > window:
            count = exchange.count()
            if count is None:
                exchange.result()
                raise exchange.nonsense("it ended before it received everything")
            if not received and time.monotonic() - begun > _NEAR:
                window = host.WINDOW
            received = min(sent, count)
        exchange.post(chunk)
        digest.update(chunk)
        sent += len(chunk)
        if progress is not None:
            progress(sent, size)
    exchange.post(digest.digest())
    exchange.result()


def slices(content: memoryview) -> Iterator[bytes]:
    """
    :param content: Some bytes.
    :return: The same, in the pieces that travel.
    """
    for start in range(0, len(content), host.CHUNK):
        yield bytes(content[start : start + host.CHUNK])


class LocalFile:
    """
    A file of the agent that is to be sent, and must stay as it is meanwhile.

    :param path: Its path.
    :raises OSError: It can't be read, or is no regular file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # closed by __exit__
        self._state = os.fstat(self._file.fileno())
        if not stat.S_ISREG(self._state.st_mode):
            self._file.close()
            raise OSError(f"{self.path!r} on the agent is no regular file")
        self.size = self._state.st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def described(self) -> str:
        """
        :return: What stands for its content in the log.
        """
        return f"{self.size} bytes of {self.path}"

    def chunks(self) -> Iterator[bytes]:
        """
        :return: The content, from its start.
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


def send_file(
    exchange: Exchange, file: LocalFile, path: str, progress: Progress | None = None
) -> None:
    """
    :param exchange: A new one.
    :param file: A file of the agent.
    :param path: Where it goes on the host.
    :param progress: As for :func:`upload`.
    :raises OSError: The local file can't be read, or was changed meanwhile.
    :raises RemoteException: The host could not do it.
    """
    if file.size > host.SMALL:
        upload(exchange, path, file.size, file.chunks(), progress)
        return
    content = b"".join(file.chunks())
    if progress is not None:
        progress(len(content), len(content))
    sha1 = hashlib.sha1(content, usedforsecurity=False).hexdigest()
    exchange.call(host.put_checked, path, content, sha1)


# From the host


class Sink(Protocol):
    """Where the content of a file goes."""

    def write(self, chunk: bytes, /) -> object:
        """
        :param chunk: The next bytes.
        """
        ...


def download(
    exchange: Exchange,
    sink: Sink,
    max_size: int | None,
    answer_of: Callable[[object], object] = lambda result: result,
    progress: Progress | None = None,
) -> object:
    """
    Take what the host sends.

    :param exchange: One that was started.
    :param sink: Gets the content, as a whole or in chunks.
    :param max_size: The most bytes to accept, None for any number.
    :param answer_of: Finds the sum and the small content in the function's result.
    :param progress: Called with the bytes that were received so far, and those in all.
    :return: The function's result.
    :raises RemoteException: The host could not do it, or sent something else or too much.
    """
    digest = hashlib.sha1(usedforsecurity=False)
    received = acknowledged = 0

    def take(chunk: bytes, size: int) -> None:
        nonlocal received
        received += len(chunk)
        if max_size is not None and received > max_size:
            raise RemoteException(OSError(host.too_large("What the host sends", max_size)))
        sink.write(chunk)
        digest.update(chunk)
        if progress is not None:
            progress(received, received if size == host.UNKNOWN else size)

    size = exchange.begun()
    if size is not None:
        while (chunk := exchange.next()) is not None:
            take(chunk, size)
            if received - acknowledged >= host.ACKNOWLEDGE:
                acknowledged = received
                exchange.post(host.pack_count(received))
    result = exchange.result()
    sum_and_content = answer_of(result)
    match sum_and_content:
        case (str(sha1), bytes(content)) if size is None:
            take(content, len(content))
        case (str(sha1), None) if size is not None:
            pass
        case _:
            raise exchange.nonsense(f"it answered with a {type(sum_and_content).__name__}")
    if sha1 != digest.hexdigest():
        raise RemoteException(
            OSError("What arrived from the host is not what it sent, the sha1 differs: try again.")
        )
    return result


def read(exchange: Exchange, path: str, max_size: int, *, text: bool = False) -> bytes:
    """
    :param exchange: A new one.
    :param path: The path of a file on the host.
    :param max_size: The most bytes to accept.
    :param text: Whether it has to be UTF-8.
    :return: Its content.
    :raises RemoteException: It can't be read, is larger, or is no UTF-8.
    """
    content = io.BytesIO()
    exchange.start(host.send, path, max_size=max_size, text=text, steady=False)
    download(exchange, content, max_size)
    return content.getvalue()


def read_text(exchange: Exchange, path: str, max_size: int) -> str:
    """
    :param exchange: A new one.
    :param path: The path of a file on the host.
    :param max_size: The most bytes to accept.
    :return: Its content.
    :raises RemoteException: It can't be read, is larger, or is no UTF-8.
    """
    content = read(exchange, path, max_size, text=True)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise RemoteException(error) from None


def fetch(
    exchange: Exchange,
    path: str,
    staged: StagedWrite,
    max_size: int | None,
    progress: Progress | None,
) -> None:
    """
    :param exchange: A new one.
    :param path: The path of a file on the host.
    :param staged: Gets its content; it is not committed here.
    :param max_size: The most bytes to accept, None for any number.
    :param progress: As for :func:`download`.
    :raises RemoteException: It can't be read, is larger, or was changed meanwhile.
    """
    exchange.start(host.send, path, max_size=max_size, text=False, steady=True)
    download(exchange, staged, max_size, progress=progress)


def run(
    exchange: Exchange, max_size: int, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[str, str, int]:
    """
    :param exchange: A new one.
    :param max_size: The most bytes of output to accept.
    :param args: The arguments of :func:`inmanta_mitogen.run`.
    :param kwargs: More of them.
    :return: What that function returns.
    :raises RemoteException: It could not be started, took too long, or printed more.
    """
    output = io.BytesIO()
    exchange.start(host.run, max_size, args=args, kwargs=kwargs)

    def answer_of(result: object) -> object:
        return result[2] if isinstance(result, tuple) and len(result) == 3 else result

    result = download(exchange, output, max_size, answer_of)
    match result:
        case (int(returncode), int(size), _):
            view = output.getbuffer()
            stdout, stderr = bytes(view[:size]), bytes(view[size:])
            return decode_output(stdout), decode_output(stderr), returncode
    raise exchange.nonsense("it answered without an exit status")
