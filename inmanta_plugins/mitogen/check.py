"""Connect a context hop by hop, and tell what each hop is or why it cannot be reached.

This is what ``python -m inmanta_plugins.mitogen check`` does.
"""

import os
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import inmanta_mitogen.facts
import mitogen.core
from inmanta_plugins.mitogen.connections.hub import HUB
from inmanta_plugins.mitogen.connections.link import Link, value_of
from inmanta_plugins.mitogen.connections.programs import shown_command
from inmanta_plugins.mitogen.errors import (
    SET_PYTHON_PATH,
    Cause,
    PythonNotFoundError,
    RemoteException,
)
from inmanta_plugins.mitogen.proxy import Proxy
from inmanta_plugins.mitogen.texts import describe_hop, hops_of

ROUND_TRIPS = 5
"""How many calls the round-trip time is the median of."""
SPEED_SIZE = 8_000_000
"""How much is written and read to measure the throughput, in bytes."""

Report = dict[str, Any]
"""
What is known of a hop: always ``hop``, ``command``, ``works`` and ``seconds`` (to connect it, or to
fail). Of one that works also what :func:`inmanta_mitogen.facts.facts` returns, ``round_trip_ms``,
and, where measured, ``put_mb_s`` and ``read_mb_s``; else ``cause``, ``detail`` and ``advice``.
"""
Finding = tuple[str, str, Report]
"""A label, the text to show after it, and what it adds to the report of the hop."""

_FAILURES = (PythonNotFoundError, RemoteException, mitogen.core.Error)


def check_hops(
    serialized_context: Mapping[str, Any], timeout: float, speed: bool
) -> Iterator[Finding]:
    """
    Connect each hop of a context in turn, until one fails.

    :param serialized_context: A valid serialized context.
    :param timeout: How long each call to a connected hop may take, in seconds.
    :param speed: Whether to measure the throughput of the last hop.
    :return: What is found, as soon as it is known; the label ``hop`` begins the next hop.
    """
    hops = hops_of(serialized_context)
    python = sys.executable
    link: Link | None = None
    router = HUB.enter()
    try:
        for hop in hops:
            yield "hop", describe_hop(hop), {"hop": describe_hop(hop)}
            command = shown_command(hop, python)
            yield "command", command, {"command": command}
            started = time.monotonic()
            try:
                link = Link(hop, via=link, router=router)
                seconds = time.monotonic() - started
                yield "connected", f"after {seconds:.2f} s", {"works": True, "seconds": seconds}
                link.prepare(hop)
                facts = _call(link, timeout, inmanta_mitogen.facts.facts)
                python = facts["python"]
                yield from _show(facts)
                yield _round_trip(link, timeout)
                if speed and hop is hops[-1] and facts["tmp"]:
                    yield _throughput(hop, timeout, facts["tmp"])
            except _FAILURES as error:
                seconds = time.monotonic() - started
                yield from _explain((link and link.failure) or error, seconds)
                return
    finally:
        HUB.leave(None)


def _show(facts: Report) -> Iterator[Finding]:
    yield "user", facts["user"], facts
    yield "Python", f"{facts['version']}, {facts['python']}", {}
    where = f"{facts['tmp']}, writable" if facts["tmp"] else "none is writable"
    yield "temporary", f"{where}, {facts['tmp_free'] / 2**30:.1f} GiB free", {}


def _seconds(function: Callable[..., object], *args: object) -> float:
    started = time.monotonic()
    function(*args)
    return time.monotonic() - started


def _call(link: Link, timeout: float, function: Callable[[], object]) -> Any:
    link.allow(function)
    return value_of(link.context.call_async(function).get(timeout=timeout))


def _round_trip(link: Link, timeout: float) -> Finding:
    trips = [_seconds(_call, link, timeout, os.getpid) for _ in range(ROUND_TRIPS)]
    ms = statistics.median(trips) * 1000
    return "round trip", f"{ms:.1f} ms", {"round_trip_ms": ms}


def _throughput(hop: Mapping[str, Any], timeout: float, folder: str) -> Finding:
    path, content = f"{folder}/inmanta-mitogen-{secrets.token_hex(8)}", os.urandom(SPEED_SIZE)
    with Proxy(dict(hop), call_timeout=timeout) as proxy:
        put = SPEED_SIZE / 1e6 / _seconds(proxy.put, path, content)
        read = SPEED_SIZE / 1e6 / _seconds(proxy.read_binary, path)
        proxy.remove(path)
    text = f"put {put:.1f} MB/s, read {read:.1f} MB/s"
    return "throughput", text, {"put_mb_s": put, "read_mb_s": read}


def _explain(error: Exception, seconds: float) -> Iterator[Finding]:
    known: Cause = getattr(error, "cause", Cause.OTHER)
    detail = str(getattr(error, "detail", error)).strip()
    if isinstance(error, mitogen.core.TimeoutError):  # of a call; it has no text
        known, detail = Cause.TIMEOUT, "The hop was connected, and then did not answer a call."
    cause, advice = known.name, known.value
    if isinstance(error, PythonNotFoundError):
        cause, advice = "PYTHON_NOT_FOUND", SET_PYTHON_PATH
        detail = f"No such python interpreter: {error.missing}\n{error.found}".strip()
    yield "failed", f"{cause}, after {seconds:.2f} s", {"works": False, "seconds": seconds}
    yield "came back", detail, {"cause": cause, "detail": detail}
    yield "advice", advice, {"advice": advice}
