"""
Builds the wheel and the sdist into dist/, and checks that what was built is good.

They are built from the tracked files alone. The metadata has to pass `twine check`, the contents
have to be what belongs there, and each supported Python of this machine has to install the wheel
into a clean environment, compile a model with it and call a function through it. The exit code is 0
when all of that succeeds.
"""

import configparser
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile

from tools.matrix import ROOT, Row, find_interpreter, rows

PACKAGES = ("inmanta_plugins", "inmanta_mitogen", "pytest_inmanta_mitogen")

MODEL = """
import mitogen

host = std::Host(name="here", os=std::linux, via=mitogen::Local(name="here"))
std::print(host.via.method_name)
"""

PROJECT = """
name: dist
modulepath: libs
downloadpath: libs
pip:
  use_system_config: true
"""

CALL = """
import os, sys
import inmanta_plugins.mitogen
assert sys.prefix in inmanta_plugins.mitogen.__file__, inmanta_plugins.mitogen.__file__
here = {"method_name": "local", "python_path": [sys.executable]}
with inmanta_plugins.mitogen.Proxy(here) as far:
    assert far.remote_call(os.getpid) != os.getpid()
    assert far.run("echo", ["hello"]) == ("hello", "", 0)
"""


class DistError(Exception):
    """What was built is not fit to be released; the text says why."""


def run(*command: str | pathlib.Path, cwd: pathlib.Path) -> str:
    """
    Run a command.

    :param command: The program and its arguments.
    :param cwd: The directory to run it in.
    :return: What it printed.
    :raises DistError: It failed.
    """
    done = subprocess.run(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        shown = " ".join(map(str, command))
        raise DistError(f"{shown} ended with status {done.returncode}:\n{done.stdout}")
    return done.stdout


def tracked_files() -> list[str]:
    """
    :return: The paths of all files that git tracks, from the top of the checkout.
    """
    listed = run("git", "ls-files", "-z", cwd=ROOT)
    return sorted(name for name in listed.split("\0") if name and (ROOT / name).is_file())


def copy_sources(directory: pathlib.Path) -> None:
    """
    :param directory: Gets a copy of the tracked files.
    """
    for name in tracked_files():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, directory / name)


def expected_in_wheel(sources: list[str]) -> set[str]:
    """
    :param sources: The paths of the sources.
    :return: What a wheel of them has to hold beside its metadata: the packages, and the model and
        setup.cfg where inmanta looks for them.
    """
    module = "inmanta_plugins/mitogen"
    code = {name for name in sources if name.split("/")[0] in PACKAGES}
    model = {f"{module}/{name}" for name in sources if name.split("/")[0] == "model"}
    return code | model | {f"{module}/setup.cfg"}


def check_wheel(wheel: pathlib.Path, sources: list[str]) -> int:
    """
    :param wheel: The wheel.
    :param sources: The paths of the sources.
    :return: The number of its files.
    :raises DistError: It lacks a file, or has one that does not belong there.
    """
    names = set(zipfile.ZipFile(wheel).namelist())
    held = {name for name in names if ".dist-info/" not in name}
    expected = expected_in_wheel(sources)
    if held != expected:
        raise DistError(
            f"{wheel.name} lacks {sorted(expected - held)} and should not hold"
            f" {sorted(held - expected)}"
        )
    if not any(name.endswith("/LICENSE") for name in names):
        raise DistError(f"{wheel.name} has no LICENSE")
    return len(names)


def check_sdist(sdist: pathlib.Path, sources: list[str]) -> int:
    """
    :param sdist: The sdist.
    :param sources: The paths of the sources.
    :return: The number of its files.
    :raises DistError: It lacks what the wheel is built from, or has compiled files.
    """
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    tops = (*PACKAGES, "model", "setup.py", "setup.cfg", "pyproject.toml", "module.yml")
    needed = {name for name in sources if name.split("/")[0] in (*tops, "LICENSE", "README.md")}
    if missing := needed - names:
        raise DistError(f"{sdist.name} lacks {sorted(missing)}")
    if compiled := sorted(name for name in names if name.endswith((".pyc", ".pyo"))):
        raise DistError(f"{sdist.name} should not hold {compiled}")
    return len(names)


def build(work: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """
    Build both, and have twine check their metadata.

    :param work: An empty directory.
    :return: The wheel, which is built from the sdist, and the sdist.
    :raises DistError: Something of that fails.
    """
    copy_sources(work / "sources")
    venv.create(work / "tools", with_pip=True)
    python = work / "tools" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "build", "twine", cwd=work)
    run(python, "-m", "build", "--outdir", work / "dist", work / "sources", cwd=work)
    (wheel,) = (work / "dist").glob("*.whl")
    (sdist,) = (work / "dist").glob("*.tar.gz")
    run(python, "-m", "twine", "check", "--strict", wheel, sdist, cwd=work)
    return wheel, sdist


def try_wheel(wheel: pathlib.Path, row: Row, interpreter: str, work: pathlib.Path) -> None:
    """
    Install a wheel into a clean environment, compile a model with it, and call a function.

    :param wheel: The wheel.
    :param row: The versions to try it with.
    :param interpreter: The Python to do it with.
    :param work: An empty directory.
    :raises DistError: Something of that fails.
    """
    run(interpreter, "-m", "venv", work / "venv", cwd=work)
    python = work / "venv" / "bin" / "python"
    # inmanta-core 14 imports it, and no longer gets it from what it requires.
    more = ("importlib-metadata",) if row.python == "3.11" else ()
    run(python, "-m", "pip", "install", "-q", wheel, *row.pins, *more, cwd=work)
    project = work / "project"
    (project / "libs").mkdir(parents=True)
    (project / "project.yml").write_text(PROJECT)
    (project / "main.cf").write_text(MODEL)
    printed = run(python, "-m", "inmanta.app", "-vv", "compile", cwd=project)
    if "local" not in printed.splitlines():
        raise DistError(f"The model printed no 'local' with {row.name}:\n{printed}")
    run(python, "-c", CALL, cwd=work)


def main() -> int:
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    version = metadata["metadata"]["version"]
    sources = tracked_files()
    with tempfile.TemporaryDirectory(prefix="dist-") as directory:
        work = pathlib.Path(directory)
        wheel, sdist = build(work)
        if f"-{version}-" not in wheel.name or f"-{version}.tar" not in sdist.name:
            raise DistError(f"{wheel.name} and {sdist.name} are not of version {version}")
        print(f"{wheel.name}: {check_wheel(wheel, sources)} files")
        print(f"{sdist.name}: {check_sdist(sdist, sources)} files")
        print("twine check: passed", flush=True)
        tried = 0
        for row in rows():
            interpreter = find_interpreter(row.python)
            if interpreter is None:
                print(f"{row.name}: left out, there is no Python {row.python} here", flush=True)
                continue
            (work / row.name).mkdir()
            try_wheel(wheel, row, interpreter, work / row.name)
            tried += 1
            print(
                f"{row.name} (Python {row.python}): installed, compiled a model, made a call",
                flush=True,
            )
        if not tried:
            raise DistError("There is no supported Python here to try the wheel with")
        (ROOT / "dist").mkdir(exist_ok=True)
        for built in (wheel, sdist):
            shutil.copy2(built, ROOT / "dist")
            print(f"dist/{built.name}")
    return 0


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    try:
        sys.exit(main())
    except DistError as error:
        sys.exit(f"dist: {error}")
