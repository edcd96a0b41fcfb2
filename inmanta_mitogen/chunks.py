"""
The host's end of what is too large for one message: raw chunks, a few of them on the way.

Whoever receives tells how many bytes it has taken in (as eight bytes, big-endian), and whoever
sends is never more than the agreed window ahead, so that no memory anywhere grows with the content,
on the hops in between either. What is small needs none of that: it travels with the call itself.
"""

import codecs
import os
import queue
import stat
import struct
from typing import IO, Any, Iterable, Iterator, List, Optional, Tuple, Union

import mitogen.core

from inmanta_mitogen.files import new_hash
from inmanta_mitogen.names import AnyPath, native

#: What one message carries, in bytes. Much less, and the memory of whoever sends falls into
#: pieces that the C library does not give back: 30 MB of them with 128 KiB.
CHUNK = 512 << 10

#: What is no larger, in bytes, travels with the call or its answer. A second round trip would cost
#: more than what chunks save.
SMALL = 256 << 10

#: The most bytes on the way, sent and not yet known to be received.
WINDOW = 2 << 20

#: After how many bytes whoever receives says so.
ACKNOWLEDGE = WINDOW // 4

_COUNT = struct.Struct(">Q")
_BEGIN = struct.Struct(">LQ")

#: Of a size that is not known beforehand.
UNKNOWN = (1 << 64) - 1

#: The sum, and the content unless it was sent in chunks.
Sent = Tuple[str, Optional[bytes]]


def pack_count(count: int) -> bytes:
    """
    :return: The message that so many bytes were received.
    """
    return _COUNT.pack(count)


def unpack_count(data: bytes) -> int:
    """
    :return: How many bytes were received.
    :raises ValueError: The message says something else.
    """
    if len(data) != _COUNT.size:
        raise ValueError(f"{len(data)} bytes instead of a count of bytes")
    count: int = _COUNT.unpack(data)[0]
    return count


def pack_begin(handle: int, size: int) -> bytes:
    """
    :return: The message that begins a transfer: the handle that this end listens to, and the size.
    """
    return _BEGIN.pack(handle, size)


def unpack_begin(data: bytes) -> Tuple[int, int]:
    """
    :return: The other end's handle, and the size.
    :raises ValueError: The message says something else.
    """
    if len(data) != _BEGIN.size:
        raise ValueError(f"{len(data)} bytes instead of the begin of a transfer")
    handle, size = _BEGIN.unpack(data)
    return handle, size


def too_large(what: object, max_size: int) -> str:
    """
    :return: Why a content is refused, and what to do.
    """
    return (
        f"{what} has more than the {max_size} bytes that are accepted: raise max_size, or fetch a"
        " file with Proxy.get_file"
    )


