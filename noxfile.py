"""
The environments that are made for one purpose each: ``nox --list`` names them, and the Makefile's
``matrix``, ``dist``, ``docs`` and ``bench`` run them.
"""

import configparser
import os
import pathlib
import re
import shutil
import subprocess

import nox

from testbed.client import PROJECT

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests"]

os.environ.pop("PYTHONPATH", None)

ROOT = pathlib.Path(__file__).resolve().parent

MODEL = """
import mitogen

host = std::Host(name="here", os=std::linux, via=mitogen::Local(name="here"))
std::print(host.via.method_name)
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


def lowest(package: str) -> str:
    """Return the requirement of the lowest version of a package that setup.cfg allows."""
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    found = re.search(rf"^{package}>=([\w.]+)", metadata["options"]["install_requires"], re.M)
    assert found is not None
    return f"{package}=={found[1]}"


def offer_all_of_pyenv() -> None:
    """Let pyenv's shims, which is what nox finds on the PATH, run each version that pyenv has."""
    if pyenv := shutil.which("pyenv"):
        versions = []
        for question in (["version-name"], ["versions", "--bare"]):
            answer = subprocess.run([pyenv, *question], capture_output=True, text=True)
            versions += re.findall(r"[^:\s]+", answer.stdout)
        os.environ["PYENV_VERSION"] = ":".join(dict.fromkeys(versions))


offer_all_of_pyenv()

COMBINATIONS = {
    "core14": ("3.11", ["inmanta-core==14.*"]),
    "core18": ("3.12", ["inmanta-core==18.*"]),
    "core20": ("3.13", ["inmanta-core==20.*"]),
    "lowest-mitogen": ("3.13", ["inmanta-core==20.*", lowest("mitogen")]),
}
"""The supported combinations of Python, inmanta-core and mitogen."""
combinations = nox.parametrize(
    ["python", "pins"], list(COMBINATIONS.values()), ids=list(COMBINATIONS)
)


@nox.session
@combinations
def tests(session: nox.Session, pins: list[str]) -> None:
    """Run the tests. More arguments are pytest's."""
    session.install("-qq", "-e", ".", "-r", "requirements-dev.txt", *pins)
    report = ROOT / ".cache" / f"{pathlib.Path(session.virtualenv.location).name}.xml"
    report.unlink(missing_ok=True)
    arguments = ["@tests/parallel.txt", "-q", f"--junit-xml={report}", *session.posargs]
    # The shims are to run what they run in the other tests.
    session.run("python", "-m", "pytest", *arguments, env={"PYENV_VERSION": None})


@nox.session
def dist(session: nox.Session) -> None:
    """Build what is committed into dist/, check it, and try the wheel with each combination."""
    session.install("-qq", "build", "twine")
    sources = pathlib.Path(session.create_tmp(), "sources")
    shutil.rmtree(sources, ignore_errors=True)
    session.run("git", "clone", "-q", ".", str(sources), external=True)
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", "dist", str(sources), silent=True)
    session.run("twine", "check", "--strict", *map(str, (ROOT / "dist").iterdir()))
    for name in COMBINATIONS:
        session.notify(f"wheel({name})")


@nox.session
@combinations
def wheel(session: nox.Session, pins: list[str]) -> None:
    """Install the wheel in dist/, compile a model with it, and call a function through it."""
    built = sorted(map(str, (ROOT / "dist").glob("*.whl")))
    session.install("-qq", "--force-reinstall", "--no-deps", *built)
    session.install("-qq", *built, *pins)
    project = pathlib.Path(session.create_tmp())
    (project / "libs").mkdir(exist_ok=True)
    (project / "project.yml").write_text(PROJECT)
    (project / "main.cf").write_text(MODEL)
    with session.chdir(project):
        printed = session.run("python", "-m", "inmanta.app", "-vv", "compile", silent=True)
        if "local" not in str(printed).splitlines():
            session.error(f"The model printed no 'local':\n{printed}")
        session.run("python", "-c", CALL)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the guide into docs/_build/html, with its links checked."""
    session.install("-qq", "-e", ".", "-r", "docs/requirements.txt")
    shutil.rmtree(ROOT / "docs" / "_build", ignore_errors=True)
    for builder, more in (("linkcheck", ["-q"]), ("html", [])):
        options = ["-W", "--keep-going", *more, "-b", builder]
        session.run("python", "-m", "sphinx", *options, "docs", f"docs/_build/{builder}")


NEWEST = next((each for each in ("3.13", "3.12") if shutil.which(f"python{each}")), None)
"""The newest supported Python of this machine."""


@nox.session(default=False, python=NEWEST)
def peer(session: nox.Session) -> None:
    """Return the published module that the benchmarks compare with."""
    session.install("-qq", "inmanta-module-mitogen==0.2.5", "-r", "benchmarks/requirements.txt")


@nox.session(default=False, python=NEWEST)
def rivals(session: nox.Session) -> None:
    """Other ways to reach hosts that the benchmarks compare with."""
    session.install("-qq", "execnet>=2,<3", "asyncssh>=2,<3")


@nox.session(default=False, python=NEWEST, requires=["peer", "rivals"])
def bench(session: nox.Session) -> None:
    """Measure this module and others, and write docs/benchmarks.md. Arguments are run.py's."""
    demo = ("-r", "demo/requirements.txt")
    session.install("-qq", "-e", ".", "-r", "benchmarks/requirements.txt", *demo, "build")
    session.run("python", "-m", "benchmarks.run", *session.posargs)
