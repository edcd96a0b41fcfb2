"""
Write a file in place: one that can't be replaced, or that has to keep its inode.
"""

import contextlib
import os
import stat
from typing import IO

from inmanta_mitogen.staged import IN_MEMORY, Target, flush, write_all

_BLOCK = 1 << 20


def write_in_place(target: Target, source: IO[bytes]) -> None:
    """
    Write a complete content to a file, which is created where it does not exist.

    :param target: The file.
    :param source: The content.
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
                _overwrite(target, source, file)
                return
            # /proc, /sys and their like hold no blocks, and take a value from a single write.
            if stat.S_ISREG(mode):
                file.truncate(0)
            copy(source, file)
        except BaseException:
            if is_new:
                os.unlink(target.name, dir_fd=target.directory)
            raise


def _overwrite(target: Target, source: IO[bytes], file: IO[bytes]) -> None:
    old_size = os.fstat(file.fileno()).st_size
    old = None
    # This user may be allowed to write it, and not to read it.
    with contextlib.suppress(PermissionError):
        if old_size <= IN_MEMORY:
            with open(target.open(os.O_RDONLY), "rb") as old_file:
                old = old_file.read()
    try:
        # What may find no room comes first, behind the old content.
        file.seek(old_size)
        copy(source, file, old_size)
        flush(file.fileno())
    except BaseException:
        file.truncate(old_size)
        raise
    try:
        file.seek(0)
        copy(source, file)
        file.truncate()
        flush(file.fileno())
    except OSError as error:
        lost = OSError(error.errno, f"{error.strerror}; the old content is lost")
        if old is None:
            raise lost from error
        try:
            file.seek(0)
            write_all(file, memoryview(old))
            file.truncate(old_size)
        except OSError:
            raise lost from error
        raise


def copy(source: IO[bytes], target: IO[bytes], start: int = 0) -> None:
    """
    Write one file from an offset to its end to where another one is at.
    """
    source.seek(start)
    for block in iter(lambda: source.read(_BLOCK), b""):
        write_all(target, memoryview(block))
