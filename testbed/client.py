"""
What a user does with an orchestrator: make an environment, export a model, look at what came of it.
"""

import collections.abc
import dataclasses
import datetime
import json
import pathlib
import shlex
import time
import typing
import urllib.error
import urllib.parse
import urllib.request

from testbed.processes import finish, neutral_environment, start

FINAL_STATES = frozenset(
    {"deployed", "failed", "skipped", "unavailable", "undefined", "skipped_for_undefined"}
)
"""The states in which nothing more happens to a resource by itself."""

PROJECT = """
name: project
modulepath: libs
downloadpath: libs
install_mode: release
pip:
  use_system_config: true
"""
"""The text of ``project.yml``."""


class ApiError(Exception):
    """The orchestrator refused a request, or did not answer it."""


class DeploymentTimeoutError(Exception):
    """There are resources that did not reach a final state in time."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a function on a host, as it was logged."""

    function: str
    args: list[object]
    kwargs: dict[str, object]
    result: object
    """What it returned; None if it raised an exception."""
    exception: str | None
    """The exception that it raised."""


@dataclasses.dataclass(frozen=True)
class LogRecord:
    """One line of the log of a resource."""

    level: str
    action: str
    message: str
    values: dict[str, typing.Any]

    @property
    def call(self) -> Call | None:
        """The call that this line is about, if it is about one."""
        if "function" not in self.values or "context_name" not in self.values:
            return None
        exception = self.values.get("exception")
        return Call(
            function=str(self.values["function"]),
            args=list(self.values.get("args", [])),
            kwargs=dict(self.values.get("kwargs", {})),
            result=self.values.get("result"),
            exception=None if exception is None else str(exception),
        )


@dataclasses.dataclass(frozen=True)
class Resource:
    """A resource and what became of it."""

    id: str
    type: str
    agent: str
    value: str
    """The value of the attribute that tells it from others of its type on the same agent."""
    state: str

    @property
    def final(self) -> bool:
        """Whether its deployment is over."""
        return self.state in FINAL_STATES


