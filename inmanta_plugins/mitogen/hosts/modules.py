"""What the modules of this process import, found in their sources: nothing is imported for it."""

import ast
import dataclasses
import functools
import importlib.machinery
import importlib.util
import os
import pkgutil
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping

PLUGINS = "inmanta_plugins"
"""The namespace package of the handlers, of which hosts get the packages blank."""

# What no host is served, whatever imports it: the orchestrator itself.
_NEVER = frozenset({"inmanta"})

Stamp = tuple[object, ...]
"""Tells one version of a module from another."""


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """A module of this process that can be sent to a host."""

    name: str
    source: str
    is_package: bool
    blank: bool
    """Whether hosts get it without its content."""
    stamp: Stamp
    path: tuple[str, ...]
    """Where its submodules are, for a package."""

    @functools.cached_property
    def imports(self) -> dict[str, bool]:
        """Each name that it imports, and whether it can't be imported without that."""
        if self.blank:
            return {}
        imports = _Imports(self.name if self.is_package else self.name.rpartition(".")[0])
        try:
            imports.visit(ast.parse(self.source))
        except (SyntaxError, ValueError, RecursionError):
            return {}  # it will fail on the host as it does here
        return imports.names

    def children(self) -> list[str]:
        """
        :return: The names of its submodules.
        """
        return [found.name for found in pkgutil.iter_modules(list(self.path))]


