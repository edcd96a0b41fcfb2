"""
Give a file a new content, as a whole or not at all.

What a host needs only where a file can't be replaced is in :mod:`inmanta_mitogen.in_place`, so that
most hosts never compile it.
"""

import contextlib
import errno
import fcntl
import os
import stat
import sys
from typing import IO, Dict, Iterator, NamedTuple, Optional, Set, Tuple, Union

from inmanta_mitogen.names import AnyPath, encode

_PREFIX = ".inmanta-put-"
"""The name of a temporary file is this and 32 hexadecimal digits."""

_searched: Set[Tuple[int, int]] = set()
"""The directories that were searched, by device and inode."""

IN_MEMORY = 16 << 20
"""The size, in bytes, up to which the new and the old content of a file that is written in place
are kept in memory."""

# O_PATH needs the permission to search the directory only, and is not known outside Linux.
_DIRECTORY: int = os.O_DIRECTORY | getattr(os, "O_PATH", 0)

# FS_IOC_GETFLAGS and FS_APPEND_FL of linux/fs.h.
_GET_FLAGS = 0x80086601 if sys.maxsize >> 32 else 0x80046601
_APPEND_ONLY = 0x20

# Signatures of the content. IMA refuses to open a file with the signature of another content.
_SIGNATURES = ("security.ima", "security.evm")

Buffer = Union[bytes, bytearray, memoryview]


def as_bytes(content: object) -> memoryview:
    """
    Return the bytes of anything with the buffer protocol.

    :raises TypeError: It is text, or does not hold bytes.
    """
    return memoryview(content).cast("B")  # type: ignore[arg-type]  # this finds out


def put(path: AnyPath, content: bytes, *, in_place: bool = False) -> None:
    """
    Make ``content`` the whole content of a file.

    Either it is complete or what was there is untouched: the content goes to a private temporary
    file in the same directory, to the disk, and then takes the old file's place in one step. That
    holds for a full disk, a spent quota, this process being killed and the machine losing power
    (then the old or the new content is there, whole). Of several puts of one path at once, one's
    content is there at the end, whole.

    - An existing file keeps its owner, mode and extended attributes, so its ACL and its SELinux
      label too, except for IMA and EVM signatures, which are made for the content. It is
      a new inode: other hard links keep the old content, a process that has the file open goes on
      with the old one, and file attributes (``chattr``) are the directory's. The owner of a
      read-only file can put it, too.
    - A new file has the mode that the umask, or the directory's default ACL, gives.
    - A symlink stays, and its target is written, existing or not. As with the kernel's
      ``fs.protected_symlinks``, whatever that is set to: in a directory where everyone may create
      files and the sticky bit is set (``/tmp``), only links of the calling user and of the
      directory's owner are followed, and no links below what belongs to anybody else.
    - No temporary file is left, except by a process that was killed. It is removed at the first
      put of a later process into that directory, by its name (``.inmanta-put-`` and 32 hexadecimal
      digits) and as nobody holds its lock.

    What can't be replaced is **written in place**: devices and FIFOs, entries of /proc and /sys,
    bind-mounted files, files where the directory may not be written to, is sticky or append-only,
    file systems that can't rename or have no room for a second file, and files whose owner, mode or
    extended attributes this user may not give to another file. The content is then complete on this
    host before the first byte is written, in memory up to 16 MiB, else in the temporary directory.
    A regular file grows to its new size first, with its old content untouched, and gets its old
    content back after an error if that has at most 16 MiB, so a full disk does no harm there
    either. But being killed, losing power, or two puts of the file at once leave a mixture, and
    others can see it half-written.

    Outside Linux, extended attributes and ACLs are not kept.

    :param path: The file. Its directory must exist.
    :param content: Bytes, or something with the buffer protocol (bytearray, memoryview).
    :param in_place: Whether an existing file is written in place although it could be replaced, for
        a file that is mounted elsewhere, or that a process keeps open. By default it is replaced.
    :raises TypeError: ``content`` is text. Nothing was touched.
    :raises IsADirectoryError: The path is a directory.
    :raises FileNotFoundError: Its directory does not exist.
    :raises PermissionError: This user may neither replace nor write it, or a symlink on the way is
        not to be trusted.
    :raises OSError: It can't be written: ENOSPC, EDQUOT, ENXIO for a FIFO that nobody reads.
    """
    with StagedWrite(path, in_place=in_place) as staged:
        staged.write(content)
        staged.commit()