class Orchestrator:
    """
    A client of an orchestrator's API.

    :param url: Its address, as in ``http://127.0.0.1:8888``.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        # The machine's own server: no proxy of the user's environment knows it.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def version(self) -> str:
        """
        Return the version of inmanta-core that it runs.

        :raises ApiError: When it does not answer, e.g. as it is not up yet.
        """
        status = self._request("GET", "/api/v1/serverstatus")["data"]
        return str(status["version"])

    def create_environment(self, name: str) -> str:
        """
        Create a project with one environment.

        :param name: The name of both.
        :return: The id of the environment.
        """
        created = self._request("PUT", "/api/v2/project", {"name": name})["data"]
        environment = self._request(
            "PUT", "/api/v2/environment", {"project_id": created["id"], "name": name}
        )["data"]
        return str(environment["id"])

    def start_agents(self, environment: str, names: collections.abc.Iterable[str]) -> None:
        """
        Let the orchestrator start the agents of an environment by itself, and without delay. Newer
        orchestrators do so unasked.

        :param environment: The id of the environment.
        :param names: The names of the agents.
        """
        path = "/api/v2/environment_settings"
        known = self._request("GET", path, environment=environment)["data"]["definition"]
        wanted = {
            "autostart_agent_map": dict.fromkeys(["internal", *names], "local:"),
            "autostart_agent_deploy_splay_time": 0,
        }
        for name in known.keys() & wanted.keys():
            value = {"value": wanted[name]}
            self._request("POST", f"{path}/{name}", value, environment=environment)

    def resources(self, environment: str) -> list[Resource]:
        """
        Return the resources of its last released version.

        :param environment: The id of the environment.
        """
        answer = self._request("GET", "/api/v2/resource?limit=1000", environment=environment)
        return [
            Resource(
                id=each["resource_id"],
                type=each["id_details"]["resource_type"],
                agent=each["id_details"]["agent"],
                value=each["id_details"]["resource_id_value"],
                state=each["status"],
            )
            for each in answer["data"]
        ]

    def log(self, environment: str, resource: str) -> list[LogRecord]:
        """
        Return the log of all that was done to it, the oldest line first.

        :param environment: The id of the environment.
        :param resource: The id of the resource.
        """
        path = f"/api/v2/resource/{urllib.parse.quote(resource, safe='')}/logs"
        answer = self._request(
            "GET", f"{path}?limit=1000&sort=timestamp.asc", environment=environment
        )
        return [
            LogRecord(
                level=str(each["level"]),
                action=each["action"],
                message=each["msg"],
                values=each.get("kwargs") or {},
            )
            for each in answer["data"]
        ]

    def repair(self, environment: str) -> None:
        """
        Have all resources of an environment deployed again.

        :param environment: The id of the environment.
        """
        self._request("POST", "/api/v1/deploy", {}, environment=environment)

    def deployments(
        self, environment: str, resource_type: str, since: str | None = None
    ) -> list[tuple[datetime.datetime, datetime.datetime]]:
        """
        Return when each deployment that is over began, and when it ended.

        :param environment: The id of the environment.
        :param resource_type: The type of the resources, e.g. ``fs::File``.
        :param since: Those that began after this time, in ISO format with a time zone.
        """
        query = {"resource_type": resource_type, "limit": "1000"}
        if since is not None:
            query["first_timestamp"] = since
        path = f"/api/v2/resource_actions?{urllib.parse.urlencode(query)}"
        return [
            (_time(each["started"]), _time(each["finished"]))
            for each in self._request("GET", path, environment=environment)["data"]
            if each["action"] == "deploy" and each["finished"]
        ]

    def delete_environment(self, environment: str) -> None:
        """
        End the agents of an environment, and forget all of it.

        :param environment: The id of the environment.
        """
        self._request("DELETE", f"/api/v2/environment/{environment}")

    def wait(
        self,
        environment: str,
        *,
        count: int,
        timeout: float,
        progress: collections.abc.Callable[[list[Resource]], None] = lambda resources: None,
    ) -> list[Resource]:
        """
        Wait until all resources of an environment have reached a final state.

        :param environment: The id of the environment.
        :param count: How many resources there are.
        :param timeout: How long that may take. In seconds.
        :param progress: Called with the resources, time and again.
        :return: The resources.
        :raises DeploymentTimeoutError: When there are still others.
        """
        deadline = time.monotonic() + timeout
        while True:
            resources = self.resources(environment)
            progress(resources)
            if len(resources) >= count and all(resource.final for resource in resources):
                return resources
            if time.monotonic() > deadline:
                states = ", ".join(f"{each.id} is {each.state}" for each in resources)
                raise DeploymentTimeoutError(
                    f"After {timeout:.0f} s there are {len(resources)} of {count} resources: "
                    f"{states or 'none'}"
                )
            time.sleep(0.2)

    def _request(
        self,
        method: str,
        path: str,
        body: dict[str, typing.Any] | None = None,
        environment: str | None = None,
    ) -> dict[str, typing.Any]:
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        if environment is not None:
            request.add_header("X-Inmanta-tid", environment)
        try:
            with self._opener.open(request, timeout=60) as response:
                answer: dict[str, typing.Any] = json.loads(response.read() or "{}")
                return answer
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:500]
            raise ApiError(f"{method} {path} at {self.url}: {error}: {text}") from error
        except OSError as error:
            raise ApiError(f"{method} {path} at {self.url}: {error}") from error


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))


class Project:
    """
    The directory of an inmanta project, with the Python environment that compiles it.

    :param directory: The directory, with ``project.yml`` and ``main.cf``.
    :param python: An interpreter that has inmanta-core. Modules get installed for it.
    :param variables: The environment variables of the compiler.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        python: pathlib.Path,
        variables: collections.abc.Mapping[str, str],
    ) -> None:
        self.directory = directory
        self._python = python
        self._variables = dict(variables)
        self.log = directory / "compiler.log"

    def write(self, model: str, *packages: str) -> None:
        """
        Make the directory and its files.

        :param model: The text of ``main.cf``.
        :param packages: The packages of the modules that the model imports.
        """
        self.directory.mkdir()
        (self.directory / "project.yml").write_text(PROJECT)
        (self.directory / "requirements.txt").write_text("".join(f"{each}\n" for each in packages))
        (self.directory / "main.cf").write_text(model)

    def install(self) -> None:
        """
        Install the modules that the model imports.

        :raises ProcessFailedError: When one can't be installed.
        """
        self._run("installing the project's modules", ["project", "install"])

    def export(self, orchestrator: Orchestrator, environment: str) -> None:
        """
        Compile the model and send it to an orchestrator, which starts to deploy it.

        :param orchestrator: The orchestrator.
        :param environment: The id of the environment.
        :raises ProcessFailedError: When the model has an error.
        """
        self._run("exporting the model", _export_arguments(orchestrator, environment))

    def write_script(self, orchestrator: Orchestrator, environment: str) -> pathlib.Path:
        """
        Write a shell script that does what :meth:`export` does.

        :param orchestrator: The orchestrator.
        :param environment: The id of the environment.
        :return: Its path.
        """
        path = self.directory / "deploy.sh"
        command = shlex.join(self._command(_export_arguments(orchestrator, environment)))
        variables = [f"export {name}={shlex.quote(text)}" for name, text in self._variables.items()]
        path.write_text("\n".join(["set -e", f"cd {self.directory}", *variables, command, ""]))
        return path

    def _command(self, arguments: list[str]) -> list[str]:
        return [str(self._python), "-m", "inmanta.app", *arguments]

    def _run(self, what: str, arguments: list[str]) -> None:
        environment = {**neutral_environment(), **self._variables}
        command = self._command(["-vv", *arguments])
        process = start(command, log=self.log, cwd=self.directory, env=environment)
        finish(process, what=what, log=self.log)


def _export_arguments(orchestrator: Orchestrator, environment: str) -> list[str]:
    address = urllib.parse.urlsplit(orchestrator.url)
    where = ["--server_address", str(address.hostname), "--server_port", str(address.port)]
    return ["export", "-e", environment, *where]
