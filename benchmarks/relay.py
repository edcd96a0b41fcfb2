"""
A link with latency, for ssh's ProxyCommand: holds every byte back for a while, each way, and lets
as many of them through as come. It counts round trips:

    python relay.py SECONDS HOST PORT [FILE]

What either end sends depends on all that it got before. So whatever goes out has the number of the
last answer that was let through, plus one, and an answer has the number of the last that was let
through to the host. The last answer's number is written to FILE: the round trips so far.
"""

import collections.abc
import os
import queue
import socket
import sys
import threading
import time

Block = tuple[float, int, bytes]


class Direction:
    """One way of the link."""

    def __init__(
        self,
        read: collections.abc.Callable[[], bytes],
        write: collections.abc.Callable[[bytes], None],
    ) -> None:
        self._read, self._write = read, write
        self._held: queue.SimpleQueue[Block] = queue.SimpleQueue()
        self.trips = 0
        """The number of the last block that came out."""

    def receive(self, number: collections.abc.Callable[[], int]) -> None:
        while True:
            block = self._read()
            self._held.put((time.monotonic(), number(), block))
            if not block:
                return

    def release(self, seconds: float, count: collections.abc.Callable[[int], object]) -> None:
        while True:
            since, number, block = self._held.get()
            time.sleep(max(0.0, since + seconds - time.monotonic()))
            if not block:
                return
            self.trips = max(self.trips, number)
            count(self.trips)
            self._write(block)


def write_all(block: bytes) -> None:
    while block:
        block = block[os.write(1, block) :]


def main() -> None:
    seconds, host, port = float(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    file = os.open(sys.argv[4], os.O_WRONLY | os.O_CREAT) if sys.argv[4:] else None
    with socket.create_connection((host, port)) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        there = Direction(lambda: os.read(0, 1 << 16), link.sendall)
        back = Direction(lambda: link.recv(1 << 16), write_all)

        def count(trips: int) -> None:
            if file is not None:
                os.pwrite(file, b"%9d" % trips, 0)

        for target, *args in (
            (there.receive, lambda: back.trips + 1),
            (back.receive, lambda: there.trips),
            (there.release, seconds, lambda trips: None),
        ):
            threading.Thread(target=target, args=args, daemon=True).start()
        back.release(seconds, count)


if __name__ == "__main__":
    try:
        main()
    except (BrokenPipeError, ConnectionError):
        sys.exit(1)
