"""
The host's end of what is too large for one message: the agent calls a function for each chunk.

The agent is a few calls ahead, and no more, so that no memory on the way grows with the content, on
the hops in between either.
"""

import contextlib
import functools
import itertools
import os
import stat
import struct
import threading
from typing import Any, Dict, Generator, Iterator, Optional, Type, Union

import mitogen.core

from inmanta_mitogen.dispatch import CHUNK_SIZE, KEPT, RAW
from inmanta_mitogen.names import AnyPath, native

transfers: Dict[int, "Generator[Any, Any, None]"] = {}
"""The transfers under way, by their numbers: the agent counts those that it begins from 1."""
_own_numbers = itertools.count(-1, -1)
# Held while a file is written.
_writing = threading.Lock()

TICKET = struct.Struct(">cqQ")
"""What tells the agent of a transfer: KEPT or RAW, its number, and how many bytes there are."""


def keep(kind: bytes, data: bytes) -> bytes:
    """
    Keep what is too large for one message until the agent fetches it, by :func:`next_chunk`.

    :param kind: What it is: RAW for bytes, KEPT for any other answer.
    :param data: The bytes, or the answer.
    :return: What tells the agent.
    """
    number = next(_own_numbers)
    transfers[number] = slices(data)
    return KEPT + TICKET.pack(kind, number, len(data))


def slices(data: bytes) -> "Generator[bytes, Any, None]":
    """Return the pieces in which bytes are sent."""
    return (data[at : at + CHUNK_SIZE] for at in range(0, len(data), CHUNK_SIZE))


def send(number: int, path: AnyPath, max_size: Optional[int]) -> int:
    """
    Have the agent fetch a file, which nobody may change meanwhile; the sha1 follows its content.

    :param number: The number of the transfer.
    :param path: The file; symlinks are followed.
    :param max_size: The most bytes to accept, None for any number.
    :return: The size of the file, as far as it is known.
    :raises OSError: It can't be read, is not a regular file, or is larger.
    """
    source = SourceFile(native(path))
    if max_size is not None and source.size > max_size:
        source.__exit__()
        raise OSError(too_large(repr(path), max_size))
    transfers[number] = _outgoing(source)
    return source.size


def _outgoing(source: "SourceFile") -> "Generator[Union[bytes, str], bytes, None]":
    from inmanta_mitogen.files import new_hash

    digest = new_hash()
    with source:
        for chunk in source.chunks():
            digest.update(chunk)
            yield chunk
    yield digest.hexdigest()


def next_chunk(number: int) -> Any:
    """
    Return the next bytes of a transfer to the agent, unpickled; what follows them at the end.

    :raises OSError: The file can't be read, or was changed.
    """
    chunk = next(transfers.get(number, iter(())), None)
    return mitogen.core.Message(data=RAW + chunk) if isinstance(chunk, bytes) else chunk


@mitogen.core.takes_econtext  # type: ignore[untyped-decorator]  # mitogen is not typed
def receive(number: int, path: AnyPath, size: int, in_place: bool, econtext: Any) -> None:
    """
    Begin to write a file with what the agent passes to :func:`write`.

    :param number: The number of the transfer.
    :param path: The file; see :func:`inmanta_mitogen.put` for what is kept and what is promised.
    :param size: How many bytes there will be.
    :param in_place: As for :func:`inmanta_mitogen.put`.
    :param econtext: mitogen's description of this interpreter, which mitogen passes.
    :raises OSError: As :func:`inmanta_mitogen.put`.
    """
    _close_at_end(econtext.broker)
    transfer = transfers[number] = _incoming(path, size, in_place)
    with _writing:
        next(transfer)


def _incoming(path: AnyPath, size: int, in_place: bool) -> "Generator[None, bytes, None]":
    from inmanta_mitogen.files import new_hash
    from inmanta_mitogen.staged import StagedWrite

    digest = new_hash()
    with StagedWrite(path, in_place=in_place) as staged:
        while staged.size < size:
            chunk = yield
            staged.write(chunk)
            digest.update(chunk)
        if (yield) != digest.digest():
            raise OSError(
                f"What arrived for {path!r} is not what was sent, its sha1 differs: nothing was"
                " written. Try again."
            )
        staged.commit()


def write(number: int, data: bytes) -> None:
    """
    Take the next bytes of a file, or at the end their sha1.

    :param number: The number of the transfer.
    :param data: The bytes.
    :raises OSError: As :func:`inmanta_mitogen.put`, or the sums differ. The old content is
        untouched.
    """
    with _writing, contextlib.suppress(StopIteration):  # the file is complete
        transfers[number].send(data)


def close(number: int) -> None:
    """End a transfer; a file that is not complete stays as it was."""
    transfers.pop(number).close()


@functools.lru_cache(maxsize=None)
def _close_at_end(broker: Any) -> None:
    """Leave no temporary files when the connection ends."""

    def close_all() -> None:
        # Behind it, mitogen ends this process. What is being written may need a module that never
        # comes.
        if _writing.acquire(timeout=5):
            for transfer in transfers.values():
                transfer.close()

    mitogen.core.listen(broker, "shutdown", close_all)


class SourceFile:
    """
    A regular file that is sent, and must stay as it is meanwhile.

    :param path: The file; symlinks are followed.
    :raises OSError: It can't be read, or is not a regular file.
    """

    def __init__(self, path: AnyPath) -> None:
        self.path = path
        # A FIFO would wait for its writer.
        self._file = open(path, "rb", buffering=0, opener=_open_at_once)  # noqa: SIM115  # closed by __exit__
        self._state = os.fstat(self._file.fileno())
        self.size = self._state.st_size
        if not stat.S_ISREG(self._state.st_mode):
            self._file.close()
            raise OSError(f"{path!r} is not a regular file: its content has no end of its own")

    def __enter__(self) -> "SourceFile":
        return self

    def __exit__(self, kind: Optional[Type[BaseException]] = None, *_: object) -> None:
        self._file.close()

    def chunks(self) -> Iterator[bytes]:
        """
        Yield the content, from its start.

        :raises OSError: It is not what it was when it was opened.
        """
        self._file.seek(0)
        read = 0
        # Of a file that grows, it stops behind its size. Files of /proc do not tell theirs.
        while read <= self.size or not self.size:
            chunk = self._file.read(CHUNK_SIZE)
            if not chunk:
                break
            read += len(chunk)
            yield chunk
        before, after = self._state, os.fstat(self._file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise OSError(
                f"{self.path!r} was changed while it was read (from {before.st_size} to"
                f" {after.st_size} bytes): nothing was written. Try again when nobody writes to it."
            )


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def too_large(what: object, max_size: Optional[int]) -> str:
    """Return why a content is refused, and what to do."""
    return (
        f"{what} has more than the {max_size} bytes that are accepted: raise max_size, or fetch a"
        " file with Proxy.get_file"
    )
