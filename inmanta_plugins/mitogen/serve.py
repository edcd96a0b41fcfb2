"""Which of the agent's modules a host gets: those that the functions called there need.

A mitogen host asks its agent for each module that it does not have itself, and a plain router
serves all that can be imported on the agent. Here a host is served the module of each function that
was called on it, what that imports in turn, and mitogen. Anything else is refused.

Packages below ``inmanta_plugins`` are served blank, without their ``__init__.py``: so a function
that stands in a file beside a handler runs on hosts, which have no inmanta.
"""

import ast
import functools
import importlib.util
import logging
import pkgutil
import sys
import threading
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import mitogen.core
import mitogen.master

LOGGER = logging.getLogger(__name__)

# What no host is served, whatever imports it: the orchestrator itself.
_NEVER = frozenset({"inmanta"})
_PLUGINS = "inmanta_plugins"
# Run first in each interpreter: what is called there must be the agent's own version of it, even
# where the host has one installed. Mitogen's own overrides can't say that: they would also keep
# the host from importing anything else.
PREPARE_HOST = """
import sys
for finder in sys.meta_path:
    if type(finder).__module__ == 'mitogen.core':
        finder.policy.overriden = lambda fullname: (
            fullname.split('.')[0] in ('inmanta_mitogen', 'inmanta_plugins')
        )
"""
# How many names that were refused are remembered for each host, so as to log each once.
_MOST_REFUSALS = 100

_explicit: set[str] = set()


def allow_modules(*names: str) -> None:
    """
    Let every host that asks for it have a module, beyond those that called functions import.

    Needed only for what is imported by a computed name (``importlib.import_module(name)``): all
    that an ``import`` statement names is found without it. It holds for this process; call it at
    the top level of the module that has the handler.

    :param names: The full names of modules; what each imports comes along. Submodules of a package
        are named one by one.
    """
    _explicit.update(names)


class UnservableError(TypeError):
    """A function can't be called on a host since its file needs what hosts don't have."""


