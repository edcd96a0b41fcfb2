"""
Stands in for the command-line programs of container managers that cannot run in a test.

Each program takes its arguments as the real one does, refuses what that one refuses and in its
words, and then runs the command, on this machine. It is started as a script by the fixture
``commands``:

    commands.py PROGRAM STATE ARGUMENT...

where STATE is a JSON file with the "containers" there are, each with its leader's process id, the
"images", and the "log", a file that gets one line for each call.
"""

import json
import os
import pwd
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

Options = dict[str, str]


class UsageError(Exception):
    """
    The real program would refuse these arguments.
    """


class Syntax:
    """
    The options of one command.

    :param flags: The names of those without a value, separated by spaces; ``i|interactive`` is one
        with a short and a long name.
    :param values: The names of those with a value.
    :param interspersed: Whether options are still recognised after the first argument that is none.
    """

    def __init__(self, flags: str = "", values: str = "", *, interspersed: bool = False) -> None:
        self.flags = self._names(flags)
        self.values = self._names(values)
        self.interspersed = interspersed

    @staticmethod
    def _names(text: str) -> dict[str, str]:
        return {name: item.split("|")[-1] for item in text.split() for name in item.split("|")}

    def parse(self, arguments: Iterable[str]) -> tuple[Options, list[str]]:
        """
        :return: The options by their long names, and the other arguments.
        :raises UsageError: For an option that is not known or lacks its value.
        """
        options: Options = {}
        rest: list[str] = []
        queue = list(arguments)
        while queue:
            word = queue.pop(0)
            if word == "--":
                return options, rest + queue
            if not word.startswith("-") or word == "-":
                rest.append(word)
                if not self.interspersed:
                    return options, rest + queue
            elif word.startswith("--"):
                self._long(word[2:], options, queue)
            else:
                self._short(word[1:], options, queue)
        return options, rest

    def _long(self, word: str, options: Options, queue: list[str]) -> None:
        name, equals, value = word.partition("=")
        if len(name) > 1 and name in self.flags and not equals:
            options[self.flags[name]] = ""
        elif len(name) > 1 and name in self.values:
            options[self.values[name]] = value if equals else self._next(f"--{name}", queue)
        else:
            raise UsageError(f"unknown flag: --{name}")

    def _short(self, letters: str, options: Options, queue: list[str]) -> None:
        while letters:
            letter, letters = letters[0], letters[1:]
            if letter in self.flags:
                options[self.flags[letter]] = ""
            elif letter in self.values:
                options[self.values[letter]] = letters or self._next(f"-{letter}", queue)
                return
            else:
                raise UsageError(f"unknown shorthand flag: '{letter}' in -{letter}{letters}")

    @staticmethod
    def _next(name: str, queue: list[str]) -> str:
        if not queue:
            raise UsageError(f"flag needs an argument: {name}")
        return queue.pop(0)


