"""One remote call under way."""

import dataclasses
import functools
import math
import queue
import time

from inmanta_plugins.mitogen import settings
from inmanta_plugins.mitogen.calls.log import truncate_logged_values
from inmanta_plugins.mitogen.calls.request import function_name
from inmanta_plugins.mitogen.connections.connection import Answer, Connection, Function, dead
from inmanta_plugins.mitogen.errors import CallTimeoutError


@dataclasses.dataclass(eq=False)
class Call:
    """One remote call under way."""

    function: Function
    """The function that is called."""
    args: tuple[object, ...]
    """Its positional arguments."""
    kwargs: dict[str, object]
    """Its keyword arguments."""
    context_name: str
    """Where it is called, for people."""
    call_timeout: float | None
    """The seconds it may take; None for no limit."""
    started: float = dataclasses.field(default_factory=time.monotonic)
    inbox: queue.SimpleQueue[Answer] = dataclasses.field(default_factory=queue.SimpleQueue)
    connection: Connection | None = None
    """The connection that it goes through."""
    was_sent: bool = False
    prefetched: bool = False
    _deadline: float = math.inf

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

    @functools.cached_property
    def shown(self) -> tuple[list[object], dict[str, object]]:
        """What the log shows of the arguments."""
        values = truncate_logged_values((*self.args, *self.kwargs.values()))
        positional = len(self.args)
        return values[:positional], dict(zip(self.kwargs, values[positional:], strict=True))

    @property
    def overdue(self) -> bool:
        """Whether it has taken longer than it may."""
        return time.monotonic() >= self._deadline

    def next(self, inbox: queue.SimpleQueue[Answer] | None = None) -> Answer:
        """
        Return the next thing that comes: a dead message when nothing can come any more.

        :param inbox: Where it comes, by default the inbox of this call.
        :raises CallTimeoutError: The call has taken longer than it may; its interpreter has been
            terminated.
        """
        inbox = self.inbox if inbox is None else inbox
        while True:
            left = max(0.0, self._deadline - time.monotonic())
            try:
                return inbox.get(timeout=min(left, settings.SECONDS_BETWEEN_CHECKS))
            except queue.Empty:
                if self.overdue:
                    raise self.time_out() from None
                if self.connection is not None and self.connection.link.ended and inbox.empty():
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
