"""Which of the agent's modules a host gets, and which it doesn't."""

import collections.abc
import importlib
import importlib.util
import logging
import os
import pathlib
import pickle
import re
import sys
import types

import hostile_side
import mitogen.core
import pytest

import support
from inmanta_plugins.mitogen import Proxy, RemoteException, allow_modules
from inmanta_plugins.mitogen.hosts import modules
from inmanta_plugins.mitogen.hosts import served as serve
from inmanta_plugins.mitogen.settings import MOST_REFUSALS, MOST_REJECTED
from pytest_inmanta_mitogen import SshHost
from support import LOCAL

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
        except ModuleNotFoundError:
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

        def data():
            import importlib.resources

            return importlib.resources.read_binary("inmanta_plugins.webapp", "data.txt").decode()

        def loaded():
            import sys

            return sorted(sys.modules)

        def lacking():
            import nowhere_at_all

            return nowhere_at_all

        def broken():
            raise ValueError("of its own")

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
    "inmanta_plugins/webapp/data.txt": "data of webapp\n",
    "inmanta_plugins/needy/__init__.py": "import inmanta\ndef in_init():\n    return 1\n",
    "inmanta_plugins/needy/remote.py": """
        from inmanta_plugins.needy.between import x

        def never():
            return x.__name__
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
    support.write_files(tmp_path, FILES)
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = importlib.import_module("inmanta_plugins")
    monkeypatch.setattr(plugins, "__path__", [*plugins.__path__, str(tmp_path / "inmanta_plugins")])
    yield tmp_path
    own = ("toplevel_", "other_tool", "inmanta_plugins.webapp", "inmanta_plugins.needy")
    for name in [name for name in sys.modules if name.startswith(own)]:
        del sys.modules[name]


@pytest.fixture
def remote() -> types.ModuleType:
    return importlib.import_module("inmanta_plugins.webapp.remote")


@pytest.fixture
def local() -> collections.abc.Iterator[Proxy]:
    with Proxy(LOCAL) as proxy:
        yield proxy


@pytest.fixture(params=["ssh", "behind a hop"])
def proxy(
    request: pytest.FixtureRequest, mitogen_ssh_host: SshHost
) -> collections.abc.Iterator[Proxy]:
    ssh = mitogen_ssh_host.serialized(name="here")
    with Proxy(ssh if request.param == "ssh" else {**LOCAL, "via": ssh}) as proxy:
        yield proxy


def request_modules(proxy: Proxy, *names: bytes) -> None:
    for name in names:
        proxy.remote_call(hostile_side.request_module, name)


def test_a_function_beside_a_handler_runs_with_all_that_it_imports(
    proxy: Proxy, remote: types.ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    expected = ["helped", "inmanta_plugins.webapp.deep.inner", [1], "late", "leaf"]
    assert proxy.remote_call(remote.all_of_it) == expected
    assert proxy.remote_call(remote.data) == "data of webapp\n"
    assert not caplog.records


OTHERS = [
    "toplevel_canary", "inmanta", "inmanta.resources", "inmanta_plugins.webapp.secret",
    "inmanta_plugins.needy.between", "toplevel_tool.unneeded", "pytest", "ansible_mitogen",
    "inmanta_plugins.mitogen.connections.hub", "test_serve", "conftest", "yaml",
]  # fmt: skip
"""What nothing needs that was called."""


def test_any_other_module_is_refused(proxy: Proxy, remote: types.ModuleType) -> None:
    assert proxy.remote_call(remote.all_of_it)
    request_modules(proxy, *(name.encode() for name in OTHERS))
    assert proxy.remote_call(remote.pid)
    sent, _ = proxy.remote_call(hostile_side.held_modules)
    assert not set(OTHERS) & set(sent)


def test_a_refusal_is_logged_once_with_the_host_and_the_module(
    local: Proxy, remote: types.ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        with pytest.raises(RemoteException, match="unable to serve 'toplevel_canary'"):
            local.remote_call(remote.by_name, "toplevel_canary")
        request_modules(local, b"toplevel_canary")
    assert local.remote_call(remote.pid)
    (record,) = caplog.records
    expected = "Host here asked for the module 'toplevel_canary', which nothing that was called"
    assert record.getMessage().startswith(f"{expected} there needs")
    assert "allow_modules" in record.getMessage()


def test_what_is_refused_stays_few_in_the_log(
    local: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="inmanta_plugins.mitogen.hosts.served")
    request_modules(local, *(b"canary%d" % number for number in range(MOST_REFUSALS + 50)))
    assert local.run("true")[2] == 0
    assert len(caplog.records) == MOST_REFUSALS


def test_a_name_that_is_none_is_refused(
    local: Proxy, remote: types.ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    assert local.remote_call(remote.all_of_it)
    before = local.remote_call(hostile_side.held_modules)[0]
    for name in (
        b"", b".", b"..", b"a..b", b".a", b"a\0b", b"\xff\xfe", b"../etc/passwd", b"/etc/passwd",
        b"a" * 1024 * 1024, b"a." * 200, b"toplevel_canary\n", b" toplevel_canary", b"%s%n",
        "inmanta_plugins.webapp.remote\u200b".encode(), b"__main__", b"builtins",
    ):  # fmt: skip
        caplog.clear()
        request_modules(local, name)
        assert local.remote_call(remote.pid)
        assert local.remote_call(hostile_side.held_modules)[0] == before
        assert len(caplog.records) <= 1
        for record in caplog.records:
            assert len(record.getMessage()) < 600
            assert "\0" not in record.getMessage()


def test_a_data_file_is_refused_where_its_package_is(
    local: Proxy, agent: pathlib.Path, remote: types.ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (agent / "toplevel_tool" / "data.txt").write_text("canary")
    os.symlink("/etc/passwd", agent / "inmanta_plugins" / "webapp" / "link.py")
    assert local.remote_call(remote.pid)
    for package, name in (
        ("inmanta_plugins.needy", "remote.py"), ("inmanta", "py.typed"),
        ("inmanta_plugins.webapp", "secret.py"), ("inmanta_plugins.webapp", "link.py"),
        ("inmanta_plugins.webapp", "../needy/remote.py"), ("inmanta_plugins.webapp", ".."),
        ("inmanta_plugins.webapp", "/etc/passwd"), ("inmanta_plugins.webapp", "none.txt"),
        ("inmanta_plugins.webapp", "deep"), ("inmanta_plugins.webapp", ""), ("", ""),
    ):  # fmt: skip
        assert not local.remote_call(hostile_side.get_resource, package, name)
    assert local.remote_call(remote.pid)
    assert "(its file secret.py)" in caplog.text


DOUBLING = b"".join(b"\x94h%c\x86" % number for number in range(60))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x80\x02)" + b"\x85" * 230_000 + b".", id="nested"),
        pytest.param(b"\x80\x04)" + DOUBLING + b".", id="doubling"),
        pytest.param(pickle.dumps(("inmanta_plugins.webapp", "x" * 3_000)), id="long"),
        pytest.param(pickle.dumps(("inmanta_plugins.webapp", 1)), id="a number"),
        pytest.param(b"", id="empty"),
    ],
)
def test_a_request_for_a_data_file_holds_up_nobody(
    data: bytes, local: Proxy, remote: types.ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    local.remote_call(hostile_side.send, mitogen.core.GET_RESOURCE, data)
    assert local.remote_call(remote.pid)
    assert "a data file that can't be one: refused" in caplog.text


@pytest.mark.parametrize("which", ["module", "data file"])
def test_a_host_that_asks_for_the_same_again_and_again_is_cut_off(
    which: str, local: Proxy, remote: types.ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    handle, data = {
        "module": (mitogen.core.GET_MODULE, b"inmanta_plugins.webapp.remote"),
        "data file": (
            mitogen.core.GET_RESOURCE,
            pickle.dumps(("inmanta_plugins.webapp", "data.txt"), 2),
        ),
    }[which]
    assert local.remote_call(remote.pid)
    with pytest.raises(RemoteException, match="connection was lost"):
        local.remote_call(hostile_side.send, handle, data, MOST_REJECTED + 50_000)
    assert "it is cut off" in caplog.text


def test_of_mitogen_a_host_gets_what_there_is_and_nothing_is_imported_for_it(
    local: Proxy, remote: types.ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    assert local.remote_call(remote.pid)
    cache = local.context.router.responder._cache
    known, loaded = len(cache), set(sys.modules)
    request_modules(local, *(b"mitogen.x%d" % number for number in range(200)))
    request_modules(local, b"mitogen.parent.os", b"mitogen.ansible_mitogen", b"mitogen.sudo")
    assert local.remote_call(remote.pid)
    sent, _ = local.remote_call(hostile_side.held_modules)
    assert len(cache) < known + 10
    assert "mitogen.sudo" in sent
    assert not {name for name in set(sys.modules) - loaded if name.startswith("mitogen.")}
    assert not caplog.records


def test_a_host_gets_nothing_that_another_one_may_have(
    local: Proxy, agent: pathlib.Path, remote: types.ModuleType
) -> None:
    other = importlib.import_module("other_tool").other
    with Proxy({**LOCAL, "name": "the-other-host"}) as second:
        assert second.remote_call(other) == "other"
        assert local.remote_call(remote.all_of_it)
        for proxy in (second, local):
            request_modules(proxy, b"other_tool", b"toplevel_tool.part.leaf")
        assert second.remote_call(other) == "other"
        told = local.remote_call(hostile_side.held_texts)
        first, _ = local.remote_call(hostile_side.held_modules)
        other_one, _ = second.remote_call(hostile_side.held_modules)
    assert "toplevel_tool.part.leaf" in first
    assert "other_tool" not in first
    assert "other_tool" in other_one
    assert "toplevel_tool.part.leaf" not in other_one
    for leak in ("the-other-host", "needy", "secret", "canary", str(agent)):
        assert leak not in told


def test_more_can_be_allowed(
    local: Proxy, remote: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_explicit", set())
    allow_modules("toplevel_canary")
    assert local.remote_call(remote.by_name, "toplevel_canary") == "toplevel_canary"


def test_what_was_refused_is_sent_when_it_is_needed_after_all(
    proxy: Proxy, remote: types.ModuleType
) -> None:
    with pytest.raises(RemoteException, match="unable to serve 'other_tool'"):
        proxy.remote_call(remote.by_name, "other_tool")
    other = importlib.import_module("other_tool").other
    assert proxy.remote_call(other) == "other"


def test_mitogens_own_call_of_a_function_works(local: Proxy, remote: types.ModuleType) -> None:
    assert local.context.call(remote.all_of_it)
    other = importlib.import_module("other_tool").other
    assert local.context.call_async(other).get().unpickle() == "other"


def test_a_compiled_module_fails_by_name(
    local: Proxy, agent: pathlib.Path, remote: types.ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (agent / f"only_compiled{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"\x7fELF")
    with pytest.raises(RemoteException, match="unable to serve 'only_compiled'.*native"):
        local.remote_call(remote.compiled)
    assert "'only_compiled', which has no Python source on the agent" in caplog.text


# What needs inmanta

WITHOUT_INMANTA = {**LOCAL, "python_path": [support.interpreter_for_everyone()]}


def test_a_function_whose_file_or_package_needs_inmanta_runs_where_there_is_one(
    local: Proxy,
) -> None:
    never = importlib.import_module("inmanta_plugins.needy.remote").never
    assert local.remote_call(never) == "resource"
    in_init = importlib.import_module("inmanta_plugins.needy").in_init
    assert local.remote_call(in_init) == 1


@pytest.mark.parametrize(
    ("module", "function", "reason"),
    [
        ("inmanta_plugins.needy.remote", "never", "imports inmanta, which the host's Python"),
        ("inmanta_plugins.needy", "in_init", r"__init__\.py of inmanta_plugins.needy is empty on"),
        ("inmanta_plugins.webapp.remote", "lacking", "have the module nowhere_at_all, and the"),
        ("inmanta_plugins.webapp.remote", "broken", None),
    ],
)
def test_there_is_advice_for_a_function_whose_module_lacks_something_on_the_host(
    module: str, function: str, reason: str | None
) -> None:
    called = getattr(importlib.import_module(module), function)
    with Proxy(WITHOUT_INMANTA) as proxy, pytest.raises(RemoteException) as caught:
        proxy.remote_call(called)
    told = str(caught.value) != str(caught.value.remote_exception)
    assert told == (reason is not None)
    assert re.search(reason or "", str(caught.value))


def test_what_a_package_of_handlers_imports_is_not_loaded_for_a_function_beside_it(
    local: Proxy, remote: types.ModuleType
) -> None:
    assert "inmanta" not in local.remote_call(remote.loaded)


# What is found in sources


def imports_of_probe_module() -> frozenset[str]:
    module = modules.find("probe_module")
    assert module is not None
    return module.imports


def test_nothing_is_imported_to_find_what_is_needed(agent: pathlib.Path) -> None:
    (agent / "big_tool").mkdir()
    (agent / "big_tool" / "__init__.py").write_text("raise SystemExit('imported')\n")
    (agent / "big_tool" / "part.py").write_text("import json\n")
    (agent / "probe_module.py").write_text("def use():\n    import big_tool.part\n")
    assert imports_of_probe_module() == {"big_tool", "big_tool.part"}
    assert modules.find("big_tool.part") is not None


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("import toplevel_tool.part.leaf", {"toplevel_tool.part.leaf", "toplevel_tool.part"}),
        ("from toplevel_tool import part", {"toplevel_tool.part"}),
        ("from toplevel_tool.part.leaf import *", {"toplevel_tool.part.leaf"}),
        ("import importlib\nimportlib.import_module('other_tool')", {"other_tool"}),
        ("if False:\n    import other_tool", {"other_tool"}),
        ("class A:\n    import other_tool", {"other_tool"}),
        ("from .... import other_tool", set()),
        ("this is no Python", set()),
    ],
)
def test_what_a_statement_imports_is_found(
    statement: str, found: set[str], agent: pathlib.Path
) -> None:
    (agent / "probe_module.py").write_text(statement + "\n")
    assert found <= imports_of_probe_module() if found else not imports_of_probe_module()


def test_a_module_that_was_changed_is_sent_anew(proxy: Proxy, agent: pathlib.Path) -> None:
    module = importlib.import_module("other_tool")
    assert proxy.remote_call(module.other) == "other"
    (agent / "other_tool.py").write_text(
        "import toplevel_canary\ndef other():\n    return 'new!'\n"
    )
    module = importlib.reload(module)
    assert proxy.remote_call(module.other) == "new!"
