"""Which of the agent's modules a host gets: those that the functions called there need.

A mitogen host asks its agent for each module that it does not have itself, and a plain router
serves all that can be imported on the agent. Here a host may have the module of each function that
was called on it, what the modules that it got import, and mitogen. Anything else is refused.
"""

import functools
import logging
import pickle
import sys
import threading
import zlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import mitogen.core
import mitogen.master
from inmanta_mitogen.dispatch import PICKLE_PROTOCOL
from inmanta_plugins.mitogen import _mitogen, settings
from inmanta_plugins.mitogen.hosts import answers, modules
from inmanta_plugins.mitogen.hosts.modules import Module, lineage
from inmanta_plugins.mitogen.texts import bounded_text

if TYPE_CHECKING:
    from inmanta_plugins.mitogen.hosts.router import AgentContext, AgentRouter, HostState

LOGGER = logging.getLogger(__name__)

PREPARE_HOST = (
    _mitogen.source_for_host(_mitogen.prepare_host)
    # Compiled while the agent waits in any case, and not in the first call.
    + "import inmanta_mitogen.dispatch, inmanta_mitogen.files\n"
)
"""Run first in each interpreter."""
# What no host is served, whatever imports it: the orchestrator itself. And what it has anyway.
_NEVER = {"inmanta", "mitogen"} | sys.stdlib_module_names

# Why a host does not get a module.
_NOT_THERE = (
    logging.INFO,
    "has no Python source on the agent: it is compiled, or not installed. Install it on the host if"
    " it is needed there.",
)
_NOT_NEEDED = (
    logging.WARNING,
    "nothing that was called there needs: refused. If a handler does need it there, name it in"
    " inmanta_plugins.mitogen.allow_modules.",
)

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
    _explicit.update(part for name in names for part in lineage(name))


class Served:
    """What one host may have, and has got."""

    def __init__(self) -> None:
        self.allowed: set[str] = set()
        self.sent: dict[str, Module] = {}
        self.refused: set[str] = set()
        self.data_files: set[tuple[str, str]] = set()
        self.changes = 0
        """How often something that it got was changed on the agent since."""


