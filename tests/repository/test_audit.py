"""What the dependency audit of ``make check`` tells, and when it fails."""

import json

import pytest

from tools import audit

VULNERABLE = {
    "name": "old",
    "version": "1.0",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}],
}
GOOD = {"name": "good", "version": "2.0", "vulns": []}
UNKNOWN = {"name": "mine", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("packages", "status", "told"),
    [
        ([GOOD], 0, "1 packages looked up, 0 findings"),
        ([GOOD, VULNERABLE], 1, "old 1.0: PYSEC-1 (fixed in 1.1)"),
        ([UNKNOWN], 0, "0 packages looked up, 0 findings; 1 not looked up"),
    ],
)
def test_the_audit_fails_for_a_vulnerability_alone(
    packages: list[object], status: int, told: str
) -> None:
    outcome = audit.report(json.dumps({"dependencies": packages}), "")
    assert outcome[0] == status
    assert told in outcome[1]


def test_the_audit_says_so_when_it_could_not_be_done() -> None:
    assert audit.report("", "ERROR: could not connect to pypi.org") == (
        0,
        "dependency audit: not done, the index could not be asked"
        " (ERROR: could not connect to pypi.org)",
    )
