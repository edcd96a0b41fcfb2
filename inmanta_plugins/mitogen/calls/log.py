"""What of a value may be logged, and how long.

Arguments and results of remote calls go to the log of the resource, which the orchestrator keeps
in PostgreSQL. So what is logged here is short (two environment variables tell how short), cheap to
make whatever the value is, and always something that a ``jsonb`` column can hold.
"""

import array
import collections
import dataclasses
import functools
import json
import re
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import mitogen.core
from inmanta_plugins.mitogen import settings

# Deeper than any log is read, and far from the recursion limits of Python and PostgreSQL.
_MAX_DEPTH = 60

# 14000 bits are 4215 digits: Python refuses to read or write an int of more than 4300.
_MAX_DECIMAL_BITS = 14_000

_JSON_NUMBER = re.compile(r"-?[0-9.]+(e[+-]?[0-9]+)?")

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def truncate_logged_value(raw_value: object) -> object:
    """
    Make of any value something short enough to log, at a cost that depends on the limit alone.

    The limit is the number of characters in the environment variable
    ``INMANTA_MITOGEN_LOGGED_VALUE_MAX_LEN``, 50 by default. A value that was cut ends with the
    text in ``INMANTA_MITOGEN_LOGGED_TRUNCATED_VALUE_SUFFIX``, ``<...>`` by default. Both are read
    at each call.

    What JSON can't hold goes in by its ``repr``; so do :class:`mitogen.core.Secret` and
    :class:`mitogen.core.Blob`, which show a mask. NUL and lone surrogates, which PostgreSQL
    refuses, are written as Python escapes them: ``\\x00``, ``\\udc80``. NaN and the infinities
    become texts. Cycles and what is nested deeper than 60 levels show as ``[...]`` or ``{...}``.
    Two keys of one JSON text, as 1 and "1", are told apart by a number: ``1#2``. The one cost that
    can't be bounded is that of a ``__repr__`` which a class wrote itself.

    :param raw_value: The value.
    :return: The value itself (containers as new lists and dicts) when its JSON text fits the limit;
        else that text, cut so that it has exactly the limit's length, suffix included.
    """
    return _truncated(raw_value, settings.logged_values())


def truncate_logged_values(raw_values: Iterable[object]) -> list[object]:
    """
    The same for several, at less cost for each.

    :param raw_values: The values.
    :return: Each as :func:`truncate_logged_value` returns it.
    """
    how = settings.logged_values()
    return [_truncated(value, how) for value in raw_values]


def _truncated(raw_value: object, how: settings.LoggedValues) -> object:
    if _is_plain(raw_value, how.max_len):
        return raw_value
    out = _Text(how.max_len)
    try:
        return _Encoder(out).value(raw_value)
    except _FullError:
        suffix = _storable(how.suffix)[: how.max_len]
        return str(out)[: how.max_len - len(suffix)] + suffix


def _is_plain(value: object, max_len: int) -> bool:
    """
    Whether this is one of the short values that most calls have, which go in as they are.
    """
    kind = type(value)
    if kind is str:
        text: Any = value
        return (
            len(text) + 2 <= max_len
            and text.isascii()
            and text.isprintable()
            and not ('"' in text or "\\" in text)
        )
    return (value is None or kind is bool) and max_len >= len("false")


def _storable(text: str) -> str:
    return _UNSTORABLE.sub(lambda found: repr(found.group())[1:-1], text)


class _FullError(Exception):
    """The text is longer than it may be: whatever follows can't change the result."""


class _Text:
    """
    A text that grows up to a limit.

    :param limit: The greatest length, in characters.
    """

    def __init__(self, limit: int) -> None:
        self._parts: list[str] = []
        self.room = limit

    def put(self, text: str) -> None:
        """
        :param text: What to append.
        :raises _FullError: When the text is longer than the limit now.
        """
        self._parts.append(text)
        self.room -= len(text)
        if self.room < 0:
            raise _FullError

    def mark(self) -> int:
        """:return: Where the text ends now, for `rewind`."""
        return len(self._parts)

    def rewind(self, mark: int) -> None:
        """
        :param mark: What `mark` returned: everything put since then is dropped.
        """
        self.room += sum(map(len, self._parts[mark:]))
        del self._parts[mark:]

    def __str__(self) -> str:
        return "".join(self._parts)


