"""Private names of mitogen: where they are used, and that the installed mitogen has them."""

import ast
import collections.abc
import importlib
import inspect
import pathlib
import re
import threading

import mitogen.core
import mitogen.master
import mitogen.parent
import mitogen.ssh
import pytest
from mitogen.master import Router

from inmanta_plugins.mitogen.hosts import modules

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "inmanta_plugins/mitogen"
SOURCES = [*sorted(PACKAGE.rglob("*.py")), *sorted((ROOT / "inmanta_mitogen").glob("*.py"))]
# What may use private names of mitogen.
PERMITTED = [
    PACKAGE / "_mitogen.py",
    *sorted((PACKAGE / "hosts").glob("*.py")),
    ROOT / "inmanta_mitogen/hop.py",
]
NAMES_OF_MITOGEN = {
    name
    for module in (mitogen.core, mitogen.parent, mitogen.master)
    for name in re.findall(r"\b_[a-z]\w*", inspect.getsource(module))
}


def parameters(function: collections.abc.Callable[..., object]) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.fixture
def router() -> collections.abc.Iterator[Router]:
    broker = mitogen.master.Broker(install_watcher=False)
    router = Router(broker)
    yield router
    broker.shutdown()
    broker.join()


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def foreign_names(path: pathlib.Path) -> set[str]:
    """Return the private names that a file uses as attributes, and does not define itself."""
    used, defined = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and private(node.attr):
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if of_self and isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
            else:
                used.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            used |= {str(arg.value) for arg in node.args[1:2] if isinstance(arg, ast.Constant)}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            defined |= {alias.asname or alias.name for alias in node.names}
    return {name for name in used - defined if private(name)} & NAMES_OF_MITOGEN


def overridden_names(path: pathlib.Path) -> set[str]:
    """Return the private names that classes of a file override in mitogen's classes."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    module = importlib.import_module(name.removesuffix(".__init__"))
    classes = [one for one in vars(module).values() if inspect.isclass(one)]
    return {
        name
        for one in classes
        for base in one.__mro__[1:]
        if one.__module__ == module.__name__ and base.__module__.startswith("mitogen.")
        for name in vars(one).keys() & vars(base).keys()
        if private(name)
    }


def test_private_names_are_used_only_where_they_may_be() -> None:
    used = {path: foreign_names(path) for path in SOURCES if path not in PERMITTED}
    assert {path: names for path, names in used.items() if names} == {}


def test_each_private_name_of_mitogen_is_one_whose_form_is_tested() -> None:
    used = set().union(*(foreign_names(path) | overridden_names(path) for path in PERMITTED))
    assert used == {name for _, name in FUNCTIONS} | MADE_WITH_A_ROUTER.keys()


core, parent = mitogen.core, mitogen.parent

FUNCTIONS: dict[tuple[object, str], str] = {
    (core.Latch, "_on_fork"): "",
    (core.Side, "_on_fork"): "",
    (core, "_signals"): "obj signal",
    (parent, "_proxy_connect"): "name method_name kwargs econtext",
    (Router, "_connect"): "self klass kwargs",
    (Router, "_async_route"): "self msg in_stream",
    (mitogen.master.ModuleResponder, "_on_get_module"): "self msg",
    (parent.RouteMonitor, "_on_add_route"): "self msg",
    (parent.RouteMonitor, "_on_del_route"): "self msg",
    (parent.Connection, "_fail_connection"): "self exc",
    (core.MitogenProtocol, "_send"): "self msg",
}
"""Functions of modules and classes, with the names of their parameters."""


@pytest.mark.parametrize(("owner", "name"), FUNCTIONS)
def test_the_installed_mitogen_has_the_function(owner: object, name: str) -> None:
    assert parameters(getattr(owner, name)) == FUNCTIONS[owner, name].split()


def test_connections_of_the_installed_mitogen_have_what_is_overridden() -> None:
    connection = parent.Connection
    for name in ("_on_timer_expired", "_complete_connection", "stderr_stream_factory"):
        assert parameters(getattr(connection, name)) == ["self"]
    assert parameters(mitogen.ssh.Connection._requires_pty) == ["self"]
    source = inspect.getsource(connection._first_stage)
    for part in ("R,W=os.pipe()", "os.write(1,'MITO000", "f=os.fdopen(W", "os.close(2)"):
        assert part in source


def bootstrap(router: Router) -> mitogen.parent.BootstrapProtocol:
    return parent.BootstrapProtocol(router.broker)


def importer(router: Router) -> mitogen.core.Importer:
    return core.Importer(router, "its parent", "", core.ImportPolicy())


def protocol(router: Router) -> mitogen.core.MitogenProtocol:
    return core.MitogenProtocol(router, 1)


# With what makes the object that has it, and the type of the value.
MADE_WITH_A_ROUTER: dict[str, tuple[collections.abc.Callable[[Router], object], type]] = {
    "_write_lock": (lambda router: router, type(threading.Lock())),
    "_context_by_id": (lambda router: router, dict),
    "_stream_by_id": (lambda router: router, dict),
    "_handles_by_respondent": (lambda router: router, dict),
    "_handle_map": (lambda router: router, dict),
    "_alive": (lambda router: router.broker, bool),
    "_present": (importer, dict),
    "_context": (importer, str),
    "_input_buf": (protocol, collections.deque),
    "_input_buf_len": (protocol, int),
    "_trailer": (bootstrap, bytes),
    "_writer": (bootstrap, core.BufferedWriter),
    "_len": (lambda router: bootstrap(router)._writer, int),
    "_preexec_hook": (lambda router: parent, type(None)),
}


@pytest.mark.parametrize("name", MADE_WITH_A_ROUTER)
def test_the_installed_mitogen_has_the_attribute(name: str, router: Router) -> None:
    make, kind = MADE_WITH_A_ROUTER[name]
    assert isinstance(getattr(make(router), name), kind)


def without_docstrings(tree: ast.AST) -> str:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [
                one
                for one in node.body
                if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))
            ]
    return ast.dump(tree, include_attributes=True)


@pytest.mark.parametrize("path", sorted((ROOT / "inmanta_mitogen").glob("*.py")), ids=str)
def test_a_host_gets_the_code_of_our_files_on_the_lines_that_it_has_here(
    path: pathlib.Path,
) -> None:
    module = modules.find(f"inmanta_mitogen.{path.stem}".removesuffix(".__init__"))
    assert module is not None
    sent, source = module.sent_source.decode(), path.read_text()
    assert without_docstrings(ast.parse(sent)) == without_docstrings(ast.parse(source))
    assert '"""' not in sent


def test_attributes_are_documented_by_a_string_below_them() -> None:
    others = re.compile(r"^ *(#: |:attr )", re.MULTILINE)
    assert not [source for source in SOURCES if others.search(source.read_text())]
