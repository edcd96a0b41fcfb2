"""The tutorial's commands work as they are written, on the oldest and the newest Python."""

import ast
import collections.abc
import os
import pathlib
import re
import subprocess
import sys
import zipfile

import installed
import pytest

import support
from testbed.processes import end, start

TUTORIAL = installed.ROOT / "docs" / "tutorial.md"
VERSIONS = {"3.11": (3, 11), "3.13": (3, 13)}


def console() -> tuple[list[str], list[str]]:
    """Return the commands on the page, and what it says they print."""
    blocks = re.findall(r"^```console\n(.*?)^```$", TUTORIAL.read_text(), re.M | re.S)
    lines = "".join(blocks).splitlines()
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return commands, [line for line in lines if not line.startswith("$ ")]


Runs = dict[str, tuple[subprocess.Popen[bytes], pathlib.Path]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> collections.abc.Iterator[Runs]:
    """
    The commands under way, with each Python at the same time, and the home of the user whose they
    are.
    """
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    # What was downloaded or built is not thrown away with the home; most of it is never imported.
    environment.setdefault("PIP_CACHE_DIR", str(pathlib.Path.home() / ".cache" / "pip"))
    environment["PIP_NO_COMPILE"] = "1"
    started: Runs = {}
    for version, numbers in VERSIONS.items():
        if interpreter := support.find_interpreter(*numbers):
            home = tmp_path_factory.mktemp("home")
            (home / "bin").mkdir()
            (home / "bin" / "python3").symlink_to(interpreter.path)
            (home / "commands").write_text("\n".join(console()[0]))
            process = start(
                ["bash", "-e", str(home / "commands")],
                log=home / "log",
                cwd=installed.copy_sources(home / "clone"),
                env={**environment, "HOME": str(home), "PATH": f"{home}/bin:{os.environ['PATH']}"},
            )
            started[version] = process, home
    yield started
    end([process for process, _ in started.values()])


# All of inmanta is downloaded and analysed, on a machine that may be busy.
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_commands_of_the_tutorial_work_as_they_are_written(version: str, runs: Runs) -> None:
    if version not in runs:
        pytest.skip(f"needs Python {version}")
    process, home = runs[version]

    process.wait()

    output = (home / "log").read_text()
    assert process.returncode == 0, output
    assert [line for line in console()[1] if line not in output] == [], output
    (wheel,) = (home / "tutorial" / "dist").glob("*.whl")
    package = "inmanta_plugins/envfile/"
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.removeprefix(package) for name in names if name.startswith(package)} == {
        *("__init__.py", "on_host.py", "py.typed", "setup.cfg", "model/_init.cf")
    }


def test_the_tutorials_host_functions_run_on_the_oldest_python() -> None:
    source = installed.ROOT / "docs/tutorial/envfile/inmanta_plugins/envfile/on_host.py"
    tree = ast.parse(source.read_text(), feature_version=(3, 6))
    imported = {
        (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }

    assert imported <= {*sys.stdlib_module_names, "inmanta_mitogen"}
