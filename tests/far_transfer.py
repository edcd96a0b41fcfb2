"""Ends of a transfer on the host that do what the real one never would."""

import queue
import time
from typing import Any

import mitogen.core

from inmanta_mitogen import chunks
from inmanta_mitogen.dispatch import RAW


def _message(data: bytes, **fields: Any) -> mitogen.core.Message:
    return mitogen.core.Message(data=data, enc=mitogen.core.Message.ENC_BIN, **fields)


def offer(data: bytes) -> mitogen.core.Message:
    """Answers with what is given."""
    return _message(data)


@mitogen.core.takes_router
def flood(path: str, max_size: Any, router: Any) -> mitogen.core.Message:
    """Sends without waiting for anyone to take it in."""
    count, size = map(int, path.split())

    def on_count(message: Any) -> None:
        if message.reply_to and not message.is_dead:
            message.reply(_message(bytes(chunks.CHUNK)), router=router)
            for _ in range(count):
                message.reply(_message(bytes(size)), router=router)

    return _message(chunks.pack_ticket(RAW, router.add_handler(on_count), 1 << 40))


@mitogen.core.takes_router
def lie(path: str, max_size: Any, router: Any) -> mitogen.core.Message:
    """Sends something, and the sum of something else."""
    blocks = [b"hello"]
    read = lambda size: blocks.pop() if blocks else b""  # noqa: E731
    return _message(chunks.Outgoing(RAW, read, 5, router, lambda: "0" * 40).ticket)


@mitogen.core.takes_router
def endless(router: Any) -> mitogen.core.Message:
    """Keeps to the protocol, and never ends."""
    return _message(chunks.Outgoing(RAW, bytes, 5, router).ticket)


@mitogen.core.takes_router
def drip(router: Any) -> mitogen.core.Message:
    """Sends a little again and again."""

    def read(size: int) -> bytes:
        time.sleep(0.1)
        return bytes(size)

    return _message(chunks.Outgoing(RAW, read, 5, router).ticket)


def never_begin(path: str, size: int, handle: int, in_place: bool) -> None:
    """Waits for what never comes."""
    time.sleep(600)


class _Receiver:
    def __init__(self, econtext: Any, handle: int) -> None:
        self.inbox: Any = queue.Queue()
        self._master = econtext.master
        self._handle = handle
        self.send(chunks.pack_ticket(RAW, econtext.router.add_handler(self.inbox.put), 0))

    def send(self, data: bytes) -> None:
        self._master.send(_message(data, handle=self._handle))


@mitogen.core.takes_econtext
def count_wrongly(path: str, size: int, handle: int, in_place: bool, econtext: Any) -> None:
    """Begins to receive, and then acknowledges in another language."""
    receiver = _Receiver(econtext, handle)
    receiver.inbox.get()
    receiver.send(b"seven")


@mitogen.core.takes_econtext
def hoard(path: str, size: int, handle: int, in_place: bool, econtext: Any) -> None:
    """Writes to a file how many chunks are on the way to a host that is far."""
    receiver = _Receiver(econtext, handle)
    received = len(receiver.inbox.get().data)
    time.sleep(0.3)  # a long way
    receiver.send(chunks.pack_count(received))
    time.sleep(1.0)  # whatever may be on the way has come by then
    with open(path, "w") as file:
        file.write(str(receiver.inbox.qsize()))
    while received < size:
        received += len(receiver.inbox.get().data)
        receiver.send(chunks.pack_count(received))
    receiver.inbox.get()


def peak_memory() -> int:
    """The most that this process ever had in memory, since it was forgotten, in bytes."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def forget_peak_memory() -> int:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak_memory()
