"""
A pytest plugin for the test-suites of modules that manage hosts through this one.

It gives them real contexts to connect to, so that a handler is tested on a host without there being
one to prepare:

- ``mitogen_ssh_host``: a throwaway OpenSSH server on the loopback address, one for the whole test
  run;
- ``mitogen_ssh_host_factory``: makes more of them, e.g. one to stop, freeze or restart;
- ``mitogen_local_context``: the serialized context of this machine, in a process of its own.

The plugin is loaded by each run of pytest in an environment that has this module installed. It is a
package of its own, outside of ``inmanta_plugins``, because the orchestrator's compiler and agents
import each file in there, and they have no pytest; and it imports neither inmanta nor mitogen, so
that a test run without hosts pays nothing for it.
"""

import collections.abc
import contextlib
import sys
import typing

import pytest

from pytest_inmanta_mitogen.sshd import SshdNotFoundError, SshHost, find_sshd

__all__ = ["SshHost", "SshHostFactory", "SshdNotFoundError", "find_sshd"]


class SshHostFactory(typing.Protocol):
    """
    Starts throwaway ssh hosts, each of them stopped at the end of the scope that asked for it.
    """

    def __call__(self, **options: typing.Any) -> SshHost:
        """
        Start a host.

        :param options: The keyword arguments of :class:`SshHost`.
        """
        ...


@contextlib.contextmanager
def _hosts() -> collections.abc.Iterator[SshHostFactory]:
    try:
        find_sshd()
    except SshdNotFoundError as error:
        pytest.skip(str(error))

    with contextlib.ExitStack() as stack:

        def start(**options: typing.Any) -> SshHost:
            return stack.enter_context(SshHost(**options))

        yield start


@pytest.fixture(scope="session")
def mitogen_ssh_host() -> collections.abc.Iterator[SshHost]:
    """
    A throwaway OpenSSH server on 127.0.0.1, shared by the whole test run. The current user logs in
    with a throwaway key; when the tests run as root every other user of the machine can do so too.
    Skips the test, saying so, where OpenSSH's server is not installed.
    """
    with _hosts() as start:
        yield start()


@pytest.fixture
def mitogen_ssh_host_factory() -> collections.abc.Iterator[SshHostFactory]:
    """
    A function that starts an ssh host of the test's own, which it may stop, freeze or restart as it
    likes. It takes the keyword arguments of :class:`SshHost`. The hosts end with the test.
    """
    with _hosts() as start:
        yield start


@pytest.fixture
def mitogen_local_context() -> dict[str, typing.Any]:
    """
    The serialized context of this machine: calls run in a process of their own, with the
    interpreter that runs the tests.
    """
    return {"method_name": "local", "name": "local", "python_path": [sys.executable]}
