"""
An orchestrator's agent runs for months: what hundreds of connections leave behind, whether they
ended well, failed, or lost their host. Nothing, here and on the host.
"""

import collections
import collections.abc
import concurrent.futures
import contextlib
import gc
import os
import pathlib
import signal
import socket
import sys
import threading

import far_side
import mitogen.core
import mitogen.parent
import psutil
import pytest

import support
from inmanta_plugins.mitogen import ConnectError, Proxy, PythonNotFoundError, RemoteException
from inmanta_plugins.mitogen.connections.connection import Connection
from inmanta_plugins.mitogen.connections.link import Link
from pytest_inmanta_mitogen import SshHost
from support import Context
from testbed.servers import free_port

pytestmark = pytest.mark.usefixtures("idle_sockets")

# Without the site module, an interpreter starts in half the time.
LOCAL: Context = {**support.LOCAL, "python_path": [sys.executable, "-S"]}

Do = collections.abc.Callable[[], object]


@pytest.fixture
def open_proxy() -> collections.abc.Iterator[Proxy]:
    """
    A proxy that is open all the time: the router that all share lives as long as any is.
    """
    with Proxy(LOCAL) as proxy:
        proxy.run("true")
        yield proxy


def held() -> collections.Counter[str]:
    """
    How many there are of each kind of object that connections consist of.
    """
    gc.collect()
    kinds = (
        *(mitogen.core.Context, mitogen.core.Stream, mitogen.core.Side, mitogen.core.Receiver),
        *(mitogen.parent.Connection, mitogen.parent.Process, mitogen.parent.Reaper),
        *(mitogen.parent.Timer, Connection, Link, Proxy, threading.Thread),
    )
    counts: collections.Counter[str] = collections.Counter()
    for found in gc.get_objects():
        for kind in kinds:
            if isinstance(found, kind):
                counts[kind.__qualname__] += 1
    return counts


def tables(proxy: Proxy) -> dict[str, int]:
    """
    Return the sizes of all that the router of a proxy keeps.
    """
    router = proxy.context.router
    listeners = vars(router.broker).get("_signals", {})
    parts = {"": router, "monitor": router.route_monitor, "responder": router.responder}
    sizes = {
        f"{name}.{key}": len(value)
        for name, part in parts.items()
        for key, value in vars(part).items()
        # What was called on hosts is compiled and found once; that does not grow with connections.
        if isinstance(value, dict | list | set) and key not in ("_cache", "_allowed")
    }
    return sizes | {f"listener {signal}": len(funcs) for signal, funcs in listeners.items()}


def show_that_nothing_stays(
    open_proxy: Proxy,
    once: Do,
    times: int,
    *,
    warm_up: int = 5,
    threads: int = 1,
    others: collections.abc.Iterable[int] = (),
) -> None:
    """
    Do something a few times to warm up, then many times, and compare.

    :param warm_up: How many times; each kind of what it does has to be among them.
    :param threads: How many threads do it at the same time.
    :param others: Processes on the host that live on and must not hold more either.
    """
    repeat(once, warm_up, threads)
    settle(open_proxy)
    before, objects, sizes = support.Snapshot(), held(), tables(open_proxy)
    there = [support.Snapshot(pid) for pid in others]

    repeat(once, times, threads)

    settle(open_proxy)
    before.settle()
    for snapshot in there:
        snapshot.settle()
    more = held() - objects
    # What ended last may still be known until the next connection is made.
    assert all(count <= 8 for count in more.values()), more
    larger = {name: (sizes.get(name, 0), size) for name, size in tables(open_proxy).items()}
    assert all(now - was <= 4 for was, now in larger.values()), larger


def repeat(once: Do, times: int, threads: int) -> None:
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(once) for _ in range(times)]:
            done.result()


def settle(open_proxy: Proxy) -> None:
    """
    Let what ended be waited for and forgotten, which connecting something else brings about.
    """
    for _ in range(2):
        support.wait_until(
            lambda: not any(support.is_gone(child.pid) for child in psutil.Process().children()),
            "all children are waited for",
        )
        with Proxy(LOCAL) as proxy:
            proxy.run("true")


def connect_call_disconnect(context: Context) -> Do:
    def once() -> None:
        with Proxy(context) as proxy:
            assert proxy.remote_call(far_side.echo, 1) == [[1], {}]

    return once


def test_sixty_connections_leave_nothing(open_proxy: Proxy) -> None:
    show_that_nothing_stays(open_proxy, connect_call_disconnect(LOCAL), 60, threads=3)


