"""
No other user of a host decides what is written to.
"""

import collections
import contextlib
import errno
import os
import pathlib
import re
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from host_files import ALICE, MALLORY, python_as

import support
from inmanta_mitogen import put
from inmanta_mitogen.staged import StagedWrite

pytestmark = [support.requires_root, pytest.mark.usefixtures("nothing_left")]


@pytest.fixture
def victim(public: pathlib.Path) -> pathlib.Path:
    """
    A file of root's, in a directory of root's.
    """
    file = public / "victim" / "file"
    file.parent.mkdir(0o755)
    file.write_bytes(b"precious")
    return file


@pytest.fixture
def shared(public: pathlib.Path) -> pathlib.Path:
    """
    A directory where everyone may create files, as /tmp is.
    """
    path = public / "shared"
    path.mkdir()
    path.chmod(0o1777)
    return path


def plant(link: pathlib.Path, target: pathlib.Path, owner: int = MALLORY) -> pathlib.Path:
    link.symlink_to(target)
    os.chown(link, owner, owner, follow_symlinks=False)
    return link


def untouched(victim: pathlib.Path) -> bool:
    return os.listdir(victim.parent) == ["file"] and victim.read_bytes() == b"precious"


# Links that are there already


def test_a_link_of_another_user_in_a_shared_directory_leads_to_nothing(
    shared: pathlib.Path, victim: pathlib.Path
) -> None:
    link = plant(shared / "link", victim)
    with pytest.raises(PermissionError) as caught:
        put(str(link), b"stolen")
    assert str(caught.value) == (
        "[Errno 13] Not followed: the symlink 'link' is in a directory where everyone may create"
        f" one, and belongs to user {MALLORY}. Use the path it leads to: '{link}'"
    )
    with pytest.raises(PermissionError):
        put(str(plant(shared / "new", victim.with_name("new"))), b"planted")
    assert untouched(victim)


def test_a_directory_behind_a_link_of_another_user_in_a_shared_directory_is_not_entered(
    shared: pathlib.Path, victim: pathlib.Path
) -> None:
    plant(shared / "directory", victim.parent)
    for name in ("file", "new"):
        with pytest.raises(PermissionError, match="the symlink 'directory' is in"):
            put(str(shared / "directory" / name), b"stolen")
    assert untouched(victim)


def test_a_link_through_another_link_of_another_user_is_not_followed(
    public: pathlib.Path, shared: pathlib.Path, victim: pathlib.Path
) -> None:
    inner = plant(shared / "inner", victim)
    for link in (
        plant(shared / "roots", inner, owner=0),
        plant(public / "absolute", inner, owner=0),
        plant(public / "relative", pathlib.Path("shared/inner"), owner=0),
    ):
        with pytest.raises(PermissionError, match="the symlink 'inner' is in"):
            put(str(link), b"stolen")
    assert untouched(victim)


def test_a_user_does_not_follow_links_of_a_third_one_in_a_shared_directory(
    public: pathlib.Path, shared: pathlib.Path
) -> None:
    hers = public / "hers"
    hers.mkdir()
    (hers / "file").write_bytes(b"precious")
    os.chown(hers, ALICE, ALICE)
    os.chown(hers / "file", ALICE, ALICE)
    link = plant(shared / "link", hers / "file")
    code = "try: put(args[0], b'')\nexcept PermissionError as error: print(error)"
    assert "Not followed" in python_as(ALICE, code, link).stdout
    assert (hers / "file").read_bytes() == b"precious"


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o1775])
def test_links_of_other_users_are_followed_in_directories_that_are_not_shared(
    public: pathlib.Path, victim: pathlib.Path, mode: int
) -> None:
    public.chmod(mode)
    put(str(plant(public / "link", victim)), b"new")
    assert victim.read_bytes() == b"new"


def test_a_link_of_the_owner_of_a_shared_directory_is_followed(
    shared: pathlib.Path, victim: pathlib.Path
) -> None:
    put(str(plant(shared / "link", victim, owner=0)), b"new")
    assert victim.read_bytes() == b"new"
    os.chown(shared, MALLORY, MALLORY)
    put(str(plant(shared / "other", victim)), b"newer")
    assert victim.read_bytes() == b"newer"


def test_a_user_follows_links_of_their_own(public: pathlib.Path, shared: pathlib.Path) -> None:
    hers = public / "hers"
    hers.mkdir()
    os.chown(hers, ALICE, ALICE)
    python_as(ALICE, "put(args[0], b'new')", plant(shared / "link", hers / "file", owner=ALICE))
    assert (hers / "file").read_bytes() == b"new"


# Links that appear meanwhile


def test_a_link_planted_after_the_check_is_replaced_and_not_followed(
    shared: pathlib.Path, victim: pathlib.Path
) -> None:
    for exists in (True, False):
        file = shared / f"file {exists}"
        if exists:
            file.write_bytes(b"old")
        with StagedWrite(str(file)) as write:
            write.write(b"new")
            file.unlink(missing_ok=True)
            plant(file, victim)
            write.commit()
        assert not file.is_symlink()
        assert file.read_bytes() == b"new"
        assert untouched(victim)


