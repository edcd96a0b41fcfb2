"""
Running programs on a host.
"""

import contextlib
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import mitogen.core
import mitogen.master
import pytest

import support
from inmanta_mitogen import run
from inmanta_mitogen.process import CommandTimeoutError, decode_output, run_raw

CHECKOUT = pathlib.Path(__file__).parents[2]
#: Long enough that only a killed one ends within the test.
FOREVER = "1000"


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    before = support.Snapshot.take()
    yield
    # mitogen keeps sockets for the next connection.
    if "local_context" not in request.fixturenames:
        before.settle()


def is_running(pid: int) -> bool:
    return any(pid == other and state not in "ZX" for other, _, state in support.processes())


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
        (b"\xff", "\ufffd\\xff"),
        (b"caf\xe9!", "caf\ufffd\\xe9!"),
        (b"a\xf0\x28b", "a\ufffd\\xf0(b"),
        (b"\xed\xb3\xbf", "\ufffd\\xed\ufffd\\xb3\ufffd\\xbf"),
    ],
)
def test_output_that_is_not_utf8_is_told_from_real_text_and_can_be_stored(
    raw: bytes, text: str
) -> None:
    assert run("cat", stdin=raw)[0] == text
    # Neither lone surrogates nor NUL, which the orchestrator's database refuses.
    text.encode("utf-8")
    # A command that really prints such an escape gives another text.
    assert run("printf", ["%s", text.replace("\ufffd", "")])[0] != text


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


def test_a_timeout_kills_the_command_and_all_its_children(tmp_path: pathlib.Path) -> None:
    # A child, its own child in the background, one in a session of its own, one that was orphaned
    # in such a session and holds the output only, and one that ignores what can be ignored.
    script = f"""
        echo $$ >>pids
        sh -c 'sleep {FOREVER} & echo $! >>pids; wait' &
        setsid sh -c 'echo $$ >>pids; sleep {FOREVER}' &
        (setsid sh -c 'echo $$ >>pids; sleep {FOREVER}' &)
        sh -c "trap '' TERM INT HUP; echo \\$\\$ >>pids; sleep {FOREVER}" &
        while [ $(wc -l <pids) -lt 5 ]; do sleep 0.01; done
        echo started
        wait
    """
    with pytest.raises(CommandTimeoutError) as caught:
        run("sh", ["-c", script], cwd=str(tmp_path), timeout=3)
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 5
    wait_until(lambda: not any(map(is_running, pids)), "still running")
    text = str(caught.value)
    assert "'sh' (with 2 arguments) did not end within 3 seconds" in text
    assert all(f"({pid})" in text for pid in pids)
    assert "Its stdout until then:\nstarted\n" in text
    assert "Nothing on stderr" in text
    assert FOREVER not in text


def test_a_timeout_kills_children_that_keep_starting_others(tmp_path: pathlib.Path) -> None:
    (tmp_path / "spawner").write_text(
        "echo x >>started\n"
        "while [ $(wc -l <started) -lt 300 ]; do setsid sh spawner & sleep 0.05; done\n"
    )
    with pytest.raises(CommandTimeoutError):
        # It goes on when there are 300, however long that takes.
        run("sh", ["-c", f"sh spawner & sleep {FOREVER}"], cwd=str(tmp_path), timeout=1)
    ours = [
        pid
        for pid, _, state in support.processes()
        if state not in "ZX" and support.command_line(pid) == "sh spawner"
    ]
    assert not ours


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
    assert "Its stdout until then:\na\\x00\\xff\n" in str(caught.value)
    assert "Its stderr until then:\nno" in str(caught.value)
    assert isinstance(caught.value, subprocess.TimeoutExpired)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_timeout_quotes_start_and_end_of_much_output() -> None:
    with pytest.raises(CommandTimeoutError) as caught:
        run("sh", ["-c", "seq 100000; exec sleep 1000"], timeout=2)
    assert len(caught.value.output) == 588895
    text = str(caught.value)
    assert len(text) < 5000
    assert "1\n2\n3\n" in text
    assert "99999\n100000" in text
    assert "[584895 bytes left out]" in text


def test_a_timeout_works_for_a_command_that_prints_all_the_time() -> None:
    with pytest.raises(CommandTimeoutError):
        run("sh", ["-c", "while :; do echo y; sleep 0.01; done"], timeout=0.5)


def test_a_timeout_works_for_a_command_that_closed_its_output() -> None:
    with pytest.raises(CommandTimeoutError) as caught:
        run("sh", ["-c", f"exec >&- 2>&-; sleep {FOREVER}; :"], timeout=0.5)
    assert "sleep (" in str(caught.value)


