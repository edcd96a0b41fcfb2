"""
The ways to reach a host: which there are, what each can be told, and what of it was tried.
"""

import collections
import collections.abc
import contextlib
import importlib
import inspect
import os
import typing

import pytest

from inmanta_plugins.mitogen import Proxy

Context = dict[str, typing.Any]

#: mitogen's connection methods that a context may name.
METHODS = (
    *("local", "ssh", "sudo", "su", "doas", "docker", "podman", "buildah", "kubectl"),
    *("lxc", "lxd", "incus", "jail", "setns"),
)

# What mitogen hands to the options of every method by itself.
_INTERNAL = {"self", "kwargs", "max_message_size", "old_router"}


def options_of(method: str) -> set[str]:
    """
    :return: The names of the options that the installed mitogen takes for a connection method.
    """
    module = importlib.import_module("mitogen.parent" if method == "local" else f"mitogen.{method}")
    return {
        name
        for cls in module.Options.__mro__
        if "__init__" in vars(cls) and cls is not object
        for name in inspect.signature(cls.__init__).parameters
    } - _INTERNAL


#: What a test's report tells of it: each connection that it made, and each error that it got.
CONNECTED, FAILED = "connected", "failed"

Properties = list[tuple[str, typing.Any]]


class Coverage:
    """
    Which methods were connected, and with which options.
    """

    def __init__(self) -> None:
        self._options: dict[str, set[str]] = collections.defaultdict(set)
        self._kinds: dict[str, set[str]] = collections.defaultdict(set)
        self._connections: collections.Counter[str] = collections.Counter()

    def add(self, method: str, kind: str, options: collections.abc.Iterable[str]) -> None:
        """
        :param method: The method of a hop that was connected.
        :param kind: "real", or "stub" where its program is a stand-in.
        :param options: The names of the options that it had.
        """
        self._connections[method] += 1
        self._kinds[method].add(kind)
        self._options[method] |= set(options)

    def table(self) -> list[str]:
        """
        :return: A table for people, a line for each method that was connected.
        """
        lines = [f"{'method':<9}{'program':<12}{'connected':<11}{'options':<9}not covered"]
        for method in METHODS:
            if count := self._connections[method]:
                every = options_of(method)
                missing = every - self._options[method]
                lines.append(
                    f"{method:<9}{' and '.join(sorted(self._kinds[method])):<12}"
                    f"{f'{count} times':<11}{f'{len(every) - len(missing)}/{len(every)}':<9}"
                    f"{', '.join(sorted(missing))}"
                )
        return lines


def report(tests: collections.abc.Iterable[pytest.TestReport], *, with_errors: bool) -> list[str]:
    """
    :param tests: The reports of tests that are over.
    :param with_errors: Whether to tell what the errors of failed connections said.
    :return: Method by method, what they connected and with which options; empty for nothing.
    """
    coverage, connected, errors = Coverage(), False, []
    for test in tests:
        for name, value in test.user_properties:
            if name == CONNECTED and isinstance(value, list):
                connected = True
                for hop in value:
                    coverage.add(*hop)
            elif name == FAILED and isinstance(value, str):
                case = test.nodeid.rpartition("::")[2]
                errors += ["", f"{case}:", *(f"    {line}" for line in value.splitlines())]
    lines = coverage.table() if connected else []
    return [*lines, *errors] if with_errors else lines


class Reach:
    """
    Connects to hosts, and notes how.

    :param properties: Those of the test.
    """

    def __init__(self, properties: Properties) -> None:
        self._properties = properties

    @contextlib.contextmanager
    def __call__(self, context: Context, *, kind: str = "real") -> collections.abc.Iterator[Proxy]:
        """
        :param context: The serialized context to connect to.
        :param kind: "real", or "stub" where its last hop's program is a stand-in.
        """
        with Proxy(context) as proxy:
            self._properties.append((CONNECTED, list(_hops(context, kind))))
            try:
                yield proxy
            finally:
                if context.get("debug"):
                    log = f"/tmp/mitogen.{proxy.remote_call(os.getpid)}."
                    proxy.run("sh", ["-c", f"rm -f {log}*"])


def _hops(context: Context, kind: str) -> collections.abc.Iterator[tuple[str, str, list[str]]]:
    hop: Context | None = context
    while hop is not None:
        yield hop["method_name"], kind, sorted(hop.keys() - {"method_name", "via"})
        kind, hop = "real", hop.get("via")


E = typing.TypeVar("E", bound=Exception)


class Fails:
    """
    Connects to hosts in vain, and notes what the errors say.

    :param properties: Those of the test.
    """

    def __init__(self, properties: Properties) -> None:
        self._properties = properties

    def __call__(self, context: Context, expected: type[E]) -> E:
        """
        :param context: The serialized context that can't be connected.
        :param expected: The exception that this should raise.
        :return: The exception. No secret of the context is in its text.
        """
        with pytest.raises(expected) as raised:
            Proxy(context).connect()
        text = f"{type(raised.value).__name__}: {raised.value}"
        self._properties.append((FAILED, text))
        for secret in _secrets(context):
            assert secret not in f"{text}{raised.value!r}{getattr(raised.value, '__notes__', '')}"
        return raised.value


def _secrets(context: Context) -> list[str]:
    via = context.get("via")
    passwords = [context["password"]] if "password" in context else []
    return [*passwords, *(_secrets(via) if via else [])]
