"""
Files that get their new content as a whole, whatever happens meanwhile.
"""

import errno
import fcntl
import functools
import hashlib
import multiprocessing
import os
import pathlib
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from host_files import (
    ALICE,
    CHECKOUT,
    MALLORY,
    die_at_step,
    mounted,
    python_as,
    run_python_as,
)

import support
from inmanta_mitogen import in_place, put, read_binary
from inmanta_mitogen.staged import StagedWrite

pytestmark = pytest.mark.usefixtures("nothing_left")

TEMPORARY = re.compile(r"\.inmanta-put-[0-9a-f]{32}")


# One write


def test_a_staged_write_collects_chunks_of_any_kind(tmp_path: pathlib.Path) -> None:
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
def test_a_staged_write_without_commit_changes_nothing(
    tmp_path: pathlib.Path, exists: bool
) -> None:
    if exists:
        (tmp_path / "file").write_bytes(b"old")
    with StagedWrite(str(tmp_path / "file")) as write:
        write.write(b"new")
    assert os.listdir(tmp_path) == (["file"] if exists else [])
    if exists:
        assert (tmp_path / "file").read_bytes() == b"old"


def test_an_exception_in_between_changes_nothing(tmp_path: pathlib.Path) -> None:
    def interrupted() -> None:
        with StagedWrite(str(tmp_path / "file")) as write:
            write.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_a_staged_write_is_used_once(tmp_path: pathlib.Path) -> None:
    with StagedWrite(str(tmp_path / "file")) as write:
        write.commit()
        with pytest.raises(ValueError, match="has ended already"):
            write.write(b"more")
        with pytest.raises(ValueError, match="has ended already"):
            write.commit()
        write.abort()
        write.abort()
    assert (tmp_path / "file").read_bytes() == b""


