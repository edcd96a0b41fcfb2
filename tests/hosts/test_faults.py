"""
What becomes of a connection, and of the calls on it, when a host, a hop, ssh or the network fails.
Each fault is caused for real.
"""

import collections.abc
import concurrent.futures
import contextlib
import logging
import multiprocessing
import os
import pathlib
import signal
import socket
import threading

import far_side
import psutil
import pytest

import support
from inmanta_plugins.mitogen import (
    CallTimeoutError,
    Cause,
    ConnectError,
    Proxy,
    RemoteException,
    settings,
)
from inmanta_plugins.mitogen.connections import hub as connect
from pytest_inmanta_mitogen import SshHost, SshHostFactory
from support import Context, call_fails_with, fails_with, freeze, kill

# A deadline against hangs: nothing here may wait for longer than its time-outs, added up.
pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.usefixtures("idle_sockets"),
    support.requires("sshd", "ssh", "ssh-keygen"),
]


LoseCall = collections.abc.Callable[[Proxy, collections.abc.Callable[[], object]], None]


@pytest.fixture
def sudo_host(
    mitogen_ssh_host_factory: SshHostFactory, trusted: support.User, python: str
) -> SshHost:
    """A host that is logged in to as a user who may do everything with sudo."""
    return mitogen_ssh_host_factory(username=trusted.name, python_path=[python])


def behind_sudo(host: SshHost) -> Context:
    """Root of the host, by way of the user who logs in."""
    sudo = {"method_name": "sudo", "name": "root", "python_path": host.python_path}
    return {**sudo, "via": host.serialized()}


@pytest.fixture
def pool() -> collections.abc.Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        yield pool


@pytest.fixture
def lose_call(tmp_path: pathlib.Path, pool: concurrent.futures.ThreadPoolExecutor) -> LoseCall:
    """
    Call a function, cause a fault while it runs, and check that the call fails and ran once.
    """
    trace = tmp_path / "trace"
    trace.touch()
    trace.chmod(0o666)  # for all users of the host

    def lose(proxy: Proxy, fault: collections.abc.Callable[[], object]) -> None:
        call = pool.submit(proxy.remote_call, far_side.note_and_nap, str(trace), 600)
        support.wait_until(trace.read_text, "the call runs")
        fault()
        with pytest.raises(RemoteException, match="whether it ran is not known"):
            call.result(timeout=60)
        assert trace.read_text() == "ran\n"

    return lose


def nothing_runs_on(host: SshHost) -> None:
    support.wait_until(lambda: not host.session_pids(), "nothing runs on the host")


# Faults


def children(command: str) -> list[int]:
    """
    Return the processes below this one that have this in their command line.
    """
    started = psutil.Process().children(recursive=True)
    return [child.pid for child in started if command in support.command_line(child.pid)]


Fault = collections.abc.Callable[[SshHost, int], object]

FAULTS: dict[str, Fault] = {
    "kill_ssh": lambda host, pid: kill(children(host.identity_file)),
    "kill_interpreter": lambda host, pid: kill([pid]),
    "reboot": lambda host, pid: host.restart(),
}
"""What can be done to a host, and to the interpreter there by its process id."""
each_fault = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)


def lost(proxy: Proxy) -> None:
    """Wait until this side can know that the connection is lost."""
    connection = support.connection_of(proxy)
    support.wait_until(lambda: not connection.link.alive, "the connection is lost")


@each_fault
def test_a_connection_lost_between_calls_is_made_anew(host: SshHost, fault: Fault) -> None:
    before = support.Snapshot()
    with Proxy(host.serialized()) as proxy:
        pid = proxy.remote_call(os.getpid)
        fault(host, pid)
        lost(proxy)
        assert proxy.remote_call(os.getpid) != pid
        assert proxy.run("echo", ["back"])[0] == "back"
    if fault is not FAULTS["reboot"]:  # the server is a new process then
        before.settle()
    nothing_runs_on(host)


@each_fault
def test_a_call_under_way_fails_and_is_not_repeated(
    host: SshHost, lose_call: LoseCall, fault: Fault
) -> None:
    with Proxy(host.serialized()) as proxy:
        pid = proxy.remote_call(os.getpid)
        lose_call(proxy, lambda: fault(host, pid))
        assert proxy.run("echo", ["back"])[0] == "back"
    nothing_runs_on(host)


def test_a_client_killed_just_before_a_call_does_not_cost_it(host: SshHost) -> None:
    with Proxy(host.serialized()) as proxy:
        for _ in range(3):
            proxy.run("true")
            # Not waited for by anyone but the kernel: this side finds out by the call itself.
            kill(children(host.identity_file))
            assert proxy.run("echo", ["back"])[0] == "back"


