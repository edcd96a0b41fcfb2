"""
A demo that goes on in the background once it has shown all, and how to end it.
"""

import collections.abc
import json
import os
import pathlib
import signal
import sys
import tempfile
import types
import typing

import psutil

from testbed.processes import DIRECTORY_PREFIX, PATIENCE

#: Lets the process in the foreground end.
Release: typing.TypeAlias = collections.abc.Callable[[], None]

_RECORD = "kept.json"


def in_background(main: collections.abc.Callable[[Release], int]) -> int:
    """
    Run a function in a process of its own, which goes on when this one ends.

    Signals that this process gets meanwhile are passed on.

    :param main: The function. It gets another one, to call when nobody has to wait for it any more;
        from then on it has no output.
    :return: What the function returned, 0 if it goes on.
    """
    sys.stdout.flush()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        # A Ctrl-C is the business of the process in the foreground, which passes it on.
        os.setsid()
        code = 1
        try:
            code = main(lambda: _release(write_end))
        finally:
            sys.stdout.flush()
            os._exit(code)

    def pass_on(number: int, frame: types.FrameType | None) -> None:
        os.kill(child, number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    os.close(write_end)
    if os.read(read_end, 1):
        return 0
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code >= 0 else 128 - code


def until_stopped(directory: pathlib.Path, release: Release) -> None:
    """
    Leave the foreground, and wait for a signal: this never returns by itself.

    :param directory: The demo's directory, where :func:`stop` finds it by.
    :param release: Lets the process in the foreground end.
    """
    process = psutil.Process()
    record = {"pid": process.pid, "created": process.create_time()}
    (directory / _RECORD).write_text(json.dumps(record))
    release()
    while True:
        signal.pause()


def stop() -> int:
    """
    End all demos of this user that were left up, and wait until they are gone.

    :return: The exit code: 1 when one does not end.
    """
    parents = {tempfile.gettempdir(), "/tmp"}
    records = [
        record
        for parent in sorted(parents)
        for record in pathlib.Path(parent).glob(f"{DIRECTORY_PREFIX}*/{_RECORD}")
    ]
    if not records:
        print("No demo was left up.")
    return max((_stop(record) for record in records), default=0)


def _stop(record: pathlib.Path) -> int:
    try:
        kept = json.loads(record.read_text())
        process = psutil.Process(kept["pid"])
        if process.create_time() != kept["created"]:
            raise psutil.NoSuchProcess(process.pid)
        process.terminate()
        process.wait(6 * PATIENCE)
    except (psutil.NoSuchProcess, FileNotFoundError):
        print(f"The demo in {record.parent} has ended already.")
    except (psutil.AccessDenied, PermissionError):
        print(f"The demo in {record.parent} is another user's.")
    except psutil.TimeoutExpired:
        print(f"The demo in {record.parent} does not end: process {kept['pid']}.")
        return 1
    else:
        print(f"The demo in {record.parent} is gone.")
    return 0


def _release(write_end: int) -> None:
    sys.stdout.flush()
    # Whoever reads the output, as in `make demo KEEP=1 | tee log`, would wait for its end.
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.write(write_end, b".")
    os.close(write_end)