class _Imports(ast.NodeVisitor):
    """Collects what the import statements of a module name."""

    def __init__(self, package: str) -> None:
        self._package = package
        self._optional = 0
        self.names: dict[str, bool] = {}

    def _add(self, name: str, *, required: bool = True) -> None:
        self.names[name] = self.names.get(name, False) or (required and not self._optional)

    def visit_Import(self, node: ast.Import) -> None:  # as ast calls it
        for alias in node.names:
            self._add(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:  # as ast calls it
        base = node.module or ""
        if node.level:
            try:
                base = importlib.util.resolve_name("." * node.level + base, self._package)
            except ImportError:
                return  # beyond the top: it fails here too
        self._add(base)
        for alias in node.names:
            if alias.name != "*":
                # A module, or anything else in it.
                self._add(f"{base}.{alias.name}", required=False)

    def visit_Call(self, node: ast.Call) -> None:  # as ast calls it
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if called in ("import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                self._add(name.value, required=False)
        self.generic_visit(node)

    def _visit_optional(self, node: ast.AST) -> None:
        self._optional += 1
        self.generic_visit(node)
        self._optional -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _visit_optional  # noqa: N815
    visit_Try = visit_TryStar = _visit_optional  # noqa: N815

    def visit_With(self, node: ast.With) -> None:  # as ast calls it
        if any("suppress" in ast.dump(item.context_expr) for item in node.items):
            self._visit_optional(node)
        else:
            self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:  # as ast calls it
        if "TYPE_CHECKING" not in ast.dump(node.test):
            self.generic_visit(node)
            return
        for other in node.orelse:
            self.visit(other)


def is_served(name: str) -> bool:
    """
    :param name: The full name of a module.
    :return: Whether a host that needs it gets it from here, and not from itself or from mitogen.
    """
    top = name.split(".")[0]
    return top not in sys.stdlib_module_names and top not in _NEVER and top != "mitogen"


def _spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """The spec of a module. Other than importlib's own search it imports no parents."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    if isinstance(spec, importlib.machinery.ModuleSpec):
        return spec
    parent = name.rpartition(".")[0]
    path = None
    if parent:
        within = _spec(parent)
        if within is None or within.submodule_search_locations is None:
            return None
        path = list(within.submodule_search_locations)
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, path)
        except Exception:  # noqa: S112  # import hooks raise what they like for no module
            continue
        if spec is not None:
            return spec
    return None


def _stamp(name: str, spec: importlib.machinery.ModuleSpec) -> Stamp:
    try:
        status = os.stat(spec.origin or "")
        file: Stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
    except OSError:
        file = ()
    return (spec.origin, id(sys.modules.get(name)), *file)


def _read(name: str, spec: importlib.machinery.ModuleSpec) -> str | None:
    loader = spec.loader
    try:
        if hasattr(loader, "get_source"):
            source: str | bytes | None = loader.get_source(name)  # type: ignore[union-attr]  # it has
            # inmanta's loader gives the file as it is.
            return importlib.util.decode_source(source) if isinstance(source, bytes) else source
        # A loader that makes changes of its own, such as pytest's.
        with tokenize.open(str(spec.origin)) as file:
            return file.read()
    except Exception:
        return None


_found: dict[str, Module] = {}


def _is_parent(name: str, path: Iterable[str]) -> bool:
    """
    Whether a package below inmanta_plugins has modules in it, and is no file of an inmanta module:
    agents get each of these files as a package, ``on_host/__init__.py`` for ``on_host.py``.
    """
    return name.count(".") < 2 or any(pkgutil.iter_modules(list(path)))


def find(name: str) -> Module | None:
    """
    :param name: The full name of a module.
    :return: The module as it is now; None where there is none with a source.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        return None
    spec = _spec(name)
    if spec is None:
        return None
    stamp = _stamp(name, spec)
    known = _found.get(name)
    if known is not None and known.stamp == stamp:
        return known
    path = spec.submodule_search_locations
    blank = path is not None and name.split(".")[0] == PLUGINS and _is_parent(name, path)
    # A namespace package has no source, and needs none.
    empty = blank or (path is not None and spec.origin is None)
    source = "" if empty else _read(name, spec)
    if source is None:
        return None
    found = Module(name, source, path is not None, blank, stamp, tuple(path or ()))
    _found[name] = found
    return found


def _lineage(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _reachable(name: str) -> tuple[dict[str, Module], set[str]]:
    found: dict[str, Module] = {}
    absent: set[str] = set()
    stack = [name]
    while stack:
        for part in _lineage(stack.pop()):
            if part in found or part in absent or not is_served(part):
                continue
            module = find(part)
            if module is None:
                absent.add(part)
            else:
                found[part] = module
                stack.extend(module.imports)
    return found, absent


_needed: dict[str, tuple[dict[str, Module], set[str]]] = {}


def needed(name: str) -> tuple[Mapping[str, Module], set[str]]:
    """
    :param name: The full name of a module.
    :return: The module, its parents, and all that they import in turn, without the standard
        library, which hosts have, and without inmanta, which they don't get; and the names among
        them that have no source here.
    """
    known = _needed.get(name)
    if known is None or any(find(one) is not module for one, module in known[0].items()):
        known = _needed[name] = _reachable(name)
    return known


def certain(module: Module, among: Mapping[str, Module]) -> list[Module]:
    """
    :param module: A module.
    :param among: The modules to choose from.
    :return: What is certainly imported before it is complete, from the same top-level package: its
        parents and what their top levels import, in the order in which parents come first.
    """
    top = module.name.split(".")[0]
    chosen: dict[str, Module] = {}
    stack = [module.name]
    while stack:
        for part in _lineage(stack.pop()):
            one = among.get(part)
            if one is not None and part not in chosen and part.split(".")[0] == top:
                chosen[part] = one
                stack.extend(name for name, required in one.imports.items() if required)
    chosen.pop(module.name, None)
    return sorted(chosen.values(), key=lambda one: one.name)


def chain_to_inmanta(name: str) -> list[str] | None:
    """
    :param name: The full name of a module.
    :return: How it comes to import what no host has: the module, what it imports, and so on; None
        where it doesn't.
    """
    seen: set[str] = set()
    stack = [[name]]
    while stack:
        chain = stack.pop()
        if chain[-1].split(".")[0] in _NEVER:
            return chain
        for part in _lineage(chain[-1]):
            way = chain if part == chain[-1] else [*chain[:-1], part]
            if part in seen or not is_served(part):
                continue
            seen.add(part)
            module = find(part)
            stack.extend([*way, other] for other in _required(module))
    return None


def _required(module: Module | None) -> Iterator[str]:
    names: Iterable[tuple[str, bool]] = module.imports.items() if module is not None else ()
    return (name for name, required in names if required)
