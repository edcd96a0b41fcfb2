"""
Environments in which this module is installed the way its users have it.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import support
from testbed.environments import NOT_SOURCES

ROOT = pathlib.Path(__file__).resolve().parent.parent
PIP = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")


def run(*command: object, cwd: pathlib.Path, **variables: str) -> str:
    """
    Run a command, away from the checkout's own packages.

    :param command: the program and its arguments
    :param cwd: where to run it
    :param variables: added to the environment
    :return: all that it printed
    """
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    environment |= variables
    done = support.execute(*command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done}"
    return done.stdout + done.stderr


def copy_sources(target: pathlib.Path) -> pathlib.Path:
    """
    Copy the checkout, as a build leaves files among the sources.
    """
    return pathlib.Path(shutil.copytree(ROOT, target, ignore=NOT_SOURCES))


def environment(directory: pathlib.Path, *requirement: object) -> pathlib.Path:
    """
    Make a virtual environment that has this module, and all that the tests have.

    :param directory: a directory for it
    :param requirement: how pip gets this module, by default as a wheel of the sources
    :return: its Python
    """
    run(sys.executable, "-m", "venv", "--without-pip", directory / "venv", cwd=directory)
    python = directory / "venv" / "bin" / "python"
    # Of an editable install only the environment that it is in reads the .pth file, so this module
    # itself is not to be had this way.
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=directory)
    pathlib.Path(own.strip(), "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ("--python", python, "install", "--no-deps", "--ignore-installed")
    what = requirement or [copy_sources(directory / "mitogen")]
    run(*PIP, *options, *what, cwd=directory)
    return python
