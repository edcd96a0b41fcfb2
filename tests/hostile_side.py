"""What a host that was taken over may do: tests run it, and look what becomes of the agent."""

import os
import pickle
import struct
import sys
from typing import Any, List, Optional, Tuple

import mitogen.core

AGENT = 0
DEAD = mitogen.core.IS_DEAD


class Touch:
    """Creates a file where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Tuple[Any, ...]:
        return (os.mknod, (self.path,))


def _write(econtext: Any, data: bytes) -> None:
    # As mitogen itself does, whose own messages must not come in between.
    econtext.broker.defer_sync(lambda: econtext.stream.protocol._writer.write(data))


def _frame(
    handle: int,
    data: bytes = b"",
    dst: int = AGENT,
    src: Optional[int] = None,
    auth: Optional[int] = None,
    reply_to: int = 0,
    size: Optional[int] = None,
    enc: int = 0x4D49,
) -> bytes:
    me = mitogen.context_id
    return (
        struct.pack(
            ">hLLLLLL",
            enc,
            dst,
            me if src is None else src,
            me if auth is None else auth,
            handle,
            reply_to,
            len(data) if size is None else size,
        )
        + data
    )


@mitogen.core.takes_econtext
def raw(data: bytes, econtext: Any) -> str:
    """Send bytes as they are."""
    _write(econtext, data)
    return "sent"


@mitogen.core.takes_econtext
def send(
    handle: int, data: bytes = b"", times: int = 1, econtext: Any = None, **fields: Any
) -> str:
    """Send a message, again and again."""
    frame = _frame(handle, data, **fields)
    while times:
        block = min(times, 1000)
        _write(econtext, frame * block)
        times -= block
    return "sent"


@mitogen.core.takes_econtext
def send_to_all(handles: Tuple[int, int], data: bytes, econtext: Any = None, **fields: Any) -> str:
    """Send a message to each of a range of handles, but for the one that waits for this call."""
    own = _own_call().reply_to
    frames = [_frame(handle, data, **fields) for handle in range(*handles) if handle != own]
    _write(econtext, b"".join(frames))
    return "sent"


@mitogen.core.takes_econtext
def ask(handle: int, data: bytes = b"", econtext: Any = None, **fields: Any) -> List[Any]:
    """Send a message and return what is answered."""
    receiver = mitogen.core.Receiver(econtext.router)
    _write(econtext, _frame(handle, data, reply_to=receiver.handle, **fields))
    answer = receiver.get(timeout=30, throw_dead=False)
    return [answer.is_dead, bytes(answer.data)]


def _own_call() -> Any:
    """Return the message that asked for the call that runs."""
    frame = sys._getframe()  # type: Any
    while type(frame.f_locals.get("msg")).__name__ != "Message":
        frame = frame.f_back
    return frame.f_locals["msg"]


@mitogen.core.takes_econtext
def answer_with_a_class(path: str, econtext: Any) -> Any:
    """Answer with what would create a file on the agent."""
    _write(econtext, _frame(_own_call().reply_to, pickle.dumps(Touch(path), protocol=4)))


@mitogen.core.takes_econtext
def answer_each_with(data: bytes, econtext: Any) -> Any:
    """Answer all that came in one message with bytes of its own choice, and do no more of it."""
    _write(econtext, _frame(_own_call().reply_to, data, enc=mitogen.core.Message.ENC_BIN))


@mitogen.core.takes_econtext
def announce(size: int, first: bytes, econtext: Any) -> Any:
    """Begin a message of a size, and don't end it."""
    _write(econtext, _frame(1000, size=size) + first)
    return "announced"


def print_lines(count: int) -> Any:
    for number in range(count):
        print("line", number)
    return "printed"


@mitogen.core.takes_econtext
def request_module(name: Any, econtext: Any) -> Any:
    """Ask for a module by a name of bytes; what comes is kept, and not waited for."""
    _write(econtext, _frame(mitogen.core.GET_MODULE, name))
    return "asked"


@mitogen.core.takes_econtext
def held_modules(econtext: Any) -> Any:
    """Return the names of the modules that the agent has sent, and of those it has refused."""
    cache = econtext.importer._cache
    return [
        sorted(name for name, tup in cache.items() if tup[2] is not None),
        sorted(name for name, tup in cache.items() if tup[2] is None),
    ]


@mitogen.core.takes_econtext
def held_texts(econtext: Any) -> Any:
    """All that the agent has told this interpreter: modules, their children, contexts, settings."""
    contexts = [(c.context_id, c.name) for c in econtext.router._context_by_id.values()]
    present = {key: list(value) for key, value in econtext.importer._present.items()}
    tuples = [(tup[0], tup[1], tup[2], list(tup[4])) for tup in econtext.importer._cache.values()]
    return repr((contexts, present, tuples, sorted(econtext.config.items(), key=repr)))


@mitogen.core.takes_econtext
def get_resource(package: str, name: Any, econtext: Any) -> Any:
    """Ask for a data file of a package."""
    content = econtext.importer._resource_requester._get_resource(package, name)
    return content is not None


def claim_as_child(context_id: int) -> Any:
    """Make this interpreter, as a hop, tell that the next context behind it is another one."""
    import inmanta_mitogen.hop

    def lie(name: Any, method_name: str, kwargs: Any, econtext: Any) -> Any:
        return {"id": context_id, "name": "mine", "msg": None}

    setattr(lie, "mitogen_takes_econtext", True)  # noqa: B010  # a function has no such attribute
    inmanta_mitogen.hop.connect = lie
