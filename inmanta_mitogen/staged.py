"""
A file's new content, kept apart until it is complete.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import re
import stat
import struct
import sys
import time
from typing import IO, Iterator, List, Optional, Tuple, Type, Union

from inmanta_mitogen.names import AnyPath
from inmanta_mitogen.paths import Place, locate

_BLOCK = 1 << 20

#: A content that has no file to wait in is kept in memory up to this size, in bytes.
_IN_MEMORY = 16 << 20

#: How long to wait for others who write the same file in place, in seconds.
_LOCK_PATIENCE = 10.0

#: How many entries of a directory are searched for what dead writers left.
_SWEEP_LIMIT = 10_000

_PREFIX = ".inmanta-put-"
_ABANDONED = re.compile(re.escape(_PREFIX) + "[0-9a-f]{32}")

# With these the file can't be written in another way either.
_FATAL = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
)

_ACL = "system.posix_acl_access"
_DEFAULT_ACL = "system.posix_acl_default"

# Signatures over the content. IMA refuses to open a file whose signature is another content's.
_OF_THE_CONTENT = ("security.ima", "security.evm")

Buffer = Union[bytes, bytearray, memoryview]


def as_bytes(content: object) -> memoryview:
    """
    :return: The bytes of anything with the buffer protocol.
    :raises TypeError: When it is text, or no bytes at all.
    """
    if isinstance(content, str):
        raise TypeError("The content must be bytes, not str: encode it first, text.encode()")
    try:
        view = memoryview(content)  # type: ignore[arg-type]  # this finds out
    except TypeError:
        kind = type(content).__name__
        raise TypeError(f"The content must be bytes, not {kind}") from None
    return view.cast("B") if view.c_contiguous else memoryview(view.tobytes())


class StagedWrite:
    """
    Collects a file's new content, and puts it in its place as a whole or not at all.
    :func:`inmanta_mitogen.files.put` says what is kept and what is promised::

        with StagedWrite("/etc/motd") as staged:
            for chunk in chunks:
                staged.write(chunk)
            staged.commit()

    Leaving the ``with`` block without :meth:`commit`, by an exception or otherwise, leaves the old
    file as it was.

    :param path: The file. Where it leads to is settled here, once.
    :attr size: How many bytes were written so far.
    :raises OSError: As :func:`inmanta_mitogen.files.put`, as far as it can be known beforehand.
    """

    def __init__(self, path: AnyPath) -> None:
        self.path = path
        self.size = 0
        self._stage: Union[_Beside, _Apart, None] = None
        self._place = locate(path)
        try:
            with self._naming():
                self._stage = self._open_stage()
        except BaseException:
            self.abort()
            raise

    def write(self, chunk: Buffer) -> None:
        """
        Adds to the content. The file itself does not change yet.

        :raises OSError: When there is no room for it. The old file is untouched.
        :raises ValueError: After :meth:`commit` or :meth:`abort`.
        """
        view = as_bytes(chunk)
        with self._naming("the old content, if any, is untouched"):
            self._open().write(view)
        self.size += len(view)

    def commit(self) -> None:
        """
        Makes what was written the file's content.

        :raises OSError: When that fails. Unless the text says otherwise, the file is untouched.
        :raises ValueError: After :meth:`commit` or :meth:`abort`.
        """
        stage = self._open()
        try:
            with self._naming():
                if isinstance(stage, _Apart) or not stage.publish():
                    _write_in_place(self._place, stage, self.size)
        finally:
            self.abort()

    def abort(self) -> None:
        """
        Forgets what was written and not committed. Can be called any number of times, at any time.
        """
        stage, self._stage = self._stage, None
        try:
            if stage is not None:
                stage.close()
        finally:
            self._place.close()

    def __enter__(self) -> "StagedWrite":
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], *_: object) -> None:
        self.abort()

    def _open(self) -> "Union[_Beside, _Apart]":
        if self._stage is None:
            raise ValueError(f"The write to {self.path!r} has ended already")
        return self._stage

    def _open_stage(self) -> "Union[_Beside, _Apart]":
        state = self._place.state()
        if state is None:
            return _Beside(self._place)
        if stat.S_ISDIR(state.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if self._place.by_kernel or not stat.S_ISREG(state.st_mode):
            return _Apart()
        try:
            return _Beside(self._place)
        except OSError as error:
            if error.errno in _FATAL:
                raise
        # Better now than after the content's whole way to this host.
        os.close(self._place.open(os.O_WRONLY))
        return _Apart()

    @contextlib.contextmanager
    def _naming(self, comfort: str = "") -> Iterator[None]:
        """
        Makes errors name the path that was given, not the one of a temporary file.
        """
        try:
            yield
        except OSError as error:
            text = error.strerror or str(error)
            if comfort:
                text = f"{text} ({comfort})"
            raise OSError(error.errno or errno.EIO, text, self.path) from error


class _Beside:
    """
    A content in a private file of the target's own directory, without a name where the file system
    can do that.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._directory = place.directory
        self._name: Optional[bytes] = None
        _remove_abandoned(self._directory)
        unnamed = _open_unnamed(self._directory)
        if unnamed is None:
            self._file, self._name = _open_named(self._directory)
        else:
            self._file = unnamed

    def write(self, view: memoryview) -> None:
        """
        Adds to the content.
        """
        _write_all(self._file, view)

    def blocks(self, start: int = 0, end: Optional[int] = None) -> Iterator[bytes]:
        """
        The content from one offset to another, as far as there is some.
        """
        position = start
        while end is None or position < end:
            size = _BLOCK if end is None else min(_BLOCK, end - position)
            block = os.pread(self._file, size, position)
            if not block:
                return
            position += len(block)
            yield block

    def publish(self) -> bool:
        """
        Gives the content the target's name.

        :return: Whether that was possible; the target is untouched where it was not.
        :raises OSError: When no other way would succeed either.
        """
        state = self._place.state()
        if state is not None and stat.S_ISDIR(state.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        # A symlink that appeared since the path was resolved is not followed, but replaced.
        old = state is not None and stat.S_ISREG(state.st_mode)
        try:
            self._dress(old)
            if self._name is None and not self._take_name(state is None):
                self._move_to_named()
                self._dress(old)
            if self._name is not None:
                directory = self._directory
                name = self._place.name
                os.replace(self._name, name, src_dir_fd=directory, dst_dir_fd=directory)
                self._name = None
        except OSError as error:
            if not old or error.errno in _FATAL:
                raise
            return False
        return True

    def _dress(self, old: bool) -> None:
        """
        Gives the file the owner, mode and extended attributes it is to have, and gets it to disk.
        """
        source: Optional[int] = None
        if old:
            # Someone may have removed it by now.
            with contextlib.suppress(FileNotFoundError):
                source = self._place.open(os.O_RDONLY)
        if source is None:
            _set_new_mode(self._file, self._directory)
        else:
            try:
                _copy_attributes(source, self._file)
            finally:
                os.close(source)
        _flush(self._file)

    def _take_name(self, may_be_final: bool) -> bool:
        """
        Gives the unnamed file a name: the final one, if nothing has it, else one that is to be
        renamed.

        :return: Whether the system allowed it.
        """
        source = f"/proc/self/fd/{self._file}"
        if may_be_final:
            try:
                os.link(source, self._place.name, dst_dir_fd=self._directory)
                return True
            except FileExistsError:
                pass
            except OSError:
                return False
        name = _new_name()
        try:
            os.link(source, name, dst_dir_fd=self._directory)
        except OSError:
            return False
        self._name = name
        return True

    def _move_to_named(self) -> None:
        """
        Copies the content to a file that has a name, where unnamed ones may not be given one.
        """
        unnamed = self._file
        self._file, self._name = _open_named(self._directory)
        try:
            position = 0
            while True:
                block = os.pread(unnamed, _BLOCK, position)
                if not block:
                    return
                _write_all(self._file, memoryview(block))
                position += len(block)
        finally:
            os.close(unnamed)

    def close(self) -> None:
        """
        Removes what was not published.
        """
        try:
            if self._name is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._name, dir_fd=self._directory)
        finally:
            os.close(self._file)


