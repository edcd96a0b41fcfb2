"""
What runs on the hosts: the functions that handlers call through a connection.

Needs Python 3.6 and its standard library, nothing else, and imports nothing that hosts may lack. A
host gets each file from the agent when it is first needed, so this one loads none of the others
before one of their functions is asked for.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inmanta_mitogen.files import file_stat, hash_file, islink, lexists, read, read_binary
    from inmanta_mitogen.process import run
    from inmanta_mitogen.staged import put

__all__ = [
    "file_stat",
    "hash_file",
    "islink",
    "lexists",
    "put",
    "read",
    "read_binary",
    "run",
]

# Where they are, but for those of files.
_MODULES = {"put": "staged", "run": "process"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Only the one that is needed: a host compiles each.
    module = importlib.import_module(f"inmanta_mitogen.{_MODULES.get(name, 'files')}")
    value = globals()[name] = getattr(module, name)
    return value


if sys.version_info < (3, 7):  # noqa: UP036  # hosts may be older than any that ruff knows
    for _name in __all__:
        __getattr__(_name)
