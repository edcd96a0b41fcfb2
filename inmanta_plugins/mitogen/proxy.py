"""A host as a handler sees it: a connection that runs functions there."""

import os
import shutil
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypedDict, TypeVar, cast

import inmanta.agent.handler

import inmanta_mitogen
import mitogen.parent
from inmanta_mitogen.chunks import SourceFile, slices
from inmanta_mitogen.dispatch import CHUNK_SIZE
from inmanta_plugins.mitogen import settings
from inmanta_plugins.mitogen.calls import prefetch, request, transfers
from inmanta_plugins.mitogen.calls.call import Call
from inmanta_plugins.mitogen.calls.in_flight import PendingCalls
from inmanta_plugins.mitogen.calls.log import truncate_logged_value
from inmanta_plugins.mitogen.connections.connection import Answer, Connection
from inmanta_plugins.mitogen.connections.hub import HUB, watch_forks
from inmanta_plugins.mitogen.errors import (
    ConnectError,
    NotDeliveredError,
    PythonNotFoundError,
    RemoteException,
)
from inmanta_plugins.mitogen.texts import describe_context

if TYPE_CHECKING:
    from inmanta_mitogen.staged import Buffer

P = ParamSpec("P")
T = TypeVar("T")


class FileStat(TypedDict):
    """Who owns a file and what they may do with it."""

    owner: str
    """The name of the user, or the number as text where the host has no name for it."""
    group: str
    """The name of the group, or the number as text where the host has no name for it."""
    permissions: int
    """The digits of the octal mode, read as decimal: 644 for ``0o644``, 4755 for ``0o4755``."""


def _name_of(serialized_context: object) -> str:
    """Return what a context is called in logs: its name, or where it is. It may be invalid."""
    if not isinstance(serialized_context, Mapping):
        return f"a {type(serialized_context).__name__} in the place of a context"
    return str(serialized_context.get("name") or describe_context(serialized_context))


