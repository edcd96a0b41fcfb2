"""
The command line of the demo.
"""

import argparse
import os
import pathlib
import sys

from demo import keep
from demo.scenario import DemoError, Options, run
from demo.show import Show
from testbed.processes import Interrupted, ProcessFailedError, interruptible
from testbed.servers import InmantaServer

_RUN = pathlib.Path(__file__).with_name("run.py")


def main() -> int:
    """
    :return: The exit code: 0 when each resource ended as it should.
    """
    arguments = _arguments()
    if arguments.stop:
        return keep.stop()
    options = Options(
        stand_in=arguments.stand_in, openssh=not arguments.asyncssh, timeout=arguments.timeout
    )
    if arguments.keep:
        return keep.in_background(lambda release: _demo(options, release))
    return _demo(options, None)


def _demo(options: Options, release: keep.Release | None) -> int:
    show = Show()
    try:
        with interruptible():

            def when_done(server: InmantaServer, environment: str) -> None:
                if release is not None:
                    _introduce(show, server, environment)
                    keep.until_stopped(server.directory.parent, release)

            run(show, options, when_done)
    except Interrupted as interrupted:
        show.say(f"[yellow]Interrupted ({interrupted}). Nothing is left of the demo.[/]")
        return interrupted.exit_code
    except ProcessFailedError as error:
        show.failure(str(error), error.output)
        return 1
    except DemoError as error:
        show.failure(str(error), error.logs)
        return 1
    return 0


def _introduce(show: Show, server: InmantaServer, environment: str) -> None:
    header = f"-H 'X-Inmanta-tid: {environment}'"
    show.say(f"\nThe orchestrator stays up at [bold]{server.url}[/], and with it its hosts.")
    show.say(f"  the resources   curl {header} {server.url}/api/v2/resource")
    show.say(f"  its logs        {server.logs}")
    show.say(f"  to end it all   kill {os.getpid()}   (or {sys.executable} {_RUN} --stop)\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="demo/run.py",
        description="Deploy a small model with a real orchestrator, and show what came of it.",
        epilog="Everything that is started is gone at the end, also after Ctrl-C.",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        default=os.environ.get("KEEP", "") not in ("", "0"),
        help="leave the orchestrator up (or KEEP=1 in the environment)",
    )
    parser.add_argument(
        "--stop", action="store_true", help="end the orchestrators that were left up"
    )
    parser.add_argument(
        "--asyncssh", action="store_true", help="do without OpenSSH, as where it is not installed"
    )
    parser.add_argument(
        "--stand-in",
        metavar="VERSION",
        help="deploy with a published version of this module, 0.3 or later",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=Options.timeout,
        metavar="SECONDS",
        help="how long the deployment may take (default: %(default).0f)",
    )
    return parser.parse_args()
