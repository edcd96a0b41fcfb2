"""
A type checker knows, for those who build on this module, what each method gives and takes.
"""

import collections.abc
import re
import subprocess
import sys

import installed
import pytest

from inmanta_plugins.mitogen import Proxy

# Everything of inmanta is analysed, on a machine that may be busy.
pytestmark = pytest.mark.timeout(600)

PREAMBLE = """
import os
import platform
import socket

from inmanta_plugins.mitogen import ConnectError, PythonNotFoundError, Proxy, RemoteException
from inmanta_plugins.mitogen.abc import HandlerABC, ResourceABC


class Thing(ResourceABC):
    fields = ("size", "names")
    size: int
    names: list[str]


def count(path: str, *, deep: bool = False) -> int:
    return len(path)


class ThingHandler(HandlerABC[Thing]):
    def all_that_is_asked(self, proxy: Proxy, resource: Thing, error: ConnectError) -> None:
"""

#: What an expression is, as mypy reveals it.
REVEALED = {
    "self.proxy": "inmanta_plugins.mitogen.proxy.Proxy",
    "resource.via": "dict[str, object]",
    "resource.names": "list[str]",
    "proxy.chmod('/etc', '755')": "None",
    "proxy.chown('/etc', 'root', 0)": "None",
    "proxy.file_exists('/etc')": "bool",
    "proxy.file_stat('/etc')['permissions']": "int",
    "proxy.file_stat('/etc')['owner']": "str",
    "proxy.get_file('/etc/passwd', '/tmp/passwd')": "None",
    "proxy.hash_file('/etc/passwd')": "str",
    "proxy.is_symlink('/etc')": "bool",
    "proxy.mkdir('/etc/a')": "None",
    "proxy.put('/etc/a', b'')": "None",
    "proxy.put_file('/tmp/passwd', '/etc/passwd', progress=lambda done, total: None)": "None",
    "proxy.read('/etc/passwd')": "str",
    "proxy.read_binary('/etc/passwd')": "bytes",
    "proxy.readlink('/etc/a')": "str",
    "proxy.remove('/etc/a')": "None",
    "proxy.rmdir('/etc/a')": "None",
    "proxy.run('ls', ['-l'], timeout=5)": "tuple[str, str, int]",
    "proxy.symlink('/etc/a', '/etc/b')": "None",
    "proxy.connect(exists_ok=True)": "Any",  # mitogen has no types
    "proxy.disconnect(timeout=1.0)": "None",
    "proxy.remote_call(count, '/etc', deep=True)": "int",
    "proxy.remote_call(socket.gethostname)": "str",
    "proxy.remote_call(os.getloadavg)": "tuple[float, float, float]",
    "proxy.submit(count, '/etc')": "concurrent.futures._base.Future[int]",
    "proxy.submit(platform.node).result()": "str",
    "error.cause": "inmanta_plugins.mitogen.errors.Cause",
    "error.user": "str | None",
    "RemoteException(error).remote_type": "str | None",
    "PythonNotFoundError({}).found": "str",
}

#: The error that mypy finds in an expression, by its code.
WRONG = {
    "proxy.put('/etc/a', 'text')": "arg-type",
    "proxy.read()": "call-arg",
    "proxy.run('ls', '-l')": "arg-type",
    "proxy.remote_call(count)": "call-arg",
    "proxy.remote_call(count, 5)": "arg-type",
    "proxy.remote_call(count, '/etc', depth=1)": "call-arg",
    "proxy.remote_call(count, '/etc').upper()": "attr-defined",
    "proxy.submit(count, b'/etc')": "arg-type",
    "proxy.submit(count, '/etc') + 1": "operator",
    "proxy.no_such_method()": "attr-defined",
    "resource.length": "attr-defined",
}


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory,
) -> collections.abc.Mapping[str, str]:
    """
    What mypy has to say about each of the expressions, in a file of those who have this installed.
    """
    directory = tmp_path_factory.mktemp("types")
    python = installed.environment(directory)
    expressions = [f"reveal_type({each})" for each in REVEALED] + list(WRONG)
    lines = PREAMBLE.splitlines() + [f"        {each}" for each in expressions]
    (directory / "handler.py").write_text("\n".join(lines) + "\n")
    command = (sys.executable, "-m", "mypy", "--strict", "--python-executable", python)
    mypy = subprocess.run(
        [*command, "--no-pretty", "handler.py"], cwd=directory, capture_output=True, text=True
    )

    said: dict[str, str] = {}
    for number, text in re.findall(r"^handler\.py:(\d+): (.*)$", mypy.stdout, re.M):
        line = lines[int(number) - 1].strip()
        said[line] = said[line] + "\n" + text if line in said else text
    assert said, mypy.stdout
    return said


@pytest.mark.parametrize("expression", REVEALED)
def test_a_result_has_its_type(found: collections.abc.Mapping[str, str], expression: str) -> None:
    said = found[f"reveal_type({expression})"]

    # Older versions of mypy write the builtins out, and Union.
    plain = said.replace("builtins.", "").replace("Union[str, None]", "str | None")
    assert plain == f'note: Revealed type is "{REVEALED[expression]}"'


@pytest.mark.parametrize("expression", WRONG)
def test_a_mistake_is_found(found: collections.abc.Mapping[str, str], expression: str) -> None:
    assert f"[{WRONG[expression]}]" in found.get(expression, "nothing")


def test_nothing_else_is_wrong_with_such_a_handler(
    found: collections.abc.Mapping[str, str],
) -> None:
    expected = {*WRONG, *(f"reveal_type({each})" for each in REVEALED)}

    assert found.keys() <= expected


# Methods that handlers have no use for.
OF_THE_MODULE = {"after_fork_in_child", "begin_resource", "end_resource"}


def test_each_method_of_a_proxy_is_among_them() -> None:
    methods = {
        name
        for name, value in vars(Proxy).items()
        if not name.startswith("_") and callable(value) and name not in OF_THE_MODULE
    }

    assert methods == {name for each in REVEALED for name in re.findall(r"proxy\.(\w+)\(", each)}