class _Apart:
    """
    A content in memory, or in an unnamed file of the temporary directory when it is large.
    """

    def __init__(self) -> None:
        # Imported when needed, which is seldom, as it takes longer than all the rest.
        import tempfile

        # It is closed by close().
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115

    def write(self, view: memoryview) -> None:
        """
        Adds to the content.
        """
        try:
            self._file.write(view)
        except OSError as error:
            text = f"{error.strerror} in the temporary directory, where the content waits"
            raise OSError(error.errno, text) from error

    def blocks(self, start: int = 0, end: Optional[int] = None) -> Iterator[bytes]:
        """
        The content from one offset to another, as far as there is some.
        """
        position = start
        while end is None or position < end:
            self._file.seek(position)
            block = self._file.read(_BLOCK if end is None else min(_BLOCK, end - position))
            if not block:
                return
            position += len(block)
            yield block

    def close(self) -> None:
        """
        Forgets the content.
        """
        self._file.close()


# Temporary files


def _new_name() -> bytes:
    return os.fsencode(_PREFIX + os.urandom(16).hex())


def _open_unnamed(directory: int) -> Optional[int]:
    """
    :return: A file without a name in the directory, None where that can't be had.
    """
    flag: Optional[int] = getattr(os, "O_TMPFILE", None)
    if flag is None:
        return None
    try:
        file = os.open(b".", flag | os.O_RDWR, 0o600, dir_fd=directory)
    except OSError as error:
        if error.errno in _FATAL:
            raise
        return None
    try:
        # The only way to a name leads through procfs, which a chroot may lack.
        os.stat(f"/proc/self/fd/{file}")
        _try_lock(file)
        return file
    except OSError:
        os.close(file)
        return None


