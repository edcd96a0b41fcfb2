"""The tutorial's commands work as they are written, on the oldest and the newest Python."""

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

import support

ROOT = pathlib.Path(__file__).resolve().parents[2]
TUTORIAL = ROOT / "docs" / "tutorial.md"
NOT_IN_A_CLONE = shutil.ignore_patterns(
    ".*", "__pycache__", "build", "dist", "_build", "*.egg-info"
)


def console() -> tuple[list[str], list[str]]:
    """Return the commands on the page, and what it says they print."""
    blocks = re.findall(r"^```console\n(.*?)^```$", TUTORIAL.read_text(), re.M | re.S)
    lines = "".join(blocks).splitlines()
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return commands, [line for line in lines if not line.startswith("$ ")]


# All of inmanta is downloaded and analysed, on a machine that may be busy.
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", [(3, 11), (3, 13)], ids=["3.11", "3.13"])
def test_the_commands_of_the_tutorial_work_as_they_are_written(
    version: tuple[int, int], tmp_path: pathlib.Path
) -> None:
    interpreter = support.find_interpreter(*version)
    if interpreter is None:
        pytest.skip(f"needs Python {version[0]}.{version[1]}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(interpreter.path)
    shutil.copytree(ROOT, tmp_path / "clone", ignore=NOT_IN_A_CLONE)
    commands, printed = console()

    done = subprocess.run(
        ["bash", "-e"],
        cwd=tmp_path / "clone",
        env={
            **{name: text for name, text in os.environ.items() if name != "PYTHONPATH"},
            "HOME": str(tmp_path),
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        },
        input="\n".join(commands),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    assert done.returncode == 0, done.stdout
    assert [line for line in printed if line not in done.stdout] == [], done.stdout
    (wheel,) = (tmp_path / "tutorial" / "dist").glob("*.whl")
    package = "inmanta_plugins/envfile/"
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.removeprefix(package) for name in names if name.startswith(package)} == {
        *("__init__.py", "on_host.py", "py.typed", "setup.cfg", "model/_init.cf")
    }


def test_the_tutorials_host_functions_run_on_the_oldest_python() -> None:
    source = ROOT / "docs/tutorial/envfile/inmanta_plugins/envfile/on_host.py"
    tree = ast.parse(source.read_text(), feature_version=(3, 6))
    imported = {
        (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }

    assert imported <= {*sys.stdlib_module_names, "inmanta_mitogen"}