class _Encoder:
    """
    Writes a value as ``json.dumps`` does, no further than the room there is, and gives it back as
    JSON holds it.

    :param out: Where the JSON text goes.
    """

    def __init__(self, out: _Text) -> None:
        self.out = out
        self._open: set[int] = set()

    def value(self, value: object) -> object:
        """
        :param value: Any value.
        :return: What ``json.loads`` would make of the text that was written.
        :raises _FullError: When the text is longer than it may be.
        """
        mark = self.out.mark()
        try:
            return self._value(value)
        except _FullError:
            raise
        except Exception as error:
            self.out.rewind(mark)
            return self._string(_unprintable(value, error))

    def _value(self, value: object) -> object:
        # The real type: a class may claim another one by its `__class__`.
        kind = type(value)
        if value is None or kind is bool:
            self.out.put(_CONSTANTS[value])
            return value
        if issubclass(kind, str) and not issubclass(kind, mitogen.core.Secret):
            return self._string(self._sliced(value))
        if issubclass(kind, int | float):
            return self._number(value)
        if issubclass(kind, list | tuple):
            return self._array(value)
        if issubclass(kind, dict):
            return self._object(value)
        return self._string(self._repr(value))

    def _sliced(self, text: Any) -> str:
        # One more than fits, so that what is cut is seen to be too long.
        return str.__getitem__(text, slice(self.out.room + 1))

    def _string(self, text: str) -> str:
        text = _storable(self._sliced(text))
        self.out.put(json.dumps(text))
        return text

    def _number(self, value: Any) -> object:
        text = _number_text(value)
        if not _JSON_NUMBER.fullmatch(text):
            return self._string(text)
        self.out.put(text)
        return int.__int__(value) if isinstance(value, int) else float.__float__(value)

    def _array(self, value: Any) -> object:
        if not self._may_open(value):
            return self._string("[...]")
        items: list[object] = []
        with self._opened(value):
            self.out.put("[")
            for item in value:
                if items:
                    self.out.put(", ")
                items.append(self.value(item))
            self.out.put("]")
        return items

    def _object(self, value: Any) -> object:
        if not self._may_open(value):
            return self._string("{...}")
        members: dict[str, object] = {}
        with self._opened(value):
            self.out.put("{")
            for key, member in value.items():
                if members:
                    self.out.put(", ")
                name = self._key(key, members)
                self.out.put(": ")
                members[name] = self.value(member)
            self.out.put("}")
        return members

    def _key(self, key: object, taken: dict[str, object]) -> str:
        text = _storable(self._sliced(self._key_text(key)))
        name, number = text, len(taken)
        # 1 and "1" are two keys to Python and one to JSON.
        while name in taken:
            number += 1
            name = f"{text}#{number}"
        return self._string(name)

    def _key_text(self, key: object) -> str:
        kind = type(key)
        if key is None or kind is bool:
            return _CONSTANTS[key]
        if issubclass(kind, str) and not issubclass(kind, mitogen.core.Secret):
            return self._sliced(key)
        if issubclass(kind, int | float):
            return _number_text(key)
        return self._repr(key)

    def _repr(self, value: object) -> str:
        out = _Text(self.out.room + 1)
        with suppress(_FullError):
            _Repr(out, self._open).value(value)
        return str(out)

    def _may_open(self, value: object) -> bool:
        return id(value) not in self._open and len(self._open) < _MAX_DEPTH

    @contextmanager
    def _opened(self, value: object) -> Iterator[None]:
        self._open.add(id(value))
        try:
            yield
        finally:
            self._open.discard(id(value))


