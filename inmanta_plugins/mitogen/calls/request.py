"""One remote call: what is sent, what comes back, and what may be called at all."""

import functools
import inspect
import io
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import inmanta_mitogen.dispatch
import mitogen.core
from inmanta_plugins.mitogen import _mitogen
from inmanta_plugins.mitogen.errors import NotDeliveredError, RemoteException
from inmanta_plugins.mitogen.hosts.answers import UnreadableError, read_answer
from inmanta_plugins.mitogen.hosts.served import advice_for
from inmanta_plugins.mitogen.texts import bounded_text

# More than a message takes beyond the one request that it carries.
_AROUND_OTHERS = 1024
_LONGEST_REASON = 1_000


class Answer(Protocol):
    """What came back for a call: a message, or a part of one."""

    @property
    def data(self) -> bytes:
        """A pickle, or for one that is dead the reason."""

    @property
    def is_dead(self) -> bool:
        """Whether it says that there will be no answer."""


class AnswerAmongOthers(NamedTuple):
    """An answer that came in one message with those to other calls."""

    data: bytes
    is_dead: bool = False


class _ArgumentPickler(pickle.Pickler):
    """Refuses, while still on the agent, what a mitogen host refuses to unpickle."""

    _TRAVELS = (
        mitogen.core.Kwargs,
        mitogen.core.Blob,
        mitogen.core.Secret,
        mitogen.core.CallError,
        mitogen.core.Context,
        mitogen.core.Sender,
    )

    def reducer_override(self, obj: object) -> Any:
        # Asked for everything but exact builtin values, which always travel. Functions and
        # classes come here too: those that the reduction of one of the above names itself.
        if isinstance(obj, self._TRAVELS) or getattr(obj, "__module__", "") == "mitogen.core":
            return NotImplemented
        raise pickle.PicklingError(
            f"a {type(obj).__module__}.{type(obj).__qualname__} does not travel: send plain values"
            " (str, bytes, int, float, bool, None, and list, tuple, set or dict of these)"
        )


@functools.lru_cache(maxsize=1024)
def function_name(function: Callable[..., object]) -> str:
    """
    :param function: A function.
    :return: Its name as its users know it: the shortest that leads to it, so ``os.chmod`` for what
        calls itself ``posix.chmod``, ``len`` for ``builtins.len``.
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
def _location(function: Callable[..., object]) -> tuple[str, str]:
    """Where the host finds the function: its module, and its name there."""
    name = function_name(function)
    trouble = ""
    if not callable(function):
        raise TypeError(f"{function!r} cannot be called on a host: it is no function")
    if getattr(function, "__name__", "") == "<lambda>":
        trouble = "it is a lambda, which has no name to be found by"
    elif getattr(function, "__closure__", None) or "<locals>" in name:
        trouble = "it is defined within another function"
    elif inspect.ismethod(function) and not inspect.isclass(function.__self__):
        trouble = "it is bound to an object, which would have to travel with it"
    elif isinstance(function, functools.partial) or not hasattr(function, "__qualname__"):
        trouble = "it is an object that can be called, and has no name to be found by"
    elif not getattr(function, "__module__", None):
        trouble = "it belongs to no module"
    if trouble:
        raise TypeError(
            f"{name} cannot be called on a host: {trouble}. Define it at the top level of a module"
            " that needs nothing but the standard library, and pass what it needs as arguments."
        )
    return function.__module__, function.__qualname__


def request(
    function: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    max_size: int,
) -> mitogen.core.Message:
    """
    :param function: The function to call on the host.
    :param args: Its positional arguments.
    :param kwargs: Its keyword arguments.
    :param max_size: What a message may carry, in bytes.
    :return: The message that asks for the call.
    :raises TypeError: The function can't be found from a host, or an argument can't travel there.
    :raises ValueError: The arguments take more than `max_size`.
    """
    return _mitogen.call_message(_pickled(function, args, kwargs, max_size, _through_call))


def request_among_others(
    function: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    max_size: int,
) -> bytes:
    """
    :param function: As for :func:`request`.
    :param args: Likewise.
    :param kwargs: Likewise.
    :param max_size: Likewise.
    :return: One request of those that :func:`inmanta_mitogen.dispatch.call_each` takes.
    :raises TypeError: As :func:`request`.
    :raises ValueError: As :func:`request`.
    """
    return _pickled(function, args, kwargs, max_size - _AROUND_OTHERS, lambda call: call)


def _through_call(call: tuple[object, ...]) -> tuple[object, ...]:
    return _mitogen.call_arguments(inmanta_mitogen.dispatch.call, call)


def _pickled(
    function: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    max_size: int,
    around: Callable[[tuple[object, ...]], object],
) -> bytes:
    call = (*_location(function), tuple(args), dict(kwargs))
    try:
        data = _dumps(around(call))
    except Exception as error:
        raise _untransportable(function, args, kwargs, error) from None
    if len(data) > max_size:
        raise ValueError(
            f"the arguments of {function_name(function)} take {len(data)} bytes, and a"
            f" message carries at most {max_size}: move the content with Proxy.put or put_file, and"
            " pass its path"
        )
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
    for which, value in named:
        try:
            _dumps(value)
        except Exception as own_error:
            return TypeError(
                f"{which} of {function_name(function)} cannot be sent to the host: {own_error}"
            )
    return TypeError(f"the arguments of {function_name(function)} cannot be sent: {error}")


_COMMON_ANSWERS: dict[bytes, bool | None] = {
    pickle.dumps(value, inmanta_mitogen.dispatch.PICKLE_PROTOCOL): value
    for value in (None, True, False)
}
_COMMON_LENGTH = max(map(len, _COMMON_ANSWERS))


def result_of(function: Callable[..., object], answer: Answer) -> object:
    """
    :param function: The function that was called.
    :param answer: What came back for it.
    :return: The function's result.
    :raises RemoteException: The function raised, the connection was lost, or the answer can't be
        read.
    """
    if answer.is_dead:
        raise _lost(function, answer)
    if len(answer.data) <= _COMMON_LENGTH and answer.data in _COMMON_ANSWERS:
        return _COMMON_ANSWERS[answer.data]
    try:
        result = read_answer(answer.data)
    except UnreadableError as error:
        unreadable = ValueError(f"the answer to {function_name(function)} cannot be read: {error}")
        raise RemoteException(unreadable) from None
    if isinstance(result, mitogen.core.CallError):
        advice = advice_for(function, str(result))
        if advice:
            result.args = (f"{result}\n{advice}",)
        raise RemoteException(result)
    return result


def _lost(function: Callable[..., object], answer: Answer) -> RemoteException:
    told = answer.data[:_LONGEST_REASON].decode("utf-8", "replace")
    reason = bounded_text(told, _LONGEST_REASON) or "the host's interpreter is gone"
    if _mitogen.TOO_LARGE in reason:
        reason = (
            f"the result of {function_name(function)} is larger than a message may be ({reason}):"
            " return less, or write it to a file on the host and fetch that with"
            " Proxy.read_binary or get_file"
        )
        return RemoteException(mitogen.core.ChannelError(reason))
    name = function_name(function)
    if reason.startswith(_mitogen.NO_ROUTE):
        return NotDeliveredError(
            mitogen.core.ChannelError(f"the connection was lost before {name} was called")
        )
    return RemoteException(
        mitogen.core.ChannelError(
            f"the connection was lost while {name} was called; whether it ran is not known"
            f" ({reason})"
        )
    )