def test_a_directory_that_is_swapped_for_a_link_is_not_left(
    shared: pathlib.Path, victim: pathlib.Path
) -> None:
    (shared / "directory").mkdir()
    with StagedWrite(str(shared / "directory" / "file")) as write:
        write.write(b"new")
        (shared / "directory").rename(shared / "away")
        plant(shared / "directory", victim.parent)
        write.commit()
    assert (shared / "away" / "file").read_bytes() == b"new"
    assert untouched(victim)


def test_a_link_planted_before_it_is_written_in_place_is_not_followed(
    shared: pathlib.Path, victim: pathlib.Path
) -> None:
    fifo = shared / "fifo"
    os.mkfifo(fifo)
    with StagedWrite(str(fifo)) as write:
        write.write(b"stolen")
        fifo.unlink()
        plant(fifo, victim)
        with pytest.raises(OSError, match=re.escape(str(fifo))) as caught:
            write.commit()
    assert caught.value.errno == errno.ELOOP
    assert untouched(victim)


def test_a_temporary_file_that_is_swapped_for_a_link_changes_nothing_of_root(
    shared: pathlib.Path, victim: pathlib.Path
) -> None:
    file = shared / "file"
    file.touch()
    os.chown(file, MALLORY, MALLORY)
    file.chmod(0o666)
    before = victim.stat()
    with StagedWrite(str(file)) as write:
        [temporary] = [name for name in os.listdir(shared) if name != "file"]
        (shared / temporary).unlink()
        plant(shared / temporary, victim)
        write.write(b"stolen")
        write.commit()
    after = victim.stat()
    assert untouched(victim)
    assert (after.st_uid, after.st_mode) == (before.st_uid, before.st_mode)


@contextlib.contextmanager
def mallory_swaps(shared: pathlib.Path, victim: pathlib.Path) -> Iterator[None]:
    """
    Mallory makes one name a file, then a link to the victim, and another one a directory, then
    a link to the victim's directory, over and over, as fast as she can.
    """
    ready, started = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setgroups([])
            os.setresgid(MALLORY, MALLORY, MALLORY)
            os.setresuid(MALLORY, MALLORY, MALLORY)
            os.chdir(shared)
            os.mkdir("real")
            os.write(started, b"x")
            steps: tuple[Callable[[], object], ...] = (
                lambda: os.close(os.open("new", os.O_CREAT | os.O_WRONLY)),
                lambda: os.replace("new", "file"),
                lambda: os.rename("real", "directory"),
                lambda: os.symlink(victim, "new"),
                lambda: os.replace("new", "file"),
                lambda: os.rename("directory", "real"),
                lambda: os.symlink(victim.parent, "directory"),
                os.sched_yield,
                lambda: os.unlink("directory"),
            )
            while True:
                for step in steps:
                    # What root put there is not hers to replace.
                    with contextlib.suppress(OSError):
                        step()
        finally:
            os._exit(1)
    os.close(started)
    try:
        assert os.read(ready, 1) == b"x"
        yield
        # She never gave up.
        os.kill(pid, 0)
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)


def test_someone_who_swaps_links_all_the_time_gains_nothing(
    shared: pathlib.Path, victim: pathlib.Path
) -> None:
    before = victim.stat()
    outcomes = collections.Counter[object]()
    with mallory_swaps(shared, victim):
        # On a busy machine she may not get her turn for a while.
        deadline = time.monotonic() + 30
        number = 0
        wanted = {"written", PermissionError}
        while number < 3000 or (not wanted <= outcomes.keys() and time.monotonic() < deadline):
            number += 1
            path = shared / "file" if number % 2 else shared / "directory" / "file"
            # What she makes of it decides whether there is something to write to.
            try:
                put(str(path), b"stolen")
                outcomes["written"] += 1
            except OSError as error:
                outcomes[type(error)] += 1
            # She goes on with a new one.
            with contextlib.suppress(FileNotFoundError):
                (shared / "file").unlink()
    assert untouched(victim)
    after = victim.stat()
    assert (after.st_uid, after.st_mode, after.st_ino) == (0, before.st_mode, before.st_ino)
    # It was seen as a link, and as none.
    assert outcomes["written"]
    assert outcomes[PermissionError]


# Directories


def test_a_directory_that_may_only_be_searched_is_enough(public: pathlib.Path) -> None:
    (public / "a").mkdir(0o711)
    (public / "a" / "file").touch()
    (public / "a" / "file").chmod(0o666)
    python_as(ALICE, "put(args[0], b'new')", public / "a" / "file")
    assert (public / "a" / "file").read_bytes() == b"new"


def test_a_directory_that_may_not_be_searched_is_named(public: pathlib.Path) -> None:
    (public / "a").mkdir(0o700)
    code = "try: put(args[0], b'')\nexcept PermissionError as error: print(error)"
    path = public / "a" / "b" / "file"
    assert python_as(ALICE, code, path).stdout == (
        f"[Errno 13] Permission denied (its directory 'b'): '{path}'\n"
    )
