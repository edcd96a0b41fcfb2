"""Whether a serialized context can be connected, and on which terms of this agent's operator."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from inmanta_plugins.mitogen import settings
from inmanta_plugins.mitogen.contexts.options import (
    IMPLICIT_SSH_ARGS,
    METHODS,
    Option,
)
from inmanta_plugins.mitogen.errors import ContextError
from inmanta_plugins.mitogen.settings import MAX_HOPS
from inmanta_plugins.mitogen.texts import describe_hop, hops_of


def validate_context(serialized_context: object) -> None:
    """
    Check that a serialized context has a form that can be connected. A value of None counts as not
    set. The argument is left as it is.

    :param serialized_context: The serialized context.
    :raises ContextError: When it has not. The text names the hop, the key and what is allowed, and
        holds no value of a secret key.
    """
    if not isinstance(serialized_context, Mapping):
        raise ContextError(
            f"A serialized context has to be a dict, not {_kind(serialized_context)}"
        )
    hops = hops_of(serialized_context)
    if len(hops) > MAX_HOPS:
        raise ContextError(
            f"The context {describe_hop(hops[-1])} has more than {MAX_HOPS} hops, one 'via' in the"
            " other, or is its own 'via'"
        )
    for number, hop in enumerate(hops, start=1):
        count = f"hop {number} of {len(hops)}" if len(hops) > 1 else "context"
        try:
            _validate_hop(hop)
        except _ProblemError as problem:
            raise ContextError(f"{count} ({describe_hop(hop)}): {problem}") from None


class _ProblemError(Exception):
    """What is wrong with a hop."""


def _kind(value: object) -> str:
    if isinstance(value, list | tuple):
        kinds = sorted({type(item).__name__ for item in value})
        return f"a list of {' and '.join(kinds) or 'nothing'}"
    return type(value).__name__


def _validate_hop(hop: Mapping[str, Any]) -> None:
    method_name = hop.get("method_name")
    allowed = f"allowed are {', '.join(METHODS)}"
    if method_name is None:
        raise _ProblemError(f"'method_name' is missing; {allowed}")
    if not isinstance(method_name, str):
        raise _ProblemError(
            f"'method_name' has to be a string, not {_kind(method_name)}; {allowed}"
        )
    if method_name not in METHODS:
        hint = _closest(method_name, METHODS)
        raise _ProblemError(f"unknown method_name {_shown(method_name)}{hint}; {allowed}")
    _validate_keys(method_name, hop)
    if hop.get("via") is not None and not isinstance(hop["via"], Mapping):
        raise _ProblemError(
            f"'via' has to be a serialized context (a dict), not {_kind(hop['via'])}"
        )


def _validate_keys(method_name: str, hop: Mapping[str, Any]) -> None:
    method = METHODS[method_name]
    options = method.all_options
    for key, value in hop.items():
        if key in ("method_name", "via"):
            continue
        if key not in options:
            raise _ProblemError(
                f"unknown option {_shown(key)}{_closest(key, options)};"
                f" {method_name} takes {', '.join(sorted([*options, 'via']))}"
            )
        if value is not None:
            _validate_value(key, options[key], value)
    for key, option in options.items():
        if option.required and hop.get(key) is None:
            raise _ProblemError(
                f"the option '{key}' is missing; {method_name} needs it ({option.expected})"
            )
    if method.one_of and all(hop.get(key) is None for key in method.one_of):
        raise _ProblemError(f"one of the options {', '.join(method.one_of)} has to be set")


def _validate_value(key: str, option: Option, value: object) -> None:
    if not option.has_type(value):
        found = f"not {_kind(value)}"
    elif not option.is_allowed(value):
        found = "which it is not" if option.secret else f"not {_shown(value)}"
    elif any("\0" in text for text in _texts(value)):
        raise _ProblemError(f"'{key}' holds a NUL character, which no program can be given")
    else:
        return
    raise _ProblemError(f"'{key}' has to be {option.expected}, {found}")


def _items(value: Any) -> Collection[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _texts(value: object) -> list[str]:
    return [item for item in _items(value) if isinstance(item, str)]


def _shown(value: object) -> str:
    try:
        text = repr(value[:60] if isinstance(value, str) else value)
    except ValueError:  # an int of too many digits
        return f"an {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."


def _closest(key: object, allowed: Collection[str]) -> str:
    close = difflib.get_close_matches(key[:60], allowed, n=1) if isinstance(key, str) else []
    return f" (did you mean '{close[0]}'?)" if close else ""


def apply_host_key_policy(serialized_context: Mapping[str, Any]) -> dict[str, Any]:
    """
    Give implicit contexts the host key policy of this agent.

    The environment variable ``INMANTA_MITOGEN_CHECK_HOST_KEYS`` holds ``enforce``, ``accept`` or
    ``ignore``; unset, implicit contexts stay as they are, so ``ignore``. An implicit context is
    known by its form: ssh with ``check_host_keys`` ``ignore`` and the `IMPLICIT_SSH_ARGS`. One that
    a model spells out in just that form can't be told from it.

    :param serialized_context: A serialized context. It is left as it is.
    :return: A copy, in which each implicit context, in any ``via`` too, has that policy, and with
        ``enforce`` and ``accept`` the known hosts of the agent's user.
    :raises ContextError: When the variable holds anything else.
    """
    policy = settings.check_host_keys()
    applied: dict[str, Any] | None = None
    for hop in hops_of(serialized_context):
        copy = dict(hop)
        if applied is not None:
            copy["via"] = applied
        if policy in ("accept", "enforce") and _is_implicit(hop):
            copy["check_host_keys"] = policy
            copy["ssh_args"] = IMPLICIT_SSH_ARGS[2:]
        applied = copy
    return applied if applied is not None else {}


def _is_implicit(hop: Mapping[str, Any]) -> bool:
    return (
        hop.get("method_name") == "ssh"
        and hop.get("check_host_keys") == "ignore"
        and hop.get("ssh_args") == IMPLICIT_SSH_ARGS
    )
