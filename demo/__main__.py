"""
Deploys a small model with a real orchestrator, and shows what came of it; ``--help`` tells more.
"""

import argparse
import signal
import sys

from demo.scenario import DemoError, Kept, run
from demo.show import Show
from pytest_inmanta_mitogen import SshdNotFoundError
from testbed.processes import Interrupted, ProcessFailedError, interruptible


def main() -> int:
    """Run the demo. Return its exit code: 0 when each resource ended as it should."""
    keep = _arguments().keep
    show = Show()

    def when_done(kept: Kept) -> None:
        if keep:
            _introduce(show, kept)
            signal.pause()

    try:
        with interruptible():
            run(show, when_done)
    except Interrupted as interrupted:
        show.say(f"[yellow]Interrupted ({interrupted}). Nothing is left of the demo.[/]")
        return interrupted.exit_code
    except (ProcessFailedError, SshdNotFoundError, DemoError) as error:
        show.failure(str(error), getattr(error, "output", ""))
        return 1
    return 0


def _introduce(show: Show, kept: Kept) -> None:
    url, header = kept.server.url, f"-H 'X-Inmanta-tid: {kept.environment}'"
    deploy = kept.project.write_script(kept.server.client, kept.environment)
    show.say(f"\nThe orchestrator and its hosts stay up until Ctrl-C: [bold]{url}[/]. You can")
    for what, command in {
        "see the resources": f"curl {header} {url}/api/v2/resource",
        "deploy all of them again": f"curl -X POST {header} {url}/api/v1/deploy",
        "check the connection of a host": f"INMANTA_CMDLINE_REST_TRANSPORT_PORT={kept.server.port}"
        f" {sys.executable} -m inmanta_plugins.mitogen check --environment {kept.environment}"
        " --host by-ssh",
        "change the model": f"${{EDITOR:-vi}} {kept.project.directory}/main.cf",
        "deploy the changed model": f"sh {deploy}",
        "read the logs": f"less {kept.server.logs}/*.log",
    }.items():
        show.say(f"  {what}:")
        show.command(command)
    show.say("There is no web console: PyPI has inmanta-ui, which serves one, without its files.\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="Deploy a small model with a real orchestrator, and show what came of it.",
        epilog="Everything that is started is gone at the end, also after Ctrl-C.",
    )
    parser.add_argument("--keep", action="store_true", help="keep the orchestrator up until Ctrl-C")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
