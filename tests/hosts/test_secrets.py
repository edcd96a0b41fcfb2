"""
No password shows anywhere while it is used for real: not in a log at any level, an exception, a
text of an object, or the arguments, environment and files of a process.
"""

import collections.abc
import contextlib
import pathlib
import tempfile
import threading
import traceback

import far_side
import mitogen.core
import pytest

import support
from inmanta_plugins.mitogen import ConnectError, Proxy
from inmanta_plugins.mitogen.connections import hub as connect
from pytest_inmanta_mitogen import SshHost
from support import LOCAL, Context


class Watch:
    """
    Looks for secrets in all processes of this machine and in their temporary files.

    :param secrets: What to look for.
    """

    def __init__(self, *secrets: str) -> None:
        self.secrets = secrets
        self.found: set[tuple[str, str]] = set()
        """The secrets that were found, and where."""

    def look(self) -> None:
        """Look once, as root, who sees all."""
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            for part in ("cmdline", "environ"):
                self.look_at(process / part)
        for directory in {tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm", "/run"}:
            for path in pathlib.Path(directory).glob("*"):
                with contextlib.suppress(OSError):
                    if path.is_file() and path.stat().st_size < 1_000_000:
                        self.look_at(path)

    def look_at(self, path: pathlib.Path) -> None:
        with contextlib.suppress(OSError):
            content = path.read_bytes()
            self.found |= {(one, str(path)) for one in self.secrets if one.encode() in content}

    @contextlib.contextmanager
    def watching(self) -> collections.abc.Iterator[None]:
        """Look again and again while the block runs."""
        done = threading.Event()

        def run() -> None:
            self.look()
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
def all_logs(caplog: pytest.LogCaptureFixture) -> None:
    """
    Every logger at its lowest level: mitogen's, which also has hosts send theirs, and all others.
    """
    for name in (None, "mitogen", "mitogen.io", "mitogen.importer", "inmanta_plugins"):
        caplog.set_level(1, logger=name)


@pytest.fixture
def context(
    request: pytest.FixtureRequest, user: support.User, asked: support.User, server: SshHost
) -> Context:
    """The context of a method that needs a password, after a login that needs one too."""
    method = request.param
    ssh = server.serialized(username=asked.name, password=asked.password, identity_file=None)
    ssh["ssh_args"] = [*ssh["ssh_args"], "-o", "PubkeyAuthentication=no"]
    if method == "ssh":
        return ssh
    hop = {"method_name": method, "name": "", "python_path": ssh["python_path"], "via": ssh}
    if method == "su":
        own = {"username": user.name, "password": user.password, "password_prompt": "Password:"}
        return {**hop, **own}
    prompt = {"password_prompt": "password:"} if method == "doas" else {}
    return {**hop, "username": "root", "password": asked.password, **prompt}


each_method = pytest.mark.parametrize("context", ["ssh", "sudo", "su", "doas"], indirect=True)


def assert_not_logged(caplog: pytest.LogCaptureFixture, secret: str) -> None:
    assert secret not in caplog.text
    assert secret not in "".join(str(vars(record)) for record in caplog.records)


def texts_of(proxy: Proxy) -> str:
    """Return what the objects of an open connection look like."""
    connection = support.connection_of(proxy)
    link = connection.link
    stream = link.router.stream_by_id(link.context.context_id)
    objects = [
        proxy, connection, link, link.context, link.router, stream, stream.conn,
        stream.protocol, link.router.served, connect.HUB,
        *link.router._hosts.values(),
    ]  # fmt: skip
    return "\n".join(f"{thing!r} {thing!s}" for thing in objects)


@each_method
@pytest.mark.usefixtures("all_logs")
def test_a_password_that_is_used_shows_nowhere(
    context: Context, asked: support.User, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Watch(asked.password, context["password"])
    with watch.watching(), Proxy(context) as proxy:
        who, _, _ = proxy.run("id", ["-un"])
        shown = texts_of(proxy)
        environment, _, _ = proxy.run("sh", ["-c", "cat /proc/self/environ /proc/$PPID/environ"])
    assert who == context["username"]  # the password was needed, and did its work
    assert watch.found == set()
    for secret in watch.secrets:
        assert secret not in shown + environment
        assert_not_logged(caplog, secret)
    assert "mitogen" in {record.name.split(".")[0] for record in caplog.records}


@each_method
@pytest.mark.usefixtures("all_logs")
def test_a_wrong_password_shows_nowhere(
    context: Context, asked: support.User, caplog: pytest.LogCaptureFixture
) -> None:
    canary = "Canary-6f1d-wrong"
    proxy = Proxy({**context, "password": canary})
    watch = Watch(canary)
    with watch.watching(), pytest.raises(ConnectError) as caught:
        proxy.connect()
    error = caught.value
    told = "".join(traceback.format_exception(error)) + repr((error, vars(error), proxy))
    for secret in (canary, asked.password):
        assert secret not in told
        assert_not_logged(caplog, secret)
    assert watch.found == set()


def test_a_secret_argument_shows_in_no_log_of_mitogens(caplog: pytest.LogCaptureFixture) -> None:
    secrets = [mitogen.core.Secret(f"s3cr3t-{number}") for number in range(9)]
    for name in ("mitogen", "inmanta_plugins"):
        caplog.set_level(1, logger=name)
    with Proxy(LOCAL) as proxy:
        proxy.remote_call(far_side.nap, 0)
        for call in (proxy.remote_call, proxy.context.call):
            call(far_side.is_text, secrets[0])
            call(far_side.is_text, value=secrets[1])
        futures = [proxy.submit(far_side.is_text, secret) for secret in secrets]
        assert all(future.result(60) for future in futures)
    assert "Dispatcher" in caplog.text
    assert "s3cr3t" not in caplog.text
