"""
No password shows anywhere while it is used for real: not in a log at any level, an exception, a
text of an object, or the arguments, environment and files of a process.
"""

import collections.abc
import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import traceback

import far_side
import mitogen.core
import pytest
from reach import Context

import support
from inmanta_plugins.mitogen import ConnectError, Proxy
from inmanta_plugins.mitogen.connections import hub as connect
from pytest_inmanta_mitogen import SshHost

METHODS = ("ssh", "sudo", "su", "doas")


@dataclasses.dataclass
class Watch:
    """
    Looks for a secret in all processes of this machine and in their temporary files.

    :attr secret: What to look for.
    :attr found: Where it was.
    :attr rounds: How often it has looked.
    """

    secret: str
    found: set[str] = dataclasses.field(default_factory=set)
    rounds: int = 0

    def look(self) -> None:
        """
        Look once, as root, who sees all.
        """
        needle = self.secret.encode()
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            for part in ("cmdline", "environ"):
                with contextlib.suppress(OSError):
                    if needle in (process / part).read_bytes():
                        self.found.add(str(process / part))
        for directory in {tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm", "/run"}:
            for path in pathlib.Path(directory).glob("*"):
                with contextlib.suppress(OSError):
                    small = path.is_file() and path.stat().st_size < 1_000_000
                    if small and needle in path.read_bytes():
                        self.found.add(str(path))
        self.rounds += 1

    @contextlib.contextmanager
    def watching(self) -> collections.abc.Iterator[None]:
        """
        Look again and again while the block runs.
        """
        done = threading.Event()

        def run() -> None:
            while not done.is_set():
                self.look()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


@pytest.fixture
def all_logs(caplog: pytest.LogCaptureFixture) -> collections.abc.Iterator[None]:
    """
    Every logger at its lowest level: mitogen's, which also has hosts send theirs, and all others.
    """
    names = [None, "mitogen", "mitogen.io", "mitogen.importer", "inmanta_plugins"]
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    caplog.set_level(1)
    for logger in loggers:
        logger.setLevel(1)
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


def context_of(
    method: str, user: support.User, asked: support.User, server: SshHost, password: str | None
) -> Context:
    ssh = {**server.serialized(), "username": asked.name, "password": asked.password}
    python = server.serialized()["python_path"]
    ssh["ssh_args"] = [*ssh.get("ssh_args", []), "-o", "PubkeyAuthentication=no"]
    ssh.pop("identity_file", None)
    if method == "ssh":
        return {**ssh, "password": password or asked.password}
    prompts = {"su": "Password:", "doas": "password:"}
    # The user's own for sudo and doas, that of the other user for su.
    own = asked.password if method != "su" else user.password
    hop = {
        "method_name": method,
        "name": "",
        "username": "root" if method != "su" else user.name,
        "password": password or own,
        "python_path": python,
        "via": ssh,
    }
    if method in prompts:
        hop["password_prompt"] = prompts[method]
    return hop


def texts_of(proxy: Proxy) -> str:
    """
    What the objects of an open connection look like.
    """
    connection = support.connection_of(proxy)
    link = connection.link
    stream = link.router.stream_by_id(link.context.context_id)
    objects = [
        proxy, connection, link, link.context, link.router, stream, stream.conn,
        stream.protocol, link.router.served, link.router.forwarded, connect.hub(),
        *link.router._guests.values(),
    ]  # fmt: skip
    return "\n".join(f"{thing!r} {thing!s}" for thing in objects)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("all_logs")
def test_a_password_that_is_used_shows_nowhere(
    method: str,
    user: support.User,
    asked: support.User,
    server: SshHost,
    caplog: pytest.LogCaptureFixture,
) -> None:
    context = context_of(method, user, asked, server, None)
    watches = [Watch(asked.password), Watch(context["password"])]
    with contextlib.ExitStack() as stack:
        for watch in watches:
            stack.enter_context(watch.watching())
        with Proxy(context) as proxy:
            who, _, _ = proxy.run("id", ["-un"])
            shown = texts_of(proxy)
            environment, _, _ = proxy.run(
                "sh", ["-c", "cat /proc/self/environ /proc/$PPID/environ"]
            )
    expected = {"ssh": asked.name, "su": user.name}.get(method, "root")
    assert who == expected  # the password was needed, and did its work
    for watch in watches:
        assert watch.rounds > 0
        assert watch.found == set()
        assert watch.secret not in caplog.text + shown + environment
        assert watch.secret not in "".join(str(vars(record)) for record in caplog.records)
    assert "mitogen" in {record.name.split(".")[0] for record in caplog.records}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("all_logs")
def test_a_wrong_password_shows_nowhere(
    method: str,
    user: support.User,
    asked: support.User,
    server: SshHost,
    caplog: pytest.LogCaptureFixture,
) -> None:
    canary = "Canary-6f1d-wrong"
    proxy = Proxy(context_of(method, user, asked, server, canary))
    watch = Watch(canary)
    with watch.watching(), pytest.raises(ConnectError) as caught:
        proxy.connect()
    error = caught.value
    told = (
        "".join(traceback.format_exception(error)) + repr(error) + repr(vars(error)) + repr(proxy)
    )
    for secret in (canary, asked.password):
        assert secret not in told
        assert secret not in caplog.text
        assert secret not in "".join(str(vars(record)) for record in caplog.records)
    assert watch.found == set()


def test_a_secret_argument_shows_in_no_log_of_mitogens(
    caplog: pytest.LogCaptureFixture,
) -> None:
    secrets = [mitogen.core.Secret(f"s3cr3t-{number}") for number in range(9)]
    for name in ("mitogen", "inmanta_plugins"):
        caplog.set_level(1, logger=name)
    with Proxy({"method_name": "local", "python_path": [sys.executable]}) as proxy:
        proxy.remote_call(far_side.nap, 0)
        for call in (proxy.remote_call, proxy.context.call):
            call(far_side.is_text, secrets[0])
            call(far_side.is_text, value=secrets[1])
        futures = [proxy.submit(far_side.is_text, secret) for secret in secrets]
        assert all(future.result(60) for future in futures)
    assert "Dispatcher" in caplog.text
    assert "s3cr3t" not in caplog.text


def test_the_watch_finds_what_shows(tmp_path: pathlib.Path) -> None:
    canary = "Canary-51ab-shown"
    watch = Watch(canary)
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(json.dumps({"password": canary}))
        file.flush()
        watch.look()
        assert watch.found == {file.name}

    with subprocess.Popen(["sleep", "60"], env={"CANARY": canary, **os.environ}) as process:
        try:
            for _ in range(100):
                watch.look()
                if f"/proc/{process.pid}/environ" in watch.found:
                    break
        finally:
            process.kill()
    assert f"/proc/{process.pid}/environ" in watch.found
