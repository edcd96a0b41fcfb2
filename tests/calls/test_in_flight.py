"""Calls that are submitted: each as if it were made alone, and many of them in one message."""

import concurrent.futures
import os
import sys
import threading
from pathlib import Path

import far_side
import pytest

from inmanta_mitogen.dispatch import CHUNK_SIZE, WHOLE
from inmanta_plugins.mitogen import CallTimeoutError, Proxy, RemoteException, settings
from inmanta_plugins.mitogen.connections.connection import Connection
from support import LOCAL, Recorder, connection_of, together


def test_submitted_calls_give_their_results_in_order(proxy: Proxy, recorder: Recorder) -> None:
    futures = [proxy.submit(far_side.echo, number, key=number) for number in range(300)]
    assert not futures[-1].cancel()
    assert [future.result(60) for future in futures] == [
        [[number], {"key": number}] for number in range(300)
    ]
    assert [call["kwargs"] for call in recorder.calls] == [{"key": n} for n in range(300)]
    assert {str(call["function"]) for call in recorder.calls} == {"far_side.echo"}
    assert all("result" in call for call in recorder.calls)


def test_many_calls_in_flight_take_one_thread(proxy: Proxy) -> None:
    before = threading.active_count()
    futures = [proxy.submit(far_side.nap, 0.005) for _ in range(100)]
    assert threading.active_count() - before <= 1
    assert len(concurrent.futures.wait(futures, timeout=60).done) == 100


def test_a_submitted_call_raises_what_a_call_would(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "SECONDS_BETWEEN_CHECKS", 0.1)  # how long the threads stay
    with pytest.raises(TypeError, match="<lambda> cannot be called"):
        proxy.submit(lambda: None).result(60)
    with pytest.raises(TypeError, match="argument 1 of far_side.echo"):
        proxy.submit(far_side.echo, object()).result(60)
    with pytest.raises(RuntimeError, match="not connected"):
        Proxy(dict(LOCAL)).submit(far_side.echo).result(60)


def test_calls_in_flight_when_the_host_is_lost_fail_and_are_not_repeated(
    own_proxy: Proxy, recorder: Recorder, tmp_path: Path
) -> None:
    traces = [tmp_path / f"trace-{number}" for number in range(5)]
    futures = [own_proxy.submit(far_side.note_and_die, str(trace)) for trace in traces]
    for future in futures:
        with pytest.raises(RemoteException, match="the connection was lost"):
            future.result(60)
    # One that was submitted after the loss may have run as well, on a new connection.
    assert traces[0].read_text() == "ran\n"
    assert {trace.read_text() for trace in traces if trace.exists()} == {"ran\n"}
    assert ["exception" in call for call in recorder.calls] == [True] * 5
    assert own_proxy.submit(far_side.echo, 1).result(60) == [[1], {}]


def test_a_submitted_call_that_takes_too_long_is_terminated() -> None:
    with Proxy(dict(LOCAL), call_timeout=1.0) as proxy:
        proxy.remote_call(far_side.echo)
        late = proxy.submit(far_side.nap, 600)
        behind = proxy.submit(far_side.echo, 1)
        with pytest.raises(CallTimeoutError, match=r"far_side\.nap did not end"):
            late.result(60)
        with pytest.raises(RemoteException):
            behind.result(60)
        assert proxy.submit(far_side.echo, 1).result(60) == [[1], {}]


# In one message


def test_calls_that_come_together_are_sent_in_one_message(
    proxy: Proxy, messages: list[int]
) -> None:
    with together(proxy):
        futures = [proxy.submit(far_side.echo, number) for number in range(100)]
    assert [future.result(60) for future in futures] == [[[n], {}] for n in range(100)]
    assert len(messages) == 1


