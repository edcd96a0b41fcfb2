"""Ends of a transfer on the host that do what the real one never would, or seldom."""

import time
from collections.abc import Generator
from typing import Any

import mitogen.core

from inmanta_mitogen import chunks
from inmanta_mitogen.dispatch import RAW


def _keep(transfer: "Generator[Any, Any, None]") -> mitogen.core.Message:
    ticket = chunks.keep(RAW, b"")
    chunks.transfers[chunks.TICKET.unpack_from(ticket, 1)[1]] = transfer
    return mitogen.core.Message(data=ticket)


def offer(data: bytes) -> mitogen.core.Message:
    """Answer with what is given."""
    return mitogen.core.Message(data=data)


def lie(number: int, path: str, max_size: Any) -> int:
    """Send something, and the sum of something else."""
    chunks.transfers[number] = (each for each in (b"hello", "0" * 40))
    return 5


def endless() -> mitogen.core.Message:
    """Keep to the protocol, and never end."""

    def transfer() -> "Generator[bytes, bytes, None]":
        while True:
            yield bytes(500_000)

    return _keep(transfer())


@mitogen.core.takes_econtext
def begin_late(number: int, path: str, size: int, in_place: bool, econtext: Any) -> None:
    """Begin to receive as a host that is far, or slow."""
    time.sleep(1)
    chunks.receive(number, path, size, in_place, econtext=econtext)


def peak_memory() -> int:
    """Return the most that this process ever had in memory, since it was forgotten, in bytes."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def forget_peak_memory() -> int:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak_memory()
