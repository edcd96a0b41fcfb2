"""What a serialized context may hold, and the host key policy of the agent's operator."""

import os
import re
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from inmanta_plugins.mitogen import settings
from inmanta_plugins.mitogen.contexts.options import IMPLICIT_SSH_ARGS, METHODS, ONE_OF, Option
from inmanta_plugins.mitogen.errors import ContextError
from inmanta_plugins.mitogen.texts import describe_hop, hops_of

# Bounded, whatever it is.
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def checked_context(serialized_context: object) -> dict[str, Any]:
    """
    Return a copy of a serialized context as mitogen takes it, in each ``via`` too: options of None
    are left out, and values that can be read as the type of their option have that type. Implicit
    contexts get the host key policy of ``INMANTA_MITOGEN_CHECK_HOST_KEYS``: with ``enforce`` and
    ``accept``, they also use the known hosts of the agent's user.

    An implicit context is recognized by its form: ssh with ``check_host_keys`` ``ignore`` and the
    `IMPLICIT_SSH_ARGS`. So a context of a model that has this form is treated as one.

    :param serialized_context: The serialized context; it is not changed.
    :raises ContextError: It is invalid. The text names the hop, the key and what is allowed, and
        holds no value of a secret option.
    :raises SettingError: The environment variable is invalid.
    """
    if not isinstance(serialized_context, Mapping):
        raise ContextError(
            f"A serialized context has to be a dict, not {_kind(serialized_context)}"
        )
    hops = hops_of(serialized_context)
    if len(hops) > settings.MAX_HOPS:
        raise ContextError(
            f"The context {describe_hop(hops[-1])} has more than {settings.MAX_HOPS} hops, one"
            " 'via' in the other, or is its own 'via'"
        )
    policy = settings.check_host_keys()
    checked: dict[str, Any] = {}
    for number, hop in enumerate(hops, start=1):
        try:
            checked = _checked_hop(hop) | ({"via": checked} if checked else {})
        except ContextError as problem:
            count = f"hop {number} of {len(hops)}" if len(hops) > 1 else "context"
            raise ContextError(f"{count} ({describe_hop(hop)}): {problem}") from None
        if policy in ("accept", "enforce") and _is_implicit(checked):
            checked |= {"check_host_keys": policy, "ssh_args": IMPLICIT_SSH_ARGS[2:]}
    return checked


def _is_implicit(hop: Mapping[str, Any]) -> bool:
    return (
        hop["method_name"] == "ssh"
        and hop.get("check_host_keys") == "ignore"
        and hop.get("ssh_args") == IMPLICIT_SSH_ARGS
    )


def _checked_hop(hop: Mapping[str, Any]) -> dict[str, Any]:
    method_name, via = hop.get("method_name"), hop.get("via")
    if not isinstance(method_name, str) or method_name not in METHODS:
        hint = _closest(method_name, METHODS)
        raise ContextError(
            f"'method_name' has to be one of {', '.join(METHODS)}, not {_shown(method_name)}{hint}"
        )
    if via is not None and not isinstance(via, Mapping):
        raise ContextError(f"'via' has to be a serialized context (a dict), not {_kind(via)}")
    options = METHODS[method_name]
    checked = {"method_name": method_name}
    for key, value in hop.items():
        if key in ("method_name", "via"):
            continue
        if key not in options:
            raise ContextError(
                f"unknown option {_shown(key)}{_closest(key, options)};"
                f" {method_name} takes {', '.join(sorted([*options, 'via']))}"
            )
        if value is not None:
            checked[key] = checked_value(key, options[key], value)
    for key, option in options.items():
        if option.required and key not in checked:
            raise ContextError(
                f"the option '{key}' is missing; {method_name} needs it ({option.expected})"
            )
    one_of = ONE_OF.get(method_name, ())
    if one_of and not any(map(checked.get, one_of)):
        raise ContextError(f"one of the options {', '.join(one_of)} has to be set")
    return checked


def checked_value(key: str, option: Option, value: object) -> Any:
    """
    Return the value of an option with the type that the option has.

    :param key: The name of the option.
    :param option: The option.
    :param value: A value that is set, so not None.
    :raises ContextError: It is invalid.
    """
    converted = _converted(option.type, value)
    if converted is None or not option.is_valid(converted):
        found = _kind(value) if option.secret else _shown(value)
        raise ContextError(f"'{key}' has to be {option.expected}, not {found}")
    if isinstance(converted, str | list) and "\0" in "".join(converted):
        raise ContextError(f"'{key}' holds a NUL character, which no program can be given")
    return converted


def _converted(kind: type, value: Any) -> Any:
    """Return a value as that type; None where its meaning is not clear."""
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif kind is list and isinstance(value, list | tuple):
        value = [_converted(str, item) for item in value]
        return None if None in value else value
    elif kind is int and isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):
        value = int(value)
    elif kind is bool and type(value) is int and value in (0, 1):
        value = bool(value)
    right = isinstance(value, int | float if kind is float else kind)
    return value if right and isinstance(value, bool) == (kind is bool) else None


def _kind(value: object) -> str:
    if isinstance(value, list | tuple) and value:
        return f"a list of {' and '.join(sorted({type(item).__name__ for item in value}))}"
    return type(value).__name__


def _shown(value: object) -> str:
    try:
        return _REPR.repr(value)
    except ValueError:  # an int of too many digits
        return _kind(value)


def _closest(key: object, allowed: Collection[str]) -> str:
    if not isinstance(key, str):
        return ""
    import difflib  # takes as long to import as the rest of this package

    close = difflib.get_close_matches(key[:60], allowed, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
