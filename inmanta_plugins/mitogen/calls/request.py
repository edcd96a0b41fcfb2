"""The request of a remote call: what may be called, and what can be sent."""

import functools
import inspect
import io
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import inmanta_mitogen.dispatch
import mitogen.core
from inmanta_plugins.mitogen import _mitogen
from inmanta_plugins.mitogen.errors import UnsendableError

# More than a message takes beyond the one request that it carries, in bytes.
_AROUND = 1024


class _ArgumentPickler(pickle.Pickler):
    """Refuses, while still on the agent, what a mitogen host refuses to unpickle."""

    _SENDABLE = (
        mitogen.core.Kwargs,
        mitogen.core.Blob,
        mitogen.core.Secret,
        mitogen.core.CallError,
        mitogen.core.Context,
        mitogen.core.Sender,
    )

    def reducer_override(self, obj: object) -> Any:
        # Asked for everything but exact builtin values, which can always be sent. Functions and
        # classes come here too: those that the reduction of one of the above names itself.
        if isinstance(obj, self._SENDABLE) or getattr(obj, "__module__", "") == "mitogen.core":
            return NotImplemented
        raise pickle.PicklingError(
            f"a {type(obj).__module__}.{type(obj).__qualname__} cannot be sent: send plain values"
            " (str, bytes, int, float, bool, None, and list, tuple, set or dict of these)"
        )


@functools.lru_cache(maxsize=1024)
def function_name(function: Callable[..., object]) -> str:
    """
    Return a function's name as its users know it: the shortest that leads to it, so ``os.chmod``
    for what calls itself ``posix.chmod``, ``len`` for ``builtins.len``.
    """
    module = str(getattr(function, "__module__", None) or type(function).__module__)
    name = str(getattr(function, "__qualname__", None) or type(function).__qualname__)
    if module == "builtins":
        return name
    public = "os" if module in ("posix", "nt") else module.partition(".")[0]
    if getattr(sys.modules.get(public), name, None) is function:
        return f"{public}.{name}"
    return f"{module}.{name}"


@functools.lru_cache(maxsize=1024)
def _location(function: Any) -> tuple[str, str]:
    """Return where the host finds the function: its module, and its name there."""
    name = function_name(function)
    if not callable(function):
        raise UnsendableError(TypeError(f"{function!r} cannot be called: it is not a function"))
    found: Any = sys.modules.get(getattr(function, "__module__", None) or "")
    for part in getattr(function, "__qualname__", "?").split("."):
        found = getattr(found, part, None)
    trouble = "" if callable(found) else "it has no name by which it can be found in a module"
    if inspect.ismethod(function) and not inspect.isclass(function.__self__):
        trouble = f"it is bound to a {type(function.__self__).__name__}, which cannot be sent"
    if trouble:
        message = (
            f"{name} cannot be called on a host: {trouble}. Define it at the top level of a module"
            " that needs nothing but the standard library, and pass what it needs as arguments."
        )
        raise UnsendableError(TypeError(message))
    return function.__module__, function.__qualname__


def request(
    function: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    max_size: int,
    *,
    only_cheap: bool = False,
) -> bytes:
    """
    Return what mitogen is sent to have the host call :func:`inmanta_mitogen.dispatch.call`.

    :param function: The function.
    :param args: Its positional arguments.
    :param kwargs: Its keyword arguments.
    :param max_size: What a message may carry, in bytes.
    :param only_cheap: Whether a file is left alone that is not cheap to read.
    :raises UnsendableError: The host can't find the function, an argument cannot be sent, or they
        take more than `max_size`.
    """
    call = (*_location(function), tuple(args), dict(kwargs), only_cheap)
    try:
        data = _dumps(_mitogen.call_arguments(inmanta_mitogen.dispatch.call, call))
    except Exception as error:
        raise UnsendableError(_untransportable(function, args, kwargs, error)) from None
    if len(data) > max_size - _AROUND:
        message = (
            f"the arguments of {function_name(function)} take {len(data)} bytes, and a"
            f" message carries at most {max_size}: move the content with Proxy.put or put_file, and"
            " pass its path"
        )
        raise UnsendableError(ValueError(message))
    return data


def _dumps(value: object) -> bytes:
    buffer = io.BytesIO()
    _ArgumentPickler(buffer, inmanta_mitogen.dispatch.PICKLE_PROTOCOL).dump(value)
    return buffer.getvalue()


def _untransportable(
    function: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    error: Exception,
) -> TypeError:
    named = [(f"argument {number}", value) for number, value in enumerate(args, 1)]
    named += [(f"argument {name!r}", value) for name, value in kwargs.items()]
    text = f"of {function_name(function)} cannot be sent to the host"
    for which, value in named:
        try:
            _dumps(value)
        except Exception as own_error:
            return TypeError(f"{which} {text}: {own_error}")
    return TypeError(f"the arguments {text}: {error}")
