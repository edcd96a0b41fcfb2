"""Runs on the host what the agent calls, and sees to it that the answer can travel back."""

import pickle
from typing import Any, Dict, Tuple

import mitogen.core

# Python 3.6 reads and writes it, and it carries bytes as they are.
PICKLE_PROTOCOL = 4


@mitogen.core.takes_econtext  # type: ignore[untyped-decorator]  # mitogen is not typed
def call(
    module: str, qualname: str, args: Tuple[Any, ...], kwargs: Dict[str, Any], econtext: Any
) -> mitogen.core.Message:
    """
    Call a function of an importable module.

    :param module: The module's full name.
    :param qualname: The function's name in it, with dots for one that a class holds.
    :param args: Its positional arguments.
    :param kwargs: Its keyword arguments.
    :param econtext: mitogen's description of this interpreter, which mitogen passes.
    :return: The result as a message: mitogen itself would end the interpreter over one that it
        can't pickle.
    :raises TypeError: The result can't be pickled.
    :raises ValueError: The result is larger than one message may be.
    """
    function = mitogen.core.import_module(module)  # type: Any
    for name in qualname.split("."):
        function = getattr(function, name)
    result = function(*args, **_with_context_arguments(function, kwargs, econtext))
    try:
        data = pickle.dumps(result, protocol=PICKLE_PROTOCOL)
    except Exception as error:
        raise TypeError(
            f"the result of {module}.{qualname}, a {type(result).__name__}, cannot be sent to the"
            f" agent ({type(error).__name__}: {error}): return plain values"
        ) from error
    limit = econtext.router.max_message_size
    if len(data) > limit:
        raise ValueError(
            f"the result of {module}.{qualname} takes {len(data)} bytes, and a message carries at"
            f" most {limit}: return less, or write it to a file on the host and fetch that with"
            " Proxy.read_binary or get_file"
        )
    return mitogen.core.Message(data=data, enc=mitogen.core.Message.ENC_PKL)


def _with_context_arguments(function: Any, kwargs: Dict[str, Any], econtext: Any) -> Dict[str, Any]:
    # As mitogen's own dispatcher does it for what it calls.
    if getattr(function, "mitogen_takes_econtext", None):
        kwargs.setdefault("econtext", econtext)
    if getattr(function, "mitogen_takes_router", None):
        kwargs.setdefault("router", econtext.router)
    return kwargs


@mitogen.core.takes_econtext  # type: ignore[untyped-decorator]  # mitogen is not typed
def cut(context_id: int, econtext: Any) -> None:
    """
    End the connection to an interpreter that was started from this one.

    :param context_id: Its mitogen context id.
    :param econtext: mitogen's description of this interpreter, which mitogen passes.
    """
    stream = econtext.router.stream_by_id(context_id)
    if stream is not None and stream.protocol.remote_id == context_id:
        econtext.broker.defer(stream.on_disconnect, econtext.broker)
