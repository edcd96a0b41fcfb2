"""What a host that was taken over can do to its agent: nothing beyond answering its own calls."""

import collections.abc
import logging
import os
import pathlib
import pickle
import resource
import struct
import sys
import threading
import time

import far_side
import hostile_side
import mitogen.core
import pytest

import support
from inmanta_mitogen.dispatch import JSON_MARK, SMALLEST_JSON
from inmanta_plugins.mitogen import ConnectError, Proxy, RemoteException
from inmanta_plugins.mitogen.hosts.answers import UnreadableError, read_answer
from inmanta_plugins.mitogen.settings import ANSWER_SECONDS, LOG_BURST, MOST_REJECTED
from pytest_inmanta_mitogen import SshHost
from support import LOCAL, together

MIB = 1024 * 1024


def a_proxy(name: str) -> Proxy:
    return Proxy({**LOCAL, "name": name}, call_timeout=120)


@pytest.fixture
def other() -> collections.abc.Iterator[Proxy]:
    """Another host of the same agent, which nothing may happen to."""
    with a_proxy("other") as other:
        pid = other.remote_call(os.getpid)
        yield other
        assert other.remote_call(os.getpid) == pid  # over the connection that it had


@pytest.fixture
def hostile(other: Proxy) -> collections.abc.Iterator[Proxy]:
    """A host that was taken over."""
    hostile = a_proxy("hostile")
    hostile.connect()
    yield hostile
    hostile.disconnect(best_effort=True)


