"""Ends of a transfer on the host that do what the real one never would."""

import time

import mitogen.core

from inmanta_mitogen import chunks as transfer

SHA1_OF_NOTHING = "da39a3ee5e6b4b0d3255bfef95601890afd80709"


def _send(sender, data):
    message = mitogen.core.Message(data=data, handle=sender.dst_handle)
    sender.context.send(message)


def flood(count, sender):
    """Sends without waiting for anyone to take it in."""
    _send(sender, transfer.pack_begin(1234567, transfer.UNKNOWN))
    for _ in range(count):
        _send(sender, bytes(transfer.CHUNK))
    return SHA1_OF_NOTHING, None


def lie(sender):
    """Sends something, and the sum of something else."""
    _send(sender, transfer.pack_begin(1234567, 5))
    _send(sender, b"hello")
    return SHA1_OF_NOTHING, None


def lie_about_small(sender):
    return SHA1_OF_NOTHING, b"hello"


def babble(sender):
    _send(sender, b"neither begin nor end")
    return SHA1_OF_NOTHING, None


def answer(value, sender):
    return value


def count_wrongly(sender):
    """Begins to receive, and then acknowledges in another language."""
    _send(sender, transfer.pack_begin(1234567, 0))
    _send(sender, b"seven")


@mitogen.core.takes_econtext
def hoard(path, size, sender, econtext):
    """Writes to a file how many chunks are on the way to a host that is near, or far."""
    with transfer._Channel(sender, econtext) as channel:
        channel.begin(size)
        received = len(channel.receive())
        time.sleep(0.3 if path.endswith("far") else 0)
        channel.send(transfer.pack_count(received))
        time.sleep(1.0)  # whatever may be on the way has come by then
        with open(path, "w") as file:
            file.write(str(channel._inbox.qsize()))
        while received < size:
            received += len(channel.receive())
            channel.send(transfer.pack_count(received))
        channel.receive()


@mitogen.core.takes_econtext
def endless(sender, econtext):
    """Keeps to the protocol, and never ends."""
    return transfer._send_blocks(_zeros(), transfer.UNKNOWN, sender, econtext)


def _zeros():
    while True:
        yield bytes(transfer.CHUNK)


def peak_memory():
    """The most that this process ever had in memory, since it was forgotten, in bytes."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def forget_peak_memory():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak_memory()
