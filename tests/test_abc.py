"""
What the bases do for a handler: resources of a small module are deployed for real, as an agent does
it.
"""

import collections.abc
import itertools
import json
import os
import sys
import typing
from pathlib import Path
from typing import Any

import inmanta.agent.cache
import inmanta.agent.handler
import pytest
from inmanta import const
from pytest_inmanta.plugin import Project

import support
from inmanta_plugins.mitogen import Proxy
from pytest_inmanta_mitogen import SshHost

NUMBERS = itertools.count()

MODEL = """
import std
import mitogen

entity Note extends std::PurgeableResource:
    string path
    string text
end
Note.host [1] -- std::Host
Note.via [0:1] -- mitogen::Context
implement Note using std::none
index Note(path)
"""

HANDLER = """
import time

from inmanta.agent.handler import CRUDHandler, HandlerContext, ResourcePurged, provider
from inmanta.resources import resource
from inmanta_plugins.mitogen.abc import HandlerABC, ResourceABC


@resource("probe::Note", id_attribute="path", agent="host.name")
class Note(ResourceABC):
    fields = ("path", "text")
    path: str
    text: str


@provider("probe::Note", name="probe")
class NoteHandler(HandlerABC[Note]):
    call_timeout = CALL_TIMEOUT

    def read_resource(self, ctx: HandlerContext, resource: Note) -> None:
        if resource.text == "hangs":
            self.proxy.remote_call(time.sleep, 600)
        if not self.proxy.file_exists(resource.path):
            raise ResourcePurged()
        resource.text = self.proxy.read(resource.path)

    def create_resource(self, ctx: HandlerContext, resource: Note) -> None:
        self.proxy.put(resource.path, resource.text.encode())
        ctx.set_created()
"""


class Agent:
    """
    Deploys resources one after the other with one cache, as the agent of an orchestrator does.
    """

    def __init__(self, project: Project, directory: Path) -> None:
        self.project = project
        self.directory = directory
        self.cache = inmanta.agent.cache.AgentCache()
        # All tests of a run share pytest-inmanta's project.
        self.module = f"probe{next(NUMBERS)}"

    def compile(self, *lines: str, call_timeout: float | None = None) -> None:
        """
        Compile a model.

        :param lines: The model.
        :param call_timeout: That of the handler.
        """
        handler = HANDLER.replace("CALL_TIMEOUT", repr(call_timeout)).replace("probe", self.module)
        self.project.create_module(self.module, initcf=MODEL, initpy=handler)
        text = "\n".join(["import std", "import mitogen", "import probe", *lines, ""])
        self.project.compile(text.replace("probe", self.module).replace("DIR", str(self.directory)))

    def resource(self, name: str) -> typing.Any:
        """
        Return the resource of a file.

        :param name: That of the file.
        """
        path = str(self.directory / name)
        resource = self.project.get_resource(f"{self.module}::Note", path=path)
        assert resource is not None
        return resource

    def deploy(self, name: str) -> typing.Any:
        """
        Return the handler that did it.

        :param name: That of the file.
        """
        resource = self.resource(name)
        handler = self.project.get_handler(resource, False)
        handler.set_cache(self.cache)
        self.ctx = inmanta.agent.handler.HandlerContext(resource)
        handler.execute(self.ctx, resource, False)
        return handler

    def state(self) -> const.ResourceState:
        assert self.ctx.status is not None
        return const.ResourceState(self.ctx.status.value)

    @property
    def log(self) -> str:
        """
        What the last deploy sent to the orchestrator.
        """
        return "\n".join(json.dumps(line.to_dict(), default=repr) for line in self.ctx.logs)


@pytest.fixture
def agent(project: Project, tmp_path: Path) -> collections.abc.Iterator[Agent]:
    agent = Agent(project, tmp_path)
    yield agent
    agent.cache.close()


LOCAL = f'mitogen::Local(name="here", python_path=[{json.dumps(sys.executable)}])'
HERE = f'host = std::Host(name="here", os=std::linux, via={LOCAL})'


def note(name: str, extra: str = "", text: str = "noted") -> str:
    return f'probe::Note(host=host, path="DIR/{name}", text="{text}", purged=false{extra})'


def there(host: SshHost) -> str:
    return f'host = std::Host(name="there", os=std::linux, via={host.model()})'


# Connections


