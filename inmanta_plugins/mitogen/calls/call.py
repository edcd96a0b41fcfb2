"""One remote call under way."""

import queue
import time

from inmanta_plugins.mitogen import settings
from inmanta_plugins.mitogen.calls.log import truncate_logged_values
from inmanta_plugins.mitogen.calls.request import function_name
from inmanta_plugins.mitogen.connections.connection import Answer, Connection, Function, dead
from inmanta_plugins.mitogen.errors import CallTimeoutError


class Call:
    """
    One remote call under way.

    :param function: The function that is called.
    :param args: Its positional arguments.
    :param kwargs: Its keyword arguments.
    :param context_name: Where it is called, for people.
    :param call_timeout: The seconds it may take; None for no limit.
    """

    def __init__(
        self,
        function: Function,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        context_name: str,
        call_timeout: float | None,
    ) -> None:
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.context_name = context_name
        self.call_timeout = call_timeout
        self.started = time.monotonic()
        self.inbox: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self.connection: Connection | None = None
        self.was_sent = False
        self.prefetched = False
        self._deadline: float | None = None
        self._shown: list[object] | None = None

    def start_clock(self, connection: Connection) -> None:
        """
        Start the time that the call may take.

        Not before there is a connection: connecting again has a timeout of its own, and a
        `call_timeout` below what that takes would never let a call through.

        :param connection: The connection that the call goes through.
        """
        self.connection = connection
        if self.call_timeout is not None:
            self._deadline = time.monotonic() + self.call_timeout

    @property
    def shown(self) -> tuple[list[object], dict[str, object]]:
        """What the log shows of the arguments."""
        if self._shown is None:
            self._shown = truncate_logged_values((*self.args, *self.kwargs.values()))
        positional = len(self.args)
        named = zip(self.kwargs, self._shown[positional:], strict=True)
        return self._shown[:positional], dict(named)

    @property
    def seconds_until_check(self) -> float:
        """The seconds to wait before the deadline, or the connection, is looked at."""
        if self._deadline is None:
            return settings.SECONDS_BETWEEN_CHECKS
        return min(settings.SECONDS_BETWEEN_CHECKS, max(0.0, self._deadline - time.monotonic()))

    @property
    def overdue(self) -> bool:
        """Whether it has taken longer than it may."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    @property
    def lost(self) -> bool:
        """Whether no answer can come any more."""
        return self.connection is not None and self.connection.link.ended

    def next(self, inbox: queue.SimpleQueue[Answer] | None = None) -> Answer:
        """
        Return the next thing that comes: a dead message when nothing can come any more.

        :param inbox: Where it comes, by default the inbox of this call.
        :raises CallTimeoutError: The call has taken longer than it may; its interpreter has been
            terminated.
        """
        inbox = self.inbox if inbox is None else inbox
        while True:
            try:
                return inbox.get(timeout=self.seconds_until_check)
            except queue.Empty:
                if self.overdue:
                    raise self.time_out() from None
                if self.lost and inbox.empty():
                    return dead("the connection has ended")

    def time_out(self) -> CallTimeoutError:
        """Terminate an interpreter that does not answer in time, and return the error to raise."""
        if self.connection is not None:
            self.connection.link.end(settings.LEAVE_TIMEOUT)
        return CallTimeoutError(
            TimeoutError(
                f"{function_name(self.function)} did not end on {self.context_name} within"
                f" {self.call_timeout} seconds (call_timeout); its interpreter has been terminated,"
                " whether it ran to its end is not known"
            )
        )
