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
      directory's owner are followed.
    - No temporary file is left, except by a process that was killed. It is removed at the first
      put of a later process into that directory, by its name (``.inmanta-put-`` and 32 hexadecimal
      digits) and as nobody holds its lock. Directories whose list of names takes more than 1 MiB
      are not searched.

    What can't be replaced is **written in place**: devices and FIFOs, entries of /proc and /sys,
    bind-mounted files, files where the directory may not be written to, is sticky or append-only,
    file systems that can't rename or have no room for a second file, and files whose owner, mode or
    extended attributes this user may not give to another file. The content is then complete on this
    host before the first byte is written, in memory up to 16 MiB, else in the temporary directory.
    A regular file grows to its new size first, with its old content untouched, and gets its old
    content back after an error if that has at most 16 MiB, so a full disk does no harm there
    either. But being killed, or losing power, in the middle of it leaves a mixture, others can see
    it half-written, and two at once take turns only as long as nobody else holds a lock (flock) on
    the file: after ten seconds it is written nevertheless.

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
    # Imported late: most calls write nothing, and a host fetches each file that is imported.
    from inmanta_mitogen.staged import StagedWrite, as_bytes

    view = as_bytes(content)
    with StagedWrite(path, in_place=in_place) as staged:
        staged.write(view)
        staged.commit()
