"""
Running programs on a host.
"""

import contextlib
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from host_files import CHECKOUT

import support
from inmanta_mitogen import process, run
from inmanta_mitogen.failures import CommandTimeoutError
from support import wait_until

FOREVER = "1000"
"""Long enough that only a killed one ends within the test."""

pytestmark = pytest.mark.usefixtures("nothing_left")


def start_python(code: str, cwd: Path) -> "subprocess.Popen[str]":
    """Start code that runs commands in an interpreter of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", f"from inmanta_mitogen import process, run\n{code}"],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def killed_at_the_end(pid_file: Path) -> Iterator[Callable[[], int]]:
    """
    End a process that a test leaves behind on purpose.

    :return: What waits for its process id.
    """

    def read() -> int:
        wait_until(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"), "it has run")
        return int(pid_file.read_text())

    try:
        yield read
    finally:
        if pid_file.exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(read(), signal.SIGKILL)


# What comes back


@pytest.mark.parametrize(
    ("script", "result"),
    [
        ("echo; echo ' out '; echo ' err ' >&2; exit 3", ("out", "err", 3)),
        ("printf 'a\\r\\nb\\rc'", ("a\r\nb\rc", "", 0)),
        ("kill -9 $$", ("", "", -9)),
    ],
)
def test_run_returns_texts_and_exit_status(script: str, result: tuple[str, str, int]) -> None:
    assert run("sh", ["-c", script]) == result


def test_arguments_may_be_any_sequence_and_reach_the_command_unchanged() -> None:
    odd = ("", " ", "*", "$HOME", "a\nb", "é", "'\"\\")
    assert run("printf", ("%s\\0", *odd))[0] == "".join(f"{arg}\0" for arg in odd)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"\xff", "\ufffd"),
        (b"caf\xe9!", "caf\ufffd!"),
        (b"\xed\xb3\xbf", "\ufffd\ufffd\ufffd"),
        ("\u00a0 x \u2003".encode(), "\u00a0 x \u2003"),
    ],
)
def test_texts_are_utf8_and_stripped_of_ascii_space(raw: bytes, text: str) -> None:
    assert run("cat", stdin=raw)[0] == text
    # No lone surrogates, which the orchestrator's database refuses.
    text.encode("utf-8")


def test_much_output_on_both_streams_at_once_arrives() -> None:
    done = run("sh", ["-c", "yes a | head -c 3000000 & yes b | head -c 3000000 >&2; wait"])
    assert done == ("\n".join("a" * 1500000), "\n".join("b" * 1500000), 0)


def test_output_that_comes_after_the_end_of_the_command_arrives() -> None:
    late = "(for i in 1 2 3; do sleep 0.3; echo late $i; done) & echo early"
    assert run("sh", ["-c", late])[0] == "early\nlate 1\nlate 2\nlate 3"
    assert run("bash", ["-c", "seq 3 > >(sleep 0.3; cat)"])[0] == "1\n2\n3"


def test_an_exit_status_arrives_where_sigchld_is_ignored(tmp_path: Path) -> None:
    code = (
        "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "print(run('sh', ['-c', 'exit 3'])[2])\n"
    )
    assert start_python(code, tmp_path).communicate()[0] == "3\n"


def test_a_command_that_prints_too_much_is_ended() -> None:
    with pytest.raises(OSError, match="'yes' has more than the 1000000 bytes that are accepted"):
        run("yes", max_size=1_000_000)
    # The servers of other tests are children of this process too.
    assert "yes" not in [child.name() for child in psutil.Process().children()]


# What the command gets


def test_env_is_added_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INHERITED", "yes")
    monkeypatch.setenv("CHANGED", "old")
    env = {"CHANGED": "new", "ADDED": "é"}
    assert run("sh", ["-c", "echo $INHERITED $CHANGED $ADDED"], env)[0] == "yes new é"


def test_an_inherited_pythonpath_is_dropped_unless_env_sets_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/inherited")
    assert run("sh", ["-c", "echo ${PYTHONPATH-unset}"])[0] == "unset"
    assert run("sh", ["-c", "echo $PYTHONPATH"], {"PYTHONPATH": "/given"})[0] == "/given"
    assert os.environ["PYTHONPATH"] == "/inherited"


def test_cwd_is_where_the_command_runs(tmp_path: Path) -> None:
    assert run("pwd", cwd=str(tmp_path))[0] == str(tmp_path)
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho here\n")
    program.chmod(0o755)
    assert run("./program", cwd=str(tmp_path))[0] == "here"


@pytest.mark.parametrize("command", ["cat", "true"])
@pytest.mark.parametrize(
    ("stdin", "text"),
    [
        (None, ""),
        ("été\udcff", "été\ufffd"),
        (b"\0\xff", "\0\ufffd"),
        (b"x" * 5_000_000, "x" * 5_000_000),
    ],
    ids=["none", "text", "bytes", "large"],
)
def test_stdin_reaches_the_command(stdin: str | bytes | None, text: str, command: str) -> None:
    assert run(command, stdin=stdin) == (text if command == "cat" else "", "", 0)


def test_a_command_that_closes_its_output_still_gets_its_stdin(tmp_path: Path) -> None:
    target = tmp_path / "target"
    content = b"x" * 3_000_000
    run("sh", ["-c", f"exec >&- 2>&-; sleep 0.2; exec cat >{target}"], stdin=content)
    assert target.read_bytes() == content


def test_the_command_holds_no_files_of_this_process(tmp_path: Path) -> None:
    with open(tmp_path / "secret", "w") as file:
        os.set_inheritable(file.fileno(), True)
        assert "secret" not in run("ls", ["-l", "/proc/self/fd"])[0]


# Too late


def test_a_timeout_ends_the_process_group_and_nothing_else(tmp_path: Path) -> None:
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
            run("sh", ["-c", script], cwd=str(tmp_path), timeout=2)
        pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
        assert len(pids) == 2
        wait_until(lambda: all(map(support.is_gone, pids)), "both have ended")
        assert not support.is_gone(wait_for_pid())
    assert str(caught.value) == (
        "Command 'sh' timed out after 2 seconds; it was ended\nIts stdout:\nstarted"
    )


@pytest.mark.parametrize("keyword", ["timeout", "call_timeout"])
def test_a_command_that_is_ended_can_clean_up(tmp_path: Path, keyword: str) -> None:
    limit: dict[str, Any] = {keyword: 0.5}
    script = f"trap 'echo clean >{tmp_path}/up; exit' TERM; while :; do sleep 0.05; done"
    with pytest.raises(CommandTimeoutError):
        run("sh", ["-c", script], **limit)
    assert (tmp_path / "up").read_text() == "clean\n"


@pytest.mark.parametrize(
    "script",
    [
        f"trap '' TERM; sleep {FOREVER}; :",
        "while :; do echo y; sleep 0.01; done",
        f"exec >&- 2>&-; sleep {FOREVER}; :",
        f"sleep {FOREVER}",
    ],
    ids=["ignores SIGTERM", "prints", "closed its output", "reads no stdin"],
)
def test_a_timeout_ends_a_command_whatever_it_does(
    script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_GRACE", 0.5)
    with pytest.raises(CommandTimeoutError, match="it was ended"):
        run("sh", ["-c", script], timeout=0.3, stdin=b"x" * 1_000_000)


def test_a_timeout_tells_all_that_had_been_printed() -> None:
    with pytest.raises(CommandTimeoutError) as caught:
        run("sh", ["-c", f"printf 'a\\377'; echo no >&2; exec sleep {FOREVER}"], timeout=0.5)
    assert caught.value.output == caught.value.stdout == b"a\xff"
    assert caught.value.stderr == b"no\n"
    assert isinstance(caught.value, subprocess.TimeoutExpired)
    assert str(caught.value) == (
        "Command 'sh' timed out after 0.5 seconds; it was ended\n"
        "Its stdout:\na\\xff\nIts stderr:\nno"
    )
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_the_text_of_a_timeout_has_no_argument_and_the_end_of_much_output() -> None:
    output = "".join(f"{number}\n" for number in range(100_001)).encode()
    text = str(CommandTimeoutError(["podman", "secret"], 1, output))
    assert text.startswith("Command 'podman' timed out after 1 seconds; it was ended\n")
    assert "secret" not in text
    assert "The end of its stdout:\n" in text
    assert text.endswith("99999\n100000")
    assert len(text) < 2500


@support.requires_root
def test_a_timeout_tells_what_this_user_may_not_kill(tmp_path: Path) -> None:
    code = (
        "import os, subprocess, inmanta_mitogen.failures\n"
        # A child that is another user's, as a program with set-user-ID would be.
        "start = subprocess.Popen\n"
        "def popen(*args, **kwargs):\n"
        "    process = start(*args, **kwargs)\n"
        "    os.setresuid(65534, 65534, 0)\n"
        "    return process\n"
        "subprocess.Popen = popen\n"
        f"try: run('sh', ['-c', 'echo $$ >pid; exec sleep {FOREVER}'], timeout=0.5)\n"
        "except subprocess.TimeoutExpired as error: print(error, flush=True)\n"
        "os._exit(0)\n"
    )
    with killed_at_the_end(tmp_path / "pid") as wait_for_pid:
        output, _ = start_python(code, tmp_path).communicate()
        assert "it could not be ended and is still running" in output
        assert not support.is_gone(wait_for_pid())


def test_a_timeout_does_not_fail_a_command_that_has_ended(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    daemon = f"echo $$ >{pid_file}; while :; do echo chat; sleep 0.1; done"
    with killed_at_the_end(pid_file) as wait_for_pid:
        script = f"setsid sh -c '{daemon}' & echo started; exit 4"
        out, _, code = run("sh", ["-c", script], timeout=1)
        assert out.startswith("started")
        assert code == 4
        assert not support.is_gone(wait_for_pid())


# What goes on


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_command_ends_by_itself_when_its_interpreter_is_told_to_end(
    tmp_path: Path, number: signal.Signals
) -> None:
    # More than a pipe holds, on both streams and in.
    script = (
        "set -e; cat >got; echo $$ >started; sleep 1;"
        " head -c 300000 /dev/zero; seq 90000 >&2; echo >done"
    )
    with start_python(f"run('sh', ['-c', {script!r}], stdin='x' * 3000000)", tmp_path) as python:
        wait_until((tmp_path / "started").exists, "it has started")
        python.send_signal(number)
        assert python.wait(20) == -number
    assert not (tmp_path / "done").exists()
    wait_until((tmp_path / "done").exists, "the command has ended")
    assert (tmp_path / "got").stat().st_size == 3_000_000


def test_the_input_of_a_command_is_complete_when_its_interpreter_is_killed(tmp_path: Path) -> None:
    script = "echo >started; sleep 1; cat >got; echo >done"
    with start_python(f"run('sh', ['-c', {script!r}], stdin='x' * 3000000)", tmp_path) as python:
        wait_until((tmp_path / "started").exists, "it has started")
        python.kill()
    wait_until((tmp_path / "done").exists, "the command has ended")
    assert (tmp_path / "got").stat().st_size == 3_000_000


def test_a_timeout_holds_when_the_interpreter_is_gone(tmp_path: Path) -> None:
    code = f"run('sh', ['-c', 'echo $$ >pid; sleep {FOREVER}'], timeout=1.5)"
    with killed_at_the_end(tmp_path / "pid") as wait_for_pid:
        with start_python(code, tmp_path) as python:
            pid = wait_for_pid()
            python.terminate()
            assert python.wait(20) == -signal.SIGTERM
        assert not support.is_gone(pid)
        wait_until(lambda: support.is_gone(pid), "it has ended")


def test_a_server_in_the_background_can_go_on_printing(tmp_path: Path) -> None:
    server = "while :; do echo line || exit; echo x >>log; sleep 0.1; done"
    # It is silent for longer than is waited for it.
    script = f"nohup sh -c 'echo $$ >pid; sleep 1; {server}' & echo started"
    code = f"process._SILENCE = 0.3; print(run('sh', ['-c', {script!r}]))"
    with killed_at_the_end(tmp_path / "pid") as wait_for_pid:
        # Its interpreter is gone as well.
        assert start_python(code, tmp_path).communicate()[0] == "('started', '', 0)\n"
        log = tmp_path / "log"
        wait_until(lambda: log.exists() and log.stat().st_size > 20, "it goes on printing")
        assert not support.is_gone(wait_for_pid())


# What can't be run

MISSING = "[Errno 2] No such file or directory"


@pytest.mark.parametrize(
    ("command", "options", "error", "text"),
    [
        ("missing", {"env": {"PATH": "/a:/b"}}, FileNotFoundError, f"{MISSING}: 'missing'"),
        ("true", {"env": {"PATH": "/nowhere"}}, FileNotFoundError, f"{MISSING}: 'true'"),
        ("/missing", {}, FileNotFoundError, f"{MISSING}: '/missing'"),
        ("ls -l /tmp", {}, FileNotFoundError, f"{MISSING}: 'ls -l /tmp'"),
        ("/bin/ls -l", {}, FileNotFoundError, f"{MISSING}: '/bin/ls -l'"),
        ("true", {"cwd": "missing"}, FileNotFoundError, f"{MISSING}: 'missing'"),
        ("true", {"cwd": "file"}, NotADirectoryError, "Not a directory: 'file'"),
        ("./shebang", {}, FileNotFoundError, "The interpreter of its first line, or the loader"),
        ("./no shebang", {}, OSError, "Exec format error: './no shebang'"),
        ("./file", {}, PermissionError, "Permission denied: './file'"),
    ],
)
def test_why_a_command_does_not_start_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    options: dict[str, Any],
    error: type[OSError],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content, mode in (
        ("file", "", 0o644),
        ("shebang", "#!/no/such/shell\n", 0o755),
        ("no shebang", "echo\n", 0o755),
    ):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(mode)
    with pytest.raises(error, match=re.escape(text)) as caught:
        run(command, ["secret"], **options)
    assert caught.value.filename == options.get("cwd", command)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        (["a", 1], {}, TypeError, "not int"),
        ("ab", {}, TypeError, "The arguments must be a list of strings, not one string"),
        (["secret\0"], {}, ValueError, "null byte"),
        (["secret\ud800"], {}, ValueError, "can't encode character"),
        ([], {"env": {"A": 1}}, TypeError, "not int"),
        ([], {"env": {"A": "secret\0"}}, ValueError, "null byte"),
        ([], {"env": {"A=": "secret"}}, ValueError, "environment variable name"),
        ([], {"cwd": "/\0"}, ValueError, "null byte"),
        ([], {"timeout": "1"}, TypeError, "str"),
        ([], {"stdin": 1}, TypeError, "not 'int'"),
    ],
)
def test_a_bad_argument_is_refused_and_not_shown(
    arguments: list[str], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        run("true", arguments, **options)
    assert text in str(caught.value)
    assert "secret" not in str(caught.value)
