"""
Running programs on a host.
"""

import contextlib
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import mitogen.core
import mitogen.master
import pytest

import support
from inmanta_mitogen import run
from inmanta_mitogen.failures import CommandTimeoutError
from inmanta_mitogen.process import decode_output, run_raw

CHECKOUT = pathlib.Path(__file__).parents[2]
#: Long enough that only a killed one ends within the test.
FOREVER = "1000"


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    before = support.Snapshot.take()
    yield
    # mitogen keeps sockets for the next connection.
    if not {"local_context", "interpreter"} & set(request.fixturenames):
        before.settle()


def is_running(pid: int) -> bool:
    return not support.is_gone(pid)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@contextlib.contextmanager
def killed_at_the_end(pid_file: pathlib.Path) -> Iterator[Callable[[], int]]:
    """
    Ends a process that a test leaves behind on purpose.

    :return: What waits for its process id.
    """

    def read() -> int:
        wait_until(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"), "no pid")
        return int(pid_file.read_text())

    try:
        yield read
    finally:
        if pid_file.exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(read(), signal.SIGKILL)


# What comes back


def test_run_returns_stripped_texts_and_the_exit_status() -> None:
    assert run("sh", ["-c", "echo; echo ' out '; echo ' err ' >&2; exit 3"]) == ("out", "err", 3)


def test_line_ends_within_the_text_stay_as_they_are() -> None:
    assert run("printf", ["a\\r\\nb\\rc"])[0] == "a\r\nb\rc"


def test_a_command_ended_by_a_signal_has_its_negative_number() -> None:
    assert run("sh", ["-c", "kill -9 $$"]) == ("", "", -9)


def test_arguments_may_be_any_sequence_and_reach_the_command_unchanged() -> None:
    odd = ("", " ", "*", "$HOME", "a\nb", "é", "'\"\\")
    assert run_raw("printf", ("%s\\0", *odd)).stdout == "".join(f"{arg}\0" for arg in odd).encode()


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"\xff", "\ufffd"),
        (b"caf\xe9!", "caf\ufffd!"),
        (b"\xed\xb3\xbf", "\ufffd\ufffd\ufffd"),
        ("\u00a0 x \u2003".encode(), "\u00a0 x \u2003"),
    ],
)
def test_texts_are_utf8_with_replaced_bytes_and_stripped_of_ascii_space(
    raw: bytes, text: str
) -> None:
    assert run("cat", stdin=raw)[0] == text
    # No lone surrogates, which the orchestrator's database refuses.
    text.encode("utf-8")


def test_the_text_of_binary_output_takes_no_more_than_four_bytes_a_byte() -> None:
    raw = b"\xff" * (4 << 20)
    tracemalloc.start()
    try:
        text = run("cat", stdin=raw)[0]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(text) == len(raw)
    assert peak < 5 * len(raw)


