"""
Write a file in place: one that can't be replaced, or that has to keep its inode.
"""

import errno
import os
import stat
from typing import IO, Optional

from inmanta_mitogen.staged import Target, write_all

_BLOCK = 1 << 20

#: The size, in bytes, up to which the new and the old content are kept in memory.
_IN_MEMORY = 16 << 20


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
    opened = target.open(os.O_WRONLY | (os.O_CREAT | os.O_EXCL if is_new else 0))
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
                os.fsync(opened)
        except BaseException:
            if is_new:
                os.unlink(target.name, dir_fd=target.directory)
            raise


def _overwrite(target: Target, source: IO[bytes], size: int, file: IO[bytes]) -> None:
    old_size = os.fstat(file.fileno()).st_size
    old = _read_old(target, old_size)
    try:
        # What may find no room comes first, behind the old content.
        file.seek(old_size)
        copy(source, file, old_size, size)
        os.fsync(file.fileno())
    except BaseException:
        file.truncate(old_size)
        raise
    try:
        file.seek(0)
        copy(source, file, 0, min(size, old_size))
        file.truncate(size)
        os.fsync(file.fileno())
    except OSError as error:
        if old is None:
            raise OSError(error.errno, f"{error.strerror}; the old content is lost") from error
        file.seek(0)
        write_all(file, memoryview(old))
        file.truncate(old_size)
        raise


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
