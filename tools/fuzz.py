"""
Feed an agent's router what no host should send, and look whether it stands.

    python tools/fuzz.py [--inputs N] [--seed N]

Two kinds of inputs: bytes as they come on the stream of a host that is connected (messages with
headers and contents of all sorts, changed, cut, repeated and mixed with noise), and answers
(pickles, likewise). An input is a finding when anything but the end of that one stream or an
UnreadableError comes of it: another exception, another host that loses its connection, an input
that takes too long, or 512 MiB more memory at the end.
"""

import argparse
import dataclasses
import json
import logging
import os
import pickle
import random
import resource
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import mitogen.core
import mitogen.master
import mitogen.parent

from inmanta_mitogen.dispatch import JSON_MARK
from inmanta_plugins.mitogen import Proxy
from inmanta_plugins.mitogen.connections import hub as connect
from inmanta_plugins.mitogen.connections.connection import unpack_answers
from inmanta_plugins.mitogen.hosts.answers import UnreadableError, read_answer
from inmanta_plugins.mitogen.hosts.router import AgentRouter

_HEADER = ">hLLLLLL"
_MOST_SECONDS = 10.0
_MOST_GROWTH_KIB = 512 * 1024
_VALUES: list[object] = [
    None, True, 1, -(2**40), 1.5, "text", b"bytes" * 20, ["a", ["b"]], {"k": (1, 2)}, {1, 2},
    frozenset({"x"}), [{"name": f"n{n}", "size": n} for n in range(20)], ("stdout", "stderr", 0),
    mitogen.core.CallError("boom"),
]  # fmt: skip


@dataclasses.dataclass
class Outcome:
    """How a run ended."""

    streams: int = 0
    answers: int = 0
    read: int = 0
    admitted: int = 0
    findings: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        total = self.streams + self.answers
        lines = [
            f"{total} inputs: {self.streams} streams ({self.admitted} messages in them admitted),"
            f" {self.answers} answers ({self.read} read as values); {len(self.findings)} findings"
        ]
        return "\n".join([*lines, *self.findings])


class Mutator:
    """
    Makes inputs of recorded ones.

    :param seed: For the same inputs again.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def damaged(self, data: bytes) -> bytes:
        """
        Return the same, damaged.

        :param data: A recorded input.
        """
        changed = bytearray(data)
        for _ in range(self.random.choice((1, 1, 2, 4, 16))):
            at = self.random.randrange(len(changed) + 1)
            damage = self.random.randrange(6)
            if damage == 0:
                changed[at : at + 1] = self.random.randbytes(1)
            elif damage == 1:
                del changed[at : at + self.random.choice((1, 4, 100))]
            elif damage == 2:
                changed[at:at] = self.random.randbytes(self.random.choice((1, 4, 100)))
            elif damage == 3:
                changed[at:at] = changed[max(0, at - 40) : at] * self.random.choice((1, 3, 50))
            elif damage == 4:
                changed[at : at + 4] = struct.pack(">L", self.random.choice(_EXTREMES))
            else:
                del changed[at:]
        return bytes(changed)

    def message(self, me: int, other: int, recorded: bytes) -> bytes:
        """
        Return a message whose header is in order, with any of the fields that one can have.

        :param me: The id of the host that sends it.
        :param other: The id of another one.
        :param recorded: The content of a recorded message.
        """
        pick = self.random.choice

        def mostly(usual: Sequence[int], odd: Sequence[int]) -> int:
            return pick(usual if self.random.random() < 0.9 else odd)

        ids = [other, 0, 999, *_EXTREMES]
        data = self.damaged(recorded) if self.random.random() < 0.5 else pick(_CONTENTS)
        return (
            struct.pack(
                _HEADER,
                mostly([0x4D49, 0x4D4A, 0x4D4B], [0, 0x4D48, -1]),
                mostly([0], ids),
                mostly([me], ids),
                mostly([me], ids),
                mostly(_HANDLES, [*range(1000, 1040), *_EXTREMES]),
                pick([0, 0, mitogen.core.IS_DEAD, 1001, *_EXTREMES]),
                mostly([len(data)], _EXTREMES),
            )
            + data
        )


_EXTREMES = (0, 1, 22, 127, 128, 255, 65_535, 2**27, 2**27 + 1, 2**31, 2**32 - 1)
_HANDLES = (*range(100, 116), *range(100, 116))
_CONTENTS = (
    b"", b"0", b"1:x", b"2:x", b"999999999999:x", b"mitogen.parent", b"inmanta", b"a\x0030\x00text",
    b"\0\0\0", b"\xff" * 40, pickle.dumps(("pkg", "file"), 2), b"mitogen.core\0" * 9, b"-1",
    b"x:y:z",
)  # fmt: skip


def _recorded() -> list[bytes]:
    values = [pickle.dumps(value, protocol) for value in _VALUES for protocol in (2, 4)]
    texts = [JSON_MARK + json.dumps(_VALUES[number]).encode() for number in (4, 5, 7, 11)]
    return [*values, *texts, *_CONTENTS]


class Target:
    """A router with one real host, and another whose bytes are made up."""

    def __init__(self) -> None:
        self.crashes: list[str] = []
        self.admitted = 0
        context = {"method_name": "local", "name": "real", "python_path": [sys.executable]}
        self.real = Proxy(dict(context), call_timeout=60)
        self.real.connect()
        router = connect.HUB._router
        assert isinstance(router, AgentRouter)
        self.router = router

    def feed(self, make: Callable[[int, int], Iterable[bytes]]) -> None:
        """
        Connect the host that is made up, feed the router with its bytes and end it.

        :param make: Gets the ids of that host and of the other one, and returns the bytes, read by
            read.
        """
        theirs, ours = socket.socketpair()
        context_id = self.router.allocate_id()
        context = mitogen.parent.Context(self.router, context_id, "made-up")

        def run() -> None:
            stream = mitogen.core.Stream()
            stream.name = "made-up"
            ours.setblocking(False)
            stream.accept(ours, ours)
            self.router.register(context, stream)
            stream.set_protocol(
                mitogen.parent.MitogenProtocol(router=self.router, remote_id=context_id)
            )
            self.router.route_monitor.notice_stream(stream)
            stream.protocol.on_message = self._count
            self._receive(stream, make(context_id, self.real.context.context_id))
            stream.on_disconnect(self.router.broker)

        try:
            self.router.broker.defer_sync(run)
        finally:
            theirs.close()

    def _receive(self, stream: Any, reads: Iterable[bytes]) -> None:
        for data in reads:
            if stream.receive_side.closed:
                return
            try:
                stream.protocol.on_receive(self.router.broker, data)
            except Exception:
                # The broker would log it and end the stream: no harm, and yet not meant to be.
                self.crashes.append(traceback.format_exc(limit=-3))
                return

    def _count(self, stream: Any, message: Any) -> None:
        self.admitted += 1


class _Crashes(logging.Handler):
    """Mitogen logs the exceptions of handlers, and goes on: none of them is meant to be."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__()
        self._outcome = outcome

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self._outcome.findings.append(f"{record.getMessage()}: {record.exc_info[1]!r}")


