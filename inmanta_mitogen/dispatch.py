"""
Run on the host what the agent calls, and pack what comes back.

The first byte of an answer tells what it is: a pickle begins with 0x80, anything else with one of
the marks below.
"""

import collections
import os
import pickle
import stat
import struct
import sys
from typing import Any, Callable, Dict, Generic, List, Tuple, TypeVar

import mitogen.core

CHUNK_SIZE = 512 << 10
"""The most content that one message carries, in bytes. Less, and the memory of whoever sends a
large content falls into pieces that the C library does not give back: 30 MB with 128 KiB."""

WHOLE = 4 * CHUNK_SIZE
"""The size in bytes of an answer that may be in one message nevertheless. A larger one waits on the
host, and the agent fetches it in chunks, as many at once as this."""

MOST_PREFETCHED = 64 << 10
"""The largest file, in bytes, whose content or hash is sent along with the answer to another
question."""

RAW = b"B"
"""The result is the bytes that follow."""
KEPT = b"K"
"""The answer waits, see :func:`inmanta_mitogen.chunks.keep`."""
UNSENDABLE = b"U"
"""Why the result cannot be sent, as UTF-8."""
SKIPPED = b"S"
"""Not asked, since it is not cheap."""

# Python 3.6 reads and writes it, and it carries bytes as they are.
PICKLE_PROTOCOL = 4

# An answer that is JSON begins with it. The agent reads JSON some times faster than a pickle.
JSON_MARK = b"J"
SMALLEST_JSON = 4096
"""The sizes that JSON is used for, in bytes: the first of the pickle, the other of the JSON
itself."""
LARGEST_JSON = 12 << 20
_JSON_DEPTH = 50
_PLAIN = frozenset({dict, list, str, int, float, bool, type(None)})

# The functions that read a whole file.
_READERS = ("hash_file", "read", "read_binary")

LENGTH = struct.Struct(">L")
"""The length of an answer among others, in front of it."""

T = TypeVar("T")


@mitogen.core.takes_econtext  # type: ignore[untyped-decorator]  # mitogen is not typed
def call(
    module: str,
    qualname: str,
    args: Tuple[Any, ...],
    kwargs: Dict[str, Any],
    only_cheap: bool,
    econtext: Any,
) -> mitogen.core.Message:
    """
    Call a function of an importable module.

    :param module: The module's full name.
    :param qualname: The function's name in it, with dots for one that a class holds.
    :param args: Its positional arguments.
    :param kwargs: Its keyword arguments.
    :param only_cheap: Whether to answer :data:`SKIPPED` for a file that is not cheap to read.
    :param econtext: mitogen's description of this interpreter, which mitogen passes.
    :return: The answer as a message: mitogen itself would end the interpreter over a result that it
        can't pickle.
    """
    data = _answer(econtext, module, qualname, args, kwargs, only_cheap)
    return mitogen.core.Message(data=data, enc=mitogen.core.Message.ENC_PKL)


@mitogen.core.takes_econtext  # type: ignore[untyped-decorator]  # mitogen is not typed
def call_each(requests: List[bytes], handle: int, econtext: Any) -> mitogen.core.Message:
    """
    Call functions one after another. Their answers go out in that order, each as soon as it can,
    with those that are ready by then in the same message.

    :param requests: What mitogen is sent to have it make each call of :func:`call`.
    :param handle: Where the agent listens for the answers.
    :param econtext: mitogen's description of this interpreter, which mitogen passes.
    :return: The message with the last answer.
    """

    def send(batch: List[Tuple[bytes, None]]) -> None:
        message = _message([answer for answer, _ in batch])
        message.handle = handle
        econtext.master.send(message)

    def answer(request: bytes) -> bytes:
        message = mitogen.core.Message(data=request, enc=mitogen.core.Message.ENC_PKL)
        message.router = econtext.router
        try:
            return _answer(econtext, *message.unpickle()[4])
        except Exception as error:
            return mitogen.core.Message.pickled(mitogen.core.CallError(error)).data  # type: ignore[no-any-return]  # mitogen is not typed

    answers = Batcher(econtext.broker.defer, send)  # type: Batcher[None]
    for request in requests[:-1]:
        answers.put([(answer(request), None)])
    return _message([answer(requests[-1])])


def _message(answers: List[bytes]) -> mitogen.core.Message:
    data = b"".join(part for answer in answers for part in (LENGTH.pack(len(answer)), answer))
    return mitogen.core.Message(data=data, enc=mitogen.core.Message.ENC_BIN)


