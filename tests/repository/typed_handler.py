"""A handler as others write it, with mistakes in it. It never runs: a type checker reads it."""

import os
import platform
import socket
from concurrent.futures import Future
from typing import Any, assert_type

from inmanta_plugins.mitogen import Cause, ConnectError, Proxy, PythonNotFoundError, RemoteException
from inmanta_plugins.mitogen.abc import HandlerABC, ResourceABC


class Thing(ResourceABC):
    fields = ("size", "names")
    size: int
    names: list[str]


def count(path: str, *, deep: bool = False) -> int:
    return len(path)


class ThingHandler(HandlerABC[Thing]):
    def results(self, proxy: Proxy, resource: Thing, error: ConnectError) -> None:
        assert_type(self.proxy, Proxy)
        assert_type(resource.via, dict[str, object])
        assert_type(resource.names, list[str])
        assert_type(proxy.file_exists("/etc"), bool)
        assert_type(proxy.file_stat("/etc")["permissions"], int)
        assert_type(proxy.file_stat("/etc")["owner"], str)
        assert_type(proxy.hash_file("/etc/passwd"), str)
        assert_type(proxy.is_symlink("/etc"), bool)
        assert_type(proxy.read("/etc/passwd"), str)
        assert_type(proxy.read_binary("/etc/passwd"), bytes)
        assert_type(proxy.readlink("/etc/a"), str)
        assert_type(proxy.run("ls", ["-l"], timeout=5), tuple[str, str, int])
        assert_type(proxy.connect(exists_ok=True), Any)  # mitogen has no types
        assert_type(proxy.remote_call(count, "/etc", deep=True), int)
        assert_type(proxy.remote_call(socket.gethostname), str)
        assert_type(proxy.remote_call(os.getloadavg), tuple[float, float, float])
        assert_type(proxy.submit(count, "/etc"), Future[int])
        assert_type(proxy.submit(platform.node).result(), str)
        assert_type(error.cause, Cause)
        assert_type(error.user, str | None)
        assert_type(RemoteException(error).remote_type, str | None)
        assert_type(PythonNotFoundError({}).found, str)

    def nothing(self, proxy: Proxy) -> None:
        proxy.chmod("/etc", "755")
        proxy.chown("/etc", "root", 0)
        proxy.disconnect(timeout=1.0)
        proxy.get_file("/etc/passwd", "/tmp/passwd")
        proxy.mkdir("/etc/a")
        proxy.put("/etc/a", b"")
        proxy.put_file("/tmp/passwd", "/etc/passwd", progress=lambda done, total: None)
        proxy.remove("/etc/a")
        proxy.rmdir("/etc/a")
        proxy.symlink("/etc/a", "/etc/b")

    def mistakes(self, proxy: Proxy, resource: Thing) -> None:
        proxy.put("/etc/a", "text")  # type: ignore[arg-type]
        proxy.read()  # type: ignore[call-arg]
        proxy.run("ls", "-l")  # type: ignore[arg-type]
        proxy.remote_call(count)  # type: ignore[call-arg]
        proxy.remote_call(count, 5)  # type: ignore[arg-type]
        proxy.remote_call(count, "/etc", depth=1)  # type: ignore[call-arg]
        proxy.remote_call(count, "/etc").upper()  # type: ignore[attr-defined]
        proxy.submit(count, b"/etc")  # type: ignore[arg-type]
        print(proxy.submit(count, "/etc") + 1)  # type: ignore[operator]
        proxy.no_such_method()  # type: ignore[attr-defined]
        print(resource.length)  # type: ignore[attr-defined]
