"""The connection methods of mitogen and their options.

The table `METHODS` is the one place that knows the options and which values they accept. It follows
the ``Options`` classes of mitogen; `model/_init.cf` has an attribute for each of them.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from inmanta_plugins.mitogen import settings

IMPLICIT_SSH_ARGS: Final = ["-o", "UserKnownHostsFile=/dev/null", "-o", "PasswordAuthentication=no"]
"""The ``ssh_args`` of an implicit context."""


def is_auto(python_path: object) -> bool:
    """
    Return whether a ``python_path`` leaves the choice of the interpreter to the host.

    :param python_path: The ``python_path`` of a context, or None.
    """
    return python_path in ("auto", ["auto"], ("auto",))


class Option(NamedTuple):
    """
    An option of a connection method.

    :param type: The type of its values; float stands for any number, list for a list of strings.
    :param expected: What a valid value is, in words.
    :param is_valid: Whether a value of that type is valid.
    :param required: Whether the method needs it.
    :param secret: Whether its value must not appear in logs and messages.
    """

    type: type
    expected: str
    is_valid: Callable[[Any], bool] = lambda value: True
    required: bool = False
    secret: bool = False


def _has_no_dash(value: str) -> bool:
    # A program would take a leading dash for an option of its own: `ssh -oProxyCommand=…`.
    return not value.startswith("-")


TEXT: Final = Option(str, "a string")
SECRET: Final = TEXT._replace(secret=True)
WORD: Final = Option(str, "a string that does not begin with '-'", _has_no_dash)
ADDRESS: Final = Option(
    str,
    "a string that is not empty and does not begin with '-'",
    lambda value: value != "" and _has_no_dash(value),
)
REQUIRED_ADDRESS: Final = ADDRESS._replace(required=True)
SLASHLESS: Final = Option(
    str, "a string without slashes", lambda value: not re.search(r"[/\\]", value)
)
TEXTS: Final = Option(list, "a list of strings")
COMMAND: Final = Option(
    list,
    "a list of at least one string, none of which is empty",
    lambda value: value and all(value),
)
BOOL: Final = Option(bool, "a bool")
POSITIVE_INT: Final = Option(int, "an integer from 1", lambda value: value >= 1)
LEVEL: Final = Option(int, "an integer from 0", lambda value: value >= 0)
PORT: Final = Option(int, "an integer from 1 to 65535", lambda value: 1 <= value <= 65535)
SECONDS: Final = Option(float, "a number of seconds above 0", lambda value: 0 < value < math.inf)


def choice(*values: str) -> Option:
    """
    Return an option that is one of some words.

    :param values: These words.
    """
    return Option(str, f"a string out of {', '.join(values)}", lambda value: value in values)


_COMMON: Final[Mapping[str, Option]] = {
    "name": TEXT,
    "remote_name": SLASHLESS,
    "python_path": COMMAND,
    "connect_timeout": SECONDS,
    "debug": BOOL,
    "profiling": BOOL,
    "unidirectional": BOOL,
}
_USER: Final[Mapping[str, Option]] = {**_COMMON, "username": WORD}
_LOGIN: Final[Mapping[str, Option]] = {**_USER, "password": SECRET}
_PROMPTED: Final[Mapping[str, Option]] = {
    **_LOGIN,
    "password_prompt": TEXT,
    "incorrect_prompts": TEXTS,
}

METHODS: Final[Mapping[str, Mapping[str, Option]]] = {
    "local": _COMMON,
    "ssh": {
        **_LOGIN,
        "hostname": REQUIRED_ADDRESS,
        "port": PORT,
        "identity_file": TEXT,
        "identities_only": BOOL,
        "check_host_keys": choice(*settings.CHECK_HOST_KEYS),
        "compression": BOOL,
        "keepalive_enabled": BOOL,
        "keepalive_count": POSITIVE_INT,
        "keepalive_interval": POSITIVE_INT,
        "ssh_path": WORD,
        "ssh_args": TEXTS,
        "ssh_debug_level": LEVEL,
    },
    "sudo": {
        **_LOGIN,
        "sudo_path": WORD,
        "sudo_args": TEXTS,
        "login": BOOL,
        "preserve_env": BOOL,
        "set_home": BOOL,
        "selinux_role": WORD,
        "selinux_type": WORD,
    },
    "su": {**_PROMPTED, "su_path": WORD},
    "doas": {**_PROMPTED, "doas_path": WORD},
    "docker": {**_USER, "container": ADDRESS, "image": ADDRESS, "docker_path": WORD},
    "podman": {**_USER, "container": REQUIRED_ADDRESS, "podman_path": WORD},
    "buildah": {**_USER, "container": REQUIRED_ADDRESS, "buildah_path": WORD},
    "kubectl": {**_COMMON, "pod": REQUIRED_ADDRESS, "kubectl_path": WORD, "kubectl_args": TEXTS},
    "lxc": {**_COMMON, "container": REQUIRED_ADDRESS, "lxc_attach_path": WORD},
    "lxd": {**_COMMON, "container": REQUIRED_ADDRESS, "lxc_path": WORD},
    "incus": {**_COMMON, "container": REQUIRED_ADDRESS, "incus_path": WORD},
    "jail": {**_USER, "container": REQUIRED_ADDRESS, "jexec_path": WORD},
    "setns": {
        **_USER,
        "container": REQUIRED_ADDRESS,
        "kind": choice("docker", "lxc", "lxd", "machinectl")._replace(required=True),
        "docker_path": WORD,
        "lxc_path": WORD,
        "lxc_info_path": WORD,
        "machinectl_path": WORD,
    },
}
"""The options of each connection method, by name."""

ONE_OF: Final[Mapping[str, tuple[str, ...]]] = {"docker": ("container", "image")}
"""The options of which a method needs at least one."""

SECRET_OPTIONS: Final = frozenset(
    name for options in METHODS.values() for name, option in options.items() if option.secret
)
"""The names of the options whose values must not appear in logs and messages."""