class Machine:
    """
    The containers and images that the programs know of.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.containers: dict[str, int] = state["containers"]
        self.images: list[str] = state["images"]

    def leader(self, name: str, unknown: str) -> int:
        """
        :raises UsageError: With the text `unknown`, when there is no such container.
        """
        if name not in self.containers:
            raise UsageError(unknown)
        return self.containers[name]


def run(
    command: Sequence[str],
    missing: str,
    *,
    user: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> NoReturn:
    """
    Becomes the command.

    :param missing: What the real program says when there is no such command; ``%s`` is its name.
    :param user: The user to run it as.
    """
    if user is not None:
        name, _, group = user.partition(":")
        try:
            entry = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
        except KeyError:
            raise UsageError(
                f"unable to find user {name}: no matching entries in passwd file"
            ) from None
        os.setgroups([])
        os.setgid(int(group) if group.isdigit() else entry.pw_gid)
        os.setuid(entry.pw_uid)
    try:
        os.execvpe(
            command[0], list(command), dict(os.environ if environment is None else environment)
        )
    except OSError:
        sys.stderr.write((missing % command[0]) + "\n")
        sys.exit(127)


_OCI_MISSING = (
    'OCI runtime exec failed: exec failed: unable to start container process: exec: "%s":'
    " executable file not found in $PATH: unknown"
)


def docker(arguments: list[str], machine: Machine) -> None:
    """
    Docker: ``exec``, ``run`` and ``inspect``.
    """
    verb, arguments = _verb(arguments, "docker")
    if verb == "inspect":
        options, names = Syntax("s|size", "f|format type").parse(arguments)
        if options.get("format") != "{{.State.Pid}}":
            raise UsageError(f"template parsing error: {options.get('format')}")
        for name in names or _needs("docker inspect"):
            print(machine.leader(name, f"Error: No such object: {name}"))
    elif verb == "exec":
        syntax = Syntax(
            "i|interactive t|tty d|detach privileged", "u|user w|workdir e|env env-file detach-keys"
        )
        options, rest = syntax.parse(arguments)
        if len(rest) < 2:
            raise UsageError('"docker exec" requires at least 2 arguments.')
        machine.leader(rest[0], f"Error response from daemon: No such container: {rest[0]}")
        run(rest[1:], _OCI_MISSING, user=options.get("user"))
    elif verb == "run":
        syntax = Syntax("i|interactive t|tty d|detach rm init privileged", "u|user w|workdir name")
        options, rest = syntax.parse(arguments)
        if not rest:
            raise UsageError('"docker run" requires at least 1 argument.')
        if rest[0] not in machine.images:
            raise UsageError(f"Unable to find image '{rest[0]}:latest' locally")
        run(rest[1:], "docker: " + _OCI_MISSING, user=options.get("user"))
    else:
        raise UsageError(f"docker: '{verb}' is not a docker command.")


def buildah(arguments: list[str], machine: Machine) -> None:
    """
    Buildah: ``run``.
    """
    verb, arguments = _verb(arguments, "buildah")
    if verb != "run":
        raise UsageError(f'unknown command "{verb}" for "buildah"')
    options, rest = Syntax("t|terminal tty", "u|user e|env v|volume workingdir").parse(arguments)
    if not rest:
        raise UsageError("Error: container ID must be specified")
    if len(rest) < 2:
        raise UsageError("Error: command must be specified")
    machine.leader(rest[0], f'Error: reading build container "{rest[0]}": container not known')
    missing = (
        "error running container: from /usr/bin/crun creating container for [%s]: executable file"
        " not found in $PATH: No such file or directory"
    )
    run(rest[1:], missing, user=options.get("user"))


def kubectl(arguments: list[str], machine: Machine) -> None:
    """
    The command line of Kubernetes: ``exec``, after the options that all its commands take.
    """
    common = (
        "n|namespace context cluster kubeconfig s|server user token as as-group request-timeout"
        " certificate-authority"
    )
    options, rest = Syntax("insecure-skip-tls-verify", common).parse(arguments)
    verb, rest = _verb(rest, "kubectl")
    if verb != "exec":
        raise UsageError(f'error: unknown command "{verb}" for "kubectl"')
    if "--" not in rest:
        # Deprecated since 1.17, an error from 1.31 on.
        raise UsageError(
            "error: exec [POD] [COMMAND] is not supported anymore. Use exec [POD] -- [COMMAND]"
        )
    split = rest.index("--")
    syntax = Syntax("i|stdin t|tty q|quiet", f"c|container f|filename {common}", interspersed=True)
    more, pods = syntax.parse(rest[:split])
    if len(pods) != 1 or not rest[split + 1 :]:
        raise UsageError(
            "error: you must specify one pod and at least one command for the container"
        )
    pod = pods[0].removeprefix("pod/")
    namespace = {**options, **more}.get("namespace", "default")
    machine.leader(f"{namespace}/{pod}", f'Error from server (NotFound): pods "{pod}" not found')
    if "tty" in more and not sys.stdin.isatty():
        sys.stderr.write(
            "Unable to use a TTY - input is not a terminal or the right kind of file\n"
        )
    run(rest[split + 1 :], f"error: Internal error occurred: {_OCI_MISSING}")


def lxc_attach(arguments: list[str], machine: Machine) -> None:
    """
    LXC: runs a command in a container, with nothing of the caller's environment if so told.
    """
    syntax = Syntax(
        "clear-env keep-env e|elevated-privileges R|remount-sys-proc",
        "n|name P|lxcpath v|set-var keep-var u|uid g|gid s|namespaces a|arch c|context f|rcfile",
    )
    options, command = syntax.parse(arguments)
    if "name" not in options:
        raise UsageError("lxc-attach: No container name specified")
    name = options["name"]
    machine.leader(
        name, f"lxc-attach: {name}: tools/lxc_attach.c: main: 277 No such container: {name}"
    )
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    cleared = {"container": "lxc", "PATH": path, "TERM": "linux"}
    run(
        command or ["/bin/sh"],
        f"lxc-attach: {name}: attach.c: lxc_attach_run_command: 1840"
        ' No such file or directory - Failed to exec "%s"',
        environment=cleared if "clear-env" in options else None,
    )


def lxc_info(arguments: list[str], machine: Machine) -> None:
    """
    LXC: describes a container.
    """
    options, rest = Syntax("i|ips p|pid S|stats H|no-humanize s|state", "n|name c|config").parse(
        arguments
    )
    name = options.get("name") or (rest or _needs("lxc-info"))[0]
    leader = machine.leader(name, f"{name} doesn't exist")
    print(f"Name:           {name}\nState:          RUNNING\nPID:            {leader}")


def _lxd_or_incus(arguments: list[str], machine: Machine, missing: str, pid_label: str) -> None:
    verb, arguments = _verb(arguments, "lxc")
    if verb == "info":
        _, names = Syntax("show-log resources", "target", interspersed=True).parse(arguments)
        for name in names or _needs("lxc info"):
            leader = machine.leader(name, "Error: Instance not found")
            print(f"Name: {name}\nStatus: Running\nType: container\n{pid_label}: {leader}")
        return
    if verb != "exec":
        raise UsageError(f'Error: unknown command "{verb}"')
    split = arguments.index("--") if "--" in arguments else len(arguments)
    syntax = Syntax(
        "t|force-interactive T|force-noninteractive n|disable-stdin",
        "mode cwd env user group",
        interspersed=True,
    )
    options, rest = syntax.parse(arguments[:split])
    rest += arguments[split + 1 :]
    if len(rest) < 2:
        raise UsageError("Error: Invalid number of arguments")
    if "mode" in options and {"force-interactive", "force-noninteractive"} & options.keys():
        raise UsageError("Error: You can't pass -t or -T at the same time as --mode")
    machine.leader(rest[0], "Error: Instance not found")
    run(rest[1:], missing, user=options.get("user"))


def lxc(arguments: list[str], machine: Machine) -> None:
    """
    LXD: ``exec`` and ``info``.
    """
    _lxd_or_incus(arguments, machine, "Error: Command not found%.0s", "Pid")


def incus(arguments: list[str], machine: Machine) -> None:
    """
    Incus: ``exec`` and ``info``.
    """
    _lxd_or_incus(arguments, machine, "Error: Command not found%.0s", "PID")


def jexec(arguments: list[str], machine: Machine) -> None:
    """
    FreeBSD's jails: runs a command in one.
    """
    options, rest = Syntax("l", "u U d").parse(arguments)
    if {"u", "U"} <= options.keys() or not rest:
        raise UsageError(
            "usage: jexec [-l] [-d working-directory] [-u username | -U username] jail [command]"
        )
    machine.leader(rest[0], f'jexec: jail "{rest[0]}" not found')
    user = options.get("U", options.get("u"))
    run(rest[1:] or ["/bin/sh"], "jexec: execvp: %s: No such file or directory", user=user)


def machinectl(arguments: list[str], machine: Machine) -> None:
    """
    systemd's container manager: ``status``.
    """
    verb, arguments = _verb(arguments, "machinectl")
    if verb != "status":
        raise UsageError(f"Unknown command verb {verb}.")
    _, names = Syntax("l|full no-pager a|all q|quiet", "o|output", interspersed=True).parse(
        arguments
    )
    for name in names or _needs("machinectl status"):
        leader = machine.leader(name, f"Could not get path to machine: No machine '{name}' known")
        command = os.path.basename(os.readlink(f"/proc/{leader}/exe"))
        print(f"{name}(0123456789abcdef)\n   Leader: {leader} ({command})\n    Class: container")


def _verb(arguments: list[str], program: str) -> tuple[str, list[str]]:
    return (arguments or _needs(program))[0], arguments[1:]


def _needs(program: str) -> NoReturn:
    raise UsageError(f"{program}: arguments are missing")


PROGRAMS: dict[str, Callable[[list[str], Machine], None]] = {
    "docker": docker,
    "buildah": buildah,
    "kubectl": kubectl,
    "lxc-attach": lxc_attach,
    "lxc-info": lxc_info,
    "lxc": lxc,
    "incus": incus,
    "jexec": jexec,
    "machinectl": machinectl,
}


def main(program: str, state_file: str, *arguments: str) -> None:
    """
    Runs one of the programs.
    """
    with open(state_file) as file:
        state = json.load(file)
    with open(state["log"], "a") as log:
        log.write(json.dumps([program, *arguments]) + "\n")
    try:
        PROGRAMS[program](list(arguments), Machine(state))
    except UsageError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
