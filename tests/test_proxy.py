"""What a proxy promises to handlers, shown on a real interpreter of this machine."""

import collections.abc
import concurrent.futures
import hashlib
import importlib
import logging
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import far_side
import mitogen.core
import pytest

import inmanta_mitogen
import support
from inmanta_mitogen.dispatch import CHUNK_SIZE
from inmanta_plugins.mitogen import (
    CALL_TIMEOUT_ENV_VAR,
    CallTimeoutError,
    ContextError,
    Proxy,
    PythonNotFoundError,
    RemoteException,
    SettingError,
)
from support import LOCAL, Recorder

# The connection


def test_a_proxy_is_connected_and_disconnected_again_and_again() -> None:
    proxy = Proxy(dict(LOCAL))
    proxy.disconnect()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="here is not connected"):
            _ = proxy.context
        with pytest.raises(RuntimeError, match="here is not connected"):
            proxy.run("true")
        with proxy:
            context = proxy.context
            with pytest.raises(RuntimeError, match="connected already"):
                proxy.connect()
            assert proxy.connect(exists_ok=True) is context
            assert proxy.run("echo", ["there"])[0] == "there"
        proxy.disconnect()


@pytest.mark.parametrize("best_effort", [False, True])
def test_a_host_that_does_not_leave_is_cut_off(nothing_left: None, best_effort: bool) -> None:
    proxy = Proxy(dict(LOCAL))
    proxy.connect()
    support.freeze(proxy.remote_call(os.getpid))
    if best_effort:
        proxy.disconnect(timeout=0.3, best_effort=True)
    else:
        with pytest.raises(TimeoutError, match=r"here did not end its interpreter within 0\.3"):
            proxy.disconnect(timeout=0.3)


def test_a_missing_interpreter_is_named_with_those_that_are_there(nothing_left: None) -> None:
    proxy = Proxy({"method_name": "local", "name": "here", "python_path": ["/nope/python"]})
    with pytest.raises(PythonNotFoundError) as caught:
        proxy.connect()
    assert caught.value.filename == "/nope/python"
    assert caught.value.strerror == "No such python interpreter on host here (local)"
    assert "found on that host: " in str(caught.value)
    assert any("README" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "x", "password": "canary"},
        {"method_name": "ssh", "hostname": "h", "port": "22a", "password": "canary"},
        None,
    ],
)
def test_a_wrong_context_is_refused_before_anything_starts(wrong: dict[str, object]) -> None:
    before = support.Snapshot()
    with pytest.raises(ContextError) as caught:
        Proxy(wrong).connect()
    assert "canary" not in str(caught.value)
    assert not before.added()


# Calls and their records


def test_each_call_leaves_one_record(proxy: Proxy, recorder: Recorder) -> None:
    recorder.records.clear()
    assert proxy.remote_call(far_side.echo, 1, "a" * 60, key=b"x") == [
        [1, "a" * 60],
        {"key": b"x"},
    ]
    ((level, message, record),) = recorder.records
    assert level == logging.DEBUG
    assert message == "Calling function %(function)s in context %(context_name)s: %(result)s"
    assert record.pop("duration") > 0
    assert record == {
        "function": "far_side.echo",
        "context_name": "here",
        "args": [1, '"' + "a" * 44 + "<...>"],
        "kwargs": {"key": "b'x'"},
        "result": '[[1, "' + "a" * 39 + "<...>",
    }


def test_a_failed_call_is_recorded_with_its_exception(proxy: Proxy, recorder: Recorder) -> None:
    recorder.records.clear()
    with pytest.raises(RemoteException, match=r"builtins.ValueError: no luck") as caught:
        proxy.remote_call(far_side.fail, "no luck")
    assert caught.value.remote_type == "builtins.ValueError"
    assert isinstance(caught.value.remote_exception, mitogen.core.CallError)
    ((_, message, record),) = recorder.records
    assert message.endswith(": %(exception)s")
    assert str(record["exception"]).startswith('"builtins.ValueError: no luck')
    assert "result" not in record