class _Channel:
    """
    The way to the agent, and from it, for one transfer.

    :param sender: Where the agent listens.
    :param econtext: mitogen's description of this interpreter.
    """

    def __init__(self, sender: mitogen.core.Sender, econtext: Any) -> None:
        self._sender = sender
        self._router = econtext.router
        # mitogen's own queue takes a poll and two system calls for each message.
        self._inbox: Any = getattr(queue, "SimpleQueue", queue.Queue)()
        self._handle = 0

    def __enter__(self) -> "_Channel":
        self._handle = self._router.add_handler(
            self._inbox.put, policy=mitogen.core.has_parent_authority
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._router.del_handler(self._handle)

    def begin(self, size: int) -> None:
        """
        Tells the agent where to send to.
        """
        self.send(pack_begin(self._handle, size))

    def send(self, data: bytes) -> None:
        """
        Sends bytes as they are.
        """
        enc = mitogen.core.Message.ENC_BIN
        handle = self._sender.dst_handle
        self._sender.context.send(mitogen.core.Message(data=data, enc=enc, handle=handle))

    def receive(self) -> bytes:
        """
        Waits for the next message.

        :raises ConnectionAbortedError: The agent has given up.
        """
        message = self._inbox.get()
        if message.is_dead:
            raise ConnectionAbortedError("The agent has given this transfer up")
        data: bytes = message.data
        return data


@mitogen.core.takes_econtext  # type: ignore[untyped-decorator]  # mitogen is not typed
def receive(path: AnyPath, size: int, sender: mitogen.core.Sender, econtext: Any) -> None:
    """
    Writes a file with what the agent sends: chunks, and at the end their sha1.

    :param path: The file; see :func:`inmanta_mitogen.put` for what is kept and what is promised.
    :param size: How many bytes there will be.
    :param sender: Where the agent listens.
    :param econtext: mitogen's description of this interpreter, which mitogen passes.
    :raises OSError: As :func:`inmanta_mitogen.put`; EIO when the sums differ. The old content is
        untouched.
    """
    from inmanta_mitogen.staged import StagedWrite

    digest = new_hash()
    with StagedWrite(path) as staged, _Channel(sender, econtext) as channel:
        channel.begin(size)
        acknowledged = 0
        while staged.size < size:
            chunk = channel.receive()
            staged.write(chunk)
            digest.update(chunk)
            if staged.size - acknowledged >= ACKNOWLEDGE:
                acknowledged = staged.size
                channel.send(pack_count(acknowledged))
        check_sum(path, digest.digest(), channel.receive())
        staged.commit()


def put_checked(path: AnyPath, content: bytes, sha1: str) -> None:
    """
    Writes a file with a content that came with the call.

    :param path: As in :func:`receive`.
    :param content: All of it.
    :param sha1: Its sum where it comes from, in hexadecimal.
    :raises OSError: As :func:`receive`.
    """
    from inmanta_mitogen.staged import put

    digest = new_hash()
    digest.update(content)
    check_sum(path, digest.hexdigest(), sha1)
    put(path, content)


def check_sum(path: AnyPath, here: Union[str, bytes], there: Union[str, bytes]) -> None:
    """
    :raises OSError: The sums of the two ends differ.
    """
    if here != there:
        raise OSError(
            f"What arrived for {path!r} is not what was sent, its sha1 differs: nothing was"
            " written. Try again."
        )


@mitogen.core.takes_econtext  # type: ignore[untyped-decorator]  # mitogen is not typed
def send(
    path: AnyPath,
    max_size: Optional[int],
    text: bool,
    steady: bool,
    sender: mitogen.core.Sender,
    econtext: Any,
) -> Sent:
    """
    Sends a file's content: with the answer when it is small, else in chunks before it.

    :param path: The file; symlinks are followed.
    :param max_size: The most bytes to accept, None for any number.
    :param text: Whether it has to be UTF-8.
    :param steady: Whether it has to be a regular file that nobody changes meanwhile.
    :param sender: Where the agent listens.
    :param econtext: mitogen's description of this interpreter, which mitogen passes.
    :return: The sha1, in hexadecimal, and the content if it was not sent in chunks.
    :raises OSError: It can't be read, is larger, or was changed.
    :raises UnicodeDecodeError: It is not UTF-8.
    """
    with open(native(path), "rb", buffering=0) as file:
        state = os.fstat(file.fileno())
        regular = stat.S_ISREG(state.st_mode)
        if steady and not regular:
            raise OSError(f"{path!r} is no regular file: what it holds has no end of its own")
        blocks = _blocks(file, max_size, path)
        if text:
            blocks = _checked_text(blocks, path)
        result = _send_blocks(blocks, state.st_size or UNKNOWN, sender, econtext)
        if steady:
            check_unchanged(path, state, os.fstat(file.fileno()))
        return result


def check_unchanged(path: AnyPath, before: os.stat_result, after: os.stat_result) -> None:
    """
    :raises OSError: The file was written to meanwhile.
    """
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise OSError(
            f"{path!r} was changed while it was read (from {before.st_size} to {after.st_size}"
            " bytes): nothing was written. Try again when nobody writes to it."
        )


def _blocks(file: IO[bytes], max_size: Optional[int], path: AnyPath) -> Iterator[bytes]:
    left = UNKNOWN if max_size is None else max_size
    if os.fstat(file.fileno()).st_size > left:
        raise OSError(too_large(repr(path), left))
    while True:
        block = file.read(CHUNK)
        if not block:
            return
        left -= len(block)
        if left < 0:
            raise OSError(too_large(repr(path), max_size or 0))
        yield block


def _checked_text(blocks: Iterable[bytes], path: AnyPath) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for block in blocks:
            decoder.decode(block)
            yield block
        decoder.decode(b"", True)
    except UnicodeDecodeError as error:
        error.reason += f"; {path!r} is not UTF-8, read_binary gives its bytes"
        raise


def _send_blocks(
    blocks: Iterator[bytes], size: int, sender: mitogen.core.Sender, econtext: Any
) -> Sent:
    digest = new_hash()
    start: List[bytes] = []
    length = 0
    for block in blocks:
        digest.update(block)
        start.append(block)
        length += len(block)
        if length > SMALL:
            break
    else:
        return digest.hexdigest(), b"".join(start)
    with _Channel(sender, econtext) as channel:
        channel.begin(size)
        for block in start:
            channel.send(block)
        del start
        received = 0
        for block in blocks:
            digest.update(block)
            while length + len(block) - received > WINDOW:
                received = unpack_count(channel.receive())
            channel.send(block)
            length += len(block)
    return digest.hexdigest(), None


@mitogen.core.takes_econtext  # type: ignore[untyped-decorator]  # mitogen is not typed
def run(
    max_size: Optional[int],
    sender: mitogen.core.Sender,
    args: Tuple[Any, ...],
    kwargs: Any,
    econtext: Any,
) -> Tuple[int, int, Sent]:
    """
    Runs a command, and sends its output: with the answer when it is small, else in chunks before.

    :param max_size: The most bytes of output to accept, None for any number.
    :param sender: Where the agent listens.
    :param args: Of :func:`inmanta_mitogen.run`.
    :param kwargs: Of the same.
    :param econtext: mitogen's description of this interpreter, which mitogen passes.
    :return: Its exit status, how many bytes it printed on standard output, and as :func:`send`
        those with the ones on standard error behind them.
    :raises OSError: It can't be started, or prints more.
    """
    from inmanta_mitogen.process import run_raw

    output = run_raw(*args, max_size=max_size, **kwargs)
    stdout = len(output.stdout)
    size = stdout + len(output.stderr)
    if max_size is not None and size > max_size:
        # It came after the command's own end, from what it left running.
        raise OSError(too_large(f"The output of {args[0]!r}", max_size))
    blocks = _cut([output.stdout, output.stderr])
    return output.returncode, stdout, _send_blocks(blocks, size, sender, econtext)


def _cut(contents: Iterable[bytes]) -> Iterator[bytes]:
    for content in contents:
        for start in range(0, len(content), CHUNK):
            yield content[start : start + CHUNK]
