"""
Reading, writing and looking at files on a host.
"""

import errno
import hashlib
import os
import re
import stat
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from host_files import ALICE, CHECKOUT, MALLORY, python_as, small_disk

import support
from inmanta_mitogen import file_stat, hash_file, put, read, read_binary

INTERPRETERS = support.find_interpreters()

pytestmark = pytest.mark.usefixtures("nothing_left")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def acl_of(path: Path) -> list[str]:
    options = ("--omit-header", "--numeric", "--absolute-names")
    return support.execute("getfacl", *options, path, check=True).stdout.split()


def set_acl(path: Path, *rules: str) -> None:
    done = support.execute("setfacl", "-m", ",".join(rules), path)
    if done.returncode:
        pytest.skip(f"needs a file system with ACLs at {path}: {done.stderr}")


def set_xattr(path: Path, name: str, value: bytes) -> None:
    try:
        os.setxattr(path, name, value)
    except OSError as error:
        pytest.skip(f"needs a file system with {name} at {path}: {error}")


# All of it, everywhere


def check_host_side(python: list[str], cwd: Path, *args: str, **env: str) -> None:
    """
    Run what the host side promises in an interpreter of its own.
    """
    selfcheck = CHECKOUT / "tests" / "on_host" / "host_selfcheck.py"
    # Python 3.7 and later would replace the C locale's encoding by UTF-8.
    fixed = {"PYTHONPATH": str(CHECKOUT), "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    fixed |= {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    done = support.execute(*python, selfcheck, *args, cwd=cwd, env={**fixed, **env})
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
@pytest.mark.parametrize("interpreter", INTERPRETERS, ids=str)
def test_the_host_side_works_with_every_python_that_hosts_may_have(
    interpreter: support.Interpreter, locale: str, tmp_path: Path
) -> None:
    check_host_side([interpreter.path], tmp_path, LC_ALL=locale)


@pytest.mark.parametrize("interpreter", [INTERPRETERS[0], INTERPRETERS[-1]], ids=str)
def test_names_outside_the_locale_work(interpreter: support.Interpreter, tmp_path: Path) -> None:
    support.need("localedef")
    locale = "en_US.ISO-8859-1"
    define = ("localedef", "--no-archive", "-i", "en_US", "-f", "ISO-8859-1")
    done = support.execute(*define, tmp_path / locale)
    if done.returncode:
        pytest.skip(f"needs the sources of locales: {done.stderr}")
    (tmp_path / "directory").mkdir()
    check_host_side(
        [interpreter.path],
        tmp_path / "directory",
        "names",
        LC_ALL=locale,
        LOCPATH=str(tmp_path),
    )


def test_the_host_side_works_without_what_only_linux_has(tmp_path: Path) -> None:
    code = (
        "import os, runpy, sys\n"
        "for name in ('O_PATH', 'O_TMPFILE', 'listxattr', 'getxattr', 'setxattr', 'removexattr',\n"
        "             'waitid'): delattr(os, name)\n"
        "runpy.run_path(sys.argv[1], run_name='__main__')\n"
    )
    check_host_side([sys.executable, "-c", code], tmp_path)


# Reading


@pytest.mark.parametrize("content", ["", "a", "x" * 5_000_000], ids=len)
def test_hash_file_is_the_sha1_of_the_content(tmp_path: Path, content: str) -> None:
    (tmp_path / "file").write_text(content)
    (tmp_path / "link").symlink_to("file")
    expected = hashlib.sha1(content.encode()).hexdigest()
    assert hash_file(str(tmp_path / "link")) == expected


def test_read_of_what_is_no_text_names_the_file_and_the_alternative(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"ab\xff")
    with pytest.raises(UnicodeDecodeError) as caught:
        read(str(tmp_path / "file"))
    text = str(caught.value)
    assert "byte 0xff in position 2" in text
    assert f"'{tmp_path}/file' is not UTF-8, read_binary gives its bytes" in text


def test_what_is_larger_than_allowed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 300_000)
    assert len(read_binary(str(tmp_path / "file"), max_size=300_000)) == 300_000
    # The other one has no end.
    for path in (str(tmp_path / "file"), "/dev/zero"):
        for function in (read, read_binary):
            with pytest.raises(OSError, match="more than the 299999 bytes.*max_size") as caught:
                function(path, max_size=299_999)
            assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, path)


