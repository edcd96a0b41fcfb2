"""The operator's command: ``python -m inmanta_plugins.mitogen check``."""

import argparse
import io
import json
import logging
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, cast

from rich.console import Console

from inmanta_plugins.mitogen.check import Report, check_hops
from inmanta_plugins.mitogen.contexts.validate import checked_context
from inmanta_plugins.mitogen.settings import CHECK_HOST_KEYS, LONGEST_DETAIL
from inmanta_plugins.mitogen.texts import bounded_text, describe_context, hops_of

PROGRAM = "python -m inmanta_plugins.mitogen"
_TARGET = re.compile(
    r"(?:ssh://)?(?:(?P<username>[^@/:\s]+)@)?(?P<hostname>\[[^]/@\s]+\]|[^/:@\s\[\]]+)"
    r"(?::(?P<port>\d+))?/?"
)
# The options that go with what tells the context.
_OPTIONS = {
    "target": {"sudo", "python", "identity", "jump", "check_host_keys"},
    "environment": {"host", "resource"},
}
_STYLES = {"command": "dim", "connected": "green", "failed": "bold red", "advice": "yellow"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse repeats what was typed, which may be a password.
        raise ValueError(re.split(r"['\"]|(?<=unrecognized arguments)", message)[0].rstrip(" :"))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, allow_abbrev=False)
    check = parser.add_subparsers(dest="command", required=True).add_parser(
        "check",
        allow_abbrev=False,
        help="connect a context hop by hop, and tell what works and what does not",
        epilog="Exit status: 0 if all hops work, 1 if one does not, 2 for wrong usage.",
    )
    what = check.add_argument_group("what to check: one of these")
    add = what.add_mutually_exclusive_group(required=True).add_argument
    add("target", nargs="?", metavar="[ssh://][USER@]HOST[:PORT]", help="a host, as for ssh")
    add("--context", metavar="FILE", help="JSON of a serialized context; - for stdin")
    add("--environment", metavar="ID", help="ask the orchestrator, as inmanta-cli")
    of = check.add_argument_group("with --environment: one of these")
    add = of.add_mutually_exclusive_group().add_argument
    add("--host", metavar="NAME", help="the name of an agent, thus of a std::Host")
    add("--resource", metavar="ID", help="the id of a resource, without its version")
    add = check.add_argument_group("with a HOST").add_argument
    add("--sudo", nargs="?", const="root", metavar="USER", help="become USER (default: root)")
    add("--python", metavar="PATH", help="default: python3")
    add("--identity", metavar="FILE", help="the private key to log in with")
    add("--jump", action="append", metavar="HOST", help="a bastion, as for ssh -J")
    add("--check-host-keys", choices=CHECK_HOST_KEYS, help="default: enforce")
    check.add_argument("--timeout", type=int, metavar="SECONDS", help="for each hop and call")
    check.add_argument("--speed", action="store_true", help="measure the last hop's throughput")
    check.add_argument("--json", action="store_true", help="print one JSON document at the end")
    return parser


def _context(arguments: argparse.Namespace) -> Any:
    """Return the serialized context to check, which may be invalid."""
    given = {name for name, value in vars(arguments).items() if value is not None}
    for needed, options in _OPTIONS.items():
        if needed not in given and options & given:
            name = min(options & given).replace("_", "-")
            raise ValueError(f"--{name} needs {'HOST' if needed == 'target' else '--environment'}")
    if arguments.target is not None:
        return _from_target(arguments)
    if arguments.environment is not None:
        return _from_orchestrator(arguments)
    path = "/dev/stdin" if arguments.context == "-" else arguments.context
    try:
        return json.loads(pathlib.Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"the file of --context is not JSON: {error}") from None


def _from_target(arguments: argparse.Namespace) -> dict[str, Any]:
    match = _TARGET.fullmatch(arguments.target)
    if match is None:
        raise ValueError("HOST has the form [ssh://][USER@]HOST[:PORT], without a password")
    context = {
        "method_name": "ssh",
        "hostname": match["hostname"].strip("[]"),
        "username": match["username"],
        "port": match["port"],
        "identity_file": arguments.identity,
        "check_host_keys": arguments.check_host_keys,
        "ssh_args": arguments.jump and ["-J", ",".join(arguments.jump)],
        "python_path": [arguments.python or "python3"],
    }
    if arguments.sudo is None:
        return context
    return {"method_name": "sudo", "username": arguments.sudo, "via": context}


def _from_orchestrator(arguments: argparse.Namespace) -> Any:
    if not arguments.host and not arguments.resource:
        raise ValueError("--environment needs --host or --resource")
    from inmanta import protocol
    from inmanta.config import Config

    logging.getLogger("inmanta").addHandler(logging.NullHandler())  # its errors are told below
    Config.load_config()
    client = protocol.SyncClient("cmdline")

    def ask(method: str, **what: object) -> Any:
        answer = getattr(client, method)(tid=arguments.environment, **what)
        if answer.code != 200:
            message = (answer.result or {}).get("message", "no message")
            raise ValueError(f"the orchestrator answered with {answer.code}: {message}")
        return answer.result["data"]

    names = [arguments.resource]
    if arguments.host:
        listed = ask("resource_list", limit=100, filter={"agent": [arguments.host]})
        names = [each["resource_id"] for each in listed]
    for name in names:
        if via := ask("resource_details", rid=name)["attributes"].get("via"):
            return via
    raise ValueError(f"no resource of {arguments.host or names[0]} has a context (via)")


def _check(arguments: argparse.Namespace) -> int:
    context = _context(arguments)
    if any(re.search(":.*@", str(hop.get("hostname"))) for hop in hops_of(context)):
        raise ValueError("a hostname has no password; use the options username and password")
    if arguments.timeout is not None:
        for hop in hops_of(context):
            cast("dict[str, Any]", hop)["connect_timeout"] = arguments.timeout
    context = checked_context(context)
    console = Console(highlight=False, quiet=arguments.json)
    console.out(describe_context(context), style="bold")
    reports: list[Report] = []
    for label, text, found in check_hops(context, arguments.timeout or 30, arguments.speed):
        if label == "hop":
            reports.append({})
            console.out(f"{len(reports)} of {len(hops_of(context))}: {text}", style="bold")
        else:
            indented = bounded_text(text, LONGEST_DETAIL).replace("\n", "\n" + " " * 14)
            console.out(f"  {label:<12}{indented}", style=_STYLES.get(label))
        reports[-1] |= found
    works: bool = reports[-1]["works"]
    if arguments.json:
        document = {"context": describe_context(context), "works": works, "hops": reports}
        print(json.dumps(document, indent=2))  # noqa: T201
    return 0 if works else 1


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command.

    :param argv: The arguments, by default those of the process.
    :return: The exit status: 0 when each hop works, 1 when one does not, 130 after Ctrl-C.
    :raises SystemExit: Wrong usage, with status 2, or a request for help.
    """
    # What a host or a context says may not be in the encoding of the terminal.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = _parser()
    try:
        return _check(parser.parse_args(argv))
    except (OSError, ValueError) as error:  # also a ContextError or SettingError, a lost file
        parser.exit(2, f"{PROGRAM} check: error: {error}\nTry: {PROGRAM} check --help\n")
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
