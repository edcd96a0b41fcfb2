"""
Where a path leads to, found once, step by step, and held by an open directory from then on.

The kernel resolves a path anew at each use, so someone who may write to a directory on the way can
make two uses of one path mean two files. A :class:`Place` means the same directory each time.
"""

import errno
import os
import stat
from typing import List, NamedTuple, Optional, Tuple, Union

from inmanta_mitogen.names import AnyPath, encode

#: As many as Linux follows before it says ELOOP (path_resolution(7)).
_MAX_LINKS = 40

# O_PATH needs no permission to read the directory, only to search it, and does not exist outside
# Linux. With O_DIRECTORY it still mounts what an automounter has there.
_O_PATH: int = getattr(os, "O_PATH", 0)
_DIRECTORY = _O_PATH | os.O_DIRECTORY

# What open(2) says to a symlink, with O_NOFOLLOW and O_DIRECTORY: Linux, others, FreeBSD.
_MAYBE_A_LINK = (errno.ENOTDIR, errno.ELOOP, errno.EMLINK)


class Place:
    """
    An entry of an open directory: the one that a path led to when it was resolved.

    :attr directory: A descriptor of the directory, for ``dir_fd``. :meth:`close` closes it.
    :attr name: The entry's name there. It was no symlink when it was looked at.
    :attr by_kernel: Whether the entry is one of procfs's links (``/proc/self/fd/1``), which lead to
        objects rather than to paths, and which only the kernel can follow.
    """

    def __init__(self, directory: int, name: bytes, by_kernel: bool = False) -> None:
        self.directory = directory
        self.name = name
        self.by_kernel = by_kernel
        self._closed = False

    def state(self) -> Optional[os.stat_result]:
        """
        :return: What is there now (a symlink is not followed), None when there is nothing.
        """
        try:
            return os.stat(self.name, dir_fd=self.directory, follow_symlinks=self.by_kernel)
        except FileNotFoundError:
            return None

    def open(self, flags: int) -> int:
        """
        :return: A descriptor of what is there now. Never waits for a FIFO's other end or for a
            terminal's line, never follows a symlink.
        """
        flags |= os.O_NONBLOCK | os.O_NOCTTY
        if not self.by_kernel:
            flags |= os.O_NOFOLLOW
        return os.open(self.name, flags, dir_fd=self.directory)

    def close(self) -> None:
        """
        Lets go of the directory. More than once is fine.
        """
        if not self._closed:
            self._closed = True
            os.close(self.directory)


class _Link(NamedTuple):
    """
    A symlink: where it points, whose it is and what device it is on.
    """

    target: bytes
    owner: int
    device: int


class _Claim(NamedTuple):
    """
    Stands behind the steps of a link that its owner may change at any time: what those steps reach
    has to be that owner's.
    """

    owner: int
    link: bytes


def locate(path: AnyPath) -> Place:
    """
    Follows a path to the file it means, existing or not. Symlinks are followed, the last one too,
    except where that would let another user choose what this process writes to: a link that its
    owner (neither root nor this process's user) may change leads only to what is that owner's or is
    in a directory of that owner. Outside Linux a link is read by its name, so one that is swapped
    while it is looked at may escape this rule.

    :param path: Absolute, or relative to the working directory.
    :return: The place, which the caller closes.
    :raises FileNotFoundError: When a directory on the way does not exist, or the path is empty.
    :raises NotADirectoryError: When something on the way is no directory.
    :raises IsADirectoryError: When the path ends in ``/``, ``.`` or ``..``. An entry that is a
        directory is a place like any other.
    :raises PermissionError: When a directory on the way can't be searched, or a link is one that
        must not be followed.
    :raises OSError: ELOOP after too many links.
    :raises ValueError: When the path holds a NUL.
    """
    raw = encode(path)
    if b"\0" in raw:
        raise ValueError(f"The path {path!r} holds a NUL character")
    if not raw:
        raise FileNotFoundError(errno.ENOENT, "An empty path", path)
    if raw.endswith((b"/", b"/.")) or raw == b".":
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    try:
        walk = _Walk(path, raw)
        try:
            return walk.finish()
        except BaseException:
            os.close(walk.directory)
            raise
    except OSError as error:
        if error.filename == path:
            raise
        raise OSError(error.errno, error.strerror, path) from error


