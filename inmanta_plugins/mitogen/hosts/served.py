"""Which of the agent's modules a host gets: those that the functions called there need.

A mitogen host asks its agent for each module that it does not have itself, and a plain router
serves all that can be imported on the agent. Here a host is served the module of each function that
was called on it, what that imports in turn, and mitogen. Anything else is refused.

Packages below ``inmanta_plugins`` are served blank, without their ``__init__.py``: so a function
that stands in a file beside a handler runs on hosts, which have no inmanta.
"""

import functools
import logging
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import mitogen.core
import mitogen.master
from inmanta_plugins.mitogen import _mitogen
from inmanta_plugins.mitogen.hosts import answers, modules
from inmanta_plugins.mitogen.hosts.modules import PLUGINS, Module, Stamp
from inmanta_plugins.mitogen.texts import bounded_text

LOGGER = logging.getLogger(__name__)

PREPARE_HOST = (
    _mitogen.source_for_host(_mitogen.prepare_host)
    # Compiled while the agent waits in any case, and not in the first call.
    + "import inmanta_mitogen.dispatch, inmanta_mitogen.files\n"
)
"""Run first in each interpreter."""
# How many names that were refused are remembered for each host, so as to log each once.
MOST_REFUSALS = 100
# No module has a longer name, and no answer to one would find its way into a log.
_LONGEST_NAME = 500

# What of this project runs on hosts.
_OWN = "inmanta_mitogen"

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


def check_servable(function: Callable[..., object]) -> None:
    """
    :param function: A function to be called on a host.
    :raises UnservableError: Its file, or one that this imports, needs inmanta; or it has no file
        that could be sent.
    """
    module = function.__module__
    where = f"{module}.{function.__qualname__} cannot be called on a host"
    remedy = "Move it to a file that needs nothing but the standard library."
    found = modules.find(module)
    if module == "__main__":
        raise UnservableError(
            f"{where}: it stands in the program that was started, which hosts do not get. {remedy}"
        )
    if found is not None and found.blank:
        raise UnservableError(
            f"{where}: it stands in the __init__.py of {module}, which hosts get blank. {remedy}"
        )
    chain = modules.chain_to_inmanta(module)
    if chain is not None:
        raise UnservableError(
            f"{where}: {' imports '.join(chain)}, which hosts do not have. {remedy}"
        )


class Host(Protocol):
    """Who asks for modules: what a router knows of it."""

    id: int
    name: str


class ServingRouter(Protocol):
    """The router whose hosts are served, as far as serving needs it."""

    responder: Any
    add_handler: Any
    route: Any
    stream_by_id: Any

    def guest_of(self, msg: mitogen.core.Message) -> Host | None:
        """The host that a message came from."""
        ...

    def stray(self, host: int, what: str, *, log: bool = True) -> None:
        """Count a message that a host should not have sent."""
        ...


class _Served:
    """What one host may have, and has got."""

    def __init__(self) -> None:
        self.allowed: dict[str, Module] = {}
        self.absent: set[str] = set()
        self.refused: set[str] = set()
        self.sent: dict[str, Stamp] = {}


def _ahead(function: Callable[..., object], needed: Mapping[str, Module]) -> list[Module]:
    """
    What to send before it is asked for, as each question takes a round trip: what the call will
    certainly import, and this module's own small part on hosts.
    """
    own = [module for name, module in needed.items() if name.split(".")[0] == _OWN]
    called = needed.get(function.__module__)
    if called is None:
        return own
    return list(dict.fromkeys([*own, *modules.certain(called, needed), called]))