def test_200_megabytes_of_output_arrive_whole() -> None:
    size = 200 << 20
    stdout, stderr, code = run_raw("sh", ["-c", f"yes 0123456 | head -c {size}; echo done >&2"])
    assert (len(stdout), stderr, code) == (size, b"done\n", 0)
    assert stdout[:8] * (size // 8) == stdout
    assert len(decode_output(stdout)) == size - 1


def test_much_output_on_both_streams_at_once_arrives() -> None:
    done = run_raw("sh", ["-c", "yes a | head -c 3000000 & yes b | head -c 3000000 >&2; wait"])
    assert done.stdout.count(b"a\n") == 1500000
    assert done.stderr.count(b"b\n") == 1500000


# What the command gets


def test_env_is_added_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INHERITED", "yes")
    monkeypatch.setenv("CHANGED", "old")
    env = {"CHANGED": "new", "ADDED": "é"}
    out, _, _ = run("sh", ["-c", "echo $INHERITED $CHANGED $ADDED"], env)
    assert out == "yes new é"


def test_an_inherited_pythonpath_is_dropped_unless_env_sets_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/inherited")
    assert run("sh", ["-c", "echo ${PYTHONPATH-unset}"])[0] == "unset"
    assert run("sh", ["-c", "echo $PYTHONPATH"], {"PYTHONPATH": "/given"})[0] == "/given"
    assert os.environ["PYTHONPATH"] == "/inherited"


def test_cwd_is_where_the_command_runs(tmp_path: pathlib.Path) -> None:
    assert run("pwd", cwd=str(tmp_path))[0] == str(tmp_path)
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho here\n")
    program.chmod(0o755)
    assert run("./program", cwd=str(tmp_path))[0] == "here"


def test_without_stdin_there_is_nothing_to_read() -> None:
    assert run("cat") == ("", "", 0)


@pytest.mark.parametrize(
    "content",
    ["été", "été".encode(), b"", b"\0\xff", b"x" * 5_000_000],
    ids=["text", "bytes", "empty", "binary", "large"],
)
def test_stdin_reaches_the_command_and_ends(content: str | bytes) -> None:
    raw = content.encode() if isinstance(content, str) else content
    assert run_raw("cat", stdin=content).stdout == raw


def test_a_command_need_not_read_its_stdin() -> None:
    assert run("true", stdin=b"x" * 5_000_000) == ("", "", 0)


def test_a_command_that_closes_its_output_still_gets_its_stdin(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "target"
    content = b"x" * 3_000_000
    run("sh", ["-c", f"exec >&- 2>&-; sleep 0.2; exec cat >{target}"], stdin=content)
    assert target.read_bytes() == content


def test_the_command_holds_no_files_of_this_process(tmp_path: pathlib.Path) -> None:
    with open(tmp_path / "secret", "w") as file:
        os.set_inheritable(file.fileno(), True)
        out, _, _ = run("ls", ["-l", "/proc/self/fd"])
    assert "secret" not in out


def test_commands_of_many_threads_do_not_mix() -> None:
    results: dict[int, tuple[str, str, int]] = {}

    def work(number: int) -> None:
        script = f"cat; echo e{number} >&2; exit {number}"
        results[number] = run("sh", ["-c", script], stdin=str(number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: (str(number), f"e{number}", number) for number in range(16)}


@pytest.mark.parametrize("locale", ["C", "fr"])
def test_run_works_in_any_locale(locale: str, tmp_path: pathlib.Path) -> None:
    names = {"LC_ALL": "C"} if locale == "C" else support.french_locale(tmp_path)
    code = (
        "from inmanta_mitogen import run\n"
        "assert run('printf', ['%s', 'é']) == ('é', '', 0)\n"
        "assert run('sh', ['-c', 'kill -15 $$'])[2] == -15\n"
        "assert run('ls', ['/nonexistent'])[2] == 2\n"
        "try: run('no-such-command')\n"
        "except FileNotFoundError as error: print(error)\n"
    )
    environment = {**os.environ, **names, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True
    )
    assert "No such command on the PATH" in done.stdout


# Too late


def test_a_timeout_ends_the_process_group_and_nothing_else(tmp_path: pathlib.Path) -> None:
    # A child, its own child in the background, and one in a session of its own, as a daemon has.
    script = f"""
        echo $$ >>pids
        sh -c 'sleep {FOREVER} & echo $! >>pids; wait' &
        while [ $(wc -l <pids) -lt 2 ]; do sleep 0.01; done
        setsid sh -c 'echo $$ >daemon; exec sleep {FOREVER}' >&- 2>&- &
        while [ ! -s daemon ]; do sleep 0.01; done
        echo started
        wait
    """
    with killed_at_the_end(tmp_path / "daemon") as wait_for_pid:
        with pytest.raises(CommandTimeoutError) as caught:
            run("sh", ["-c", script], cwd=str(tmp_path), timeout=3)
        pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
        assert len(pids) == 2
        wait_until(lambda: not any(map(is_running, pids)), "still running")
        assert is_running(wait_for_pid())
    assert str(caught.value) == (
        "Command 'sh' timed out after 3 seconds; it was ended\nIts stdout:\nstarted"
    )


@pytest.mark.parametrize("keyword", ["timeout", "call_timeout"])
def test_a_command_that_is_ended_can_clean_up(tmp_path: pathlib.Path, keyword: str) -> None:
    limit: dict[str, Any] = {keyword: 0.5}
    script = f"trap 'echo clean >{tmp_path}/up; exit' TERM; while :; do sleep 0.05; done"
    with pytest.raises(CommandTimeoutError):
        run("sh", ["-c", script], **limit)
    assert (tmp_path / "up").read_text() == "clean\n"


def test_a_command_that_ignores_sigterm_is_killed() -> None:
    begin = time.monotonic()
    with pytest.raises(CommandTimeoutError, match="it was ended"):
        run("sh", ["-c", f"trap '' TERM; sleep {FOREVER}; :"], timeout=0.5)
    # Within the five seconds that it had.
    assert time.monotonic() - begin > 5


def test_the_text_of_a_timeout_names_command_and_subcommand_and_no_argument(
    tmp_path: pathlib.Path,
) -> None:
    podman = tmp_path / "podman"
    podman.write_text("#!/bin/sh\nsleep 1000\n")
    podman.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with pytest.raises(CommandTimeoutError) as caught:
        run("podman", ["image", "pull", "secret"], env, timeout=1)
    assert re.search("podman.*pull.*timed out after 1 seconds", str(caught.value))
    assert "secret" not in str(caught.value)


def test_a_timeout_leaves_other_processes_alone() -> None:
    with subprocess.Popen(["sleep", FOREVER], stdout=subprocess.PIPE) as bystander:
        try:
            with pytest.raises(CommandTimeoutError):
                run("sleep", [FOREVER], timeout=0.2)
            assert bystander.poll() is None
        finally:
            bystander.kill()


def test_a_timeout_tells_all_that_had_been_printed() -> None:
    with pytest.raises(CommandTimeoutError) as caught:
        run("sh", ["-c", "printf 'a\\0\\377'; echo no >&2; exec sleep 1000"], timeout=0.5)
    assert caught.value.output == caught.value.stdout == b"a\0\xff"
    assert caught.value.stderr == b"no\n"
    # The text goes into logs, which can't hold every character.
    assert "Its stdout:\na\\x00\\xff\n" in str(caught.value)
    assert "Its stderr:\nno" in str(caught.value)
    assert isinstance(caught.value, subprocess.TimeoutExpired)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_timeout_quotes_the_end_of_much_output() -> None:
    with pytest.raises(CommandTimeoutError) as caught:
        run("sh", ["-c", "seq 100000; exec sleep 1000"], timeout=2)
    assert len(caught.value.output) == 588895
    text = str(caught.value)
    assert len(text) < 2500
    assert "The end of its stdout:\n" in text
    assert text.endswith("99999\n100000")


def test_a_timeout_works_for_a_command_that_prints_all_the_time() -> None:
    with pytest.raises(CommandTimeoutError):
        run("sh", ["-c", "while :; do echo y; sleep 0.01; done"], timeout=0.5)


def test_a_timeout_works_for_a_command_that_closed_its_output() -> None:
    with pytest.raises(CommandTimeoutError, match="it was ended"):
        run("sh", ["-c", f"exec >&- 2>&-; sleep {FOREVER}; :"], timeout=0.5)


def test_a_timeout_works_for_a_command_that_reads_no_stdin() -> None:
    with pytest.raises(CommandTimeoutError):
        run("sleep", [FOREVER], timeout=0.3, stdin=b"x" * 1_000_000)


@support.requires_root
def test_a_timeout_tells_what_this_user_may_not_kill(tmp_path: pathlib.Path) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "import os, subprocess, inmanta_mitogen.failures; from inmanta_mitogen.process import run\n"
        # A child that is another user's, as a program with set-user-ID would be.
        "start = subprocess.Popen\n"
        "def popen(*args, **kwargs):\n"
        "    process = start(*args, **kwargs)\n"
        "    os.setresuid(65534, 65534, 0)\n"
        "    return process\n"
        "subprocess.Popen = popen\n"
        "try: run('sh', ['-c', 'echo $$ >pid; exec sleep 1000'], timeout=0.5)\n"
        "except subprocess.TimeoutExpired as error: print(error, flush=True)\n"
        "os._exit(0)\n"
    )
    with killed_at_the_end(pid_file) as wait_for_pid:
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
            capture_output=True,
            text=True,
        )
        pid = wait_for_pid()
        assert "it could not be ended and is still running" in done.stdout
        assert is_running(pid)


def test_a_command_that_ends_in_time_is_not_timed_out() -> None:
    assert run("sh", ["-c", "sleep 0.1; echo done"], timeout=60) == ("done", "", 0)


def test_a_command_that_prints_too_much_is_ended() -> None:
    before = support.Snapshot.take()
    with pytest.raises(OSError, match="'yes' has more than the 1000000 bytes that are accepted"):
        run("yes", max_size=1_000_000)
    assert not before.added().processes


# What goes on


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_command_ends_by_itself_when_its_interpreter_is_told_to_end(
    tmp_path: pathlib.Path, number: signal.Signals
) -> None:
    # More than a pipe holds, on both streams and in.
    script = (
        "set -e; cat >got; echo $$ >started; sleep 1;"
        " head -c 300000 /dev/zero; seq 90000 >&2; echo >done"
    )
    code = f"from inmanta_mitogen import run; run('sh', ['-c', {script!r}], stdin='x' * 3000000)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}
    )
    wait_until((tmp_path / "started").exists, "not started")
    process.send_signal(number)
    assert process.wait(20) == -number
    assert not (tmp_path / "done").exists()
    wait_until((tmp_path / "done").exists, "the command was ended")
    assert (tmp_path / "got").stat().st_size == 3_000_000


