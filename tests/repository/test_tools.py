"""
The tools of this folder tell the truth about the tests.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

SUITE = pathlib.Path(__file__).resolve().parents[1]
TESTS = """
import pytest

def test_passes():
    pass

def test_is_skipped():
    pytest.skip("no such program")

@pytest.mark.xfail(reason="not yet")
def test_is_expected_to_fail():
    assert False

@pytest.mark.needs_core(1)
def test_of_an_old_core():
    pass

@pytest.mark.needs_core(999)
def test_of_a_future_core():
    assert False
"""


@pytest.fixture
def suite(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """
    A folder of tests that are run as those of this project are.
    """
    shutil.copy(SUITE / "conftest.py", tmp_path)
    shutil.copy(SUITE.parent / "pyproject.toml", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(TESTS)
    monkeypatch.setenv("PYTHONPATH", f"{SUITE.parent}{os.pathsep}{SUITE}")
    return tmp_path


def pytest_prints(suite: pathlib.Path, monkeypatch: pytest.MonkeyPatch, no_skips: str) -> str:
    monkeypatch.setenv("INMANTA_MITOGEN_TESTS_NO_SKIPS", no_skips)
    command = [sys.executable, "-m", "pytest", "--junit-xml=report.xml"]
    done = subprocess.run(command, cwd=suite, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def test_a_skip_is_a_skip_unless_told_otherwise(
    suite: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "2 passed, 1 skipped, 1 deselected, 1 xfailed" in pytest_prints(suite, monkeypatch, "")


def test_a_skip_is_a_failure_that_says_why_where_nothing_may_be_skipped(
    suite: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = pytest_prints(suite, monkeypatch, "1")

    assert "1 failed, 2 passed, 1 deselected, 1 xfailed" in printed
    assert "no such program" in printed


def test_a_skip_for_want_of_a_kernel_remains_a_skip(
    suite: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = "import pytest\ndef test_it():\n    pytest.skip('needs a kernel with quotas: EINVAL')\n"
    (suite / "tests" / "test_it.py").write_text(test)

    assert "1 skipped" in pytest_prints(suite, monkeypatch, "1")


def test_a_file_that_is_skipped_is_a_failure_where_nothing_may_be_skipped(
    suite: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skipping = "import pytest\npytest.importorskip('no_such_module')\n"
    (suite / "tests" / "test_other.py").write_text(skipping)
    monkeypatch.setenv("INMANTA_MITOGEN_TESTS_NO_SKIPS", "1")
    command = [sys.executable, "-m", "pytest", "tests/test_other.py"]

    done = subprocess.run(command, cwd=suite, capture_output=True, text=True, check=False)

    assert done.returncode != 0
    assert "no_such_module" in done.stdout
