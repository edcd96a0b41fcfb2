"""What the connection methods of mitogen take, and how people call a context.

The table `METHODS` is the one place that knows the options, their types and their roles. It follows
the ``Options`` classes of mitogen; `model/_init.cf` has an attribute for each of them, with what it
means. This module needs the standard library alone.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from inmanta_plugins.mitogen.settings import CHECK_HOST_KEYS, MAX_HOPS

MASK: Final = "[secret]"
"""Stands where a secret was; what :class:`mitogen.core.Secret` shows."""

IMPLICIT_SSH_ARGS: Final = ["-o", "UserKnownHostsFile=/dev/null", "-o", "PasswordAuthentication=no"]
"""The ``ssh_args`` of an implicit context."""


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def _is_command(value: object) -> bool:
    return isinstance(value, str) or _is_texts(value)


def _is_argument(value: Any) -> bool:
    # A program would take a leading dash for an option of its own: `ssh -oProxyCommand=…`.
    return value != "" and not value.startswith("-")


def _is_word(value: Any) -> bool:
    # For mitogen, and for us, an empty one is one that is not set.
    return not value.startswith("-")


@dataclasses.dataclass(frozen=True)
class Option:
    """
    An option of a connection method.

    :param kind: What a value of it is, in words.
    :param has_type: Tells whether a value has the right type.
    :param allowed: Which values of that type are allowed, in words; empty when all are.
    :param is_allowed: Tells whether a value of the right type is one of these.
    :param required: Whether the method can't do without it.
    :param secret: Whether its value may appear in no log and no message.
    """

    kind: str
    has_type: Callable[[object], bool]
    allowed: str = ""
    is_allowed: Callable[[Any], bool] = lambda value: True
    required: bool = False
    secret: bool = False

    @property
    def expected(self) -> str:
        """What a value has to be, in words."""
        return f"{self.kind} {self.allowed}".rstrip()


@dataclasses.dataclass(frozen=True)
class Method:
    """
    A connection method of mitogen.

    :param options: Its own options by name; those of every method are in `COMMON_OPTIONS`.
    :param one_of: Options of which at least one has to be set.
    """

    options: Mapping[str, Option]
    one_of: tuple[str, ...] = ()

    @property
    def all_options(self) -> Mapping[str, Option]:
        """Its options by name, the common ones included."""
        return {**COMMON_OPTIONS, **self.options}


_NO_DASH = "that does not begin with '-'"
_NOT_EMPTY_NO_DASH = "that is not empty and does not begin with '-'"

TEXT: Final = Option("a string", _is_text)
WORD: Final = Option("a string", _is_text, _NO_DASH, _is_word)
ADDRESS: Final = Option("a string", _is_text, _NOT_EMPTY_NO_DASH, _is_argument)
REQUIRED_ADDRESS: Final = dataclasses.replace(ADDRESS, required=True)
SECRET: Final = Option("a string", _is_text, secret=True)
TEXTS: Final = Option("a list of strings", _is_texts)
BOOL: Final = Option("a bool", _is_bool)
POSITIVE_INT: Final = Option("an integer", _is_int, "from 1", lambda value: value >= 1)
LEVEL: Final = Option("an integer", _is_int, "from 0", lambda value: value >= 0)
PORT: Final = Option("an integer", _is_int, "from 1 to 65535", lambda value: 1 <= value <= 65535)
SECONDS: Final = Option(
    "a number",
    _is_number,
    "of seconds above 0",
    lambda value: value > 0 and not (isinstance(value, float) and math.isinf(value)),
)
COMMAND: Final = Option(
    "a string or a list of strings",
    _is_command,
    "none of which is empty",
    lambda value: isinstance(value, str) or all(value),
)
SLASHLESS: Final = Option(
    "a string", _is_text, "without slashes", lambda value: not re.search(r"[/\\]", value)
)


def choice(*values: str, required: bool = False) -> Option:
    """
    :param values: What the option may be.
    :param required: Whether the method can't do without it.
    :return: An option that is one of some words.
    """
    return Option(
        "a string", _is_text, f"out of {', '.join(values)}", lambda v: v in values, required
    )


COMMON_OPTIONS: Final[Mapping[str, Option]] = {
    "name": TEXT,
    "remote_name": SLASHLESS,
    "python_path": COMMAND,
    "connect_timeout": SECONDS,
    "debug": BOOL,
    "profiling": BOOL,
    "unidirectional": BOOL,
}
"""The options of every method."""

_PROMPTED = {"password_prompt": TEXT, "incorrect_prompts": TEXTS}

METHODS: Final[Mapping[str, Method]] = {
    "local": Method({}),
    "ssh": Method(
        {
            "hostname": REQUIRED_ADDRESS,
            "username": WORD,
            "port": PORT,
            "password": SECRET,
            "identity_file": TEXT,
            "identities_only": BOOL,
            "check_host_keys": choice(*CHECK_HOST_KEYS),
            "compression": BOOL,
            "keepalive_enabled": BOOL,
            "keepalive_count": POSITIVE_INT,
            "keepalive_interval": POSITIVE_INT,
            "ssh_path": WORD,
            "ssh_args": TEXTS,
            "ssh_debug_level": LEVEL,
        },
    ),
    "sudo": Method(
        {
            "username": WORD,
            "password": SECRET,
            "sudo_path": WORD,
            "sudo_args": TEXTS,
            "login": BOOL,
            "preserve_env": BOOL,
            "set_home": BOOL,
            "selinux_role": WORD,
            "selinux_type": WORD,
        },
    ),
    "su": Method(
        {"username": WORD, "password": SECRET, "su_path": WORD, **_PROMPTED},
    ),
    "doas": Method(
        {"username": WORD, "password": SECRET, "doas_path": WORD, **_PROMPTED},
    ),
    "docker": Method(
        {"container": ADDRESS, "image": ADDRESS, "username": WORD, "docker_path": WORD},
        one_of=("container", "image"),
    ),
    "podman": Method(
        {"container": REQUIRED_ADDRESS, "username": WORD, "podman_path": WORD},
    ),
    "buildah": Method(
        {"container": REQUIRED_ADDRESS, "username": WORD, "buildah_path": WORD},
    ),
    "kubectl": Method(
        {"pod": REQUIRED_ADDRESS, "kubectl_path": WORD, "kubectl_args": TEXTS},
    ),
    "lxc": Method({"container": REQUIRED_ADDRESS, "lxc_attach_path": WORD}),
    "lxd": Method({"container": REQUIRED_ADDRESS, "lxc_path": WORD}),
    "incus": Method({"container": REQUIRED_ADDRESS, "incus_path": WORD}),
    "jail": Method(
        {"container": REQUIRED_ADDRESS, "username": WORD, "jexec_path": WORD},
    ),
    "setns": Method(
        {
            "container": REQUIRED_ADDRESS,
            "kind": choice("docker", "lxc", "lxd", "machinectl", required=True),
            "username": WORD,
            "docker_path": WORD,
            "lxc_path": WORD,
            "lxc_info_path": WORD,
            "machinectl_path": WORD,
        },
    ),
}
"""The connection methods by name."""

SECRET_OPTIONS: Final = frozenset(
    name for method in METHODS.values() for name, option in method.options.items() if option.secret
)
"""The names of the options whose values may appear in no log and no message."""

_SOUNDS_SECRET = re.compile(r"pass(word|wd|phrase)|secret|token|credential", re.IGNORECASE)


def is_secret_key(key: object) -> bool:
    """
    :param key: A key of a serialized context, perhaps of a wrong one.
    :return: Whether its value may appear in no log and no message: true for the `SECRET_OPTIONS`,
        and for what sounds like a misspelled one. The prompt for a password is no secret.
    """
    if key in SECRET_OPTIONS:
        return True
    return isinstance(key, str) and key not in _PROMPTED and _SOUNDS_SECRET.search(key) is not None


def mask_secrets(serialized_context: object) -> dict[str, Any]:
    """
    :param serialized_context: A serialized context, perhaps one of the wrong form.
    :return: A copy for logs and messages: the value of each secret key that is set is ``[secret]``,
        in every ``via`` too. Empty for what is no dict.
    """
    return _masked(serialized_context, MAX_HOPS) if isinstance(serialized_context, Mapping) else {}


def _masked(value: object, depth: int) -> Any:
    if not isinstance(value, Mapping | list | tuple):
        return value
    if depth == 0:
        return "..."
    if isinstance(value, Mapping):
        return {
            key: MASK if is_secret_key(key) and item is not None else _masked(item, depth - 1)
            for key, item in value.items()
        }
    return [_masked(item, depth - 1) for item in value]