def test_a_timeout_holds_when_the_interpreter_is_gone(tmp_path: pathlib.Path) -> None:
    script = f"echo $$ >pid; sleep {FOREVER}"
    code = f"from inmanta_mitogen import run; run('sh', ['-c', {script!r}], timeout=1.5)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}
    )
    with killed_at_the_end(tmp_path / "pid") as wait_for_pid:
        pid = wait_for_pid()
        process.terminate()
        assert process.wait(20) == -signal.SIGTERM
        assert is_running(pid)
        wait_until(lambda: not is_running(pid), "it is still running")


def test_a_server_in_the_background_can_go_on_printing(tmp_path: pathlib.Path) -> None:
    server = "while :; do echo line || exit; echo x >>log; sleep 0.1; done"
    script = f"nohup sh -c 'echo $$ >pid; sleep 6; {server}' & echo started"
    code = f"from inmanta_mitogen import run; print(run('sh', ['-c', {script!r}]))"
    with killed_at_the_end(tmp_path / "pid") as wait_for_pid:
        # Its interpreter is gone as well.
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
            capture_output=True,
            text=True,
        )
        assert done.stdout == "('started', '', 0)\n"
        log = tmp_path / "log"
        wait_until(lambda: log.exists() and log.stat().st_size > 20, "it prints no more")
        assert is_running(wait_for_pid())


