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
import stat
import time
from collections.abc import Iterator

import pytest
from host_files import ALICE, MALLORY, python_as

import support
from inmanta_mitogen import put
from inmanta_mitogen.paths import locate
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
def lair(public: pathlib.Path) -> pathlib.Path:
    """
    A directory of Mallory's.
    """
    path = public / "lair"
    path.mkdir(0o755)
    os.chown(path, MALLORY, MALLORY)
    return path


def plant(link: pathlib.Path, target: pathlib.Path, owner: int = MALLORY) -> pathlib.Path:
    link.symlink_to(target)
    os.chown(link, owner, owner, follow_symlinks=False)
    return link


def untouched(victim: pathlib.Path) -> bool:
    return os.listdir(victim.parent) == ["file"] and victim.read_bytes() == b"precious"


# Links that are there already


def test_a_link_of_another_user_leads_to_nothing_of_root(
    lair: pathlib.Path, victim: pathlib.Path
) -> None:
    link = plant(lair / "link", victim)
    with pytest.raises(PermissionError) as caught:
        put(str(link), b"stolen")
    text = str(caught.value)
    assert f"the symlink 'link' on the way belongs to user {MALLORY}" in text
    assert "leads to what belongs to user 0" in text
    assert text.endswith(f": '{link}'")
    assert untouched(victim)


def test_a_link_of_another_user_creates_nothing_in_a_directory_of_root(
    lair: pathlib.Path, victim: pathlib.Path
) -> None:
    with pytest.raises(PermissionError):
        put(str(plant(lair / "link", victim.with_name("new"))), b"planted")
    assert untouched(victim)


def test_a_link_of_another_user_to_a_directory_of_root_is_not_followed(
    lair: pathlib.Path, victim: pathlib.Path
) -> None:
    plant(lair / "directory", victim.parent)
    for name in ("file", "new"):
        with pytest.raises(PermissionError, match="the symlink 'directory' on the way"):
            put(str(lair / "directory" / name), b"stolen")
    assert untouched(victim)


def test_a_link_through_another_link_of_another_user_is_not_followed(
    lair: pathlib.Path, victim: pathlib.Path
) -> None:
    inner = plant(lair / "inner", victim)
    outer = plant(lair / "outer", inner)
    roots = plant(lair / "roots", inner, owner=0)
    for link in (inner, outer, roots):
        with pytest.raises(PermissionError):
            put(str(link), b"stolen")
    assert untouched(victim)


def test_a_link_of_another_user_in_a_sticky_directory_is_not_followed(
    public: pathlib.Path, victim: pathlib.Path
) -> None:
    shared = public / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    with pytest.raises(PermissionError):
        put(str(plant(shared / "link", victim)), b"stolen")
    assert untouched(victim)


def test_a_link_of_another_user_does_not_lead_a_third_one(
    public: pathlib.Path, lair: pathlib.Path
) -> None:
    hers = public / "hers"
    hers.mkdir()
    (hers / "file").write_bytes(b"precious")
    os.chown(hers, ALICE, ALICE)
    os.chown(hers / "file", ALICE, ALICE)
    link = plant(lair / "link", hers / "file")
    code = "try: put(args[0], b'')\nexcept PermissionError as error: print(error)"
    assert "Not followed" in python_as(ALICE, code, link).stdout
    assert (hers / "file").read_bytes() == b"precious"


def test_a_link_of_another_user_leads_to_what_is_that_users(
    lair: pathlib.Path, victim: pathlib.Path
) -> None:
    (lair / "real").mkdir()
    (lair / "real" / "file").write_bytes(b"old")
    for path in (lair / "real", lair / "real" / "file"):
        os.chown(path, MALLORY, MALLORY)
    plant(lair / "directory", pathlib.Path("real"))
    link = plant(lair / "link", pathlib.Path("directory/../directory/file"))
    put(str(link), b"new")
    assert (lair / "real" / "file").read_bytes() == b"new"
    assert (lair / "real" / "file").stat().st_uid == MALLORY
    put(str(lair / "directory" / "other"), b"new")
    assert (lair / "real" / "other").read_bytes() == b"new"


def test_a_link_of_another_user_leads_to_that_users_file_in_a_directory_of_root(
    lair: pathlib.Path, victim: pathlib.Path
) -> None:
    # As /var/mail is.
    os.chown(victim, MALLORY, MALLORY)
    put(str(plant(lair / "link", victim)), b"new")
    assert victim.read_bytes() == b"new"
    assert victim.stat().st_uid == MALLORY


