"""
Fixtures for all tests.
"""

import collections.abc
import os

import pytest

# Installed, this module has it loaded already; a bare checkout has not.
pytest_plugins = ["pytest_inmanta_mitogen"]

# pytest-inmanta installs modules from where pip is configured to, and from nowhere unless told.
os.environ.setdefault("INMANTA_PIP_USE_SYSTEM_CONFIG", "true")

NO_SKIPS = "INMANTA_MITOGEN_TESTS_NO_SKIPS"


def fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    """
    Where the machine has all that the tests use, a skip hides a promise that was not checked.
    """
    if os.environ.get(NO_SKIPS) == "1" and report.skipped and not hasattr(report, "wasxfail"):
        # What pytest keeps of a skip: file, line and reason.
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: {reason}, and {NO_SKIPS} is set"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> collections.abc.Generator[None, object, object]:
    report = yield
    assert isinstance(report, pytest.TestReport)
    fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> collections.abc.Generator[None, object, object]:
    report = yield
    assert isinstance(report, pytest.CollectReport)
    fail_if_skipped(report)
    return report
