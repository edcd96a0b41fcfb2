"""What moves in chunks arrives whole or not at all, in bounded memory."""

import collections.abc
import concurrent.futures
import functools
import hashlib
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import far_side
import far_transfer
import mitogen.core
import psutil
import pytest

import support
from inmanta_mitogen import chunks as host
from inmanta_mitogen.dispatch import CHUNK_SIZE
from inmanta_plugins.mitogen import CallTimeoutError, Proxy, RemoteException, SettingError, settings
from inmanta_plugins.mitogen.calls import transfers
from inmanta_plugins.mitogen.connections.connection import Answer, Connection
from inmanta_plugins.mitogen.errors import NotDeliveredError
from pytest_inmanta_mitogen import SshHost
from support import LOCAL, Recorder

MIB = 1 << 20
OLD = b"old content"
# More than the window, and no multiple of a chunk.
LARGE = 16 * CHUNK_SIZE + 12_345

Action = collections.abc.Callable[..., object]


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(LARGE)


@pytest.fixture
def local_file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "local"
    path.write_bytes(content)
    return path


@pytest.fixture
def far_file(tmp_path: Path) -> Path:
    path = tmp_path / "far"
    path.write_bytes(OLD)
    return path


@pytest.fixture(params=["put_file", "get_file"])
def move(request: pytest.FixtureRequest, proxy: Proxy, local_file: Path, far_file: Path) -> Action:
    """Copy the local file to the far one, in chunks."""
    if request.param == "put_file":
        return functools.partial(proxy.put_file, local_file, str(far_file))
    return functools.partial(proxy.get_file, str(local_file), far_file)


# Whole contents