def test_a_timeout_works_for_a_command_that_reads_no_stdin() -> None:
    with pytest.raises(CommandTimeoutError):
        run("sleep", [FOREVER], timeout=0.3, stdin=b"x" * 1_000_000)


@support.requires_root
def test_a_timeout_tells_what_this_user_may_not_kill(tmp_path: pathlib.Path) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "import os, subprocess; from inmanta_mitogen.process import run\n"
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
        assert f"Still running: sleep ({pid}), as user 65534 may not kill it." in done.stdout
        assert "Killed: nothing." in done.stdout
        assert is_running(pid)


def test_a_command_that_ends_in_time_is_not_timed_out() -> None:
    assert run("sh", ["-c", "sleep 0.1; echo done"], timeout=60) == ("done", "", 0)


def test_an_interrupted_run_leaves_no_command_behind() -> None:
    before = support.Snapshot.take()

    def interrupt() -> None:
        # Both the shell and what it started.
        wait_until(lambda: len(before.added().processes) == 2, "not started")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run("sh", ["-c", f"sleep {FOREVER} & wait"])
    thread.join()
    assert not before.added().processes


# Daemons


@pytest.mark.parametrize("chatty", [False, True])
def test_a_daemon_that_holds_the_output_does_not_hang_run(
    tmp_path: pathlib.Path, chatty: bool
) -> None:
    daemon = "while :; do echo chat; sleep 0.1; done" if chatty else f"exec sleep {FOREVER}"
    pid_file = tmp_path / "pid"
    script = f"setsid sh -c 'echo $$ >{pid_file}; {daemon}' & echo started; exit 4"
    with killed_at_the_end(pid_file) as wait_for_pid:
        out, _, code = run("sh", ["-c", script], timeout=60)
        assert out.startswith("started")
        assert code == 4
        if not chatty:
            # It is the command's purpose, so it is left alone.
            assert is_running(wait_for_pid())


def test_all_that_a_command_printed_before_its_end_arrives_despite_a_daemon(
    tmp_path: pathlib.Path,
) -> None:
    pid_file = tmp_path / "pid"
    daemon = f"sh -c 'echo $$ >{pid_file}; exec sleep {FOREVER}'"
    script = f"{daemon} & head -c 3000000 /dev/zero"
    with killed_at_the_end(pid_file):
        assert len(run_raw("sh", ["-c", script]).stdout) == 3000000


def test_what_a_background_child_prints_right_after_the_end_arrives() -> None:
    assert run("sh", ["-c", "(sleep 0.2; echo late) & echo early"])[0] == "early\nlate"


# What can't be run


def test_a_missing_command_is_named_with_the_path_it_was_looked_for_on() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        run("no-such-command", ["secret"], {"PATH": "/nowhere:/bin"})
    assert str(caught.value) == (
        "[Errno 2] No such command on the PATH /nowhere:/bin: 'no-such-command'"
    )


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
        ([], {"env": {"A=B": "c"}}, ValueError, "'A=B' is no name for an environment variable"),
        ([], {"env": {"": "c"}}, ValueError, "'' is no name for an environment variable"),
        ([], {"cwd": "/\0"}, ValueError, "The cwd holds a NUL"),
        ([], {"timeout": "1"}, TypeError, "The timeout must be a number of seconds, not str"),
        ([], {"timeout": float("nan")}, ValueError, "not NaN"),
        ([], {"stdin": 1}, TypeError, "The stdin must be bytes or text, not int"),
    ],
)
def test_a_bad_argument_is_named_and_not_shown(
    arguments: list[str], options: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        run("true", arguments, **options)
    assert text in str(caught.value)
    assert "secret" not in str(caught.value)


# Over a connection


def test_odd_bytes_survive_the_way_to_the_host_and_are_marked_when_they_come_back(
    local_context: Callable,
) -> None:
    assert local_context(run, "cat", stdin="\udcff")[0] == "\ufffd\\xff"


def test_a_timeout_on_a_host_tells_everything_in_its_text(local_context: Callable) -> None:
    with pytest.raises(mitogen.core.CallError) as caught:
        local_context(run, "sh", ["-c", "printf '\\377ab'; exec sleep 1000"], timeout=0.5)
    text = str(caught.value)
    assert text.startswith("inmanta_mitogen.process.CommandTimeoutError: The command 'sh'")
    assert "\\xffab" in text
    assert "Killed: sleep (" in text


@pytest.fixture(params=support.find_interpreters(), ids=str)
def local_context(request: pytest.FixtureRequest) -> Iterator[Callable]:
    """
    Calls functions through mitogen, in an interpreter of its own.
    """
    broker = mitogen.master.Broker(install_watcher=False)
    router = mitogen.master.Router(broker)
    try:
        yield router.local(python_path=[request.param.path]).call
    finally:
        broker.shutdown()
        broker.join()
