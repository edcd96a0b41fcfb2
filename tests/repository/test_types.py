"""
A type checker knows, for those who build on this module, what each method gives and takes.
"""

import pathlib
import re
import shutil
import sys

import installed
import pytest

import support
from inmanta_plugins.mitogen import Proxy

HANDLER = pathlib.Path(__file__).with_name("typed_handler.py")


# Everything of inmanta is analysed, on a machine that may be busy.
@pytest.mark.timeout(600)
def test_results_have_their_types_and_mistakes_are_found(tmp_path: pathlib.Path) -> None:
    python = installed.environment(tmp_path)
    # Away from the sources: what is installed has to say it.
    shutil.copy(HANDLER, tmp_path)
    command = (sys.executable, "-m", "mypy", "--strict", "--python-executable", python)
    done = support.execute(*command, HANDLER.name, cwd=tmp_path)
    assert "Success" in done.stdout, done.stdout + done.stderr


# Methods that handlers have no use for.
OF_THE_MODULE = {"after_fork_in_child", "begin_resource", "end_resource"}


def test_each_method_of_a_proxy_is_among_them() -> None:
    methods = {
        name
        for name, value in vars(Proxy).items()
        if not name.startswith("_") and callable(value) and name not in OF_THE_MODULE
    }

    assert methods == set(re.findall(r"proxy\.(\w+)\((?!.*\[attr-defined\])", HANDLER.read_text()))
