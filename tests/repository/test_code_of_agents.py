"""
Functions beside a handler run on hosts from agents too, which have the code of modules in inmanta's
own layout and through inmanta's own loader.
"""

import pathlib
import sys

import installed

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
    pid, name, number = proxy.remote_call(inmanta_plugins.probe.on_host.here)
    print(pid != os.getpid(), ascii(name), number)
    print(proxy.remote_call(inmanta_plugins.probe.in_the_package))
"""


def test_functions_beside_a_handler_and_in_its_package_run_where_there_is_inmanta(
    tmp_path: pathlib.Path,
) -> None:
    # An agent that got a module's code: each file of it is a package.
    for name, source in (("", HANDLER), ("on_host", ON_HOST), ("more", MORE)):
        package = tmp_path / "probe" / "plugins" / name
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text(source.lstrip(), encoding="latin-1")
    command = (sys.executable, "-c", PROGRAM, tmp_path)

    printed = installed.run(*command, cwd=installed.ROOT, PYTHONPATH=str(installed.ROOT))

    assert printed.splitlines() == ["True 'caf\\xe9' 42", "1"]
