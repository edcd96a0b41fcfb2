"""
Deploys a small model with a real orchestrator, and shows what came of it; ``--help`` tells more.
"""

import pathlib
import signal
import sys


def main() -> int:
    """
    :return: The exit code: 0 when each resource ended as it should.
    """
    # Until there is something to clean up, a Ctrl-C ends this without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

    from demo import program

    return program.main()


if __name__ == "__main__":
    sys.exit(main())
