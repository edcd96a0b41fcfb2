"""
No other user of a host decides what is written to.
"""

import contextlib
import functools
import os
import stat
from pathlib import Path

import pytest
from host_files import ALICE, MALLORY, act_at_step, python_as

import support
from inmanta_mitogen import put
from inmanta_mitogen.staged import StagedWrite

pytestmark = [support.requires_root, pytest.mark.usefixtures("nothing_left")]

TRY_TO_PUT = "try: put(args[0], b'new')\nexcept PermissionError as error: print(error)"
"""Prints the error of a put."""


@pytest.fixture
def victim(public: Path) -> Path:
    """A file of root's, in a directory of root's."""
    file = public / "victim" / "file"
    file.parent.mkdir(0o755)
    file.write_bytes(b"precious")
    file.chmod(0o644)
    return file


@pytest.fixture
def shared(public: Path) -> Path:
    """A directory where everyone may create files, as /tmp is."""
    path = public / "shared"
    path.mkdir()
    path.chmod(0o1777)
    return path


def plant(link: Path, target: object, owner: int = MALLORY) -> Path:
    link.symlink_to(str(target))
    os.chown(link, owner, owner, follow_symlinks=False)
    return link


def untouched(victim: Path) -> bool:
    state = victim.stat()
    return (
        os.listdir(victim.parent) == ["file"]
        and victim.read_bytes() == b"precious"
        and (state.st_uid, stat.S_IMODE(state.st_mode)) == (0, 0o644)
    )


# Links that are there already


@pytest.mark.parametrize(
    ("path", "link"),
    [
        ("shared/link", "link"),
        ("shared/new", "new"),
        ("shared/directory/file", "directory"),
        ("shared/directory/new", "directory"),
        ("shared/roots", "link"),
        ("absolute", "link"),
        ("relative", "link"),
    ],
)
def test_a_link_of_another_user_in_a_shared_directory_leads_to_nothing(
    public: Path, shared: Path, victim: Path, path: str, link: str
) -> None:
    plant(shared / "link", victim)
    plant(shared / "new", victim.with_name("new"))
    plant(shared / "directory", victim.parent)
    plant(shared / "roots", shared / "link", owner=0)
    plant(public / "absolute", shared / "link", owner=0)
    plant(public / "relative", "shared/link", owner=0)
    with pytest.raises(PermissionError) as caught:
        put(str(public / path), b"stolen")
    assert str(caught.value) == (
        "[Errno 13] Not followed: a symlink that another user made in a shared directory,"
        f" '{link}' or below: '{public / path}'"
    )
    assert untouched(victim)


@pytest.mark.parametrize("owner", [ALICE, MALLORY])
def test_a_user_follows_their_own_links_only(public: Path, shared: Path, owner: int) -> None:
    hers = public / "hers"
    hers.mkdir()
    os.chown(hers, ALICE, ALICE)
    link = plant(shared / "link", hers / "file", owner)
    output = python_as(ALICE, TRY_TO_PUT, link)
    assert ("Not followed" in output) == (owner == MALLORY)
    assert os.listdir(hers) == ([] if owner == MALLORY else ["file"])


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o1775])
def test_links_of_other_users_are_followed_in_directories_that_are_not_shared(
    public: Path, victim: Path, mode: int
) -> None:
    public.chmod(mode)
    put(str(plant(public / "link", victim)), b"new")
    assert victim.read_bytes() == b"new"


@pytest.mark.parametrize("owner", [0, MALLORY])
def test_a_link_of_the_directorys_owner_is_followed(shared: Path, victim: Path, owner: int) -> None:
    os.chown(shared, owner, owner)
    put(str(plant(shared / "link", victim, owner)), b"new")
    assert victim.read_bytes() == b"new"


def test_a_link_below_what_another_user_made_in_a_shared_directory_leads_to_nothing(
    shared: Path, victim: Path
) -> None:
    directory = shared / "directory"
    directory.mkdir()
    os.chown(directory, MALLORY, MALLORY)
    plant(directory / "link", victim)
    with pytest.raises(PermissionError, match="Not followed: .* 'directory' or below"):
        put(str(directory / "link"), b"stolen")
    assert untouched(victim)
    put(str(directory / "file"), b"new")


# Links that appear meanwhile


def test_a_link_that_appears_meanwhile_is_replaced(shared: Path, victim: Path) -> None:
    file = shared / "file"
    with StagedWrite(str(file)) as write:
        write.write(b"new")
        plant(file, victim)
        write.commit()
    assert not file.is_symlink()
    assert file.read_bytes() == b"new"
    assert untouched(victim)


def test_a_temporary_file_swapped_for_a_link_does_no_harm(shared: Path, victim: Path) -> None:
    file = shared / "file"
    file.touch()
    os.chown(file, MALLORY, MALLORY)
    file.chmod(0o666)
    with StagedWrite(str(file)) as write:
        [temporary] = [name for name in os.listdir(shared) if name != "file"]
        (shared / temporary).unlink()
        plant(shared / temporary, victim)
        write.write(b"stolen")
        write.commit()
    assert untouched(victim)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("path", ["file", "new", "directory/file"])
def test_a_link_that_is_swapped_in_at_any_step_is_not_followed(
    shared: Path, victim: Path, path: str, in_place: bool
) -> None:
    step = 0
    swapped = True
    while swapped:
        directory = shared / str(step)
        (directory / path).parent.mkdir(parents=True)
        directory.chmod(0o1777)
        if path != "new":
            (directory / path).write_bytes(b"old")
        swapped = act_at_step(
            step,
            functools.partial(swap_for_link, directory / path.split("/")[0], victim),
            functools.partial(put, str(directory / path), b"stolen", in_place=in_place),
        )
        assert untouched(victim)
        step += 1
    assert step > 5


def swap_for_link(path: Path, victim: Path) -> None:
    """Make a path a link of Mallory's, to the victim or to its directory as it is one itself."""
    target = victim.parent if path.is_dir() else victim
    with contextlib.suppress(FileNotFoundError):
        path.rename(path.with_name("away"))
    plant(path, target)


# Directories


def test_a_directory_that_may_only_be_searched_is_enough(public: Path) -> None:
    (public / "a").mkdir(0o711)
    (public / "a" / "file").touch()
    (public / "a" / "file").chmod(0o666)
    python_as(ALICE, "put(args[0], b'new')", public / "a" / "file")
    assert (public / "a" / "file").read_bytes() == b"new"


def test_a_directory_that_may_not_be_searched_is_named(public: Path) -> None:
    (public / "a").mkdir(0o700)
    path = public / "a" / "b" / "file"
    assert python_as(ALICE, TRY_TO_PUT, path) == f"[Errno 13] Permission denied: '{path}'\n"
