"""
The tools of this folder tell the truth about the tests.
"""

import os
import pathlib

import pytest

SUITE = pathlib.Path(__file__).resolve().parents[1]
TESTS = """
import pytest

def test_passes():
    pass

def test_is_skipped():
    pytest.skip("no such program")

def test_is_skipped_for_want_of_a_kernel():
    pytest.skip("needs a kernel with quotas: EINVAL")

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


@pytest.mark.parametrize(
    ("no_skips", "outcome"),
    [
        ("", "2 passed, 3 skipped, 1 deselected, 1 xfailed"),
        ("1", "1 failed, 2 passed, 1 skipped, 1 deselected, 1 xfailed, 1 error"),
    ],
)
def test_a_skip_is_a_failure_that_says_why_where_nothing_may_be_skipped(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, no_skips: str, outcome: str
) -> None:
    pytester.makeconftest((SUITE / "conftest.py").read_text())
    pytester.makepyprojecttoml((SUITE.parent / "pyproject.toml").read_text())
    skipped = "import pytest\npytest.importorskip('no_such_module')\n"
    pytester.makepyfile(test_it=TESTS, test_other=skipped)
    monkeypatch.setenv("PYTHONPATH", f"{SUITE.parent}{os.pathsep}{SUITE}")
    monkeypatch.setenv("INMANTA_MITOGEN_TESTS_NO_SKIPS", no_skips)

    done = pytester.runpytest_subprocess("--continue-on-collection-errors", ".")

    printed = done.stdout.str()
    assert outcome in printed
    assert bool(done.ret) == bool(no_skips)
    assert "no such program" in printed
    assert "no_such_module" in printed
