"""
Runs the tests on each supported combination of Python, inmanta-core and mitogen.

Each row has an environment of its own below .venv-matrix/. A row whose interpreter is not on this
machine is named, then left out. The last lines are a table of the rows and, alone on a line, their
sum; the exit code is 0 when each row that could run passed.
"""

import argparse
import configparser
import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venv-matrix"


@dataclasses.dataclass(frozen=True)
class Row:
    """
    One combination.

    :param name: what it is called in the table and in .venv-matrix/
    :param python: the interpreter's minor version
    :param pins: what pip is told beside the project's own requirements
    """

    name: str
    python: str
    pins: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """
    What came of a row's tests.
    """

    row: Row
    versions: str
    passed: int
    failed: int
    skipped: int
    exit_code: int


def lowest(package: str) -> str:
    """
    The lowest version of a package that setup.cfg allows.

    :raises ValueError: when setup.cfg states none
    """
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    found = re.search(rf"^{package}>=([\w.]+)", metadata["options"]["install_requires"], re.M)
    if found is None:
        raise ValueError(f"setup.cfg states no lowest version of {package}")
    return found[1]


def rows() -> list[Row]:
    """
    All combinations.
    """
    return [
        Row("core14", "3.11", ("inmanta-core==14.*",)),
        Row("core18", "3.12", ("inmanta-core==18.*",)),
        Row("core20", "3.13", ("inmanta-core==20.*",)),
        Row(
            "lowest-mitogen",
            "3.13",
            ("inmanta-core==20.*", f"mitogen=={lowest('mitogen')}"),
        ),
    ]


def ask(*command: str) -> str:
    """
    What a command prints; nothing when it fails or does not exist.
    """
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def find_interpreter(version: str) -> str | None:
    """
    A Python of a minor version, from pyenv or the PATH.
    """
    candidates = []
    if shutil.which("pyenv"):
        for known in ask("pyenv", "versions", "--bare").split():
            if known.startswith(f"{version}."):
                candidates.append(f"{ask('pyenv', 'prefix', known).strip()}/bin/python")
    candidates.append(f"python{version}")
    probe = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in candidates:
        if ask(candidate, "-c", probe).strip() == version:
            return candidate
    return None


def installed_versions(python: pathlib.Path) -> dict[str, str]:
    """
    The versions in an environment of what the rows differ in.
    """
    program = (
        "import importlib.metadata as m, json, platform;"
        "names = ['inmanta-core', 'inmanta-module-std', 'mitogen'];"
        "versions = {n: m.version(n) for n in names};"
        "print(json.dumps({'python': platform.python_version()} | versions))"
    )
    result = subprocess.run(
        [python, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT
    )
    versions: dict[str, str] = json.loads(result.stdout)
    return versions


def described(versions: dict[str, str]) -> str:
    return ", ".join(
        f"{name.removeprefix('inmanta-').removeprefix('module-')} {version}"
        for name, version in versions.items()
    )


def is_instance(row: Row, versions: dict[str, str]) -> bool:
    """
    Whether an environment that is not pinned is what a row asks for.
    """
    wanted = {pin.split("==")[0]: pin.split("==")[1].removesuffix("*") for pin in row.pins}
    return versions["python"].startswith(f"{row.python}.") and all(
        versions[name] == version or (version.endswith(".") and versions[name].startswith(version))
        for name, version in wanted.items()
    )


def read_outcome(row: Row, versions: dict[str, str], report: pathlib.Path, code: int) -> Outcome:
    """
    Count the tests in a JUnit report.
    """
    if not report.exists():
        return Outcome(row, described(versions), 0, 0, 0, code or 1)
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, errors, failures, skipped = (
        sum(int(suite.get(key, 0)) for suite in suites)
        for key in ("tests", "errors", "failures", "skipped")
    )
    failed = errors + failures
    return Outcome(row, described(versions), total - failed - skipped, failed, skipped, code)


def run_row(row: Row, interpreter: str, pytest_args: list[str]) -> Outcome:
    """
    Make a row's environment and run the tests in it.
    """
    directory = ENVIRONMENTS / row.name
    directory.parent.mkdir(exist_ok=True)
    requirements = ["-r", "requirements-dev.txt", *row.pins]
    make_env = str(ROOT / "tools" / "make_env.sh")
    made = subprocess.run([make_env, directory, interpreter, *requirements], cwd=ROOT).returncode
    if made != 0:
        return Outcome(row, "its environment could not be made", 0, 0, 0, made)
    python = directory / "bin" / "python"
    versions = installed_versions(python)
    print(f"\n=== {row.name}: {described(versions)}", flush=True)
    report = directory / "junit.xml"
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-q", "@tests/parallel.txt", f"--junit-xml={report}"]
    code = subprocess.run([*command, *pytest_args], cwd=ROOT).returncode
    return read_outcome(row, versions, report, code)


def print_table(outcomes: list[Outcome], left_out: list[Row]) -> None:
    header = ("row", "versions", "passed", "failed", "skipped")
    lines = [header] + [
        (o.row.name, o.versions, str(o.passed), str(o.failed), str(o.skipped)) for o in outcomes
    ]
    lines += [(row.name, f"no Python {row.python} here", "-", "-", "-") for row in left_out]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    print()
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        cells += [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        print("  ".join(cells))
    sums = (sum(getattr(o, name) for o in outcomes) for name in ("passed", "failed", "skipped"))
    print("\n{} passed, {} failed, {} skipped".format(*sums), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [options] [-- PYTEST...]")
    names = [row.name for row in rows()]
    parser.add_argument("--row", action="append", choices=names, help="only this row; repeatable")
    parser.add_argument(
        "--done",
        metavar="REPORT",
        type=pathlib.Path,
        help="the JUnit report of a run in .venv: counts as the row that .venv is an instance of",
    )
    parser.add_argument("--only-done", action="store_true", help="no row but that of --done")
    parser.add_argument("pytest_args", nargs="*", help="more arguments for pytest")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    venv = installed_versions(ROOT / ".venv" / "bin" / "python") if arguments.done else {}
    outcomes, left_out = [], []
    for row in rows():
        if arguments.row and row.name not in arguments.row:
            continue
        if arguments.done and is_instance(row, venv):
            outcomes.append(read_outcome(row, venv, arguments.done, 0))
            continue
        if arguments.only_done:
            continue
        interpreter = find_interpreter(row.python)
        if interpreter is None:
            print(f"{row.name}: left out, there is no Python {row.python} here", flush=True)
            left_out.append(row)
            continue
        outcomes.append(run_row(row, interpreter, arguments.pytest_args))
    if arguments.done and not any(is_instance(row, venv) for row in rows()):
        outcomes.append(read_outcome(Row("venv", "", ()), venv, arguments.done, 0))
    print_table(outcomes, left_out)
    bad = [o for o in outcomes if o.exit_code or o.failed or not o.passed]
    return 1 if bad or not outcomes else 0


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    sys.exit(main())
