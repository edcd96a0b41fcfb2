"""Questions that are sent along with the first one, and when they are not."""

import collections.abc
import concurrent.futures
import functools
import os
import threading
import time
from pathlib import Path
from typing import Any

import far_side
import pytest

from inmanta_plugins.mitogen import Proxy, RemoteException, SettingError, settings
from inmanta_plugins.mitogen.connections.connection import Connection
from support import LOCAL, Messages, Recorder

CONTENT = b"content"


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Files with the same content."""
    files = [tmp_path / f"file{number}" for number in range(4)]
    for file in files:
        file.write_bytes(CONTENT)
    return [str(file) for file in files]


@pytest.fixture
def proxy(own_proxy: Proxy) -> Proxy:
    """One that has learned nothing yet."""
    return own_proxy


def file_questions(proxy: Proxy, path: str) -> list[object]:
    """Return what fs::File asks about a file that is as it should be."""
    return [proxy.file_exists(path), proxy.file_stat(path)["permissions"], proxy.hash_file(path)]


def text_questions(proxy: Proxy, path: str) -> list[object]:
    """Return what files::TextFile asks."""
    return [proxy.file_exists(path), proxy.file_stat(path)["permissions"], proxy.read_binary(path)]


def link_questions(proxy: Proxy, path: str) -> list[object]:
    """Return what fs::Symlink asks."""
    return [proxy.file_exists(path), proxy.is_symlink(path), proxy.readlink(path)]


def handle(
    proxy: Proxy,
    path: str,
    questions: collections.abc.Callable[[Proxy, str], list[object]] = file_questions,
    resource_type: str = "fs::File",
) -> list[object]:
    """Handle a resource."""
    proxy.begin_resource(resource_type)
    try:
        return questions(proxy, path)
    finally:
        proxy.end_resource()


@pytest.mark.parametrize("questions", [file_questions, text_questions, link_questions])
def test_a_converged_resource_takes_one_message_from_the_second_of_its_type_on(
    proxy: Proxy,
    messages: Messages,
    paths: list[str],
    tmp_path: Path,
    questions: collections.abc.Callable[[Proxy, str], list[object]],
) -> None:
    if questions is link_questions:
        for number, path in enumerate(paths):
            paths[number] = f"{path}-link"
            os.symlink("there", paths[number])
    first = handle(proxy, paths[0], questions)
    assert messages.taken() == 3
    for path in paths[1:]:
        assert handle(proxy, path, questions) == first
        assert messages.taken() == 1


def test_each_type_has_its_own_questions(
    proxy: Proxy, messages: Messages, paths: list[str]
) -> None:
    handle(proxy, paths[0])
    handle(proxy, paths[0], text_questions, "files::TextFile")
    messages.taken()
    assert handle(proxy, paths[1])[2] == handle(proxy, paths[0])[2]
    assert handle(proxy, paths[1], text_questions, "files::TextFile")[2] == CONTENT
    assert messages.taken() == 3


@pytest.fixture
def asked(proxy: Proxy, messages: Messages, paths: list[str]) -> str:
    """The path of a resource whose first question was asked, with others that came along."""
    handle(proxy, paths[0])
    proxy.begin_resource("fs::File")
    proxy.file_exists(paths[1])
    messages.taken()
    return paths[1]


def call_in_another_thread(proxy: Proxy, path: str) -> None:
    other = threading.Thread(target=proxy.chmod, args=(path, "644"))
    other.start()
    other.join()


Use = collections.abc.Callable[[Proxy, str], object]
USES: dict[str, Use] = {
    "put": lambda proxy, path: proxy.put(path, b"other"),
    "large put": lambda proxy, path: proxy.put(path, bytes(1 << 20)),
    "put_file": lambda proxy, path: proxy.put_file("/etc/hostname", path),
    "submit": lambda proxy, path: proxy.submit(far_side.echo).result(60),
    "context": lambda proxy, path: proxy.context.call(os.truncate, path, 0),
    "another path": lambda proxy, path: proxy.is_symlink(os.path.dirname(path)),
    "run": lambda proxy, path: proxy.run("true"),
    "another thread": call_in_another_thread,
    "the same question": lambda proxy, path: proxy.file_stat(path),
    "the end of the resource": lambda proxy, path: proxy.end_resource(),
    "a second": lambda proxy, path: time.sleep(settings.PREFETCHED_SECONDS + 0.1),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_other_calls_drop_what_was_prefetched(
    proxy: Proxy, messages: Messages, asked: str, use: Use
) -> None:
    use(proxy, asked)
    os.chmod(asked, 0o600)
    messages.taken()
    assert proxy.file_stat(asked)["permissions"] == 600
    assert messages.taken() == 1


def test_a_file_that_changes_between_two_questions_about_it_is_asked_again(
    proxy: Proxy, messages: Messages, asked: str
) -> None:
    before = proxy.file_stat(asked), proxy.hash_file(asked)
    assert messages.taken() == 0
    Path(asked).write_bytes(b"other")
    assert proxy.hash_file(asked) != before[1]
    assert messages.taken() == 1
    os.remove(asked)
    assert not proxy.file_exists(asked)
    assert messages.taken() == 1


def test_two_threads_on_one_proxy_see_their_own_changes(proxy: Proxy, paths: list[str]) -> None:
    proxy.begin_resource("fs::File")

    def change_and_look(path: str) -> list[tuple[int, int]]:
        seen = []
        for number in range(100):
            mode = 600 + number % 8 * 10
            proxy.file_exists(path)
            proxy.chmod(path, str(mode))
            proxy.file_exists(path)
            seen.append((proxy.file_stat(path)["permissions"], mode))
        return seen

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for seen in pool.map(change_and_look, paths[:2]):
            assert all(found == wanted for found, wanted in seen)


def test_a_prefetched_question_that_fails_raises_only_when_it_is_asked(
    proxy: Proxy, recorder: Recorder, paths: list[str], messages: Messages
) -> None:
    handle(proxy, paths[0])
    os.remove(paths[1])
    recorder.records.clear()
    messages.taken()
    proxy.begin_resource("fs::File")
    assert not proxy.file_exists(paths[1])
    assert len(recorder.calls) == 1
    with pytest.raises(RemoteException, match="FileNotFoundError") as caught:
        proxy.file_stat(paths[1])
    assert caught.value.remote_type == "builtins.FileNotFoundError"
    assert messages.taken() == 1
    assert [call.get("prefetched") for call in recorder.calls] == [None, True]
    assert "FileNotFoundError" in str(recorder.calls[1]["exception"])


def test_a_prediction_that_was_not_used_is_not_repeated_until_it_holds_again(
    proxy: Proxy, messages: Messages, recorder: Recorder, paths: list[str]
) -> None:
    handle(proxy, paths[0])
    handle(proxy, paths[1], lambda proxy, path: [proxy.file_exists(path)])
    for path, number in ((paths[2], 3), (paths[3], 1)):
        messages.taken()
        handle(proxy, path)
        assert messages.taken() == number


def test_the_log_has_the_same_records(proxy: Proxy, recorder: Recorder, paths: list[str]) -> None:
    records = []
    for path in paths[:2]:
        recorder.records.clear()
        handle(proxy, path)
        records.append(recorder.records.copy())
    marks = [kwargs.pop("prefetched", False) for _, _, kwargs in records[1]]
    assert marks == [False, True, True]
    for some in records:
        for _, _, kwargs in some:
            assert kwargs.pop("duration") is not None
            kwargs.pop("args")
    assert records[0] == records[1]


def test_a_new_file_takes_no_more_messages(
    proxy: Proxy, messages: Messages, tmp_path: Path
) -> None:
    for number in range(3):
        path = str(tmp_path / f"new{number}")
        messages.taken()
        proxy.begin_resource("fs::File")
        assert not proxy.file_exists(path)
        assert not proxy.file_exists(path)
        proxy.put(path, CONTENT)
        proxy.chmod(path, "644")
        proxy.chown(path, os.geteuid(), os.getegid())
        proxy.end_resource()
        assert messages.taken() == 5


# What is cheap


@pytest.mark.parametrize("kind", ["large", "fifo", "proc"])
def test_only_small_regular_files_are_read_ahead(
    proxy: Proxy, messages: Messages, paths: list[str], tmp_path: Path, kind: str
) -> None:
    handle(proxy, paths[0], text_questions)
    path = {"large": paths[1], "fifo": str(tmp_path / "fifo"), "proc": "/proc/version"}[kind]
    if kind == "large":
        Path(path).write_bytes(bytes(64 * 1024 + 1))
    elif kind == "fifo":
        os.mkfifo(path)
    messages.taken()
    proxy.begin_resource("fs::File")
    assert proxy.file_exists(path)
    proxy.file_stat(path)
    assert messages.taken() == 1
    if kind != "fifo":
        assert proxy.read_binary(path) == Path(path).read_bytes()
        assert messages.taken() == 1
    assert proxy.remote_call(far_side.echo, 1) == [[1], {}]


# Where nothing is prefetched


def test_nothing_is_prefetched_without_a_resource_or_where_a_variable_says_so(
    proxy: Proxy, messages: Messages, paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in paths:
        file_questions(proxy, path)
        assert messages.taken() == 3
    monkeypatch.setenv(settings.PREFETCH_ENV_VAR, "0")
    for path in paths:
        handle(proxy, path)
        assert messages.taken() == 3
    monkeypatch.setenv(settings.PREFETCH_ENV_VAR, "no")
    with pytest.raises(SettingError, match="INMANTA_MITOGEN_PREFETCH is 'no'"):
        handle(proxy, paths[0])


@pytest.mark.parametrize("where", ["subclass", "class", "instance"])
def test_nothing_is_prefetched_through_a_replaced_remote_call(
    messages: Messages, paths: list[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    original = Proxy.remote_call
    seen: list[object] = []

    def replaced(self: Proxy, function: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(function)
        return original(self, function, *args, **kwargs)

    subclass = type("Other", (Proxy,), {"remote_call": replaced} if where == "subclass" else {})
    if where == "class":
        monkeypatch.setattr(Proxy, "remote_call", replaced)
    with subclass(dict(LOCAL)) as proxy:
        if where == "instance":
            proxy.remote_call = functools.partial(replaced, proxy)
        for path in paths:
            handle(proxy, path)
            assert messages.taken() == 3
    assert len(seen) == 3 * len(paths)


def test_a_lost_host_drops_what_was_prefetched(proxy: Proxy, asked: str, tmp_path: Path) -> None:
    with pytest.raises(RemoteException, match="the connection was lost"):
        proxy.remote_call(far_side.note_and_die, str(tmp_path / "trace"))
    assert proxy.file_stat(asked)["permissions"] == 644


def test_nobody_waits_for_an_answer_to_what_was_not_sent(
    proxy: Proxy, paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handle(proxy, paths[0])
    proxy.begin_resource("fs::File")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            proxy.file_exists(paths[1])

    assert proxy.hash_file(paths[1]) == proxy.hash_file(paths[0])