def test_a_server_that_is_down_fails_each_call_until_it_is_back(host: SshHost) -> None:
    with Proxy(host.serialized()) as proxy:
        proxy.run("true")
        host.stop()
        lost(proxy)
        held = support.Snapshot()
        for _ in range(2):
            call_fails_with(Cause.REFUSED, proxy)
            held.settle()
        host.start()
        assert proxy.run("echo", ["back"])[0] == "back"


# Hosts that hang


def test_a_frozen_host_is_found_by_the_call_timeout(host: SshHost) -> None:
    with Proxy(host.serialized(connect_timeout=1), call_timeout=30) as proxy:
        proxy.run("true")
        host.freeze()
        proxy.call_timeout = 0.5
        with pytest.raises(CallTimeoutError):
            proxy.run("true")
        call_fails_with(Cause.TIMEOUT, proxy)
        host.thaw()
        proxy.call_timeout = 30
        # A second is little for ssh on a busy machine.
        proxy.serialized_context["connect_timeout"] = 30
        assert proxy.run("echo", ["back"])[0] == "back"
    nothing_runs_on(host)


def test_a_frozen_host_is_found_by_keepalive_without_a_call_timeout(
    host: SshHost, lose_call: LoseCall
) -> None:
    keepalive = {"keepalive_enabled": True, "keepalive_interval": 1, "keepalive_count": 1}
    with Proxy(host.serialized(**keepalive)) as proxy:
        lose_call(proxy, host.freeze)
        host.thaw()
        assert proxy.run("echo", ["back"])[0] == "back"


def test_a_call_timeout_below_the_time_to_connect_lets_calls_through(host: SshHost) -> None:
    slow = ["/bin/sh", "-c", 'sleep 2; exec "$0" "$@"', *host.python_path]
    with Proxy(host.serialized(python_path=slow)) as proxy:
        pid = proxy.remote_call(os.getpid)
        # Much for a call, and less than connecting takes.
        proxy.call_timeout = 1.5
        kill([pid])
        lost(proxy)
        assert proxy.remote_call(os.getpid) != pid


def test_a_port_that_never_answers_costs_no_more_than_the_connect_timeout() -> None:
    before = support.Snapshot()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        context = {"method_name": "ssh", "name": "", "hostname": "127.0.0.1", "connect_timeout": 1}
        fails_with(Cause.TIMEOUT, {**context, "port": silent.getsockname()[1]})
    before.settle()


# Hops


def of_the_hop(proxy: Proxy) -> int:
    """Return the process of the interpreter that the proxy's own was started from."""
    via = support.connection_of(proxy).link.via
    assert via is not None
    pid: int = via.context.call(os.getpid)
    return pid


@pytest.mark.parametrize("which", ["hop", "interpreter"])
def test_a_lost_hop_is_made_anew_and_no_call_is_repeated(
    sudo_host: SshHost, lose_call: LoseCall, which: str
) -> None:
    with Proxy(behind_sudo(sudo_host)) as proxy:
        pids = {"interpreter": proxy.remote_call(os.getpid), "hop": of_the_hop(proxy)}
        lose_call(proxy, lambda: kill([pids[which]]))
        assert proxy.run("id", ["-un"])[0] == "root"
        assert (of_the_hop(proxy) == pids["hop"]) == (which == "interpreter")
    nothing_runs_on(sudo_host)
    support.wait_until(lambda: support.is_gone(pids["interpreter"]), "root's interpreter is gone")


def test_an_interpreter_frozen_behind_a_hop_is_killed_and_the_hop_stays(sudo_host: SshHost) -> None:
    with Proxy(behind_sudo(sudo_host), call_timeout=30) as proxy:
        pid, hop = proxy.remote_call(os.getpid), of_the_hop(proxy)
        freeze(pid)
        proxy.call_timeout = 0.5
        with pytest.raises(CallTimeoutError):
            proxy.run("true")
        proxy.call_timeout = 30
        assert proxy.run("id", ["-un"])[0] == "root"
        assert of_the_hop(proxy) == hop
        support.wait_until(lambda: support.is_gone(pid), "the frozen one is gone")
    nothing_runs_on(sudo_host)


def test_a_hung_call_behind_a_hop_leaves_nothing_of_its_command(
    sudo_host: SshHost, tmp_path: pathlib.Path
) -> None:
    noted = tmp_path / "pid"
    with Proxy(behind_sudo(sudo_host), call_timeout=30) as proxy:
        proxy.run("true")
        proxy.call_timeout = 2
        with pytest.raises(CallTimeoutError):
            proxy.run("sh", ["-c", f"echo $$ >{noted}; sleep 600"])
        proxy.call_timeout = 30
        assert proxy.run("id", ["-un"])[0] == "root"
        command = int(noted.read_text())
        support.wait_until(lambda: support.is_gone(command), "the command is gone")


