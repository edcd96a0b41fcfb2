"""
Look the installed packages up among the known vulnerabilities.

Fails when one of them has a known vulnerability. Where the index can't be reached, or has no such
information (a mirror), nothing is known: that is said, and is no failure.
"""

import json
import subprocess
import sys

# What this project decides about: what a user of it gets, and what is built on it here.
_COMMAND = [
    *(sys.executable, "-m", "pip_audit", "--skip-editable", "--progress-spinner", "off"),
    *("--format", "json", "--timeout", "15"),
]


def report(text: str, errors: str) -> tuple[int, str]:
    """
    Return the exit status, and what to tell.

    :param text: What pip-audit wrote to stdout.
    :param errors: What it wrote to stderr.
    """
    try:
        packages = json.loads(text)["dependencies"]
    except (ValueError, LookupError, TypeError):
        last = (errors.strip().splitlines() or ["no word from pip-audit"])[-1]
        return 0, f"dependency audit: not done, the index could not be asked ({last[:200]})"
    bad = [
        f"{package['name']} {package['version']}: {found['id']}"
        f" (fixed in {', '.join(found['fix_versions']) or 'no version'})"
        for package in packages
        for found in package.get("vulns", ())
    ]
    unknown = sum("skip_reason" in package for package in packages)
    told = f"dependency audit: {len(packages) - unknown} packages looked up, {len(bad)} findings"
    if unknown:
        told += f"; {unknown} not looked up: the index knows nothing of them"
    return (1 if bad else 0), "\n".join([told, *bad])


def main() -> int:
    try:
        done = subprocess.run(_COMMAND, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        print("dependency audit: not done, the index did not answer in time")
        return 0
    status, told = report(done.stdout, done.stderr)
    print(told)
    return status


if __name__ == "__main__":
    sys.exit(main())
