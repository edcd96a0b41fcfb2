"""
Read, write and inspect files of this host.
"""

import errno
import grp
import os
import pwd
import stat
import sys
from typing import TYPE_CHECKING, Dict, List, Union

from inmanta_mitogen.names import AnyPath, native

if TYPE_CHECKING:
    from hashlib import _Hash

MAX_SIZE = 1 << 30
"""The most bytes of a file that are read, unless the caller says otherwise."""

# How many bytes to read at once: larger pieces of memory are each taken from the kernel.
_BLOCK = 64 << 10

# Up to that size Python's own sha1 is used, in bytes.
_SMALL = 1 << 20

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
    with open(native(path), "rb", buffering=0) as file:
        digest = new_hash(os.fstat(file.fileno()).st_size)
        while True:
            block = file.read(_BLOCK)
            if not block:
                return digest.hexdigest()
            digest.update(block)


def new_hash(size: int = sys.maxsize) -> "_Hash":
    """
    Return an empty sha1, also where the host's policy (FIPS 140) does not allow it for security.

    :param size: How many bytes it is for; by default many.
    """
    if size <= _SMALL and "hashlib" not in sys.modules:
        # Not hashlib, which loads OpenSSL: that takes some 5 ms, and is quicker for large contents.
        try:
            from _sha1 import sha1  # type: ignore[import-not-found]  # not in typeshed

            digest: _Hash = sha1()
            return digest
        except ImportError:  # RHEL's Python has only OpenSSL's
            pass
    import hashlib

    if _HAS_PURPOSE:
        return hashlib.sha1(usedforsecurity=False)
    return hashlib.sha1()  # noqa: S324  # to compare contents, no security


def read(path: AnyPath, *, max_size: int = MAX_SIZE) -> str:
    """
    Return the content of a text file, with its line ends as they are.

    :param path: The file, in UTF-8; symlinks are followed.
    :param max_size: The most bytes to accept, by default 1 GiB.
    :raises OSError: It can't be read, or EFBIG: it holds more than ``max_size``.
    :raises UnicodeDecodeError: It is not UTF-8. :func:`read_binary` reads anything.
    """
    content = read_binary(path, max_size=max_size)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        error.reason += f"; {path!r} is not UTF-8, read_binary gives its bytes"
        raise


def read_binary(path: AnyPath, *, max_size: int = MAX_SIZE) -> bytes:
    """
    Return the content of a file.

    :param path: The file; symlinks are followed.
    :param max_size: The most bytes to accept, by default 1 GiB.
    :raises OSError: It can't be read, or EFBIG: it holds more than ``max_size``.
    """
    with open(native(path), "rb", buffering=0) as file:
        # Devices and files of /proc do not tell their size, and may have no end.
        expected = os.fstat(file.fileno()).st_size
        blocks: List[bytes] = []
        left = max_size
        while expected <= left:
            block = file.read(min(expected or _BLOCK, left) + 1)
            if not block:
                return b"".join(blocks)
            blocks.append(block)
            left -= len(block)
            expected = 0
    text = (
        f"The file has more than the {max_size} bytes that are accepted: raise max_size, or fetch"
        " it with Proxy.get_file"
    )
    raise OSError(errno.EFBIG, text, path)


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
    """Return whether there is a symlink at the path, dangling or not."""
    return os.path.islink(native(path))


def lexists(path: AnyPath) -> bool:
    """Return whether there is anything at the path; a dangling symlink is something too."""
    return os.path.lexists(native(path))
