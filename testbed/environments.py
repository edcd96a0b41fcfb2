"""
The wheel of this module, that of the tutorial's, and Python environments that do not have them yet.
"""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv

from testbed.processes import ProcessFailedError, finish, start

CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
"""The checkout that the demo is part of."""

NOT_SOURCES = shutil.ignore_patterns(
    ".*", "venv", "__pycache__", "build", "dist", "_build", "*.egg-info"
)
"""What to leave out of a copy of it, which setuptools is to build in: it builds among the
sources."""

_MODULE = "inmanta-module-mitogen"


def source_environment(path: pathlib.Path) -> pathlib.Path:
    """
    Make a virtual environment that has what the current one has, but for inmanta modules and
    mitogen. An orchestrator started with it has to install these for its agents, as one in
    production does, although the environment of a developer has them all.

    It takes no copies: it has links to the packages of the current environment.

    :param path: Where to make it.
    :return: Its interpreter.
    """
    venv.create(path, with_pip=False, symlinks=True)
    packages = path / "packages"
    packages.mkdir()
    for directory in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        hidden = _module_files(directory)
        for entry in pathlib.Path(directory).iterdir():
            if entry.name not in hidden and entry.suffix != ".pth":
                (packages / entry.name).symlink_to(entry)

    # The packages are in a directory of their own, so that pip, which may be told to replace one of
    # them, never touches what the links point to.
    python = path / "bin" / "python"
    site = venv_site_packages(path)
    (site / "packages.pth").write_text(f"{packages}\n")
    return python


def derived_environment(path: pathlib.Path, parent: pathlib.Path) -> pathlib.Path:
    """
    Make a virtual environment that has all that another one has, and gets more.

    :param path: Where to make it.
    :param parent: The environment to build on, made by :func:`source_environment`.
    :return: Its interpreter.
    """
    venv.create(path, with_pip=False, symlinks=True)
    site = venv_site_packages(parent)
    (venv_site_packages(path) / "parent.pth").write_text(
        f"import site; site.addsitedir({str(site)!r})\n"
    )
    return path / "bin" / "python"


def venv_site_packages(path: pathlib.Path) -> pathlib.Path:
    """
    Return the directory that its packages are in.

    :param path: A virtual environment made by the current interpreter.
    """
    return pathlib.Path(sysconfig.get_path("purelib", scheme="venv", vars={"base": str(path)}))


class Wheel:
    """
    A wheel of this module, or of another one, under construction until :meth:`wait` returns.

    :param directory: Where to build it.
    :param published: A published version to use in place of the source.
    :param source: The source.
    :param name: Its name on PyPI.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        published: str | None = None,
        *,
        source: pathlib.Path = CHECKOUT,
        name: str = _MODULE,
    ) -> None:
        self.directory = directory / "wheels"
        self._name, self._log = name, directory / f"{name}.log"
        command = ["-m", "pip", "download", f"{name}=={published}", "--no-deps", "--dest"]
        if published is None:
            # Two builds at a time would be in each other's way.
            copy = directory / f"{name}-source"
            shutil.copytree(source, copy, ignore=NOT_SOURCES)
            command = ["-m", "pip", "wheel", str(copy), "--no-deps", "--wheel-dir"]
            if source != CHECKOUT:
                command = ["-m", "inmanta.app", "module", "build", str(copy), "-o"]
        self._process = start([sys.executable, *command, str(self.directory)], log=self._log)

    def wait(self) -> pathlib.Path:
        """
        Return the wheel.

        :raises ProcessFailedError: When it can't be built.
        """
        finish(self._process, what=f"building the wheel of {self._name}", log=self._log)
        return _only_wheel(self.directory, self._name)


def tutorial_wheel(directory: pathlib.Path) -> Wheel:
    """
    Return the wheel of the module that the tutorial builds.

    :param directory: Where to build it.
    """
    source = CHECKOUT / "docs" / "tutorial" / "envfile"
    return Wheel(directory, source=source, name="inmanta-module-envfile")


def _only_wheel(directory: pathlib.Path, name: str) -> pathlib.Path:
    wheels = list(directory.glob(f"{name.replace('-', '_')}-*.whl"))
    if len(wheels) != 1:
        raise ProcessFailedError(f"building one wheel of {name}", 0, f"found: {wheels}")
    return wheels[0]


def pip_settings(wheel: pathlib.Path) -> dict[str, str]:
    """
    Return the environment variables that let pip install this very wheel where something asks for
    the module, and everything else from where it does anyway.

    :param wheel: A wheel of this module.
    """
    name, version = wheel.name.split("-")[:2]
    constraint = wheel.with_name("constraints.txt")
    constraint.write_text(f"{name}=={version}\n")
    return {
        # A variable replaces what the configuration file says, so that has to be repeated.
        "PIP_FIND_LINKS": " ".join(
            filter(None, [str(wheel.parent), _pip_configuration("find-links")])
        ),
        "PIP_CONSTRAINT": " ".join(
            filter(None, [str(constraint), _pip_configuration("constraint")])
        ),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


def _pip_configuration(name: str) -> str:
    variable = os.environ.get("PIP_" + name.upper().replace("-", "_"))
    if variable is not None:
        return variable
    answer = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", f"global.{name}"],
        capture_output=True,
        text=True,
    )
    return " ".join(answer.stdout.split()) if answer.returncode == 0 else ""


def _module_files(directory: str) -> set[str]:
    """Return the names in a directory of packages that belong to inmanta modules or to mitogen."""
    names = {"__pycache__", "inmanta_plugins"}
    for distribution in importlib.metadata.distributions(path=[directory]):
        name = distribution.name.lower().replace("_", "-")
        if name == "mitogen" or name.startswith("inmanta-module-"):
            names |= {path.parts[0] for path in distribution.files or ()}
    return names
