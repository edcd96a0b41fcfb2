"""
Runs in the environment of one of those that are compared: does what it is told on its standard
input, one JSON object a line, and prints how long that took.
"""

import collections.abc
import concurrent.futures
import contextlib
import ctypes
import gc
import getpass
import json
import logging
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
import traceback
import typing

now = time.perf_counter
Context = dict[str, typing.Any]


def content_of(size: int) -> bytes:
    # Nothing that ssh's compression could make use of, and the same for all.
    source = random.Random(1)
    return b"".join(source.randbytes(min(1 << 20, size - at)) for at in range(0, size, 1 << 20))


def memory(field: str) -> int:
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines[field].split()[0]) * 1024


def peak_memory() -> int:
    return memory("VmHWM")


def forget_peak_memory() -> int:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what earlier figures left must not be there to be reused
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak_memory()


def timed(action: collections.abc.Callable[[], object]) -> float:
    start = now()
    action()
    return now() - start


class Subject:
    """
    What is compared. The methods are named by what they measure, and return seconds.
    """

    _content = b""

    def close(self) -> None:
        pass

    def content(self, size: int) -> bytes:
        if len(self._content) != size:
            self._content = content_of(size)
        return self._content


class Inmanta(Subject):
    """
    The module, this one or the published one: what differs is what the environment has.
    """

    def __init__(self) -> None:
        import inmanta.agent.handler

        import inmanta_mitogen
        from inmanta_plugins.mitogen import Proxy

        self._module = inmanta_mitogen
        self._proxies: dict[str, typing.Any] = {}

        class Formatting(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                record.getMessage()

        logger = logging.getLogger("bench")
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        logger.addHandler(Formatting())

        def proxy(context: Context) -> typing.Any:
            return Proxy(context, logger=inmanta.agent.handler.PythonLogger(logger))

        self._proxy = proxy

    def open(self, key: str, context: Context) -> float:
        proxy = self._proxies[key] = self._proxy(context)
        return timed(proxy.connect)

    def shut(self, key: str) -> float:
        return timed(self._proxies.pop(key).disconnect)

    def close(self) -> None:
        for key in list(self._proxies):
            self.shut(key)

    # One operation, also by its name in `small` and `cold`

    def operation(self, proxy: typing.Any, what: str, path: str) -> object:
        """
        Do one operation.

        :param path: A file that is there, of 1 kB.
        """
        if what == "call":
            return proxy.remote_call(os.path.exists, path)
        if what == "mitogen's call":
            return proxy.context.call(os.path.exists, path)
        if what == "put 1 kB":
            return proxy.put(f"{path}.put", self.content(1000))
        if what == "run true":
            return proxy.run("true")
        if what == "chmod":
            return proxy.chmod(path, "644")
        if what == "exists + stat + hash":
            return [self.operation(proxy, each, path) for each in what.split(" + ")]
        names = {"exists": "file_exists", "stat": "file_stat", "hash": "hash_file"}
        return getattr(proxy, names.get(what, what.split()[0]))(path)

    def small(self, key: str, what: str, path: str, count: int) -> float:
        """Return the median of an operation that is done time and again."""
        proxy = self._proxies[key]
        return statistics.median(
            timed(lambda: self.operation(proxy, what, path)) for _ in range(count)
        )

    def cold(self, context: Context, path: str, operations: list[str]) -> dict[str, float]:
        """Measure the first connection of a process, and the first of each operation."""
        times = {"connect": self.open("cold", context)}
        for what in operations:
            times[f"first {what}"] = self.small("cold", what, path, 1)
        return {"connect and all the first operations": sum(times.values()), **times}

    # Resources

    def deploy(self, type: str, path: str, context: Context) -> float:
        """Have the handler of a resource deploy it, as an agent does."""
        resource, handler = self._resource(type, path, context)
        ctx = self._handlers.HandlerContext(resource)
        seconds = timed(lambda: handler.execute(ctx, resource, False))
        self._proxies[f"of {type}"] = handler.proxy
        assert ctx.status == "deployed", [str(log) for log in ctx.logs]
        return seconds

    def _resource(self, type: str, path: str, context: Context) -> tuple[typing.Any, typing.Any]:
        import asyncio
        import hashlib
        import importlib
        import types

        import inmanta.agent.cache
        import inmanta.agent.handler
        import inmanta.resources

        if not hasattr(self, "_cache"):
            self._handlers = inmanta.agent.handler
            self._cache = inmanta.agent.cache.AgentCache()
            importlib.import_module("inmanta_plugins.fs.resources")
            importlib.import_module("inmanta_plugins.files.text")
            self._agent: typing.Any = types.SimpleNamespace(eventloop=asyncio.new_event_loop())
        digest = hashlib.sha1(b"content").hexdigest()
        key, more = ("dst", {"src": "/etc"}) if type == "fs::Symlink" else ("path", {})
        fields: dict[str, object] = {
            "id": f"{type}[there,{key}={path}],v=1",
            key: path,
            "via": context,
            **more,
            "content": "content",
            "hash": digest,
            "permissions": 644,
            "owner": getpass.getuser(),
            "group": None,
            "managed": True,
            "purged": False,
            "purge_on_delete": False,
            "requires": [],
            "send_event": False,
            "receive_events": False,
        }
        resource = inmanta.resources.Resource.deserialize(fields)
        handler: typing.Any = self._handlers.Commander.get_provider(self._agent, resource)
        handler.set_cache(self._cache)
        handler.get_file = {digest: b"content"}.get
        handler.stat_file = lambda digest: True
        return resource, handler

    # Many calls, large contents, many connections

    def one_by_one(self, key: str, count: int) -> float:
        proxy = self._proxies[key]
        return timed(lambda: [proxy.file_exists("/etc/passwd") for _ in range(count)])

    def in_flight(self, key: str, count: int) -> float:
        submit, lexists = self._proxies[key].submit, self._module.lexists
        start = now()
        for future in [submit(lexists, "/etc/passwd") for _ in range(count)]:
            future.result()
        return now() - start

    def put(self, key: str, path: str, size: int) -> float:
        content = self.content(size)
        return timed(lambda: self._proxies[key].put(path, content))

    def read(self, key: str, path: str, size: int) -> float:
        start = now()
        content = self._proxies[key].read_binary(path)
        seconds = now() - start
        assert len(content) == size
        return seconds

    def answer(self, key: str, count: int) -> dict[str, float]:
        """Measure a large structured answer, and the same as mitogen itself sends it."""
        proxy = self._proxies[key]
        arguments = (json.loads, json.dumps([{"name": f"n{n}", "size": n} for n in range(count)]))
        results: list[object] = []
        times = {
            "": timed(lambda: results.append(proxy.remote_call(*arguments))),
            "mitogen's own": timed(lambda: results.append(proxy.context.call(*arguments))),
        }
        assert results[0] == results[1]
        return times

    def put_file(self, key: str, local: str, path: str) -> float:
        return timed(lambda: self._proxies[key].put_file(local, path))

    def get_file(self, key: str, path: str, local: str) -> float:
        return timed(lambda: self._proxies[key].get_file(path, local))

    def extra_memory(self, key: str, what: str, **arguments: typing.Any) -> dict[str, float]:
        """Measure the time, and by how much the peaks of memory of both ends rise, in bytes."""
        if what == "put":
            self.content(arguments["size"])
        call = self._proxies[key].remote_call
        source = "/proc/self/status"
        call(self._module.put, "/proc/self/clear_refs", b"5")
        there = self._peak_there(call, source)
        here = forget_peak_memory()
        seconds = getattr(self, what)(key, **arguments)
        return {
            "seconds": seconds,
            "here": peak_memory() - here,
            "there": self._peak_there(call, source) - there,
        }

    def _peak_there(self, call: typing.Any, source: str) -> int:
        text = call(self._module.read, source)
        return int(text.split("VmHWM:")[1].split()[0]) * 1024

    def many(self, context: Context, count: int, threads: int) -> dict[str, float]:
        """Measure connections with a call each: seconds and memory, of each."""
        before = memory("VmRSS")
        proxies = [self._proxy(context) for _ in range(count)]

        def start(proxy: typing.Any) -> None:
            proxy.connect()
            proxy.file_exists("/etc/passwd")

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            seconds = timed(lambda: list(pool.map(start, proxies)))
            grown = memory("VmRSS") - before
            list(pool.map(lambda proxy: proxy.disconnect(best_effort=True), proxies))
        return {"seconds": seconds / count, "memory": grown / count}


class Mitogen(Subject):
    """
    mitogen by itself: what connecting costs at least.
    """

    def open(self, context: Context) -> float:
        import mitogen.master

        self._broker = mitogen.master.Broker(install_watcher=False)
        router = mitogen.master.Router(self._broker)
        start = now()
        self._context = self._connect(router, context)
        return now() - start

    def first_call(self) -> float:
        return timed(lambda: self._context.call(os.path.exists, "/etc/passwd"))

    def cold(self, context: Context, **arguments: object) -> dict[str, float]:
        return {"connect": self.open(context)}

    def close(self) -> None:
        self._broker.shutdown()
        self._broker.join()

    def _connect(self, router: typing.Any, context: Context) -> typing.Any:
        options = {key: value for key, value in context.items() if key not in ("name", "via")}
        via = context.get("via")
        if via:
            options["via"] = self._connect(router, via)
        return getattr(router, options.pop("method_name"))(**options)


class Execnet(Subject):
    """
    execnet: a channel that carries the content.
    """

    _PUT = "open(channel.receive(), 'wb').write(channel.receive()); channel.send(None)"
    _READ = "channel.send(open(channel.receive(), 'rb').read())"

    def open(self, spec: str) -> float:
        import execnet

        start = now()
        self._gateway = execnet.makegateway(spec)
        return now() - start

    def put(self, path: str, size: int) -> float:
        content = self.content(size)
        start = now()
        channel = self._gateway.remote_exec(self._PUT)
        channel.send(path)
        channel.send(content)
        channel.receive()
        return now() - start

    def read(self, path: str, size: int) -> float:
        start = now()
        channel = self._gateway.remote_exec(self._READ)
        channel.send(path)
        assert len(channel.receive()) == size
        return now() - start

    def close(self) -> None:
        self._gateway.exit()


class Asyncssh(Subject):
    """
    asyncssh: its SFTP client.
    """

    def open(self, context: Context) -> float:
        import asyncio

        import asyncssh

        self._loop = asyncio.new_event_loop()
        start = now()
        self._connection = self._loop.run_until_complete(
            asyncssh.connect(
                context["hostname"],
                context["port"],
                username=context["username"],
                client_keys=[context["identity_file"]],
                known_hosts=None,
                config=None,
            )
        )
        self._sftp = self._loop.run_until_complete(self._connection.start_sftp_client())
        return now() - start

    def put(self, path: str, size: int) -> float:
        content = self.content(size)

        async def put() -> None:
            async with self._sftp.open(path, "wb") as file:
                await file.write(content)

        return timed(lambda: self._loop.run_until_complete(put()))

    def read(self, path: str, size: int) -> float:
        async def read() -> None:
            async with self._sftp.open(path, "rb") as file:
                assert len(await file.read()) == size

        return timed(lambda: self._loop.run_until_complete(read()))

    def close(self) -> None:
        self._connection.close()
        self._loop.run_until_complete(self._connection.wait_closed())
        self._loop.close()


class Ssh(Subject):
    """
    The ssh client: the floor. Its connection is taken off, by counting from when the other end says
    that it is there.
    """

    _CHUNK = 1 << 20

    def _command(self, context: Context, command: str) -> list[str]:
        # fmt: off
        return [
            "ssh", "-F", "/dev/null", "-o", "LogLevel=ERROR", "-o", "StrictHostKeyChecking=no",
            "-o", "UserKnownHostsFile=/dev/null", "-o", "IdentitiesOnly=yes",
            "-o", "Compression=no", "-i", context["identity_file"], "-p", str(context["port"]),
            f"{context['username']}@{context['hostname']}", command,
        ]
        # fmt: on

    def _cat(
        self, context: Context, command: str, stdin: typing.Any = subprocess.PIPE
    ) -> "subprocess.Popen[bytes]":
        whole = self._command(context, f"echo; {command}")
        process = subprocess.Popen(whole, stdin=stdin, stdout=subprocess.PIPE)
        self._await_line(process)
        return process

    def _await_line(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 1) == b"\n"

    def put(self, context: Context, local: str, path: str) -> float:
        with open(local, "rb") as file:
            command = f"cat >{shlex.quote(path)}; echo"
            with self._cat(context, command, file) as process:
                return timed(lambda: self._await_line(process))

    def read(self, context: Context, path: str, size: int) -> float:
        with self._cat(context, f"read x; cat {shlex.quote(path)}") as process:
            assert process.stdin is not None
            assert process.stdout is not None
            start = now()
            process.stdin.write(b"\n")
            process.stdin.flush()
            while size:
                chunk = os.read(process.stdout.fileno(), self._CHUNK)
                assert chunk
                size -= len(chunk)
            seconds = now() - start
            process.stdin.close()
            return seconds


SUBJECTS: dict[str, type[Subject]] = {
    "inmanta": Inmanta,
    "mitogen": Mitogen,
    "execnet": Execnet,
    "asyncssh": Asyncssh,
    "ssh": Ssh,
}


def import_times() -> dict[str, float]:
    """Measure what importing the module costs, beyond inmanta and mitogen."""
    import importlib

    for name in ("agent.handler", "module", "plugins", "resources"):
        importlib.import_module(f"inmanta.{name}")
    for name in ("master", "parent"):
        importlib.import_module(f"mitogen.{name}")
    return {"seconds": timed(lambda: importlib.import_module("inmanta_plugins.mitogen"))}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    # Whatever the libraries print goes where errors go.
    os.dup2(2, 1)
    if sys.argv[1] == "import":
        print(json.dumps(import_times()), file=answers)
        return
    subject = SUBJECTS[sys.argv[1]]()
    for line in sys.stdin:
        order = json.loads(line)
        try:
            result = getattr(subject, order.pop("do"))(**order)
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(result), file=answers, flush=True)
    subject.close()


if __name__ == "__main__":
    main()
