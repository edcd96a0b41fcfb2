"""
A link with latency, for ssh's ProxyCommand: holds every byte back for a while, each way, and lets
as many of them through as come.

    python relay.py SECONDS HOST PORT
"""

import collections.abc
import os
import queue
import socket
import sys
import threading
import time

Block = tuple[float, bytes]


def receive(read: collections.abc.Callable[[], bytes], held: "queue.SimpleQueue[Block]") -> None:
    while True:
        block = read()
        held.put((time.monotonic(), block))
        if not block:
            return


def release(
    held: "queue.SimpleQueue[Block]", seconds: float, write: collections.abc.Callable[[bytes], None]
) -> None:
    while True:
        since, block = held.get()
        time.sleep(max(0.0, since + seconds - time.monotonic()))
        if not block:
            return
        write(block)


def write_all(block: bytes) -> None:
    while block:
        block = block[os.write(1, block) :]


def main() -> None:
    seconds, host, port = float(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    with socket.create_connection((host, port)) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        there: queue.SimpleQueue[Block] = queue.SimpleQueue()
        back: queue.SimpleQueue[Block] = queue.SimpleQueue()
        for target, *args in (
            (receive, lambda: os.read(0, 1 << 16), there),
            (receive, lambda: link.recv(1 << 16), back),
            (release, there, seconds, link.sendall),
        ):
            threading.Thread(target=target, args=args, daemon=True).start()
        release(back, seconds, write_all)


if __name__ == "__main__":
    try:
        main()
    except (BrokenPipeError, ConnectionError):
        sys.exit(1)
