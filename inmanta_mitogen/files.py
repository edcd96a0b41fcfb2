"""
Read, write and inspect files of this host.
"""

import errno
import grp
import os
import pwd
import stat
import sys
from typing import TYPE_CHECKING, Dict, Optional, Union

from inmanta_mitogen.names import AnyPath, native

if TYPE_CHECKING:
    from hashlib import _Hash

_BLOCK = 1 << 20

# Whether hashlib can be told that a sum is for no security.
_HAS_PURPOSE = sys.version_info >= (3, 9)


def hash_file(path: AnyPath) -> str:
    """
    Return the sha1 of a file's content. It tells whether two contents are the same, and does not
    protect against someone who crafts two with the same sum.

    :param path: The file; symlinks are followed. It is read a block at a time, whatever its size.
    :return: 40 hexadecimal digits.
    :raises OSError: It can't be read.
    """
    digest = new_hash()
    block = memoryview(bytearray(_BLOCK))
    with open(native(path), "rb", buffering=0) as file:
        while True:
            size = file.readinto(block)
            if not size:
                return digest.hexdigest()
            digest.update(block[:size])


def new_hash() -> "_Hash":
    """
    Return an empty sha1, also where the host's policy (FIPS 140) does not allow it for security.
    """
    # Imported late: it loads OpenSSL, and most calls need no sum.
    import hashlib

    if _HAS_PURPOSE:
        return hashlib.sha1(usedforsecurity=False)
    return hashlib.sha1()  # noqa: S324  # to compare contents, no security


def read(path: AnyPath) -> str:
    """
    Return the content of a text file, with its line ends as they are.

    :param path: The file, in UTF-8; symlinks are followed.
    :raises OSError: It can't be read.
    :raises UnicodeDecodeError: It is not UTF-8. :func:`read_binary` reads anything.
    """
    content = read_binary(path)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        error.reason += f"; {path!r} is not UTF-8, read_binary gives its bytes"
        raise


def read_binary(path: AnyPath, *, max_size: Optional[int] = None) -> bytes:
    """
    Return the content of a file.

    :param path: The file; symlinks are followed.
    :param max_size: The most bytes to accept. By default there is no limit, and a file without end,
        such as ``/dev/zero``, takes all memory.
    :raises OSError: It can't be read, or EFBIG: it holds more than ``max_size``.
    """
    with open(native(path), "rb") as file:
        if max_size is None:
            return file.read()
        # Neither all at once, as Python sets aside as much memory as is asked for, nor by the size
        # that the file claims, as devices and /proc have none.
        content = bytearray()
        while len(content) <= max_size:
            block = file.read(min(_BLOCK, max_size + 1 - len(content)))
            if not block:
                return bytes(content)
            content += block
    raise OSError(errno.EFBIG, f"More than the {max_size} bytes that are allowed", path)


def file_stat(path: AnyPath) -> Dict[str, Union[str, int]]:
    """
    Return who owns a file and who may use it.

    :param path: The file or directory; symlinks are followed.
    :return: ``owner`` and ``group``: their names, or their numbers as text where this host has no
        name for them. ``permissions``: the digits of the octal mode read as a decimal number: 0o644
        is 644, 0o4755 is 4755.
    :raises OSError: It does not exist or can't be reached.
    """
    state = os.stat(native(path))
    try:
        owner = pwd.getpwuid(state.st_uid).pw_name
    except KeyError:
        owner = str(state.st_uid)
    try:
        group = grp.getgrgid(state.st_gid).gr_name
    except KeyError:
        group = str(state.st_gid)
    permissions = int(f"{stat.S_IMODE(state.st_mode):o}")
    return {"owner": owner, "group": group, "permissions": permissions}


def islink(path: AnyPath) -> bool:
    """
    Return whether there is a symlink at the path, dangling or not.
    """
    return os.path.islink(native(path))


def lexists(path: AnyPath) -> bool:
    """
    Return whether there is anything at the path; a dangling symlink is something too.
    """
    return os.path.lexists(native(path))
