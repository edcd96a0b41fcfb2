"""
The environments of those that are compared, below .venv-bench. That of this module, which also runs
the benchmarks, is made by tools/make_env.sh.
"""

import hashlib
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(".venv-bench")
OTHERS = {
    "published": ["inmanta-module-mitogen==0.2.5", "-r", "benchmarks/requirements.txt"],
    "others": ["execnet>=2,<3", "asyncssh>=2,<3"],
}


def python_of(name: str) -> str:
    return str((ROOT / name / "bin" / "python").absolute())


def pythons() -> dict[str, str]:
    return {name: python_of(name) for name in ("ours", *OTHERS)}


def make() -> None:
    """Make what is not there or not as stated here."""
    requirements = pathlib.Path("benchmarks/requirements.txt").read_text()
    for name, arguments in OTHERS.items():
        stated = f"{sys.version} {arguments} {requirements}"
        stamp = hashlib.sha256(stated.encode()).hexdigest()
        directory = ROOT / name
        mark = directory / ".stamp"
        if mark.exists() and mark.read_text() == stamp:
            continue
        print(f"Making {directory}", file=sys.stderr)
        shutil.rmtree(directory, ignore_errors=True)
        base = str(pathlib.Path(sys.base_prefix) / "bin" / "python3")
        subprocess.run([base, "-m", "venv", str(directory)], check=True)
        pip = [python_of(name), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*pip, *arguments], check=True)
        mark.write_text(stamp)
