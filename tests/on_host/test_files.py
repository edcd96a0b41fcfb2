"""
Reading, writing and looking at files on a host.
"""

import contextlib
import errno
import hashlib
import os
import pathlib
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest
from host_files import ALICE, CHECKOUT, MALLORY, mounted, python_as

import support
from inmanta_mitogen import file_stat, hash_file, islink, lexists, put, read, read_binary

SELFCHECK = CHECKOUT / "tests" / "on_host" / "host_selfcheck.py"

pytestmark = pytest.mark.usefixtures("nothing_left")


def mode_of(path: pathlib.Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def acl_of(path: pathlib.Path) -> list[str]:
    done = subprocess.run(
        ["getfacl", "--omit-header", "--numeric", "--absolute-names", str(path)],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.split()


def set_acl(path: pathlib.Path, *rules: str) -> None:
    done = subprocess.run(
        ["setfacl", "-m", ",".join(rules), str(path)], check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"needs a file system with ACLs at {path}: {done.stderr}")


def set_xattr(path: pathlib.Path, name: str, value: bytes) -> None:
    try:
        os.setxattr(path, name, value)
    except OSError as error:
        pytest.skip(f"needs a file system with {name} at {path}: {error}")


# All of it, everywhere


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
@pytest.mark.parametrize("interpreter", support.find_interpreters(), ids=str)
def test_the_host_side_works_with_every_python_that_hosts_may_have(
    interpreter: support.Interpreter, locale: str, tmp_path: pathlib.Path
) -> None:
    done = subprocess.run(
        [interpreter.path, str(SELFCHECK)],
        check=False,
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "LC_ALL": locale,
            "PYTHONPATH": str(CHECKOUT),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr


@pytest.mark.parametrize("locale", ["C", "en_US.ISO-8859-1"])
@pytest.mark.parametrize("interpreter", support.find_interpreters(), ids=str)
def test_names_that_the_locale_can_not_encode_work(
    interpreter: support.Interpreter, locale: str, tmp_path: pathlib.Path
) -> None:
    support.need("localedef")
    define = ["localedef", "--no-archive", "-i", "en_US", "-f", "ISO-8859-1"]
    done = subprocess.run(
        [*define, str(tmp_path / "en_US.ISO-8859-1")], check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"needs the sources of locales: {done.stderr}")
    (tmp_path / "directory").mkdir()
    done = subprocess.run(
        [interpreter.path, str(SELFCHECK), "names"],
        check=False,
        cwd=tmp_path / "directory",
        env={
            "LOCPATH": str(tmp_path),
            "LC_ALL": locale,
            # Python 3.7 and later would replace the C locale's encoding by UTF-8.
            "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0",
            "PYTHONPATH": str(CHECKOUT),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr


def test_the_host_side_works_without_what_only_linux_has(tmp_path: pathlib.Path) -> None:
    code = (
        "import os, runpy, sys\n"
        "for name in ('O_PATH', 'O_TMPFILE', 'listxattr', 'getxattr', 'setxattr', 'removexattr',\n"
        "             'waitid'): delattr(os, name)\n"
        "runpy.run_path(sys.argv[1], run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(SELFCHECK)],
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr


# Reading


@pytest.mark.parametrize("content", ["", "a", "x" * 5_000_000], ids=len)
def test_hash_file_is_the_sha1_of_the_content(tmp_path: pathlib.Path, content: str) -> None:
    (tmp_path / "file").write_text(content)
    (tmp_path / "link").symlink_to("file")
    expected = hashlib.sha1(content.encode()).hexdigest()
    assert hash_file(str(tmp_path / "link")) == expected


def test_read_keeps_line_ends_and_decodes_utf8(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_bytes("é\r\nb\rc\n".encode())
    assert read(str(tmp_path / "file")) == "é\r\nb\rc\n"


def test_read_of_what_is_no_text_names_the_file_and_the_alternative(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "file").write_bytes(b"ab\xff")
    with pytest.raises(UnicodeDecodeError) as caught:
        read(str(tmp_path / "file"))
    text = str(caught.value)
    assert "byte 0xff in position 2" in text
    assert f"'{tmp_path}/file' is not UTF-8, read_binary gives its bytes" in text


def test_read_binary_gives_any_content(tmp_path: pathlib.Path) -> None:
    content = bytes(range(256)) * 10
    (tmp_path / "file").write_bytes(content)
    assert read_binary(str(tmp_path / "file")) == content


def test_read_binary_accepts_what_is_just_as_large_as_allowed(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 3_000_000)
    assert len(read_binary(str(tmp_path / "file"), max_size=3_000_000)) == 3_000_000
    with pytest.raises(OSError, match="has more than the 2999999 bytes") as caught:
        read_binary(str(tmp_path / "file"), max_size=2_999_999)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path / "file")


def test_a_file_without_end_is_refused() -> None:
    for function in (read, read_binary):
        with pytest.raises(OSError, match="has more than the 10000000 bytes.*raise max_size"):
            function("/dev/zero", max_size=10_000_000)


@pytest.mark.parametrize("function", [hash_file, read, read_binary, file_stat])
def test_a_missing_file_is_named(function: object, tmp_path: pathlib.Path) -> None:
    assert callable(function)
    with pytest.raises(FileNotFoundError) as caught:
        function(str(tmp_path / "missing"))
    assert str(caught.value) == f"[Errno 2] No such file or directory: '{tmp_path}/missing'"


# Looking


@pytest.mark.parametrize(
    ("mode", "permissions"), [(0o644, 644), (0o4755, 4755), (0o1777, 1777), (0o7, 7), (0, 0)]
)
def test_file_stat_has_the_digits_of_the_mode(
    tmp_path: pathlib.Path, mode: int, permissions: int
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "file").chmod(mode)
    (tmp_path / "link").symlink_to("file")
    assert file_stat(str(tmp_path / "link"))["permissions"] == permissions


@support.requires_root
def test_file_stat_has_numbers_where_there_are_no_names(tmp_path: pathlib.Path) -> None:
    os.chown(tmp_path, ALICE, MALLORY)
    assert file_stat(str(tmp_path))["owner"] == str(ALICE)
    assert file_stat(str(tmp_path))["group"] == str(MALLORY)
    os.chown(tmp_path, 0, 0)
    assert file_stat(str(tmp_path))["owner"] == "root"


def test_a_dangling_symlink_exists_and_is_a_link(tmp_path: pathlib.Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    assert lexists(str(tmp_path / "link"))
    assert islink(str(tmp_path / "link"))
    assert not islink(str(tmp_path))
    assert not lexists(str(tmp_path / "nowhere"))


# Putting: what is written


@pytest.mark.parametrize(
    "content",
    [b"", b"new", bytearray(b"new"), memoryview(b"new")],
    ids=["empty", "bytes", "bytearray", "memoryview"],
)
def test_put_makes_the_content_the_whole_content(
    tmp_path: pathlib.Path, content: bytes | bytearray | memoryview
) -> None:
    (tmp_path / "old").write_bytes(b"something longer")
    for name in ("old", "new"):
        put(str(tmp_path / name), content)  # type: ignore[arg-type]
        assert (tmp_path / name).read_bytes() == bytes(content)
    assert sorted(os.listdir(tmp_path)) == ["new", "old"]


def test_put_takes_a_relative_path(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory").mkdir()
    put("here", b"1")
    put("./directory/../directory//there", b"2")
    assert (tmp_path / "here").read_bytes() == b"1"
    assert (tmp_path / "directory" / "there").read_bytes() == b"2"


def test_put_takes_names_that_are_no_text(tmp_path: pathlib.Path) -> None:
    put(f"{tmp_path}/\udcff", b"odd")
    assert os.listdir(os.fsencode(tmp_path)) == [b"\xff"]


@pytest.mark.parametrize("content", ["text", None, 3, ["a"]])
def test_put_refuses_what_is_not_bytes_and_touches_nothing(
    tmp_path: pathlib.Path, content: object
) -> None:
    (tmp_path / "file").write_bytes(b"old")
    kind = type(content).__name__
    with pytest.raises(TypeError, match=f"The content must be bytes, not {kind}"):
        put(str(tmp_path / "file"), content)  # type: ignore[arg-type]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("suffix", ["", "/", "/.", "/.."])
def test_put_to_a_directory_names_it(tmp_path: pathlib.Path, suffix: str) -> None:
    with pytest.raises(IsADirectoryError) as caught:
        put(f"{tmp_path}{suffix}", b"")
    assert str(caught.value) == f"[Errno 21] Is a directory: '{tmp_path}{suffix}'"


def test_put_to_a_link_to_a_directory_names_it(tmp_path: pathlib.Path) -> None:
    (tmp_path / "link").symlink_to(".")
    with pytest.raises(IsADirectoryError, match="link"):
        put(str(tmp_path / "link"), b"")


def test_put_into_a_missing_directory_names_it(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        put(f"{tmp_path}/missing/file", b"")
    assert "its directory 'missing'" in str(caught.value)
    assert caught.value.filename == f"{tmp_path}/missing/file"


def test_put_below_a_file_names_it(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="its directory 'file'"):
        put(f"{tmp_path}/file/below", b"")


@pytest.mark.parametrize(("path", "error"), [("", FileNotFoundError), ("a\0b", ValueError)])
def test_put_refuses_impossible_paths(path: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        put(path, b"")


def test_put_follows_a_loop_of_links_to_an_error(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match=f"{tmp_path}/a") as caught:
        put(f"{tmp_path}/a", b"")
    assert caught.value.errno == errno.ELOOP


# Putting: what is kept


@support.requires_root
@pytest.mark.parametrize("mode", [0o644, 0o600, 0o4755, 0o2711, 0o444, 0o0])
def test_put_keeps_owner_and_mode(tmp_path: pathlib.Path, mode: int) -> None:
    file = tmp_path / "file"
    file.touch()
    os.chown(file, ALICE, MALLORY)
    file.chmod(mode)
    put(str(file), b"new")
    state = file.stat()
    assert (state.st_uid, state.st_gid, mode_of(file)) == (ALICE, MALLORY, mode)
    assert file.read_bytes() == b"new"


@support.requires_root
def test_put_keeps_the_group_that_a_user_belongs_to(public: pathlib.Path) -> None:
    os.chown(public, ALICE, ALICE)
    file = public / "file"
    file.touch()
    os.chown(file, ALICE, MALLORY)
    file.chmod(0o640)
    # Alice is no member of that group, so her file can't be replaced without losing it.
    python_as(ALICE, "put(args[0], b'new')", file)
    assert (file.stat().st_uid, file.stat().st_gid, mode_of(file)) == (ALICE, MALLORY, 0o640)
    assert file.read_bytes() == b"new"


@support.requires_root
def test_put_keeps_extended_attributes_of_every_kind(tmp_path: pathlib.Path) -> None:
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
    put(str(file), b"new")
    assert {name: os.getxattr(file, name) for name in os.listxattr(file)} == attributes
    assert file.read_bytes() == b"new"


def test_put_keeps_attributes_that_the_owner_set(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "file"
    file.touch()
    set_xattr(file, "user.note", b"kept")
    inode = file.stat().st_ino
    put(str(file), b"new")
    assert os.getxattr(file, "user.note") == b"kept"
    assert file.stat().st_ino != inode


@support.requires("setfacl", "getfacl")
def test_put_keeps_the_acl(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "file"
    file.touch()
    set_acl(file, f"u:{ALICE}:rw", f"g:{MALLORY}:r", "m::rw", "o::-")
    before = acl_of(file)
    assert f"user:{ALICE}:rw-" in before
    put(str(file), b"new")
    assert acl_of(file) == before


@support.requires("setfacl", "getfacl")
def test_put_gives_an_old_file_no_acl_of_its_directory(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "file"
    file.touch(0o640)
    before = acl_of(file)
    set_acl(tmp_path, f"d:u:{ALICE}:rwx")
    put(str(file), b"new")
    assert acl_of(file) == before
    assert "system.posix_acl_access" not in os.listxattr(file)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o000, 0o777])
def test_put_gives_a_new_file_the_mode_of_the_umask(tmp_path: pathlib.Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        put(str(tmp_path / "new"), b"")
        assert mode_of(tmp_path / "new") == 0o666 & ~umask
        # It only looked.
        assert os.umask(umask) == umask
    finally:
        os.umask(old)


@support.requires("setfacl", "getfacl")
@pytest.mark.parametrize(
    "rules",
    [
        [f"d:u:{ALICE}:rwx", f"d:g:{MALLORY}:r-x", "d:m::rwx", "d:o::r-x"],
        ["d:u::rwx", "d:g::r-x", "d:o::---"],
        [f"d:u:{ALICE}:rw", "d:m::r"],
    ],
)
def test_put_gives_a_new_file_the_default_acl_of_its_directory(
    tmp_path: pathlib.Path, rules: list[str]
) -> None:
    set_acl(tmp_path, *rules)
    (tmp_path / "expected").touch(0o666)
    put(str(tmp_path / "new"), b"")
    assert acl_of(tmp_path / "new") == acl_of(tmp_path / "expected")
    assert mode_of(tmp_path / "new") == mode_of(tmp_path / "expected")


@support.requires_root
def test_put_gives_a_new_file_the_group_of_its_directory(tmp_path: pathlib.Path) -> None:
    os.chown(tmp_path, 0, MALLORY)
    tmp_path.chmod(0o2755)
    put(str(tmp_path / "new"), b"")
    assert (tmp_path / "new").stat().st_gid == MALLORY


def test_put_writes_through_symlinks_and_keeps_them(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"old")
    (tmp_path / "a" / "link").symlink_to("file")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "link").symlink_to("b/../a/./link")
    (tmp_path / "absolute").symlink_to(tmp_path / "link")
    put(str(tmp_path / "absolute"), b"new")
    assert not (tmp_path / "a" / "file").is_symlink()
    assert (tmp_path / "a" / "file").read_bytes() == b"new"
    assert os.readlink(tmp_path / "a" / "link") == "file"
    assert os.readlink(tmp_path / "link") == "b/../a/./link"
    assert sorted(os.listdir(tmp_path / "a")) == ["file", "link"]


def test_put_creates_the_target_of_a_dangling_symlink(tmp_path: pathlib.Path) -> None:
    (tmp_path / "link").symlink_to("target")
    put(str(tmp_path / "link"), b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


def test_put_leaves_other_hard_links_their_old_content(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "other").hardlink_to(tmp_path / "file")
    put(str(tmp_path / "file"), b"new")
    assert (tmp_path / "other").read_bytes() == b"old"


def test_put_replaces_a_program_that_is_running(tmp_path: pathlib.Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(pathlib.Path("/bin/sleep").read_bytes())
    program.chmod(0o755)
    with subprocess.Popen([program, "1000"]) as running:
        try:
            put(str(program), b"new")
        finally:
            running.kill()
    assert program.read_bytes() == b"new"
    assert mode_of(program) == 0o755


@support.requires_root
def test_put_replaces_a_read_only_file_for_its_owner(public: pathlib.Path) -> None:
    os.chown(public, ALICE, ALICE)
    python_as(
        ALICE, "put(args[0], b'a'); os.chmod(args[0], 0o444); put(args[0], b'b')", public / "f"
    )
    assert (public / "f").read_bytes() == b"b"
    assert mode_of(public / "f") == 0o444


# Putting: a file system that is full


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """
    A file system of a megabyte.
    """
    support.need("mount", "umount", root=True)
    path = tmp_path / "disk"
    path.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=1m", "tmpfs", path):
        yield path


@pytest.mark.parametrize("exists", [True, False], ids=["old file", "new file"])
def test_put_keeps_the_old_file_when_the_disk_is_full(
    small_disk: pathlib.Path, exists: bool
) -> None:
    file = small_disk / "file"
    if exists:
        file.write_bytes(b"old" * 100_000)
    with pytest.raises(OSError, match="No space left") as caught:
        put(str(file), b"new" * 500_000)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(file)
    assert os.listdir(small_disk) == (["file"] if exists else [])
    if exists:
        assert file.read_bytes() == b"old" * 100_000
    # What was written until then is free again.
    put(str(file), b"x" * 600_000)
    assert file.stat().st_size == 600_000


def test_put_writes_in_place_when_there_is_no_room_for_a_second_file(
    small_disk: pathlib.Path,
) -> None:
    file = small_disk / "file"
    file.write_bytes(b"o" * 600_000)
    for size in (600_000, 900_000, 700_000):
        put(str(file), b"n" * size)
        assert file.read_bytes() == b"n" * size
    assert os.listdir(small_disk) == ["file"]


def test_put_writes_in_place_when_there_is_no_inode_left(tmp_path: pathlib.Path) -> None:
    support.need("mount", "umount", root=True)
    disk = tmp_path / "disk"
    disk.mkdir()
    # The root directory and one file.
    with mounted("-t", "tmpfs", "-o", "nr_inodes=2", "tmpfs", disk):
        (disk / "file").write_bytes(b"old")
        put(str(disk / "file"), b"new")
        assert (disk / "file").read_bytes() == b"new"
        with pytest.raises(OSError, match="No space left") as caught:
            put(str(disk / "new"), b"new")
        assert caught.value.errno == errno.ENOSPC
        assert os.listdir(disk) == ["file"]


def test_put_keeps_the_old_file_when_the_quota_is_spent(public: pathlib.Path) -> None:
    support.need("mount", "umount", root=True)
    disk = public / "disk"
    disk.mkdir()
    options = "usrquota,usrquota_block_hardlimit=1M"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(mounted("-t", "tmpfs", "-o", options, "tmpfs", disk))
        except OSError as error:
            pytest.skip(f"needs a kernel with quotas on tmpfs: {error}")
        os.chown(disk, ALICE, ALICE)
        code = "put(args[0], b'old' * 100_000)\ntry: put(args[0], b'new' * 500_000)\n"
        code += "except OSError as error: print(error.errno)\n"
        assert python_as(ALICE, code, disk / "file").stdout == f"{errno.EDQUOT}\n"
        assert (disk / "file").read_bytes() == b"old" * 100_000
        assert os.listdir(disk) == ["file"]


def test_put_keeps_the_old_file_when_a_limit_of_the_process_is_reached(
    tmp_path: pathlib.Path,
) -> None:
    file = tmp_path / "file"
    code = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "put(args[0], b'old' * 10_000)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: put(args[0], b'new' * 50_000)\n"
        "except OSError as error: print(error.errno)\n"
    )
    assert python_as(os.geteuid(), code, file).stdout == f"{errno.EFBIG}\n"
    assert file.read_bytes() == b"old" * 10_000
    assert os.listdir(tmp_path) == ["file"]
