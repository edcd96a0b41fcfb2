"""From a serialized context to a connected one: what the connections of a process share.

All the proxies of a process share one :class:`Hub`: one mitogen router with one broker thread. A
hop that several contexts go through is connected once and counted; the context that a proxy runs
its calls in is its own, since a context runs one call at a time. The hub's router starts with its
first connection and ends with its last, and a forked child begins with a new hub.
"""

import functools
import hashlib
import json
import os
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import mitogen.master
import mitogen.parent
from inmanta_plugins.mitogen import _mitogen, settings
from inmanta_plugins.mitogen.connections.connection import Connection
from inmanta_plugins.mitogen.connections.link import Link, Serialized
from inmanta_plugins.mitogen.contexts.validate import checked_context
from inmanta_plugins.mitogen.hosts.router import AgentRouter
from inmanta_plugins.mitogen.texts import hops_of


def context_hash(serialized_context: Serialized) -> str:
    """
    Return the md5 hex digest of the JSON text of a context: equal for equal contexts.

    A key for caches, no protection of anything.

    :param serialized_context: A serialized context.
    """
    text = json.dumps(serialized_context, sort_keys=True)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def build_context(
    serialized_context: dict[str, object], *, router: mitogen.master.Router
) -> mitogen.parent.Context:
    """
    Connect a context, hop by hop.

    :param serialized_context: The serialized context; it is not changed.
    :param router: The router to connect it on. It stays the caller's: contexts end when it does,
        or by their ``shutdown()``.
    :return: The connected context.
    :raises ContextError: The serialized context has the wrong form; a :class:`ValueError`.
    :raises PythonNotFoundError: A hop has no Python at its ``python_path``.
    :raises ConnectError: A hop could not be connected; a mitogen ``StreamError``. The hops before
        it have been ended.
    """
    link: Link | None = None
    for hop in hops_of(checked_context(serialized_context)):
        try:
            link = Link(hop, via=link, router=router)
        except BaseException:
            while link is not None:
                link.end(settings.HOP_LEAVE_TIMEOUT)
                link = link.via
            raise
    assert link is not None  # a valid context has at least itself for a hop
    return link.context


class _SharedHop:
    """
    A hop that several connections may go through. Its first user connects it, or fails to for all.
    """

    def __init__(self) -> None:
        self.users = 0
        """How many use it."""
        self.via: _SharedHop | None = None
        """The hop before it."""
        self.connecting = threading.Lock()
        self.link: Link | None = None
        self.failure: Exception | None = None

    @property
    def lost(self) -> bool:
        return self.failure is not None or (self.link is not None and not self.link.alive)


class Hub:
    """The router of a process, the hops on it, and the count of those who use them."""

    def __init__(self) -> None:
        self.after_fork_in_child()
        watch_forks(self)

    def after_fork_in_child(self) -> None:
        """Begin anew, without what belongs to the parent process."""
        self._lock = threading.Lock()
        self._router: mitogen.master.Router | None = None
        self._users = 0
        self._hops: dict[str, _SharedHop] = {}

    def open(self, serialized_context: Serialized) -> Connection:
        """
        Connect a context of its own for the caller, through shared hops.

        :param serialized_context: A serialized context.
        :return: The connection; the caller closes it.
        :raises ContextError: The serialized context has the wrong form.
        :raises PythonNotFoundError: A hop has no Python at its ``python_path``.
        :raises ConnectError: A hop could not be connected.
        """
        hop = checked_context(serialized_context)
        router = self.enter()
        via: _SharedHop | None = None
        link: Link | None = None
        try:
            via = self._acquire(hop.get("via"), router)
            link = Link(hop, via=via.link if via else None, router=router)
            link.prepare(hop)
            return Connection(link, functools.partial(self.leave, via))
        except BaseException:
            if link is not None:
                link.cut()
            self.leave(via)
            raise

    def enter(self) -> mitogen.master.Router:
        """Return the router, and keep it until :meth:`leave`."""
        with self._lock:
            if self._router is None or not _mitogen.broker_runs(self._router):
                _mitogen.quiet_mitogen()
                size = settings.max_message_size()
                # No watcher: it would end the broker with the thread that happens to come first.
                broker = mitogen.master.Broker(install_watcher=False)
                self._router = AgentRouter(broker, size)
            self._users += 1
            # A router that always has some user lives for months.
            self._router.broker.defer(_mitogen.forget_ended, self._router)
            return self._router

    def leave(self, via: _SharedHop | None) -> None:
        """Give back a share of the hops and of the router; the last to leave ends them."""
        self._release(via)
        with self._lock:
            self._users -= 1
            router = self._router
            if self._users:
                return
            self._router = None
        _end(router)

    def _acquire(self, serialized: object, router: mitogen.master.Router) -> _SharedHop | None:
        if not isinstance(serialized, Mapping):
            return None
        key = context_hash(serialized)
        with self._lock:
            hop = self._hops.get(key)
            if hop is None or hop.lost:
                hop = self._hops[key] = _SharedHop()
            hop.users += 1
        try:
            with hop.connecting:
                self._connect(hop, serialized, router)
        except BaseException:
            self._release(hop)
            raise
        return hop

    def _connect(
        self, hop: _SharedHop, serialized: Serialized, router: mitogen.master.Router
    ) -> None:
        if hop.failure is not None:
            raise hop.failure
        try:
            hop.via = hop.via or self._acquire(serialized.get("via"), router)
            before = hop.via.link if hop.via else None
            hop.link = hop.link or Link(serialized, via=before, router=router)
        except Exception as error:  # an interrupted thread leaves the hop to the next one
            hop.failure = error
            raise

    def _release(self, hop: _SharedHop | None) -> None:
        while hop is not None:
            with self._lock:
                hop.users -= 1
                if hop.users:
                    return
                for key in [key for key, other in self._hops.items() if other is hop]:
                    del self._hops[key]
            if hop.link is not None and hop.link.alive:
                hop.link.end(settings.HOP_LEAVE_TIMEOUT)
            hop = hop.via

    def end(self) -> None:
        """End the router at once, with all that is connected on it."""
        with self._lock:
            router, self._router = self._router, None
        _end(router)


def _end(router: mitogen.master.Router | None) -> None:
    if router is not None:
        router.broker.shutdown()
        router.broker.join()


# What a forked child inherits, with locks that may be held by threads that it has not.
_inherited: weakref.WeakSet[Any] = weakref.WeakSet()


def watch_forks(what: object) -> None:
    """
    Have an object told of forks.

    :param what: Its method `after_fork_in_child` is called in each child that this process forks,
        for as long as it lives.
    """
    _inherited.add(what)


def _after_fork_in_child() -> None:
    _mitogen.reset_after_fork()
    for what in list(_inherited):
        what.after_fork_in_child()


HUB = Hub()
"""The hub of this process."""

os.register_at_fork(after_in_child=_after_fork_in_child)
# The broker of a process that exits with connections open: Python waits for threads.
_mitogen.call_at_exit(HUB.end)
