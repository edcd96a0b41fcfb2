"""
Does with the installed mitogen module what it is told on its standard input, a JSON object a line.

The other half of faults_table.py. It runs with whatever version of the module its interpreter has.
"""

import concurrent.futures
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from inmanta_plugins.mitogen import Proxy, RemoteException

_proxies: dict[str, Any] = {}


def open_proxy(key: str, context: dict[str, Any], **options: object) -> str:
    try:
        proxy = Proxy(context, **options)  # type: ignore[arg-type]  # not each version has them
    except TypeError:
        proxy = Proxy(context)
    # Kept although it may fail, as the cache of an agent keeps handlers.
    _proxies[key] = proxy
    proxy.connect()
    return "connected"


def close_proxy(key: str) -> str:
    _proxies.pop(key).disconnect()
    return "disconnected"


def method(key: str, name: str, *args: Any) -> object:
    if name == "put":
        args = (args[0], b"x" * args[1])
    return getattr(_proxies[key], name)(*args)


def set_timeout(key: str, seconds: float | None) -> str:
    _proxies[key].call_timeout = seconds
    return "set"


def remote(key: str, module: str, name: str, *args: Any) -> object:
    return _proxies[key].remote_call(getattr(importlib.import_module(module), name), *args)


def odd(key: str, what: str) -> object:
    """A call of what can't be called, sent or returned."""
    call = _proxies[key].remote_call
    if what == "lambda":
        return call(lambda: 1)
    if what == "argument":
        return call(len, [threading.Lock()])
    if what == "result":
        return call(open, "/dev/null")
    return len(call(os.urandom, 135 * 2**20))


def many(key: str, threads: int, calls: int) -> str:
    """Calls from many threads: how many answered what they should, and how many failed."""

    def one(number: int) -> bool:
        try:
            return bool(_proxies[key].remote_call(abs, -number) == number)
        except RemoteException:
            return False

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        right = sum(pool.map(one, range(calls)))
    return f"{right} of {calls} right"


def forked(key: str) -> str:
    """A call in a fork of this process."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(15)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        try:
            os.write(write, str(_proxies[key].remote_call(os.getpid)).encode())
        except BaseException as error:
            os.write(write, told(error).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    os.waitpid(child, 0)
    return text or "waits for ever"


def interrupted(key: str, context: dict[str, Any], seconds: float) -> str:
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
    return open_proxy(key, context)


def count() -> dict[str, int]:
    children = 0
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    children += int(file.read().rpartition(")")[2].split()[1]) == os.getpid()
            except OSError:
                continue
    files = len(os.listdir("/proc/self/fd")) - 1
    return {"threads": threading.active_count(), "files": files, "children": children}


def told(error: BaseException) -> str:
    kind = type(error).__name__
    if isinstance(error, RemoteException):
        kind += f" of {type(error.remote_exception).__name__}"
    lines = str(error).strip().splitlines()
    return f"{kind}: {lines[0]}" if lines else kind


COMMANDS: dict[str, Callable[..., object]] = {
    "open": open_proxy,
    "close": close_proxy,
    "method": method,
    "timeout": set_timeout,
    "remote": remote,
    "odd": odd,
    "many": many,
    "fork": forked,
    "interrupted": interrupted,
    "count": count,
}


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = COMMANDS[request["do"]](*request["args"], **request["options"])
            reply = {"ok": answer}
        except BaseException as error:
            reply = {"error": told(error)}
        sys.stdout.write(json.dumps(reply, default=repr) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
