"""
What is built from this folder is a complete inmanta module, however it is built and installed.
"""

import concurrent.futures
import configparser
import pathlib
import re
import shutil
import sys
import zipfile

import installed
import pytest
import yaml
from inmanta.module import ModuleV1Metadata, ModuleV2Metadata
from installed import PIP, ROOT, run

# What the files say


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_module_yml_says_the_same_as_setup_cfg() -> None:
    v1 = ModuleV1Metadata.parse((ROOT / "module.yml").read_text())
    v2 = ModuleV2Metadata.parse((ROOT / "setup.cfg").read_text())
    core = re.search(r"^inmanta-core>=(\S+)$", setup_cfg()["options"]["install_requires"], re.M)

    assert f"inmanta-module-{v1.name}" == v2.name
    assert v1.version == v2.version
    assert v1.license == v2.license
    assert core is not None
    assert v1.compiler_version == core[1]


def test_the_newest_release_in_the_changelog_is_this_version() -> None:
    releases = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)

    assert releases[0] == setup_cfg()["metadata"]["version"]


# What is built


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """
    The sources in a folder of their own, named as the module must be on a V1 module path.
    """
    return installed.copy_sources(tmp_path_factory.mktemp("libs") / "mitogen")


BUILDS: dict[str, tuple[str, ...]] = {
    "pip wheel": (*PIP, "wheel", "--no-deps", "--wheel-dir"),
    "inmanta module build": (sys.executable, "-m", "inmanta.app", "module", "build", "-o"),
    # The wheel is that of the sdist which it builds first.
    "python -m build": (sys.executable, "-m", "build", "--outdir"),
}


@pytest.fixture(scope="session")
def wheels(
    checkout: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, pathlib.Path]:
    """
    The wheel that each way of building makes.
    """

    def build(way: str) -> pathlib.Path:
        # A build leaves files among the sources: each has sources of its own.
        directory = tmp_path_factory.mktemp("build")
        shutil.copytree(checkout, directory / "mitogen")
        former = directory / "mitogen" / "build" / "lib" / "inmanta_plugins" / "mitogen"
        former.mkdir(parents=True)
        (former / "removed.py").touch()
        run(*BUILDS[way], directory / "dist", directory / "mitogen", cwd=directory)
        (wheel,) = (directory / "dist").glob("*.whl")
        return wheel

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(BUILDS, pool.map(build, BUILDS), strict=True))


# The shell scripts that look for interpreters on hosts.
SCRIPTS = ("auto", "interpreters", "probe")


def sources(checkout: pathlib.Path, folder: str) -> set[str]:
    return {str(path.relative_to(checkout)) for path in (checkout / folder).rglob("*.py")}


@pytest.mark.parametrize("way", BUILDS)
def test_a_wheel_holds_the_module_and_nothing_else(
    way: str, wheels: dict[str, pathlib.Path], checkout: pathlib.Path
) -> None:
    files = set(zipfile.ZipFile(wheels[way]).namelist())
    info = f"inmanta_module_mitogen-{setup_cfg()['metadata']['version']}.dist-info"

    assert {file for file in files if not file.startswith(info)} == {
        *sources(checkout, "inmanta_plugins"),
        *sources(checkout, "inmanta_mitogen"),
        *sources(checkout, "pytest_inmanta_mitogen"),
        "inmanta_plugins/mitogen/py.typed",
        *(f"inmanta_plugins/mitogen/connections/{name}.sh" for name in SCRIPTS),
        "inmanta_plugins/mitogen/setup.cfg",
        "inmanta_plugins/mitogen/model/_init.cf",
        "inmanta_mitogen/py.typed",
        "pytest_inmanta_mitogen/py.typed",
    }
    assert f"{info}/licenses/LICENSE" in files or f"{info}/LICENSE" in files


def test_pip_builds_the_same_module_as_inmanta(wheels: dict[str, pathlib.Path]) -> None:
    def contents(way: str) -> dict[str, bytes]:
        with zipfile.ZipFile(wheels[way]) as archive:
            # RECORD lists the others, in an order of its own.
            return {n: archive.read(n) for n in archive.namelist() if not n.endswith("/RECORD")}

    assert contents("pip wheel") == contents("inmanta module build")


# What is installed

MODEL = """
import mitogen

host = std::Host(
    name="web",
    os=std::linux,
    via=mitogen::Sudo(
        username="root",
        via=mitogen::Ssh(name="web", hostname="192.0.2.1", port=22, check_host_keys="enforce"),
    ),
)
std::print(host.via.via.hostname)
"""


def compiled(python: pathlib.Path, directory: pathlib.Path, modulepath: pathlib.Path) -> str:
    """
    Compile the model above in a new project.
    """
    project = directory / "project"
    (project / "libs").mkdir(parents=True)
    metadata = {
        "name": "test",
        "modulepath": [str(modulepath), "libs"],
        "downloadpath": "libs",
        "pip": {"use_system_config": True},
    }
    (project / "project.yml").write_text(yaml.safe_dump(metadata))
    (project / "main.cf").write_text(MODEL)
    return run(python, "-m", "inmanta.app", "-vv", "compile", cwd=project)


def test_the_installed_wheel_has_priority_over_a_checkout_on_the_v1_module_path(
    wheels: dict[str, pathlib.Path], checkout: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    other = pathlib.Path(shutil.copytree(checkout, tmp_path / "libs" / "mitogen"))
    assert (other / "module.yml").exists()
    (other / "model" / "_init.cf").write_text("no model")
    python = installed.environment(tmp_path, wheels["pip wheel"])

    assert "192.0.2.1" in compiled(python, tmp_path, other.parent)

    program = "import inmanta_plugins.mitogen as m; print(m.__file__)"
    assert str(python.parent.parent) in run(python, "-c", program, cwd=python.parent)


def test_an_editable_install_is_found_beside_itself_on_the_v1_module_path(
    checkout: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    python = installed.environment(tmp_path, "-e", checkout)

    assert "192.0.2.1" in compiled(python, tmp_path, checkout.parent)