def test_large_calls_do_not_become_one_larger_message(proxy: Proxy, messages: list[int]) -> None:
    large = "x" * (CHUNK_SIZE // 3)
    with together(proxy):
        futures = [proxy.submit(far_side.echo, large, number) for number in range(10)]
    assert [future.result(60) for future in futures] == [[[large, n], {}] for n in range(10)]
    assert len(messages) == 5
    assert max(messages) < CHUNK_SIZE * 1.1


def test_large_results_come_back_in_order(proxy: Proxy) -> None:
    sizes = [WHOLE * 2, 1, CHUNK_SIZE // 2, CHUNK_SIZE // 2, CHUNK_SIZE * 2, 1, WHOLE + 1]
    with together(proxy):
        futures = [proxy.submit(far_side.large, size) for size in sizes]
    assert [len(future.result(60)) for future in futures] == sizes


def test_an_answer_does_not_wait_for_the_calls_behind_it(proxy: Proxy) -> None:
    with together(proxy):
        quick = proxy.submit(far_side.echo, "quick")
        hanging = proxy.submit(far_side.nap, 600)
    assert quick.result(60) == [["quick"], {}]
    assert not hanging.done()
    proxy.disconnect(timeout=0.1, best_effort=True)
    with pytest.raises(RemoteException):
        hanging.result(60)


def test_each_of_several_calls_fails_for_itself(proxy: Proxy, recorder: Recorder) -> None:
    with together(proxy):
        failing = proxy.submit(far_side.fail, "oops")
        unsendable = proxy.submit(far_side.unsendable)
        unreadable = proxy.submit(far_side.unreadable)
        fine = proxy.submit(far_side.echo, "fine")
    with pytest.raises(RemoteException, match="oops") as raised:
        failing.result(60)
    assert raised.value.remote_type == "builtins.ValueError"
    assert "oops" in str(recorder.calls[0]["exception"])
    with pytest.raises(RemoteException, match="cannot be sent to the agent"):
        unsendable.result(60)
    with pytest.raises(RemoteException, match="cannot be read"):
        unreadable.result(60)
    assert fine.result(60) == [["fine"], {}]


def test_a_call_has_the_arguments_of_when_it_was_submitted(proxy: Proxy) -> None:
    numbers = [1]
    with together(proxy):
        future = proxy.submit(far_side.echo, numbers)
        numbers.append(2)
    assert future.result(60) == [[[1]], {}]


def test_arguments_too_large_are_refused(
    open_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 1024 * 1024
    open_proxy.disconnect()  # what is open has the limit of when it was opened
    monkeypatch.setenv(settings.MAX_MESSAGE_SIZE_ENV_VAR, str(most))
    with Proxy(dict(LOCAL)) as proxy:
        assert len(proxy.submit(far_side.echo, "x" * (most - 2000)).result(60)[0][0]) == most - 2000
        with pytest.raises(ValueError, match="move the content with Proxy.put"):
            proxy.submit(far_side.echo, "x" * most).result(60)
        with pytest.raises(ValueError, match=rf"at most {most}.*put"):
            proxy.remote_call(far_side.echo, bytes(most))
        assert len(proxy.remote_call(far_side.large, 3 * most)) == 3 * most


def test_what_can_not_be_sent_fails_for_itself(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = proxy.remote_call(os.getpid)

    def no_room(self: Connection, message: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "post", no_room)
        for future in [proxy.submit(far_side.echo, number) for number in range(3)]:
            with pytest.raises(RemoteException, match="could not be sent.*no room"):
                future.result(60)
    assert proxy.submit(os.getpid).result(60) == pid


def test_a_callback_that_exits_does_not_stop_later_calls(proxy: Proxy) -> None:
    first = proxy.submit(far_side.nap, 0.1)
    first.add_done_callback(lambda _: sys.exit(1))
    assert first.result(60) == 0.1
    assert proxy.submit(far_side.echo, 1).result(60) == [[1], {}]


def test_a_thread_that_cannot_start_fails_its_call(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        refused = proxy.submit(far_side.echo, 1)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        refused.result(60)
    assert proxy.submit(far_side.echo, 2).result(60) == [[2], {}]


def lose_unseen(proxy: Proxy) -> None:
    """End the connection when the broker's thread gets to it, and not before."""
    link = connection_of(proxy).link
    link.router.disconnect_stream(link.router.stream_by_id(link.context.context_id))


def test_calls_that_never_left_are_made_once_anew(
    own_proxy: Proxy, recorder: Recorder, tmp_path: Path
) -> None:
    pid = own_proxy.remote_call(os.getpid)
    notes = [tmp_path / f"note-{number}" for number in range(5)]
    with together(own_proxy):
        lose_unseen(own_proxy)
        futures = [own_proxy.submit(far_side.note_and_nap, str(note), 0) for note in notes]
    for future in futures:
        future.result(60)
    assert [note.read_text() for note in notes] == ["ran\n"] * 5
    assert own_proxy.remote_call(os.getpid) != pid
    assert sum("was lost" in message for _, message, _ in recorder.records) == 1


def test_calls_that_never_left_share_one_failure(own_proxy: Proxy, recorder: Recorder) -> None:
    with together(own_proxy):
        lose_unseen(own_proxy)
        futures = [own_proxy.submit(far_side.echo, number) for number in range(5)]
        own_proxy.serialized_context = {**LOCAL, "python_path": ["/nonexistent/python"]}
    for future in futures:
        with pytest.raises(RemoteException, match="/nonexistent/python"):
            future.result(60)
    assert sum("was lost" in message for _, message, _ in recorder.records) == 1
    assert ["exception" in call for call in recorder.calls] == [True] * 5
    own_proxy.serialized_context = LOCAL
    assert own_proxy.submit(far_side.echo, "back").result(60) == [["back"], {}]
