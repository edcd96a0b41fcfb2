"""What this module needs of mitogen beyond its public names, each with the reason.

The only file that uses private names of mitogen or patches it, apart from ``hosts``, whose classes
override methods of mitogen's. Written for mitogen 0.3.45 to 0.3.54.
"""

import itertools
import linecache
import logging
import pickle
import threading
from collections.abc import Callable, Iterable
from typing import Any

import mitogen.core
import mitogen.master
import mitogen.parent
from inmanta_mitogen.dispatch import PICKLE_PROTOCOL

# The start of a dead message that never left the agent, or never reached the context.
NO_ROUTE = "no route to "


def broker_runs(router: mitogen.master.Router) -> bool:
    """Return whether a router's broker runs: mitogen ends it over an exception on its thread."""
    return bool(router.broker._alive)  # nothing public tells


def call_arguments(function: Callable[..., object], args: tuple[object, ...]) -> tuple[object, ...]:
    """Return what asks a host to call a function, in the form of ``CallChain.make_msg``."""
    # Chain, module, class, name, arguments. A plain dict for mitogen's Kwargs, which is for
    # Python 2: half the cost on both ends.
    return (None, function.__module__, None, function.__name__, args, {})


def call_message(pickled_arguments: bytes) -> mitogen.core.Message:
    """Return the message for pickled :func:`call_arguments`."""
    message = mitogen.core.Message
    return message(data=pickled_arguments, enc=message.ENC_PKL, handle=mitogen.core.CALL_FUNCTION)


def order(function: Callable[..., object], *args: object) -> mitogen.core.Message:
    """
    Return the message that has mitogen call a function of this module on a host.

    :param function: A function at the top level of a module.
    :param args: Its arguments: plain values.
    """
    return call_message(pickle.dumps(call_arguments(function, args), PICKLE_PROTOCOL))


def order_own(function: Callable[[], None]) -> mitogen.core.Message:
    """Return the message that has mitogen call a function of this file on a host."""
    return order(exec, source_for_host(function), {})


def source_for_host(function: Callable[[], None]) -> str:
    """
    Return what ``exec`` takes on a host to call a function of this file there.

    :param function: A function of Python 2 syntax, so that a host that is too old can say so.
    """
    # As inspect.getsource, which takes 5 ms to find the end that the indentation shows as well.
    lines = linecache.getlines(__file__, globals())[function.__code__.co_firstlineno - 1 :]
    body = itertools.takewhile(lambda line: line[0] in " \n", lines[1:])
    source = "".join([lines[0], *body]).replace(function.__doc__ or "", "")
    return f"{source}\n{function.__name__}()\n"


def prepare_host():  # type: () -> None
    """
    Prepare a host's importer and log. Runs on the host, first.

    What is called there must be the agent's own version of it, even where the host has one
    installed (mitogen's own overrides can't say that: they would also keep the host from importing
    anything else). And which submodules there are is for the agent to say each time: a list of
    them, made at first use, would name what others may have. A module that nobody has is a
    ModuleNotFoundError, as code with optional imports expects it, inmanta's own for one; mitogen's
    is a plain ImportError. At DEBUG, mitogen logs messages with their content, and so a Secret in
    it.
    """
    import logging
    import sys

    import mitogen.core

    if sys.version_info < (3, 6):  # noqa: UP036  # that is the question
        raise ImportError("too old")  # before it waits for modules

    class Anything(object):  # noqa: UP004  # of Python 2 too
        def __contains__(self, name):  # type: (str) -> bool
            return True

    anything = Anything()

    class Present(dict):  # type: ignore[type-arg]  # runs on Python 3.6
        def get(self, package, default=()):  # type: (str, object) -> object
            of_mitogen = package.split(".")[0] == "mitogen"
            return dict.get(self, package, default) if of_mitogen else anything

    def size_only(self):  # type: (Any) -> str
        return "Message({} bytes)".format(len(self.data))  # noqa: UP032  # of Python 2 too

    def create_module(spec):  # type: (Any) -> Any
        try:
            return type(importer).create_module(importer, spec)
        except ImportError as error:
            raise ModuleNotFoundError(str(error), name=spec.name)  # noqa: B904  # of Python 2 too

    mitogen.core.Message.__repr__ = size_only
    logging.getLogger("mitogen").addFilter(lambda record: "dispatching" not in str(record.msg))
    finders = [one for one in sys.meta_path if type(one).__module__ == "mitogen.core"]
    importer = finders[0]  # type: Any
    importer._present = Present(importer._present)
    importer.create_module = create_module
    importer.policy.overriden = lambda fullname: (
        fullname.split(".")[0] in ("inmanta_mitogen", "inmanta_plugins")
    )