def test_functions_are_logged_as_their_users_know_them(proxy: Proxy, recorder: Recorder) -> None:
    recorder.records.clear()
    proxy.logger = other = Recorder()
    proxy.remote_call(len, "abc")
    proxy.remote_call(os.getpid)
    proxy.file_exists("/")
    proxy.remote_call(far_side.Holder.static, 1)
    assert proxy.remote_call(far_side.Holder.name) == "Holder"
    assert not recorder.records
    assert [call["function"] for call in other.calls] == [
        "len",
        "os.getpid",
        "inmanta_mitogen.lexists",
        "far_side.Holder.static",
        "far_side.Holder.name",
    ]


def test_a_context_without_a_name_is_shown_by_where_it_is(recorder: Recorder) -> None:
    with Proxy({**LOCAL, "name": ""}, logger=recorder) as proxy:
        proxy.run("true")
    assert recorder.calls[0]["context_name"] == "local"


def closure() -> collections.abc.Callable[[], int]:
    def within() -> int:
        return 3

    return within


@pytest.mark.parametrize(
    ("call", "trouble"),
    [
        (lambda proxy: proxy.remote_call(lambda: 1), "lambda"),
        (lambda proxy: proxy.remote_call(closure()), "within cannot be called on a host"),
        (lambda proxy: proxy.remote_call(far_side.Holder().method), "Holder.method.* bound to"),
        (lambda proxy: proxy.remote_call(far_side.echo, 1, threading.Lock()), "argument 2 of far_"),
        (lambda proxy: proxy.remote_call(far_side.echo, key=object()), "argument 'key' of far_s"),
        (
            lambda proxy: proxy.remote_call(far_side.echo, [1, {"a": Path("/")}]),
            "argument 1 of far_side.echo .*PosixPath",
        ),
    ],
)
def test_what_cannot_be_called_or_sent_is_named(
    proxy: Proxy, call: collections.abc.Callable[[Proxy], object], trouble: str
) -> None:
    interpreter = proxy.remote_call(os.getpid)
    with pytest.raises(TypeError, match=trouble) as caught:
        call(proxy)
    assert isinstance(caught.value, RemoteException)
    assert proxy.remote_call(os.getpid) == interpreter


@pytest.mark.parametrize("function", [far_side.unsendable, far_side.unreadable])
def test_a_result_that_cannot_be_pickled_is_a_channel_error_and_the_interpreter_stays(
    proxy: Proxy, function: collections.abc.Callable[[], object]
) -> None:
    interpreter = proxy.remote_call(os.getpid)
    with pytest.raises(RemoteException, match=rf"far_side\.{function.__name__}") as caught:
        proxy.remote_call(function)
    assert isinstance(caught.value.remote_exception, mitogen.core.ChannelError)
    assert proxy.remote_call(os.getpid) == interpreter


def test_secrets_and_blobs_are_logged_masked(proxy: Proxy, recorder: Recorder) -> None:
    secret, blob = mitogen.core.Secret("canary"), mitogen.core.Blob(b"canary")
    assert proxy.remote_call(far_side.echo, secret, [blob])[0] == ["canary", [b"canary"]]
    assert "canary" not in repr(recorder.records)


# Files and commands


@pytest.mark.parametrize(
    ("mode", "kind"), [(644, TypeError), ("999", ValueError), ("9z", ValueError)]
)
def test_a_wrong_mode_is_refused(proxy: Proxy, mode: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"octal digits, such as '644' or '4755', not {mode!r}"):
        proxy.chmod("/", mode)


class Spied(Proxy):
    """Keeps what goes through its remote_call."""

    spied: Any = None

    def remote_call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        self.spied = (function, args, kwargs)
        return super().remote_call(function, *args, **kwargs)