def test_output_that_comes_after_the_end_of_the_command_arrives() -> None:
    late = "(for i in 1 2 3; do sleep 1; echo late $i; done) & echo early"
    assert run("sh", ["-c", late])[0] == "early\nlate 1\nlate 2\nlate 3"
    assert run("bash", ["-c", "seq 3 > >(sleep 1; cat)"])[0] == "1\n2\n3"


def test_a_timeout_does_not_fail_a_command_that_has_ended(tmp_path: pathlib.Path) -> None:
    daemon = "while :; do echo chat; sleep 0.1; done"
    pid_file = tmp_path / "pid"
    script = f"setsid sh -c 'echo $$ >{pid_file}; {daemon}' & echo started; exit 4"
    with killed_at_the_end(pid_file) as wait_for_pid:
        out, _, code = run("sh", ["-c", script], timeout=1)
        assert out.startswith("started")
        assert code == 4
        assert is_running(wait_for_pid())


def test_an_exit_status_arrives_where_sigchld_is_ignored() -> None:
    code = (
        "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "from inmanta_mitogen import run\n"
        "assert run('sh', ['-c', 'exit 3'])[2] == 3\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# What can't be run


def test_a_missing_command_is_named_with_the_path_it_was_looked_for_on() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        run("no-such-command", ["secret"], {"PATH": "/nowhere:/bin"})
    assert str(caught.value) == (
        "[Errno 2] No such command on the PATH /nowhere:/bin: 'no-such-command'"
    )


@pytest.mark.parametrize("command", ["ls -l /tmp", "/bin/ls -l", "no-such-command -x"])
def test_a_command_with_its_arguments_in_one_string_says_what_to_do(command: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        run(command)
    assert str(caught.value) == (
        "[Errno 2] No such command: this is a command with its arguments in one string, pass them"
        f" as a list, run({command.split()[0]!r}, [...]): {command!r}"
    )
    assert caught.value.filename == command


def test_the_path_of_env_is_the_one_that_counts() -> None:
    with pytest.raises(FileNotFoundError):
        run("true", env={"PATH": "/nowhere"})


def test_a_missing_file_is_no_question_of_the_path() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        run("/no/such/command")
    assert str(caught.value) == "[Errno 2] No such command: '/no/such/command'"


def test_a_missing_cwd_is_told_from_a_missing_command(tmp_path: pathlib.Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(FileNotFoundError) as caught:
        run("true", cwd=missing)
    assert caught.value.filename == missing
    assert "the directory to run 'true' in" in str(caught.value)


def test_a_cwd_that_is_a_file_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="the directory to run 'true' in"):
        run("true", cwd=str(tmp_path / "file"))


def test_a_script_whose_interpreter_is_missing_says_so(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/shell\n")
    script.chmod(0o755)
    with pytest.raises(FileNotFoundError, match=r"The command is there .*, but the interpreter"):
        run(str(script))


def test_a_script_without_an_interpreter_says_so(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "script"
    script.write_text("echo\n")
    script.chmod(0o755)
    with pytest.raises(OSError, match="Not a program, nor a script with an interpreter"):
        run(str(script))


def test_a_file_that_may_not_be_executed_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match=f"Not allowed to execute the command.*{tmp_path}"):
        run(str(tmp_path / "file"))


def test_too_many_arguments_say_what_to_do() -> None:
    with pytest.raises(OSError, match=r"too large .*: use stdin or a file"):
        run("true", ["x" * 100_000] * 100)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        (["a", 1], {}, TypeError, "Argument 2 must be a string, not int"),
        (["a", None], {}, TypeError, "Argument 2 must be a string, not NoneType"),
        ("ab", {}, TypeError, "The arguments must be a list of strings, not one str"),
        (["secret\0"], {}, ValueError, "Argument 1 holds a NUL"),
        (["\ud800"], {}, ValueError, "Argument 1 can't be encoded"),
        ([], {"env": {"A": 1}}, TypeError, "The environment variable 'A' must be a string"),
        ([], {"env": {1: "A"}}, TypeError, "The name 1 of an environment variable must be"),
        ([], {"env": {"A": "secret\0"}}, ValueError, "The environment variable 'A' holds a NUL"),
        (
            [],
            {"env": {"A=B": "c"}},
            ValueError,
            "'A=B' can't be the name of an environment variable",
        ),
        ([], {"env": {"": "c"}}, ValueError, "'' can't be the name of an environment variable"),
        ([], {"cwd": "/\0"}, ValueError, "The cwd holds a NUL"),
        ([], {"timeout": "1"}, TypeError, "The timeout must be a number of seconds, not str"),
        ([], {"timeout": float("nan")}, ValueError, "not NaN"),
        ([], {"stdin": 1}, TypeError, "The stdin must be bytes or text, not int"),
    ],
)
def test_a_bad_argument_is_named_and_not_shown(
    arguments: list[str], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        run("true", arguments, **options)
    assert text in str(caught.value)
    assert "secret" not in str(caught.value)


# Over a connection


def test_odd_bytes_survive_the_way_to_the_host_and_are_replaced_when_they_come_back(
    local_context: Callable[..., Any],
) -> None:
    assert local_context(run, "cat", stdin="\udcff")[0] == "\ufffd"


def test_a_timeout_on_a_host_tells_everything_in_its_text(
    local_context: Callable[..., Any],
) -> None:
    with pytest.raises(mitogen.core.CallError) as caught:
        local_context(run, "sh", ["-c", "printf '\\377ab'; exec sleep 1000"], timeout=0.5)
    text = str(caught.value)
    assert text.startswith("inmanta_mitogen.failures.CommandTimeoutError: Command 'sh' timed")
    assert "\\xffab" in text


@pytest.mark.parametrize("interpreter", support.find_interpreters(), ids=str)
def test_a_cwd_that_the_locale_cannot_hold_works_on_a_host(
    interpreter: support.Interpreter, tmp_path: pathlib.Path
) -> None:
    there = tmp_path / "été"
    there.mkdir()
    ascii_only = ["env", "LC_ALL=C", "PYTHONCOERCECLOCALE=0", "PYTHONUTF8=0"]
    with call_through_mitogen([*ascii_only, interpreter.path]) as call:
        assert call(sys.getfilesystemencoding) == "ascii"
        assert call(run, "sh", ["-c", "echo >x"], cwd=str(there)) == ("", "", 0)
        assert (there / "x").exists()
        with pytest.raises(mitogen.core.CallError, match="directory to run 'true' in: '.*été/è'"):
            call(run, "true", cwd=str(there / "è"))
        with pytest.raises(mitogen.core.CallError, match="No such command: '.*été/è'"):
            call(run, str(there / "è"))


@contextlib.contextmanager
def call_through_mitogen(python_path: list[str]) -> Iterator[Callable[..., Any]]:
    """Call functions in an interpreter of its own."""
    broker = mitogen.master.Broker(install_watcher=False)
    router = mitogen.master.Router(broker)
    try:
        yield router.local(python_path=python_path).call
    finally:
        broker.shutdown()
        broker.join()


@pytest.fixture(params=support.find_interpreters(), ids=str)
def local_context(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """
    Calls functions through mitogen, in an interpreter of its own.
    """
    with call_through_mitogen([request.param.path]) as call:
        yield call
