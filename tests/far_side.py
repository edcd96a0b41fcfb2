"""Functions that tests run on a host. They need nothing but the standard library and mitogen."""

import os
import signal
import time
from typing import Any, Dict, Iterator, List

import mitogen.core


def echo(*args: Any, **kwargs: Any) -> List[Any]:
    return [list(args), kwargs]


def fail(text: str) -> None:
    raise ValueError(text)


def is_text(value: object) -> bool:
    return isinstance(value, str)


def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def note_and_die(path: str) -> None:
    """Leave a trace of having run, and take the interpreter with it."""
    with open(path, "a") as file:
        file.write("ran\n")
    os.kill(os.getpid(), signal.SIGKILL)


def note_and_nap(path: str, seconds: float) -> None:
    """Leave a trace of having run, and take some time."""
    with open(path, "a") as file:
        file.write("ran\n")
    time.sleep(seconds)


def unsendable() -> Iterator[int]:
    return (number for number in range(3))


def unreadable() -> complex:
    return complex(1, 2)


def large(size: int) -> bytes:
    return b"x" * size


@mitogen.core.takes_router
def table_sizes(router: Any) -> Dict[str, int]:
    """Return what a hop's router keeps of the contexts that were connected through it."""
    listeners = vars(router.broker)["_signals"]
    return {
        "contexts": len(router._context_by_id),
        "streams": len(router._stream_by_id),
        "routes": len(router.route_monitor._routes_by_stream),
        "listeners": sum(map(len, listeners.values())),
        "timers": len(router.broker.timers._lst),
    }


class Holder:
    @staticmethod
    def static(value: Any) -> Any:
        return value

    @classmethod
    def name(cls) -> str:
        return cls.__name__

    def method(self) -> str:
        return "never reached"
