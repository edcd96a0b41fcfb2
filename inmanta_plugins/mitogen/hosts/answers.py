"""Reads what a host answers: plain values, made within bounds whatever the host sends.

An answer is a pickle. Python's unpickler in C can be made to crash its process or to take any
amount of memory by a few bytes, even when it is told which classes it may load: by a memo index of
2**31, or a tuple nested a million times that becomes the key of a dict. So its twin in Python reads
them, by the operations that plain values need, with a price on each of a large answer.
What is not small, and JSON holds exactly, comes as JSON: Python's own decoder is safe and fast.
"""

import io
import json
import pickle
import time
from collections.abc import Callable
from typing import Any

import mitogen.core
from inmanta_mitogen.dispatch import JSON_MARK, LARGEST_JSON
from inmanta_plugins.mitogen import settings
from inmanta_plugins.mitogen.texts import bounded_text

Operation = Callable[[Any], None]


class UnreadableError(pickle.UnpicklingError):
    """An answer is not a pickle of plain values, or exceeds the bounds for one."""


def read_answer(data: bytes) -> object:
    """
    Return the value that a host answered with.

    None, bool, int, float, str, bytes, and list, tuple, dict, set and frozenset of these, mitogen's
    ``Secret`` and ``Blob``, or the ``CallError`` that a call ended with.

    :param data: What a host answered: a pickle of protocol 2 to 4, or JSON with a mark before it.
    :raises UnreadableError: It is anything else, or takes more than :data:`ANSWER_MEMORY` or
        :data:`ANSWER_SECONDS`. Nothing of it has been run.
    """
    if data[:1] == JSON_MARK:
        return _read_json(data)
    try:
        value: object = _Reader(data).load()
    except UnreadableError:
        raise
    except Exception as error:
        kind = type(error).__name__
        raise UnreadableError(f"it is not a pickle of plain values ({kind})") from None
    if callable(value):
        raise UnreadableError("it is not a plain value")
    return value


def _read_json(data: bytes) -> object:
    # A value takes at most some 35 times the memory of its text, and linear time.
    if len(data) > LARGEST_JSON:
        raise UnreadableError("it is more JSON than an answer may have")
    try:
        return json.loads(data[len(JSON_MARK) :].decode())
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"it is invalid JSON ({type(error).__name__})") from None


class _Reader(pickle._Unpickler):
    """Python's unpickler, with the operations of plain values alone."""

    def __init__(self, data: bytes) -> None:
        # What Python 2 calls a string is bytes.
        super().__init__(io.BytesIO(data), encoding="bytes")
        table = _OPERATIONS if len(data) <= settings.UNPRICED_ANSWER else _Priced(len(data))
        self.dispatch = table  # type: ignore[misc,assignment]  # for this one alone

    def find_class(self, module: str, name: str) -> Any:
        """Return what makes the value, of those that may be made."""
        found = _MAKERS.get((module[:200], name[:200]))
        if found is None:
            named = bounded_text(f"{module}.{name}", 200)
            raise UnreadableError(f"it holds a {named}: return plain values")
        return found


def _maker(kind: type, make: Callable[[Any], object]) -> Callable[[object], object]:
    def checked(value: object) -> object:
        if type(value) is not kind:
            raise UnreadableError("it is inconsistent")
        return make(value)

    return checked


def _call_error(text: str) -> mitogen.core.CallError:
    error = mitogen.core.CallError()
    # Not through its constructor, which takes '%' in a text for a format where it has arguments.
    error.args = (bounded_text(text, settings.LONGEST_REMOTE_ERROR),)
    return error


_MAKERS = {
    ("mitogen.core", "_unpickle_call_error"): _maker(str, _call_error),
    ("mitogen.core", "Blob"): _maker(bytes, mitogen.core.Blob),
    ("mitogen.core", "Secret"): _maker(str, mitogen.core.Secret),
    ("mitogen.core", "Kwargs"): _maker(dict, mitogen.core.Kwargs),
}


def _check_key(key: object) -> None:
    """Check that the hash of a key, which C computes in full, takes little time and depth."""
    level, depth, parts = [key], 0, 0
    while level:
        level = [item for one in level if type(one) is tuple for item in one]
        depth += 1
        parts += len(level)
        if depth > settings.KEY_DEPTH or parts > settings.KEY_PARTS:
            raise UnreadableError("a key in it is nested too deeply, or too large")


def _hashing(load: Operation, keys: slice) -> Operation:
    """Return an operation that checks first what it hashes: a slice of the stack."""

    def checked(reader: Any) -> None:
        if len(reader.stack) > settings.MOST_KEYS and keys.start is None:
            raise UnreadableError("it has too many keys at once: return lists")
        for key in reader.stack[keys]:
            if type(key) is tuple:
                _check_key(key)
        load(reader)

    return checked


# Of protocols 2 to 4, without what only classes need.
_NAMES = """
    PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT
    SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 SHORT_BINSTRING
    BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT EMPTY_SET
    MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE
"""
# Where on the stack the keys are.
_HASHING = {
    pickle.SETITEM: slice(-2, -1),
    pickle.SETITEMS: slice(None, None, 2),
    pickle.ADDITEMS: slice(None),
    pickle.FROZENSET: slice(None),
}
_LOAD = pickle._Unpickler.dispatch
_CODES = [getattr(pickle, name)[0] for name in _NAMES.split()]
_OPERATIONS: dict[int, Operation] = {code: _LOAD[code] for code in _CODES}
_OPERATIONS |= {code[0]: _hashing(_LOAD[code[0]], keys) for code, keys in _HASHING.items()}

# Roughly what CPython takes for each, on 64 bits.
_COSTS = dict.fromkeys(_OPERATIONS, 64) | {
    pickle.EMPTY_DICT[0]: 104,
    pickle.EMPTY_LIST[0]: 96,
    pickle.EMPTY_SET[0]: 256,
    pickle.MEMOIZE[0]: 140,
    pickle.BINPUT[0]: 140,
    pickle.LONG_BINPUT[0]: 140,
}
_CHECK_EVERY = 16_384


class _Priced:
    """The operations for one answer, of which each use costs something."""

    def __init__(self, cost: int) -> None:
        self._cost = self._checked = cost
        self._deadline = time.thread_time() + settings.ANSWER_SECONDS

    def __getitem__(self, operation: int) -> Operation:
        self._cost += _COSTS[operation]
        if self._cost > self._checked:
            self._check()
        return _OPERATIONS[operation]

    def _check(self) -> None:
        self._checked = self._cost + _CHECK_EVERY
        if self._cost > settings.ANSWER_MEMORY:
            raise UnreadableError(
                f"its values take more than {settings.ANSWER_MEMORY // 1024**2} MiB: return less"
            )
        if time.thread_time() > self._deadline:
            raise UnreadableError(f"it takes longer than {settings.ANSWER_SECONDS:.0f} s to read")