class StagedWrite:
    """
    Collect a file's new content, and put it in place as a whole or not at all.
    :func:`put` says what is kept and what is promised::

        with StagedWrite("/etc/motd") as staged:
            for chunk in chunks:
                staged.write(chunk)
            staged.commit()

    Leaving the ``with`` block without :meth:`commit` leaves the old file as it was.

    :param path: The file. Where it leads to is settled here, once.
    :param in_place: Whether a file that exists keeps its inode.
    :raises OSError: As :func:`put`, as far as it can be known beforehand.
    """

    def __init__(self, path: AnyPath, *, in_place: bool = False) -> None:
        self.path = path
        self.size = 0
        """How many bytes were written so far."""
        # The name and the final mode of the temporary file beside the target, if there is one.
        self._temporary: Optional[str] = None
        with contextlib.ExitStack() as self._stack, self._naming():
            self._target = _locate(encode(path), self._stack)
            self._stack.callback(self._remove_temporary)
            self._file = self._open_stage(in_place)
            self._stack = self._stack.pop_all()

    def write(self, chunk: Buffer) -> None:
        """
        Add to the content. The file itself does not change yet.

        :raises OSError: There is no room for it. The old file is untouched.
        :raises ValueError: After :meth:`commit`.
        """
        view = as_bytes(chunk)
        with self._naming():
            try:
                write_all(self._file, view)
            except OSError:
                if self._temporary is None or self._target.state() is None:
                    raise
                # There may be room for one content, though not for two.
                self._move_to_spool()
                write_all(self._file, view)
        self.size += len(view)

    def commit(self) -> None:
        """
        Make what was written the file's content.

        :raises OSError: That failed. Unless the text says otherwise, the file is untouched.
        :raises ValueError: After :meth:`commit`.
        """
        self._file.flush()
        try:
            with self._naming():
                if self._temporary is None or not self._replace(self._temporary):
                    from inmanta_mitogen.in_place import write_in_place

                    write_in_place(self._target, self._file)
        finally:
            self._stack.close()

    def __enter__(self) -> "StagedWrite":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Make errors name the path that was given, not the one of a temporary file."""
        try:
            yield
        except OSError as error:
            text = error.strerror or str(error)
            raise OSError(error.errno or errno.EIO, text, self.path) from error

    # Where the content waits

    def _open_stage(self, in_place: bool) -> IO[bytes]:
        state = self._target.state()
        if state is not None and stat.S_ISDIR(state.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        regular = state is not None and stat.S_ISREG(state.st_mode)
        if state is None or (regular and not in_place):
            try:
                if _may_rename_in(self._target.directory):
                    return self._open_temporary(is_new=state is None)
            except OSError:
                if state is None:
                    raise
        if regular:
            # Fail now rather than after the whole content has come to this host.
            os.close(self._target.open(os.O_WRONLY))
        return self._open_spool()

    def _open_temporary(self, is_new: bool) -> IO[bytes]:
        name = _PREFIX + os.urandom(16).hex()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        # The umask and the directory's default ACL decide about a new file's mode.
        number = os.open(name, flags, 0o666 if is_new else 0o600, dir_fd=self._target.directory)
        self._temporary = name
        file = self._stack.enter_context(open(number, "r+b", buffering=0))  # noqa: SIM115
        self._mode = stat.S_IMODE(os.fstat(number).st_mode)
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_new:
            _set_mode(number, 0o600)
        return file

    def _open_spool(self) -> IO[bytes]:
        # Imported when needed, which is seldom, as it takes longer than all the rest.
        import tempfile

        return self._stack.enter_context(tempfile.SpooledTemporaryFile(IN_MEMORY))

    def _move_to_spool(self) -> None:
        from inmanta_mitogen.in_place import copy

        with self._file as source:
            # What was not written whole is written again.
            source.truncate(self.size)
            self._file = self._open_spool()
            copy(source, self._file)
        self._remove_temporary()

    def _remove_temporary(self) -> None:
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary, dir_fd=self._target.directory)
            self._temporary = None

    # How it becomes the file's content

    def _replace(self, name: str) -> bool:
        """
        Give the temporary file the target's name.

        :return: Whether that was possible. The target is untouched where it was not.
        """
        target, file = self._target, self._file.fileno()
        try:
            state = target.state()
            # A symlink that appeared meanwhile is replaced, and not followed.
            if state is not None and stat.S_ISREG(state.st_mode):
                with open(target.open(os.O_RDONLY), "rb", buffering=0) as old:
                    _copy_attributes(old.fileno(), file)
            else:
                _set_mode(file, self._mode)
        except OSError:
            return False
        flush(file)
        try:
            os.replace(name, target.name, src_dir_fd=target.directory, dst_dir_fd=target.directory)
        except OSError:
            return False
        self._temporary = None
        return True


# Where a path leads to


class Target(NamedTuple):
    """An entry of an open directory, so that it stays the same whatever happens to the path."""

    directory: int
    name: bytes

    def state(self) -> Optional[os.stat_result]:
        """Return what is there now, None when there is nothing. Symlinks are not followed."""
        try:
            return os.stat(self.name, dir_fd=self.directory, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def open(self, flags: int) -> int:
        """Open what is there now, without following a symlink or waiting for a FIFO."""
        flags |= os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW
        return os.open(self.name, flags, 0o666, dir_fd=self.directory)


def _locate(path: bytes, stack: contextlib.ExitStack) -> Target:
    """Follow the symlinks of a path once, and hold the directory that it leads to."""
    # The kernel refuses what can't be followed, such as a loop.
    with contextlib.suppress(FileNotFoundError):
        os.stat(path)
    if path.endswith(b"/"):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    real = os.path.realpath(path)
    parent, name = os.path.split(real)
    directory = -1
    for step in parent.split(b"/"):
        # In front of the first slash is nothing.
        directory = os.open(step or b"/", _DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
        stack.callback(os.close, directory)
    full = os.path.join(os.getcwdb(), path)
    if os.path.normpath(full) != real:
        _check_links(full, real)
    return Target(directory, name)


def _check_links(path: bytes, real: bytes) -> None:
    """
    Refuse a path that follows a symlink of another user in a directory where everyone may create
    one, as the kernel does where ``fs.protected_symlinks`` is set.

    Whoever owns an entry there can replace it at any time. So what counts is not what it is now,
    but whether the resolved path goes through it.
    """
    parent, name = os.path.split(path)
    if parent == path:
        return
    _check_links(parent, real)
    parent = os.path.realpath(parent)
    entry = os.path.join(parent, name)
    owner = os.lstat(entry).st_uid if os.path.lexists(entry) else None
    directory = os.stat(parent)
    shared = stat.S_ISVTX | stat.S_IWOTH
    if directory.st_mode & shared == shared and owner not in (os.geteuid(), directory.st_uid):
        if not (real + b"/").startswith(entry + b"/"):
            text = f"a symlink that another user made in a shared directory, {os.fsdecode(name)!r}"
            raise PermissionError(errno.EACCES, f"Not followed: {text} or below")
    elif os.path.islink(entry):
        target = os.path.join(parent, os.readlink(entry))
        if os.path.exists(entry) and not os.path.samefile(entry, target):
            # As /proc/PID/root: it leads to an object, and not to the path that it shows.
            raise OSError(errno.ENOTSUP, f"{os.fsdecode(name)!r} can't be followed by its path")
        _check_links(target, real)


# Temporary files


def _may_rename_in(directory: int) -> bool:
    """
    Return whether files of the directory can be renamed, as far as it can be known. Remove what
    killed processes left there, when this is the first time.
    """
    try:
        listing = os.open(b".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
    except OSError:
        return True
    try:
        _remove_abandoned(listing)
        # In an append-only directory (chattr +a), a temporary file could not even be removed.
        with contextlib.suppress(OSError):
            flags = fcntl.ioctl(listing, _GET_FLAGS, bytes(8))
            return not int.from_bytes(flags[:4], sys.byteorder) & _APPEND_ONLY
        return True
    finally:
        os.close(listing)


def _remove_abandoned(directory: int) -> None:
    """
    Remove the temporary files of killed processes. The others have a lock, which the kernel takes
    away when a process ends, however that ends.
    """
    state = os.fstat(directory)
    identity = (state.st_dev, state.st_ino)
    if identity in _searched:
        return
    _searched.add(identity)
    for name in os.listdir(directory):
        if name.startswith(_PREFIX) and len(name) == len(_PREFIX) + 32:
            with contextlib.suppress(OSError):
                flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK
                with open(os.open(name, flags, dir_fd=directory), "wb", buffering=0) as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(name, dir_fd=directory)


# Owner, mode, extended attributes


def _set_mode(file: int, mode: int) -> None:
    # Where the file system has no modes, the file has the one that all files have there.
    with contextlib.suppress(PermissionError):
        os.fchmod(file, mode)


def _copy_attributes(source: int, target: int) -> None:
    """
    Copy the owner, the mode and the extended attributes from one open file to another.

    :raises OSError: This user may not do it, the file system can't.
    """
    wanted = os.fstat(source)
    # In this order: a change of owner takes set-user-ID and capabilities away.
    state = os.fstat(target)
    if (state.st_uid, state.st_gid) != (wanted.st_uid, wanted.st_gid):
        os.fchown(target, wanted.st_uid, wanted.st_gid)
    # Where it is right already, it may be the only one that the file system knows (vfat).
    if os.fstat(target).st_mode != wanted.st_mode:
        os.fchmod(target, stat.S_IMODE(wanted.st_mode))
    if sys.platform == "linux" and hasattr(os, "listxattr"):
        _copy_xattrs(source, target)


def _copy_xattrs(source: int, target: int) -> None:
    wanted = _read_xattrs(source)
    present = _read_xattrs(target)
    for name in present.keys() - wanted.keys():
        # A default ACL, which the old file does not have. Labels can't be removed.
        if not name.startswith("security."):
            os.removexattr(target, name)
    for name, value in wanted.items():
        if name not in _SIGNATURES and present.get(name) != value:
            os.setxattr(target, name, value)


def _read_xattrs(file: int) -> Dict[str, bytes]:
    try:
        return {name: os.getxattr(file, name) for name in os.listxattr(file)}
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENOSYS):
            return {}
        raise


# Writing


def flush(file: int) -> None:
    """
    Write to the disk. Some file systems find out only here that they are full, and some can't.
    """
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def write_all(file: IO[bytes], view: memoryview) -> None:
    """Write all of the content to where the file is at."""
    while view:
        view = view[file.write(view) :]