class _Repr:
    """
    Writes a value as ``repr`` does, no further than the room there is.

    :param out: Where the text goes.
    :param opened: The identities of the containers around the value.
    """

    def __init__(self, out: _Text, opened: set[int]) -> None:
        self.out = out
        self._open = opened

    def value(self, value: object) -> None:
        """
        :param value: Any value.
        :raises _FullError: When the text is longer than it may be.
        """
        mark = self.out.mark()
        try:
            self._value(value)
        except _FullError:
            raise
        except Exception as error:
            self.out.rewind(mark)
            self.out.put(_unprintable(value, error))

    def _value(self, value: object) -> None:
        write = _writer_of(type(value))
        if write is None:
            self.out.put(str.__getitem__(repr(value), slice(self.out.room + 1)))
        elif id(value) in self._open or len(self._open) >= _MAX_DEPTH:
            self.out.put("...")
        else:
            self._open.add(id(value))
            try:
                write(self, value)
            finally:
                self._open.discard(id(value))

    def number(self, value: Any) -> None:
        """:param value: An int or float."""
        self.out.put(_number_text(value))

    def sliced(self, value: Any) -> None:
        """:param value: A str, bytes, bytearray or array: as much of it as may fit."""
        base = next(base for base in _SLICED if isinstance(value, base))
        self.out.put(repr(base.__getitem__(value, slice(self.out.room + 1))))

    def items(self, before: str, values: Iterable[object], after: str) -> None:
        """
        :param before: What stands before the values.
        :param values: The values, which are separated by commas.
        :param after: What stands behind them.
        """
        self.out.put(before)
        for number, value in enumerate(values):
            if number:
                self.out.put(", ")
            self.value(value)
        self.out.put(after)

    def pairs(
        self,
        before: str,
        pairs: Iterable[tuple[object, object]],
        after: str,
        *,
        fields: bool = False,
    ) -> None:
        """
        :param before: What stands before the pairs.
        :param pairs: The pairs, which are separated by commas.
        :param after: What stands behind them.
        :param fields: Whether to write ``name=value`` instead of ``'name': value``.
        """
        self.out.put(before)
        for number, (key, value) in enumerate(pairs):
            if number:
                self.out.put(", ")
            if fields:
                self.out.put(f"{key}=")
            else:
                self.value(key)
                self.out.put(": ")
            self.value(value)
        self.out.put(after)

    def sequence(self, value: Any) -> None:
        """:param value: A list or tuple."""
        if isinstance(value, list):
            self.items("[", value, "]")
        else:
            self.items("(", value, ",)" if len(value) == 1 else ")")

    def named_tuple(self, value: Any) -> None:
        """:param value: A namedtuple."""
        fields = zip(value._fields, value, strict=True)
        self.pairs(f"{type(value).__name__}(", fields, ")", fields=True)

    def set(self, value: Any) -> None:
        """:param value: A set or frozenset."""
        name = type(value).__name__
        if not value:
            self.out.put(f"{name}()")
        elif type(value) is set:
            self.items("{", value, "}")
        else:
            self.items(f"{name}({{", value, "})")

    def deque(self, value: Any) -> None:
        """:param value: A deque."""
        end = "])" if value.maxlen is None else f"], maxlen={value.maxlen})"
        self.items(f"{type(value).__name__}([", value, end)

    def mapping(self, value: Any) -> None:
        """:param value: A dict, or what stands for one."""
        if type(value) is dict:
            self.pairs("{", value.items(), "}")
        else:
            self.pairs(f"{type(value).__name__}({{", value.items(), "})")

    def view(self, value: Any) -> None:
        """:param value: The keys, values or items of a dict."""
        self.items(f"{type(value).__name__}([", value, "])")

    def exception(self, value: Any) -> None:
        """:param value: An exception whose class has no repr of its own."""
        self.items(f"{type(value).__name__}(", value.args, ")")

    def namespace(self, value: Any) -> None:
        """:param value: A SimpleNamespace."""
        self.pairs("namespace(", vars(value).items(), ")", fields=True)

    def dataclass(self, value: Any) -> None:
        """:param value: An instance of a dataclass that has the repr made for it."""
        shown = [field.name for field in dataclasses.fields(value) if field.repr]
        pairs = ((name, getattr(value, name)) for name in shown)
        self.pairs(f"{type(value).__qualname__}(", pairs, ")", fields=True)

    def wrapped(self, value: Any) -> None:
        """:param value: A UserDict, UserList or UserString."""
        self.value(value.data)

    def method(self, value: Any) -> None:
        """:param value: A bound method."""
        self.items(f"<bound method {value.__func__.__qualname__} of ", [value.__self__], ">")

    def partial(self, value: Any) -> None:
        """:param value: A partial."""
        self.items("functools.partial(", [value.func, *value.args], "")
        if value.keywords:
            self.pairs(", ", value.keywords.items(), "", fields=True)
        self.out.put(")")


_CONSTANTS: dict[object, str] = {None: "null", True: "true", False: "false"}

_SLICED: tuple[Any, ...] = (str, bytes, bytearray, array.array)

# By the function that `repr` calls: a class with one of its own has other ideas of what to show.
_WRITERS: dict[object, Callable[[_Repr, Any], None]] = {
    int.__repr__: _Repr.number,
    **{kind.__repr__: _Repr.sliced for kind in _SLICED},
    **dict.fromkeys([list.__repr__, tuple.__repr__], _Repr.sequence),
    **dict.fromkeys([set.__repr__, frozenset.__repr__], _Repr.set),
    collections.deque.__repr__: _Repr.deque,
    **dict.fromkeys(
        [
            kind.__repr__
            for kind in (
                dict,
                collections.OrderedDict,
                collections.Counter,
                collections.defaultdict,
                types.MappingProxyType,
            )
        ],
        _Repr.mapping,
    ),
    **{type(view({})).__repr__: _Repr.view for view in (dict.keys, dict.values, dict.items)},
    BaseException.__repr__: _Repr.exception,
    types.SimpleNamespace.__repr__: _Repr.namespace,
    **dict.fromkeys(
        [
            kind.__repr__
            for kind in (collections.UserDict, collections.UserList, collections.UserString)
        ],
        _Repr.wrapped,
    ),
    types.MethodType.__repr__: _Repr.method,
    functools.partial.__repr__: _Repr.partial,
}


def _writer_of(kind: type) -> Callable[[_Repr, Any], None] | None:
    shown_by: Any = kind.__repr__
    if shown_by in _WRITERS:
        return _WRITERS[shown_by]
    if issubclass(kind, tuple) and getattr(shown_by, "__module__", "") == "collections":
        return _Repr.named_tuple
    made_for = getattr(getattr(shown_by, "__wrapped__", None), "__qualname__", "")
    if dataclasses.is_dataclass(kind) and "__create_fn__" in made_for:
        return _Repr.dataclass
    return None


def _number_text(value: Any) -> str:
    if isinstance(value, int):
        return _int_text(value)
    return float.__repr__(value)


def _int_text(value: int) -> str:
    bits = int.bit_length(value)
    if bits <= _MAX_DECIMAL_BITS:
        with suppress(ValueError):  # more digits than `sys.set_int_max_str_digits` allows
            return int.__repr__(value)
    return f"<int of {bits} bits>"


def _unprintable(value: object, error: Exception) -> str:
    return f"<unprintable {type(value).__name__}: {type(error).__name__}>"