class Batcher(Generic[T]):
    """
    Sends data when the broker's thread gets to it, as much in one message as waits by then.

    A message costs both ends several times what a call in it does. Nothing waits for there to be
    more: what comes alone goes alone.

    :param call_soon: Has the broker's thread call a function.
    :param send: Sends, on that thread, a message of some data, each with what was put with it.
    """

    def __init__(
        self,
        call_soon: Callable[[Callable[[], None]], object],
        send: Callable[[List[Tuple[bytes, T]]], object],
    ) -> None:
        self._call_soon = call_soon
        self._send = send
        self._waiting: collections.deque[Tuple[bytes, T]] = collections.deque()
        self._is_called = False

    def put(self, items: List[Tuple[bytes, T]]) -> None:
        """
        Send items as soon as possible.

        :param items: What to send, each with what `send` is given with it. In one message, where it
            is not too large.
        :raises Exception: What `call_soon` raises, when the broker has ended.
        """
        self._waiting.extend(items)
        if not self._is_called:
            self._is_called = True
            self._call_soon(self._send_all)

    def _send_all(self) -> None:
        # Whatever is put from here on calls it again.
        self._is_called = False
        while self._waiting:
            batch = []  # type: List[Tuple[bytes, T]]
            size = 0
            while self._waiting and (not batch or size + len(self._waiting[0][0]) <= CHUNK_SIZE):
                batch.append(self._waiting.popleft())
                size += len(batch[-1][0])
            self._send(batch)


def _answer(
    econtext: Any,
    module: str,
    qualname: str,
    args: Tuple[Any, ...],
    kwargs: Dict[str, Any],
    only_cheap: bool,
) -> bytes:
    if only_cheap and qualname in _READERS and not _is_cheap(args[0]):
        return SKIPPED
    function = mitogen.core.import_module(module)  # type: Any
    for name in qualname.split("."):
        function = getattr(function, name)
    if sys.getfilesystemencoding() != "utf-8":
        # UTF-8 can encode all names.
        from inmanta_mitogen.names import with_any_name

        function = with_any_name(function)
    # As mitogen's own dispatcher does it for what it calls.
    if getattr(function, "mitogen_takes_econtext", None):
        kwargs["econtext"] = econtext
    if getattr(function, "mitogen_takes_router", None):
        kwargs["router"] = econtext.router
    result = function(*args, **kwargs)
    if type(result) is mitogen.core.Message:
        return result.data  # type: ignore[no-any-return]  # mitogen is not typed
    try:
        data = result if type(result) is bytes else _encoded(result)
    except Exception as error:
        reason = (
            f"the result of {module}.{qualname}, a {type(result).__name__}, cannot be sent to the"
            f" agent ({type(error).__name__}: {error}): return plain values"
        )
        return UNSENDABLE + reason.encode("utf-8", "replace")
    if len(data) > min(WHOLE, econtext.router.max_message_size // 2):
        # Imported late: a host fetches each file that is imported, and most answers are small.
        from inmanta_mitogen.chunks import keep

        return keep(RAW if data is result else KEPT, data)
    return RAW + data if data is result else data


def _encoded(result: Any) -> bytes:
    data = pickle.dumps(result, protocol=PICKLE_PROTOCOL)
    if type(result) in (list, dict) and len(data) > SMALLEST_JSON:
        return _json(result, len(data)) or data
    return data


def _json(result: object, pickle_size: int) -> bytes:
    """Return a result as JSON, in front of it what marks it; empty for what JSON changes."""
    level = [result]
    count = 0
    for _ in range(_JSON_DEPTH):
        containers = [value for value in level if type(value) in (dict, list)]
        if not _PLAIN.issuperset(map(type, level)):
            return b""
        level = []
        for value in containers:
            if isinstance(value, dict):
                if any(type(key) is not str for key in value):
                    return b""
                level.extend(value.values())
            elif isinstance(value, list):
                level.extend(value)
        count += len(level)
        # The same list again and again takes little in a pickle.
        if not level or count > pickle_size:
            break
    if level:
        return b""
    # Imported late: most answers are small, and the first call would wait for it.
    import json

    try:
        data = JSON_MARK + json.dumps(result, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # lone surrogates
        return b""
    return data if len(data) <= LARGEST_JSON else b""


def _is_cheap(path: Any) -> bool:
    try:
        state = os.stat(path)
    except OSError:
        return True  # it fails in the same way
    # Files of /proc and the like have no size, and may block or lose what is read.
    return stat.S_ISREG(state.st_mode) and 0 < state.st_size <= MOST_PREFETCHED
