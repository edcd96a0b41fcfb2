"""What the connections of a process share, and what a connection that fails leaves behind."""

import concurrent.futures
import logging
import os
import pathlib
import signal
import sys
import threading

import hostile_side
import mitogen.core
import mitogen.master
import pytest

import support
from inmanta_plugins.mitogen import (
    Cause,
    ConnectError,
    Proxy,
    PythonNotFoundError,
    build_context,
    context_hash,
    settings,
)
from pytest_inmanta_mitogen import SshHost, SshHostFactory
from support import LOCAL, Context, fails_with
from testbed.servers import free_port

pytestmark = pytest.mark.usefixtures("idle_sockets", "nothing_left")


def behind(hop: Context, **options: object) -> Context:
    """Return a context of its own behind a hop, which needs no privileges."""
    return {**LOCAL, **options, "via": hop}


# build_context


def router() -> mitogen.master.Router:
    # Mitogen's watcher of the main thread would stay forever.
    return mitogen.master.Router(mitogen.master.Broker(install_watcher=False))


def test_a_context_can_be_built_on_any_router() -> None:
    serialized = behind(LOCAL, name="inner")
    copy = {**serialized}
    with router() as own_router:
        context = build_context(serialized, router=own_router)
        assert context.call(os.getppid) == context.via.call(os.getpid)
    assert serialized == copy


def test_a_failing_build_ends_the_hops_it_has_made() -> None:
    serialized = behind(LOCAL, python_path=["/nope/python"])
    with router() as own_router:
        held = support.Snapshot()
        with pytest.raises(PythonNotFoundError, match="/nope/python"):
            build_context(serialized, router=own_router)
        held.settle()


def test_equal_contexts_have_equal_hashes() -> None:
    assert context_hash({"b": 1, "a": [1]}) == context_hash({"a": [1], "b": 1})
    assert context_hash({"b": 1, "a": [1]}) == "3487d6e4b7997f431c700fe1832a53b7"
    assert context_hash(LOCAL) != context_hash(behind(LOCAL))


# Hops that are shared


def test_contexts_behind_one_host_authenticate_once(mitogen_ssh_host: SshHost) -> None:
    hop = mitogen_ssh_host.serialized()
    logins = mitogen_ssh_host.logins()
    proxies = [Proxy(behind(hop, remote_name=f"number-{number}")) for number in range(6)]
    others = threading.enumerate()
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        list(pool.map(Proxy.connect, proxies))
    threads = [thread.name for thread in threading.enumerate() if thread not in others]
    assert threads == ["mitogen.broker"]
    parents = {proxy.remote_call(os.getppid) for proxy in proxies}
    interpreters = {proxy.remote_call(os.getpid) for proxy in proxies}
    for proxy in proxies:
        proxy.disconnect()
    assert len(parents) == 1
    assert len(interpreters) == 6
    assert mitogen_ssh_host.logins() == logins + 1


def test_a_hop_that_cannot_be_connected_fails_all_who_wait_for_it() -> None:
    hop = {"method_name": "ssh", "name": "", "hostname": "127.0.0.1", "port": free_port()}
    proxies = [Proxy(behind(hop)) for _ in range(4)]

    def failure(proxy: Proxy) -> BaseException | None:
        return pool.submit(proxy.connect).exception(timeout=30)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        failures = list(pool.map(failure, proxies))
    for error in failures:
        assert isinstance(error, ConnectError)
        assert error.cause is Cause.REFUSED


def test_a_frozen_hop_is_cut_off_in_bounded_time(
    mitogen_ssh_host_factory: SshHostFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "HOP_GRACE", 0.5)
    host = mitogen_ssh_host_factory()
    hop = host.serialized()
    late = Proxy(behind(hop, connect_timeout=1))
    with Proxy(behind(hop), call_timeout=20) as early:
        early.run("true")
        host.freeze()
        with pytest.raises(ConnectError, match="did not answer") as caught:
            late.connect()
        assert caught.value.cause is Cause.HOP_LOST
        host.thaw()
        assert early.run("echo", ["back"])[0] == "back"
        with late:
            assert late.run("echo", ["there"])[0] == "there"