def run(inputs: int, seed: int) -> Outcome:
    """
    Return what came of them.

    :param inputs: How many inputs, half of them streams and half of them answers.
    :param seed: For the same inputs again.
    """
    outcome = Outcome()
    mutator = Mutator(seed)
    recorded = _recorded()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    crashes = _Crashes(outcome)
    loggers = [logging.getLogger(name) for name in ("mitogen", "inmanta_plugins")]
    for logger in loggers:
        logger.addHandler(crashes)
        logger.propagate = False
    try:
        _answers(outcome, mutator, recorded, inputs // 2)
        _streams(outcome, mutator, recorded, inputs - inputs // 2)
    finally:
        for logger in loggers:
            logger.removeHandler(crashes)
            logger.propagate = True
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if grown > _MOST_GROWTH_KIB:
        outcome.findings.append(f"memory grew by {grown // 1024} MiB")
    return outcome


def _answers(outcome: Outcome, mutator: Mutator, recorded: list[bytes], count: int) -> None:
    for _ in range(count):
        data = mutator.damaged(mutator.random.choice(recorded))
        outcome.answers += 1
        begin = time.thread_time()
        try:
            read_answer(data)
            outcome.read += 1
        except UnreadableError:
            pass
        except BaseException as error:
            outcome.findings.append(f"answer {data[:200]!r}: {error!r}")
        packed = b"".join(struct.pack(">L", len(part)) + part for part in (data, b"", data))
        try:
            for _part in unpack_answers(mutator.damaged(packed)):
                pass
        except ValueError:
            pass
        except BaseException as error:
            outcome.findings.append(f"answers {data[:200]!r}: {error!r}")
        if time.thread_time() - begin > _MOST_SECONDS:
            outcome.findings.append(f"answer {data[:200]!r}: takes too long")


def _streams(outcome: Outcome, mutator: Mutator, recorded: list[bytes], count: int) -> None:
    target = Target()
    pick = mutator.random.choice
    pid = target.real.remote_call(os.getpid)

    def reads(me: int, other: int) -> Iterator[bytes]:
        for _ in range(pick((1, 3, 10))):
            whole = mutator.message(me, other, pick(recorded))
            if mutator.random.random() < 0.2:
                whole = mutator.damaged(whole)
            while whole:
                size = pick((1, 7, 22, 100, 10**6))
                yield whole[:size]
                whole = whole[size:]

    for number in range(count):
        outcome.streams += 1
        state = mutator.random.getstate()
        begin = time.monotonic()
        target.feed(reads)
        if target.crashes:
            outcome.findings.append(
                f"stream {number} (state {hash(state)}): {target.crashes.pop()}"
            )
        if time.monotonic() - begin > 6 * _MOST_SECONDS:
            outcome.findings.append(f"stream {number}: takes too long")
    outcome.admitted = target.admitted
    if target.real.remote_call(os.getpid) != pid:
        outcome.findings.append("the other host lost its connection")
    target.real.disconnect(best_effort=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1] if __doc__ else None)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    begin = time.monotonic()
    outcome = run(arguments.inputs, arguments.seed)
    print(outcome)
    print(f"seed {arguments.seed}, {time.monotonic() - begin:.0f} s")
    return 1 if outcome.findings else 0


if __name__ == "__main__":
    sys.exit(main())
