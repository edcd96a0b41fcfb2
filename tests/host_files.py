"""
What tests of the host's files share: file systems, other users and ways to die.
"""

import collections.abc
import contextlib
import os
import sys
from pathlib import Path

import pytest

import support

CHECKOUT = Path(__file__).parents[1]

ALICE = 54321
"""Users who need no entry anywhere."""
MALLORY = 54322

_PRELUDE = """
import os, resource, signal, sys, tempfile
from inmanta_mitogen import in_place, put
from inmanta_mitogen.staged import StagedWrite
uid = int(sys.argv.pop(1))
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
args = sys.argv[1:]
"""


def python_as(uid: int, code: str, *args: object) -> str:
    """
    Run Python code as another user, with ``put``, ``StagedWrite`` and ``args`` at hand.

    :return: What it printed.
    """
    # Imports happen before the change of user, who may not read this interpreter's files.
    command = (sys.executable, "-c", _PRELUDE + code, uid, *args)
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    return support.execute(*command, env=environment, umask=0o022, check=True).stdout


@contextlib.contextmanager
def mounted(*arguments: object) -> collections.abc.Iterator[None]:
    """
    Mount something. Only root can call it.

    :param arguments: Those of mount(8); the last one is the mount point.
    """
    support.execute("mount", *arguments, check=True)
    try:
        yield
    finally:
        support.execute("umount", arguments[-1], check=True)


@contextlib.contextmanager
def small_disk(directory: Path, options: str = "size=1m") -> collections.abc.Iterator[Path]:
    """
    A file system in memory, by default of a megabyte. Skips the test where it can't be mounted.

    :param directory: Where to mount it, in a directory of its own.
    """
    support.need("mount", "umount", root=True)
    disk = directory / "disk"
    disk.mkdir()
    with mounted("-t", "tmpfs", "-o", options, "tmpfs", disk):
        yield disk


@contextlib.contextmanager
def file_attribute(path: Path, letter: str) -> collections.abc.Iterator[None]:
    """Set an attribute of chattr(1) meanwhile. Skip the test where that is not possible."""
    support.need("chattr", root=True)
    done = support.execute("chattr", f"+{letter}", path)
    if done.returncode:
        pytest.skip(f"needs a file system with attributes at {path}: {done.stderr}")
    try:
        yield
    finally:
        support.execute("chattr", f"-{letter}", path, check=True)


def act_at_step(
    step: int,
    action: collections.abc.Callable[[], object],
    function: collections.abc.Callable[[], object],
) -> bool:
    """
    Call a function in a process of its own, and an action there when the function asks the system
    for something to be done to a file for the nth time.

    :return: Whether the action was called; False when there were fewer steps.
    """
    pid = os.fork()
    if not pid:
        left = step

        def count(event: str, _: tuple[object, ...]) -> None:
            nonlocal left
            if event == "open" or event.startswith(("os.", "fcntl.")):
                left -= 1
                if left == -1:
                    action()

        try:
            sys.addaudithook(count)
            function()
        finally:
            # Nothing of the test that was forked may go on here.
            os._exit(left < 0)
    _, status = os.waitpid(pid, 0)
    return status != 0
