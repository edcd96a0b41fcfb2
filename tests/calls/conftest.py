"""
Fixtures for tests of calls, most of which can share one interpreter.
"""

import collections.abc
import os
from typing import Any

import pytest

import support
from inmanta_plugins.mitogen import Proxy
from inmanta_plugins.mitogen.connections.connection import Connection


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> support.Messages:
    sent = support.Messages()
    post = Connection.post

    def counting(self: Connection, message: Any) -> None:
        sent.append(len(message.data))
        post(self, message)

    monkeypatch.setattr(Connection, "post", counting)
    return sent


@pytest.fixture(scope="module")
def open_proxy(idle_sockets: None) -> collections.abc.Iterator[Proxy]:
    with Proxy(dict(support.LOCAL)) as opened:
        yield opened


@pytest.fixture
def proxy(open_proxy: Proxy, recorder: support.Recorder) -> collections.abc.Iterator[Proxy]:
    """
    An open proxy to this machine that other tests use too. It has to work at the end of the test.
    Calls have to leave nothing, except for a new interpreter where the test lost the old one.
    """
    open_proxy.connect(exists_ok=True)
    interpreter = open_proxy.remote_call(os.getpid)
    before = support.Snapshot()
    open_proxy.logger = recorder
    yield open_proxy
    open_proxy.call_timeout = None
    open_proxy.connect(exists_ok=True)
    if open_proxy.remote_call(os.getpid) == interpreter:
        before.settle()


@pytest.fixture
def own_proxy(
    idle_sockets: None, nothing_left: None, recorder: support.Recorder
) -> collections.abc.Iterator[Proxy]:
    """
    An open proxy to this machine, for a test that others would notice.
    """
    with Proxy(dict(support.LOCAL), logger=recorder) as opened:
        yield opened