def _open_named(directory: int) -> Tuple[int, bytes]:
    """
    :return: A file of our own in the directory, and its name.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    while True:
        name = _new_name()
        file = os.open(name, flags, 0o600, dir_fd=directory)
        _try_lock(file)
        # Between its creation and its lock someone may have taken it for a dead writer's.
        if os.fstat(file).st_nlink:
            return file, name
        os.close(file)


def _remove_abandoned(directory: int) -> None:
    """
    Removes temporary files whose writers are dead. A living one holds a lock, which the kernel lets
    go of when its process ends, however that ends.
    """
    try:
        listing = os.open(b".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
    except OSError:
        return
    try:
        for name in _names(listing):
            if _ABANDONED.fullmatch(name):
                with contextlib.suppress(OSError):
                    _remove_if_abandoned(directory, os.fsencode(name))
    finally:
        os.close(listing)


def _names(directory: int) -> List[str]:
    # Since Python 3.7.
    if os.scandir in os.supports_fd:
        with os.scandir(directory) as entries:
            return [entry.name for entry in itertools.islice(entries, _SWEEP_LIMIT)]
    return os.listdir(directory)


def _remove_if_abandoned(directory: int, name: bytes) -> None:
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    try:
        state = os.fstat(file)
        owned = os.geteuid() in (0, state.st_uid)
        if owned and stat.S_ISREG(state.st_mode) and _try_lock(file):
            os.unlink(name, dir_fd=directory)
    finally:
        os.close(file)


def _try_lock(file: int) -> bool:
    """
    :return: Whether this open file has the lock now. Some file systems have none.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


# Owner, mode, extended attributes


def _copy_attributes(source: int, target: int) -> None:
    """
    Makes one open file's owner, mode and extended attributes those of another.

    :raises OSError: When this user may not, or the file system can't.
    """
    state = os.fstat(source)
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    before = os.fstat(target)
    # In this order: a change of owner takes set-user-ID and capabilities away.
    if (before.st_uid, before.st_gid) != (state.st_uid, state.st_gid):
        os.fchown(target, state.st_uid, state.st_gid)
    # Where it is right already, it may be the only one that the file system knows (vfat).
    if os.fstat(target).st_mode != state.st_mode:
        os.fchmod(target, stat.S_IMODE(state.st_mode))
    _copy_xattrs(source, target)
    after = os.fstat(target)
    # The kernel leaves out a set-group-ID that this user may not give, without a word.
    if (after.st_uid, after.st_gid, after.st_mode) != (state.st_uid, state.st_gid, state.st_mode):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def _copy_xattrs(source: int, target: int) -> None:
    if sys.platform != "linux" or not hasattr(os, "listxattr"):
        return
    wanted = [name for name in _list_xattrs(source) if name not in _OF_THE_CONTENT]
    present = _list_xattrs(target)
    for name in present:
        # A default ACL gave the new file what the old one does not have. Labels can't be removed.
        if name not in wanted and not name.startswith("security."):
            os.removexattr(target, name)
    for name in wanted:
        value = os.getxattr(source, name)
        if name not in present or os.getxattr(target, name) != value:
            os.setxattr(target, name, value)


def _list_xattrs(file: int) -> List[str]:
    if sys.platform != "linux":
        return []
    try:
        return os.listxattr(file)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENOSYS):
            return []
        raise


def _set_new_mode(file: int, directory: int) -> None:
    """
    Gives a file the mode that open(2) would have given it with 0666 in that directory.
    """
    acl = _default_acl(directory)
    if acl is not None and sys.platform == "linux":
        os.setxattr(file, _ACL, _acl_of_new_file(acl))
    else:
        # Where the file system has no modes, the file has got the one that all files have there.
        with contextlib.suppress(PermissionError):
            os.fchmod(file, 0o666 & ~_umask())


