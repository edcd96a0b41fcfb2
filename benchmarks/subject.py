"""
Runs in the environment of one of those that are compared: does what it is told on its standard
input, one JSON object a line, and prints how long that took.
"""

import collections.abc
import concurrent.futures
import contextlib
import ctypes
import gc
import json
import logging
import os
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
    return b"".join(hash_block.to_bytes(64, "big") for hash_block in _numbers((size + 63) // 64))[
        :size
    ]


def _numbers(count: int) -> collections.abc.Iterator[int]:
    import random

    source = random.Random(1)
    return (source.getrandbits(512) for _ in range(count))


def peak_memory() -> int:
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["VmHWM"].split()[0]) * 1024


def memory() -> int:
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["VmRSS"].split()[0]) * 1024


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

    def close(self) -> None:
        pass


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
        self._contents: dict[int, bytes] = {}

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

    def content(self, size: int) -> bytes:
        if size not in self._contents:
            self._contents.clear()
            self._contents[size] = content_of(size)
        return self._contents[size]

    def open(self, key: str, context: Context) -> float:
        proxy = self._proxies[key] = self._proxy(context)
        return timed(proxy.connect)

    def shut(self, key: str) -> float:
        return timed(self._proxies.pop(key).disconnect)

    def close(self) -> None:
        for key in list(self._proxies):
            self.shut(key)

    def first_call(self, key: str) -> float:
        return timed(lambda: self._proxies[key].file_exists("/etc/passwd"))

    def call(self, key: str, count: int) -> dict[str, float]:
        """One call, and the same with mitogen itself on the same connection, in turn."""
        proxy = self._proxies[key]
        context = proxy.context
        path = "/etc/passwd"
        ours, bare = [], []
        for _ in range(count):
            ours.append(timed(lambda: proxy.remote_call(os.path.exists, path)))
            bare.append(timed(lambda: context.call(os.path.exists, path)))
        return {"call": statistics.median(ours), "bare": statistics.median(bare)}

    def one_by_one(self, key: str, count: int) -> float:
        proxy = self._proxies[key]
        return timed(lambda: [proxy.file_exists("/etc/passwd") for _ in range(count)])

    def in_flight(self, key: str, count: int) -> float:
        submit, lexists = self._proxies[key].submit, self._module.lexists

        def all_at_once() -> None:
            for future in [submit(lexists, "/etc/passwd") for _ in range(count)]:
                future.result()

        return timed(all_at_once)

    def run_true(self, key: str) -> float:
        return timed(lambda: self._proxies[key].run("true"))

    def trio(self, key: str) -> float:
        proxy = self._proxies[key]

        def look() -> None:
            proxy.file_exists("/etc/passwd")
            proxy.file_stat("/etc/passwd")
            proxy.hash_file("/etc/passwd")

        return timed(look)

    def put(self, key: str, path: str, size: int) -> float:
        content = self.content(size)
        return timed(lambda: self._proxies[key].put(path, content))

    def read(self, key: str, path: str, size: int) -> float:
        content: list[bytes] = []
        seconds = timed(lambda: content.append(self._proxies[key].read_binary(path)))
        assert len(content[0]) == size
        return seconds

    def put_file(self, key: str, local: str, path: str) -> float:
        return timed(lambda: self._proxies[key].put_file(local, path))

    def get_file(self, key: str, path: str, local: str) -> float:
        return timed(lambda: self._proxies[key].get_file(path, local))

    def extra_memory(self, key: str, what: str, **arguments: typing.Any) -> dict[str, float]:
        """The time, and by how much the peaks of memory of both ends rise, in bytes."""
        if what == "put":
            self.content(arguments["size"])
        call = self._proxies[key].remote_call
        source = "/proc/self/status"
        there = self._peak_there(call, source, forget=True)
        here = forget_peak_memory()
        seconds = getattr(self, what)(key, **arguments)
        return {
            "seconds": seconds,
            "here": peak_memory() - here,
            "there": self._peak_there(call, source) - there,
        }

    def _peak_there(self, call: typing.Any, source: str, forget: bool = False) -> int:
        if forget:
            call(self._module.put, "/proc/self/clear_refs", b"5")
        text = call(self._module.read, source)
        return int(text.split("VmHWM:")[1].split()[0]) * 1024

    def profile(self, key: str, figure: str, times: int, **arguments: typing.Any) -> str:
        """Where the time of a figure goes, on this side, all threads included."""
        import cProfile
        import io
        import pstats

        measure = getattr(self, figure)
        measure(key, **arguments)
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(times):
            measure(key, **arguments)
        profile.disable()
        text = io.StringIO()
        pstats.Stats(profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(12)
        return text.getvalue().strip()

    def many(self, context: Context, count: int, threads: int) -> dict[str, float]:
        """Connections with a call each: seconds and memory, of each."""
        before = memory()
        proxies = [self._proxy(context) for _ in range(count)]

        def start(proxy: typing.Any) -> None:
            proxy.connect()
            proxy.file_exists("/etc/passwd")

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            seconds = timed(lambda: list(pool.map(start, proxies)))
            grown = memory() - before
            list(pool.map(lambda proxy: proxy.disconnect(best_effort=True), proxies))
        return {"seconds": seconds / count, "memory": grown / count}


class Mitogen(Subject):
    """
    mitogen by itself: what connecting costs at least.
    """

    def open(self, context: Context) -> float:
        import mitogen.master

        broker = mitogen.master.Broker(install_watcher=False)
        router = mitogen.master.Router(broker)
        start = now()
        try:
            self._connect(router, context)
            return now() - start
        finally:
            broker.shutdown()
            broker.join()

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
        self._content = b""
        return now() - start

    def call(self) -> float:
        return timed(lambda: self._gateway.remote_exec("channel.send(1)").receive())

    def put(self, path: str, size: int) -> float:
        self._content = content_of(size) if len(self._content) != size else self._content

        def put() -> None:
            channel = self._gateway.remote_exec(self._PUT)
            channel.send(path)
            channel.send(self._content)
            channel.receive()

        return timed(put)

    def read(self, path: str, size: int) -> float:
        def read() -> None:
            channel = self._gateway.remote_exec(self._READ)
            channel.send(path)
            assert len(channel.receive()) == size

        return timed(read)

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
        self._content = b""
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

    def call(self) -> float:
        return timed(lambda: self._loop.run_until_complete(self._sftp.exists("/etc/passwd")))

    def put(self, path: str, size: int) -> float:
        self._content = content_of(size) if len(self._content) != size else self._content

        async def put() -> None:
            async with self._sftp.open(path, "wb") as file:
                await file.write(self._content)

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

    def true(self, context: Context) -> float:
        return timed(lambda: subprocess.run(self._command(context, "true"), check=True))

    def _cat(
        self, context: Context, command: str, stdin: typing.Any = subprocess.PIPE
    ) -> "subprocess.Popen[bytes]":
        command = self._command(context, f"echo; {command}")
        process = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE)
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
    """What importing the module costs, beyond inmanta and mitogen."""
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