def test_a_frozen_hop_is_found_by_all_behind_it(
    sudo_host: SshHost,
    pool: concurrent.futures.ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(settings, "HOP_GRACE", 0.5)
    contexts = [{**behind_sudo(sudo_host), "connect_timeout": 30, "name": f"r{n}"} for n in "12"]
    with Proxy(contexts[0]) as first, Proxy(contexts[1]) as second:
        hop = of_the_hop(first)
        freeze(hop)
        for proxy in (first, second):
            proxy.call_timeout = 0.5
            proxy.serialized_context["connect_timeout"] = 1
        for call in [pool.submit(proxy.run, "true") for proxy in (first, second)]:
            # Nothing is wrong with the interpreters, but nothing gets through to them.
            with pytest.raises(RemoteException):
                call.result(timeout=60)
        for proxy in (first, second):
            proxy.call_timeout = 30
            with contextlib.suppress(RemoteException):  # one of them finds that the hop is silent
                proxy.run("true")
            proxy.serialized_context["connect_timeout"] = 30
            assert proxy.run("id", ["-un"])[0] == "root"
    # Nobody from outside can end what is frozen, but it has to go as soon as it goes on.
    os.kill(hop, signal.SIGCONT)
    nothing_runs_on(sudo_host)


def test_the_crash_of_the_thread_that_serves_all_hosts_costs_one_reconnect(host: SshHost) -> None:
    def crash() -> None:
        raise AssertionError("on purpose")

    with Proxy(beside(host, 1)) as one, Proxy(beside(host, 2)) as other:
        support.connection_of(one).link.router.broker.defer(crash)
        lost(one)
        assert one.run("echo", ["back"])[0] == "back"
        assert other.run("echo", ["back"])[0] == "back"


# Many at once


def test_one_proxy_over_ssh_serves_many_threads(
    host: SshHost, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    with Proxy(host.serialized()) as proxy:
        answers = list(pool.map(lambda n: proxy.remote_call(far_side.echo, n), range(640)))
    assert answers == [[[n], {}] for n in range(640)]


def beside(host: SshHost, number: int) -> Context:
    """Return a context of its own on a host that many share."""
    return {
        "method_name": "local",
        "name": f"number {number}",
        "python_path": host.python_path,
        "via": host.serialized(),
    }


def test_forked_children_connect_for_themselves_while_the_parent_works(
    host: SshHost, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    stop = threading.Event()

    def call(proxy: Proxy) -> None:
        while not stop.is_set():
            proxy.run("true")

    def come_and_go() -> None:
        while not stop.is_set():
            with Proxy(beside(host, 1)) as other:
                other.run("true")

    with Proxy(beside(host, 0)) as proxy:
        pid = proxy.remote_call(os.getpid)
        workers = [pool.submit(call, proxy), pool.submit(come_and_go), pool.submit(come_and_go)]
        answers = []
        try:
            for _ in range(2):
                answers.append(in_a_child(lambda: proxy.remote_call(os.getpid)))
        finally:
            stop.set()
        for worker in workers:
            worker.result(timeout=60)
        assert len({*answers, pid}) == 3
        assert proxy.remote_call(os.getpid) == pid
    nothing_runs_on(host)


def in_a_child(work: collections.abc.Callable[[], int]) -> int:
    """Return what a function returns in a fork of this process."""
    forks = multiprocessing.get_context("fork")
    answers, answer = forks.Pipe(duplex=False)

    def run() -> None:
        answer.send(work())
        # As a process that exits: the connections that the child itself made end here.
        connect.HUB.end()

    with answers, answer:
        child = forks.Process(target=run)
        child.start()
        try:
            assert answers.poll(60), "it hangs or failed"
            found: int = answers.recv()
        finally:
            child.join(10)
            child.kill()
            child.join()
    return found


def test_a_forked_child_writes_to_no_log_before_it_runs(proxy: Proxy) -> None:
    # Another thread may hold the lock of the log's file when the process forks.
    parent = os.getpid()

    class FailsInAChild(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if os.getpid() != parent:
                os._exit(7)

    handler, logger = FailsInAChild(), logging.getLogger("mitogen")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        child = os.fork()
        if not child:
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
    assert logging.root.manager.disable == logging.NOTSET


def test_many_threads_on_a_dead_host_share_one_attempt_to_reconnect(
    host: SshHost, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    with Proxy(host.serialized(connect_timeout=1)) as proxy:
        proxy.run("true")
        host.stop()
        lost(proxy)
        with socket.create_server((host.hostname, host.port), backlog=64) as silent:
            calls = [pool.submit(proxy.run, "true") for _ in range(32)]
            for call in calls:
                error = call.exception(timeout=60)
                assert isinstance(error, RemoteException)
                assert isinstance(error.remote_exception, ConnectError)
            silent.setblocking(False)
            attempts = 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    silent.accept()[0].close()
                    attempts += 1
        assert 1 <= attempts < 8