class ServedModules(mitogen.core.ImportPolicy):  # type: ignore[misc]  # mitogen is not typed
    """
    The modules that each host of a router may have.

    :param router: The router whose hosts are served.
    """

    def __init__(self, router: ServingRouter) -> None:
        super().__init__()
        self._router = router
        self._lock = threading.Lock()
        # By the id of the context at the agent's end of a stream: it asks for those behind it.
        self._served: dict[int, _Served] = {}
        router.responder.policy = self
        for handle, handler in (
            (mitogen.core.GET_MODULE, self._on_module_request),
            (mitogen.core.GET_RESOURCE, self._on_resource_request),
        ):
            router.add_handler(handler, handle=handle, overwrite=True)

    def allow(
        self, host: int, context: int, function: Callable[..., object], loaded: dict[str, Stamp]
    ) -> bool:
        """
        Let a host have what a function needs.

        :param host: The id of the context that is next to the agent.
        :param context: The id of the context that the function is called in: the host, or one
            behind it.
        :param function: The function.
        :param loaded: What that context was allowed before; added to.
        :return: Whether all that the context may have loaded is still the agent's own version. If
            not, it must be replaced by a new one.
        :raises UnservableError: The function's file needs what hosts don't have.
        """
        check_servable(function)
        if not modules.is_served(function.__module__):
            return True
        needed, absent = modules.needed(function.__module__)
        stamps = {name: module.stamp for name, module in needed.items()}
        if any(loaded.get(name, stamp) != stamp for name, stamp in stamps.items()):
            return False
        loaded.update(stamps)
        with self._lock:
            served = self._served.setdefault(host, _Served())
            # Who was refused one remembers it: that it is not there, or how it was.
            late = [
                module
                for name, module in needed.items()
                if name in served.refused or served.sent.get(name, module.stamp) != module.stamp
            ]
            served.allowed.update(needed)
            served.absent |= absent
            ahead = [
                module for module in _ahead(function, needed) if module.name not in served.sent
            ]
            served.sent.update((module.name, module.stamp) for module in ahead)
        for module in ahead:
            self._router.route(_load_module(module, host, served))
        for module in late:
            served.sent[module.name] = module.stamp
            for destination in dict.fromkeys((host, context)):
                self._router.route(_load_module(module, destination, served))
        return True

    def forget(self, host: int) -> None:
        """
        :param host: The id of a context next to the agent that has ended.
        """
        with self._lock:
            self._served.pop(host, None)

    def denied(self, fullname: str) -> Any:
        """
        :param fullname: The name of a module that comes along with one of mitogen's own.
        :return: False when the host may have it, else the exception that mitogen is to raise.
        """
        if fullname.split(".")[0] == "mitogen":
            return False
        return mitogen.core.ModuleDeniedByOverridesError

    # On the broker's thread

    def _on_module_request(self, msg: mitogen.core.Message) -> None:
        host = self._router.guest_of(msg)
        if msg.is_dead or host is None:
            return
        if len(msg.data) > 4 * _LONGEST_NAME or msg.src_id != host.id:
            self._router.stray(host.id, "for a module that can't be one")
            return
        name = msg.data.decode("utf-8", "replace")
        if name.split(".")[0] == "mitogen":
            # The public interface ends here: how mitogen's responder serves a host.
            msg.data = name.encode()
            self._router.responder._on_get_module(msg)
            return
        with self._lock:
            served = self._served.setdefault(host.id, _Served())
            module = served.allowed.get(name) or _explicitly_allowed(name)
        if module is None:
            self._refuse(host, served, name)
        elif name in served.sent:
            self._router.stray(host.id, "for a module that it has got already")
        else:
            self._send(host, served, module)

    def _send(self, host: Host, served: _Served, module: Module) -> None:
        # Along with it what it will certainly import from the same place.
        for one in [*modules.certain(module, served.allowed), module]:
            if one.name not in served.sent:
                served.sent[one.name] = one.stamp
                self._router.route(_load_module(one, host.id, served))

    def _refuse(self, host: Host, served: _Served, name: str) -> None:
        self._router.stray(host.id, "for modules that it may not have", log=False)
        self._log_refusal(host, served, name)
        self._router.route(_message((name, None, None, None, ()), host.id))

    def _on_resource_request(self, msg: mitogen.core.Message) -> None:
        # Data files of packages: nothing that this module calls on a host has any.
        host = self._router.guest_of(msg)
        if msg.is_dead or host is None:
            return
        self._router.stray(host.id, "for files that it may not have", log=False)
        try:
            asked = answers.read_answer(msg.data[: 8 * _LONGEST_NAME])
            package, resource = (str(part)[:_LONGEST_NAME] for part in asked)  # type: ignore[attr-defined]  # tried
        except (ValueError, TypeError, answers.UnreadableError):
            return
        with self._lock:
            served = self._served.setdefault(host.id, _Served())
        self._log_refusal(host, served, f"{package} (its file {resource})")
        self._router.route(
            mitogen.core.Message.pickled(
                (package, resource), None, dst_id=msg.src_id, handle=mitogen.core.LOAD_RESOURCE
            )
        )

    def _log_refusal(self, host: Host, served: _Served, name: str) -> None:
        if name in served.refused or len(served.refused) >= MOST_REFUSALS:
            return
        served.refused.add(name)
        shown = ascii(bounded_text(name, 200))
        if name.split(".")[0] in sys.stdlib_module_names:
            return  # of its own standard library a Python asks for what it was built without
        if name in served.absent:
            LOGGER.info(
                "Host %s asked for the module %s, which has no Python source on the agent: it is"
                " compiled, or not installed. Install it on the host if it is needed there.",
                host.name,
                shown,
            )
            return
        LOGGER.warning(
            "Host %s asked for the module %s, which nothing that was called there needs: refused."
            " If a handler does need it there, name it in"
            " inmanta_plugins.mitogen.allow_modules.",
            host.name,
            shown,
        )


def _explicitly_allowed(name: str) -> Module | None:
    for allowed in _explicit:
        found = modules.needed(allowed)[0].get(name)
        if found is not None:
            return found
    return None


def _load_module(module: Module, destination: int, served: _Served) -> mitogen.core.Message:
    """The message in which mitogen's importer expects a module."""
    children = None
    if module.is_package:
        prefix = f"{module.name}."
        children = sorted(_children(module, served.allowed, prefix))
    related = [one.name for one in modules.certain(module, served.allowed)]
    # Not its path on the agent: that is none of the host's business.
    path = module.name.replace(".", "/") + ("/__init__.py" if module.is_package else ".py")
    return _message((module.name, children, path, _packed(module), related), destination)


@functools.lru_cache(maxsize=1024)
def _packed(module: Module) -> mitogen.core.Blob:
    source = b"" if module.blank else module.source.encode()
    return mitogen.core.Blob(zlib.compress(source, 9))


def _children(module: Module, allowed: Iterable[str], prefix: str) -> set[str]:
    if module.name.split(".")[0] != PLUGINS:
        return set(module.children())
    names = (name[len(prefix) :] for name in allowed if name.startswith(prefix))
    return {name for name in names if "." not in name}


def _message(content: object, destination: int) -> mitogen.core.Message:
    return mitogen.core.Message.pickled(
        content, dst_id=destination, handle=mitogen.core.LOAD_MODULE
    )
