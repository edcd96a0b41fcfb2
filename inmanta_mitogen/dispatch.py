"""Runs on the host what the agent calls, and sees to it that the answer can travel back."""

import collections
import contextlib
import json
import os
import pickle
import signal
import struct
from typing import Any, Callable, Dict, Generic, Iterator, List, Tuple, TypeVar

import mitogen.core

#: What is no larger than this together, in bytes, travels in one message.
PACK = 256 << 10

# Python 3.6 reads and writes it, and it carries bytes as they are.
PICKLE_PROTOCOL = 4

# An answer that is JSON begins with it. The agent reads JSON some times faster than a pickle.
JSON_MARK = b"J"
#: The sizes that JSON is used for, in bytes: the first of the pickle, the other of the JSON itself.
SMALLEST_JSON = 4096
LARGEST_JSON = 12 << 20
_JSON_DEPTH = 50
_PLAIN = frozenset({dict, list, str, int, float, bool, type(None)})

# The length of an answer among others, in front of it.
_LENGTH = struct.Struct(">L")

T = TypeVar("T")


@mitogen.core.takes_econtext  # type: ignore[untyped-decorator]  # mitogen is not typed
def call(
    module: str, qualname: str, args: Tuple[Any, ...], kwargs: Dict[str, Any], econtext: Any
) -> mitogen.core.Message:
    """
    Call a function of an importable module.

    :param module: The module's full name.
    :param qualname: The function's name in it, with dots for one that a class holds.
    :param args: Its positional arguments.
    :param kwargs: Its keyword arguments.
    :param econtext: mitogen's description of this interpreter, which mitogen passes.
    :return: The result as a message: mitogen itself would end the interpreter over one that it
        can't pickle.
    :raises TypeError: The result can't be pickled.
    :raises ValueError: The result is larger than one message may be.
    """
    data = _pickled_result(econtext, module, qualname, args, kwargs)
    return mitogen.core.Message(data=data, enc=mitogen.core.Message.ENC_PKL)


@mitogen.core.takes_econtext  # type: ignore[untyped-decorator]  # mitogen is not typed
def call_each(requests: List[bytes], handle: int, econtext: Any) -> None:
    """
    Call functions one after another. Their answers go out in that order, each as soon as it can,
    with those that are ready by then in the same message.

    :param requests: Of each call what :func:`call` takes, pickled.
    :param handle: Where the agent listens for the answers.
    :param econtext: mitogen's description of this interpreter, which mitogen passes.
    """

    def send(pack: List[Tuple[bytes, None]]) -> None:
        data = b"".join(part for answer, _ in pack for part in (_LENGTH.pack(len(answer)), answer))
        enc = mitogen.core.Message.ENC_BIN
        econtext.master.send(mitogen.core.Message(data=data, enc=enc, handle=handle))

    answers = Packer(econtext.broker.defer, send)  # type: Packer[None]
    for request in requests:
        message = mitogen.core.Message(data=request, enc=mitogen.core.Message.ENC_PKL)
        message.router = econtext.router
        try:
            answer = _pickled_result(econtext, *message.unpickle())
        except Exception as error:
            answer = mitogen.core.Message.pickled(mitogen.core.CallError(error)).data
        answers.put(answer, None)


class Packer(Generic[T]):
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

    def put(self, data: bytes, companion: T) -> None:
        """
        :param data: What to send.
        :param companion: Given to `send` with it.
        :raises Exception: What `call_soon` raises, when the broker has ended.
        """
        self._waiting.append((data, companion))
        if not self._is_called:
            self._is_called = True
            self._call_soon(self._send_all)

    def _send_all(self) -> None:
        # Whatever is put from here on calls it again.
        self._is_called = False
        while self._waiting:
            pack = []  # type: List[Tuple[bytes, T]]
            size = 0
            while self._waiting and (not pack or size + len(self._waiting[0][0]) <= PACK):
                pack.append(self._waiting.popleft())
                size += len(pack[-1][0])
            self._send(pack)


