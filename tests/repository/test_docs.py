"""
The guide and the README tell the truth: their models compile, their code runs, their tables are
complete.
"""

import ast
import collections.abc
import hashlib
import importlib
import inspect
import json
import logging
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
from inmanta_plugins.mitogen import Cause, Proxy, RemoteException, settings
from inmanta_plugins.mitogen.check import PYTHON_ADVICE

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
OUTSIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES = sorted([*OUTSIDE, *DOCS.glob("*.md"), *DOCS.glob("*/*.md")])

# The project's packages, and what else reads variables of its name.
CODE = ("inmanta_plugins", "inmanta_mitogen", "pytest_inmanta_mitogen", "tests", "tools", "demo")


def blocks(page: pathlib.Path, language: str) -> list[str]:
    """
    The code of one language on a page.
    """
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def all_blocks(language: str) -> list[typing.Any]:
    return [
        pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, block in enumerate(blocks(page, language), start=1)
    ]


def tables(page: pathlib.Path) -> list[list[dict[str, str]]]:
    """
    The tables on a page: for each row, the cells by the names of their columns.
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
    The terms of the definition lists on a page, without their backticks, and what is said of each:
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
    The names in the code that begin so.
    """
    texts = [file.read_text() for folder in CODE for file in (ROOT / folder).rglob("*.py")]
    return {name for text in texts for name in re.findall(rf'"({prefix}[A-Z_]+)"', text)}


# Models


# Published inmanta-core has had references since then.
REFERENCES = "create_environment_reference"


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(*each.values, id=each.id, marks=pytest.mark.needs_core(18))
        if REFERENCES in each.values[0]
        else each
        for each in all_blocks("inmanta")
        if "import greeting" not in each.values[0]
    ],
)
def test_a_model_of_the_guide_compiles(project: Project, model: str) -> None:
    project.compile(model)


@pytest.fixture
def greeting(project: Project) -> collections.abc.Iterator[None]:
    """
    The module whose handler is in the README.
    """
    (handler,) = blocks(ROOT / "README.md", "python")
    entity, _ = blocks(ROOT / "README.md", "inmanta")
    project.create_module("greeting", initcf=entity, initpy=handler)
    yield
    # The project is that of all tests.
    shutil.rmtree(pathlib.Path(project._test_project_dir, "libs", "greeting"))


@pytest.mark.usefixtures("greeting")
def test_the_model_of_the_readme_is_deployed_where_it_says(project: Project) -> None:
    _, model = blocks(ROOT / "README.md", "inmanta")

    project.compile(model)

    resource = typing.cast("typing.Any", project.get_resource("greeting::Greeting"))
    assert resource.via["method_name"] == "sudo"
    assert resource.via["via"]["hostname"] == "192.0.2.10"


