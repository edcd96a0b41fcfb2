"""
Environments in which this module is installed the way its users have it.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOT_SOURCES = shutil.ignore_patterns(
    ".*", "__pycache__", "build", "dist", "*.egg-info", "docs", "tests", "demo"
)


def run(
    *command: object, cwd: pathlib.Path, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """
    Run a command, away from the checkout's own packages.

    :param command: the program and its arguments
    :param cwd: where to run it
    :param variables: added to the environment
    :return: what came of it; its stdout has stderr too
    """
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**environment, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def environment(directory: pathlib.Path, *requirements: object) -> pathlib.Path:
    """
    Make a virtual environment that has this module, as a wheel, and all that the tests have.

    :param directory: an empty directory
    :param requirements: what to install there too, as pip takes it
    :return: its Python
    """
    made = run(sys.executable, "-m", "venv", "--without-pip", directory / "venv", cwd=directory)
    assert made.returncode == 0, made.stdout
    python = directory / "venv" / "bin" / "python"
    # Of an editable install only the environment that it is in reads the .pth file, so this module
    # itself is not to be had this way.
    lib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=directory)
    path = pathlib.Path(lib.stdout.strip(), "tests.pth")
    path.write_text(sysconfig.get_path("purelib") + "\n")
    sources = directory / "mitogen"
    shutil.copytree(ROOT, sources, ignore=NOT_SOURCES)
    pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--python", python)
    options = ("install", "--no-deps", "--ignore-installed")
    done = run(*pip, *options, sources, *requirements, cwd=directory)
    assert done.returncode == 0, done.stdout
    return python
