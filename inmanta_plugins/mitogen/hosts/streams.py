"""What a connection may send before and beside its messages: lines, within bounds.

While a host is being connected, mitogen looks for prompts and marks in all that the ssh client, a
sudo or the host's shell write, and keeps the end of it for the error. What goes to stderr it logs
for as long as the connection lives. Neither has a limit there: a host could fill the memory with
one line that never ends, have mitogen's own source sent again and again, and hold up the thread
that serves all the other hosts. Here both have one.
"""

import functools
import logging
import time
from typing import Any

import mitogen.core
import mitogen.parent
from inmanta_mitogen import hop
from inmanta_plugins.mitogen import settings

LOGGER = logging.getLogger(__name__)

# Small reads are joined to pieces of this size: each costs some 40 bytes of its own.
_PIECE = 4096
# A line costs mitogen some 20 µs, and other hosts wait meanwhile.
_READ_OF_LINES = 4096


class NoisyError(mitogen.core.StreamError):  # type: ignore[misc]  # mitogen is not typed
    """A host wrote more than it may before its Python ran: nothing of that can be trusted."""


class Allowance:
    """
    So much at once, and so much a second in the long run.

    :param burst: What can be had at once.
    :param rate: What is added each second, up to `burst`.
    """

    def __init__(self, burst: float, rate: float) -> None:
        self._burst = burst
        self._rate = rate
        self._left = burst
        self._since = time.monotonic()

    def take(self, amount: float = 1) -> bool:
        """
        Take an amount, if it is left. Return whether it was.

        :param amount: What is wanted.
        """
        if self.left < amount:
            return False
        self._left -= amount
        return True

    @property
    def left(self) -> float:
        """What can be had now."""
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._since) * self._rate)
        self._since = now
        return self._left


class GuardedStream(mitogen.core.Stream):  # type: ignore[misc]  # mitogen is not typed
    """A stream to a host that says no more than it may."""

    def __init__(self) -> None:
        self._before_connected = 0
        self._stderr = Allowance(settings.STDERR_BURST, settings.STDERR_RATE)
        self._drops = False

    def on_receive(self, broker: mitogen.core.Broker) -> None:
        """As mitogen's own, on the broker's thread, with the bounds of this module."""
        connected = isinstance(self.protocol, mitogen.core.MitogenProtocol)
        data = self.receive_side.read(self.protocol.read_size if connected else _READ_OF_LINES)
        if not data:
            self.on_disconnect(broker)
        elif connected:
            self.protocol.on_receive(broker, self._joined(data))
        elif self is self.conn.stderr_stream:
            self._on_stderr(broker, data)
        else:
            self._on_bootstrap(broker, data)

    def _joined(self, data: bytes) -> bytes:
        # The pieces of a message that is not complete yet. Mitogen itself joins the first ones.
        pieces, protocol = self.protocol._input_buf, self.protocol
        if len(pieces) > 1 and len(pieces[-1]) < _PIECE:
            last = pieces.pop()
            protocol._input_buf_len -= len(last)
            return bytes(last) + data
        return data

    def _on_bootstrap(self, broker: mitogen.core.Broker, data: bytes) -> None:
        self._before_connected += len(data)
        if self._before_connected > settings.MOST_BEFORE_CONNECTED:
            self._fail(f"it sent more than {settings.MOST_BEFORE_CONNECTED // 1024} KiB")
            return
        protocol = self.protocol
        protocol.on_receive(broker, data)
        self._shorten_line(protocol)
        writer = getattr(protocol, "_writer", None)
        if writer is not None and writer._len > settings.MOST_TO_CONNECT:
            self._fail("it asked for mitogen's source again and again")

    def _shorten_line(self, protocol: mitogen.core.Protocol) -> None:
        # Not a MitogenProtocol, which the stream may have by now.
        if len(getattr(protocol, "_trailer", b"")) > settings.LONGEST_LINE:
            protocol._trailer = protocol._trailer[-settings.LONGEST_LINE // 2 :]

    def _fail(self, what: str) -> None:
        self.conn._fail_connection(NoisyError(f"{what} before its Python ran"))

    def _on_stderr(self, broker: mitogen.core.Broker, data: bytes) -> None:
        dropped_before, self._drops = self._drops, not self._stderr.take(len(data))
        if self._drops:
            if not dropped_before:
                LOGGER.warning(
                    "The connection to %s writes more than %d bytes a second to stderr: dropped.",
                    self.name,
                    settings.STDERR_RATE,
                )
            return
        self.protocol.on_receive(broker, data)
        self._shorten_line(self.protocol)


def _guarded_protocol(protocol: type[Any]) -> type[Any]:
    fields = {"__module__": protocol.__module__, "stream_class": GuardedStream}
    return type(protocol.__name__, (protocol,), fields)


@functools.cache
def guarded(connection_class: type[Any]) -> type[Any]:
    """
    Return one of mitogen's ways to connect, with guarded streams.

    :param connection_class: One of mitogen's ways to connect.
    """
    watched = hop.watched(connection_class)
    fields = {
        # Mitogen's own messages name it.
        "__module__": connection_class.__module__,
        "stream_protocol_class": _guarded_protocol(watched.stream_protocol_class),
        "diag_protocol_class": _guarded_protocol(watched.diag_protocol_class),
    }
    return type(connection_class.__name__, (watched,), fields)
