"""What ``python -m inmanta_plugins.mitogen check`` asks a host about itself."""

import os
import platform
import pwd
import shutil
import sys
import tempfile
from typing import Dict, Union


def facts() -> Dict[str, Union[str, int]]:
    """
    Return who runs this interpreter, which one it is, and where it can write temporary files.

    :return: ``user``, ``python`` (the path of the executable), ``version``, ``tmp`` (the temporary
        directory, empty when none is writable) and ``tmp_free`` (bytes).
    """
    uid = os.geteuid()
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = "unknown"
    try:
        tmp = tempfile.gettempdir()  # it has written a file there
    except OSError:
        tmp = ""
    return {
        "user": f"{user} ({uid})",
        "python": sys.executable,
        "version": platform.python_version(),
        "tmp": tmp,
        "tmp_free": shutil.disk_usage(tmp or "/").free,
    }
