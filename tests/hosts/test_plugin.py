"""
The pytest plugin for authors: what its fixtures give, and that they leave nothing behind.
"""

import getpass
import os
import pathlib
import sys

import pytest

import pytest_inmanta_mitogen
import support
from inmanta_plugins.mitogen import Proxy
from pytest_inmanta_mitogen import SshHost

ROOT = pathlib.Path(pytest_inmanta_mitogen.__file__).parents[1]

pytestmark = [pytest.mark.timeout(60), support.requires("sshd", "ssh", "ssh-keygen")]


def test_a_restarted_host_has_no_sessions_and_the_same_address(host: SshHost) -> None:
    address = (host.hostname, host.port, host.known_hosts_line)
    assert host.logins() == 0
    with Proxy(host.serialized()) as proxy:
        interpreter = proxy.remote_call(os.getpid)
        assert interpreter in host.session_pids()
        host.restart()
        assert support.is_gone(interpreter)
        proxy.disconnect(best_effort=True)
    assert (host.hostname, host.port, host.known_hosts_line) == address
    with Proxy(host.serialized()) as proxy:
        assert proxy.run("id", ["-un"])[0] == getpass.getuser()
    assert host.logins() == 2


def test_a_frozen_host_goes_on_when_thawed(host: SshHost) -> None:
    with Proxy(host.serialized()) as proxy:
        interpreter = proxy.remote_call(os.getpid)
        host.freeze()
        assert support.is_stopped(interpreter)
        host.thaw()
        assert proxy.remote_call(os.getpid) == interpreter


def test_a_session_that_detached_itself_dies_with_the_others(host: SshHost) -> None:
    with Proxy(host.serialized()) as proxy:
        script = "setsid sleep 1000 >/dev/null 2>&1 & echo $!"
        detached = int(proxy.run("sh", ["-c", script])[0])
        assert not support.is_gone(detached)
        host.kill_sessions()
        assert support.is_gone(detached)
        proxy.disconnect(best_effort=True)
    with Proxy(host.serialized()) as proxy:
        proxy.run("true")


def test_nothing_is_left_of_a_host_that_ran_or_could_not_start() -> None:
    before = support.Snapshot()
    with SshHost() as host, Proxy(host.serialized()) as proxy:
        proxy.run("true")
        directory = host.directory
    assert not directory.exists()
    with pytest.raises(RuntimeError, match="NoSuchSetting"), SshHost(config=["NoSuchSetting yes"]):
        pass
    before.settle()


def test_options_are_added_replaced_and_left_out(host: SshHost) -> None:
    context = host.serialized(port=1, identity_file=None, compression=False)
    assert (context["port"], context["compression"]) == (1, False)
    assert "identity_file" not in context
    assert host.model(port=None, ssh_args=None, name='a "b"').startswith(
        f'mitogen::Ssh(name="a \\"b\\"", hostname="{host.hostname}", username="{host.username}", '
    )


ADAPTERS_TESTS = """
def test_with_the_ssh_host(mitogen_ssh_host):
    from inmanta_plugins.mitogen import Proxy
    with Proxy(mitogen_ssh_host.serialized()) as proxy:
        assert proxy.run("echo", ["over ssh"]) == ("over ssh", "", 0)

def test_with_the_local_context(mitogen_local_context):
    from inmanta_plugins.mitogen import Proxy
    with Proxy(mitogen_local_context) as proxy:
        assert proxy.run("echo", ["here"]) == ("here", "", 0)
"""


@pytest.fixture
def adapter(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """
    The test-suite of an adapter module.
    """
    pytester.makepyfile(ADAPTERS_TESTS)
    pytester.makeini("[pytest]\naddopts = -p pytest_inmanta_mitogen -rs")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # The other plugins take seconds to load.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return pytester


def test_an_adapters_test_suite_gets_the_fixtures(adapter: pytest.Pytester) -> None:
    adapter.runpytest_subprocess().assert_outcomes(passed=2)


def test_an_adapters_test_suite_says_what_it_lacks(
    adapter: pytest.Pytester, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All that a Python may need, but ssh.
    (tmp_path / "sh").symlink_to("/bin/sh")
    (tmp_path / "echo").symlink_to("/bin/echo")
    monkeypatch.setenv("PATH", str(tmp_path))
    done = adapter.runpytest_subprocess("-k", "ssh")
    done.assert_outcomes(skipped=1, deselected=1)
    assert "needs OpenSSH" in done.stdout.str()


def test_the_plugin_loads_without_inmanta_and_mitogen() -> None:
    code = (
        "import sys, pytest_inmanta_mitogen;"
        "sys.exit(bool({'inmanta', 'inmanta_plugins', 'mitogen'} & set(sys.modules)))"
    )
    support.execute(sys.executable, "-c", code, cwd=ROOT, check=True)


AS_ANOTHER_USER = """
import subprocess, sshd
with sshd.SshHost() as host:
    command = ["ssh", "-F", "/dev/null", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no"]
    command += ["-o", "UserKnownHostsFile=/dev/null", "-i", host.identity_file]
    command += ["-p", str(host.port), "-l", host.username, host.hostname, "id", "-un"]
    print(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    print("logins:", host.logins())
"""


def test_an_ordinary_user_can_start_a_host(user: support.User, python: str) -> None:
    # He may not be able to read the checkout, or the environment that runs this test.
    source = pathlib.Path(pytest_inmanta_mitogen.__file__).with_name("sshd.py")
    user.write("sshd.py", source.read_text())
    user.write("run.py", AS_ANOTHER_USER)
    command = ("runuser", "-u", user.name, "--", python, user.home / "run.py")
    done = support.execute(*command, cwd=user.home)
    assert done.stdout.split() == [user.name, "logins:", "1"], done.stderr