class _Imports(ast.NodeVisitor):
    """Collects what the import statements of a module name."""

    def __init__(self, package: str) -> None:
        self._package = package
        self._optional = 0
        self.names: dict[str, bool] = {}
        """Each name, and whether the module can't be imported without it."""

    def _add(self, name: str, *, required: bool = True) -> None:
        self.names[name] = self.names.get(name, False) or (required and not self._optional)

    def visit_Import(self, node: ast.Import) -> None:  # as ast calls it
        for alias in node.names:
            self._add(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:  # as ast calls it
        base = node.module or ""
        if node.level:
            base = importlib.util.resolve_name("." * node.level + base, self._package)
        self._add(base)
        for alias in node.names:
            self._add(f"{base}.{alias.name}", required=False)  # a module, or anything else in it

    def _visit_optional(self, node: ast.AST) -> None:
        self._optional += 1
        self.generic_visit(node)
        self._optional -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _visit_optional  # noqa: N815
    visit_Try = _visit_optional  # noqa: N815

    def visit_If(self, node: ast.If) -> None:  # as ast calls it
        if "TYPE_CHECKING" not in ast.dump(node.test):
            self.generic_visit(node)
        for other in node.orelse if "TYPE_CHECKING" in ast.dump(node.test) else ():
            self.visit(other)


def _source(name: str) -> tuple[str, str] | None:
    """The path and the source of a module; None where there is no module with a source."""
    module = sys.modules.get(name)
    try:
        spec = getattr(module, "__spec__", None) or importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        if hasattr(spec.loader, "get_source"):
            source = spec.loader.get_source(name)
        else:  # a loader that makes changes of its own, such as pytest's
            with tokenize.open(str(spec.origin)) as file:
                source = file.read()
    except Exception:
        # Import hooks raise what they like for a name that is no module.
        return None
    return None if source is None else (str(spec.origin), source)


def _is_package(name: str) -> bool:
    return hasattr(sys.modules.get(name), "__path__")


@functools.lru_cache(maxsize=4096)
def _imports(name: str) -> dict[str, bool]:
    if name.split(".")[0] == _PLUGINS and _is_package(name):
        return {}  # served blank
    found = _source(name)
    if found is None:
        return {}
    package = name if _is_package(name) else name.rpartition(".")[0]
    imports = _Imports(package)
    imports.visit(ast.parse(found[1]))
    return imports.names


def _is_served(name: str) -> bool:
    """Whether a host that needs it gets it from here, and not from itself or from mitogen."""
    top = name.split(".")[0]
    return top not in sys.stdlib_module_names and top not in _NEVER and top != "mitogen"


def _lineage(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


@functools.lru_cache(maxsize=4096)
def needed_modules(name: str) -> frozenset[str]:
    """
    :param name: The full name of a module.
    :return: The module, its parents, and all that they import in turn, without the standard
        library, which hosts have, and without inmanta, which they don't get.
    """
    found: set[str] = set()
    seen: set[str] = set()
    stack = [name]
    while stack:
        for part in _lineage(stack.pop()):
            if part in seen or not _is_served(part):
                continue
            seen.add(part)
            if _is_package(part) or _source(part) is not None:
                found.add(part)
                stack.extend(_imports(part))
    return frozenset(found)


@functools.lru_cache(maxsize=1024)
def check_servable(function: Callable[..., object]) -> None:
    """
    :param function: A function to be called on a host.
    :raises UnservableError: Its file, or one that this imports, needs inmanta.
    """
    module = function.__module__
    where = f"{module}.{function.__qualname__} cannot be called on a host"
    remedy = "Move it to a file that needs nothing but the standard library."
    if module.split(".")[0] == _PLUGINS and _is_package(module):
        raise UnservableError(
            f"{where}: it stands in the __init__.py of {module}, which hosts get blank. {remedy}"
        )
    seen: set[str] = set()
    stack = [(module, module)]
    while stack:
        name, chain = stack.pop()
        if name.split(".")[0] in _NEVER:
            raise UnservableError(f"{where}: {chain}, which hosts do not have. {remedy}")
        if name in seen or not _is_served(name):
            continue
        seen.add(name)
        required = [other for other, needed in _imports(name).items() if needed]
        stack.extend((other, f"{chain} imports {other}") for other in required)


class ServedModules(mitogen.core.ImportPolicy):  # type: ignore[misc]  # mitogen is not typed
    """
    The modules that each host of a router may have.

    :param router: The router whose hosts are served.
    """

    def __init__(self, router: mitogen.master.Router) -> None:
        super().__init__()
        self._router = router
        self._lock = threading.Lock()
        # By the id of the context at the agent's end of a stream: it asks for those behind it.
        self._allowed: dict[int, frozenset[str]] = {}
        self._refused: dict[int, set[str]] = {}
        self._asking = frozenset[str]()
        router.responder.policy = self
        for handle, handler in (
            (mitogen.core.GET_MODULE, self._on_get_module),
            (mitogen.core.GET_RESOURCE, self._on_get_resource),
        ):
            router.add_handler(handler, handle=handle, overwrite=True)

    def allow(self, host: int, function: Callable[..., object]) -> None:
        """
        Let a host have what a function needs.

        :param host: The id of the context that is next to the agent.
        :param function: The function that is called there, or behind it.
        :raises UnservableError: The function's file needs what hosts don't have.
        """
        check_servable(function)
        module = function.__module__
        allowed = self._allowed.get(host, frozenset())
        if module in allowed or not _is_served(module):
            return
        needed = needed_modules(module)
        self._override_plugins(needed)
        with self._lock:
            self._allowed[host] = self._allowed.get(host, frozenset()) | needed

    def forget(self, host: int) -> None:
        """
        :param host: The id of a context next to the agent that has ended.
        """
        with self._lock:
            self._allowed.pop(host, None)
            self._refused.pop(host, None)

    def denied(self, fullname: str) -> Any:
        """
        :param fullname: The name of a module that comes along with one that a host asked for.
        :return: False when the host may have it, else the exception that mitogen is to raise.
        """
        if self._may_have(self._asking, fullname):
            return False
        return mitogen.core.ModuleDeniedByOverridesError

    @staticmethod
    def _may_have(allowed: frozenset[str], fullname: str) -> bool:
        if fullname.split(".")[0] == "mitogen" or fullname in allowed:
            return True
        return any(fullname in needed_modules(name) for name in _explicit)

    # On the broker's thread

    def _on_get_module(self, msg: mitogen.core.Message) -> None:
        if msg.is_dead:
            return
        # The public interface ends here: what follows is how mitogen's responder serves a host.
        responder = self._router.responder
        fullname = msg.data.decode("utf-8", "replace")
        self._asking = self._allowed.get(msg.src_id, frozenset())
        if self._may_have(self._asking, fullname):
            responder._on_get_module(msg)
            return
        self._log_refusal(msg.src_id, fullname)
        stream = self._router.stream_by_id(msg.src_id)
        if stream is not None:
            responder._send_module_load_failed(stream, fullname)

    def _on_get_resource(self, msg: mitogen.core.Message) -> None:
        # Data files of packages: nothing that this module calls on a host has any.
        if msg.is_dead:
            return
        stream = self._router.stream_by_id(msg.src_id)
        try:
            package, resource = msg.unpickle()
            name = f"{package} (its file {resource})"
        except Exception:
            return
        self._log_refusal(msg.src_id, name[:200])
        if stream is not None:
            answer = mitogen.core.Message.pickled(
                (package, resource),
                None,
                dst_id=stream.protocol.remote_id,
                handle=mitogen.core.LOAD_RESOURCE,
            )
            stream.protocol.send(answer)

    def _log_refusal(self, host: int, fullname: str) -> None:
        top = fullname.split(".")[0]
        refused = self._refused.setdefault(host, set())
        if top in sys.stdlib_module_names or fullname in refused or len(refused) >= _MOST_REFUSALS:
            return  # of its own standard library a Python asks for what it was built without
        refused.add(fullname)
        context = self._router.context_by_id(host, create=False)
        LOGGER.warning(
            "Host %s asked for the module %s, which nothing that was called there needs: refused."
            " If a handler does need it there, name it in"
            " inmanta_plugins.mitogen.allow_modules.",
            (context and context.name) or host,
            ascii(fullname[:200]),
        )

    def _override_plugins(self, names: Iterable[str]) -> None:
        for name in sorted(names):
            if name.split(".")[0] != _PLUGINS:
                continue
            if name == _PLUGINS or _is_package(name):
                self._serve_blank(name)
            elif found := _source(name):
                path, source = found
                self._router.responder.add_source_override(name, path, source.encode(), False)

    def _serve_blank(self, package: str) -> None:
        module = sys.modules.get(package)
        prefix = f"{package}."
        children = {
            name[len(prefix) :]
            for name in list(sys.modules)
            if name.startswith(prefix) and "." not in name[len(prefix) :]
        }
        children |= {found.name for found in pkgutil.iter_modules(getattr(module, "__path__", ()))}
        # Not add_source_override: mitogen looks for the children in one directory, and those of
        # inmanta_plugins lie in many, some found by no path at all but by inmanta's own loader.
        self._router.responder._cache[package] = (
            package,
            sorted(children),
            f"blank/{package.replace('.', '/')}/__init__.py",
            mitogen.core.Blob(zlib.compress(b"", 9)),
            [],
        )