def test_connections_through_a_hop_leave_nothing_in_it_either(open_proxy: Proxy) -> None:
    hop = {**LOCAL, "name": "hop"}
    context = {**LOCAL, "name": "behind it", "via": hop}
    with Proxy({**context, "name": "another"}) as proxy:
        in_hop = proxy.remote_call(os.getppid)
        once = connect_call_disconnect(context)
        show_that_nothing_stays(open_proxy, once, 15, others=[in_hop])
        assert proxy.remote_call(os.getppid) == in_hop
        via = support.connection_of(proxy).link.via
        assert via is not None
        sizes = via.context.call(far_side.table_sizes)
        assert all(size <= 8 for size in sizes.values()), sizes


def test_connections_over_ssh_leave_nothing(open_proxy: Proxy, host: SshHost) -> None:
    show_that_nothing_stays(open_proxy, connect_call_disconnect(host.serialized()), 6)
    support.wait_until(lambda: not host.session_pids(), "nothing runs on the host")


def test_fifty_failed_connections_leave_nothing(
    open_proxy: Proxy, host: SshHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/nonexistent")  # it may have many interpreters to look at
    silent = socket.create_server(("127.0.0.1", 0))
    failing: list[Context] = [
        {"method_name": "ssh", "hostname": "127.0.0.1", "port": free_port()},
        {"method_name": "ssh", "hostname": "host.invalid"},
        {"method_name": "local", "python_path": ["/nope/python"]},
        {"method_name": "local", "python_path": ["/bin/false"]},
        {"method_name": "sudo", "sudo_path": "/nope/sudo"},
        {**LOCAL, "python_path": ["/nope/python"], "via": LOCAL},
        {"method_name": "ssh", "hostname": "127.0.0.1", "port": silent.getsockname()[1]},
        host.serialized(username="nobody-of-that-name"),
        host.serialized(python_path=["/nope/python"]),
    ]
    failing[6]["connect_timeout"] = 0.2
    contexts = [{"name": "", **context} for context in failing]
    turns = [*range(len(contexts)), *[0, 2, 3, 4, 5] * 8] * 2
    order = iter(turns)

    def once() -> None:
        with pytest.raises((ConnectError, PythonNotFoundError)):
            Proxy(contexts[next(order)]).connect()

    with silent:
        show_that_nothing_stays(open_proxy, once, 50, warm_up=10, threads=3)
    support.wait_until(lambda: not host.session_pids(), "nothing runs on the host")


def test_hosts_killed_in_the_middle_of_a_call_leave_nothing(
    open_proxy: Proxy, host: SshHost, tmp_path: pathlib.Path
) -> None:
    trace = tmp_path / "trace"
    with Proxy(host.serialized()) as proxy, concurrent.futures.ThreadPoolExecutor(1) as pool:

        def once() -> None:
            trace.write_text("")
            call = pool.submit(proxy.remote_call, far_side.note_and_nap, str(trace), 600)
            support.wait_until(trace.read_text, "the call runs")
            host.kill_sessions()
            with pytest.raises(RemoteException):
                call.result(timeout=60)

        show_that_nothing_stays(open_proxy, once, 10)
    support.wait_until(lambda: not host.session_pids(), "nothing runs on the host")


# Interrupted


def slow_to_start(tmp_path: pathlib.Path) -> tuple[Context, pathlib.Path]:
    """
    Return a context whose interpreter is slow to start, and the file that tells that it began to.
    """
    began = tmp_path / "began"
    script = f': >{began}; sleep 0.7; exec "$0" "$@"'
    return {**LOCAL, "python_path": ["/bin/sh", "-c", script, sys.executable]}, began


@contextlib.contextmanager
def interrupted_once(began: pathlib.Path) -> collections.abc.Iterator[None]:
    """
    A KeyboardInterrupt ends the block once the file is there.
    """

    def interrupt() -> None:
        support.wait_until(began.exists, "it began")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        yield
    thread.join()


def test_an_interrupt_in_the_only_connect_leaves_nothing(tmp_path: pathlib.Path) -> None:
    before = support.Snapshot()
    context, began = slow_to_start(tmp_path)
    with interrupted_once(began):
        Proxy(context).connect()
    before.settle(20)


def test_an_interrupt_does_not_reach_others_who_wait_for_the_same_hop(
    tmp_path: pathlib.Path,
) -> None:
    hop, began = slow_to_start(tmp_path)
    proxies = [Proxy({**LOCAL, "name": f"number {n}", "via": hop}) for n in range(3)]
    before = support.Snapshot()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting: list[concurrent.futures.Future[object]] = []

        def wait_too() -> None:
            support.wait_until(began.exists, "it began")
            waiting.extend(pool.submit(proxy.connect) for proxy in proxies[1:])

        starter = threading.Thread(target=wait_too)
        starter.start()
        with interrupted_once(began):
            proxies[0].connect()
        starter.join()
        for other in waiting:
            other.result(timeout=60)
    for proxy in proxies[1:]:
        assert proxy.run("echo", ["works"])[0] == "works"
        proxy.disconnect()
    before.settle()
