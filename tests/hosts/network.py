"""
A host at the other end of a network link that a test can cut.
"""

import collections.abc
import contextlib
import ctypes
import itertools
import os
import pathlib
import secrets
import socket
import subprocess
import typing

import pytest

import support
from pytest_inmanta_mitogen import SshHost

_CLONE_NEWNET = 0x40000000


class Link:
    """
    Two network interfaces with a cable between them: one here, one in a namespace of its own.
    """

    def __init__(self, namespace: str, far: str, host: SshHost) -> None:
        self._namespace, self._far, self._host = namespace, far, host

    def cut(self) -> None:
        """
        The other end goes down: what is sent gets lost, and nobody is told.
        """
        self._set("down")

    def mend(self) -> None:
        """
        The other end comes up again, and has been found again when this returns.
        """
        self._set("up")
        support.wait_until(self._answers, "the host answers again")

    def _answers(self) -> bool:
        # For a while this side remembers that nobody was there.
        with contextlib.suppress(OSError):
            socket.create_connection((self._host.hostname, self._host.port), timeout=1).close()
            return True
        return False

    def _set(self, state: str) -> None:
        run("ip", "-netns", self._namespace, "link", "set", self._far, state)


class FarHost(SshHost):
    """
    An ssh server in a network namespace.
    """

    def __init__(self, namespace: str, address: str, home: pathlib.Path) -> None:
        super().__init__(name="far", environment={"HOME": str(home)})
        self.hostname = address
        self.port = 2222
        self._namespace = namespace

    def _spawn(self) -> "subprocess.Popen[bytes]":
        with _inside(self._namespace):
            return super()._spawn()


@contextlib.contextmanager
def far_host(home: pathlib.Path) -> collections.abc.Iterator[tuple[FarHost, Link]]:
    """
    A host at the other end of a link. Skips the test where namespaces can't be made.

    :param home: The home directory of who logs in.
    """
    tag = secrets.token_hex(3)
    namespace, near, far = f"mitogen-{tag}", f"mn{tag}", f"mf{tag}"
    subnet = _free_subnet()
    try:
        run("ip", "netns", "add", namespace)
    except RuntimeError as error:
        pytest.skip(f"needs network namespaces: {error}")
    try:
        run("ip", "link", "add", near, "type", "veth", "peer", "name", far)
        run("ip", "link", "set", far, "netns", namespace)
        run("ip", "addr", "add", f"{subnet}.1/24", "dev", near)
        run("ip", "link", "set", near, "up")
        run("ip", "-netns", namespace, "addr", "add", f"{subnet}.2/24", "dev", far)
        run("ip", "-netns", namespace, "link", "set", "lo", "up")
        run("ip", "-netns", namespace, "link", "set", far, "up")
        with FarHost(namespace, f"{subnet}.2", home) as host:
            yield host, Link(namespace, far, host)
    finally:
        run("ip", "netns", "del", namespace)


def run(*command: str) -> str:
    """
    :return: What a program printed.
    :raises RuntimeError: It failed; the text holds what it said.
    """
    program = support.find_program(command[0]) or command[0]
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
    return done.stdout


def _free_subnet() -> str:
    taken = run("ip", "-4", "addr") + run("ip", "-4", "route")
    for number in itertools.chain(range(os.getpid() % 250, 250), range(250)):
        subnet = f"10.213.{number}"
        if f"{subnet}." not in taken:
            return subnet
    raise RuntimeError("no free subnet")


@contextlib.contextmanager
def _inside(namespace: str) -> collections.abc.Iterator[None]:
    """
    Within it, the calling thread, and the processes that it starts, are in a network namespace.
    """
    # os.setns is there since Python 3.12 only.
    library = ctypes.CDLL(None, use_errno=True)

    def enter(file: typing.BinaryIO) -> None:
        if library.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns failed")

    with (
        open("/proc/thread-self/ns/net", "rb") as own,
        pathlib.Path("/run/netns", namespace).open("rb") as other,
    ):
        enter(other)
        try:
            yield
        finally:
            enter(own)
