"""
Functions beside a handler run on hosts from agents too, which have the code of modules in inmanta's
own layout and through inmanta's own loader.
"""

import pathlib
import sys

import installed
import pytest

HANDLER = """
import inmanta.agent.handler

from inmanta_plugins.probe import on_host


def in_the_package() -> int:
    return 1
"""

ON_HOST = """
# -*- coding: latin-1 -*-
import os
import inmanta_plugins.probe.more

NAME = "caf\xe9"


def here():
    return os.getpid(), NAME, inmanta_plugins.probe.more.double(21)
"""

MORE = """
def double(number):
    return 2 * number
"""

PROGRAM = """
import os, sys

from inmanta.loader import PluginModuleFinder

PluginModuleFinder.configure_module_finder([sys.argv[1]], prefer=True)
import inmanta_plugins.probe
from inmanta_plugins.mitogen import Proxy

context = {"method_name": "local", "python_path": [sys.executable, "-I"]}
with Proxy(context) as proxy:
    if sys.argv[2] == "beside":
        pid, name, number = proxy.remote_call(inmanta_plugins.probe.on_host.here)
        print(pid != os.getpid(), ascii(name), number)
    else:
        print(proxy.remote_call(inmanta_plugins.probe.in_the_package))
"""


@pytest.fixture
def code(tmp_path: pathlib.Path) -> pathlib.Path:
    """
    The directory of an agent that got a module's code: each file of it is a package.
    """
    for name, source in (("", HANDLER), ("on_host", ON_HOST), ("more", MORE)):
        package = tmp_path / "code" / "probe" / "plugins" / name
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text(source.lstrip(), encoding="latin-1")
    return tmp_path / "code"


def run(code: pathlib.Path, what: str) -> str:
    done = installed.run(
        sys.executable,
        "-c",
        PROGRAM,
        code,
        what,
        cwd=installed.ROOT,
        PYTHONPATH=str(installed.ROOT),
    )
    return done.stdout


def test_a_function_in_a_file_beside_the_handler_runs_on_the_host(code: pathlib.Path) -> None:
    assert run(code, "beside") == "True 'caf\\xe9' 42\n"


def test_a_function_in_the_package_itself_runs_where_there_is_inmanta(code: pathlib.Path) -> None:
    assert run(code, "package") == "1\n"
