"""
The guide and the README tell the truth: their models compile, their code runs, their tables are
complete.
"""

import ast
import hashlib
import inspect
import json
import pathlib
import re
import shutil
import sys
import types
import typing

import pytest
from inmanta import const
from pytest_inmanta.plugin import Project

import inmanta_plugins.mitogen as mitogen_module
import support
from inmanta_plugins.mitogen import Cause, Proxy, RemoteException, settings
from inmanta_plugins.mitogen.errors import SET_PYTHON_PATH

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
OUTSIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES = sorted([*OUTSIDE, *DOCS.glob("*.md"), *DOCS.glob("*/*.md")])

# The project's packages, and what else reads variables of its name.
CODE = ("inmanta_plugins", "inmanta_mitogen", "pytest_inmanta_mitogen", "tests", "tools", "demo")


def blocks(page: pathlib.Path, language: str) -> list[str]:
    """
    Return the code of one language on a page.
    """
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def tables(page: pathlib.Path) -> list[list[dict[str, str]]]:
    """
    Return the tables on a page: for each row, the cells by the names of their columns.
    """
    found = []
    for table in re.findall(r"(?:^\|.*\|\n)+", page.read_text(), re.M):
        rows = [
            [cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()
        ]
        names = [name.strip("| ") for name in rows[0]]
        found.append(
            [dict(zip(names, (c.strip("| ") for c in row), strict=True)) for row in rows[2:]]
        )
    return found


def column(page: pathlib.Path, name: str) -> list[str]:
    """
    All cells of the columns of that name on a page, without their backticks.
    """
    return [row[name].strip("`") for table in tables(page) for row in table if name in row]


def definitions(page: pathlib.Path) -> dict[str, str]:
    """
    Return the terms of the definition lists on a page, without backticks, and what is said of each:
    a paragraph a line.
    """
    found = re.findall(r"^(\S.*)\n((?:: .*\n)(?:(?:  .*)?\n)*)", page.read_text(), re.M)
    return {
        term.strip("`"): "\n".join(
            " ".join(part.split()) for part in text[2:].split("\n\n")
        ).strip()
        for term, text in found
    }


def named(prefix: str) -> set[str]:
    """
    Return the names in the code that begin so.
    """
    texts = [file.read_text() for folder in CODE for file in (ROOT / folder).rglob("*.py")]
    return {name for text in texts for name in re.findall(rf'"({prefix}[A-Z_]+)"', text)}


# Models


# Published inmanta-core has had references since then.
REFERENCES = "create_environment_reference"


@pytest.mark.parametrize(
    "references", [False, pytest.param(True, marks=pytest.mark.needs_core(18))]
)
def test_the_models_of_the_guide_compile(project: Project, references: bool) -> None:
    models = [model for page in PAGES for model in blocks(page, "inmanta")]
    for model in models:
        if "import greeting" not in model and (REFERENCES in model) == references:
            project.compile(model)


def test_the_handler_of_the_readme_deploys(project: Project, tmp_path: pathlib.Path) -> None:
    (handler,) = blocks(ROOT / "README.md", "python")
    entity, model = blocks(ROOT / "README.md", "inmanta")
    # The project is that of all tests, and this one may be run again.
    shutil.rmtree(pathlib.Path(project._test_project_dir, "libs", "greeting"), ignore_errors=True)
    project.create_module("greeting", initcf=entity, initpy=handler)
    project.compile(model)
    resource = typing.cast("typing.Any", project.get_resource("greeting::Greeting"))
    assert resource.via["method_name"] == "sudo"
    assert resource.via["via"]["hostname"] == "192.0.2.10"

    here = f'mitogen::Local(name="here", python_path=[{json.dumps(sys.executable)}])'
    model, found = re.subn(r"via=.*\),(?=\n\)$)", f"via={here},", model, flags=re.M | re.S)
    assert found
    path = tmp_path / "motd"
    model = model.replace("/etc/motd", str(path))
    told = "Managed by inmanta: local changes are lost."
    for change, text in ((const.Change.created, told), (const.Change.updated, "Good day")):
        project.compile(model.replace(told, text))
        project.deploy_resource("greeting::Greeting", change=change)
        assert path.read_text() == f"{text}\n"
        project.deploy_resource("greeting::Greeting", change=const.Change.nochange)
    project.compile(model.replace("host=host", "host=host, purged=true"))
    project.deploy_resource("greeting::Greeting", change=const.Change.purged)
    assert not path.exists()


# Code


def test_the_code_of_the_guide_is_valid_and_names_what_there_is() -> None:
    for node in (
        node
        for page in PAGES
        for code in blocks(page, "python")
        for node in ast.walk(ast.parse(code))
    ):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(
            ("inmanta_plugins.mitogen", "pytest_inmanta_mitogen")
        ):
            module = __import__(str(node.module), fromlist=["*"])
            assert [a.name for a in node.names if not hasattr(module, a.name)] == []


@pytest.fixture
def page_module(
    request: pytest.FixtureRequest, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> types.ModuleType:
    """
    The code on the page that the test is parametrized with, as a module that hosts can have.
    """
    name = "code_" + pathlib.Path(request.param).stem.replace("-", "_")
    code = "\n".join(blocks(DOCS / request.param, "python"))
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = __import__(name)
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize("page_module", ["howto/secret.md"], indirect=True)
def test_secrets_that_are_passed_as_the_guide_says_are_not_logged(
    page_module: types.ModuleType,
    proxy: Proxy,
    recorder: support.Recorder,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = tmp_path / "key"
    page_module.write_key(proxy, str(key), b"canary")
    # What chpasswd would be given, without changing a password.
    chpasswd = tmp_path / "chpasswd"
    chpasswd.write_text(f"#!/bin/sh\ncat >{tmp_path}/given\n")
    chpasswd.chmod(0o755)
    run = proxy.run
    monkeypatch.setattr(proxy, "run", lambda name, **options: run(str(tmp_path / name), **options))
    page_module.set_password(proxy, "someone", "canary")
    token = proxy.remote_call(page_module.token, str(key))

    assert key.read_bytes() == b"canary"
    assert key.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "given").read_text() == "someone:canary"
    assert token == "canary"
    assert "canary" not in repr(recorder.records)
    assert "[secret]" in repr(recorder.calls)
    assert "[blob: 6 bytes]" in repr(recorder.calls)
    assert recorder.calls[-1]["result"] == "[secret]"


@pytest.mark.parametrize("page_module", ["howto/secret.md"], indirect=True)
def test_a_function_that_compares_on_the_host_says_no_more_than_that(
    page_module: types.ModuleType, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "key").write_bytes(b"canary")

    assert page_module.has_content(str(tmp_path / "key"), b"canary") is True
    assert page_module.has_content(str(tmp_path / "key"), b"canaries") is False


@pytest.mark.parametrize("page_module", ["howto/timeout.md"], indirect=True)
def test_the_proxy_with_a_timeout_reads(page_module: types.ModuleType) -> None:
    assert float(page_module.uptime(support.LOCAL).split()[0]) > 0


@pytest.mark.parametrize("page_module", ["howto/many-calls.md"], indirect=True)
def test_many_calls_give_what_each_alone_would(
    page_module: types.ModuleType,
    proxy: Proxy,
    recorder: support.Recorder,
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "file").write_bytes(b"content")
    paths = [str(tmp_path / "file"), str(tmp_path / "none")]

    sums = page_module.checksums(proxy, paths)
    assert sums == {paths[0]: hashlib.sha1(b"content").hexdigest(), paths[1]: None}
    assert ["exception" in call for call in recorder.calls] == [False, True]


# Tables


def test_the_log_page_names_each_field_of_a_record(
    proxy: Proxy, recorder: support.Recorder
) -> None:
    proxy.run("sleep", ["0.1"])
    with pytest.raises(RemoteException):
        proxy.read("/nonexistent")

    succeeded, failed = recorder.calls
    assert {*succeeded, *failed, "prefetched"} == set(column(DOCS / "log.md", "field"))
    assert {*succeeded} == {*failed} - {"exception"} | {"result"}
    assert succeeded["duration"] >= 0.1


def variables() -> dict[str, str]:
    """Each variable of the reference, and its default."""
    found = definitions(DOCS / "reference" / "variables.md")
    firsts = {name: text.splitlines()[0] for name, text in found.items()}
    assert all(first.startswith("default: ") for first in firsts.values())
    return {name: first.removeprefix("default: ").strip("`") for name, first in firsts.items()}


def test_each_environment_variable_is_documented() -> None:
    assert sorted(variables()) == sorted(named("INMANTA_MITOGEN_"))


def test_the_documented_defaults_are_those_of_the_code() -> None:
    of_the_log = {
        settings.LOGGED_VALUE_MAX_LEN_ENV_VAR: str(settings.DEFAULT_LOGGED_VALUE_MAX_LEN),
        settings.LOGGED_TRUNCATED_VALUE_ENV_VAR: settings.DEFAULT_LOGGED_TRUNCATED_VALUE_SUFFIX,
    }
    sizes = {
        settings.MAX_SIZE_ENV_VAR: f"{settings.DEFAULT_MAX_SIZE >> 30} GiB",
        settings.MAX_MESSAGE_SIZE_ENV_VAR: f"{settings.DEFAULT_MAX_MESSAGE_SIZE >> 20} MiB",
    }
    assert variables().items() >= (of_the_log | sizes).items()
    rows = re.findall(r"^- `(\w+)` \(default: `([^`]+)`\)", (ROOT / "README.md").read_text(), re.M)
    assert dict(rows) == of_the_log


def public_exceptions() -> dict[str, type[BaseException]]:
    public = {name: getattr(mitogen_module, name) for name in mitogen_module.__all__}
    return {
        name: value
        for name, value in public.items()
        if inspect.isclass(value) and issubclass(value, BaseException)
    }


def test_each_public_exception_is_documented_with_what_it_also_is() -> None:
    found = definitions(DOCS / "reference" / "exceptions.md")
    classes = {name: text for name, text in found.items() if name not in Cause.__members__}

    assert classes.keys() == public_exceptions().keys()
    for name, text in classes.items():
        bases = {base.__name__ for base in public_exceptions()[name].mro()}
        also = re.findall(r"`(?:[\w.]*\.)?(\w+)`", text.splitlines()[0])
        assert also, name
        assert set(also) <= bases, name


def test_each_cause_is_documented_with_its_advice() -> None:
    found = definitions(DOCS / "reference" / "exceptions.md")
    causes = {name: text for name, text in found.items() if name in Cause.__members__}

    assert list(causes) == [cause.name for cause in Cause]
    for cause in Cause:
        assert causes[cause.name].endswith(cause.value)
        assert len(causes[cause.name]) > len(cause.value) + 10


def test_the_samples_of_the_check_show_the_advice_of_their_cause() -> None:
    samples = blocks(DOCS / "howto" / "check.md", "text")
    failures = [
        re.findall(r"^  failed +(\w+), .*\n(?:.*\n)+?  advice +(.*)$", s, re.M) for s in samples
    ]
    shown = {cause: advice for found in failures for cause, advice in found}

    assert len(shown) == 5
    advices = {**{cause.name: cause.value for cause in Cause}, "PYTHON_NOT_FOUND": SET_PYTHON_PATH}
    assert shown == {cause: advices[cause] for cause in shown}


def test_the_table_of_methods_has_each_method_of_a_proxy() -> None:
    table = next(t for t in tables(DOCS / "reference" / "api.md") if "method" in t[0])
    documented = [row["method"].strip("`").partition("(")[0] for row in table]
    managed = {
        *("connect", "disconnect", "context", "after_fork_in_child"),
        *("begin_resource", "end_resource"),
    }
    public = {name for name in vars(Proxy) if not name.startswith("_")} - managed

    assert sorted(documented) == sorted(public)


def test_causes_that_other_pages_name_exist() -> None:
    mentioned = set(column(DOCS / "howto" / "user.md", "cause"))

    assert mentioned
    assert mentioned <= set(Cause.__members__)


def test_the_errors_lead_to_the_section_of_the_readme() -> None:
    (note,) = mitogen_module.PythonNotFoundError({"method_name": "local"}).__notes__
    section = re.search(r"section '([^']+)'", note)

    assert section is not None
    assert f"\n## {section[1]}\n" in (ROOT / "README.md").read_text()


# Links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_a_page_links_to_exist(page: pathlib.Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text())
    targets += re.findall(r"^```\{(?:literal)?include\} (\S+)$", page.read_text(), re.M)

    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_tests_that_pages_name_exist() -> None:
    pages = [ROOT / "CONTRIBUTING.md", DOCS / "faults.md", DOCS / "security.md"]
    texts = {str(file): file.read_text() for file in (ROOT / "tests").rglob("test_*.py")}
    missing = [
        name
        for page in pages
        for name in re.findall(r"(?<![\w/.])test_\w+\b(?!\.py|/)", page.read_text())
        if not any(f"def {name}(" in text for text in texts.values())
        and not any(file.endswith(f"/{name}.py") for file in texts)
    ]
    files = [f for page in pages for f in re.findall(r"\btests/[\w/]+\.py", page.read_text())]

    assert missing == []
    assert [name for name in files if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/design.md", "docs/security.md"])
def test_the_files_that_developers_are_sent_to_exist(page: str) -> None:
    named = re.findall(r"`([\w/]+\.(?:py|cf|cfg|md|yml))`", (ROOT / page).read_text())
    folders = [ROOT, ROOT / "inmanta_mitogen", *(ROOT / "inmanta_plugins/mitogen").glob("**")]

    assert named
    assert [name for name in named if not any((each / name).exists() for each in folders)] == []


def test_each_page_is_in_the_table_of_contents() -> None:
    toctree = r"^```\{toctree\}\n(?::[^\n]*\n)*\n(.*?)^```$"
    listed = "".join(re.findall(toctree, (DOCS / "index.md").read_text(), re.M | re.S)).split()
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in PAGES if DOCS in page.parents}

    assert {*listed, "index"} == pages | {"reference/model"}
