"""Modules of this process with a Python source, and what they import. None is imported for it."""

import ast
import functools
import importlib.machinery
import importlib.util
import os
import pkgutil
import re
import sys
import tokenize
from collections.abc import Iterator

PLUGINS = "inmanta_plugins"
"""The namespace package of the handlers."""
OURS = "inmanta_mitogen"
"""The host's part of this module."""

# Handlers import inmanta at the top level, which few hosts have. So their packages are empty there,
# and a function in a file beside the handler can be called. Where there is inmanta, the package is
# executed when a name of it is first used.
_WHEN_USED = """\
def __getattr__(name):
    import importlib.machinery
    names = globals()
    if name not in {names!r} or not importlib.machinery.PathFinder.find_spec("inmanta"):
        raise AttributeError("module %r has no attribute %r" % (__name__, name))
    del names["__getattr__"]
    exec(compile({source!r}, __file__, "exec"), names)
    return names[name]
"""

Stamp = tuple[object, ...]


class Module:
    """A module of this process that can be sent to a host."""

    def __init__(self, name: str, source: str, stamp: Stamp, path: list[str] | None) -> None:
        self.name = name
        """Its full name."""
        self.stamp = stamp
        """Tells one version of it from another."""
        self.path = path
        """Where its submodules and data files are, for a package; None for any other module."""
        self._source = source

    @functools.cached_property
    def sent_source(self) -> bytes:
        """What hosts get."""
        if self._is_ours:
            return without_comments(self._source).encode()
        submodules = {found.name for found in pkgutil.iter_modules(self.path or ())}
        # An agent gets each file as a package: ``on_host/__init__.py`` for ``on_host.py``.
        of_handlers = self.name.count(".") < 2 or submodules
        if self.path and self._source and of_handlers and self.name.split(".")[0] == PLUGINS:
            names = sorted({*self._names()} - submodules)
            return _WHEN_USED.format(names=names, source=self._source).encode()
        return self._source.encode()

    def _names(self) -> Iterator[str]:
        for node in ast.walk(self._tree):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    yield name
                case ast.alias(name=name, asname=asname):
                    yield (asname or name).split(".")[0]
                case ast.Name(id=name, ctx=ast.Store()):
                    yield name

    @functools.cached_property
    def _tree(self) -> ast.Module:
        try:
            return ast.parse(self._source)
        except (SyntaxError, ValueError, RecursionError):
            return ast.Module(body=[], type_ignores=[])  # it fails on the host as it does here

    @functools.cached_property
    def imports(self) -> frozenset[str]:
        """Each name that it imports, and the packages that these are in."""
        # Hosts may have all of ours; the first calls would wait until it is parsed.
        return frozenset() if self._is_ours else frozenset(self._lineages(ast.walk(self._tree)))

    @functools.cached_property
    def top_level_imports(self) -> frozenset[str]:
        """What is certainly imported with it: its packages are, too."""
        found = () if self._is_ours else self._lineages(self._tree.body)
        return frozenset({*found, *lineage(self.name)[:-1]})

    @property
    def _is_ours(self) -> bool:
        return self.name.split(".")[0] == OURS

    def _lineages(self, nodes: "Iterator[ast.AST] | list[ast.stmt]") -> Iterator[str]:
        package = self.name if self.path is not None else self.name.rpartition(".")[0]
        for node in nodes:
            for name in _imported(node, package):
                yield from lineage(name)


def without_comments(source: str) -> str:
    """
    Return a source without the docstrings and comments that have lines of their own, which become
    empty: half of what is sent, with the line numbers that it has here.

    :param source: The source of one of our own files, where all texts in triple quotes that begin
        a line are docstrings.
    """
    no_code = re.compile(r'^ *(?:#.*|"""[\s\S]*?""")$', re.MULTILINE)
    return no_code.sub(lambda found: "\n" * found.group().count("\n"), source)


def _imported(node: ast.AST, package: str) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=module, names=names, level=level):
            base = module or ""
            if level:
                try:
                    base = importlib.util.resolve_name("." * level + base, package)
                except ImportError:
                    return  # beyond the top: it fails here too
            # A submodule, or anything else in it.
            yield from (f"{base}.{alias.name}" for alias in names)
        case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]):
            if getattr(func, "attr", getattr(func, "id", "")) == "import_module":
                yield name


def lineage(name: str) -> list[str]:
    """
    Return the packages that a module is in, outermost first, and its own name.

    :param name: The full name of a module.
    """
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """Return the spec of a module. Unlike importlib's own search it imports no packages."""
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


def _stamp(spec: importlib.machinery.ModuleSpec) -> Stamp:
    try:
        status = os.stat(spec.origin or "")
        file: Stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
    except OSError:
        file = ()
    return (spec.origin, *file)


def _read(spec: importlib.machinery.ModuleSpec) -> str | None:
    # Not by its loader: pytest's and inmanta's own differ in what they tell.
    if not str(spec.origin).endswith(".py"):
        return None
    try:
        with tokenize.open(str(spec.origin)) as file:
            return file.read()
    except (OSError, ValueError, SyntaxError):
        return None


_found: dict[str, Module] = {}


def find(name: str) -> Module | None:
    """
    Find a module that can be sent to a host.

    :param name: Its full name.
    :return: The module as it is now, the same object as long as it does not change; None where
        there is none with a Python source.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        return None
    spec = _spec(name)
    if spec is None:
        return None
    stamp = _stamp(spec)
    known = _found.get(name)
    if known is not None and known.stamp == stamp:
        return known
    path = spec.submodule_search_locations
    # A namespace package has no source, and needs none.
    source = "" if path is not None and spec.origin is None else _read(spec)
    if source is None:
        return None
    found = Module(name, source, stamp, None if path is None else list(path))
    _found[name] = found
    return found


def data_file(package: str, name: str, limit: int) -> bytes | None:
    """
    Read a data file of a package.

    :param package: The full name of the package.
    :param name: The file's name in its directory.
    :param limit: The maximum size of the file, in bytes.
    :return: The content; None where there is no such file, or it holds a module.
    """
    module = find(package)
    suffixes = tuple(importlib.machinery.all_suffixes())
    if module is None or not name or "/" in name or "\0" in name or name.endswith(suffixes):
        return None
    for directory in module.path or ():
        path = os.path.join(directory, name)
        if os.path.isfile(path) and os.path.getsize(path) <= limit:
            with open(path, "rb") as file:
                return file.read(limit)
    return None
