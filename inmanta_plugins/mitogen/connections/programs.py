"""What is started for a connection, on the agent or on the hop before: ssh, sudo, docker, …"""

import shlex
import sys
from collections.abc import Mapping
from typing import Any

import mitogen.core
import mitogen.parent
from inmanta_plugins.mitogen.contexts.options import SECRET_OPTIONS, is_auto
from inmanta_plugins.mitogen.texts import hops_of

# The user's ssh configuration is read; this is what must not be taken from it. A terminal changes
# what is sent, and who ends a connection that others share ends theirs. What the context has in its
# own ssh_args comes first and is what ssh uses.
_SSH_ARGS = ("-T", "-o", "ControlMaster=no", "-o", "ControlPath=none")
# An error for the ssh of a hop that is older than 7.6 (RHEL 7).
_SSH_ARGS_ON_AGENT = ("-o", "RemoteCommand=none")


def mitogen_options(hop: Mapping[str, object]) -> dict[str, Any]:
    """
    Return what mitogen's ``Router.connect`` takes for a hop, without the method and the hop before.

    :param hop: A serialized context.
    """
    options: dict[str, Any] = {
        key: value
        for key, value in hop.items()
        if value is not None and key not in ("method_name", "name", "via")
    }
    for key in SECRET_OPTIONS & options.keys():
        # Masks itself wherever mitogen, here or on a hop, logs the arguments of a connection.
        options[key] = mitogen.core.Secret(options[key])
    if is_auto(options.get("python_path")):
        # Imported late, as hardly any connection needs it.
        from inmanta_plugins.mitogen.connections import interpreters

        options["python_path"] = interpreters.auto_command()
    if hop["method_name"] == "ssh":
        own = _SSH_ARGS if hop.get("via") else _SSH_ARGS + _SSH_ARGS_ON_AGENT
        options["ssh_args"] = [*options.get("ssh_args", ()), *own]
    options["name"] = hop.get("name") or None
    return options


def python_argv(method: str, python_path: object, python: str) -> list[str]:
    """
    Return what mitogen starts as the interpreter of a hop.

    :param method: The connection method of the hop.
    :param python_path: Its ``python_path``, as mitogen gets it; None where it is unset.
    :param python: The interpreter that the hop is connected from, which is the default of some
        methods.
    """
    default = mitogen.parent.get_connection_class(method).options_class.python_path
    if default == mitogen.parent.Options.python_path:
        default = python
    given = python_path or default
    return list(given) if isinstance(given, list | tuple) else [str(given)]


class _Bare(mitogen.parent.Connection):  # type: ignore[misc]  # mitogen is not typed
    """The last ancestor of a connection: a short command in the place of mitogen's program."""

    argv: list[str]

    def get_boot_command(self) -> list[str]:
        return self.argv


def shown_command(hop: Mapping[str, Any], python: str = sys.executable) -> str:
    """
    Return the shell command that starts the interpreter of a context from the agent's machine, and
    has it print its version. It holds no secret. Empty where there is no such command.

    :param hop: A serialized context.
    :param python: The interpreter that the hop is connected from, which is the default of some
        methods.
    """
    given = ["python3"] if is_auto(hop.get("python_path")) else hop.get("python_path")
    argv = [*python_argv(hop["method_name"], given, python), "-V"]
    try:
        for each in reversed(hops_of(hop)):
            argv = _starting(each, argv)
    except mitogen.core.Error:
        return ""  # mitogen does not take the options, or starts no program
    return shlex.join(argv)


def _starting(hop: Mapping[str, object], argv: list[str]) -> list[str]:
    """
    Return the command that connects a hop, with another command in the place of its interpreter.

    :param hop: A serialized context.
    :param argv: The other command.
    """
    method = mitogen.parent.get_connection_class(hop["method_name"])
    if method is mitogen.parent.Connection:  # local: there is nothing before the interpreter
        return argv
    if hop["method_name"] == "setns":
        raise mitogen.core.Error("it enters the namespaces itself")
    options = method.options_class(max_message_size=0, **mitogen_options(hop))
    connection = type("Bare", (method, _Bare), {"argv": argv})(options, None)
    return [str(word) for word in connection.get_boot_command()]