def test_resources_of_an_agent_share_the_connection_to_a_context_and_survive_a_reboot(
    agent: Agent, host: SshHost, tmp_path: Path
) -> None:
    agent.compile(there(host), note("a"), note("b"))
    one, other = agent.deploy("a"), agent.deploy("b")
    assert one.proxy is other.proxy
    assert host.logins() == 1
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == "noted"
    host.restart()
    connection = support.connection_of(one.proxy)
    support.wait_until(lambda: not connection.link.alive, "the connection is lost")
    assert agent.deploy("a").proxy is one.proxy
    assert agent.state() is const.ResourceState.deployed


def test_a_connection_of_each_context_and_agent_ends_with_the_cache(agent: Agent) -> None:
    agent.compile(
        HERE,
        note("a"),
        note("b", ', via=mitogen::Local(name="own", python_path=["/usr/bin/env", "python3"])'),
        f'twin = std::Host(name="twin", os=std::linux, via={LOCAL})',
        note("c").replace("host=host", "host=twin"),
    )
    proxies = [agent.deploy(name).proxy for name in "abc"]
    assert proxies[0].serialized_context == proxies[2].serialized_context
    interpreters = {proxy.remote_call(os.getpid) for proxy in proxies}
    assert len(interpreters) == 3
    agent.cache.close()
    for proxy in proxies:
        with pytest.raises(RuntimeError, match="not connected"):
            proxy.run("true")
    support.wait_until(lambda: all(map(support.is_gone, interpreters)), "the interpreters are gone")


def test_a_host_that_cannot_be_reached_fails_only_its_own_resources_until_it_is_back(
    agent: Agent, host: SshHost
) -> None:
    agent.compile(HERE, note("a"), note("b", f", via={host.model()}"))
    host.stop()
    for _ in range(2):
        agent.deploy("b")
        assert agent.state() is const.ResourceState.failed
        assert "Cannot connect to " in agent.log
        assert "AttributeError" not in agent.log
    agent.deploy("a")
    assert agent.state() is const.ResourceState.deployed
    host.start()
    agent.deploy("b")
    assert agent.state() is const.ResourceState.deployed


# Logs


def test_calls_are_logged_to_the_resource_at_hand_and_prefetched(agent: Agent) -> None:
    agent.compile(HERE, note("a"), note("b"), note("c"))
    loggers = set()
    for name in "abc":
        (agent.directory / name).write_text("noted")
        handler = agent.deploy(name)
        assert agent.state() is const.ResourceState.deployed
        records = [line.to_dict()["kwargs"] for line in agent.ctx.logs]
        calls = [record for record in records if "function" in record]
        functions = [call["function"] for call in calls]
        assert functions == ["inmanta_mitogen.lexists", "inmanta_mitogen.read"]
        marks = [call.get("prefetched") for call in calls]
        assert marks == [None, None if name == "a" else True]
        assert handler.proxy_previous_logger is handler.proxy.logger
        loggers.add(handler.proxy.logger)
    [logger] = loggers
    assert not isinstance(logger, inmanta.agent.handler.HandlerContext)


def test_an_override_of_get_proxy_may_name_the_context_as_it_likes(agent: Agent) -> None:
    agent.compile(HERE, note("a"))
    resource = agent.resource("a")
    handler: Any = agent.project.get_handler(resource, False)
    asked: list[object] = []

    def get_proxy(via: dict[str, object], hash: str, agent_name: str) -> Proxy:
        asked.append((via, agent_name))
        proxy = Proxy(via)
        proxy.connect()
        return proxy

    handler.get_proxy = get_proxy
    ctx = inmanta.agent.handler.HandlerContext(resource)
    handler.pre(ctx, resource)
    handler.post(ctx, resource)
    handler.proxy.disconnect()
    assert asked == [(resource.via, "here")]


# Bounded calls


@pytest.mark.parametrize("own", [2.0, None])
def test_calls_have_the_handlers_call_timeout_else_that_of_the_variable(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, own: float | None
) -> None:
    usual = 60.0 if own else 2.0
    monkeypatch.setenv("INMANTA_MITOGEN_CALL_TIMEOUT", str(usual))
    agent.compile(HERE, note("a"), note("b", text="hangs"), note("c"), call_timeout=own)
    proxy = agent.deploy("a").proxy
    assert proxy.call_timeout == usual
    agent.deploy("b")
    assert agent.state() is const.ResourceState.failed
    assert "within 2.0 seconds (call_timeout)" in agent.log
    assert proxy.call_timeout == usual
    # The interpreter that hangs is in nobody's way.
    assert agent.deploy("c").proxy is proxy
    assert agent.state() is const.ResourceState.deployed
