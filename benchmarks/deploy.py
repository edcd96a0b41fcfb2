"""
Deploys many files over ssh through their handler, as an agent does. Run by pytest in a directory
that pytest-inmanta takes for a module, with what to deploy in the environment.
"""

import json
import os
import pathlib
import time

from pytest_inmanta.plugin import Project


def test_deploy(project: Project) -> None:
    job = json.loads(os.environ["BENCH_DEPLOY"])
    files = "\n".join(
        f'fs::File(host=host, path="{job["directory"]}/{number}", content="{number}")'
        for number in range(job["count"])
    )
    project.compile(
        "import mitogen\nimport fs\n"
        f'host = std::Host(name="there", os=std::linux, via={job["via"]})\n{files}'
    )
    start = time.perf_counter()
    results = project.deploy_all()
    seconds = time.perf_counter() - start
    results.assert_all()
    assert len(os.listdir(job["directory"])) == job["count"]
    pathlib.Path(job["result"]).write_text(json.dumps(seconds))
