"""Connect a context hop by hop, and tell what each hop is or why it cannot be reached.

This is what ``python -m inmanta_plugins.mitogen check`` does.
"""

import contextlib
import os
import secrets
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import inmanta_mitogen.facts
import mitogen.core
import mitogen.parent
from inmanta_plugins.mitogen.connections.programs import starting
from inmanta_plugins.mitogen.contexts.options import is_auto
from inmanta_plugins.mitogen.errors import ConnectError, PythonNotFoundError, RemoteException
from inmanta_plugins.mitogen.proxy import Proxy
from inmanta_plugins.mitogen.texts import bounded_text, describe_hop, hops_of

ROUND_TRIPS = 5
"""How many calls the round-trip time is the median of."""
SPEED_SIZE = 8_000_000
"""How much is written and read to measure the throughput, in bytes."""

PYTHON_ADVICE = "Set the python_path of the context, or the python_cmd of the host's std::OS."
"""What to do when the host has no Python at the configured path."""
_CALL_ADVICE = "The hop was connected, and then a call failed: read what came back."

Report = dict[str, Any]
"""
What was found out about one hop. Always: ``hop``, ``works``, ``command`` and ``seconds`` (to
connect it, with the hops before it, or to fail). Of one that works: what
:func:`inmanta_mitogen.facts.facts` returns, ``round_trip_ms``, and ``put_mb_s`` and ``read_mb_s``
where these were measured. Of one that does not: ``cause``, ``detail`` and ``advice``.
"""


def check_hops(
    serialized_context: Mapping[str, Any], *, timeout: float, speed: bool = False
) -> Iterator[Report]:
    """
    Connect each hop of a context in turn, until one fails.

    :param serialized_context: A valid serialized context.
    :param timeout: How long each call to a connected hop may take, in seconds.
    :param speed: Whether to measure the throughput of the last hop.
    :return: A report for each hop that was tried.
    """
    hops = hops_of(serialized_context)
    python = sys.executable
    # All stay open to the end, so that the next hop is connected through what is there.
    with contextlib.ExitStack() as opened:
        for hop in hops:
            report: Report = {"hop": describe_hop(hop), "command": command_line(hop, python)}
            proxy = Proxy(dict(hop), call_timeout=timeout)
            opened.callback(proxy.disconnect, timeout=2.0, best_effort=True)
            started = time.monotonic()
            try:
                proxy.connect()
                report["seconds"] = time.monotonic() - started
                report |= _examine(proxy, speed and hop is hops[-1])
            except (ConnectError, PythonNotFoundError, RemoteException) as error:
                report["seconds"] = time.monotonic() - started
                report |= _explain(error)
            yield report
            if not report["works"]:
                return
            python = report["python"]


def _examine(proxy: Proxy, speed: bool) -> Report:
    facts: Report = dict(proxy.remote_call(inmanta_mitogen.facts.facts))
    path = f"{facts['tmp']}/inmanta-mitogen-{secrets.token_hex(8)}"
    trips = [_timed(proxy.remote_call, os.getpid) for _ in range(ROUND_TRIPS)]
    report: Report = {"works": True, "round_trip_ms": statistics.median(trips) * 1000}
    # The host wrote these texts.
    report |= {key: bounded_text(v, 200) if type(v) is str else v for key, v in facts.items()}
    if speed and facts["tmp"]:
        try:
            report["put_mb_s"] = SPEED_SIZE / 1e6 / _timed(proxy.put, path, os.urandom(SPEED_SIZE))
            report["read_mb_s"] = SPEED_SIZE / 1e6 / _timed(proxy.read_binary, path)
        finally:
            if proxy.file_exists(path):
                proxy.remove(path)
    return report


def _timed(method: Any, *args: object) -> float:
    started = time.monotonic()
    method(*args)
    return time.monotonic() - started


def _explain(error: ConnectError | PythonNotFoundError | RemoteException) -> Report:
    if isinstance(error, ConnectError):
        cause, detail, advice = error.cause.name, error.detail, error.cause.value
    elif isinstance(error, PythonNotFoundError):
        cause, detail, advice = "PYTHON_NOT_FOUND", str(error), PYTHON_ADVICE
    else:
        cause, detail, advice = "CALL_FAILED", bounded_text(str(error), 2000), _CALL_ADVICE
    return {"works": False, "cause": cause, "detail": detail, "advice": advice}


def command_line(serialized_context: Mapping[str, Any], python: str) -> str:
    """
    Return the shell command that starts the interpreter of a context from the agent's machine, and
    has it print its version. It holds no secret. Empty where there is no such command.

    :param serialized_context: A valid serialized context.
    :param python: The interpreter that the last hop is connected from, which is the default of
        some methods.
    """
    *_, hop = hops = hops_of(serialized_context)
    if any(each["method_name"] == "setns" for each in hops):
        return ""  # mitogen enters the namespaces itself
    argv = [*_python_argv(hop, python), "-V"]
    try:
        for each in reversed(hops):
            argv = starting(each, argv)
    except mitogen.core.Error:
        return ""  # mitogen does not take these options, which connecting tells
    return shlex.join(argv)


def _python_argv(hop: Mapping[str, Any], python: str) -> list[str]:
    given = hop.get("python_path")
    if is_auto(given):
        return ["python3"]
    if given:
        return list(given) if isinstance(given, list | tuple) else [str(given)]
    default = mitogen.parent.get_connection_class(hop["method_name"]).options_class.python_path
    return [python if default == mitogen.parent.Options.python_path else default]
