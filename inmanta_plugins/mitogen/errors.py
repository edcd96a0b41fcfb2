"""Every exception of the module.

Catch by cause: :class:`ContextError` for a context that is invalid,
:class:`ConnectError` and :class:`PythonNotFoundError` for a host that can't be reached or has no
Python where it was looked for, :class:`RemoteException` for a call that failed on the host or on
the way to it.

No text of an exception made here holds the value of a secret option.
"""

import enum
import errno
import re
from collections.abc import Mapping
from typing import TypeVar, cast

import mitogen.core
from inmanta_plugins.mitogen import settings
from inmanta_plugins.mitogen.texts import (
    address_of,
    bounded_text,
    describe_context,
    describe_hop,
    user_of,
)

README_NOTE = "See the README of the mitogen module, section 'Python on the host'."
SET_PYTHON_PATH = (
    "Set the python_path of the context, or the python_cmd of the host's std::OS, to an interpreter"
    " that is there, or to 'auto' for the best one that can be found."
)


class ContextError(ValueError):
    """
    A serialized context (or an environment variable that shapes contexts) has the wrong form.

    Raised before anything is started. The text names the hop, the key and what is allowed.
    """


class PythonNotFoundError(FileNotFoundError):
    """
    The host was reached, and has no Python interpreter at the context's ``python_path``.

    As an :class:`OSError`, it has ``errno`` ENOENT, ``filename`` (the first element of the
    ``python_path``) and ``strerror``.

    :param serialized_context: The serialized context of the hop that lacks the interpreter.
    :param found: What is there instead, as a phrase for people, e.g. ``"found on that host:
        /usr/bin/python3 (3.11.2)"``. Empty when it is not known.
    :param missing: The program that is missing, when that is not the first element of
        ``python_path`` (``python9`` of ``["/usr/bin/env", "python9"]``).
    """

    def __init__(
        self,
        serialized_context: Mapping[str, object],
        *,
        found: str = "",
        missing: str | None = None,
    ) -> None:
        self.hop = describe_hop(serialized_context)
        self.found = found = bounded_text(found, settings.LONGEST_DETAIL)
        program = first_of_python_path(serialized_context)
        self.missing = missing or program
        where = describe_context(serialized_context)
        super().__init__(errno.ENOENT, f"No such python interpreter on host {where}", program)
        self.add_note(README_NOTE)

    def __str__(self) -> str:
        what = f"{self.missing!r} is missing" if self.missing != self.filename else ""
        more = "; ".join(filter(None, (what, self.found)))
        return f"{super().__str__()}{f' ({more})' if more else ''}. {SET_PYTHON_PATH}"


def first_of_python_path(serialized_context: Mapping[str, object]) -> str:
    """
    Return the first element of the ``python_path`` of a context, ``"python"`` when that is unset.

    :param serialized_context: A serialized context.
    """
    python_path = serialized_context.get("python_path") or "python"
    return str(python_path[0] if isinstance(python_path, list | tuple) else python_path)


class Cause(enum.Enum):
    """Why a connection could not be made; the value is the advice for whoever reads the log."""

    REFUSED = "Check that an ssh server listens at that address and port."
    UNREACHABLE = "Check the network, the routes and the firewalls between the agent and the host."
    UNKNOWN_HOST = "Check the spelling of the host name and the name resolution of the agent."
    HOST_KEY = (
        "Verify the host's key with its owner, then put it in the known_hosts of the agent's user,"
        " or remove the outdated one there."
    )
    AUTHENTICATION = (
        "Check the user name, and that the host accepts a key of the agent's user (identity_file)"
        " or the password of the context."
    )
    PASSWORD_REQUIRED = (
        "Set the password of the context, or allow the user to do this without a password."  # noqa: S105
    )
    EXPIRED = "Renew the user's password or account on that host."
    PASSWORD_WRONG = "Correct the password of the context."  # noqa: S105  # advice
    NOT_ALLOWED = "Check what the host allows the user to run (sudoers, doas.conf)."
    UNKNOWN_USER = "Check the username of the context: the host does not know that user."
    TIMEOUT = "Check that the host answers; raise connect_timeout (seconds) when it is only slow."
    PROGRAM_MISSING = "Install the program on the machine that runs it, or set its path."
    NO_CONTAINER = "Check the container's name, and that it runs."
    HOP_LOST = "The host before this one was lost while connecting: try again once it is back."
    PYTHON_TOO_OLD = "Install a newer Python on the host, or point python_path to one."
    PYTHON_FAILED = "Run that interpreter by hand on the host to see what is wrong with it."
    PYTHON_DENIED = "Give the user the right to execute the interpreter, or choose another one."
    NO_ROOM = "Free memory, processes, file descriptors or pseudo-terminals on that machine."
    OTHER = "Read what came back; run the same command by hand from the agent to see it live."


