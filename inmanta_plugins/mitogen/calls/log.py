"""What of a value may be logged, and how long.

Arguments and results of remote calls go to the log of the resource, which the orchestrator keeps
in PostgreSQL. So what is logged here is short (two environment variables tell how short), cheap to
make for whatever can be sent to a host, and always something that a ``jsonb`` column can hold.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
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
    return _truncated(raw_value, *settings.logged_values())


def truncate_logged_values(raw_values: Iterable[object]) -> list[object]:
    """
    Return what :func:`truncate_logged_value` does for several values, at less cost for each.

    :param raw_values: The values.
    """
    max_len, suffix = settings.logged_values()
    return [_truncated(value, max_len, suffix) for value in raw_values]


def _truncated(raw_value: object, max_len: int, suffix: str) -> object:
    if _is_plain(raw_value, max_len):
        return raw_value
    text = ""
    try:
        for part in _json(raw_value, max_len, 0):
            text += part
            if len(text) > max_len:
                break
    except Exception as error:
        text = json.dumps(_unprintable(raw_value, error))
    if len(text) <= max_len:
        return json.loads(text)
    suffix = _storable(suffix)[:max_len]
    return text[: max_len - len(suffix)] + suffix


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


def _json(value: Any, limit: int, depth: int) -> Iterator[str]:
    """
    Yield the JSON text of a value, one part after another: what lies behind the limit is not
    looked at.
    """
    # The real type: a class may claim another one by its `__class__`.
    kind = type(value)
    if issubclass(kind, int | float) and kind is not bool:
        text = _number_text(value)
        yield text if text.lstrip("-")[:1].isdigit() else json.dumps(text)
    elif issubclass(kind, list | tuple):
        yield from _json_container(((None, item) for item in value), "[]", limit, depth)
    elif issubclass(kind, dict):
        yield from _json_container(value.items(), "{}", limit, depth)
    else:
        yield json.dumps(value if value is None or kind is bool else _text(value, limit))


def _json_container(
    items: Iterable[tuple[Any, Any]], brackets: str, limit: int, depth: int
) -> Iterator[str]:
    if depth >= settings.LOGGED_DEPTH:
        yield f'"{brackets[0]}...{brackets[1]}"'
        return
    separator = brackets[0]
    for key, item in items:
        yield separator
        if brackets == "{}":
            yield f"{json.dumps(_key(key, limit))}: "
        yield from _json(item, limit, depth + 1)
        separator = ", "
    yield brackets[1] if separator == ", " else brackets


def _key(key: Any, limit: int) -> str:
    if key is None or type(key) is bool:
        return json.dumps(key)
    return _number_text(key) if isinstance(key, int | float) else _text(key, limit)


def _text(value: Any, limit: int) -> str:
    """Return a text, or the ``repr`` of anything else: no more of it than can be seen."""
    if isinstance(value, str) and not isinstance(value, mitogen.core.Secret):
        text = str.__getitem__(value, slice(limit + 1))
    else:
        try:
            text = repr(_sliced(value, limit))[: limit + 1]
        except Exception as error:
            text = _unprintable(value, error)
    return _storable(text)


def _sliced(value: Any, limit: int) -> object:
    """Return something with the same ``repr`` up to the limit, which is cheap."""
    kind = type(value)
    if kind in (str, bytes, bytearray):
        return value[:limit]
    if kind in (tuple, set, frozenset):
        return kind(_sliced(item, limit) for item in itertools.islice(value, limit))
    return value


def _number_text(value: int | float) -> str:
    """Return a number as JSON has it, or as a text when JSON can't hold it or Python write it."""
    if not isinstance(value, int):
        return float.__repr__(value)
    bits = int.bit_length(value)
    if bits <= _MAX_DECIMAL_BITS:
        try:
            return int.__repr__(value)
        except ValueError:  # more digits than `sys.set_int_max_str_digits` allows
            pass
    return f"<int of {bits} bits>"


def _unprintable(value: object, error: Exception) -> str:
    return f"<unprintable {type(value).__name__}: {type(error).__name__}>"
