"""The operator's command: ``python -m inmanta_plugins.mitogen check``."""

import argparse
import contextlib
import json
import logging
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from inmanta_plugins.mitogen.check import Report, check_hops
from inmanta_plugins.mitogen.contexts.validate import checked_context
from inmanta_plugins.mitogen.settings import CHECK_HOST_KEYS
from inmanta_plugins.mitogen.texts import describe_context, hops_of

if TYPE_CHECKING:
    import rich.console

PROGRAM = "python -m inmanta_plugins.mitogen"
_TARGET = re.compile(
    r"(?:ssh://)?(?:(?P<username>[^@/:\s]+)@)?(?P<hostname>\[[^]/@\s]+\]|[^/:@\s\[\]]+)"
    r"(?::(?P<port>\d+))?/?"
)
# How a report is shown: a line for each of these whose fields it has.
_LINES = {
    "failed": ("{cause}, after {seconds:.2f} s", "bold red"),
    "came back": ("{detail}", ""),
    "advice": ("{advice}", "yellow"),
    "command": ("{command}", "dim"),
    "connected": ("after {connected:.2f} s", "green"),
    "user": ("{user}", ""),
    "Python": ("{version}, {python}", ""),
    "round trip": ("{round_trip_ms:.1f} ms", ""),
    "temporary": ("{room}", ""),
    "throughput": ("put {put_mb_s:.1f} MB/s, read {read_mb_s:.1f} MB/s", ""),
}


class UsageError(ValueError):
    """There is nothing that can be checked. The text repeats nothing that may be a password."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, allow_abbrev=False)
    check = parser.add_subparsers(dest="command", required=True).add_parser(
        "check",
        allow_abbrev=False,
        help="connect a context hop by hop, and tell what works and what does not",
        epilog="Exit status: 0 when each hop works, 1 when one does not, 2 for wrong usage.",
    )
    what = check.add_argument_group("what to check: one of these").add_mutually_exclusive_group()
    what.add_argument("target", nargs="?", metavar="[ssh://][USER@]HOST[:PORT]")
    what.add_argument("--context", metavar="FILE", help="JSON of a serialized context; - for stdin")
    what.add_argument("--environment", metavar="ID", help="ask the orchestrator, as inmanta-cli")
    of = check.add_argument_group("with --environment: one of these").add_mutually_exclusive_group()
    of.add_argument("--host", metavar="NAME", help="the name of an agent, thus of a std::Host")
    of.add_argument("--resource", metavar="ID", help="the id of a resource, without its version")
    ssh = check.add_argument_group("with a HOST")
    ssh.add_argument("--sudo", nargs="?", const="root", metavar="USER", help="become USER (root)")
    ssh.add_argument("--python", default="python3", metavar="PATH", help="default: python3")
    ssh.add_argument("--identity", metavar="FILE", help="the private key to log in with")
    ssh.add_argument("--jump", action="append", metavar="HOST", help="a bastion, as for ssh -J")
    ssh.add_argument("--check-host-keys", choices=CHECK_HOST_KEYS, help="default: enforce")
    check.add_argument("--timeout", type=int, metavar="SECONDS", help="for each hop and call")
    check.add_argument("--speed", action="store_true", help="measure the last hop's throughput")
    check.add_argument("--json", action="store_true", help="print one JSON document at the end")
    return parser


def _context(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Return the serialized context to check, and what has to be said about it."""
    if arguments.target:
        return _from_target(arguments), []
    if arguments.context:
        path = "/dev/stdin" if arguments.context == "-" else arguments.context
        return json.loads(pathlib.Path(path).read_text()), []
    if not arguments.environment or not (arguments.host or arguments.resource):
        raise UsageError("needs HOST, --context, or --environment with --host or --resource")
    return _from_orchestrator(arguments)


def _from_target(arguments: argparse.Namespace) -> dict[str, Any]:
    match = _TARGET.fullmatch(arguments.target)
    if match is None:
        raise UsageError(
            "the host must have the form [ssh://][USER@]HOST[:PORT]; a password goes into the file"
            " of --context"
        )
    context = {
        "method_name": "ssh",
        "hostname": match["hostname"].strip("[]"),
        "username": match["username"],
        "port": match["port"],
        "identity_file": arguments.identity,
        "check_host_keys": arguments.check_host_keys,
        "ssh_args": arguments.jump and ["-J", ",".join(arguments.jump)],
        "python_path": [arguments.python],
    }
    if arguments.sudo is None:
        return context
    return {"method_name": "sudo", "username": arguments.sudo, "via": context}


def _from_orchestrator(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from inmanta import protocol
    from inmanta.config import Config

    logging.getLogger("inmanta").addHandler(logging.NullHandler())  # its errors are told below
    Config.load_config()
    client = protocol.SyncClient("cmdline")

    def ask(method: str, **what: object) -> Any:
        answer = getattr(client, method)(tid=arguments.environment, **what)
        if answer.code != 200:
            message = (answer.result or {}).get("message", "no message")
            raise UsageError(f"the orchestrator answered with {answer.code}: {message}")
        return answer.result["data"]

    names = [arguments.resource]
    if arguments.host:
        listed = ask("resource_list", limit=100, filter={"agent": [arguments.host]})
        names = [each["resource_id"] for each in listed]
    for name in names:
        attributes = ask("resource_details", rid=name)["attributes"]
        if isinstance(attributes.get("via"), dict):
            notes = [f"The context is that of {name}."]
            if attributes.get("mutators"):
                notes.append("Attributes that are references have no value here.")
            return attributes["via"], notes
    raise UsageError(f"no resource of {arguments.host or names[0]} has a context (via)")


def _show(console: "rich.console.Console", report: Report) -> None:
    if report["works"]:
        free = f"{report['tmp_free'] / 2**30:.1f} GiB free"
        room = f"{report['tmp']}, writable" if report["tmp"] else "none is writable"
        report = {**report, "room": f"{room}, {free}", "connected": report["seconds"]}
    for name, (form, style) in _LINES.items():
        with contextlib.suppress(KeyError):
            text = form.format_map(report).replace("\n", "\n" + " " * 14)
            console.print(f"  {name:<12}{text}", style=style)


def _check(arguments: argparse.Namespace) -> int:
    import rich.console

    context, notes = _context(arguments)
    if arguments.timeout is not None:
        for hop in hops_of(context):
            cast("dict[str, Any]", hop)["connect_timeout"] = arguments.timeout
    context = checked_context(context)
    hops = hops_of(context)
    console = rich.console.Console(
        highlight=False, markup=False, emoji=False, soft_wrap=True, quiet=arguments.json
    )
    console.print(*notes, describe_context(context), sep="\n", style="bold")
    reports: list[Report] = []
    with console.status("connecting"):
        for report in check_hops(context, timeout=arguments.timeout or 30, speed=arguments.speed):
            reports.append(report)
            console.print(f"{len(reports)} of {len(hops)}: {report['hop']}", style="bold")
            _show(console, report)
    works: bool = reports[-1]["works"]
    if arguments.json:
        document = {"context": describe_context(context), "works": works, "notes": notes}
        print(json.dumps({**document, "hops": reports}, indent=2))  # noqa: T201
    return 0 if works else 1


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command.

    :param argv: The arguments, by default those of the process.
    :return: The exit status: 0 when each hop works, 1 when one does not.
    :raises SystemExit: Wrong usage, with status 2, or a request for help.
    """
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error("unknown arguments")  # which may be passwords
    try:
        return _check(arguments)
    except (OSError, ValueError) as error:  # UsageError, ContextError, SettingError, a lost file
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
