"""
The host's end of what is too large for one message: raw chunks, a few of them on the way.

Whoever receives tells how many bytes it has taken in (as eight bytes, big-endian), and whoever
sends is never more than the window ahead, so that no memory on the way grows with the content, on
the hops in between either.
"""

import io
import os
import queue
import stat
import struct
from typing import Any, Callable, Optional, Tuple

import mitogen.core

from inmanta_mitogen.dispatch import RAW
from inmanta_mitogen.names import AnyPath, native

#: What one message carries, in bytes. Much less, and the memory of whoever sends falls into
#: pieces that the C library does not give back: 30 MB of them with 128 KiB.
CHUNK = 512 << 10

#: The most bytes on the way, sent and not yet known to be received.
WINDOW = 2 << 20

#: After how many bytes whoever receives says so.
ACKNOWLEDGE = WINDOW // 4

_COUNT = struct.Struct(">Q")
# KEPT or RAW, a handle, and how many bytes there are.
_TICKET = struct.Struct(">cLQ")


def pack_count(count: int) -> bytes:
    """Return the message that so many bytes were received."""
    return _COUNT.pack(count)


def unpack_count(data: bytes) -> int:
    """
    Return how many bytes were received.

    :raises ValueError: The message says something else.
    """
    if len(data) != _COUNT.size:
        raise ValueError(f"{len(data)} bytes instead of a count of bytes")
    count: int = _COUNT.unpack(data)[0]
    return count


def pack_ticket(kind: bytes, handle: int, size: int) -> bytes:
    """Return the message that tells where this host listens for a transfer, and of how much."""
    return _TICKET.pack(kind, handle, size)


def unpack_ticket(data: bytes) -> Tuple[bytes, int, int]:
    """
    Return what a transfer is of, the handle that the host listens to for it, and the size.

    :raises ValueError: It is not a ticket.
    """
    if len(data) != _TICKET.size:
        raise ValueError(f"{len(data)} bytes instead of the start of a transfer")
    kind, handle, size = _TICKET.unpack(data)
    return kind, handle, size


class Outgoing:
    """
    A content that waits for the agent, which fetches it by telling how much it has received. All of
    it happens on the broker's thread, so this host can run calls meanwhile.

    :param kind: What it is: :data:`inmanta_mitogen.dispatch.KEPT` for an answer, RAW for bytes.
    :param read: Returns the next bytes, at most as many as asked for; empty at the end.
    :param size: How many bytes there are, as far as is known.
    :param router: mitogen's router of this interpreter.
    :param end: Called behind the last byte; what it returns or raises follows the content.
    :attr ticket: The answer that tells the agent to fetch it.
    """

    def __init__(
        self,
        kind: bytes,
        read: Callable[[int], bytes],
        size: int,
        router: Any,
        end: Callable[[], Optional[str]] = lambda: None,
    ) -> None:
        self._read = read
        self._end = end
        self._router = router
        self._sent = 0
        self._asked = None  # type: Any
        self._handle = router.add_handler(self._on_count, policy=mitogen.core.has_parent_authority)  # type: int
        self.ticket = pack_ticket(kind, self._handle, size)

    @classmethod
    def of_bytes(cls, kind: bytes, data: bytes, router: Any) -> "Outgoing":
        """Make one of a content in memory."""
        return cls(kind, io.BytesIO(data).read, len(data), router)

    def _on_count(self, message: Any) -> None:
        if message.is_dead:
            self._router.del_handler(self._handle)
            return
        # Only the first one tells where to send to: what comes behind the end gets no answer.
        self._asked = self._asked or message
        try:
            received = unpack_count(message.data)
            while self._sent - received < WINDOW:
                chunk = self._read(CHUNK)
                if not chunk:
                    self._finish(self._end())
                    return
                self._sent += len(chunk)
                enc = mitogen.core.Message.ENC_BIN
                self._asked.reply(mitogen.core.Message(data=chunk, enc=enc), router=self._router)
        except Exception as error:
            self._finish(mitogen.core.CallError(error))

    def _finish(self, last: Any) -> None:
        self._router.del_handler(self._handle)
        self._asked.reply(mitogen.core.Message.pickled(last), router=self._router)


