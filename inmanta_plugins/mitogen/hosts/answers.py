"""Reads what a host answers: plain values, made within bounds whatever the host sends.

An answer is a pickle. Python's own unpickler, even when it is told which classes it may load, can
be made to crash its process, to take any amount of memory or to run for ever by a few bytes: a memo
index of 2**31, a tuple nested a million times that becomes the key of a dict, a tuple of twice
itself sixty times over. So an answer is read here, by the few operations that plain values need.
What is not small, and JSON holds exactly, comes as JSON: Python's own decoder is safe and fast.
"""

import json
import pickle
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import mitogen.core
from inmanta_mitogen.dispatch import JSON_MARK, LARGEST_JSON
from inmanta_plugins.mitogen.settings import (
    ANSWER_MEMORY,
    ANSWER_SECONDS,
    KEY_DEPTH,
    KEY_PARTS,
    LARGEST_INT,
    LONGEST_REMOTE_ERROR,
)
from inmanta_plugins.mitogen.texts import bounded_text

# Roughly what CPython takes, on 64 bits.
_EACH_COSTS = 40
_EMPTY_COSTS: dict[type, int] = {dict: 64, list: 56, set: 216}
_ENTRY_COSTS = 100
_CHECK_EVERY = 256


class UnreadableError(pickle.UnpicklingError):
    """An answer is no pickle of plain values, or exceeds the bounds for one."""


class _Global:
    """A class or function that an answer names, to be called with what follows."""

    def __init__(self, make: Callable[[Any], object], takes: type) -> None:
        self.make = make
        self.takes = takes


def _call_error(text: object) -> mitogen.core.CallError:
    error = mitogen.core.CallError()
    # Not through its constructor, which takes '%' in a text for a format where it has arguments.
    error.args = (bounded_text(str(text), LONGEST_REMOTE_ERROR),)
    return error


_GLOBALS = {
    ("mitogen.core", "_unpickle_call_error"): _Global(_call_error, str),
    ("mitogen.core", "Blob"): _Global(mitogen.core.Blob, bytes),
    ("mitogen.core", "Secret"): _Global(mitogen.core.Secret, str),
    ("mitogen.core", "Kwargs"): _Global(mitogen.core.Kwargs, dict),
}


def read_answer(data: bytes) -> object:
    """
    :param data: What a host answered: a pickle of protocol 2 to 4, or JSON with a mark before it.
    :return: The value: None, bool, int, float, str, bytes, and list, tuple, dict, set and frozenset
        of these, mitogen's ``Secret`` and ``Blob``, or the ``CallError`` that a call ended with.
    :raises UnreadableError: It is anything else, or takes more than :data:`ANSWER_MEMORY` or
        :data:`ANSWER_SECONDS`. Nothing of it has been run.
    """
    if data[:1] == JSON_MARK:
        return _read_json(data)
    return _Reader(data).value()


def _read_json(data: bytes) -> object:
    # A value takes at most some 35 times the memory of its text, and linear time.
    if len(data) > LARGEST_JSON:
        raise UnreadableError("it is more JSON than an answer may have")
    try:
        return json.loads(data[len(JSON_MARK) :].decode())
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"it is invalid JSON ({type(error).__name__})") from None