class _Walk:
    """
    The way from the root or the working directory to a place, one step at a time.
    """

    def __init__(self, path: AnyPath, raw: bytes) -> None:
        self.path = path
        self.directory = os.open(b"/" if raw.startswith(b"/") else b".", _DIRECTORY)
        self.ahead: List[Union[bytes, _Claim]] = _steps(raw)
        self.links = 0

    def finish(self) -> Place:
        """
        Takes all steps.
        """
        while self.ahead:
            step = self.ahead.pop()
            if isinstance(step, _Claim):
                self._check(step, os.fstat(self.directory).st_uid)
            elif any(not isinstance(later, _Claim) for later in self.ahead):
                self._enter(step)
            elif step != b"..":
                place = self._arrive(step)
                if place is not None:
                    return place
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self.path)

    def _enter(self, name: bytes) -> None:
        try:
            self._move(os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self.directory))
        except OSError as error:
            link = self._read_link(name) if error.errno in _MAYBE_A_LINK else None
            if link is None:
                text = f"{error.strerror} (its directory {os.fsdecode(name)!r})"
                raise OSError(error.errno, text, self.path) from error
            if _is_kernels(link):
                self._move(os.open(name, _DIRECTORY, dir_fd=self.directory))
            else:
                self._follow(name, link)

    def _arrive(self, name: bytes) -> Optional[Place]:
        """
        :return: The place, or None when the way goes on through a link.
        """
        link = self._read_link(name)
        if link is not None and not _is_kernels(link):
            self._follow(name, link)
            return None
        place = Place(self.directory, name, by_kernel=link is not None)
        state = place.state()
        owners = [os.fstat(self.directory).st_uid]
        if state is not None:
            owners.append(state.st_uid)
        for claim in self.ahead:
            # Only claims are ahead of the last step.
            assert isinstance(claim, _Claim)
            self._check(claim, *owners)
        return place

    def _follow(self, name: bytes, link: _Link) -> None:
        self.links += 1
        if self.links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), self.path)
        if not self._is_settled(link):
            self.ahead.append(_Claim(link.owner, name))
        self.ahead.extend(_steps(link.target))
        if link.target.startswith(b"/"):
            self._move(os.open(b"/", _DIRECTORY))

    def _is_settled(self, link: _Link) -> bool:
        """
        Whether only root and this process's user could have put the link there.
        """
        ours = (0, os.geteuid())
        directory = os.fstat(self.directory)
        return link.owner in ours or (
            directory.st_uid in ours and not directory.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        )

    def _check(self, claim: _Claim, *owners: int) -> None:
        if claim.owner not in owners:
            text = (
                f"Not followed: the symlink {os.fsdecode(claim.link)!r} on the way belongs to user"
                f" {claim.owner}, who may change it, and leads to what belongs to user"
                f" {owners[-1]}. Use the path it leads to, or give the link to root (chown -h)"
            )
            raise PermissionError(errno.EACCES, text, self.path)

    def _read_link(self, name: bytes) -> Optional[_Link]:
        """
        :return: The symlink of that name, None when there is nothing or something else.
        """
        try:
            state, target = self._read_state(name)
        except FileNotFoundError:
            return None
        if target is None:
            return None
        return _Link(target, state.st_uid, state.st_dev)

    def _read_state(self, name: bytes) -> Tuple[os.stat_result, Optional[bytes]]:
        if not _O_PATH:
            state = os.stat(name, dir_fd=self.directory, follow_symlinks=False)
            is_link = stat.S_ISLNK(state.st_mode)
            return state, os.readlink(name, dir_fd=self.directory) if is_link else None
        # The link itself is held open, so its owner and its target are those of one link.
        entry = os.open(name, _O_PATH | os.O_NOFOLLOW, dir_fd=self.directory)
        try:
            state = os.fstat(entry)
            is_link = stat.S_ISLNK(state.st_mode)
            return state, os.readlink(b"", dir_fd=entry) if is_link else None
        finally:
            os.close(entry)

    def _move(self, directory: int) -> None:
        os.close(self.directory)
        self.directory = directory


def _steps(path: bytes) -> List[Union[bytes, _Claim]]:
    """
    :return: The steps of a path, the first one last, to be popped.
    """
    return [step for step in reversed(path.split(b"/")) if step not in (b"", b".")]


def _is_kernels(link: _Link) -> bool:
    """
    Whether the link is procfs's own. Nobody can plant one there, and its text need be no path.
    """
    try:
        return link.device == os.stat("/proc/self").st_dev
    except OSError:
        return False
