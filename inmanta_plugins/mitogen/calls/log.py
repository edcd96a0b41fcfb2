"""What of a value may be logged, and how long.

Arguments and results of remote calls go to the log of the resource, which the orchestrator keeps
in PostgreSQL. So what is logged here is short (two environment variables tell how short), cheap to
make for whatever can be sent to a host, and always something that a ``jsonb`` column can hold.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

import mitogen.core
from inmanta_plugins.mitogen import settings

# 14000 bits are 4215 digits: Python refuses to write an int of more than 4300.
_MAX_DECIMAL_BITS = 14_000

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def truncate_logged_value(raw_value: object) -> object:
    """
    Return something short enough to log for any value.

    The limit is the number of characters in the environment variable
    ``INMANTA_MITOGEN_LOGGED_VALUE_MAX_LEN``, 50 by default. A value that was cut ends with the
    text in ``INMANTA_MITOGEN_LOGGED_TRUNCATED_VALUE_SUFFIX``, ``<...>`` by default. Both are read
    at each call.

    What JSON can't hold goes in by its ``repr``; so do :class:`mitogen.core.Secret` and
    :class:`mitogen.core.Blob`, which show a mask. NUL and lone surrogates, which PostgreSQL
    refuses, are written as Python escapes them: ``\\x00``, ``\\udc80``. NaN and the infinities
    become texts. What is nested deeper than 60 levels shows as ``[...]`` or ``{...}``. For what can
    be sent to a host the cost depends on the limit alone; for anything else it is that of its
    ``repr``.

    :param raw_value: The value.
    :return: The value itself (containers as new lists and dicts) when its JSON text fits the limit;
        else that text, cut so that it has exactly the limit's length, suffix included.
    """
    return _truncated(raw_value, settings.logged_values())


def truncate_logged_values(raw_values: Iterable[object]) -> list[object]:
    """
    Return what :func:`truncate_logged_value` does for several values, at less cost for each.

    :param raw_values: The values.
    """
    how = settings.logged_values()
    return [_truncated(value, how) for value in raw_values]


def _truncated(raw_value: object, how: settings.LoggedValues) -> object:
    if _is_plain(raw_value, how.max_len):
        return raw_value
    value = _Shortener(how.max_len).value(raw_value, 0)
    text = json.dumps(value)
    if len(text) <= how.max_len:
        return value
    suffix = _storable(how.suffix)[: how.max_len]
    return text[: how.max_len - len(suffix)] + suffix


def _is_plain(value: object, max_len: int) -> bool:
    """Return whether this is one of the short values that most calls have, which go in as is."""
    if type(value) is str:
        return (
            len(value) + 2 <= max_len
            and value.isascii()
            and value.isprintable()
            and not ('"' in value or "\\" in value)
        )
    return (value is None or type(value) is bool) and max_len >= len("false")


def _storable(text: str) -> str:
    return _UNSTORABLE.sub(lambda found: repr(found.group())[1:-1], text)


class _Shortener:
    """
    Makes of a value what JSON can hold, and leaves out what lies behind the limit.

    :param room: The limit, in characters of the JSON text. What is left of it is never less than
        what the text really has left, so nothing is left out before the limit.
    """

    def __init__(self, room: int) -> None:
        self._room = room

    def value(self, value: object, depth: int) -> object:
        """
        Return what the log shows of a value.

        :param value: The value.
        :param depth: How many containers are around it.
        """
        room = self._room
        try:
            return self._value(value, depth)
        except Exception as error:
            self._room = room
            return self._text(_unprintable(value, error))

    def _value(self, value: Any, depth: int) -> object:
        # The real type: a class may claim another one by its `__class__`.
        kind = type(value)
        if value is None or kind is bool:
            self._room -= len("true")
            return value
        if issubclass(kind, str) and not issubclass(kind, mitogen.core.Secret):
            return self._text(value)
        if issubclass(kind, int | float):
            return self._number(value)
        is_shown = depth < settings.LOGGED_DEPTH
        if issubclass(kind, list | tuple):
            return self._array(value, depth + 1) if is_shown else self._text("[...]")
        if issubclass(kind, dict):
            return self._object(value, depth + 1) if is_shown else self._text("{...}")
        return self._text(_repr(value, self._room + 1))

    def _text(self, text: str) -> str:
        # One more than fits, so that what is cut is seen to be too long.
        text = _storable(str.__getitem__(text, slice(max(self._room, 0) + 1)))
        self._room -= len(text) + 2
        return text

    def _number(self, value: Any) -> object:
        text = _number_text(value)
        if not text.lstrip("-")[:1].isdigit():  # NaN, infinity, or too long to be written
            return self._text(text)
        self._room -= len(text)
        return int.__int__(value) if isinstance(value, int) else float.__float__(value)

    def _array(self, value: Any, depth: int) -> object:
        self._room -= 2
        items: list[object] = []
        for item in value:
            items.append(self.value(item, depth))
            self._room -= 1
            if self._room < 0:
                break
        self._room += 1
        return items

    def _object(self, value: Any, depth: int) -> object:
        self._room -= 2
        members: dict[str, object] = {}
        for key, member in value.items():
            name = self._text(self._key(key))
            members[name] = self.value(member, depth)
            if self._room < 0:
                break
        return members

    def _key(self, key: Any) -> str:
        if key is None or type(key) is bool:
            return json.dumps(key)
        if isinstance(key, str) and not isinstance(key, mitogen.core.Secret):
            return key
        return _repr(key, self._room + 1)


def _number_text(value: Any) -> str:
    if not isinstance(value, int):
        return float.__repr__(value)
    bits = int.bit_length(value)
    if bits <= _MAX_DECIMAL_BITS:
        try:
            return int.__repr__(value)
        except ValueError:  # more digits than `sys.set_int_max_str_digits` allows
            pass
    return f"<int of {bits} bits>"


def _repr(value: Any, room: int) -> str:
    """Return the ``repr`` of a value, not much longer than `room` allows."""
    kind = type(value)
    room = max(room, 0)
    try:
        if kind in (str, bytes, bytearray):
            return repr(value[:room])
        if kind is int or kind is float:
            return _number_text(value)
        if kind in (set, frozenset, tuple) and value:
            return _repr_of_items(value, room)
        return repr(value)[:room]
    except Exception as error:
        return _unprintable(value, error)


def _repr_of_items(values: Any, room: int) -> str:
    parts = []
    for value in values:
        parts.append(_repr(value, room))
        room -= len(parts[-1]) + 2
        if room < 0:
            break
    inside = ", ".join(parts)
    if isinstance(values, tuple):
        return f"({inside},)" if len(values) == 1 else f"({inside})"
    return f"{{{inside}}}" if isinstance(values, set) else f"frozenset({{{inside}}})"


def _unprintable(value: object, error: Exception) -> str:
    return f"<unprintable {type(value).__name__}: {type(error).__name__}>"