@pytest.mark.usefixtures("greeting")
def test_the_handler_of_the_readme_deploys(project: Project, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "motd"

    def deploy(change: const.Change, text: str, purged: bool = False) -> None:
        project.compile(f"""
            import mitogen
            import greeting
            via = mitogen::Local(name="here", python_path=[{json.dumps(sys.executable)}])
            host = std::Host(name="here", os=std::linux, via=via)
            greeting::Greeting(
                host=host, path="{path}", text="{text}", purged={json.dumps(purged)}
            )
        """)
        project.deploy_resource("greeting::Greeting", change=change)

    deploy(const.Change.created, "Hello")
    assert path.read_text() == "Hello"
    deploy(const.Change.nochange, "Hello")
    deploy(const.Change.updated, "Good day")
    assert path.read_text() == "Good day"
    deploy(const.Change.purged, "Good day", purged=True)
    assert not path.exists()


# Code


@pytest.mark.parametrize("code", all_blocks("python"))
def test_code_of_the_guide_is_valid_and_names_what_there_is(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(
            ("inmanta_plugins.mitogen", "pytest_inmanta_mitogen")
        ):
            module = __import__(str(node.module), fromlist=["*"])
            assert [a.name for a in node.names if not hasattr(module, a.name)] == []


class Records(logging.Handler):
    """
    Keeps what is logged.
    """

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self.calls: list[dict[str, typing.Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        if isinstance(record.args, collections.abc.Mapping) and "function" in record.args:
            self.calls.append(dict(record.args))


@pytest.fixture
def records() -> collections.abc.Iterator[Records]:
    """
    What remote calls log.
    """
    handler = Records()
    level = mitogen_module.LOGGER.level
    mitogen_module.LOGGER.addHandler(handler)
    mitogen_module.LOGGER.setLevel(logging.DEBUG)
    yield handler
    mitogen_module.LOGGER.removeHandler(handler)
    mitogen_module.LOGGER.setLevel(level)


@pytest.fixture
def far(
    records: Records, mitogen_local_context: dict[str, typing.Any]
) -> collections.abc.Iterator[Proxy]:
    """
    An open proxy whose calls are in the records.
    """
    with Proxy(mitogen_local_context) as proxy:
        yield proxy


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
    page_module: types.ModuleType, far: Proxy, records: Records, tmp_path: pathlib.Path
) -> None:
    key = tmp_path / "key"
    page_module.write_key(far, str(key), b"canary")
    # What chpasswd would be given, without changing a password.
    chpasswd = tmp_path / "chpasswd"
    chpasswd.write_text(f"#!/bin/sh\ncat >{tmp_path}/given\n")
    chpasswd.chmod(0o755)
    run = far.run

    def run_ours(command: str, **options: typing.Any) -> object:
        return run(str(tmp_path / command), **options)

    far.run = run_ours  # type: ignore[method-assign, assignment]  # one program is replaced
    page_module.set_password(far, "someone", "canary")

    assert key.read_bytes() == b"canary"
    assert key.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "given").read_text() == "someone:canary"
    assert "canary" not in repr(records.calls) + repr(records.messages)
    assert "[secret]" in repr(records.calls)
    assert "[blob: 6 bytes]" in repr(records.calls)


def test_a_result_that_is_marked_as_the_guide_says_is_not_logged(
    far: Proxy, records: Records, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = [b for b in blocks(DOCS / "howto" / "secret.md", "python") if "def token" in b]
    (tmp_path / "code_token.py").write_text(code)
    (tmp_path / "token").write_text("canary\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    token = importlib.import_module("code_token").token
    monkeypatch.delitem(sys.modules, "code_token")

    assert far.remote_call(token, str(tmp_path / "token")) == "canary"
    assert "canary" not in repr(records.calls) + repr(records.messages)
    assert records.calls[0]["result"] == "[secret]"


@pytest.mark.parametrize("page_module", ["howto/secret.md"], indirect=True)
def test_a_function_that_compares_on_the_host_says_no_more_than_that(
    page_module: types.ModuleType, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "key").write_bytes(b"canary")

    assert page_module.has_content(str(tmp_path / "key"), b"canary") is True
    assert page_module.has_content(str(tmp_path / "key"), b"canaries") is False


@pytest.mark.parametrize("page_module", ["howto/timeout.md"], indirect=True)
def test_the_proxy_with_a_timeout_reads(
    page_module: types.ModuleType, mitogen_local_context: dict[str, typing.Any]
) -> None:
    assert float(page_module.uptime(mitogen_local_context).split()[0]) > 0


@pytest.mark.parametrize("page_module", ["howto/many-calls.md"], indirect=True)
def test_many_calls_give_what_each_alone_would(
    page_module: types.ModuleType, far: Proxy, records: Records, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "file").write_bytes(b"content")
    paths = [str(tmp_path / "file"), str(tmp_path / "none")]

    sums = page_module.checksums(far, paths)
    assert sums == {paths[0]: hashlib.sha1(b"content").hexdigest(), paths[1]: None}
    assert ["exception" in call for call in records.calls] == [False, True]


# The log


def fields(page: pathlib.Path) -> set[str]:
    return set(column(page, "field"))


def test_the_log_page_names_each_field_of_a_record(far: Proxy, records: Records) -> None:
    far.file_exists("/")
    with pytest.raises(RemoteException):
        far.read("/nonexistent")

    succeeded, failed = records.calls
    assert {*succeeded, *failed, "prefetched"} == fields(DOCS / "log.md")
    assert {*succeeded} == {*failed} - {"exception"} | {"result"}


def test_a_record_carries_how_long_the_call_took(far: Proxy, records: Records) -> None:
    far.run("sleep", ["0.2"])
    far.run("true")

    assert all(isinstance(call["duration"], float) for call in records.calls)
    assert records.calls[0]["duration"] >= 0.2


def test_a_context_without_a_name_is_logged_by_how_it_is_reached(
    records: Records, mitogen_local_context: dict[str, typing.Any]
) -> None:
    inner = {**mitogen_local_context, "name": ""}
    with Proxy({**inner, "via": {**mitogen_local_context, "name": "far"}}) as proxy:
        proxy.file_exists("/")

    assert records.calls[0]["context_name"] == "local via far (local)"


# Tables


def variables() -> dict[str, str]:
    """Each variable of the reference, and its default."""
    found = definitions(DOCS / "reference" / "variables.md")
    firsts = {name: text.splitlines()[0] for name, text in found.items()}
    assert all(first.startswith("default: ") for first in firsts.values())
    return {name: first.removeprefix("default: ").strip("`") for name, first in firsts.items()}


def test_each_environment_variable_is_documented() -> None:
    assert sorted(variables()) == sorted(named("INMANTA_MITOGEN_"))


def test_the_readme_has_the_variables_of_the_log_with_their_defaults() -> None:
    readme = {
        row["variable"].strip("`"): row["default"].strip("`")
        for table in tables(ROOT / "README.md")
        for row in table
        if "variable" in row
    }

    assert readme == {
        settings.LOGGED_VALUE_MAX_LEN_ENV_VAR: str(settings.DEFAULT_LOGGED_VALUE_MAX_LEN),
        settings.LOGGED_TRUNCATED_VALUE_ENV_VAR: settings.DEFAULT_LOGGED_TRUNCATED_VALUE_SUFFIX,
    }


def test_the_documented_defaults_are_those_of_the_code() -> None:
    assert (
        variables()
        | {
            settings.LOGGED_VALUE_MAX_LEN_ENV_VAR: str(settings.DEFAULT_LOGGED_VALUE_MAX_LEN),
            settings.LOGGED_TRUNCATED_VALUE_ENV_VAR: settings.DEFAULT_LOGGED_TRUNCATED_VALUE_SUFFIX,
            settings.MAX_SIZE_ENV_VAR: f"{settings.DEFAULT_MAX_SIZE >> 30} GiB",
            settings.MAX_MESSAGE_SIZE_ENV_VAR: f"{settings.DEFAULT_MAX_MESSAGE_SIZE >> 20} MiB",
        }
        == variables()
    )


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
    failures = [re.findall(r"^  failed +(\w+), .*\n.*\n  advice +(.*)$", s, re.M) for s in samples]
    shown = {cause: advice for found in failures for cause, advice in found}

    assert len(shown) == 5
    advices = {**{cause.name: cause.value for cause in Cause}, "PYTHON_NOT_FOUND": PYTHON_ADVICE}
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


def test_each_page_is_in_the_table_of_contents() -> None:
    entries = re.findall(
        r"^```\{toctree\}\n(?::[^\n]*\n)*\n(.*?)^```$", (DOCS / "index.md").read_text(), re.M | re.S
    )
    names = [entry for block in entries for entry in block.split()]
    listed = {
        str(found.relative_to(DOCS))
        for name in names
        for suffix in (".md", ".rst")
        for found in DOCS.glob(name + suffix)
    }

    pages = {str(page.relative_to(DOCS)) for page in PAGES if DOCS in page.parents}
    assert pages | {"reference/model.rst"} == listed | {"index.md"}