def test_read_run_and_put_are_plain_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "file")
    with Spied(dict(LOCAL)) as proxy:
        proxy.put(path, b"content")
        assert proxy.spied == (inmanta_mitogen.put, (path, b"content"), {})
        assert proxy.read(path) == "content"
        assert proxy.spied == (inmanta_mitogen.read, (path,), {})
        assert proxy.read_binary(path) == b"content"
        assert proxy.spied == (inmanta_mitogen.read_binary, (path,), {})
        assert proxy.run("true") == ("", "", 0)
        assert proxy.spied == (inmanta_mitogen.run, ("true", [], None, None, None), {})
        proxy.call_timeout = 60.0
        proxy.run("cat", ["-"], {"A": "b"}, "/", 9, stdin=b"x", max_size=5)
        assert proxy.spied == (
            inmanta_mitogen.run,
            ("cat", ["-"], {"A": "b"}, "/", 9),
            {"max_size": 5, "stdin": b"x", "call_timeout": 60.0},
        )
        monkeypatch.setenv("INMANTA_MITOGEN_MAX_SIZE", "1000")
        proxy.read(path)
        assert proxy.spied == (inmanta_mitogen.read, (path,), {"max_size": 1000})


def test_tracebacks_show_no_frame_of_this_module_or_of_mitogen(proxy: Proxy) -> None:
    with pytest.raises(RemoteException) as caught:
        proxy.remote_call(far_side.fail, "no luck")
    assert re.findall(r'File "([^"]*)", line \d+, in (.*)', str(caught.value)) == [
        ("master:far_side.py", "fail")
    ]
    with pytest.raises(RemoteException) as caught:
        proxy.read("/nonexistent")
    assert "File " not in str(caught.value)
    assert str(caught.value) == str(caught.value.remote_exception)