class _Reader:
    """A machine for the operations of a pickle, with a stack, a memo and a budget."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._cost = 0
        self._until_check = _CHECK_EVERY
        self._deadline = time.thread_time() + ANSWER_SECONDS

    def value(self) -> object:
        try:
            while True:
                operation = self._data[self._at]
                self._at += 1
                if operation == 0x2E:  # '.', the end
                    break
                self._pay(_EACH_COSTS)
                _OPERATIONS[operation](self)
            (result,) = self._stack
        except UnreadableError:
            raise
        except (LookupError, ValueError, TypeError, AttributeError, struct.error) as error:
            raise UnreadableError(
                f"it is no pickle of plain values ({type(error).__name__})"
            ) from None
        if isinstance(result, _Global):
            raise UnreadableError("it is no plain value")
        return result

    # Bounds

    def _pay(self, cost: int) -> None:
        self._cost += cost
        if self._cost > ANSWER_MEMORY:
            raise UnreadableError(
                f"its values take more than {ANSWER_MEMORY // 1024**2} MiB: return less"
            )
        self._until_check -= 1
        if not self._until_check:
            self._until_check = _CHECK_EVERY
            if time.thread_time() > self._deadline:
                raise UnreadableError(f"it takes longer than {ANSWER_SECONDS:.0f} s to read")

    def _key(self, value: Any) -> Any:
        """Pays for the hash of a value, which C computes in full, depth and all."""
        if type(value) is not tuple:
            return value
        level, depth, parts = [value], 0, 0
        while level:
            level = [item for one in level if type(one) is tuple for item in one]
            depth += 1
            parts += len(level)
            self._pay(_EACH_COSTS * (1 + len(level)))
            if depth > KEY_DEPTH or parts > KEY_PARTS:
                raise UnreadableError("a key in it is nested too deeply, or too large")
        return value

    # Reading

    def _take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise UnreadableError("it ends in the middle of a value")
        start = self._at
        self._at += size
        return self._data[start : self._at]

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        end = self._data.index(b"\n", self._at, self._at + 200)
        line = self._data[self._at : end].decode("ascii")
        self._at = end + 1
        return line

    def _since_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _empty(self, kind: type) -> None:
        self._pay(_EMPTY_COSTS[kind])
        self._stack.append(kind())

    def _top(self, kind: type) -> Any:
        found = self._stack[-1]
        if type(found) is not kind:
            raise UnreadableError("it is inconsistent")
        return found

    # What the operations do; a number in their names is the one of bytes that a length takes

    def _protocol(self) -> None:
        self._take(1)

    def _frame(self) -> None:
        self._take(8)

    def _mark(self) -> None:
        self._marks.append(len(self._stack))

    def _pop(self) -> None:
        self._stack.pop()

    def _int(self, size: int) -> None:
        if size > LARGEST_INT:
            raise UnreadableError(f"a number in it has {size} bytes")
        self._stack.append(int.from_bytes(self._take(size), "little", signed=True))

    def _text(self, size: int) -> None:
        data = self._take(size)
        self._pay(size)
        # As Python's own does: file names that are no UTF-8 hold lone surrogates.
        self._stack.append(data.decode("utf-8", "surrogatepass"))

    def _bytes(self, size: int) -> None:
        data = self._take(size)
        self._pay(size)
        self._stack.append(data)

    def _tuple(self, size: int | None) -> None:
        if size is None:
            items = self._since_mark()
        else:
            if len(self._stack) < size:
                raise UnreadableError("it is inconsistent")
            items = self._stack[len(self._stack) - size :]
            del self._stack[len(self._stack) - size :]
        self._stack.append(tuple(items))

    def _append(self) -> None:
        item = self._stack.pop()
        self._top(list).append(item)

    def _appends(self) -> None:
        items = self._since_mark()
        self._top(list).extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._pay(_ENTRY_COSTS)
            target[self._key(key)] = value

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _add_items(self) -> None:
        items = self._since_mark()
        target = self._top(set)
        for item in items:
            self._pay(_ENTRY_COSTS)
            target.add(self._key(item))

    def _frozenset(self) -> None:
        def items(source: list[Any]) -> Iterator[Any]:
            for item in source:
                self._pay(_ENTRY_COSTS)
                yield self._key(item)

        self._stack.append(frozenset(items(self._since_mark())))

    def _remember(self, index: int) -> None:
        self._pay(_ENTRY_COSTS)
        self._memo[index] = self._stack[-1]

    def _recall(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _find(self, module: Any, name: Any) -> None:
        found = _GLOBALS.get((str(module)[:200], str(name)[:200]))
        if found is None:
            named = bounded_text(f"{module}.{name}", 200)
            raise UnreadableError(f"it holds a {named}: return plain values")
        self._stack.append(found)

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._find(module, name)

    def _reduce(self) -> None:
        argument: Any
        (argument,) = self._stack.pop()
        found = self._stack.pop()
        if not isinstance(found, _Global) or type(argument) is not found.takes:
            raise UnreadableError("it is inconsistent")
        self._pay(len(argument))  # type: ignore[arg-type]  # of a type that has one
        self._stack.append(found.make(argument))


Operation = Callable[[_Reader], None]


def _push(value: object) -> Operation:
    return lambda reader: reader._stack.append(value)


def _sized(form: str, then: Callable[[_Reader, int], None]) -> Operation:
    return lambda reader: then(reader, reader._number(form))


def _number(form: str) -> Operation:
    return lambda reader: reader._stack.append(reader._number(form))


# With the names that pickletools has for them. Protocols 2 to 4, without what only classes need.
_OPERATIONS: dict[int, Operation] = {
    0x80: _Reader._protocol,
    0x95: _Reader._frame,
    ord("N"): _push(None),
    0x88: _push(True),
    0x89: _push(False),
    ord("K"): _number("<B"),
    ord("M"): _number("<H"),
    ord("J"): _number("<i"),
    ord("G"): _number(">d"),
    0x8A: _sized("<B", _Reader._int),  # LONG1
    0x8B: _sized("<I", _Reader._int),  # LONG4
    0x8C: _sized("<B", _Reader._text),  # SHORT_BINUNICODE
    ord("X"): _sized("<I", _Reader._text),
    0x8D: _sized("<Q", _Reader._text),  # BINUNICODE8
    ord("C"): _sized("<B", _Reader._bytes),
    ord("U"): _sized("<B", _Reader._bytes),  # what Python 2 calls a string
    ord("T"): _sized("<I", _Reader._bytes),
    ord("B"): _sized("<I", _Reader._bytes),
    0x8E: _sized("<Q", _Reader._bytes),  # BINBYTES8
    ord("("): _Reader._mark,
    ord("0"): _Reader._pop,
    ord(")"): _push(()),
    0x85: lambda reader: reader._tuple(1),
    0x86: lambda reader: reader._tuple(2),
    0x87: lambda reader: reader._tuple(3),
    ord("t"): lambda reader: reader._tuple(None),
    ord("]"): lambda reader: reader._empty(list),
    ord("a"): _Reader._append,
    ord("e"): _Reader._appends,
    ord("}"): lambda reader: reader._empty(dict),
    ord("s"): _Reader._set_item,
    ord("u"): lambda reader: reader._set_items(reader._since_mark()),
    0x8F: lambda reader: reader._empty(set),
    0x90: _Reader._add_items,
    0x91: _Reader._frozenset,
    0x94: lambda reader: reader._remember(len(reader._memo)),  # MEMOIZE
    ord("q"): _sized("<B", _Reader._remember),
    ord("r"): _sized("<I", _Reader._remember),
    ord("h"): _sized("<B", _Reader._recall),
    ord("j"): _sized("<I", _Reader._recall),
    ord("c"): lambda reader: reader._find(reader._line(), reader._line()),
    0x93: _Reader._stack_global,
    ord("R"): _Reader._reduce,
}