# The router of the process


def test_the_last_connection_ends_the_router() -> None:
    others = threading.enumerate()

    def ours() -> list[str]:
        return [
            thread.name
            for thread in threading.enumerate()
            if "mitogen" in thread.name and thread not in others
        ]

    with Proxy(LOCAL) as proxy:
        assert ours() == ["mitogen.broker"]
        proxy.run("true")
    assert ours() == []


def test_hosts_cannot_send_messages_to_each_other() -> None:
    with Proxy(LOCAL) as one, Proxy(LOCAL) as other:
        assert one.context.router is other.context.router
        call = mitogen.core.Message.pickled((None, "os", None, "getpid", (), {})).data
        target = {"dst": other.context.context_id}
        dead, reason = one.remote_call(hostile_side.ask, mitogen.core.CALL_FUNCTION, call, **target)
        assert dead
        assert b"a host reaches only its agent" in reason


def test_mitogen_is_quiet_in_a_log_at_debug_unless_told_otherwise(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def records() -> list[logging.LogRecord]:
        caplog.clear()
        with Proxy(LOCAL) as proxy:
            proxy.run("true")
        return [record for record in caplog.records if record.name.startswith("mitogen")]

    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.NOTSET, logger="mitogen")
    assert not records()
    caplog.set_level(logging.DEBUG, logger="mitogen")
    assert records()


# Failing connections


def test_a_hop_ends_with_the_last_who_uses_it() -> None:
    hop = {**LOCAL, "name": "hop"}
    with Proxy(LOCAL):  # so that the end of all connections is not what ends it
        with Proxy(behind(hop)) as last:
            with Proxy(behind(hop)) as first:
                pid = first.remote_call(os.getppid)
            assert last.remote_call(os.getppid) == pid
        support.wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "the hop has ended")


def test_a_failed_connection_says_who_what_and_what_to_do() -> None:
    port = free_port()
    context = {"method_name": "ssh", "name": "web1", "hostname": "127.0.0.1", "port": port}
    error = fails_with(Cause.REFUSED, {**context, "username": "probe"})
    assert error.hop == f"web1 (ssh probe@127.0.0.1:{port})"
    assert (error.method, error.address, error.user) == ("ssh", f"127.0.0.1:{port}", "probe")
    assert str(error).startswith(f"Cannot connect to {error.hop}: ssh: connect to host 127.0.0.1")
    assert str(error).endswith("Check that an ssh server listens at that address and port.")
    assert isinstance(error, mitogen.core.StreamError)


@pytest.mark.parametrize("via", [False, True])
def test_a_host_that_fails_in_another_encoding_is_heard(
    via: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "HOP_GRACE", 0.2)
    python_path = ["/bin/sh", "-c", r"printf 'pas trouv\351\n'; exit 9"]
    serialized: Context = {**LOCAL, "python_path": python_path, "connect_timeout": 1}
    if via:
        serialized["via"] = LOCAL
    with pytest.raises(ConnectError, match="did not answer" if via else "status 9"):
        Proxy(serialized).connect()


def test_a_program_that_is_not_there_is_named() -> None:
    context = {"method_name": "sudo", "sudo_path": "/nope/sudo"}
    error = fails_with(Cause.PROGRAM_MISSING, context)
    assert "/nope/sudo" in str(error)


@pytest.mark.timeout(30)
def test_a_process_that_holds_the_connection_open_does_not_hold_up_its_end(
    tmp_path: pathlib.Path,
) -> None:
    script = f'sleep 60 & echo $! >{tmp_path}/pid; exec "$0" "$@"'
    context = {**LOCAL, "python_path": ["/bin/sh", "-c", script, sys.executable]}
    proxy = Proxy(context)
    proxy.connect()
    assert proxy.file_exists("/")
    try:
        proxy.disconnect(timeout=60)
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