def unpack_answers(data: bytes) -> Iterator[bytes]:
    """
    :param data: A message with answers of :func:`call_each`.
    :return: Those answers, each taken out only when it is asked for.
    :raises ValueError: It is none.
    """
    at = 0
    while at < len(data):
        start = at + _LENGTH.size
        if start > len(data):
            raise ValueError("it ends in the middle of a length")
        at = start + _LENGTH.unpack_from(data, at)[0]
        if at > len(data):
            raise ValueError("it ends in the middle of an answer")
        yield data[start:at]


def _pickled_result(
    econtext: Any, module: str, qualname: str, args: Tuple[Any, ...], kwargs: Dict[str, Any]
) -> bytes:
    function = mitogen.core.import_module(module)  # type: Any
    for name in qualname.split("."):
        function = getattr(function, name)
    result = function(*args, **_with_context_arguments(function, kwargs, econtext))
    try:
        data = pickle.dumps(result, protocol=PICKLE_PROTOCOL)
    except Exception as error:
        raise TypeError(
            f"the result of {module}.{qualname}, a {type(result).__name__}, cannot be sent to the"
            f" agent ({type(error).__name__}: {error}): return plain values"
        ) from error
    if len(data) > SMALLEST_JSON:
        data = _json(result, len(data)) or data
    limit = econtext.router.max_message_size
    # The answer may travel with its length in front of it.
    if len(data) + _LENGTH.size > limit:
        raise ValueError(
            f"the result of {module}.{qualname} takes {len(data)} bytes, and a message carries at"
            f" most {limit}: return less, or write it to a file on the host and fetch that with"
            " Proxy.read_binary or get_file"
        )
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
    try:
        data = JSON_MARK + json.dumps(result, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # lone surrogates
        return b""
    return data if len(data) <= LARGEST_JSON else b""


def _with_context_arguments(function: Any, kwargs: Dict[str, Any], econtext: Any) -> Dict[str, Any]:
    # As mitogen's own dispatcher does it for what it calls.
    if getattr(function, "mitogen_takes_econtext", None):
        kwargs.setdefault("econtext", econtext)
    if getattr(function, "mitogen_takes_router", None):
        kwargs.setdefault("router", econtext.router)
    return kwargs


@mitogen.core.takes_econtext  # type: ignore[untyped-decorator]  # mitogen is not typed
def cut(context_id: int, econtext: Any) -> None:
    """
    End an interpreter that was started from this one and does not leave by itself.

    :param context_id: Its mitogen context id.
    :param econtext: mitogen's description of this interpreter, which mitogen passes.
    """
    stream = econtext.router.stream_by_id(context_id)
    if stream is not None and stream.protocol.remote_id == context_id:
        kill_started(stream.conn.proc)
        econtext.broker.defer(stream.on_disconnect, econtext.broker)


def kill_started(process: Any) -> None:
    """
    Kill what was started for a connection (an interpreter, ssh, sudo, ...) and what that started in
    turn, as far as this user may.

    :param process: mitogen's ``Process`` of it.
    """
    # Looked up before the first is killed: its children would be init's from then on. They may be
    # all that this user may kill, as when sudo to another user than root is stuck.
    pids = [process.pid]
    children = _children()
    for pid in pids:
        pids.extend(children.get(pid, []))
    for pid in reversed(pids[1:]):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        process.kill()


def _children() -> Dict[int, List[int]]:
    """Of each process its children; empty where there is no Linux /proc."""
    children = {}  # type: Dict[int, List[int]]
    with contextlib.suppress(OSError):
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    with open(f"/proc/{entry}/stat", "rb") as file:
                        # The command's name, in parentheses, may hold any character.
                        parent = int(file.read().rpartition(b")")[2].split()[1])
                    children.setdefault(parent, []).append(int(entry))
    return children
