"""
What runs on the hosts: the functions that handlers call through a connection.

Needs Python 3.6 and its standard library, nothing else, and imports nothing that hosts may lack.
"""

from inmanta_mitogen.files import file_stat, hash_file, islink, lexists, put, read, read_binary
from inmanta_mitogen.process import run

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

# Logs and hosts know a function by its module's name, and these by this one: which file they are
# in is nobody else's business.
for _function in (file_stat, hash_file, islink, lexists, put, read, read_binary, run):
    _function.__module__ = __name__