def test_a_link_that_only_root_can_change_is_followed_whoever_owns_it(
    public: pathlib.Path, victim: pathlib.Path
) -> None:
    put(str(plant(public / "link", victim)), b"new")
    assert victim.read_bytes() == b"new"


def test_a_link_of_root_is_followed_wherever_it_is(
    lair: pathlib.Path, victim: pathlib.Path
) -> None:
    put(str(plant(lair / "link", victim, owner=0)), b"new")
    assert victim.read_bytes() == b"new"


def test_a_user_follows_links_of_their_own(public: pathlib.Path, lair: pathlib.Path) -> None:
    hers = public / "hers"
    hers.mkdir()
    os.chown(hers, ALICE, ALICE)
    lair.chmod(0o1777)
    python_as(ALICE, "put(args[0], b'new')", plant(lair / "link", hers / "file", owner=ALICE))
    assert (hers / "file").read_bytes() == b"new"


# Links that appear meanwhile


def test_a_link_planted_after_the_check_is_replaced_and_not_followed(
    lair: pathlib.Path, victim: pathlib.Path
) -> None:
    for exists in (True, False):
        file = lair / f"file {exists}"
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
    lair: pathlib.Path, victim: pathlib.Path
) -> None:
    (lair / "directory").mkdir()
    with StagedWrite(str(lair / "directory" / "file")) as write:
        write.write(b"new")
        (lair / "directory").rename(lair / "away")
        plant(lair / "directory", victim.parent)
        write.commit()
    assert (lair / "away" / "file").read_bytes() == b"new"
    assert untouched(victim)


def test_a_link_planted_before_it_is_written_in_place_is_not_followed(
    lair: pathlib.Path, victim: pathlib.Path
) -> None:
    fifo = lair / "fifo"
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
    lair: pathlib.Path, victim: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE")
    file = lair / "file"
    file.touch()
    os.chown(file, MALLORY, MALLORY)
    file.chmod(0o666)
    before = victim.stat()
    with StagedWrite(str(file)) as write:
        [temporary] = [name for name in os.listdir(lair) if name != "file"]
        (lair / temporary).unlink()
        plant(lair / temporary, victim)
        write.write(b"stolen")
        write.commit()
    after = victim.stat()
    assert untouched(victim)
    assert (after.st_uid, after.st_mode) == (before.st_uid, before.st_mode)


@contextlib.contextmanager
def mallory_swaps(lair: pathlib.Path, victim: pathlib.Path) -> Iterator[None]:
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
            os.chdir(lair)
            os.mkdir("real")
            os.write(started, b"x")
            while True:
                os.close(os.open("new", os.O_CREAT | os.O_WRONLY))
                os.replace("new", "file")
                os.rename("real", "directory")
                os.symlink(victim, "new")
                os.replace("new", "file")
                os.rename("directory", "real")
                os.symlink(victim.parent, "directory")
                os.sched_yield()
                os.unlink("directory")
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
    lair: pathlib.Path, victim: pathlib.Path
) -> None:
    before = victim.stat()
    outcomes = collections.Counter[object]()
    with mallory_swaps(lair, victim):
        # On a busy machine she may not get her turn for a while.
        deadline = time.monotonic() + 30
        number = 0
        wanted = {"written", PermissionError}
        while number < 3000 or (not wanted <= outcomes.keys() and time.monotonic() < deadline):
            number += 1
            path = lair / "file" if number % 2 else lair / "directory" / "file"
            # What she makes of it decides whether there is something to write to.
            try:
                put(str(path), b"stolen")
                outcomes["written"] += 1
            except OSError as error:
                outcomes[type(error)] += 1
    assert untouched(victim)
    after = victim.stat()
    assert (after.st_uid, after.st_mode, after.st_ino) == (0, before.st_mode, before.st_ino)
    # It was seen as a link, and as none.
    assert outcomes["written"]
    assert outcomes[PermissionError]


# The place itself


def test_a_place_stays_the_same_when_its_path_changes(public: pathlib.Path) -> None:
    (public / "a").mkdir()
    place = locate(str(public / "a" / "file"))
    try:
        assert place.state() is None
        (public / "a").rename(public / "b")
        (public / "b" / "file").touch()
        state = place.state()
        assert state is not None
        assert stat.S_ISREG(state.st_mode)
    finally:
        place.close()
        place.close()


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