class ServedModules:
    """
    The modules that each host of a router may have.

    :param router: The router whose hosts are served.
    """

    def __init__(self, router: "AgentRouter") -> None:
        self._router = router
        self._lock = threading.RLock()
        for handle, handler in (
            (mitogen.core.GET_MODULE, self._on_module_request),
            (mitogen.core.GET_RESOURCE, self._on_resource_request),
        ):
            router.add_handler(handler, handle=handle, overwrite=True)

    def allow(
        self, host: "HostState", context: "AgentContext", function: Callable[..., object]
    ) -> bool:
        """
        Let a host have what a function needs.

        :param host: The host next to the agent.
        :param context: The context that the function is called in: the host's, or one behind it.
        :param function: The function.
        :return: Whether all that the context may have loaded is still the agent's own version. If
            not, it must be replaced by a new one.
        """
        name = function.__module__
        if name.split(".")[0] in _NEVER or name == "__main__":
            return True
        with self._lock:
            self._send_changed(host)
            self._allow(host, lineage(name))
            if context.changes_before is None:
                context.changes_before = host.served.changes
            if context.changes_before != host.served.changes:
                return False
            self._send_ahead(host, name)
        return True

    def _allow(self, host: "HostState", names: Iterable[str]) -> None:
        served = host.served
        new = {name for name in names if name.split(".")[0] not in _NEVER} - served.allowed
        served.allowed |= new
        # Who was refused one remembers that it is not there.
        for name in sorted(new & served.refused):
            served.refused.discard(name)
            self._send_anew(host, modules.find(name))

    def _send_anew(self, host: "HostState", module: Module | None) -> None:
        if module is not None:
            host.served.changes += 1
            self._send(host, module)

    def _send_changed(self, host: "HostState") -> None:
        for name, old in list(host.served.sent.items()):
            module = modules.find(name)
            if module is not old:
                self._send_anew(host, module)

    def _send_ahead(self, host: "HostState", name: str) -> None:
        """Send a module, and before it what is certainly imported with it from its package."""
        served = host.served
        module = modules.find(name) if name in served.allowed else None
        if module is None or name in served.sent:
            return
        served.sent[name] = module
        self._allow(host, module.imports)
        for one in sorted(module.top_level_imports):
            if one.split(".")[0] == name.split(".")[0]:
                self._send_ahead(host, one)
        self._send(host, module)

    def _send(self, host: "HostState", module: Module) -> None:
        served = host.served
        served.sent[module.name] = module
        self._allow(host, module.imports)
        related = [one for one in sorted(module.top_level_imports) if one in served.sent]
        self._route(_described(module, served.allowed, related), host.id)

    def _route(self, content: object, destination: int) -> None:
        """Send the message in which mitogen's importer expects a module."""
        context = self._router.context_by_id(destination, create=False)
        # Protocol 2 adds half to what is compressed. It is all that a hop on Python 2 can read.
        is_new = getattr(context, "python_version", "").startswith("3.")
        message = mitogen.core.Message(
            data=pickle.dumps(content, PICKLE_PROTOCOL if is_new else 2),
            enc=mitogen.core.Message.ENC_PKL,
            dst_id=destination,
            handle=mitogen.core.LOAD_MODULE,
        )
        self._router.route(message)

    # On the broker's thread

    def _on_module_request(self, msg: mitogen.core.Message) -> None:
        host = self._router.host_of(msg)
        if msg.is_dead or host is None:
            return
        if len(msg.data) > 4 * settings.LONGEST_NAME or msg.src_id != host.id:
            self._router.reject(host, "for a module that can't be one")
            return
        name = msg.data.decode("utf-8", "replace")
        if name in _names_of_mitogen():
            self._send_mitogen(host, name, msg)
            return
        with self._lock:
            served = host.served
            if name in served.sent:
                # It may have asked before that came.
                self._router.reject(host, "for a module that it has got already", log=False)
                return
            if name in _explicit or name.split(".")[0] == modules.OURS:
                served.allowed.add(name)
            self._send_ahead(host, name)
            if name not in served.sent:
                self._refuse(host, name)
                self._route((name, None, None, None, ()), host.id)

    def _send_mitogen(self, host: "HostState", name: str, msg: mitogen.core.Message) -> None:
        if name in self._router.stream_by_id(host.id).protocol.sent_modules:
            self._router.reject(host, "for a module that it has got already", log=False)
            return
        msg.data = name.encode()
        # The public interface ends here: how mitogen's responder serves a host.
        self._router.responder._on_get_module(msg)

    def _on_resource_request(self, msg: mitogen.core.Message) -> None:
        host = self._router.host_of(msg)
        if msg.is_dead or host is None:
            return
        try:
            asked = answers.read_answer(msg.data[: 2 * settings.LONGEST_NAME])
        except answers.UnreadableError:
            asked = None
        match asked:
            case (str(package), str(name)):
                pass
            case _:
                self._router.reject(host, "for a data file that can't be one")
                return
        with self._lock:
            served = host.served
            content = None
            if (package, name) in served.data_files:
                self._router.reject(host, "for a data file that it has got already", log=False)
                return
            if package in served.allowed or package in _explicit:
                content = modules.data_file(package, name, settings.LARGEST_DATA_FILE)
            if content is None:
                self._refuse(host, f"{package} (its file {name})")
            else:
                served.data_files.add((package, name))
        message = mitogen.core.Message.pickled(
            (package, name), content, dst_id=msg.src_id, handle=mitogen.core.LOAD_RESOURCE
        )
        self._router.route(message)

    def _refuse(self, host: "HostState", name: str) -> None:
        served = host.served
        self._router.reject(host, "for modules that it may not have", log=False)
        if name in served.refused or len(served.refused) >= settings.MOST_REFUSALS:
            return
        served.refused.add(name)
        if name.split(".")[0] in _NEVER:
            return  # of its standard library a Python may lack parts; of inmanta the call tells
        level, why = _NOT_NEEDED if modules.find(name) else _NOT_THERE
        shown = ascii(bounded_text(name, 200))
        LOGGER.log(level, "Host %s asked for the module %s, which %s", host.name, shown, why)


@functools.cache
def _names_of_mitogen() -> frozenset[str]:
    """Return the modules of mitogen's that its own importer asks for."""
    names = {f"mitogen.{name}" for name in mitogen.core.Importer.MITOGEN_PKG_CONTENT}
    return frozenset(name for name in names if modules.find(name) is not None)


def _described(module: Module, allowed: Iterable[str], related: list[str]) -> tuple[object, ...]:
    """Return a module in the form in which mitogen's importer expects it."""
    is_package = module.path is not None
    # Not its path on the agent: that is none of the host's business.
    path = module.name.replace(".", "/") + ("/__init__.py" if is_package else ".py")
    children = None
    if is_package:
        # Only hops look here: the importer of a host that was prepared asks for any submodule.
        names = (one.rpartition(".") for one in allowed)
        children = sorted(name for package, _, name in names if package == module.name)
    return (module.name, children, path, _packed(module), related)


@functools.lru_cache(maxsize=1024)
def _packed(module: Module) -> mitogen.core.Blob:
    return mitogen.core.Blob(zlib.compress(module.sent_source, 9))
