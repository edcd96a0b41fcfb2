"""
How this host knows files and arguments by name. Apart from what is done with them, as most calls
need no more: a host compiles each file at its first use.
"""

import os
from typing import Any, Callable, Union, cast

AnyPath = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]"]

# Of the functions of these modules, every text that is given or returned is a name.
_MODULES_OF_NAMES = ("posix", "os", "posixpath", "genericpath", "shutil")


def encode(value: AnyPath) -> bytes:
    """
    Return the bytes by which this host knows a name: by the locale's encoding, or by UTF-8 where
    that can't hold it, as in the C locale on Python 3.6.

    :param value: A path, or a program's argument. Lone surrogates from U+DC80 to U+DCFF stand for
        bytes that are no text, as :pep:`383` has it.
    :raises UnicodeEncodeError: It holds other lone surrogates.
    """
    try:
        return os.fsencode(value)
    except UnicodeEncodeError:
        # Bytes need no encoding, so it can only have been text that failed.
        return cast(str, os.fspath(value)).encode("utf-8", "surrogateescape")


def native(path: AnyPath) -> Union[str, bytes]:
    """
    Return the path as Python's functions can take it in any locale: itself, or the text that the
    locale's encoding turns into its bytes.
    """
    return path if isinstance(path, bytes) else os.fsdecode(encode(path))


def decode(raw: bytes) -> str:
    """
    Return the name that :func:`encode` turns into these bytes.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return os.fsdecode(raw)
    return text if encode(text) == raw else os.fsdecode(raw)


def with_any_name(function: Callable[..., Any]) -> Callable[..., Any]:
    """
    Return a function that takes and returns names that this host's locale can't encode, if the
    given one is Python's own and of files. UTF-8 can encode all names.
    """
    if getattr(function, "__module__", None) not in _MODULES_OF_NAMES:
        return function

    def known(value: Any) -> Any:
        return native(value) if isinstance(value, str) else value

    def call(*args: Any, **kwargs: Any) -> Any:
        named = {key: known(value) for key, value in kwargs.items()}
        result = function(*map(known, args), **named)
        return decode(os.fsencode(result)) if isinstance(result, str) else result

    return call
