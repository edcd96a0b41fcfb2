"""Which of the agent's modules a host gets, and which it doesn't."""

import collections.abc
import importlib
import importlib.util
import logging
import pathlib
import sys
import textwrap
import types

import hostile_side
import mitogen.core
import pytest

from inmanta_plugins.mitogen import Proxy, RemoteException, allow_modules
from inmanta_plugins.mitogen.hosts import modules
from inmanta_plugins.mitogen.hosts import served as serve
from pytest_inmanta_mitogen import SshHost

LOCAL: dict[str, object] = {"method_name": "local", "name": "a", "python_path": [sys.executable]}

FILES = {
    # A package of handlers: its parents can't be imported without inmanta.
    "inmanta_plugins/webapp/__init__.py": "import inmanta.resources\nSECRET = 1\n",
    "inmanta_plugins/webapp/remote.py": """
        import os
        import typing

        from inmanta_plugins.webapp import helpers
        from .deep.inner import inner
        from . import lists as _lists

        if typing.TYPE_CHECKING:
            import inmanta.resources

        try:
            import nowhere_to_be_found
        except ImportError:
            nowhere_to_be_found = None

        def pid():
            return os.getpid()

        def all_of_it():
            from inmanta_plugins.webapp.late import late
            import toplevel_tool.part.leaf

            return [helpers.help(), inner(), _lists.LIST, late(), toplevel_tool.part.leaf.LEAF]

        def by_name(name):
            import importlib

            return importlib.import_module(name).__name__

        def compiled():
            import only_compiled

            return only_compiled
    """,
    "inmanta_plugins/webapp/helpers.py": "def help():\n    return 'helped'\n",
    "inmanta_plugins/webapp/lists.py": "LIST = [1]\n",
    "inmanta_plugins/webapp/late.py": "def late():\n    return 'late'\n",
    "inmanta_plugins/webapp/secret.py": "PASSWORD = 'canary'\n",
    "inmanta_plugins/webapp/deep/__init__.py": "import inmanta\n",
    "inmanta_plugins/webapp/deep/inner.py": "def inner():\n    return __name__\n",
    "inmanta_plugins/webapp/data.txt": "canary\n",
    "inmanta_plugins/needy/__init__.py": "def in_init():\n    return 1\n",
    "inmanta_plugins/needy/remote.py": """
        from inmanta_plugins.needy.between import x

        def never():
            return x
    """,
    "inmanta_plugins/needy/between.py": "from inmanta.resources import resource as x\n",
    "toplevel_tool/__init__.py": "TOP = 1\n",
    "toplevel_tool/part/__init__.py": "from .. import TOP\n",
    "toplevel_tool/part/leaf.py": "LEAF = 'leaf'\n",
    "toplevel_tool/unneeded.py": "canary = 1\n",
    "toplevel_canary.py": "PASSWORD = 'canary'\n",
    "other_tool.py": "def other():\n    return 'other'\n",
}


