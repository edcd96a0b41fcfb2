"""From the model to a serialized context: the dict that a resource carries to the agent.

This runs in the compiler. References in attributes stay references, so that only the agent resolves
them.
"""

from collections.abc import Mapping
from typing import Any

import inmanta.ast
from inmanta import plugins
from inmanta.ast.attribute import RelationAttribute
from inmanta.execute.proxy import DynamicProxy, SequenceProxy

from inmanta_plugins.mitogen.contexts.options import IMPLICIT_SSH_ARGS, METHODS
from inmanta_plugins.mitogen.contexts.validate import checked_value
from inmanta_plugins.mitogen.errors import ContextError

CONTEXT_ENTITY = "mitogen::Context"
HOST_ENTITY = "std::Host"
DEFAULT_PYTHON_CMD = "python3"


def get_optional_relation(entity: object, name: str, *, missing_ok: bool = False) -> Any:
    """
    Return the related instance; None where none is set.

    :param entity: An instance of the model.
    :param name: The name of a relation whose lower bound is 0, or of an attribute.
    :param missing_ok: Whether to return None as well where the type of `entity` has no such
        relation; by default that is an error.
    :raises AttributeError: The type has no such relation, and `missing_ok` is false.
    """
    try:
        return getattr(entity, name)
    except inmanta.ast.OptionalValueException:
        return None
    except AttributeError:
        if missing_ok:
            return None
        raise


def get_resource_context(entity: object) -> dict[str, Any]:
    """
    Return the serialized context that a resource runs in: its own ``via``, else that of its
    ``host``, else the implicit context of the host, which is derived from the attributes of a
    ``std::Host``.

    :param entity: The instance that is exported as a resource.
    :raises NotImplementedError: It has no context. The text begins with ``[No host relation]``,
        ``[No std::Host entity]`` or ``[No ip]``, whichever it was.
    :raises ContextError: The context has an attribute with an invalid value.
    """
    own = get_optional_relation(entity, "via", missing_ok=True)
    if own is not None:
        return serialize_context(own)
    host = get_optional_relation(entity, "host", missing_ok=True)
    if host is None:
        raise _no_context(
            "No host relation", entity, "it has neither a via nor a host. Set one of them."
        )
    via = get_optional_relation(host, "via", missing_ok=True)
    is_host = _is_a(host, HOST_ENTITY)
    if via is not None and (is_host or _is_a(via, CONTEXT_ENTITY)):
        return serialize_context(via)
    if not is_host:
        raise _no_context(
            "No std::Host entity",
            entity,
            f"its host, {host}, is not a std::Host. Set the via of one of the two.",
        )
    return _implicit_context(entity, host)


def serialize_context(instance: object) -> dict[str, Any]:
    """
    Return the attributes of a context that are not null, and its ``via`` as such a dict, if it has
    one. References stay references.

    :param instance: An instance of ``mitogen::Context``.
    :raises ContextError: It is not a ``mitogen::Context``, it is its own ``via``, or an attribute
        has an invalid value; a :class:`ValueError`.
    """
    return _serialize(instance, ())


def _serialize(instance: object, reached_from: tuple[object, ...]) -> dict[str, Any]:
    if not isinstance(instance, DynamicProxy) or not _is_a(instance, CONTEXT_ENTITY):
        raise ContextError(f"Cannot serialize {instance!r}: it is not a {CONTEXT_ENTITY}")
    if instance in reached_from:
        raise ContextError(f"Cannot serialize the context {instance!r}: it is its own via")
    kind = instance._type()
    serialized = {
        name: value
        for name in kind.get_all_attribute_names()
        if not isinstance(kind.get_attribute(name), RelationAttribute)
        and (value := _read(instance, name)) is not None
    }
    _check(instance, serialized)
    via = get_optional_relation(instance, "via")
    if via is not None:
        serialized["via"] = _serialize(via, (*reached_from, instance))
    return serialized


def _check(instance: DynamicProxy, serialized: Mapping[str, Any]) -> None:
    # The agent checks the rest: values of references, and options that mitogen does not have.
    options = METHODS.get(serialized["method_name"], {})
    for name in options.keys() & serialized.keys():
        try:
            if _is_plain(serialized[name]):
                checked_value(name, options[name], serialized[name])
        except ContextError as problem:
            raise ContextError(f"Cannot serialize the context {instance!r}: {problem}") from None


def _is_plain(value: object) -> bool:
    return (
        all(map(_is_plain, value))
        if isinstance(value, list)
        else isinstance(value, str | float | int)
    )


def _read(instance: object, name: str) -> Any:
    return _plain(getattr(_with_references(instance), name))


def _plain(value: object) -> object:
    if isinstance(value, SequenceProxy | list):
        return [_plain(item) for item in _with_references(value)]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in _with_references(value).items()}
    return value


def _with_references(instance: Any) -> Any:
    # inmanta-core before 15 has no references, and nothing that would have to be allowed.
    allow = getattr(plugins, "allow_reference_values", None)
    return instance if allow is None else allow(instance)


def _is_a(instance: object, entity_name: str) -> bool:
    if not isinstance(instance, DynamicProxy):
        return False
    kind = instance._type()
    return entity_name in (kind.get_full_name(), *kind.get_all_parent_names())


def _implicit_context(entity: object, host: Any) -> dict[str, Any]:
    ip = _read(host, "ip")
    if ip is None:
        raise _no_context(
            "No ip", entity, f"its host, {host.name}, has neither a via nor an ip. Set one of them."
        )
    user = _read(host, "remote_user")
    ssh = {
        "method_name": "ssh",
        "name": _read(host, "name"),
        "hostname": ip,
        "username": user,
        "port": _read(host, "remote_port"),
        "check_host_keys": "ignore",
        "ssh_args": list(IMPLICIT_SSH_ARGS),
        "python_path": [_python_cmd(host)],
    }
    return ssh if user == "root" else {"method_name": "sudo", "name": "", "via": ssh}


def _python_cmd(host: object) -> object:
    system = get_optional_relation(host, "os", missing_ok=True)
    command = get_optional_relation(_with_references(system), "python_cmd", missing_ok=True)
    return DEFAULT_PYTHON_CMD if command is None else command


def _no_context(which: str, entity: object, why: str) -> NotImplementedError:
    return NotImplementedError(f"[{which}] There is no context to run {entity} in: {why}")