@pytest.mark.parametrize("function", [hash_file, read, read_binary, file_stat])
def test_a_missing_file_is_named(function: object, tmp_path: Path) -> None:
    assert callable(function)
    with pytest.raises(FileNotFoundError) as caught:
        function(str(tmp_path / "missing"))
    assert str(caught.value) == f"[Errno 2] No such file or directory: '{tmp_path}/missing'"


@pytest.mark.parametrize(
    ("mode", "permissions"), [(0o644, 644), (0o4755, 4755), (0o1777, 1777), (0o7, 7), (0, 0)]
)
def test_file_stat_has_the_digits_of_the_mode(tmp_path: Path, mode: int, permissions: int) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "file").chmod(mode)
    (tmp_path / "link").symlink_to("file")
    assert file_stat(str(tmp_path / "link"))["permissions"] == permissions


# Putting: what is written


def test_put_makes_the_content_the_whole_content(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"something longer")
    for name in ("old", "new"):
        for content in (b"new", b""):
            put(str(tmp_path / name), content)
            assert (tmp_path / name).read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["new", "old"]


@pytest.mark.parametrize("path", ["here", "./directory/../directory//there", "\udcff"])
def test_put_takes_relative_paths_and_names_that_are_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory").mkdir()
    put(path, b"new")
    assert Path(path).read_bytes() == b"new"


