"""Questions that are sent along with the first one, and when they are not."""

import collections.abc
import os
import pathlib
import threading
import time
from typing import Any

import far_side
import pytest

from inmanta_plugins.mitogen import Proxy, RemoteException, SettingError, settings
from inmanta_plugins.mitogen.connections.hub import Connection
from support import LOCAL, Recorder

pytestmark = pytest.mark.usefixtures("idle_sockets")

CONTENT = b"content"


@pytest.fixture
def paths(tmp_path: pathlib.Path) -> list[str]:
    """Files with the same content."""
    files = [tmp_path / f"file{number}" for number in range(4)]
    for file in files:
        file.write_bytes(CONTENT)
    return [str(file) for file in files]


class Messages:
    """Counts what is sent to the host."""

    def __init__(self) -> None:
        self.sent = 0

    def taken(self) -> int:
        """Return how many were sent since the last time."""
        sent, self.sent = self.sent, 0
        return sent


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> Messages:
    counter = Messages()
    post = Connection.post

    def counting(self: Connection, message: object) -> None:
        counter.sent += 1
        post(self, message)

    monkeypatch.setattr(Connection, "post", counting)
    return counter


def file_questions(proxy: Proxy, path: str) -> list[object]:
    """What fs::File asks about a file that is as it should be."""
    return [proxy.file_exists(path), proxy.file_stat(path)["permissions"], proxy.hash_file(path)]


def text_questions(proxy: Proxy, path: str) -> list[object]:
    """What files::TextFile asks."""
    return [proxy.file_exists(path), proxy.file_stat(path)["permissions"], proxy.read_binary(path)]


def link_questions(proxy: Proxy, path: str) -> list[object]:
    """What fs::Symlink asks."""
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
    tmp_path: pathlib.Path,
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


def test_each_type_of_resource_has_its_own_questions(
    proxy: Proxy, messages: Messages, paths: list[str]
) -> None:
    handle(proxy, paths[0])
    handle(proxy, paths[0], text_questions, "files::TextFile")
    messages.taken()
    assert handle(proxy, paths[1])[2] == handle(proxy, paths[0])[2]
    assert handle(proxy, paths[1], text_questions, "files::TextFile")[2] == CONTENT
    assert messages.taken() == 3


def test_a_file_that_changes_between_two_questions_about_it_is_asked_again(
    proxy: Proxy, messages: Messages, paths: list[str]
) -> None:
    handle(proxy, paths[0])
    proxy.begin_resource("fs::File")
    before = file_questions(proxy, paths[1])
    messages.taken()
    pathlib.Path(paths[1]).write_bytes(b"other")
    assert proxy.hash_file(paths[1]) != before[2]
    assert messages.taken() == 1
    os.remove(paths[1])
    assert not proxy.file_exists(paths[1])
    assert messages.taken() == 1


def write(proxy: Proxy, path: str) -> None:
    proxy.put(path, b"other")


def write_large(proxy: Proxy, path: str) -> None:
    proxy.put(path, bytes(1 << 20))


def write_file(proxy: Proxy, path: str) -> None:
    proxy.put_file("/etc/hostname", path)


def submit(proxy: Proxy, path: str) -> object:
    return proxy.submit(far_side.echo).result(60)


def call_itself(proxy: Proxy, path: str) -> object:
    return proxy.context.call(os.truncate, path, 0)


def ask_about_another(proxy: Proxy, path: str) -> object:
    return proxy.is_symlink(os.path.dirname(path))


def run(proxy: Proxy, path: str) -> object:
    return proxy.run("true")


@pytest.mark.parametrize(
    "call", [write, write_large, write_file, submit, call_itself, ask_about_another, run]
)
def test_any_other_call_drops_what_was_prefetched(
    proxy: Proxy,
    messages: Messages,
    paths: list[str],
    call: collections.abc.Callable[[Proxy, str], object],
) -> None:
    handle(proxy, paths[0])
    proxy.begin_resource("fs::File")
    proxy.file_exists(paths[1])
    call(proxy, paths[1])
    pathlib.Path(paths[1]).write_bytes(b"last")
    os.chmod(paths[1], 0o600)
    messages.taken()
    assert proxy.file_stat(paths[1])["permissions"] == 600
    assert proxy.read_binary(paths[1]) == b"last"
    assert messages.taken() == 2


def test_the_end_of_a_resource_drops_what_was_prefetched(
    proxy: Proxy, messages: Messages, paths: list[str]
) -> None:
    handle(proxy, paths[0])
    proxy.begin_resource("fs::File")
    proxy.file_exists(paths[1])
    proxy.end_resource()
    messages.taken()
    os.chmod(paths[1], 0o600)
    assert proxy.file_stat(paths[1])["permissions"] == 600
    assert messages.taken() == 1


def test_a_call_of_another_thread_drops_what_was_prefetched(
    proxy: Proxy, messages: Messages, paths: list[str]
) -> None:
    handle(proxy, paths[0])
    proxy.begin_resource("fs::File")
    proxy.file_exists(paths[1])
    other = threading.Thread(target=proxy.chmod, args=(paths[1], "600"))
    other.start()
    other.join()
    messages.taken()
    assert proxy.file_stat(paths[1])["permissions"] == 600
    assert messages.taken() == 1


