"""
Fixtures for all tests.
"""

import collections.abc
import concurrent.futures
import contextlib
import gc
import importlib.metadata
import os
import pathlib
import signal
import threading

import mitogen.core
import pytest

import support
from inmanta_plugins.mitogen import Proxy
from pytest_inmanta_mitogen import SshHost, SshHostFactory

# Installed, this module has it loaded already; a bare checkout has not.
pytest_plugins = ["pytest_inmanta_mitogen", "pytester"]

# pytest-inmanta installs modules from where pip is configured to, and from nowhere unless told.
os.environ.setdefault("INMANTA_PIP_USE_SYSTEM_CONFIG", "true")

# A shell has what it runs in the background ignore Ctrl-C, and Python takes that for its own wish.
signal.signal(signal.SIGINT, signal.default_int_handler)
# So do those below nohup.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def idle_sockets() -> None:
    """
    Mitogen keeps a pair of sockets for each thread that ever waited: let it make them first, so
    that a test that counts sockets finds what else is left.
    """
    together = threading.Barrier(40)

    def wait() -> None:
        together.wait()
        with contextlib.suppress(mitogen.core.TimeoutError):
            mitogen.core.Latch().get(timeout=0.5)

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        for waiter in [pool.submit(wait) for _ in range(40)]:
            waiter.result()


@pytest.fixture
def nothing_left() -> collections.abc.Iterator[None]:
    """
    Fail a test that leaves files open, threads or processes.
    """
    before = support.Snapshot()
    yield
    before.settle()


@pytest.fixture
def recorder() -> support.Recorder:
    """
    What `proxy` logs.
    """
    return support.Recorder()


@pytest.fixture
def proxy(
    idle_sockets: None, nothing_left: None, recorder: support.Recorder
) -> collections.abc.Iterator[Proxy]:
    """
    An open proxy to this machine, which has to leave nothing.
    """
    with Proxy(dict(support.LOCAL), logger=recorder) as opened:
        yield opened


@pytest.fixture
def host(mitogen_ssh_host_factory: SshHostFactory, tmp_path: pathlib.Path) -> SshHost:
    """
    An ssh server of the test's own.
    """
    # A shell that is killed while it runs the user's own profile may leave a lock in his home.
    return mitogen_ssh_host_factory(environment={"HOME": str(tmp_path)})


@pytest.fixture
def public() -> collections.abc.Iterator[pathlib.Path]:
    """
    A directory that every user may enter, unlike pytest's.
    """
    with support.public_directory() as path:
        yield path


@pytest.fixture(scope="module", autouse=True)
def no_broker_stays() -> collections.abc.Iterator[None]:
    """
    Fail the last test of a file that leaves a broker running, which would keep Python from ending.
    """
    yield
    left = [thread for thread in threading.enumerate() if thread.name == "mitogen.broker"]
    if left:
        for thing in gc.get_objects():
            if isinstance(thing, mitogen.core.Broker) and thing._thread in left:
                thing.shutdown()
    assert not left


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """
    Leave out what this inmanta-core does not have: no machine could run it.
    """
    core = int(importlib.metadata.version("inmanta-core").split(".")[0])
    later = [item for item in items if core < needed_core(item)]
    if later:
        config.hook.pytest_deselected(items=later)
        items[:] = [item for item in items if item not in later]


def needed_core(item: pytest.Item) -> int:
    """
    Return the first major version of inmanta-core that has what a test uses.
    """
    marker = item.get_closest_marker("needs_core")
    return int(marker.args[0]) if marker else 0


NO_SKIPS = "INMANTA_MITOGEN_TESTS_NO_SKIPS"
# How the reason of a skip begins that no package, right or setting of this machine could avoid.
NOT_HERE = "needs a kernel"


def fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    """
    Where the machine has all that the tests use, a skip hides a promise that was not checked.
    """
    if os.environ.get(NO_SKIPS) == "1" and report.skipped and not hasattr(report, "wasxfail"):
        # What pytest keeps of a skip: file, line and reason.
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        if reason.removeprefix("Skipped: ").startswith(NOT_HERE):
            return
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
