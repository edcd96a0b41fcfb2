"""A host as a handler sees it: a connection that runs functions there."""

import concurrent.futures
import functools
import os
import queue
import shutil
import threading
import time
import types
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, Self, TypedDict, TypeVar, cast

import inmanta.agent.handler

import inmanta_mitogen
import inmanta_mitogen.chunks
import inmanta_mitogen.dispatch
import mitogen.core
import mitogen.parent
from inmanta_mitogen.staged import StagedWrite, as_bytes
from inmanta_plugins.mitogen import settings
from inmanta_plugins.mitogen.calls import request as calls
from inmanta_plugins.mitogen.calls import transfers as transfer
from inmanta_plugins.mitogen.calls.log import truncate_logged_value, truncate_logged_values
from inmanta_plugins.mitogen.calls.pending import PendingCalls, SentAgainError
from inmanta_plugins.mitogen.connections.hub import (
    Connection,
    ForkAware,
    hub,
    watch_forks,
)
from inmanta_plugins.mitogen.errors import (
    CallTimeoutError,
    ConnectError,
    NotDeliveredError,
    PythonNotFoundError,
    RemoteException,
)
from inmanta_plugins.mitogen.texts import describe_context

P = ParamSpec("P")
T = TypeVar("T")

Inbox = queue.SimpleQueue[mitogen.core.Message]

LOGGER = settings.LOGGER


class FileStat(TypedDict):
    """Who owns a file and what they may do with it."""

    owner: str
    """The name of the user, or the number as text where the host has no name for it."""
    group: str
    """The name of the group, or the number as text where the host has no name for it."""
    permissions: int
    """The digits of the octal mode, read as decimal: 644 for ``0o644``, 4755 for ``0o4755``."""


def _name_of(serialized_context: object) -> str:
    """What a context goes by in logs: its name, or where it is. It may not be checked yet."""
    if not isinstance(serialized_context, Mapping):
        return f"a {type(serialized_context).__name__} in the place of a context"
    return str(serialized_context.get("name") or describe_context(serialized_context))