def _default_acl(directory: int) -> Optional[bytes]:
    if sys.platform != "linux" or not hasattr(os, "getxattr"):
        return None
    # Descriptors opened with O_PATH have no attributes themselves.
    with contextlib.suppress(OSError):
        return os.getxattr(f"/proc/self/fd/{directory}", _DEFAULT_ACL)
    with contextlib.suppress(OSError):
        readable = os.open(b".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
        try:
            return os.getxattr(readable, _DEFAULT_ACL)
        finally:
            os.close(readable)
    return None


def _acl_of_new_file(acl: bytes) -> bytes:
    """
    What the kernel makes of a directory's default ACL for a file created with 0666, acl(5): the
    entries that correspond to the mode keep no more than read and write.

    :param acl: As in the attribute: a version, then tag, permissions and id of each entry, all
        little-endian (linux/posix_acl_xattr.h).
    """
    owner, group, mask, other = 0x01, 0x04, 0x10, 0x20
    entries = list(struct.iter_unpack("<HHI", acl[4:]))
    has_mask = any(tag == mask for tag, _, _ in entries)
    limited = (owner, other, mask if has_mask else group)
    return acl[:4] + b"".join(
        struct.pack("<HHI", tag, permissions & 6 if tag in limited else permissions, qualifier)
        for tag, permissions, qualifier in entries
    )


def _umask() -> int:
    with contextlib.suppress(OSError), open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"Umask:"):
                return int(line.split()[1], 8)
    # It can only be read by setting it, for all threads of the process. What another one creates
    # meanwhile is at least private.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


# Writing


def _write_all(file: int, view: memoryview, offset: Optional[int] = None) -> None:
    while view:
        if offset is None:
            done = os.write(file, view)
        else:
            done = os.pwrite(file, view, offset)
            offset += done
        view = view[done:]


def _flush(file: int) -> None:
    """
    Gets what was written to the disk. Some file systems find out only here that it is full, and
    after a power failure a file that was renamed but never flushed may be empty.
    """
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS, errno.ENOSYS):
            raise


def _write_in_place(place: Place, stage: Union[_Beside, _Apart], size: int) -> None:
    try:
        file = place.open(os.O_WRONLY)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        text = "Nobody reads from this FIFO, or nothing is behind this device or socket"
        raise OSError(errno.ENXIO, text) from error
    try:
        os.set_blocking(file, True)
        state = os.fstat(file)
        if not stat.S_ISREG(state.st_mode):
            for block in stage.blocks():
                _write_all(file, memoryview(block))
            if stat.S_ISBLK(state.st_mode):
                _flush(file)
        elif os.fstatvfs(file).f_blocks:
            _wait_for_lock(file)
            _overwrite(place, file, stage, size)
        else:
            # /proc, /sys and their like: no storage, and a value is taken from a single write.
            os.ftruncate(file, 0)
            _write_all(file, memoryview(b"".join(stage.blocks())))
    finally:
        os.close(file)


def _overwrite(place: Place, file: int, stage: Union[_Beside, _Apart], size: int) -> None:
    """
    Writes to a regular file what fails first: what lies beyond its end.
    """
    old_size = os.fstat(file).st_size
    with contextlib.ExitStack() as stack:
        backup = _back_up(place, old_size)
        if backup is not None:
            stack.callback(backup.close)
        try:
            _copy(stage, file, old_size, size)
            _flush(file)
        except BaseException:
            os.ftruncate(file, old_size)
            raise
        try:
            _copy(stage, file, 0, min(size, old_size))
            os.ftruncate(file, size)
            _flush(file)
        except BaseException as error:
            _restore(file, backup, old_size, error)
            raise


def _copy(stage: Union[_Beside, _Apart], file: int, start: int, end: int) -> None:
    for block in stage.blocks(start, end):
        _write_all(file, memoryview(block), start)
        start += len(block)


def _back_up(place: Place, size: int) -> Optional[_Apart]:
    """
    :return: The old content, None when this user may write but not read it.
    """
    try:
        file = place.open(os.O_RDONLY)
    except PermissionError:
        return None
    backup = _Apart()
    try:
        position = 0
        while position < size:
            block = os.pread(file, _BLOCK, position)
            if not block:
                break
            backup.write(memoryview(block))
            position += len(block)
        return backup
    except BaseException:
        backup.close()
        raise
    finally:
        os.close(file)


def _restore(file: int, backup: Optional[_Apart], size: int, cause: BaseException) -> None:
    try:
        if backup is None:
            raise PermissionError(errno.EACCES, "this user may not read the file")
        _copy(backup, file, 0, size)
        os.ftruncate(file, size)
        _flush(file)
    except OSError as error:
        text = "{}; its old content is lost, as it could not be put back: {}".format(
            getattr(cause, "strerror", None) or cause, error.strerror
        )
        raise OSError(getattr(cause, "errno", None) or errno.EIO, text) from cause


def _wait_for_lock(file: int) -> None:
    """
    Waits for its turn, but not for ever: someone else may hold a lock on the file for a reason of
    their own.
    """
    deadline = time.monotonic() + _LOCK_PATIENCE
    while not _try_lock(file) and time.monotonic() < deadline:
        time.sleep(0.01)
