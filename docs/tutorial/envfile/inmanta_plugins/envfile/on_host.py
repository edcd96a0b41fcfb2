"""What runs on the host: it needs Python 3.6 and the standard library, and no inmanta."""

import os
from typing import List, Optional

import inmanta_mitogen


def get(path: str, name: str) -> Optional[str]:
    """
    :return: The value of a variable, that of its last line; None where there is none.
    """
    values = [line[len(name) + 1 :] for line in _lines(path) if line.startswith(name + "=")]
    return values[-1] if values else None


def assign(path: str, name: str, value: str) -> None:
    """
    Give a variable a value, in the place where it has one, else at the end of the file.
    """
    lines = _lines(path)
    own = [number for number, line in enumerate(lines) if line.startswith(name + "=")]
    place = own[0] if own else len(lines)
    others = [line for number, line in enumerate(lines) if number not in own]
    _write(path, [*others[:place], name + "=" + value, *others[place:]])


def remove(path: str, name: str) -> None:
    """
    Remove a variable; the file stays.
    """
    _write(path, [line for line in _lines(path) if not line.startswith(name + "=")])


def _lines(path: str) -> List[str]:
    return inmanta_mitogen.read(path).splitlines() if os.path.exists(path) else []


def _write(path: str, lines: List[str]) -> None:
    # All or nothing, with the owner and the mode that the file had.
    inmanta_mitogen.put(path, "".join(line + "\n" for line in lines).encode())
