"""
Write a file in place: one that can't be replaced, or that has to keep its inode.
"""

import contextlib
import errno
import os
import stat
import time
from typing import IO, Optional

from inmanta_mitogen.staged import Target, flush, try_lock, write_all

_BLOCK = 1 << 20

#: The size, in bytes, up to which the new and the old content are kept in memory.
_IN_MEMORY = 16 << 20

#: How many seconds to wait for others who write the same file in place.
_LOCK_TIMEOUT = 10.0


def open_spool() -> IO[bytes]:
    """
    Open a file in memory that moves to the temporary directory when it is large.
    """
    # Imported when needed, which is seldom, as it takes longer than all the rest.
    import tempfile

    return tempfile.SpooledTemporaryFile(_IN_MEMORY)


def write_in_place(target: Target, source: IO[bytes], size: int) -> None:
    """
    Write a complete content to a file, which is created where it does not exist.

    :param target: The file.
    :param source: The content.
    :param size: How many bytes it has.
    :raises OSError: That failed. Unless the text says that the old content is lost, a regular file
        has it.
    """
    is_new = target.state() is None
    try:
        opened = target.open(os.O_WRONLY | (os.O_CREAT | os.O_EXCL if is_new else 0))
    except OSError as error:
        if error.errno == errno.ENXIO:
            error.strerror = "Nobody reads from this FIFO, or nothing is behind this device"
        raise
    with open(opened, "wb", buffering=0) as file:
        try:
            os.set_blocking(opened, True)
            mode = os.fstat(opened).st_mode
            if stat.S_ISREG(mode) and os.fstatvfs(opened).f_blocks:
                _overwrite(target, source, size, file)
                return
            # /proc, /sys and their like hold no blocks, and take a value from a single write.
            if stat.S_ISREG(mode):
                file.truncate(0)
            copy(source, file, 0, size)
            if stat.S_ISBLK(mode):
                flush(file)
        except BaseException:
            if is_new:
                with contextlib.suppress(OSError):
                    os.unlink(target.name, dir_fd=target.directory)
            raise


def _overwrite(target: Target, source: IO[bytes], size: int, file: IO[bytes]) -> None:
    _wait_for_lock(file.fileno())
    old_size = os.fstat(file.fileno()).st_size
    old = _read_old(target, old_size)
    has_old = True
    try:
        # What may find no room comes first, behind the old content.
        file.seek(old_size)
        copy(source, file, old_size, size)
        flush(file)
        has_old = False
        file.seek(0)
        copy(source, file, 0, min(size, old_size))
        file.truncate(size)
        flush(file)
    except BaseException as error:
        with contextlib.suppress(OSError):
            if not has_old and old is not None:
                file.seek(0)
                write_all(file, memoryview(old))
                has_old = True
            file.truncate(old_size)
        if not has_old:
            number = getattr(error, "errno", None) or errno.EIO
            raise OSError(number, f"{error}; the old content is lost") from error
        raise


def _wait_for_lock(file: int) -> None:
    # Not for ever: someone else may hold a lock on the file for a reason of their own.
    deadline = time.monotonic() + _LOCK_TIMEOUT
    while not try_lock(file) and time.monotonic() < deadline:
        time.sleep(0.01)


def _read_old(target: Target, size: int) -> Optional[bytes]:
    """Return the old content, None where it is large or this user may not read it."""
    if size > _IN_MEMORY:
        return None
    try:
        with open(target.open(os.O_RDONLY), "rb") as file:
            return file.read()
    except PermissionError:
        return None


def copy(source: IO[bytes], target: IO[bytes], start: int, end: int) -> None:
    """
    Write a part of one file to where another one is at.

    :raises OSError: It can't be written, or the source ends before.
    """
    source.seek(start)
    while start < end:
        block = source.read(min(_BLOCK, end - start))
        if not block:
            raise OSError(errno.EIO, "A temporary file was truncated")
        write_all(target, memoryview(block))
        start += len(block)