class _Call:
    """One remote call under way: what was asked, since when, and where the answer will come."""

    def __init__(
        self,
        function: Callable[..., object],
        args: tuple[object, ...],
        kwargs: dict[str, object],
        call_timeout: float | None,
    ) -> None:
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.started = time.monotonic()
        self.deadline: float | None = None
        self.call_timeout = call_timeout
        self.connection: Connection | None = None
        self.was_sent_again = False
        self._shown: tuple[list[object], dict[str, object]] | None = None

    def start_clock(self) -> None:
        """
        Let its time run. Not before there is a connection: connecting again has a limit of its own,
        and a `call_timeout` below what that takes would never let a call through.
        """
        if self.call_timeout is not None:
            self.deadline = time.monotonic() + self.call_timeout

    @property
    def shown(self) -> tuple[list[object], dict[str, object]]:
        """What the log shows of its arguments."""
        if self._shown is None:
            shown = truncate_logged_values((*self.args, *self.kwargs.values()))
            positional = len(self.args)
            self._shown = (
                shown[:positional],
                dict(zip(self.kwargs, shown[positional:], strict=True)),
            )
        return self._shown

    @property
    def patience(self) -> float:
        """The seconds to wait before the deadline, or the connection, is looked at."""
        if self.deadline is None:
            return settings.SECONDS_BETWEEN_CHECKS
        return min(settings.SECONDS_BETWEEN_CHECKS, max(0.0, self.deadline - time.monotonic()))

    @property
    def overdue(self) -> bool:
        """Whether it took longer than it may."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    @property
    def lost(self) -> bool:
        """Whether no answer can come any more."""
        return self.connection is not None and self.connection.ended


class Proxy(ForkAware):
    """
    Runs functions in the Python of a host, and logs each call.

    A proxy may be used by several threads; its host runs one call at a time. When the connection
    is lost between calls (the host rebooted, a hop was killed), the next call connects again
    first. A call that may have reached the host is never repeated by itself.

    :param serialized_context: Where to: what :func:`serialize_context` makes of a context.
    :param logger: Gets one DEBUG record for each remote call; by default the logger
        ``inmanta_plugins.mitogen``. The attribute of the same name may be set at any time: handlers
        set it to the context of the resource at hand.
    :param call_timeout: The seconds a remote call may take, from when it is sent: beyond it the
        call raises :class:`CallTimeoutError` and its interpreter is given up. Calls of other
        threads that the host runs first count; connecting again does not, which the context's
        ``connect_timeout`` limits. None, the default, takes the
        environment variable INMANTA_MITOGEN_CALL_TIMEOUT; without that too there is no limit.
    :raises ValueError: `call_timeout`, or the variable, is no number of seconds above 0.
    """

    def __init__(
        self,
        serialized_context: dict[str, object],
        *,
        logger: inmanta.agent.handler.LoggerABC | None = None,
        call_timeout: float | None = None,
    ) -> None:
        self.serialized_context = serialized_context
        self.logger: inmanta.agent.handler.LoggerABC = logger or inmanta.agent.handler.PythonLogger(
            LOGGER
        )
        self.call_timeout = (
            settings.call_timeout()
            if call_timeout is None
            else settings.checked_call_timeout(call_timeout)
        )
        self._name = _name_of(serialized_context)
        self._connection: Connection | None = None
        self._new_locks()
        watch_forks(self)

    def __repr__(self) -> str:
        state = "open" if self._connection is not None else "closed"
        return f"<{type(self).__name__} {self._name} {state}>"

    def _new_locks(self) -> None:
        self._lock = threading.RLock()
        self._revivals = 0
        # The last attempt to reconnect that failed, with when it ended.
        self._not_revived: tuple[float, Exception] | None = None
        self._pending = PendingCalls[_Call](self._settle)

    def after_fork_in_child(self) -> None:
        """Forget the locks of the parent process; the next call connects for this one."""
        self._new_locks()

    # The connection

    @property
    def context(self) -> mitogen.parent.Context:
        """
        The mitogen context of the open connection.

        :raises RuntimeError: The proxy is not connected.
        """
        return self._opened().link.context

    def _opened(self) -> Connection:
        connection = self._connection
        if connection is None:
            raise RuntimeError(
                f"The proxy for {self._name} is not connected: call connect() first, or use it as a"
                " context manager."
            )
        return connection

    def connect(self, *, exists_ok: bool = False) -> mitogen.parent.Context:
        """
        Open the connection.

        :param exists_ok: Accept that it is open already, and leave it as it is.
        :return: The mitogen context of the connection.
        :raises RuntimeError: It is open already and `exists_ok` is false.
        :raises ContextError: The serialized context has the wrong form; a :class:`ValueError`.
        :raises PythonNotFoundError: A hop has no Python at its ``python_path``.
        :raises ConnectError: A hop could not be connected; a mitogen ``StreamError``.
        """
        with self._lock:
            if self._connection is not None:
                if not exists_ok:
                    raise RuntimeError(
                        f"The proxy for {self._name} is connected already: pass exists_ok=True to"
                        " share the connection, or use the context attribute."
                    )
                return self._connection.link.context
            self.logger.debug("Connecting to %(context_name)s", context_name=self._name)
            self._connection = hub().open(self.serialized_context)
            return self._connection.link.context

    def disconnect(self, *, timeout: float = 10.0, best_effort: bool = False) -> None:
        """
        Close the connection; does nothing when it is closed.

        Afterwards nothing of it is left on this side, even when an exception is raised.

        :param timeout: How long the host may take to end its interpreter, in seconds.
        :param best_effort: Accept that it doesn't in time.
        :raises TimeoutError: The host did not end it in time, and `best_effort` is false.
        """
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is None:
            return
        self.logger.debug("Disconnecting from %(context_name)s", context_name=self._name)
        if not connection.close(timeout) and not best_effort:
            raise TimeoutError(
                f"{self._name} did not end its interpreter within {timeout} seconds; the"
                " connection has been cut."
            )

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        # An exception under way says more than a slow goodbye.
        self.disconnect(best_effort=exc_type is not None)

    def _living(self, since: float) -> Connection:
        """
        The open connection, made anew when it was lost.

        :param since: When the call began that needs it. Those that began before an attempt to
            connect again failed share its failure: they do not each wait for a dead host in turn.
        """
        connection = self._opened()
        if connection.alive:
            return connection
        with self._lock:
            connection = self._opened()
            if connection.alive:
                return connection
            if self._not_revived is not None and since < self._not_revived[0]:
                raise RemoteException(self._not_revived[1])
            self._revivals += 1
            self.logger.debug(
                "The connection to %(context_name)s was lost, connecting again",
                context_name=self._name,
            )
            try:
                self._connection = hub().open(self.serialized_context)
            except (ConnectError, PythonNotFoundError) as error:
                self._not_revived = (time.monotonic(), error)
                raise RemoteException(error) from error
            self._not_revived = None
            connection.close(0.0)
            return self._connection

    # Calls

    def remote_call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """
        Call a function in the Python of the host.

        :param function: A function at the top level of a module (or a static or class method there)
            that the host can import: from its standard library, or from the agent, for a module
            that needs nothing but the standard library.
        :param args: Positional arguments: None, str, bytes, int, float, bool, and list, tuple, set
            and dict of these.
        :param kwargs: Keyword arguments, likewise.
        :return: The result; it may hold the same types.
        :raises RuntimeError: The proxy is not connected.
        :raises TypeError: The function can't be found from a host, or an argument can't travel.
        :raises ValueError: The arguments take more than a message may carry (128 MiB).
        :raises RemoteException: The function raised, the host was lost or can't be reached again.
        :raises CallTimeoutError: The call took longer than `call_timeout`.
        """
        call = _Call(function, args, kwargs, self.call_timeout)
        return cast(T, self._carry_out(call, self._ask))

    def submit(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> concurrent.futures.Future[T]:
        """
        Call a function in the Python of the host as :meth:`remote_call` does, and don't wait for
        its end: over a slow link many calls then take hardly longer than one. The host runs them
        one after another, in the order in which they were submitted. All of them, and their
        results, are held in memory.

        Connecting again, where the connection was lost before, is waited for. Callbacks of the
        future run in a thread that finishes all the calls of this proxy: they must not wait for
        another of them.

        :param function: As for :meth:`remote_call`.
        :param args: Positional arguments, likewise.
        :param kwargs: Keyword arguments, likewise.
        :return: The future result. Its ``result()`` raises what :meth:`remote_call` would, wrong
            arguments and a proxy that is not connected included. It can't be cancelled. The time
            that `call_timeout` gives it runs from now on, so it includes that of the calls before
            it.
        """
        call = _Call(function, args, kwargs, self.call_timeout)
        return self._pending.send(call, self._send_soon)

    def _send_soon(self, call: _Call) -> None:
        try:
            connection = call.connection = self._living(call.started)
            request = calls.request_among_others(
                call.function, call.args, call.kwargs, connection.link.router.max_message_size
            )
            call.start_clock()
            self._pending.send_soon(connection, call.function, request, call)
        except RemoteException as error:
            self._log(call, exception=error)
            raise

    def _settle(self, call: _Call, answer: calls.Answer | None) -> object:
        """The result of a submitted call; no answer means that it took too long."""
        try:
            if answer is None:
                raise self._give_up(call)
            result = calls.result_of(call.function, answer)
        except RemoteException as error:
            if isinstance(error, NotDeliveredError) and not call.was_sent_again:
                call.was_sent_again = True
                self._send_soon(call)
                raise SentAgainError from None
            self._log(call, exception=error)
            raise
        self._log(call, result=result)
        return result

    def _carry_out(self, call: _Call, attempt: Callable[[_Call], T]) -> T:
        """Make a call, once more when it certainly never reached the host, and log it."""
        try:
            try:
                result = attempt(call)
            except NotDeliveredError:
                # The connection had ended, unseen until now: this is its revival.
                result = attempt(call)
        except Exception as error:
            if call.connection is not None or isinstance(error, RemoteException):
                self._log(call, exception=error)
            raise
        self._log(call, result=result)
        return result

    def _ask(self, call: _Call) -> object:
        connection = self._living(call.started)
        message = calls.request(
            call.function, call.args, call.kwargs, connection.link.router.max_message_size
        )
        inbox: Inbox = queue.SimpleQueue()
        call.connection = connection
        call.start_clock()
        connection.send(call.function, message, inbox.put)
        _ = call.shown  # while the host is busy anyway
        return calls.result_of(call.function, self._receive(call, inbox))

    def _receive(self, call: _Call, inbox: Inbox) -> mitogen.core.Message:
        """The next message that comes for a call."""
        while True:
            try:
                return inbox.get(timeout=call.patience)
            except queue.Empty:
                if call.overdue:
                    raise self._give_up(call) from None
                if call.lost and inbox.empty():
                    return mitogen.core.Message.dead("the connection has ended")

    def _give_up(self, call: _Call) -> CallTimeoutError:
        """Part from an interpreter that doesn't answer; the next call gets a new one."""
        if call.connection is not None:
            call.connection.link.end(settings.LEAVE_TIMEOUT)
        return CallTimeoutError(
            TimeoutError(
                f"{calls.function_name(call.function)} did not end on {self._name} within"
                f" {call.call_timeout} seconds (call_timeout); its interpreter has been given"
                " up, whether it ran to its end is not known"
            )
        )

    def _transfer(
        self,
        move: Callable[[transfer.Exchange], T],
        function: Callable[..., object],
        *args: object,
        **kwargs: object,
    ) -> T:
        """A call whose content moves in chunks; logged as one of the function."""
        call = _Call(function, args, kwargs, self.call_timeout)
        return self._carry_out(call, functools.partial(self._move, move))

    def _move(self, move: Callable[[transfer.Exchange], T], call: _Call) -> T:
        call.connection = self._living(call.started)
        call.start_clock()
        inbox: Inbox = queue.SimpleQueue()
        wait = functools.partial(self._receive, call, inbox)
        with transfer.Exchange(call.connection, call.function, inbox, wait) as exchange:
            return move(exchange)

    def _log(self, call: _Call, **outcome: object) -> None:
        ((key, value),) = outcome.items()
        args, kwargs = call.shown
        shown: Any = truncate_logged_value(str(value) if key == "exception" else value)
        self.logger.debug(
            f"Calling function %(function)s in context %(context_name)s: %({key})s",
            function=calls.function_name(call.function),
            context_name=self._name,
            args=args,
            kwargs=kwargs,
            duration=round(time.monotonic() - call.started, 6),
            **{key: shown},
        )

    # Files and commands

    def chmod(self, path: str, permissions: str) -> None:
        """
        Set the mode of a file or directory.

        :param path: Its path; a symlink is followed.
        :param permissions: The mode in octal, e.g. ``"644"`` or ``"4755"``.
        :raises ValueError: `permissions` is no octal number.
        :raises RemoteException: The host could not do it.
        """
        self.remote_call(os.chmod, path, int(permissions, 8))

    def chown(
        self, path: str, user: str | int | None = None, group: str | int | None = None
    ) -> None:
        """
        Set the owner of a file or directory.

        :param path: Its path; a symlink is followed.
        :param user: A name or number; None leaves it as it is.
        :param group: A name or number; None leaves it as it is.
        :raises RemoteException: The host could not do it, or both are None.
        """
        # Typeshed has an overload for each combination of names and numbers.
        self.remote_call(cast(Callable[..., None], shutil.chown), path, user, group)

    def file_exists(self, path: str) -> bool:
        """
        :param path: A path.
        :return: Whether anything is there: a symlink counts, even one that leads nowhere.
        :raises RemoteException: The host could not be asked.
        """
        return self.remote_call(inmanta_mitogen.lexists, path)

    def file_stat(self, path: str) -> FileStat:
        """
        :param path: The path of a file or directory; a symlink is followed.
        :return: Its owner, group and permissions.
        :raises RemoteException: Nothing is there, or the host could not be asked.
        """
        return cast(FileStat, self.remote_call(inmanta_mitogen.file_stat, path))

    def hash_file(self, path: str) -> str:
        """
        :param path: The path of a file; a symlink is followed.
        :return: The sha1 of its content, in hexadecimal.
        :raises RemoteException: It can't be read.
        """
        return self.remote_call(inmanta_mitogen.hash_file, path)

    def is_symlink(self, path: str) -> bool:
        """
        :param path: A path.
        :return: Whether a symlink is there.
        :raises RemoteException: The host could not be asked.
        """
        return self.remote_call(inmanta_mitogen.islink, path)

    def mkdir(self, path: str) -> None:
        """
        Make a directory.

        :param path: Its path; the parent directory must exist.
        :raises RemoteException: The host could not do it.
        """
        self.remote_call(os.mkdir, path)

    def put(self, path: str, content: bytes) -> None:
        """
        Write a file: see :func:`inmanta_mitogen.put` for what is kept and what is promised.

        :param path: Its path; a symlink is followed, and stays.
        :param content: All of its content, of any size.
        :raises RemoteException: The host could not do it; the old content is untouched.
        """
        if len(content) <= inmanta_mitogen.chunks.SMALL:
            self.remote_call(inmanta_mitogen.put, path, content)
            return
        view = as_bytes(content)
        self._transfer(
            lambda exchange: transfer.upload(exchange, path, len(view), transfer.slices(view)),
            inmanta_mitogen.put,
            path,
            content,
        )

    def put_file(
        self,
        local_path: str | os.PathLike[str],
        path: str,
        *,
        progress: transfer.Progress | None = None,
    ) -> None:
        """
        Copy a file of the agent to the host, with what :meth:`put` keeps and promises, and in
        little memory on both ends whatever its size.

        :param local_path: The path of a regular file on the agent.
        :param path: Its path on the host; a symlink is followed, and stays.
        :param progress: Called in this thread with the bytes that were sent so far, and those in
            all: after each chunk, the last time before the old content is replaced.
        :raises OSError: The local file can't be read, is no regular file, or was changed while it
            was read. The old content on the host is untouched. So it is after whatever `progress`
            raises.
        :raises RemoteException: The host could not do it, or the sha1 of what it received differs;
            the old content is untouched.
        """
        with transfer.LocalFile(local_path) as file:
            self._transfer(
                lambda exchange: transfer.send_file(exchange, file, path, progress),
                inmanta_mitogen.put,
                path,
                file.described(),
            )

    def read(self, path: str, *, max_size: int | None = None) -> str:
        """
        :param path: The path of a file with UTF-8 text.
        :param max_size: The most bytes to accept. By default what the environment variable
            INMANTA_MITOGEN_MAX_SIZE says, 1 GiB if it says nothing. A file without end, such as
            ``/dev/zero``, takes that much memory before it is refused.
        :return: The text.
        :raises RemoteException: It can't be read, is no UTF-8, or is larger than that.
        """
        limit = settings.max_size() if max_size is None else max_size
        return self._transfer(
            lambda exchange: transfer.read_text(exchange, path, limit), inmanta_mitogen.read, path
        )

    def read_binary(self, path: str, *, max_size: int | None = None) -> bytes:
        """
        :param path: The path of a file.
        :param max_size: The most bytes to accept, as for :meth:`read`.
        :return: Its content.
        :raises RemoteException: It can't be read, or is larger than that.
        """
        limit = settings.max_size() if max_size is None else max_size
        return self._transfer(
            lambda exchange: transfer.read(exchange, path, limit),
            inmanta_mitogen.read_binary,
            path,
        )

    def get_file(
        self,
        path: str,
        local_path: str | os.PathLike[str],
        *,
        progress: transfer.Progress | None = None,
        max_size: int | None = None,
    ) -> None:
        """
        Copy a file of the host to the agent, in little memory on both ends whatever its size. What
        :meth:`put` keeps and promises for the host's file holds for the agent's here.

        :param path: The path of a regular file on the host; a symlink is followed.
        :param local_path: Its path on the agent; a symlink is followed, and stays.
        :param progress: Called in this thread with the bytes that were received so far, and those
            in all: after each chunk, the last time before the old content is replaced.
        :param max_size: The most bytes to accept, by default any number.
        :raises OSError: The local file can't be written. Its old content is untouched. So it is
            after whatever `progress` raises.
        :raises RemoteException: The host's file can't be read, is no regular file, was changed
            while it was read, or is larger than `max_size`, or the sha1 of what arrived differs.
            The local file is untouched.
        """
        with StagedWrite(os.fspath(local_path)) as staged:
            self._transfer(
                lambda exchange: transfer.fetch(exchange, path, staged, max_size, progress),
                inmanta_mitogen.read_binary,
                path,
            )
            staged.commit()

    def readlink(self, path: str) -> str:
        """
        :param path: The path of a symlink.
        :return: What it points to, as it is written there.
        :raises RemoteException: No symlink is there.
        """
        return self.remote_call(os.readlink, path)

    def remove(self, path: str) -> None:
        """
        Remove a file or symlink.

        :param path: Its path; no directory.
        :raises RemoteException: The host could not do it.
        """
        self.remote_call(os.remove, path)

    def rmdir(self, path: str) -> None:
        """
        Remove a directory with all that is in it.

        :param path: Its path; no symlink.
        :raises RemoteException: The host could not do it.
        """
        self.remote_call(cast(Callable[[str], None], shutil.rmtree), path)

    def run(
        self,
        command: str,
        arguments: list[str] = [],  # noqa: B006  # the published signature; never changed
        env: dict[str, str] | None = None,
        cwd: str | None = None,
        timeout: int | None = None,
        *,
        stdin: bytes | str | None = None,
        max_size: int | None = None,
    ) -> tuple[str, str, int]:
        """
        Run a command and wait for its end: see :func:`inmanta_mitogen.run`.

        :param command: The program; without a slash it is looked for on the PATH.
        :param arguments: Its arguments.
        :param env: Added to the environment. An inherited PYTHONPATH is dropped unless set here.
        :param cwd: The directory to run it in; None for that of the host's interpreter.
        :param timeout: The seconds it may take; then it is killed with all its children.
        :param stdin: What it reads from its standard input.
        :param max_size: The most bytes of output to accept, as for :meth:`read`; a command that
            prints more is killed with all its children.
        :return: What it wrote to standard output and standard error, both stripped of white space
            at the ends, and its exit status (the negative number of the signal that ended it).
        :raises RemoteException: It could not be started, took longer than `timeout`, or printed
            more than `max_size`.
        """
        given: dict[str, object] = {} if stdin is None else {"stdin": stdin}
        limit = settings.max_size() if max_size is None else max_size
        args = (command, arguments, env, cwd, timeout)
        return self._transfer(
            lambda exchange: transfer.run(exchange, limit, args, given),
            inmanta_mitogen.run,
            *args,
            **given,
        )

    def symlink(self, source: str, target: str) -> None:
        """
        Make a symlink.

        :param source: What it points to.
        :param target: Its own path.
        :raises RemoteException: The host could not do it.
        """
        self.remote_call(os.symlink, source, target)
