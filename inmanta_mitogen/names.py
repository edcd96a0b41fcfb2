"""
How this host knows files and arguments by name. Apart from what is done with them, as most calls
need no more: a host compiles each file at its first use.
"""

import os
from typing import Union

AnyPath = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]"]


def encode(value: AnyPath) -> bytes:
    """
    The bytes by which this host knows a name: by the locale's encoding, or by UTF-8 where that
    can't hold it, as in the C locale on Python 3.6.

    :param value: A path, or a program's argument. Lone surrogates from U+DC80 to U+DCFF stand for
        bytes that are no text, as :pep:`383` has it.
    :raises UnicodeEncodeError: When it holds other lone surrogates.
    """
    try:
        return os.fsencode(value)
    except UnicodeEncodeError:
        text = os.fspath(value)
        # Bytes need no encoding, so it can only have been text that failed.
        assert isinstance(text, str)
        return text.encode("utf-8", "surrogateescape")


def native(path: AnyPath) -> Union[str, bytes]:
    """
    The path as Python's functions can take it in any locale: itself, or its bytes where it would be
    a UnicodeEncodeError.
    """
    given = os.fspath(path)
    raw = encode(given)
    try:
        os.fsencode(given)
    except UnicodeEncodeError:
        return raw
    return given