class Proxy:
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
        call raises :class:`CallTimeoutError` and its interpreter is terminated. Calls of other
        threads that the host runs first count; connecting again does not, which the context's
        ``connect_timeout`` limits. None, the default, takes the
        environment variable INMANTA_MITOGEN_CALL_TIMEOUT; without that too there is no limit.
    :raises ValueError: `call_timeout`, or the variable, is not a number of seconds above 0.
    """

    def __init__(
        self,
        serialized_context: dict[str, object],
        *,
        logger: inmanta.agent.handler.LoggerABC | None = None,
        call_timeout: float | None = None,
    ) -> None:
        self.serialized_context = serialized_context
        own = inmanta.agent.handler.PythonLogger(settings.LOGGER)
        self.logger: inmanta.agent.handler.LoggerABC = logger or own
        self.call_timeout = settings.call_timeout(call_timeout)
        self._name = _name_of(serialized_context)
        self._connection: Connection | None = None
        self.after_fork_in_child()
        watch_forks(self)

    def __repr__(self) -> str:
        state = "open" if self._connection is not None else "closed"
        return f"<{type(self).__name__} {self._name} {state}>"

    def after_fork_in_child(self) -> None:
        """Begin with locks of this process; the next call connects for it."""
        self._lock = threading.RLock()
        # The last attempt to reconnect that failed, with when it ended.
        self._not_revived: tuple[float, Exception] | None = None
        self._pending = PendingCalls()
        self._prefetcher = prefetch.Prefetcher()

    # The connection

    @property
    def context(self) -> mitogen.parent.Context:
        """
        The mitogen context of the open connection.

        :raises RuntimeError: The proxy is not connected.
        """
        # It may be used for calls that this proxy does not see.
        self.end_resource()
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
            self._connection = HUB.open(self.serialized_context)
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
        self._prefetcher.drop()
        try:
            self.logger.debug("Disconnecting from %(context_name)s", context_name=self._name)
        finally:
            left = connection.close(timeout)
        if not left and not best_effort:
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

    def _ensure_connected(self, since: float) -> Connection:
        """
        Return the open connection, after connecting again when it was lost.

        :param since: When the call began that needs it. Those that began before an attempt to
            connect again failed share its failure: they do not each wait for a dead host in turn.
        """
        connection = self._opened()
        if connection.link.alive:
            return connection
        with self._lock:
            connection = self._opened()
            if connection.link.alive:
                return connection
            if self._not_revived is not None and since < self._not_revived[0]:
                raise RemoteException(self._not_revived[1])
            self.logger.debug(
                "The connection to %(context_name)s was lost, connecting again",
                context_name=self._name,
            )
            try:
                self._connection = HUB.open(self.serialized_context)
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
        :raises UnsendableError: The host can't find the function, an argument can't be sent, or
            they take more than a message may carry (128 MiB); a :class:`RemoteException`, a
            :class:`TypeError` and a :class:`ValueError`.
        :raises RemoteException: The function raised, the host was lost or can't be reached again.
        :raises CallTimeoutError: The call took longer than `call_timeout`.
        """
        call = Call(function, args, kwargs, self._name, self.call_timeout)
        return cast(T, self._carry_out(call, self._ask))

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """
        Call a function in the Python of the host as :meth:`remote_call` does, and don't wait for
        its end: over a slow link many calls then take hardly longer than one. The host runs them
        one after another, in the order in which they were submitted. All of them, and their
        results, are held in memory. A result of more than 2 MiB is fetched behind the calls that
        were submitted before it came.

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
        call = Call(function, args, kwargs, self._name, self.call_timeout)
        self._prefetcher.ask(function, None)
        try:
            self._send(call, {})
            return self._pending.add(lambda: self._carry_out(call, self._await))
        except Exception as error:
            failed: Future[T] = Future()
            failed.set_exception(error)
            if isinstance(error, RemoteException):
                self._log(call, "exception", error)
            return failed

    def _await(self, call: Call) -> object:
        """Wait for the result of a submitted call; when it never left, it is sent anew."""
        if not call.was_sent:
            self._send(call, {})
        call.was_sent = False
        try:
            return transfers.whole_result(call, call.next())
        finally:
            self._prefetcher.drop()

    def _carry_out(self, call: Call, attempt: Callable[[Call], T]) -> T:
        """Make a call, once more when it certainly never reached the host, and log it."""
        try:
            try:
                result = attempt(call)
            except NotDeliveredError:
                # The connection had ended, unseen until now: this is its revival.
                result = attempt(call)
        except Exception as error:
            if call.connection is not None or isinstance(error, RemoteException):
                self._log(call, "exception", error)
            raise
        self._log(call, "result", result)
        return result

    def _ask(self, call: Call) -> object:
        # Prefetching is for calls that go to the host and nowhere else, as far as this class knows.
        overridden = type(self).remote_call is not _REMOTE_CALL or "remote_call" in vars(self)
        path = None if overridden else prefetch.path_of(call.function, call.args, call.kwargs)
        answer = self._prefetched(call, path)
        if answer is not None:
            return transfers.whole_result(call, answer)
        along, held = self._prefetcher.ask(call.function, path)
        try:
            self._send(call, along)
            held.update(along)
            _ = call.shown  # while the host is busy anyway
            return transfers.whole_result(call, call.next())
        finally:
            if not along:
                self._prefetcher.drop()

    def _send(self, call: Call, along: prefetch.Inboxes) -> None:
        connection = self._ensure_connected(call.started)
        size = connection.max_message_size
        packed = request.request(call.function, call.args, call.kwargs, size)
        calls = [(call.function, packed, call.inbox.put)]
        for function, inbox in along.items():
            packed = request.request(function, call.args, {}, size, only_cheap=True)
            calls.append((function, packed, inbox.put))
        call.start_clock(connection)
        connection.send(*calls)
        call.was_sent = True

    # Prefetching

    def begin_resource(self, resource_type: str) -> None:
        """
        Begin with a resource: from now on the questions that resources of this type usually ask
        about a path are sent along with the first one. Handlers of this module call it.

        :param resource_type: The type, such as ``fs::File``.
        """
        if settings.prefetch():
            self._prefetcher.begin(resource_type)

    def end_resource(self) -> None:
        """End with the resource: nothing is sent along any more, and what came is dropped."""
        self._prefetcher.end()

    def _prefetched(self, call: Call, path: str | None) -> Answer | None:
        inbox = self._prefetcher.take(call.function, path)
        if inbox is None:
            return None
        call.start_clock(self._opened())
        answer = call.next(inbox)
        if not prefetch.is_usable(answer):
            return None
        self._prefetcher.note(call.function)
        call.prefetched = True
        return answer

    def _log(self, call: Call, key: str, value: object) -> None:
        args, kwargs = call.shown
        shown: Any = truncate_logged_value(str(value) if key == "exception" else value)
        more: dict[str, Any] = {"prefetched": True} if call.prefetched else {}
        self.logger.debug(
            f"Calling function %(function)s in context %(context_name)s: %({key})s",
            function=request.function_name(call.function),
            context_name=self._name,
            args=args,
            kwargs=kwargs,
            duration=round(time.monotonic() - call.started, 6),
            **{key: shown},
            **more,
        )

    # Files and commands

    def chmod(self, path: str, permissions: str) -> None:
        """
        Set the mode of a file or directory.

        :param path: Its path; a symlink is followed.
        :param permissions: The mode in octal, e.g. ``"644"`` or ``"4755"``.
        :raises TypeError: `permissions` is not a string.
        :raises ValueError: `permissions` is not an octal number.
        :raises RemoteException: The host could not do it.
        """
        expected = "permissions must be a string of octal digits, such as '644' or '4755'"
        if not isinstance(permissions, str):
            raise TypeError(f"{expected}, not {permissions!r}")
        try:
            mode = int(permissions, 8)
        except ValueError:
            raise ValueError(f"{expected}, not {permissions!r}") from None
        self.remote_call(os.chmod, path, mode)

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
        Return whether anything is at a path: a symlink counts, even one that leads nowhere.

        :param path: A path.
        :raises RemoteException: The host could not be asked.
        """
        return bool(self.remote_call(inmanta_mitogen.lexists, path))

    def file_stat(self, path: str) -> FileStat:
        """
        Return who owns a file or directory, and its permissions.

        :param path: The path of a file or directory; a symlink is followed.
        :raises RemoteException: Nothing is there, or the host could not be asked.
        """
        return cast(FileStat, self.remote_call(inmanta_mitogen.file_stat, path))

    def hash_file(self, path: str) -> str:
        """
        Return the sha1 of the content of a file, in hexadecimal.

        :param path: The path of a file; a symlink is followed.
        :raises RemoteException: It can't be read.
        """
        return str(self.remote_call(inmanta_mitogen.hash_file, path))

    def is_symlink(self, path: str) -> bool:
        """
        Return whether a path is a symlink.

        :param path: A path.
        :raises RemoteException: The host could not be asked.
        """
        return bool(self.remote_call(inmanta_mitogen.islink, path))

    def mkdir(self, path: str) -> None:
        """
        Make a directory.

        :param path: Its path; the parent directory must exist.
        :raises RemoteException: The host could not do it.
        """
        self.remote_call(os.mkdir, path)

    def put(self, path: str, content: "Buffer", *, in_place: bool = False) -> None:
        """
        Write a file: see :func:`inmanta_mitogen.put` for what is kept and what is promised.

        :param path: Its path; a symlink is followed, and stays.
        :param content: All of its content, of any size.
        :param in_place: Whether an existing file keeps its inode; by default it is replaced.
        :raises RemoteException: The host could not do it; the old content is untouched.
        """
        data: Any = content
        if isinstance(content, bytearray | memoryview):
            from inmanta_mitogen.staged import as_bytes

            data = bytes(as_bytes(content))
        if isinstance(data, bytes) and len(data) > CHUNK_SIZE:
            self._upload(data, path, lambda: slices(data), len(data), in_place)
        else:
            more: dict[str, Any] = {"in_place": True} if in_place else {}
            self.remote_call(inmanta_mitogen.put, path, data, **more)

    def put_file(
        self,
        local_path: str | os.PathLike[str],
        path: str,
        *,
        progress: transfers.Progress | None = None,
        in_place: bool = False,
    ) -> None:
        """
        Copy a file of the agent to the host, with what :meth:`put` keeps and promises, and in
        little memory on both ends whatever its size.

        :param local_path: The path of a regular file on the agent.
        :param path: Its path on the host; a symlink is followed, and stays.
        :param progress: Called in this thread with the bytes that were sent so far, and those in
            all: after each chunk, the last time before the old content is replaced.
        :param in_place: As for :meth:`put`.
        :raises OSError: The local file can't be read, is not a regular file, or was changed while
            it was read. The old content on the host is untouched. So it is after whatever
            `progress` raises.
        :raises RemoteException: The host could not do it, or the sha1 of what it received differs;
            the old content is untouched.
        """
        with SourceFile(local_path) as file:
            shown = f"{file.size} bytes of {os.fspath(local_path)}"
            self._upload(shown, path, file.chunks, file.size, in_place, progress)

    def _upload(
        self,
        shown: object,
        path: str,
        chunks: Callable[[], Iterator[bytes]],
        size: int,
        in_place: bool,
        progress: transfers.Progress | None = None,
    ) -> None:
        call = Call(inmanta_mitogen.put, (path, shown), {}, self._name, self.call_timeout)

        def attempt(call: Call) -> None:
            connection = self._start(call)
            transfers.upload(call, connection, path, chunks(), size, in_place, progress)

        self._carry_out(call, attempt)

    def _start(self, call: Call) -> Connection:
        """Return the open connection for a call that moves chunks, whose time runs from now on."""
        self._prefetcher.ask(call.function, None)
        connection = self._ensure_connected(call.started)
        call.start_clock(connection)
        return connection

    def read(self, path: str, *, max_size: int | None = None) -> str:
        """
        Return the text of a file.

        :param path: The path of a file with UTF-8 text.
        :param max_size: The most bytes to accept. By default what the environment variable
            INMANTA_MITOGEN_MAX_SIZE says, 1 GiB if it says nothing. A file without end, such as
            ``/dev/zero``, takes that much memory before it is refused.
        :raises RemoteException: It can't be read, is not UTF-8, or is larger than that.
        """
        return str(self.remote_call(inmanta_mitogen.read, path, **_limit(max_size)))

    def read_binary(self, path: str, *, max_size: int | None = None) -> bytes:
        """
        Return the content of a file.

        :param path: The path of a file.
        :param max_size: The most bytes to accept, as for :meth:`read`.
        :raises RemoteException: It can't be read, or is larger than that.
        """
        return self.remote_call(inmanta_mitogen.read_binary, path, **_limit(max_size))

    def get_file(
        self,
        path: str,
        local_path: str | os.PathLike[str],
        *,
        progress: transfers.Progress | None = None,
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
        :raises RemoteException: The host's file can't be read, is not a regular file, was changed
            while it was read, or is larger than `max_size`, or the sha1 of what arrived differs.
            The local file is untouched.
        """
        call = Call(inmanta_mitogen.read_binary, (path,), {}, self._name, self.call_timeout)

        # Imported late: the import of this module should not wait for it.
        from inmanta_mitogen.staged import StagedWrite

        with StagedWrite(os.fspath(local_path)) as staged:
            self._carry_out(
                call,
                lambda call: transfers.fetch_file(
                    call, self._start(call), path, staged, max_size, progress
                ),
            )
            staged.commit()

    def readlink(self, path: str) -> str:
        """
        Return what a symlink points to, as it is written there.

        :param path: The path of a symlink.
        :raises RemoteException: No symlink is there.
        """
        return str(self.remote_call(os.readlink, path))

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
        more: dict[str, Any] = _limit(max_size)
        if stdin is not None:
            more["stdin"] = stdin
        if self.call_timeout is not None:
            more["call_timeout"] = self.call_timeout
        return self.remote_call(inmanta_mitogen.run, command, arguments, env, cwd, timeout, **more)

    def symlink(self, source: str, target: str) -> None:
        """
        Make a symlink.

        :param source: What it points to.
        :param target: Its own path.
        :raises RemoteException: The host could not do it.
        """
        self.remote_call(os.symlink, source, target)


_REMOTE_CALL = Proxy.remote_call


def _limit(max_size: int | None) -> dict[str, Any]:
    """Return the keyword for a limit that is not the host's default."""
    limit = settings.max_size() if max_size is None else max_size
    return {} if limit == settings.DEFAULT_MAX_SIZE else {"max_size": limit}