@pytest.fixture(autouse=True)
def agent(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> collections.abc.Iterator[pathlib.Path]:
    """A directory of modules that can be imported on the agent, and on no host."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip())
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = importlib.import_module("inmanta_plugins")
    monkeypatch.setattr(plugins, "__path__", [*plugins.__path__, str(tmp_path / "inmanta_plugins")])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("toplevel_tool", "toplevel_canary", "other_tool") or (
            name.startswith(("inmanta_plugins.webapp", "inmanta_plugins.needy"))
        ):
            del sys.modules[name]


@pytest.fixture
def remote() -> types.ModuleType:
    return importlib.import_module("inmanta_plugins.webapp.remote")


@pytest.fixture(params=["local", "ssh", "behind a hop"])
def proxy(
    request: pytest.FixtureRequest, mitogen_ssh_host: SshHost
) -> collections.abc.Iterator[Proxy]:
    ssh = {**mitogen_ssh_host.serialized(), "name": "a"}
    contexts = {"local": LOCAL, "ssh": ssh, "behind a hop": {**LOCAL, "via": ssh}}
    with Proxy(contexts[request.param]) as proxy:
        yield proxy


def test_a_function_beside_a_handler_runs_with_all_that_it_imports(
    proxy: Proxy, remote: types.ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    expected = ["helped", "inmanta_plugins.webapp.deep.inner", [1], "late", "leaf"]
    assert proxy.remote_call(remote.all_of_it) == expected
    assert not caplog.records


@pytest.mark.parametrize(
    "name",
    [
        "toplevel_canary", "inmanta", "inmanta.resources", "inmanta_plugins.webapp.secret",
        "inmanta_plugins.needy.between", "toplevel_tool.unneeded", "pytest", "ansible_mitogen",
        "inmanta_plugins.mitogen.connections.hub", "test_serve", "conftest", "yaml",
    ],
)  # fmt: skip
def test_any_other_module_is_refused(
    name: str, proxy: Proxy, remote: types.ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    assert proxy.remote_call(remote.all_of_it)
    for _ in range(2):
        proxy.remote_call(hostile_side.request_module, name.encode())
    assert proxy.remote_call(remote.pid)
    sent, _ = proxy.remote_call(hostile_side.held_modules)
    assert name not in sent
    logged = [record.getMessage() for record in caplog.records if name in record.getMessage()]
    assert len(logged) <= 1
    if logged:  # a context behind a hop asks the hop, by messages that only it can send
        assert f"Host a asked for the module '{name}', which nothing" in logged[0]
        assert "allow_modules" in logged[0]


def test_a_refusal_is_logged_once_with_the_host_and_the_module(
    remote: types.ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    with Proxy(LOCAL) as proxy:
        for _ in range(3):
            with pytest.raises(RemoteException, match="unable to serve 'toplevel_canary'"):
                proxy.remote_call(remote.by_name, "toplevel_canary")
            proxy.remote_call(hostile_side.request_module, b"toplevel_canary")
        assert proxy.remote_call(remote.pid)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "Host a asked for the module 'toplevel_canary', which nothing that was called there needs"
    )


def test_what_is_refused_stays_few_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with Proxy(LOCAL) as proxy:
        for number in range(serve.MOST_REFUSALS + 50):
            proxy.remote_call(hostile_side.request_module, b"canary%d" % number)
        assert proxy.run("true")[2] == 0
    assert len(caplog.records) == serve.MOST_REFUSALS


@pytest.mark.parametrize(
    "name",
    [
        b"", b".", b"..", b"a..b", b".a", b"a\0b", b"\xff\xfe", b"../etc/passwd", b"/etc/passwd",
        b"a" * 1024 * 1024, b"a." * 200, b"toplevel_canary\n", b" toplevel_canary", b"%s%n",
        "inmanta_plugins.webapp.remote\u200b".encode(), b"__main__", b"builtins",
    ],
    ids=lambda name: ascii(name[:20]),
)  # fmt: skip
def test_a_name_that_is_none_is_refused(
    name: bytes, remote: types.ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    with Proxy(LOCAL) as proxy:
        assert proxy.remote_call(remote.all_of_it)
        before, _ = proxy.remote_call(hostile_side.held_modules)
        proxy.remote_call(hostile_side.request_module, name)
        assert proxy.remote_call(remote.pid)
        after, _ = proxy.remote_call(hostile_side.held_modules)
    assert set(after) == set(before)
    assert len(caplog.records) <= 1
    for record in caplog.records:
        assert len(record.getMessage()) < 600
        assert "\0" not in record.getMessage()


def test_data_files_are_refused(remote: types.ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    with Proxy(LOCAL) as proxy:
        assert proxy.remote_call(remote.all_of_it)
        for package, name in (("inmanta_plugins.webapp", "data.txt"), ("inmanta", "py.typed")):
            assert not proxy.remote_call(hostile_side.get_resource, package, name)
        assert proxy.remote_call(remote.pid)
    assert len(caplog.records) == 2
    assert "its file data.txt" in caplog.text


def test_a_host_gets_nothing_that_another_one_may_have(remote: types.ModuleType) -> None:
    other = importlib.import_module("other_tool").other
    with Proxy(LOCAL) as proxy, Proxy({**LOCAL, "name": "the-other-host"}) as second:
        assert second.remote_call(other) == "other"
        assert proxy.remote_call(remote.all_of_it)
        for name in ("other_tool", "toplevel_tool.part.leaf"):
            second.remote_call(hostile_side.request_module, name.encode())
            proxy.remote_call(hostile_side.request_module, name.encode())
        assert second.remote_call(other) == "other"
        told = proxy.remote_call(hostile_side.held_texts)
        first, _ = proxy.remote_call(hostile_side.held_modules)
        other_one, _ = second.remote_call(hostile_side.held_modules)
    assert "toplevel_tool.part.leaf" in first
    assert "other_tool" not in first
    assert "other_tool" in other_one
    assert "toplevel_tool.part.leaf" not in other_one
    for leak in ("the-other-host", "needy", "secret", "canary"):
        assert leak not in told


def test_a_host_is_told_nothing_of_the_agents_files(
    agent: pathlib.Path, remote: types.ModuleType
) -> None:
    with Proxy(LOCAL) as proxy:
        assert proxy.remote_call(remote.all_of_it)
        told = proxy.remote_call(hostile_side.held_texts)
    assert str(agent) not in told


def test_more_can_be_allowed(remote: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_explicit", set())
    with Proxy(LOCAL) as proxy:
        allow_modules("toplevel_canary")
        assert proxy.remote_call(remote.by_name, "toplevel_canary") == "toplevel_canary"


def test_what_was_refused_is_sent_when_it_is_needed_after_all(
    proxy: Proxy, remote: types.ModuleType
) -> None:
    with pytest.raises(RemoteException, match="unable to serve 'other_tool'"):
        proxy.remote_call(remote.by_name, "other_tool")
    other = importlib.import_module("other_tool").other
    assert proxy.remote_call(other) == "other"


def test_a_compiled_module_fails_by_name(
    agent: pathlib.Path, remote: types.ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (agent / f"only_compiled{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"\x7fELF")
    with (
        Proxy(LOCAL) as proxy,
        pytest.raises(RemoteException, match="unable to serve 'only_compiled'.*native"),
    ):
        proxy.remote_call(remote.compiled)
    assert "'only_compiled', which has no Python source on the agent" in caplog.text


# Before anything is sent


def test_a_function_whose_file_needs_inmanta_fails_before_it_is_sent() -> None:
    # As an agent has it: what it imports can be imported here.
    never = importlib.import_module("inmanta_plugins.needy.remote").never
    with Proxy(LOCAL) as proxy, pytest.raises(TypeError) as caught:
        proxy.remote_call(never)
    assert str(caught.value) == (
        "inmanta_plugins.needy.remote.never cannot be called on a host:"
        " inmanta_plugins.needy.remote imports inmanta_plugins.needy.between imports"
        " inmanta.resources, which hosts do not have."
        " Move it to a file that needs nothing but the standard library."
    )


def test_a_function_of_an_init_below_inmanta_plugins_fails_before_it_is_sent() -> None:
    in_init = importlib.import_module("inmanta_plugins.needy").in_init
    with Proxy(LOCAL) as proxy, pytest.raises(TypeError, match=r"stands in the __init__\.py of"):
        proxy.remote_call(in_init)


# What is found in sources


def test_nothing_is_imported_to_find_what_is_needed(agent: pathlib.Path) -> None:
    (agent / "big_tool").mkdir()
    (agent / "big_tool" / "__init__.py").write_text("raise SystemExit('imported')\n")
    (agent / "big_tool" / "part.py").write_text("import json\n")
    (agent / "user_of_big.py").write_text("def use():\n    import big_tool.part\n")
    needed, _ = modules.needed("user_of_big")
    assert set(needed) == {"user_of_big", "big_tool", "big_tool.part"}


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("import toplevel_tool.part.leaf", {"toplevel_tool.part", "toplevel_tool.part.leaf"}),
        ("from toplevel_tool import part", {"toplevel_tool.part"}),
        ("from toplevel_tool import TOP", set()),
        (
            "from toplevel_tool.part.leaf import *",
            {"toplevel_tool.part", "toplevel_tool.part.leaf"},
        ),
        ("import importlib\nimportlib.import_module('other_tool')", {"other_tool"}),
        ("if False:\n    import other_tool", {"other_tool"}),
        ("class A:\n    import other_tool", {"other_tool"}),
        ("from .... import other_tool", None),
        ("this is no Python", None),
        ("import inmanta", None),
    ],
)
def test_what_a_statement_imports_is_found(
    statement: str, found: set[str] | None, agent: pathlib.Path
) -> None:
    (agent / "probe_module.py").write_text(statement + "\n")
    needed, _ = modules.needed("probe_module")
    tops = {"toplevel_tool"} if statement.count("toplevel_tool") else set()
    assert set(needed) - {"probe_module"} == (tops | found if found is not None else set())


@pytest.mark.parametrize(
    ("source", "chain"),
    [
        ("import inmanta.const", ["probe_module", "inmanta.const"]),
        ("def f():\n    import inmanta.const", None),
        ("try:\n    import inmanta\nexcept ImportError:\n    pass", None),
        ("import contextlib\nwith contextlib.suppress(ImportError):\n    import inmanta", None),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import inmanta", None),
        ("import json", None),
    ],
)
def test_only_what_is_certainly_imported_keeps_a_file_from_hosts(
    source: str, chain: list[str] | None, agent: pathlib.Path
) -> None:
    (agent / "probe_module.py").write_text(source + "\n")
    assert modules.chain_to_inmanta("probe_module") == chain


def test_a_module_that_was_changed_is_sent_anew(
    proxy: Proxy, agent: pathlib.Path, remote: types.ModuleType
) -> None:
    module = importlib.import_module("other_tool")
    assert proxy.remote_call(module.other) == "other"
    (agent / "other_tool.py").write_text(
        "import toplevel_canary\ndef other():\n    return 'new!'\n"
    )
    module = importlib.reload(module)
    assert proxy.remote_call(module.other) == "new!"


def test_mitogen_of_this_version_asks_for_modules_as_expected() -> None:
    # What serving rests on beyond mitogen's public interface.
    assert mitogen.core.GET_MODULE == 100
    assert mitogen.core.LOAD_MODULE
