"""Run Python on any host, over ssh, sudo, containers or a chain of them, with nothing installed."""

from inmanta_plugins.mitogen.calls.log import truncate_logged_value
from inmanta_plugins.mitogen.connections.hub import build_context, context_hash
from inmanta_plugins.mitogen.contexts.serialize import (
    get_optional_relation,
    get_resource_context,
    serialize_context,
)
from inmanta_plugins.mitogen.errors import (
    CallTimeoutError,
    Cause,
    ConnectError,
    ContextError,
    PythonNotFoundError,
    RemoteException,
    UnsendableError,
)
from inmanta_plugins.mitogen.hosts.served import allow_modules
from inmanta_plugins.mitogen.proxy import FileStat, Proxy
from inmanta_plugins.mitogen.settings import (
    CALL_TIMEOUT_ENV_VAR,
    CHECK_HOST_KEYS_ENV_VAR,
    LOGGED_TRUNCATED_VALUE_ENV_VAR,
    LOGGED_VALUE_MAX_LEN_ENV_VAR,
    LOGGER,
    MAX_MESSAGE_SIZE_ENV_VAR,
    MAX_SIZE_ENV_VAR,
    PREFETCH_ENV_VAR,
    SettingError,
)

__all__ = [
    "CALL_TIMEOUT_ENV_VAR",
    "CHECK_HOST_KEYS_ENV_VAR",
    "LOGGED_TRUNCATED_VALUE_ENV_VAR",
    "LOGGED_VALUE_MAX_LEN_ENV_VAR",
    "LOGGER",
    "MAX_MESSAGE_SIZE_ENV_VAR",
    "MAX_SIZE_ENV_VAR",
    "PREFETCH_ENV_VAR",
    "CallTimeoutError",
    "Cause",
    "ConnectError",
    "ContextError",
    "FileStat",
    "Proxy",
    "PythonNotFoundError",
    "RemoteException",
    "SettingError",
    "UnsendableError",
    "allow_modules",
    "build_context",
    "context_hash",
    "get_optional_relation",
    "get_resource_context",
    "serialize_context",
    "truncate_logged_value",
]