@pytest.mark.parametrize(
    "size", [0, CHUNK_SIZE - 100, CHUNK_SIZE, CHUNK_SIZE + 1, CHUNK_SIZE * 3, LARGE]
)
def test_content_of_any_size_arrives(
    proxy: Proxy, tmp_path: Path, content: bytes, size: int
) -> None:
    path, fetched = tmp_path / "far", tmp_path / "fetched"
    wanted = content[:size]
    proxy.put(str(path), wanted)
    assert path.read_bytes() == wanted
    assert proxy.read_binary(str(path)) == wanted
    proxy.get_file(str(path), fetched)
    assert fetched.read_bytes() == wanted
    proxy.put_file(fetched, str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == wanted


def test_contents_and_outputs_may_exceed_what_one_message_carries(
    open_proxy: Proxy, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_proxy.disconnect()  # what is open has the limit of when it was opened
    monkeypatch.setenv(settings.MAX_MESSAGE_SIZE_ENV_VAR, str(MIB))
    path, trace = tmp_path / "far", tmp_path / "trace"
    script = (
        f"echo ran >>{trace}; head -c {LARGE} /dev/zero | tr '\\0' a;"
        " head -c 300000 /dev/zero | tr '\\0' b >&2; exit 3"
    )
    with Proxy(dict(LOCAL)) as proxy:
        proxy.put(str(path), content)
        assert proxy.read_binary(str(path)) == content
        assert proxy.run("sh", ["-c", script]) == ("a" * LARGE, "b" * 300_000, 3)
    assert trace.read_text() == "ran\n"


def test_files_without_a_size_are_read_to_their_end(proxy: Proxy, tmp_path: Path) -> None:
    assert proxy.read("/proc/self/cmdline").split("\0")[0]
    proxy.get_file("/proc/version", tmp_path / "version")
    assert (tmp_path / "version").read_text() == Path("/proc/version").read_text()


@pytest.mark.parametrize("way", ["ssh", "compressed", "hop"])
def test_contents_are_sent_by_ssh_compressed_or_not_and_through_a_hop(
    mitogen_ssh_host: SshHost, tmp_path: Path, local_file: Path, content: bytes, way: str
) -> None:
    context: dict[str, object] = mitogen_ssh_host.serialized(compression=way == "compressed")
    if way == "hop":
        support.need("sudo", root=True)
        python = mitogen_ssh_host.python_path
        context = {"method_name": "sudo", "python_path": python, "via": context}
    with Proxy(context) as proxy:
        proxy.put_file(local_file, str(tmp_path / "far"))
        assert proxy.hash_file(str(tmp_path / "far")) == hashlib.sha1(content).hexdigest()
        proxy.get_file(str(tmp_path / "far"), tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == content


def test_threads_transfer_through_one_proxy(proxy: Proxy, tmp_path: Path, content: bytes) -> None:
    def there_and_back(number: int) -> bool:
        wanted = content[number:]
        proxy.put(str(tmp_path / str(number)), wanted)
        return proxy.read_binary(str(tmp_path / str(number))) == wanted

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(there_and_back, range(8)))


# Memory


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_large_files_take_little_memory(proxy: Proxy, move: Action, local_file: Path) -> None:
    move()  # so that what is needed for any transfer is loaded
    os.truncate(local_file, 100 * MIB)
    here = far_transfer.forget_peak_memory()
    there = proxy.remote_call(far_transfer.forget_peak_memory)
    move()
    assert far_transfer.peak_memory() - here < 12 * MIB
    assert proxy.remote_call(far_transfer.peak_memory) - there < 12 * MIB


# The log


def test_each_transfer_is_logged_once_like_any_call(
    proxy: Proxy, recorder: Recorder, tmp_path: Path, local_file: Path
) -> None:
    path = str(tmp_path / "far")
    proxy.put(path, b"x" * LARGE)
    proxy.read_binary(path)
    proxy.put_file(local_file, path)
    proxy.get_file(path, tmp_path / "back")
    put, read = "inmanta_mitogen.put", "inmanta_mitogen.read_binary"
    assert [call["function"] for call in recorder.calls] == [put, read, put, read]
    for call in recorder.calls:
        assert "result" in call
        assert len(str(call["args"])) < 400


# Progress


def test_progress_tells_what_was_moved_and_how_much_there_is(move: Action) -> None:
    steps: list[tuple[int, int]] = []
    move(progress=lambda *step: steps.append(step))
    assert steps == sorted(steps)
    assert len(steps) > 10
    assert {total for _, total in steps} == {LARGE}
    assert steps[-1] == (LARGE, LARGE)


@pytest.mark.parametrize("size", [10, LARGE])
@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_progress_callback_that_raises_leaves_the_old_file_and_the_proxy_as_they_were(
    proxy: Proxy, move: Action, local_file: Path, far_file: Path, size: int, at_the_end: bool
) -> None:
    interpreter = proxy.remote_call(os.getpid)
    os.truncate(local_file, size)

    def progress(moved: int, total: int) -> None:
        if moved == total or not at_the_end:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        move(progress=progress)
    assert proxy.remote_call(os.getpid) == interpreter
    assert far_file.read_bytes() == OLD
    assert sorted(path.name for path in far_file.parent.iterdir()) == ["far", "local"]


# Bad input


def test_a_local_file_that_is_not_there_or_no_file_is_refused_before_anything_is_sent(
    proxy: Proxy, recorder: Recorder, tmp_path: Path, far_file: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        proxy.put_file(tmp_path / "missing", str(far_file))
    with pytest.raises(IsADirectoryError):
        proxy.put_file(tmp_path, str(far_file))
    os.mkfifo(tmp_path / "fifo")
    for path in ("/dev/null", tmp_path / "fifo"):
        with pytest.raises(OSError, match="not a regular file"):
            proxy.put_file(path, str(far_file))
    assert recorder.calls == []
    assert proxy.read_binary(str(far_file)) == OLD


def test_a_file_of_the_host_without_an_end_is_refused(proxy: Proxy, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in ("/dev/zero", str(tmp_path / "fifo")):
        with pytest.raises(RemoteException, match="not a regular file"):
            proxy.get_file(path, tmp_path / "back")


def test_a_path_where_no_file_can_be_is_refused(
    proxy: Proxy, tmp_path: Path, local_file: Path
) -> None:
    with pytest.raises(RemoteException, match="IsADirectoryError"):
        proxy.put_file(local_file, str(tmp_path))
    with pytest.raises(RemoteException, match="IsADirectoryError"):
        proxy.get_file(str(tmp_path), tmp_path / "back")
    with pytest.raises(IsADirectoryError):
        proxy.get_file(str(local_file), tmp_path)
    with pytest.raises(FileNotFoundError):
        proxy.get_file(str(local_file), tmp_path / "no" / "directory")


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def shrink(path: Path) -> None:
    os.truncate(path, LARGE - 100)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"other")


@pytest.mark.parametrize("change", [grow, shrink, overwrite])
def test_a_file_that_changes_while_it_is_moved_is_not_written(
    proxy: Proxy, move: Action, far_file: Path, local_file: Path, change: Action
) -> None:
    def progress(moved: int, total: int) -> None:
        if moved == CHUNK_SIZE:
            change(local_file)

    with pytest.raises((OSError, RemoteException), match="was changed while it was read"):
        move(progress=progress)
    assert proxy.read_binary(str(far_file)) == OLD


# Faults on the host


def test_a_put_that_the_host_has_no_room_for_keeps_the_old_file(
    own_proxy: Proxy, far_file: Path, content: bytes
) -> None:
    limits = (4 * CHUNK_SIZE, resource.RLIM_INFINITY)
    own_proxy.remote_call(resource.setrlimit, int(resource.RLIMIT_FSIZE), limits)
    with pytest.raises(RemoteException, match="File too large"):
        own_proxy.put(str(far_file), content)
    assert far_file.read_bytes() == OLD


def test_a_host_lost_in_a_transfer_is_an_error_and_not_tried_again(
    proxy: Proxy, move: Action, far_file: Path, recorder: Recorder
) -> None:
    pid = proxy.remote_call(os.getpid)
    begins: list[int] = []

    def progress(moved: int, total: int) -> None:
        if moved <= CHUNK_SIZE:
            begins.append(moved)
            os.kill(pid, signal.SIGKILL)

    recorder.records.clear()
    with pytest.raises(RemoteException, match="the connection was lost"):
        move(progress=progress)
    assert (len(begins), len(recorder.calls)) == (1, 1)
    assert far_file.read_bytes() == OLD
    assert proxy.remote_call(os.getpid) != pid


def test_an_upload_that_is_interrupted_before_it_begins_leaves_nothing(
    proxy: Proxy, far_file: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "receive", far_transfer.begin_late)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        proxy.put(str(far_file), content)
    timer.join()
    assert proxy.submit(far_side.echo, 7).result(timeout=60) == [[7], {}]
    assert far_file.read_bytes() == OLD
    assert [path.name for path in far_file.parent.iterdir()] == ["far"]


def test_an_upload_whose_connection_ends_leaves_no_temporary_file(
    own_proxy: Proxy, far_file: Path, local_file: Path
) -> None:
    pid = own_proxy.remote_call(os.getpid)

    def progress(moved: int, total: int) -> None:
        if moved == total:
            link = support.connection_of(own_proxy).link
            link.router.disconnect_stream(link.router.stream_by_id(link.context.context_id))
            psutil.wait_procs([psutil.Process(pid)], timeout=60)

    with pytest.raises(RemoteException, match="the connection was lost"):
        own_proxy.put_file(local_file, str(far_file), progress=progress)
    assert far_file.read_bytes() == OLD
    assert sorted(path.name for path in far_file.parent.iterdir()) == ["far", "local"]


def test_a_call_whose_result_cannot_be_fetched_is_not_repeated(
    own_proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Connection.send

    def refuse_to_fetch(self: Connection, *calls: Any) -> None:
        if calls[0][0] is host.next_chunk:
            raise NotDeliveredError(mitogen.core.ChannelError("the router has ended"))
        send(self, *calls)

    monkeypatch.setattr(Connection, "send", refuse_to_fetch)
    script = f"echo ran >>{tmp_path}/trace; head -c {LARGE} /dev/zero"
    with pytest.raises(RemoteException, match="connection was lost while inmanta_mitogen.run"):
        own_proxy.run("sh", ["-c", script])
    assert (tmp_path / "trace").read_text() == "ran\n"


def test_the_call_timeout_holds_while_chunks_are_moved(proxy: Proxy, move: Action) -> None:
    proxy.call_timeout = 0.5
    with pytest.raises(CallTimeoutError):
        move(progress=lambda *_: time.sleep(0.2))


def test_large_results_of_any_kind_arrive(proxy: Proxy) -> None:
    values = [
        [{"key": number, "list": [None, 1.5, b"x"]} for number in range(20_000)],
        ("x" * CHUNK_SIZE,),
    ]
    assert proxy.remote_call(far_side.echo, *values) == [values, {}]


@pytest.mark.parametrize("size", [10, LARGE])
def test_any_buffer_is_put(proxy: Proxy, far_file: Path, content: bytes, size: int) -> None:
    for buffer in (bytearray(content[:size]), memoryview(content[-size:])):
        proxy.put(str(far_file), buffer)
        assert far_file.read_bytes() == bytes(buffer)


@pytest.mark.parametrize("size", [10, LARGE])
def test_a_file_that_is_put_in_place_keeps_its_inode(
    proxy: Proxy, far_file: Path, local_file: Path, content: bytes, size: int
) -> None:
    local_file.write_bytes(content[:size])
    inode = far_file.stat().st_ino
    proxy.put(str(far_file), content[:size], in_place=True)
    assert far_file.stat().st_ino == inode
    proxy.put_file(local_file, str(far_file), in_place=True)
    assert far_file.stat().st_ino == inode
    assert far_file.read_bytes() == content[:size]
    proxy.put(str(far_file), content[:size])
    assert far_file.stat().st_ino != inode


# Limits


def test_what_has_no_end_is_limited(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, local_file: Path
) -> None:
    endless = ["-c", "echo late; yes >&2"]
    back = local_file.with_name("back")
    reads: tuple[tuple[int, Action], ...] = (
        (3 * MIB, lambda: proxy.read("/dev/zero", max_size=3 * MIB)),
        (MIB, lambda: proxy.run("sh", endless, max_size=MIB)),
        (LARGE - 1, lambda: proxy.get_file(str(local_file), back, max_size=LARGE - 1)),
        (2 * MIB, lambda: proxy.read_binary("/dev/zero")),
        (2 * MIB, lambda: proxy.run("sh", endless)),
        (2 * MIB, lambda: proxy.remote_call(far_transfer.endless)),
    )
    monkeypatch.setenv(settings.MAX_SIZE_ENV_VAR, str(2 * MIB))
    for limit, read in reads:
        with pytest.raises(RemoteException, match=f"more than the {limit} bytes .* max_size"):
            read()
    assert proxy.read_binary("/etc/passwd", max_size=MIB)


@pytest.mark.parametrize("text", ["many", "-1", "0", "²"])
def test_a_wrong_limit_is_named(proxy: Proxy, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(settings.MAX_SIZE_ENV_VAR, text)
    with pytest.raises(SettingError, match=settings.MAX_SIZE_ENV_VAR):
        proxy.read("/etc/passwd")


def test_a_limit_may_be_the_greatest_number_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.MAX_SIZE_ENV_VAR, str(sys.maxsize))
    assert settings.max_size() == sys.maxsize


# A host that does not keep to the rules


@pytest.mark.parametrize(("receive", "most"), [(host.receive, 2), (far_transfer.begin_late, 4)])
def test_no_more_than_the_window_is_on_the_way(
    proxy: Proxy,
    far_file: Path,
    content: bytes,
    monkeypatch: pytest.MonkeyPatch,
    receive: Action,
    most: int,
) -> None:
    proxy.put(str(far_file), content)  # so that the host has what it needs for it
    monkeypatch.setattr(host, "receive", receive)
    seen: list[int] = []
    next_answer = transfers.Transfer.next

    def counting(transfer: transfers.Transfer) -> Answer:
        seen.append(transfer.in_flight)
        return next_answer(transfer)

    monkeypatch.setattr(transfers.Transfer, "next", counting)
    proxy.put(str(far_file), content)
    assert max(seen) == most + 1  # the sum, too


def test_a_put_whose_sum_differs_keeps_the_old_file(
    proxy: Proxy, far_file: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashlib, "sha1", hashlib.sha256)
    with pytest.raises(RemoteException, match="sha1 differs: nothing was written"):
        proxy.put(str(far_file), content)
    assert far_file.read_bytes() == OLD


@pytest.mark.parametrize("ticket", ["", "x", "x" * 100])
def test_a_result_that_waits_nowhere_is_an_error(proxy: Proxy, ticket: str) -> None:
    with pytest.raises(RemoteException, match="cannot be right: it keeps an answer"):
        proxy.remote_call(far_transfer.offer, b"K" + ticket.encode())


@pytest.mark.parametrize(
    ("by", "text"), [(far_transfer.lie, "sha1 differs"), (far_side.echo, "cannot be right")]
)
def test_a_host_that_does_not_keep_to_the_protocol_is_an_error(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: object, text: str
) -> None:
    monkeypatch.setattr(host, "send", by)
    with pytest.raises(RemoteException, match=text):
        proxy.get_file("/etc/passwd", tmp_path / "back")
    assert list(tmp_path.iterdir()) == []