class ConnectError(mitogen.core.StreamError):  # type: ignore[misc]  # mitogen is not typed
    """
    A hop of a context could not be connected.

    :param serialized_context: The serialized context of the hop that failed.
    :param cause: Why, as far as it is known; ``cause.value`` is one sentence of advice.
    :param detail: What came back.
    """

    def __init__(self, serialized_context: Mapping[str, object], cause: Cause, detail: str) -> None:
        self.hop = describe_hop(serialized_context)
        """The hop that failed, as people know it: its name and address."""
        self.where = describe_context(serialized_context)
        """The hop and each one before it."""
        self.method = str(serialized_context["method_name"])
        """Its connection method: ``ssh``, ``sudo``, …"""
        self.address = address_of(serialized_context)
        """Where it is: host name and port, container, pod; empty for a method that stays on its
        machine."""
        self.user = user_of(serialized_context)
        """The user asked for, None where the context names none."""
        self.cause = cause
        self.detail = detail = bounded_text(detail, settings.LONGEST_DETAIL)
        # Not through mitogen's own Error.__init__, which takes '%' in a text for a format.
        Exception.__init__(
            self, f"Cannot connect to {self.where}: {detail.rstrip()}\n{cause.value}"
        )

    def __reduce__(self) -> tuple[object, ...]:
        # Without the context, which may hold a password.
        return (_unpickled, (type(self).__bases__[-1], self.args), vars(self))


def _unpickled(base: type[Exception], args: tuple[object, ...]) -> Exception:
    kind = combined(ConnectError, base)
    return kind.__new__(kind, *args)


E = TypeVar("E", bound=Exception)


def combined(ours: type[E], other: type[Exception]) -> type[E]:
    """
    Return an exception class that both ``except`` clauses catch.

    :param ours: A class of this module; the result is made and looks like it.
    :param other: The class of the exception in whose place it is raised, such as
        ``mitogen.sudo.PasswordError``.
    """
    if issubclass(ours, other):
        return ours
    return cast(type[E], type(ours.__name__, (ours, other), {"__module__": ours.__module__}))


class RemoteException(Exception):  # noqa: N818  # the published name
    """
    A remote call failed: on the host, or on the way to it.

    :param remote_exception: What was raised. For an exception of the called function this is
        mitogen's ``CallError``, whose text holds the type, the message and the host's traceback.
    :param args: Replaces the text of `remote_exception` as the arguments (so the text) of this one.
    """

    def __init__(self, remote_exception: Exception, *args: object) -> None:
        super().__init__(*(args or (str(remote_exception),)))
        self.remote_exception = remote_exception

    @property
    def remote_type(self) -> str | None:
        """
        The qualified name of the exception's type on the host, such as
        ``builtins.FileNotFoundError``; None when the call did not fail on the host.
        """
        if not isinstance(self.remote_exception, mitogen.core.CallError):
            return None
        match = re.match(r"[\w.]+", str(self.remote_exception))
        return match.group() if match else None

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.remote_exception, *self.args))


class NotDeliveredError(RemoteException):
    """The call certainly never reached the host's interpreter: it may be made again."""


class UnsendableError(RemoteException, TypeError, ValueError):
    """
    A call can't be sent: a host can't find the function, or an argument is not a plain value or is
    too large. Nothing was sent.
    """


class CallTimeoutError(RemoteException, TimeoutError):
    """
    A remote call took longer than the ``call_timeout`` of its proxy.

    Whether the function ran, or still runs, is not known: its interpreter is terminated. The
    next call gets a new one.
    """
