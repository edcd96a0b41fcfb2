"""
Files that get their new content as a whole, whatever happens meanwhile.
"""

import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import os
import re
import select
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from host_files import ALICE, MALLORY, act_at_step, file_attribute, mounted, python_as, small_disk

import support
from inmanta_mitogen import put, read_binary
from inmanta_mitogen.staged import StagedWrite

pytestmark = pytest.mark.usefixtures("nothing_left")

TEMPORARY = re.compile(r"\.inmanta-put-[0-9a-f]{32}")
OLD = b"old" * 1000


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# One write


def test_a_staged_write_collects_chunks_of_any_kind(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    with StagedWrite(str(file)) as write:
        for chunk in (b"ab", bytearray(b"cd"), b"", memoryview(b"ef")):
            write.write(chunk)
        assert write.size == 6
        assert file.read_bytes() == b"old"
        write.commit()
    assert file.read_bytes() == b"abcdef"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_staged_write_that_is_not_committed_changes_nothing(tmp_path: Path, exists: bool) -> None:
    file = tmp_path / "file"
    if exists:
        file.write_bytes(b"old")
    with contextlib.suppress(KeyboardInterrupt), StagedWrite(str(file)) as write:
        write.write(b"new")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == (["file"] if exists else [])
    assert not exists or file.read_bytes() == b"old"


@pytest.mark.parametrize("exists", [True, False], ids=["removed", "appeared"])
def test_a_file_that_changed_meanwhile_keeps_its_mode(tmp_path: Path, exists: bool) -> None:
    file = tmp_path / "file"
    if exists:
        file.touch(0o600)
    with StagedWrite(str(file)) as write:
        write.write(b"new")
        if exists:
            file.unlink()
        else:
            file.touch(0o600)
        write.commit()
    assert file.read_bytes() == b"new"
    assert mode_of(file) == 0o600


def test_a_directory_that_appeared_meanwhile_is_named(tmp_path: Path) -> None:
    with StagedWrite(str(tmp_path / "file")) as write:
        (tmp_path / "file").mkdir()
        with pytest.raises(IsADirectoryError, match="file"):
            write.commit()
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("exists", [True, False], ids=["old file", "new file"])
def test_put_is_flushed_before_it_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    file = tmp_path / "file"
    if exists:
        file.write_bytes(b"old")
    flushed = []

    def fsync(descriptor: int) -> None:
        seen = file.read_bytes() if file.exists() else None
        flushed.append((os.fstat(descriptor).st_ino, os.pread(descriptor, 100, 0), seen))

    monkeypatch.setattr(os, "fsync", fsync)
    put(str(file), b"new")
    assert flushed == [(file.stat().st_ino, b"new", b"old" if exists else None)]


def test_a_file_system_that_cannot_flush_is_written_to_nevertheless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, content in ((errno.EINVAL, b"new"), (errno.EIO, b"old")):
        file = tmp_path / str(number)
        file.write_bytes(b"old")

        def fsync(_: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)
        with contextlib.suppress(OSError):
            put(str(file), b"new")
        assert file.read_bytes() == content


# Temporary files


def test_a_temporary_file_is_private(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(functools.partial(os.umask, os.umask(0)))
    names = set()
    for _ in range(3):
        with StagedWrite(str(tmp_path / "file")) as write:
            write.write(b"secret")
            [name] = os.listdir(tmp_path)
            assert TEMPORARY.fullmatch(name)
            assert mode_of(tmp_path / name) == 0o600
            names.add(name)
    assert len(names) == 3


def test_a_process_searches_a_directory_for_temporary_files_once(tmp_path: Path) -> None:
    # Every directory listing is an audit event.
    code = (
        "events = []\n"
        "sys.addaudithook(lambda event, _: events.append(event))\n"
        "for path in args: put(path, b'')\n"
        "print(sum(event in ('os.listdir', 'os.scandir') for event in events))\n"
    )
    (tmp_path / "directory").mkdir()
    paths = [tmp_path / name for name in ("a", "b", "directory/a", "directory/b", "a")]
    assert python_as(os.geteuid(), code, *paths) == "2\n"


def test_the_temporary_file_of_a_living_writer_stays(tmp_path: Path) -> None:
    with StagedWrite(str(tmp_path / "file")) as write:
        write.write(b"whole")
        before = os.listdir(tmp_path)
        python_as(os.geteuid(), "put(args[0], b'')", tmp_path / "other")
        assert set(os.listdir(tmp_path)) == {*before, "other"}
        write.commit()
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_files_that_only_look_like_temporary_ones_stay(tmp_path: Path) -> None:
    number = "0" * 31
    for name in (f".inmanta-put-{number}00", f"inmanta-put-{number}0", ".inmanta-put-x", "target"):
        (tmp_path / name).touch()
    (tmp_path / f".inmanta-put-{number}1").mkdir()
    (tmp_path / f".inmanta-put-{number}2").symlink_to("target")
    os.mkfifo(tmp_path / f".inmanta-put-{number}3")
    before = {*os.listdir(tmp_path), "new"}
    python_as(os.geteuid(), "put(args[0], b'')", tmp_path / "new")
    assert set(os.listdir(tmp_path)) == before


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("exists", [True, False], ids=["old file", "new file"])
def test_put_killed_at_any_step_leaves_the_old_or_the_new_content_and_nothing_for_long(
    tmp_path: Path, exists: bool
) -> None:
    old = b"old" * 100_000 if exists else None
    new = b"new" * 200_000
    seen = set()
    step = 0
    killed = True
    while killed:
        directory = tmp_path / str(step)
        directory.mkdir()
        file = directory / "file"
        if old is not None:
            file.write_bytes(old)
            file.chmod(0o640)
        killed = act_at_step(step, die, functools.partial(put, str(file), new))
        content = file.read_bytes() if file.exists() else None
        assert content in (old, new)
        assert not exists or mode_of(file) == 0o640
        seen.add(content)
        left = set(os.listdir(directory)) - {"file"}
        assert all(map(TEMPORARY.fullmatch, left))
        # The next process that puts something there.
        act_at_step(1000, die, functools.partial(put, str(directory / "other"), b""))
        assert set(os.listdir(directory)) <= {"file", "other"}
        step += 1
    assert step > 9
    assert seen == {old, new}


def test_concurrent_puts_leave_one_of_the_contents_whole(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    contents = [bytes([65 + number]) * 700_000 for number in range(6)]
    put(path, contents[0])
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        puts = [pool.submit(put, path, content) for content in contents * 10]
        while not all(future.done() for future in puts):
            assert read_binary(path) in contents
    for future in puts:
        future.result()
    assert read_binary(path) in contents
    assert os.listdir(tmp_path) == ["file"]


# In place: what is no regular file


@support.requires_root
def test_put_to_a_device_writes_to_it_and_tells_its_errors(tmp_path: Path) -> None:
    null, full = tmp_path / "null", tmp_path / "full"
    os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(full, stat.S_IFCHR | 0o666, os.makedev(1, 7))
    put(str(null), b"gone")
    with pytest.raises(OSError, match="No space left") as caught:
        put(str(full), b"x")
    assert caught.value.filename == str(full)
    assert null.is_char_device()
    assert sorted(os.listdir(tmp_path)) == ["full", "null"]


def test_put_to_a_fifo_reaches_its_reader(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(OSError, match="No such device or address"):
        put(str(fifo), b"x")
    content = os.urandom(1_000_000)
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as reader, concurrent.futures.ThreadPoolExecutor() as pool:
        done = pool.submit(put, str(fifo), content)
        select.select([reader], [], [], 20)
        os.set_blocking(descriptor, True)
        assert reader.read() == content
        done.result()
    assert fifo.is_fifo()


def test_put_to_an_entry_of_proc_sets_it_or_tells_its_error() -> None:
    entry = Path("/proc/self/task", str(threading.get_native_id()), "comm")
    before = entry.read_bytes()
    try:
        put(str(entry), b"staged")
        assert entry.read_bytes() == b"staged\n"
    finally:
        put(str(entry), before.strip())
    assert entry.read_bytes() == before
    with pytest.raises(OSError, match="Invalid argument: '/proc/self/oom_score_adj'"):
        put("/proc/self/oom_score_adj", b"no number")


def test_put_does_not_mistake_the_path_that_a_link_of_procfs_shows_for_where_it_leads(
    tmp_path: Path,
) -> None:
    code = (
        "for path in ('/proc/self/fd/0/file', '/proc/self/fd/1'):\n"
        "    try: put(path, b'new')\n"
        "    except OSError as error: print(error.filename)\n"
        "os.chdir(args[0])\n"
        "put('/proc/self/cwd/file', b'new')\n"
    )
    expected = "/proc/self/fd/0/file\n/proc/self/fd/1\n"
    assert python_as(os.geteuid(), code, tmp_path) == expected
    assert (tmp_path / "file").read_bytes() == b"new"


# In place: what can't be replaced


@pytest.fixture
def bound(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A file, and another one that it is mounted on, on a file system of a megabyte."""
    target = tmp_path / "target"
    target.touch()
    with small_disk(tmp_path) as disk:
        source = disk / "source"
        source.write_bytes(OLD)
        with mounted("--bind", source, target):
            yield source, target


def test_put_writes_a_bind_mounted_file_in_place(bound: tuple[Path, Path]) -> None:
    source, target = bound
    with pytest.raises(OSError, match="No space left") as caught:
        put(str(target), b"n" * 2_000_000)
    assert caught.value.filename == str(target)
    assert source.read_bytes() == OLD
    before = source.stat()
    put(str(target), b"n" * 500_000)
    assert source.read_bytes() == target.read_bytes() == b"n" * 500_000
    after = source.stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert sorted(os.listdir(target.parent)) == ["disk", "target"]


@pytest.fixture
def closed(public: Path) -> Path:
    """A file that Alice may write, in a directory that she may not."""
    support.need(root=True)
    file = public / "file"
    file.write_bytes(OLD)
    os.chown(file, MALLORY, ALICE)
    file.chmod(0o664)
    return file


# The directory is closed, sticky, or open, where the owner would be lost.
@pytest.mark.parametrize(
    ("mode", "size"), [(0o755, 0), (0o755, 20_000_000), (0o1777, 10), (0o777, 3000)]
)
def test_put_writes_in_place_what_may_not_be_replaced(closed: Path, mode: int, size: int) -> None:
    closed.parent.chmod(mode)
    before = closed.stat()
    python_as(ALICE, "put(args[0], b'n' * int(args[1]))", closed, size)
    after = closed.stat()
    assert hashlib.sha1(closed.read_bytes()).digest() == hashlib.sha1(b"n" * size).digest()
    assert (after.st_ino, after.st_uid, after.st_gid) == (before.st_ino, MALLORY, ALICE)
    assert after.st_mode == before.st_mode
    assert os.listdir(closed.parent) == ["file"]


def test_put_in_place_without_commit_changes_nothing(closed: Path) -> None:
    python_as(ALICE, "with StagedWrite(args[0]) as write: write.write(b'new')", closed)
    assert closed.read_bytes() == OLD


@pytest.mark.parametrize("size", [1_000_000, 20_000_000])
def test_put_in_place_that_fails_in_the_middle_restores_a_small_file_or_says_that_it_is_lost(
    closed: Path, size: int
) -> None:
    old = b"o" * size
    closed.write_bytes(old)
    # The limit is below what is there, and is lifted as soon as it was reached.
    code = (
        "forever = resource.RLIM_INFINITY\n"
        "def lift(*_): resource.setrlimit(resource.RLIMIT_FSIZE, (forever, forever))\n"
        "signal.signal(signal.SIGXFSZ, lift)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, forever))\n"
        "try: put(args[0], b'new' * 300_000)\n"
        "except OSError as error: print(error)\n"
    )
    text = python_as(ALICE, code, closed)
    assert "[Errno 27] File too large" in text
    assert ("the old content is lost" in text) == (closed.read_bytes() != old)
    assert (closed.read_bytes() == old) == (size <= 16 << 20)


REFUSE_RENAMES = """
def refuse(event, _):
    if event == 'os.rename': raise OSError(38, 'Function not implemented')
sys.addaudithook(refuse)
"""
"""Makes this process one whose file system can't rename, as some of FUSE can't."""


@pytest.mark.parametrize("exists", [True, False], ids=["old file", "new file"])
def test_put_works_where_files_can_not_be_renamed(tmp_path: Path, exists: bool) -> None:
    file = tmp_path / "file"
    if exists:
        file.write_bytes(b"old")
        file.chmod(0o640)
    python_as(os.geteuid(), REFUSE_RENAMES + "put(args[0], b'new')", file)
    assert file.read_bytes() == b"new"
    assert mode_of(file) == (0o640 if exists else 0o644)
    assert os.listdir(tmp_path) == ["file"]


def test_a_new_file_that_can_not_be_completed_is_removed(tmp_path: Path) -> None:
    code = "try: put(args[0], b'new' * 200_000)\nexcept OSError as error: print(error.errno)\n"
    with small_disk(tmp_path) as disk:
        printed = python_as(os.geteuid(), REFUSE_RENAMES + code, disk / "file")
        assert printed == f"{errno.ENOSPC}\n"
        assert os.listdir(disk) == []


def test_put_in_place_shortens_a_file_without_blocks(tmp_path: Path) -> None:
    with small_disk(tmp_path, "size=0") as disk:
        for content in (b"something longer", b"new"):
            put(str(disk / "file"), content, in_place=True)
            assert (disk / "file").read_bytes() == content


def test_put_in_an_append_only_directory_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with file_attribute(tmp_path, "a"):
        for content in (b"new", b"newer"):
            for name in ("file", "created"):
                put(str(tmp_path / name), content)
                assert (tmp_path / name).read_bytes() == content
        assert sorted(os.listdir(tmp_path)) == ["created", "file"]
        assert mode_of(tmp_path / "created") == 0o644


def test_put_to_a_file_that_can_not_be_changed_at_all_names_it(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    with file_attribute(file, "i"):
        with pytest.raises(PermissionError, match=str(file)):
            put(str(file), b"new")
        assert file.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["file"]


def test_put_in_place_creates_a_file_as_a_whole(tmp_path: Path) -> None:
    with StagedWrite(str(tmp_path / "file"), in_place=True) as write:
        write.write(b"new")
        assert not (tmp_path / "file").exists()
        write.commit()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_put_where_nothing_may_be_written_says_so_beforehand(closed: Path) -> None:
    closed.chmod(0o644)
    code = (
        "for path in args:\n"
        "    try: StagedWrite(path)\n"
        "    except PermissionError as error: print(error.filename)\n"
    )
    new = closed.with_name("new")
    assert python_as(ALICE, code, closed, new).split() == [str(closed), str(new)]


def test_put_works_in_a_directory_that_may_not_be_listed(public: Path) -> None:
    support.need(root=True)
    inner = public / "inner"
    inner.mkdir()
    os.chown(inner, ALICE, ALICE)
    inner.chmod(0o300)
    python_as(ALICE, "put(args[0], b'a'); put(args[0], b'b')", inner / "file")
    assert (inner / "file").read_bytes() == b"b"


def test_put_without_procfs_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_stat = os.stat

    def no_proc(path: str | bytes, **options: Any) -> os.stat_result:
        if os.fsdecode(path).startswith("/proc"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return real_stat(path, **options)

    (tmp_path / "link").symlink_to("file")
    monkeypatch.setattr(os, "stat", no_proc)
    put(str(tmp_path / "link"), b"new")
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == b"new"