def test_syntax_too_new_for_the_host_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = support.find_interpreter(3, 9)
    if old is None:
        pytest.skip("needs Python 3.9")
    source = "def f(x):\n    match x:\n        case 1:\n            return 2\n"
    (tmp_path / "newer.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    function = importlib.import_module("newer").f
    with (
        Proxy({**LOCAL, "python_path": [old.path]}) as proxy,
        pytest.raises(RemoteException, match="does not know a syntax in the file of newer.f"),
    ):
        proxy.remote_call(function, 1)


def test_a_logger_that_raises_keeps_no_interpreter(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Recorder, "_log_msg")
    with pytest.raises(NotImplementedError):
        proxy.disconnect()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_owners_are_set_by_name_or_number(proxy: Proxy, tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    proxy.put(path, b"")
    proxy.chown(path, "nobody")
    assert proxy.file_stat(path)["owner"] == "nobody"
    proxy.chown(path, 54321, 54322)
    assert proxy.file_stat(path) == {"owner": "54321", "group": "54322", "permissions": 644}


def test_commands_run(proxy: Proxy, recorder: Recorder) -> None:
    assert proxy.run("sh", ["-c", "echo ' out '; echo err >&2; exit 3"]) == ("out", "err", 3)
    assert recorder.calls[0]["args"][0] == "sh"
    assert proxy.run("cat", stdin="\udcff")[0] == "\ufffd"
    with pytest.raises(RemoteException, match="no-such-program"):
        proxy.run("no-such-program")
    late = ["-c", "printf '\\377ab'; exec sleep 1000"]
    with pytest.raises(RemoteException, match=r"CommandTimeoutError: Command 'sh' timed") as caught:
        proxy.run("sh", late, timeout=1)
    assert "\\xffab" in str(caught.value)


@pytest.mark.parametrize("interpreter", support.find_interpreters()[:2], ids=str)
def test_methods_for_files_work_with_names_outside_the_locale_of_the_host(
    interpreter: support.Interpreter, tmp_path: Path
) -> None:
    directory, content = tmp_path / "\u00e9t\u00e9", os.urandom(3 * CHUNK_SIZE)
    file, link, copy = (str(directory / name) for name in ("f\u00eate", "li\u00e9", "\u65e5"))
    ascii_only = ["env", "LC_ALL=C", "PYTHONUTF8=0", "PYTHONCOERCECLOCALE=0", interpreter.path]
    with Proxy({**LOCAL, "python_path": ascii_only}) as proxy:
        assert proxy.remote_call(sys.getfilesystemencoding) == "ascii"
        proxy.mkdir(str(directory))
        proxy.chmod(str(directory), "2711")
        assert proxy.file_stat(str(directory))["permissions"] == 2711
        assert not proxy.is_symlink(str(directory))
        proxy.put(file, content)
        assert proxy.read_binary(file) == content
        proxy.get_file(file, copy)
        proxy.put(copy, "caf\u00e9\n".encode())
        assert proxy.read(copy) == "caf\u00e9\n"
        with pytest.raises(RemoteException, match="FileNotFoundError"):
            proxy.mkdir(str(directory / "no" / "parent"))
        proxy.symlink("f\u00eate", link)
        assert proxy.is_symlink(link)
        assert proxy.readlink(link) == "f\u00eate"
        assert proxy.hash_file(link) == hashlib.sha1(content).hexdigest()
        assert sorted(os.listdir(directory)) == ["f\u00eate", "li\u00e9", "\u65e5"]
        proxy.remove(link)
        assert not proxy.file_exists(link)
        assert proxy.run("ls", [file], cwd=str(directory)) == (file, "", 0)
        with pytest.raises(RemoteException, match="No such file.*: '.*\u00e9t\u00e9/\u00e8'"):
            proxy.run("ls", cwd=str(directory / "\u00e8"))
        with pytest.raises(RemoteException, match="No such file.*: '.*\u00e9t\u00e9/\u00e8'"):
            proxy.run(str(directory / "\u00e8"))
        proxy.rmdir(str(directory))
        assert not directory.exists()


# Bounded calls


def test_a_call_over_its_time_ends_and_the_next_one_works(proxy: Proxy) -> None:
    proxy.run("true")
    proxy.call_timeout = 0.3
    with pytest.raises(CallTimeoutError, match=r"far_side.nap .*within 0\.3 seconds") as caught:
        proxy.remote_call(far_side.nap, 60)
    proxy.call_timeout = 20
    assert isinstance(caught.value, RemoteException)
    assert isinstance(caught.value, TimeoutError)
    assert proxy.run("echo", ["next"])[0] == "next"


def test_the_default_of_the_call_timeout_is_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CALL_TIMEOUT_ENV_VAR, "12.5")
    assert Proxy(dict(LOCAL)).call_timeout == 12.5
    assert Proxy(dict(LOCAL), call_timeout=3).call_timeout == 3
    monkeypatch.setenv(CALL_TIMEOUT_ENV_VAR, "")
    assert Proxy(dict(LOCAL)).call_timeout is None


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf"])
def test_a_wrong_call_timeout_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if value != "soon":
        with pytest.raises(ValueError, match="call_timeout is"):
            Proxy(dict(LOCAL), call_timeout=float(value))
    monkeypatch.setenv(CALL_TIMEOUT_ENV_VAR, value)
    with pytest.raises(SettingError, match=f"{CALL_TIMEOUT_ENV_VAR} is '{value}'"):
        Proxy(dict(LOCAL))


# Concurrency


def test_calls_racing_with_disconnects_end(idle_sockets: None, nothing_left: None) -> None:
    proxy = Proxy(dict(LOCAL))
    stop = threading.Event()
    wrong: list[object] = []

    def call() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            try:
                answer = proxy.remote_call(far_side.echo, number)
            except (RemoteException, RuntimeError):
                continue
            if answer != [[number], {}]:
                wrong.append(answer)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        callers = [pool.submit(call) for _ in range(4)]
        for _ in range(4):
            proxy.connect(exists_ok=True)
            time.sleep(0.05)
            proxy.disconnect(timeout=10, best_effort=True)
        stop.set()
        for caller in callers:
            caller.result(timeout=30)
    assert not wrong
