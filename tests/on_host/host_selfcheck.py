"""
What the host side promises, in short, for any Python from 3.6 on: run by the tests, with each
interpreter of this machine, in a directory of its own. Says "fine" at the end.
"""

import errno
import os
import shutil
import stat
import sys
from typing import Any, Callable, Type, TypeVar

import inmanta_mitogen
from inmanta_mitogen.failures import CommandTimeoutError
from inmanta_mitogen.names import with_any_name
from inmanta_mitogen.staged import StagedWrite

E = TypeVar("E", bound=Exception)


def error_of(kind: Type[E], function: Callable[..., object], *args: Any, **kwargs: Any) -> E:
    try:
        function(*args, **kwargs)
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def check_files() -> None:
    os.umask(0o027)
    name = "f\u00eate"
    inmanta_mitogen.put(name, b"old")
    assert b"f\xc3\xaate" in os.listdir(b"."), os.listdir(b".")
    assert inmanta_mitogen.file_stat(name)["permissions"] == 640
    os.chmod(b"f\xc3\xaate", 0o4711)
    os.symlink(b"f\xc3\xaate", b"link")
    content = memoryview(b"n\xc3\xa9w\r\n")  # type: Any
    inmanta_mitogen.put("link", content)
    assert inmanta_mitogen.islink("link")
    assert inmanta_mitogen.file_stat(name)["permissions"] == 4711
    assert inmanta_mitogen.read(name) == "n\u00e9w\r\n"
    assert inmanta_mitogen.read_binary("link", max_size=6) == b"n\xc3\xa9w\r\n"
    assert inmanta_mitogen.hash_file(name) == "d74ffc61872dfcb0e4481cf1c4f50a62e024f5bc"
    with StagedWrite(name) as staged:
        staged.write(b"never")
    assert sorted(os.listdir(b".")) == [b"f\xc3\xaate", b"link"], os.listdir(b".")
    inmanta_mitogen.put("/dev/null", b"gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert not inmanta_mitogen.lexists("nothing")
    error = error_of(OSError, inmanta_mitogen.read_binary, "/dev/zero", max_size=1000)
    assert error.errno == errno.EFBIG, error


def check_names() -> None:
    for name in ("f\u00eate", "\u65e5\u672c"):
        with_any_name(os.mkdir)(name)
        with_any_name(os.chmod)(name, mode=0o711)
        with_any_name(shutil.chown)(name, os.getuid())
        inmanta_mitogen.put(name + "/" + name, b"content")
        assert inmanta_mitogen.read(name + "/" + name) == "content"
        link = name + "/link" + name
        with_any_name(os.symlink)(name, link)
        assert with_any_name(os.readlink)(link) == name
        assert inmanta_mitogen.read(link) == "content"
        with_any_name(os.remove)(link)
        assert not inmanta_mitogen.lexists(link)
        assert inmanta_mitogen.file_stat(name)["permissions"] == 711
        with_any_name(shutil.rmtree)(name)
        assert not inmanta_mitogen.lexists(name)


def check_commands() -> None:
    run = inmanta_mitogen.run
    assert run("cat", stdin="\u00e9t\u00e9 \n") == ("\u00e9t\u00e9", "", 0)
    assert run("printf", ["%s", "\u00e9"], {"PATH": os.environ["PATH"]})[0] == "\u00e9"
    raw, _, code = run("sh", ["-c", "printf '\\377'; exit 3"])
    assert (raw, code) == ("\ufffd", 3)
    assert run("sh", ["-c", "kill -TERM $$"])[2] == -15
    assert run("sh", ["-c", "echo $V$PYTHONPATH"], {"V": "\u00e9"})[0] == "\u00e9"
    assert run("pwd", cwd="/")[0] == "/"
    late = ["-c", "echo before; exec sleep 1000"]
    text = str(error_of(CommandTimeoutError, run, "sh", late, timeout=0.3))
    assert "before" in text, text
    assert "'sh' timed out after 0.3 seconds; it was ended" in text, text
    text = str(error_of(FileNotFoundError, run, "no-such-command"))
    assert "no-such-command" in text, text


if __name__ == "__main__":
    check_names()
    if sys.argv[1:] != ["names"]:
        check_files()
        check_commands()
    sys.stdout.write("fine\n")