@mitogen.core.takes_router  # type: ignore[untyped-decorator]  # mitogen is not typed
def send(path: AnyPath, max_size: Optional[int], router: Any) -> mitogen.core.Message:
    """
    Have the agent fetch a file, which nobody may change meanwhile; the sha1 follows its content.

    :param path: The file; symlinks are followed.
    :param max_size: The most bytes to accept, None for any number.
    :param router: mitogen's router of this interpreter, which mitogen passes.
    :return: The ticket.
    :raises OSError: It can't be read, is not a regular file, or is larger.
    """
    from inmanta_mitogen.files import new_hash

    # A FIFO would wait for its writer.
    file = open(native(path), "rb", buffering=0, opener=open_at_once)  # noqa: SIM115  # closed with the Outgoing that holds it
    state = os.fstat(file.fileno())
    if not stat.S_ISREG(state.st_mode) or (max_size is not None and state.st_size > max_size):
        file.close()
        if not stat.S_ISREG(state.st_mode):
            raise OSError(f"{path!r} is not a regular file: its content has no end of its own")
        raise OSError(too_large(repr(path), max_size))
    digest = new_hash()

    def read(size: int) -> bytes:
        chunk = file.read(size)
        digest.update(chunk)
        return chunk

    def end() -> str:
        check_unchanged(path, state, os.fstat(file.fileno()))
        return digest.hexdigest()

    ticket = Outgoing(RAW, read, state.st_size, router, end).ticket
    return mitogen.core.Message(data=ticket)


def open_at_once(path: str, flags: int) -> int:
    """Open a file as os.open does, and don't wait for the writer of a FIFO."""
    return os.open(path, flags | os.O_NONBLOCK)


def too_large(what: object, max_size: Optional[int]) -> str:
    """Return why a content is refused, and what to do."""
    return (
        f"{what} has more than the {max_size} bytes that are accepted: raise max_size, or fetch a"
        " file with Proxy.get_file"
    )


def check_unchanged(path: AnyPath, before: os.stat_result, after: os.stat_result) -> None:
    """
    Check that nobody has written to a file meanwhile.

    :raises OSError: Someone has.
    """
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise OSError(
            f"{path!r} was changed while it was read (from {before.st_size} to {after.st_size}"
            " bytes): nothing was written. Try again when nobody writes to it."
        )


@mitogen.core.takes_econtext  # type: ignore[untyped-decorator]  # mitogen is not typed
def receive(path: AnyPath, size: int, handle: int, in_place: bool, econtext: Any) -> None:
    """
    Write a file with what the agent sends: chunks, and at the end their sha1.

    :param path: The file; see :func:`inmanta_mitogen.put` for what is kept and what is promised.
    :param size: How many bytes there will be.
    :param handle: Where the agent listens.
    :param in_place: As for :func:`inmanta_mitogen.put`.
    :param econtext: mitogen's description of this interpreter, which mitogen passes.
    :raises OSError: As :func:`inmanta_mitogen.put`, or the sums differ. The old content is
        untouched.
    """
    from inmanta_mitogen.files import new_hash
    from inmanta_mitogen.staged import StagedWrite

    # mitogen's own queue takes a poll and two system calls for each message.
    inbox: Any = getattr(queue, "SimpleQueue", queue.Queue)()
    policy = mitogen.core.has_parent_authority
    own_handle = econtext.router.add_handler(inbox.put, policy=policy)

    def receive_next() -> bytes:
        message = inbox.get()
        if message.is_dead:
            raise ConnectionAbortedError("The agent has given this transfer up")
        return message.data  # type: ignore[no-any-return]  # mitogen is not typed

    def tell(data: bytes) -> None:
        enc = mitogen.core.Message.ENC_BIN
        econtext.master.send(mitogen.core.Message(data=data, enc=enc, handle=handle))

    digest = new_hash()
    try:
        with StagedWrite(path, in_place=in_place) as staged:
            tell(pack_ticket(RAW, own_handle, size))
            acknowledged = 0
            while staged.size < size:
                chunk = receive_next()
                staged.write(chunk)
                digest.update(chunk)
                if staged.size - acknowledged >= ACKNOWLEDGE:
                    acknowledged = staged.size
                    tell(pack_count(acknowledged))
            if receive_next() != digest.digest():
                raise OSError(
                    f"What arrived for {path!r} is not what was sent, its sha1 differs: nothing was"
                    " written. Try again."
                )
            staged.commit()
    finally:
        econtext.router.del_handler(own_handle)
