"""
Stands in for the command-line programs of container managers that cannot run in a test.

Each program takes its arguments as the real one does, refuses what that one refuses, and then runs
the command, on this machine. It is started as a script by the fixture ``stand_ins``:

    commands.py PROGRAM STATE ARGUMENT...

where STATE is a JSON file with the "containers" there are, each with its leader's process id, the
"images", and the "log", a file that gets one line for each call.
"""

import getopt
import json
import os
import pwd
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

Options = dict[str, str]

SYNTAX = {
    "docker inspect": ("sf:", "size format= type="),
    "docker exec": ("itdu:w:e:", "interactive tty detach privileged user= workdir= env="),
    "docker run": ("itdu:w:", "interactive tty detach rm init privileged user= workdir= name="),
    "buildah run": ("tu:e:v:", "terminal tty user= env= volume= workingdir="),
    "kubectl": ("n:s:", "namespace= context= cluster= kubeconfig= server= user= token="),
    "kubectl exec": ("itqc:f:n:", "stdin tty quiet container= filename= namespace="),
    "lxc-attach": ("eRn:P:v:u:g:", "clear-env keep-env name= lxcpath= set-var= uid= gid="),
    "lxc-info": ("ipSHsn:c:", "ips pid stats no-humanize state name= config="),
    "lxc exec": ("tTn", "force-interactive disable-stdin mode= cwd= env= user= group="),
    "lxc info": ("", "show-log resources target="),
    "jexec": ("lu:U:d:", ""),
    "machinectl status": ("laqo:", "full no-pager all quiet output="),
}
"""For each program and verb: its short and its long options, as getopt takes them."""
PROGRAMS = {"incus", *(syntax.split()[0] for syntax in SYNTAX)}
LEADERS = {
    "docker": "{leader}",
    "lxc-info": "State: RUNNING\nPID:            {leader}",
    "lxc": "Status: Running\nPid: {leader}",
    "incus": "Status: Running\nPID: {leader}",
    "machinectl": "box(0123456789abcdef)\n   Leader: {leader} (systemd)\n    Class: container",
}
"""How a program tells a container's first process."""


def parse(syntax: str, arguments: list[str]) -> tuple[Options, list[str]]:
    short, long = SYNTAX[syntax]
    options, rest = getopt.getopt(arguments, short, long.split())
    return dict(options), rest


def run(command: list[str], options: Options, environment: Mapping[str, str] = os.environ) -> None:
    user = options.get("--user", options.get("-U"))
    if user is not None:
        entry = pwd.getpwnam(user)
        os.setgroups([])
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    os.execvpe(command[0], command, environment)


def run_in(known: Mapping[str, int] | list[str], words: list[str], options: Options) -> None:
    """Run a command in a container, both of which are the words."""
    name, *command = words
    if command[:1] == ["--"]:
        del command[0]
    if name not in known or not command:
        raise LookupError(f"{name}: no such container, or no command")
    run(command, options)


def kubectl(arguments: list[str], containers: Mapping[str, int]) -> None:
    options, (verb, *arguments) = parse("kubectl", arguments)
    # An error from 1.31 on when there is none.
    split = arguments.index("--")
    more, (pod,) = parse(f"kubectl {verb}", arguments[:split])
    namespace = {"--namespace": "default", **options, **more}["--namespace"]
    run_in(containers, [f"{namespace}/{pod}", *arguments[split:]], options={})


def lxc_attach(arguments: list[str], containers: Mapping[str, int]) -> None:
    options, command = parse("lxc-attach", arguments)
    if options["--name"] not in containers:
        raise LookupError(options["--name"])
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    cleared = {"container": "lxc", "PATH": path, "TERM": "linux"}
    run(command, {}, cleared if "--clear-env" in options else os.environ)


def call(program: str, arguments: list[str], state: dict[str, Any]) -> None:
    containers = state["containers"]
    if program == "kubectl":
        kubectl(arguments, containers)
    elif program == "lxc-attach":
        lxc_attach(arguments, containers)
    elif program == "jexec":
        options, words = parse(program, arguments)
        run_in(containers, words, options)
    elif program == "lxc-info":
        options, _ = parse(program, arguments)
        tell_leader(program, containers[options["-n"]])
    else:
        verb, *arguments = arguments
        options, words = parse(f"{program.replace('incus', 'lxc')} {verb}", arguments)
        if verb in ("inspect", "info", "status"):
            assert options.get("--format", "{{.State.Pid}}") == "{{.State.Pid}}"
            tell_leader(program, containers[words[0]])
        run_in(state["images"] if "--rm" in options else containers, words, options)


def tell_leader(program: str, leader: int) -> NoReturn:
    print(LEADERS[program].format(leader=leader))
    sys.exit()


def main(program: str, state_file: str, *arguments: str) -> None:
    with open(state_file) as file:
        state = json.load(file)
    try:
        call(program, list(arguments), state)
    except (getopt.GetoptError, LookupError, ValueError, OSError) as error:
        sys.exit(f"{program}: {error!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