@pytest.fixture
def memory() -> collections.abc.Iterator[None]:
    """Fail a test that made this process grow by a GiB or more."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MIB


def id_of(proxy: Proxy) -> int:
    number: int = proxy.context.context_id
    return number


# Answers


def test_an_answer_of_a_forbidden_class_runs_nothing(
    hostile: Proxy, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "made-by-the-host"
    with pytest.raises(RemoteException, match=r"cannot be read: it holds a posix\.mknod"):
        hostile.remote_call(hostile_side.answer_with_a_class, str(path))
    assert not path.exists()


def nested_key(depth: int) -> bytes:
    return b"\x80\x04}" + b")" + b"\x85" * depth + b"Ns."


def doubling_key(times: int) -> bytes:
    # (x, x) of itself, again and again, by the memo.
    return b"\x80\x04})" + b"".join(b"\x94h%c\x86" % number for number in range(times)) + b"Ns."


def colliding_keys(count: int, at_once: int) -> bytes:
    prime = 2**61 - 1
    keys = [b"\x8a\x0a" + (n * prime).to_bytes(10, "little") for n in range(1, count)]
    sets = (b"(" + b"".join(keys[at : at + at_once]) + b"\x90" for at in range(0, count, at_once))
    return b"\x80\x04\x8f" + b"".join(sets) + b"."


BOMBS = {
    "a memo index that takes 64 GiB": (b"\x80\x04Nr\xff\xff\xff\x7f.", None),
    "a text of 1 TiB": (b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.", "not a pickle"),
    "bytes of 1 EiB": (b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.", "not a pickle"),
    "a key that is nested too deeply to hash": (nested_key(1_000_000), "nested too deeply"),
    "a key whose hash takes forever": (doubling_key(100), "too large"),
    "an empty set a byte": (b"\x80\x04(" + b"\x8f" * 20 * MIB + b"t.", "more than 512 MiB"),
    "an empty dict a byte": (b"\x80\x04(" + b"}" * 20 * MIB + b"t.", "more than 512 MiB"),
    "bytes by number": (b"\x80\x02cmitogen.core\nBlob\n\x8a\x050000\x10\x85R.", "inconsistent"),
    "nothing": (b"", "not a pickle"),
    "an operation that is none": (b"\x80\x04\xff.", "not a pickle"),
    "an end without a value": (b"\x80\x04.", "not a pickle"),
    "two values": (b"\x80\x04NN.", None),
    "an item for a text": (b"\x80\x04\x8c\x01xNa.", "not a pickle"),
    "a list for a key": (b"\x80\x04}]Ns.", "not a pickle"),
    "odd items for a dict": (b"\x80\x04}(Nu.", "not a pickle"),
    "a persistent id": (b"\x80\x04Nx\nQ.", "not a pickle"),
    "an extension": (b"\x80\x04\x82\x01.", "not a pickle"),
    "an object of a class": (b"\x80\x04cos\nPathLike\n)\x81.", "it holds a os.PathLike"),
    "a class alone": (b"\x80\x02cmitogen.core\nSecret\n.", "not a plain value"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.usefixtures("memory")
def test_an_answer_made_to_harm_is_an_exception(bomb: str) -> None:
    data, reason = BOMBS[bomb]
    if reason is None:
        assert read_answer(data) is None
    else:
        with pytest.raises(UnreadableError, match=reason):
            read_answer(data)


JSON_BOMBS = {
    "a list a bracket": b"[" * 10 * MIB,
    "lists in lists": b"[" * 99_999 + b"]" * 99_999,
    "a number of a million digits": b"1" * 10**6,
    "more than is accepted": b" " * 12 * MIB + b"1",
    "nothing": b"",
    "no text": b'"\xff"',
    "a name": b"os",
    "two values": b"1 2",
}


@pytest.mark.parametrize("bomb", JSON_BOMBS)
@pytest.mark.usefixtures("memory")
def test_json_made_to_harm_is_an_exception(bomb: str) -> None:
    with pytest.raises(UnreadableError, match="it is .*JSON"):
        read_answer(JSON_MARK + JSON_BOMBS[bomb])


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b'[{"":0}' + b',{"":0}' * (12 * MIB // 7 - 2) + b"]", id="dicts"),
        pytest.param(b"[[0]" + b",[0]" * (12 * MIB // 4 - 2) + b"]", id="lists"),
        pytest.param(b'["ab"' + b',"ab"' * (12 * MIB // 5 - 2) + b"]", id="texts"),
        pytest.param(b"[1e9" + b",1e9" * (12 * MIB // 4 - 2) + b"]", id="floats"),
        pytest.param(b"1" * 11 * MIB + b".0", id="digits"),
    ],
)
@pytest.mark.usefixtures("memory")
def test_the_most_json_takes_bounded_memory_and_time(data: bytes) -> None:
    before = time.thread_time()
    read_answer(JSON_MARK + data)
    assert time.thread_time() - before < ANSWER_SECONDS


def test_large_values_arrive_as_they_were(other: Proxy) -> None:
    value: object
    for value in (
        None, True, 1.0, 1, -0.0, float("inf"), 2**200, "\U0001f600\u2028", "\udcff",
        "\ud83d\ude00", b"x", (1, 2), {1: 2}, {"a": (1,)}, {None: 1}, {True: 1}, {1.5: 1}, {1, 2},
        [[[]]], {"": {}},
    ):  # fmt: skip
        result = other.remote_call(far_side.echo, value, "x" * SMALLEST_JSON)
        assert repr(result) == repr([[value, "x" * SMALLEST_JSON], {}])


def test_deep_and_shared_values_arrive_as_they_were(other: Proxy) -> None:
    deep: list[object] = ["x" * SMALLEST_JSON]
    for _ in range(200):
        deep = [deep]
    assert other.remote_call(far_side.echo, deep) == [[deep], {}]
    shared: list[object] = ["x" * SMALLEST_JSON]
    for _ in range(14):
        shared = [shared, shared]
    assert other.remote_call(far_side.echo, shared) == [[shared], {}]


def test_an_answer_takes_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inmanta_plugins.mitogen.settings.ANSWER_SECONDS", 0.2)
    with pytest.raises(UnreadableError, match="takes longer than"):
        read_answer(colliding_keys(100_000, at_once=1000))
    with pytest.raises(UnreadableError, match="too many keys at once"):
        read_answer(colliding_keys(100_000, at_once=100_000))


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_plain_values_are_read_as_they_were(protocol: int) -> None:
    value: object
    for value in (
        None, True, False, 0, -1, 255, 256, 65_536, -(2**31), 2**63, -(2**2000), 1.5, float("inf"),
        "", "ü\U0001f600", "\udcff", "x" * 300, b"", b"x" * 300, b"x" * 70_000, "y" * 70_000,
        [], [1], list(range(3000)), (), (1,), (1, 2), (1, 2, 3), tuple(range(9)), {}, {"a": 1},
        {(1, ("x", 2)): [None]}, {number: str(number) for number in range(3000)}, set(), {1, "2"},
        frozenset({(1, b"x"), 2}), [["shared"] * 3] * 3, [{"k": [(1, {2})]}],
    ):  # fmt: skip
        data = pickle.dumps(value, protocol=protocol)
        try:
            read = read_answer(data)
        except UnreadableError:
            # Before protocol 4 sets, and before 3 bytes, were calls of classes.
            assert protocol < 4
            assert b"builtin" in data or b"_codecs" in data
            continue
        assert read == value
        assert type(read) is type(value)


def test_an_error_of_any_length_and_content_is_fit_for_the_log(hostile: Proxy) -> None:
    with pytest.raises(RemoteException) as caught:
        hostile.remote_call(far_side.fail, "begin\x00\x1b[31m" + "x" * 3_000_000 + "\ud800end")
    text = str(caught.value)
    assert len(text) < 11_000
    assert "begin\\x00\\x1b[31m" in text
    assert "characters ..." in text
    assert text.isprintable() or set(filter(lambda c: not c.isprintable(), text)) == {"\n"}


NONE = struct.pack(">L", 4) + b"\x80\x02N."


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\0\0", id="half a length"),
        pytest.param(NONE[:-1], id="half an answer"),
        pytest.param(b"\xff" * 4, id="one of 4 GiB"),
    ],
)
def test_answers_to_calls_in_flight_that_are_none_are_errors(hostile: Proxy, data: bytes) -> None:
    with together(hostile):
        futures = [hostile.submit(hostile_side.answer_each_with, data)]
        futures += [hostile.submit(far_side.echo, number) for number in range(3)]
    for future in futures:
        with pytest.raises(RemoteException, match="not those to what was sent"):
            future.result(60)


def test_more_answers_than_calls_are_refused(
    hostile: Proxy, other: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    with together(hostile):
        futures = [hostile.submit(hostile_side.answer_each_with, NONE * 10_000)]
        futures += [hostile.submit(far_side.echo, number) for number in range(3)]
    assert [future.result(60) for future in futures] == [None] * 4  # its own calls, its own lies
    # What it answers after that is for no call.
    assert other.submit(far_side.echo, 1).result(60) == [[1], {}]
    support.wait_until(lambda: "that nothing waits for" in caplog.text, "the rest is refused")


# Messages


@pytest.mark.parametrize("size", [128 * MIB + 1, 2**32 - 1])
@pytest.mark.usefixtures("memory")
def test_a_message_that_is_too_large_ends_the_connection(size: int, hostile: Proxy) -> None:
    with pytest.raises(RemoteException, match="connection was lost"):
        hostile.remote_call(hostile_side.announce, size, b"x" * 1000)


def test_the_largest_message_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INMANTA_MITOGEN_MAX_MESSAGE_SIZE", str(2 * MIB))
    with a_proxy("small") as proxy:
        assert len(proxy.remote_call(far_side.large, MIB)) == MIB
        with pytest.raises(RemoteException, match="at most 2097152"):
            proxy.remote_call(far_side.echo, bytes(2 * MIB))
        with pytest.raises(RemoteException, match="connection was lost"):
            proxy.remote_call(hostile_side.announce, 2 * MIB + 1, b"")
    monkeypatch.setenv("INMANTA_MITOGEN_MAX_MESSAGE_SIZE", "10")
    with pytest.raises(ValueError, match="INMANTA_MITOGEN_MAX_MESSAGE_SIZE is '10'"):
        proxy.connect()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(os.urandom(4096), id="noise"),
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", id="http"),
    ],
)
def test_bytes_that_are_no_message_end_the_connection(data: bytes, hostile: Proxy) -> None:
    with pytest.raises(RemoteException, match="connection was lost"):
        hostile.remote_call(hostile_side.raw, data)
    assert hostile.remote_call(far_side.echo) == [[], {}]  # a new one


def test_a_message_that_never_ends_ends_with_its_call(hostile: Proxy) -> None:
    hostile.call_timeout = 0.5
    with pytest.raises(RemoteException, match="did not end"):
        hostile.remote_call(hostile_side.announce, 100 * MIB, b"x" * MIB)


def test_an_answer_to_no_call_is_refused(hostile: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    assert hostile.remote_call(hostile_side.send, 4711, b"x", 500) == "sent"
    assert hostile.remote_call(far_side.echo) == [[], {}]
    (record,) = caplog.records
    assert record.getMessage() == "Host hostile sent a message that nothing waits for: refused."


def test_a_host_that_goes_on_is_cut_off(hostile: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RemoteException, match="connection was lost"):
        hostile.remote_call(hostile_side.send, 4711, b"x", MOST_REJECTED + 50_000)
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]
    assert "it is cut off" in caplog.text


def test_what_only_an_agent_may_ask_is_refused(hostile: Proxy) -> None:
    call = mitogen.core.Message.pickled((None, "os", None, "getpid", (), {})).data
    for name in (
        "CALL_FUNCTION", "CALL_SERVICE", "SHUTDOWN", "LOAD_MODULE", "FORWARD_MODULE",
        "DETACHING", "LOAD_RESOURCE", "STUB_CALL_SERVICE", "ALLOCATE_ID",
    ):  # fmt: skip
        handle = getattr(mitogen.core, name)
        dead, reason = hostile.remote_call(hostile_side.ask, handle, call)
        assert dead, name
        assert reason.startswith(b"refused"), name


@pytest.mark.parametrize("fields", [{"src": 0}, {"auth": 0}, {"src": 0, "auth": 0}, {"src": 77}])
def test_nobody_can_speak_for_another(
    fields: dict[str, int], hostile: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    line = b"name\x0040\x00forged"
    hostile.remote_call(hostile_side.send, mitogen.core.FORWARD_LOG, line, **fields)
    assert "forged" not in caplog.text
    assert "sent a message in the name of another: refused" in caplog.text


def test_a_host_can_answer_no_call_of_another(hostile: Proxy, other: Proxy) -> None:
    results: list[object] = []
    nap = threading.Thread(target=lambda: results.append(other.remote_call(far_side.nap, 1)))
    nap.start()
    value = pickle.dumps("forged", protocol=4)
    handles = (1000, 1100)
    for fields in (
        {},
        {"src": id_of(other)},
        {"src": id_of(other), "auth": id_of(other)},
        {"reply_to": hostile_side.DEAD},
        {"src": id_of(other), "reply_to": hostile_side.DEAD},
    ):
        # Never its own, which it would answer by that.
        hostile.remote_call(hostile_side.send_to_all, handles, value, **fields)
    nap.join(60)
    assert results == [1]


def test_a_host_can_end_no_connection_of_another(hostile: Proxy, other: Proxy) -> None:
    first = id_of(hostile)
    with Proxy({**LOCAL, "via": {**LOCAL, "name": "hop"}}) as behind:
        targets = (id_of(behind), 0, id_of(other), first, first + 1, first + 2, 2**32 - 1, 10**30)
        for target in targets:
            for handle in (mitogen.core.ADD_ROUTE, mitogen.core.DEL_ROUTE):
                hostile.remote_call(hostile_side.send, handle, b"%d:mine" % target)
                hostile.remote_call(hostile_side.send, handle, b"%d" % target)
        assert behind.remote_call(far_side.echo, 1) == [[1], {}]
    with a_proxy("third") as third:
        pid = third.remote_call(os.getpid)
        assert third.context.name == "third"
        with pytest.raises(RemoteException):
            hostile.remote_call(os._exit, 1)
        assert third.remote_call(os.getpid) == pid
        assert third.remote_call(far_side.echo, 1) == [[1], {}]
    assert other.context.name == "other"


def test_a_hop_cannot_pass_another_host_off_as_the_one_behind_it(other: Proxy) -> None:
    hop = {**LOCAL, "name": "hop"}
    with Proxy({**LOCAL, "via": hop}) as behind:
        link = support.connection_of(behind).link.via
        assert link is not None
        link.allow(hostile_side.claim_as_child)
        link.context.call(hostile_side.claim_as_child, id_of(other))
        with pytest.raises(ConnectError, match="hop named a context that is not its own"):
            Proxy({**LOCAL, "via": hop}).connect()
        assert behind.remote_call(far_side.echo) == [[], {}]


# Logs


def test_a_flood_of_log_lines_is_bounded(hostile: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    loggers = len(logging.root.manager.loggerDict)
    line = b"loud\x0040\x00flood"
    hostile.remote_call(hostile_side.send, mitogen.core.FORWARD_LOG, line, 200_000)
    assert hostile.remote_call(far_side.echo) == [[], {}]
    hostile.disconnect()
    assert LOG_BURST <= len(caplog.records) < LOG_BURST + 10_000
    assert "dropped" in caplog.text
    assert len(logging.root.manager.loggerDict) == loggers


def test_a_line_of_the_log_is_bounded_and_cannot_pass_for_another(
    hostile: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(1)
    forged = b"x\n2026-01-01 CRITICAL forged\r\x1b[2J\0" + b"long" * MIB
    for line in (
        b"a\x0099999\x00" + forged, b"a\x00-1\x00b", b"no separators", b"", b"\0\0\0", b"\xff" * 99,
        b"n" * 9999 + b"\x0020\x00text", b"a\x00" + b"9" * 9999 + b"\x00b",
    ):  # fmt: skip
        hostile.remote_call(hostile_side.send, mitogen.core.FORWARD_LOG, line)
    assert hostile.remote_call(far_side.echo) == [[], {}]
    records = [r for r in caplog.records if r.name == "inmanta_plugins.mitogen.host"]
    assert len(records) == 8
    for record in records:
        text = record.getMessage()
        assert len(text) < 10_000
        assert text.startswith("hostile: ")
        assert all(shown.startswith("    | ") for shown in text.splitlines()[1:])
        assert "\0" not in text
        assert "\x1b" not in text


def test_a_line_of_the_log_holds_nothing_invisible(
    hostile: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    invisible = "\u2028\u2029\u202e\u2066\u200b\u061c\ufeff\U000e0041"
    line = f"a{invisible}\x0040\x00text{invisible}\N{SNOWMAN}".encode()
    hostile.remote_call(hostile_side.send, mitogen.core.FORWARD_LOG, line)
    assert hostile.remote_call(far_side.echo) == [[], {}]
    assert not set(invisible) & set(caplog.text)
    assert f"text{ascii(invisible)[1:-1]}\N{SNOWMAN}" in caplog.text


def test_what_a_host_prints_is_bounded(hostile: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with a_proxy("printing") as printing:  # told that level when it was connected
        assert printing.remote_call(hostile_side.print_lines, 20_000) == "printed"
    assert sum("line" in record.getMessage() for record in caplog.records) < LOG_BURST + 2_000


# Before its Python runs


NOISE = {
    "an endless line": "tr '\\0' x < /dev/zero",
    "endless lines": "yes",
    "mitogen's source, again and again": "yes MITO000",
}


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.usefixtures("memory")
def test_a_host_that_does_not_stop_before_it_is_connected_is_cut_off(
    noise: str, hostile: Proxy
) -> None:
    loud = Proxy({**LOCAL, "python_path": ["/bin/sh", "-c", NOISE[noise]], "connect_timeout": 60})
    with pytest.raises(ConnectError, match="before its Python ran") as caught:
        loud.connect()
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize("after", ["", "junk junk junk junk junk junk"])
def test_a_host_that_only_pretends_to_be_connected_is_noticed(after: str, hostile: Proxy) -> None:
    script = f"printf 'MITO002\\n{after}'; sleep 0.2"
    proxy = Proxy({**LOCAL, "python_path": ["/bin/sh", "-c", script]})
    with proxy, pytest.raises(RemoteException):
        proxy.file_exists("/")


def test_the_last_words_of_a_host_are_bounded_and_printable(hostile: Proxy) -> None:
    script = "head -c 500000 /dev/zero; printf '\\033[2J\\n'; exit 1"
    with pytest.raises(ConnectError) as caught:
        Proxy({**LOCAL, "python_path": ["/bin/sh", "-c", script]}).connect()
    assert len(str(caught.value)) < 10_000
    assert "\0" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_flood_on_stderr_is_bounded(
    mitogen_ssh_host: SshHost,
    other: Proxy,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    loud = tmp_path / "loud"
    flood = "yes flood | head -c 6000000; tr '\\0' x < /dev/zero | head -c 6000000; : >$0.end"
    loud.write_text(f'#!/bin/sh\n({flood}) >&2 &\nexec {sys.executable} "$@"\n')
    loud.chmod(0o755)
    with Proxy(mitogen_ssh_host.serialized(python_path=[str(loud)])) as proxy:
        while not proxy.file_exists(f"{loud}.end"):
            assert proxy.remote_call(far_side.nap, 0.1) == 0.1
    assert sum("flood" in record.getMessage() for record in caplog.records) < 100_000