def test_two_threads_on_one_proxy_see_their_own_changes(proxy: Proxy, paths: list[str]) -> None:
    proxy.begin_resource("fs::File")
    wrong: list[object] = []

    def change_and_look(path: str) -> None:
        for number in range(150):
            mode = 600 + number % 8 * 10
            proxy.file_exists(path)
            proxy.chmod(path, str(mode))
            proxy.file_exists(path)
            seen = proxy.file_stat(path)["permissions"]
            if seen != mode:
                wrong.append((seen, mode))

    threads = [threading.Thread(target=change_and_look, args=(path,)) for path in paths[:2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_prefetched_answer_is_used_once(
    proxy: Proxy, messages: Messages, paths: list[str]
) -> None:
    handle(proxy, paths[0])
    proxy.begin_resource("fs::File")
    proxy.file_exists(paths[1])
    proxy.file_stat(paths[1])
    messages.taken()
    os.chmod(paths[1], 0o600)
    assert proxy.file_stat(paths[1])["permissions"] == 600
    assert messages.taken() == 1


def test_a_prefetched_answer_is_not_used_after_a_second(
    proxy: Proxy, messages: Messages, paths: list[str]
) -> None:
    handle(proxy, paths[0])
    proxy.begin_resource("fs::File")
    proxy.file_exists(paths[1])
    time.sleep(settings.PREFETCHED_SECONDS + 0.1)
    os.chmod(paths[1], 0o600)
    messages.taken()
    assert proxy.file_stat(paths[1])["permissions"] == 600
    assert messages.taken() == 1


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


def test_the_log_has_the_same_records_in_the_same_order(
    proxy: Proxy, recorder: Recorder, paths: list[str]
) -> None:
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


def test_a_new_file_takes_as_many_messages_as_without_prefetching(
    proxy: Proxy, messages: Messages, tmp_path: pathlib.Path
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
    proxy: Proxy, messages: Messages, paths: list[str], tmp_path: pathlib.Path, kind: str
) -> None:
    handle(proxy, paths[0], text_questions)
    path = {"large": paths[1], "fifo": str(tmp_path / "fifo"), "proc": "/proc/version"}[kind]
    if kind == "large":
        pathlib.Path(path).write_bytes(bytes(64 * 1024 + 1))
    elif kind == "fifo":
        os.mkfifo(path)
    messages.taken()
    proxy.begin_resource("fs::File")
    assert proxy.file_exists(path)
    proxy.file_stat(path)
    assert messages.taken() == 1
    if kind != "fifo":
        assert proxy.read_binary(path) == pathlib.Path(path).read_bytes()
        assert messages.taken() == 1
    assert proxy.remote_call(far_side.echo, 1) == [[1], {}]


# Where nothing is prefetched


def test_nothing_is_prefetched_without_a_resource(
    proxy: Proxy, messages: Messages, paths: list[str]
) -> None:
    for path in paths:
        file_questions(proxy, path)
        assert messages.taken() == 3


def test_a_variable_turns_prefetching_off(
    proxy: Proxy, messages: Messages, paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(settings.PREFETCH_ENV_VAR, "0")
    for path in paths:
        handle(proxy, path)
        assert messages.taken() == 3
    monkeypatch.setenv(settings.PREFETCH_ENV_VAR, "no")
    with pytest.raises(SettingError, match="INMANTA_MITOGEN_PREFETCH is 'no'"):
        handle(proxy, paths[0])


def test_nothing_is_prefetched_through_an_overridden_remote_call(
    messages: Messages, paths: list[str]
) -> None:
    class Counting(Proxy):
        calls = 0

        def remote_call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return super().remote_call(function, *args, **kwargs)

    with Counting(dict(LOCAL)) as proxy:
        for path in paths:
            messages.taken()
            handle(proxy, path)
            assert messages.taken() == 3
        assert proxy.calls == 3 * len(paths)


@pytest.mark.parametrize("where", ["class", "instance"])
def test_nothing_is_prefetched_through_a_replaced_remote_call(
    proxy: Proxy,
    messages: Messages,
    paths: list[str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    original = Proxy.remote_call
    seen: list[object] = []

    def replaced(self: Proxy, function: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(function)
        return original(self, function, *args, **kwargs)

    if where == "class":
        monkeypatch.setattr(Proxy, "remote_call", replaced)
    else:
        monkeypatch.setattr(proxy, "remote_call", lambda *args, **kwargs: replaced(proxy, *args))
    for path in paths:
        handle(proxy, path)
        assert messages.taken() == 3
    assert len(seen) == 3 * len(paths)


def test_a_lost_host_is_an_error_of_the_question_that_was_asked(
    proxy: Proxy, messages: Messages, paths: list[str]
) -> None:
    handle(proxy, paths[0])
    proxy.begin_resource("fs::File")
    proxy.file_exists(paths[1])
    with pytest.raises(RemoteException, match="the connection was lost"):
        proxy.remote_call(far_side.note_and_die, paths[2])
    assert proxy.file_stat(paths[1])["permissions"] == 644