@pytest.mark.parametrize("content", ["text", None, 3, ["a"]])
def test_put_refuses_what_is_not_bytes(tmp_path: Path, content: object) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(TypeError, match=f"not '{type(content).__name__}'"):
        put(str(tmp_path / "file"), content)  # type: ignore[arg-type]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("path", "error", "text"),
    [
        ("", IsADirectoryError, "Is a directory"),
        ("/", IsADirectoryError, "Is a directory"),
        ("/.", IsADirectoryError, "Is a directory"),
        ("/..", IsADirectoryError, "Is a directory"),
        ("/link", IsADirectoryError, "Is a directory"),
        ("/missing/file", FileNotFoundError, "No such file or directory"),
        ("/file/below", NotADirectoryError, "Not a directory"),
        ("/loop", OSError, os.strerror(errno.ELOOP)),
    ],
)
def test_put_names_an_impossible_path(
    tmp_path: Path, path: str, error: type[OSError], text: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(".")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(error, match=re.escape(text)) as caught:
        put(f"{tmp_path}{path}", b"")
    assert caught.value.filename == f"{tmp_path}{path}"


@pytest.mark.parametrize(("path", "error"), [("", IsADirectoryError), ("a\0b", ValueError)])
def test_put_refuses_what_is_no_path(path: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        put(path, b"")


# Putting: what is kept


@support.requires_root
@pytest.mark.parametrize("mode", [0o644, 0o600, 0o4755, 0o2711, 0o444, 0o0])
def test_put_keeps_owner_and_mode(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "file"
    file.touch()
    os.chown(file, ALICE, MALLORY)
    file.chmod(mode)
    put(str(file), b"new")
    state = file.stat()
    assert (state.st_uid, state.st_gid, mode_of(file)) == (ALICE, MALLORY, mode)
    assert file.read_bytes() == b"new"


@support.requires_root
def test_put_keeps_extended_attributes_of_every_kind(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    # Version 2 of linux/capability.h: cap_net_bind_service, effective and permitted.
    capability = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
    attributes = {
        "user.note": b"kept\0\xff",
        "trusted.note": b"kept too",
        "security.selinux": b"system_u:object_r:etc_t:s0\0",
        "security.capability": capability,
    }
    for name, value in attributes.items():
        set_xattr(file, name, value)
    inode = file.stat().st_ino
    put(str(file), b"new")
    assert {name: os.getxattr(file, name) for name in os.listxattr(file)} == attributes
    assert file.read_bytes() == b"new"
    assert file.stat().st_ino != inode


@support.requires("setfacl", "getfacl")
@pytest.mark.parametrize("rules", [["u:54321:rw", "g:54322:r", "m::rw", "o::-"], []])
def test_put_keeps_the_acl_and_adds_no_other(tmp_path: Path, rules: list[str]) -> None:
    file = tmp_path / "file"
    file.touch(0o640)
    if rules:
        set_acl(file, *rules)
    set_acl(tmp_path, f"d:u:{ALICE}:rwx")
    before = acl_of(file)
    put(str(file), b"new")
    assert acl_of(file) == before
    assert ("system.posix_acl_access" in os.listxattr(file)) == bool(rules)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o000, 0o777])
def test_put_gives_a_new_file_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        put(str(tmp_path / "new"), b"")
        assert mode_of(tmp_path / "new") == 0o666 & ~umask
    finally:
        # It only looked.
        assert os.umask(old) == umask


@support.requires("setfacl", "getfacl")
@pytest.mark.parametrize(
    "rules",
    [
        [f"d:u:{ALICE}:rwx", f"d:g:{MALLORY}:r-x", "d:m::rwx", "d:o::r-x"],
        ["d:u::rwx", "d:g::r-x", "d:o::---"],
        [f"d:u:{ALICE}:rw", "d:m::r"],
    ],
)
def test_a_new_file_has_the_default_acl_of_its_directory(tmp_path: Path, rules: list[str]) -> None:
    set_acl(tmp_path, *rules)
    (tmp_path / "expected").touch(0o666)
    put(str(tmp_path / "new"), b"")
    assert acl_of(tmp_path / "new") == acl_of(tmp_path / "expected")
    assert mode_of(tmp_path / "new") == mode_of(tmp_path / "expected")


@support.requires_root
def test_put_gives_a_new_file_the_group_of_its_directory(tmp_path: Path) -> None:
    os.chown(tmp_path, 0, MALLORY)
    tmp_path.chmod(0o2755)
    put(str(tmp_path / "new"), b"")
    assert (tmp_path / "new").stat().st_gid == MALLORY


@pytest.mark.parametrize("exists", [True, False], ids=["old file", "new file"])
def test_put_writes_through_symlinks_and_keeps_them(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "a").mkdir()
    if exists:
        (tmp_path / "a" / "file").write_bytes(b"old")
    links = {"a/link": "file", "b": "a", "link": "b/../a/./link"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    put(str(tmp_path / "link"), b"new")
    assert (tmp_path / "a" / "file").read_bytes() == b"new"
    assert {link: os.readlink(tmp_path / link) for link in links} == links
    assert sorted(os.listdir(tmp_path / "a")) == ["file", "link"]


@support.requires_root
def test_put_replaces_a_read_only_file_for_its_owner(public: Path) -> None:
    os.chown(public, ALICE, ALICE)
    file = public / "file"
    python_as(ALICE, "put(args[0], b'a'); os.chmod(args[0], 0o444); put(args[0], b'b')", file)
    assert file.read_bytes() == b"b"
    assert mode_of(file) == 0o444


# Putting: a file system that is full


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """
    A file system of a megabyte.
    """
    with small_disk(tmp_path) as path:
        yield path


@pytest.mark.parametrize("exists", [True, False], ids=["old file", "new file"])
def test_put_keeps_the_old_file_when_the_disk_is_full(disk: Path, exists: bool) -> None:
    file = disk / "file"
    if exists:
        file.write_bytes(b"old" * 100_000)
    with pytest.raises(OSError, match="No space left") as caught:
        put(str(file), b"new" * 500_000)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(file))
    assert os.listdir(disk) == (["file"] if exists else [])
    if exists:
        assert file.read_bytes() == b"old" * 100_000
    # What was written until then is free again.
    put(str(file), b"x" * 600_000)
    assert file.stat().st_size == 600_000


def test_put_writes_in_place_when_there_is_no_room(disk: Path) -> None:
    file = disk / "file"
    file.write_bytes(b"o" * 600_000)
    for size in (600_000, 900_000, 700_000):
        put(str(file), b"n" * size)
        assert file.read_bytes() == b"n" * size
    assert os.listdir(disk) == ["file"]


def test_put_writes_in_place_when_no_inode_is_left(tmp_path: Path) -> None:
    # The root directory and one file.
    with small_disk(tmp_path, "nr_inodes=2") as disk:
        (disk / "file").write_bytes(b"old")
        put(str(disk / "file"), b"new")
        assert (disk / "file").read_bytes() == b"new"
        with pytest.raises(OSError, match="No space left"):
            put(str(disk / "new"), b"new")
        assert os.listdir(disk) == ["file"]