def test_a_file_that_was_removed_meanwhile_is_put_all_the_same(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "file"
    file.touch(0o600)
    with StagedWrite(str(file)) as write:
        write.write(b"new")
        file.unlink()
        write.commit()
    assert file.read_bytes() == b"new"
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_file_that_appeared_meanwhile_keeps_its_mode(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "file"
    with StagedWrite(str(file)) as write:
        write.write(b"new")
        file.touch(0o600)
        write.commit()
    assert file.read_bytes() == b"new"
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_directory_that_appeared_meanwhile_is_named(tmp_path: pathlib.Path) -> None:
    with StagedWrite(str(tmp_path / "file")) as write:
        (tmp_path / "file").mkdir()
        with pytest.raises(IsADirectoryError, match="file"):
            write.commit()
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("exists", [True, False], ids=["old file", "new file"])
def test_put_is_on_the_disk_before_it_is_seen(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, exists: bool
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


# Temporary files


def test_a_temporary_file_is_private_and_unpredictable(tmp_path: pathlib.Path) -> None:
    old = os.umask(0)
    try:
        names = set()
        for _ in range(3):
            with StagedWrite(str(tmp_path / "file")) as write:
                write.write(b"secret")
                [name] = os.listdir(tmp_path)
                assert TEMPORARY.fullmatch(name)
                assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
                names.add(name)
        assert len(names) == 3
    finally:
        os.umask(old)


def leave_a_temporary_file(path: pathlib.Path) -> pathlib.Path:
    """
    Kill a process that has begun to write.

    :return: The temporary file that it left.
    """
    code = "write = StagedWrite(args[0]); write.write(b'half'); os.kill(os.getpid(), 9)"
    assert run_python_as(os.geteuid(), code, path).returncode == -signal.SIGKILL
    [name] = [name for name in os.listdir(path.parent) if TEMPORARY.fullmatch(name)]
    return path.with_name(name)


def test_what_a_killed_writer_left_is_gone_after_the_first_put_of_another_process(
    tmp_path: pathlib.Path,
) -> None:
    left = leave_a_temporary_file(tmp_path / "file")
    assert stat.S_IMODE(left.stat().st_mode) == 0o600
    assert left.read_bytes() == b"half"
    python_as(os.geteuid(), "put(args[0], b'new')", tmp_path / "other")
    assert os.listdir(tmp_path) == ["other"]


def test_a_process_searches_a_directory_for_temporary_files_once(tmp_path: pathlib.Path) -> None:
    # Every directory listing is an audit event.
    code = (
        "events = []\n"
        "sys.addaudithook(lambda event, _: events.append(event))\n"
        "for path in args: put(path, b'')\n"
        "print(sum(event in ('os.listdir', 'os.scandir') for event in events))\n"
    )
    (tmp_path / "directory").mkdir()
    paths = [tmp_path / name for name in ("a", "b", "directory/a", "directory/b", "a")]
    assert python_as(os.geteuid(), code, *paths).stdout == "2\n"


def test_the_temporary_file_of_a_living_writer_stays(tmp_path: pathlib.Path) -> None:
    with StagedWrite(str(tmp_path / "file")) as write:
        write.write(b"whole")
        before = os.listdir(tmp_path)
        python_as(os.geteuid(), "put(args[0], b'')", tmp_path / "other")
        assert set(os.listdir(tmp_path)) == {*before, "other"}
        write.commit()
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_files_that_only_look_like_temporary_ones_stay(tmp_path: pathlib.Path) -> None:
    number = "0" * 32
    (tmp_path / f".inmanta-put-{number}0").touch()
    (tmp_path / f"inmanta-put-{number}").touch()
    (tmp_path / ".inmanta-put-x").touch()
    (tmp_path / f".inmanta-put-{number[1:]}1").mkdir()
    (tmp_path / "target").touch()
    (tmp_path / f".inmanta-put-{number[1:]}2").symlink_to("target")
    os.mkfifo(tmp_path / f".inmanta-put-{number[1:]}3")
    before = {*os.listdir(tmp_path), "new"}
    python_as(os.geteuid(), "put(args[0], b'')", tmp_path / "new")
    assert set(os.listdir(tmp_path)) == before


# Being killed


@pytest.mark.parametrize("chunks", range(4))
def test_put_killed_while_it_writes_leaves_the_old_content(
    tmp_path: pathlib.Path, chunks: int
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    code = (
        "write = StagedWrite(args[0])\n"
        "for _ in range(int(args[1])): write.write(b'new' * 1_000_000)\n"
        "print('ready', flush=True)\n"
        "while True: write.write(b'new' * 100)\n"
    )
    prelude = (
        "import os, sys\nfrom inmanta_mitogen.staged import StagedWrite\nargs = sys.argv[1:]\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", prelude + code, file, str(chunks)],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.PIPE,
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        writer.kill()
    assert file.read_bytes() == b"old"
    python_as(os.geteuid(), "put(args[0], b'')", tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["file", "other"]


@pytest.mark.parametrize("exists", [True, False], ids=["old file", "new file"])
def test_put_killed_at_any_step_leaves_the_old_or_the_new_content(
    tmp_path: pathlib.Path, exists: bool
) -> None:
    old = b"old" * 100_000 if exists else None
    new = b"new" * 200_000
    seen = set()
    step = 0
    while True:
        directory = tmp_path / str(step)
        directory.mkdir()
        file = directory / "file"
        if old is not None:
            file.write_bytes(old)
            file.chmod(0o640)
        killed = die_at_step(step, functools.partial(put, str(file), new))
        content = file.read_bytes() if file.exists() else None
        assert content in (old, new)
        if exists:
            assert stat.S_IMODE(file.stat().st_mode) == 0o640
        seen.add(content)
        left = set(os.listdir(directory)) - {"file"}
        assert all(map(TEMPORARY.fullmatch, left))
        if left:
            python_as(os.geteuid(), "put(args[0], b'')", directory / "other")
            assert not set(os.listdir(directory)) - {"file", "other"}
        if not killed:
            break
        step += 1
    assert step > 8
    assert seen == {old, new}


# At once


def test_concurrent_puts_leave_one_of_the_contents_whole(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "file"
    contents = [bytes([65 + number]) * 700_000 for number in range(6)]
    file.write_bytes(contents[0])
    put_at_once(str(file), contents, times=10)
    assert os.listdir(tmp_path) == ["file"]


def put_at_once(path: str, contents: list[bytes], times: int) -> None:
    """
    Puts each content from a process of its own, several times, and reads what is there meanwhile.
    """
    # The processes start with what the test has changed in this one.
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=put_often, args=(path, content, times)) for content in contents
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert read_binary(path) in contents
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
        writer.close()
    assert read_binary(path) in contents


def put_often(path: str, content: bytes, times: int) -> None:
    for _ in range(times):
        put(path, content)


def test_concurrent_puts_of_many_threads_work(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "file"
    contents = [bytes([65 + number]) * 100_000 for number in range(8)]
    threads = [
        threading.Thread(target=put_often, args=(str(file), content, 10)) for content in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.read_bytes() in contents
    assert os.listdir(tmp_path) == ["file"]


# In place: what is no regular file


@support.requires_root
def test_put_to_a_device_writes_to_it(tmp_path: pathlib.Path) -> None:
    device = tmp_path / "null"
    os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    put(str(device), b"gone")
    assert stat.S_ISCHR(device.stat().st_mode)
    assert os.listdir(tmp_path) == ["null"]


@support.requires_root
def test_put_to_a_device_tells_its_errors(tmp_path: pathlib.Path) -> None:
    device = tmp_path / "full"
    os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 7))
    with pytest.raises(OSError, match="No space left") as caught:
        put(str(device), b"x")
    assert caught.value.filename == str(device)


def test_put_to_a_fifo_reaches_its_reader(tmp_path: pathlib.Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    content = os.urandom(1_000_000)
    received = []
    reader = threading.Thread(target=lambda: received.append(fifo.read_bytes()))
    reader.start()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            put(str(fifo), content)
            break
        except OSError as error:
            # The reader may not be there yet.
            if error.errno != errno.ENXIO:
                raise
    reader.join()
    assert received == [content]
    assert stat.S_ISFIFO(fifo.stat().st_mode)


def test_put_to_a_fifo_that_nobody_reads_does_not_hang(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="Nobody reads from this FIFO"):
        put(str(tmp_path / "fifo"), b"x")


def test_put_to_an_entry_of_proc_sets_it() -> None:
    entry = pathlib.Path("/proc/self/task", str(threading.get_native_id()), "comm")
    before = entry.read_bytes()
    try:
        put(str(entry), b"staged")
        assert entry.read_bytes() == b"staged\n"
    finally:
        put(str(entry), before.strip())
    assert entry.read_bytes() == before


def test_put_to_an_entry_of_proc_tells_its_errors() -> None:
    with pytest.raises(OSError, match="Invalid argument: '/proc/self/oom_score_adj'"):
        put("/proc/self/oom_score_adj", b"no number")


def test_put_follows_the_links_of_procfs() -> None:
    # As /dev/stdout does. There is no path to what it leads to.
    code = "put('/proc/self/fd/1', b'to the pipe')"
    assert python_as(os.geteuid(), code).stdout == "to the pipe"


def test_put_goes_through_the_directories_of_procfs(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    put("/proc/self/cwd/file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


# In place: what can't be replaced


@pytest.fixture
def bound(tmp_path: pathlib.Path) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """
    A file, and another one that it is mounted on, on a file system of a megabyte.
    """
    support.need("mount", "umount", root=True)
    disk = tmp_path / "disk"
    disk.mkdir()
    source = disk / "source"
    target = tmp_path / "target"
    target.touch()
    with mounted("-t", "tmpfs", "-o", "size=1m", "tmpfs", disk):
        source.write_bytes(b"old" * 1000)
        with mounted("--bind", source, target):
            yield source, target


@pytest.mark.parametrize("size", [0, 10, 3000, 500_000])
def test_put_writes_a_bind_mounted_file_in_place(
    bound: tuple[pathlib.Path, pathlib.Path], size: int
) -> None:
    source, target = bound
    source.chmod(0o640)
    inode = source.stat().st_ino
    put(str(target), b"n" * size)
    assert source.read_bytes() == target.read_bytes() == b"n" * size
    assert (source.stat().st_ino, stat.S_IMODE(source.stat().st_mode)) == (inode, 0o640)
    assert sorted(os.listdir(target.parent)) == ["disk", "target"]


def test_put_keeps_the_old_content_of_a_bind_mounted_file_when_the_disk_is_full(
    bound: tuple[pathlib.Path, pathlib.Path],
) -> None:
    source, target = bound
    with pytest.raises(OSError, match="No space left") as caught:
        put(str(target), b"n" * 2_000_000)
    assert caught.value.filename == str(target)
    assert source.read_bytes() == b"old" * 1000


def test_concurrent_puts_in_place_leave_one_of_the_contents_whole(tmp_path: pathlib.Path) -> None:
    support.need("mount", "umount", root=True)
    file = tmp_path / "file"
    file.touch()
    # Large enough for several system calls, in which the others get their turn.
    contents = [bytes([65 + number]) * ((number + 4) << 20) for number in range(4)]
    context = multiprocessing.get_context("fork")
    with mounted("--bind", file, file):
        writers = [
            context.Process(target=put_often, args=(str(file), content, 4)) for content in contents
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
            assert writer.exitcode == 0
            writer.close()
    assert file.read_bytes() in contents
    assert os.listdir(tmp_path) == ["file"]


def test_a_put_in_place_waits_for_the_end_of_another_one(
    bound: tuple[pathlib.Path, pathlib.Path],
) -> None:
    source, target = bound
    waiting = threading.Thread(target=put, args=(str(target), b"new"))
    with open(source, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting.start()
        waiting.join(0.5)
        assert source.read_bytes() == b"old" * 1000
    waiting.join()
    assert source.read_bytes() == b"new"


def test_a_lock_of_someone_else_does_not_block_put_for_ever(
    bound: tuple[pathlib.Path, pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_place, "_LOCK_TIMEOUT", 0.2)
    source, target = bound
    with open(source, "rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        put(str(target), b"new")
    assert source.read_bytes() == b"new"


@pytest.fixture
def closed(public: pathlib.Path) -> pathlib.Path:
    """
    A file that Alice may write, in a directory that she may not.
    """
    support.need(root=True)
    file = public / "file"
    file.write_bytes(b"old" * 1000)
    os.chown(file, MALLORY, ALICE)
    file.chmod(0o664)
    return file


@pytest.mark.parametrize("size", [0, 10, 3000, 20_000_000])
def test_put_writes_in_place_where_the_directory_is_closed(closed: pathlib.Path, size: int) -> None:
    before = closed.stat()
    python_as(ALICE, "put(args[0], b'n' * int(args[1]))", closed, size)
    after = closed.stat()
    assert hashlib.sha1(closed.read_bytes()).digest() == hashlib.sha1(b"n" * size).digest()
    assert (after.st_ino, after.st_uid, after.st_gid) == (before.st_ino, MALLORY, ALICE)
    assert after.st_mode == before.st_mode


def test_put_in_place_without_commit_changes_nothing(closed: pathlib.Path) -> None:
    python_as(ALICE, "with StagedWrite(args[0]) as write: write.write(b'new')", closed)
    assert closed.read_bytes() == b"old" * 1000


def test_put_in_place_that_reaches_a_limit_keeps_the_old_content(closed: pathlib.Path) -> None:
    code = (
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: put(args[0], b'new' * 50_000)\n"
        "except OSError as error: print(error)\n"
    )
    assert "File too large" in python_as(ALICE, code, closed).stdout
    assert closed.read_bytes() == b"old" * 1000


@pytest.mark.parametrize("size", [1_000_000, 20_000_000])
def test_put_in_place_that_fails_in_the_middle_restores_a_small_file_or_says_that_it_is_lost(
    closed: pathlib.Path, size: int
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
    text = python_as(ALICE, code, closed).stdout
    assert "[Errno 27] File too large" in text
    assert ("the old content is lost" in text) == (closed.read_bytes() != old)
    assert (closed.read_bytes() == old) == (size <= 16 << 20)


@pytest.mark.parametrize("exists", [True, False], ids=["old file", "new file"])
def test_put_works_where_files_can_not_be_renamed(tmp_path: pathlib.Path, exists: bool) -> None:
    file = tmp_path / "file"
    if exists:
        file.write_bytes(b"old")
        file.chmod(0o640)
    # As FUSE file systems without that operation do.
    code = (
        "def refuse(event, _):\n"
        "    if event == 'os.rename': raise OSError(38, 'Function not implemented')\n"
        "sys.addaudithook(refuse)\n"
        "put(args[0], b'new')\n"
    )
    python_as(os.geteuid(), code, file)
    assert file.read_bytes() == b"new"
    assert stat.S_IMODE(file.stat().st_mode) == (0o640 if exists else 0o644)
    assert os.listdir(tmp_path) == ["file"]


def test_a_new_file_that_can_not_be_completed_is_removed(tmp_path: pathlib.Path) -> None:
    support.need("mount", "umount", root=True)
    disk = tmp_path / "disk"
    disk.mkdir()
    code = (
        "def refuse(event, _):\n"
        "    if event == 'os.rename': raise OSError(38, 'Function not implemented')\n"
        "sys.addaudithook(refuse)\n"
        "try: put(args[0], b'new' * 200_000)\n"
        "except OSError as error: print(error.errno)\n"
    )
    with mounted("-t", "tmpfs", "-o", "size=1m", "tmpfs", disk):
        assert python_as(os.geteuid(), code, disk / "file").stdout == f"{errno.ENOSPC}\n"
        assert os.listdir(disk) == []


def test_put_in_place_shortens_a_file_where_the_file_system_has_no_size(
    tmp_path: pathlib.Path,
) -> None:
    support.need("mount", "umount", root=True)
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=0", "tmpfs", disk):
        for content in (b"something longer", b"new"):
            put(str(disk / "file"), content, in_place=True)
            assert (disk / "file").read_bytes() == content


@pytest.fixture
def append_only(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """
    A directory where files can be created, and neither renamed nor removed, with a file in it.
    """
    support.need("chattr", root=True)
    (tmp_path / "file").write_bytes(b"old")
    done = subprocess.run(["chattr", "+a", tmp_path], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs a file system with attributes at {tmp_path}: {done.stderr}")
    yield tmp_path
    subprocess.run(["chattr", "-a", tmp_path], check=True)


def test_put_in_an_append_only_directory_leaves_nothing_behind(append_only: pathlib.Path) -> None:
    for content in (b"new", b"newer"):
        for name in ("file", "created"):
            put(str(append_only / name), content)
            assert (append_only / name).read_bytes() == content
    assert sorted(os.listdir(append_only)) == ["created", "file"]
    assert stat.S_IMODE((append_only / "created").stat().st_mode) == 0o644


def test_put_in_place_keeps_the_inode(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old" * 1000)
    (tmp_path / "other").hardlink_to(file)
    file.chmod(0o640)
    before = file.stat()
    for content in (b"new", b"n" * 10_000, b""):
        put(str(file), content, in_place=True)
        assert (tmp_path / "other").read_bytes() == content
    after = file.stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert sorted(os.listdir(tmp_path)) == ["file", "other"]


def test_put_in_place_creates_a_file_as_a_whole(tmp_path: pathlib.Path) -> None:
    with StagedWrite(str(tmp_path / "file"), in_place=True) as write:
        write.write(b"new")
        assert not (tmp_path / "file").exists()
        write.commit()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_put_where_nothing_may_be_written_says_so_beforehand(closed: pathlib.Path) -> None:
    closed.chmod(0o644)
    code = (
        "for path in args:\n"
        "    try: StagedWrite(path)\n"
        "    except PermissionError as error: print(error.filename)\n"
    )
    new = closed.with_name("new")
    assert python_as(ALICE, code, closed, new).stdout.split() == [str(closed), str(new)]


def test_put_writes_in_place_in_a_sticky_directory(closed: pathlib.Path) -> None:
    closed.parent.chmod(0o1777)
    python_as(ALICE, "put(args[0], b'new')", closed)
    assert closed.read_bytes() == b"new"
    assert (closed.stat().st_uid, closed.stat().st_gid) == (MALLORY, ALICE)
    assert os.listdir(closed.parent) == ["file"]


def test_put_writes_in_place_what_has_an_owner_that_would_be_lost(closed: pathlib.Path) -> None:
    closed.parent.chmod(0o777)
    inode = closed.stat().st_ino
    python_as(ALICE, "put(args[0], b'new')", closed)
    assert closed.read_bytes() == b"new"
    assert (closed.stat().st_uid, closed.stat().st_ino) == (MALLORY, inode)
    assert os.listdir(closed.parent) == ["file"]


def test_put_works_in_a_directory_that_may_not_be_listed(public: pathlib.Path) -> None:
    support.need(root=True)
    inner = public / "inner"
    inner.mkdir()
    os.chown(inner, ALICE, ALICE)
    inner.chmod(0o300)
    python_as(ALICE, "put(args[0], b'a'); put(args[0], b'b')", inner / "file")
    assert (inner / "file").read_bytes() == b"b"


def test_put_to_a_file_that_can_not_be_changed_at_all_names_it(tmp_path: pathlib.Path) -> None:
    support.need("chattr", root=True)
    file = tmp_path / "file"
    file.write_bytes(b"old")
    done = subprocess.run(["chattr", "+i", file], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs a file system with attributes at {tmp_path}: {done.stderr}")
    try:
        with pytest.raises(PermissionError, match=str(file)):
            put(str(file), b"new")
        assert file.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["file"]
    finally:
        subprocess.run(["chattr", "-i", file], check=True)


def test_put_without_procfs_works(tmp_path: pathlib.Path) -> None:
    support.need("unshare", "umount", root=True)
    file = tmp_path / "file"
    file.touch(0o600)
    code = 'umount -l /proc && exec "$@"'
    put_it = "import sys; from inmanta_mitogen import put; put(sys.argv[1], b'new')"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", code, "-", sys.executable, "-c", put_it, file],
        check=False,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
    )
    if "unshare" in done.stderr:
        pytest.skip(f"needs mount namespaces: {done.stderr}")
    assert not done.returncode, done.stderr
    assert file.read_bytes() == b"new"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["file"]
