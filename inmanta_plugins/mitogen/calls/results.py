"""The result of a remote call, or the exception it raises, from what the host answered."""

import re

import inmanta_mitogen.dispatch
import mitogen.core
from inmanta_plugins.mitogen import _mitogen, settings
from inmanta_plugins.mitogen.calls.request import function_name
from inmanta_plugins.mitogen.connections.connection import Answer, Function
from inmanta_plugins.mitogen.errors import NotDeliveredError, RemoteException
from inmanta_plugins.mitogen.hosts.answers import UnreadableError, read_answer
from inmanta_plugins.mitogen.hosts.modules import PLUGINS
from inmanta_plugins.mitogen.texts import bounded_text

# A frame of mitogen, which hosts get on their standard input, or of this module, in a traceback.
_OWN_FRAME = re.compile(
    r'^  File "(?:<stdin>|master:(?:inmanta_)?mitogen/[^"\n]*)", line \d+, in .*\n(?:    .*\n)*',
    re.MULTILINE,
)


def result_of(function: Function, answer: Answer) -> object:
    """
    Return the result of a function.

    :param function: The function that was called.
    :param answer: What came back for it.
    :raises RemoteException: The function raised, the connection was lost, or the answer can't be
        read.
    """
    if answer.is_dead:
        raise _unanswered(function, answer.data)
    data = answer.data
    if data[:1] == inmanta_mitogen.dispatch.RAW:
        return data[1:]
    if data[:1] == inmanta_mitogen.dispatch.UNSENDABLE:
        raise _no_result(data[1:].decode("utf-8", "replace"))
    try:
        result = read_answer(data)
    except UnreadableError as error:
        raise _no_result(
            f"the answer to {function_name(function)} cannot be read: {error}"
        ) from None
    if isinstance(result, mitogen.core.CallError):
        raise _failed(function, result)
    return result


def nonsense(function: Function, what: str) -> RemoteException:
    """
    Return the error to raise when a host does not keep to the protocol.

    :param function: The function that was called.
    :param what: What the host did.
    """
    name = function_name(function)
    return RemoteException(ValueError(f"the host's part in {name} cannot be right: {what}"))


def _no_result(reason: str) -> RemoteException:
    return RemoteException(mitogen.core.ChannelError(bounded_text(reason, settings.LONGEST_REASON)))


def _failed(function: Function, error: mitogen.core.CallError) -> RemoteException:
    text = _OWN_FRAME.sub("", str(error)).rstrip("\n")
    error.args = (text,)
    advice = _advice(function, text)
    return RemoteException(error, f"{text}\n{advice}") if advice else RemoteException(error)


def _advice(function: Function, text: str) -> str:
    """Return what to do about a function that the host can't import; empty for other failures."""
    move = "Move the function to a file that imports only what hosts have or get."
    if text.startswith("builtins.SyntaxError: "):
        return (
            "The Python on the host does not know a syntax in the file of"
            f" {function_name(function)}, or in one that it imports: write that for this Python, or"
            " set python_path to a newer one."
        )
    if re.search(r"(unable to serve|No module named) '(inmanta|inmanta\.[\w.]+)'", text):
        return (
            "Its file, or one that this imports, imports inmanta, which the host's Python does not"
            f" have. {move} Or set python_path to a Python that has inmanta."
        )
    if missing := re.search(r"unable to serve '([\w.]{1,200})'", text):
        return (
            f"The host's Python does not have the module {missing[1]}, and the agent does not send"
            " it: it is compiled, not installed on the agent, or imported by a computed name."
            " Install it on the host, or name it in inmanta_plugins.mitogen.allow_modules."
        )
    if f"has no attribute '{function.__qualname__.split('.')[0]}'" not in text:
        return ""
    if function.__module__ == "__main__":
        return f"Hosts don't get the program that was started, which defines it. {move}"
    if function.__module__.split(".")[0] == PLUGINS:
        return (
            f"The __init__.py of {function.__module__} is empty on hosts whose Python does not have"
            f" inmanta. {move}"
        )
    return ""


def _unanswered(function: Function, data: bytes) -> RemoteException:
    told = data[: settings.LONGEST_REASON].decode("utf-8", "replace")
    reason = bounded_text(told, settings.LONGEST_REASON) or "the host's interpreter is gone"
    if reason.startswith(_mitogen.NO_ROUTE):
        text = f"the connection was lost before {function_name(function)} was called"
        return NotDeliveredError(mitogen.core.ChannelError(text))
    return lost(function, reason)


def lost(function: Function, reason: str) -> RemoteException:
    """
    Return the error to raise when the connection was lost during a call.

    :param function: The function that was called.
    :param reason: Why.
    """
    text = (
        f"the connection was lost while {function_name(function)} was called; whether it ran is not"
        f" known ({reason})"
    )
    return RemoteException(mitogen.core.ChannelError(text))