def forget_ended(router=None):  # type: (Any) -> None
    """
    Let go of what mitogen (0.3.54 and before) keeps of the connections that ended.

    It keeps them until the router ends, and has no public way to make it forget them. Runs here, on
    the thread of the broker, and on the hosts that are hops.

    :param router: The router; None on a host, for the one of its interpreter.
    """
    import sys

    import mitogen.core

    if router is None:
        finders = [one for one in sys.meta_path if type(one).__module__ == "mitogen.core"]
        router = finders[0]._context.router  # type: ignore[attr-defined]  # mitogen's
        router.broker.defer(forget_ended, router)
        return
    with router._write_lock:
        for context_id, context in list(router._context_by_id.items()):
            known = context_id in router._stream_by_id or context_id in mitogen.parent_ids
            if not known and not router._handles_by_respondent.get(context):
                del router._context_by_id[context_id]
                router._handles_by_respondent.pop(context, None)
    for listener in list(mitogen.core._signals(router.broker, "shutdown")):
        reaper = getattr(listener, "__self__", None)  # type: Any
        if type(reaper).__name__ == "Reaper" and reaper.proc.poll() is not None:
            mitogen.core.unlisten(router.broker, "shutdown", listener)


def reset_after_fork() -> None:
    """Do in a forked child what mitogen does in its own: the descriptors are the parent's."""
    # Mitogen logs it, and another thread may have held the lock of a log's file: then the child,
    # which may be one that is to become ssh, would wait forever.
    before = logging.root.manager.disable
    logging.disable()
    mitogen.core.Latch._on_fork()
    mitogen.core.Side._on_fork()
    logging.disable(before)


def call_at_exit(function: Callable[[], object]) -> None:
    """Call a function when the interpreter ends, before Python waits for threads."""
    # Private to CPython, and the only hook that runs early enough; concurrent.futures uses it.
    threading._register_atexit(function)  # type: ignore[attr-defined]  # not in typeshed


def quiet_mitogen() -> None:
    """
    Keep mitogen's own DEBUG records out of a log that is at DEBUG as a whole.

    Inmanta's agents log at DEBUG, and mitogen would write one there for each read and write of
    each connection, and have each host do so too and send them. A level that is set for the logger
    ``mitogen`` is left as it is: that is how to get them.
    """
    logger = logging.getLogger("mitogen")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def _size_only(message: mitogen.core.Message) -> str:
    return (
        f"Message(src={message.src_id}:{message.reply_to} dst={message.dst_id}:{message.handle}"
        f" auth_id={message.auth_id} {len(message.data)} bytes)"
    )


# At DEBUG, mitogen logs messages with their content, and so a Secret in it.
mitogen.core.Message.__repr__ = _size_only


def _history_in_any_encoding(streams: Iterable[mitogen.core.Stream | None]) -> str:
    lines = [
        line
        for stream in streams
        if stream
        for line in getattr(stream.protocol, "logged_lines", ())
    ]
    return b"\n".join(line for _, line in sorted(lines)).decode("utf-8", "replace")


# Mitogen's own decodes it as UTF-8. What a host in another locale printed before it failed raises
# then on the broker's thread, and whoever waits for that connection waits forever.
_parent: Any = mitogen.parent
_parent.get_history = _history_in_any_encoding
