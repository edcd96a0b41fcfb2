"""
Counts what connections to one host cost: threads and files of the agent, processes, ssh logins.

    python tools/sharing_table.py [--peer-version 0.2.5] [--counts 1 20]

Opens that many connections through sudo to one ssh host, with this module and with the published
one, and prints both as a table. Run it as root, whom sudo asks for no password.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

from pytest_inmanta_mitogen import SshHost
from tools.faults_table import ROOT, peer_python

# Runs in either environment; what it prints are threads, files and processes.
_SUBJECT = """
import json, os, sys
from inmanta_plugins.mitogen import Proxy

context, count = json.loads(sys.argv[1]), int(sys.argv[2])

def held():
    pids, parents = {os.getpid()}, {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                parents[int(pid)] = int(stat.read().rpartition(")")[2].split()[1])
        except OSError:
            continue
    while more := {pid for pid, parent in parents.items() if parent in pids} - pids:
        pids |= more
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), len(pids) - 1

before = held()
proxies = [Proxy({**context, "remote_name": f"number-{n}"}) for n in range(count)]
for proxy in proxies:
    proxy.connect()
    assert proxy.run("id", ["-un"])[0] == "root"
print(json.dumps([now - then for now, then in zip(held(), before)]))
for proxy in proxies:
    proxy.disconnect()
"""


def measured(python: str, count: int) -> str:
    """The cells of a row."""
    with (
        tempfile.TemporaryDirectory() as home,
        SshHost(name="host", environment={"HOME": home}) as host,
    ):
        sudo = {"method_name": "sudo", "name": "", "python_path": host.python_path}
        context = {**sudo, "via": host.serialized()}
        done = subprocess.run(
            [python, "-c", _SUBJECT, json.dumps(context), str(count)],
            cwd=ROOT if python == sys.executable else home,
            stdout=subprocess.PIPE,
            check=True,
        )
        threads, files, processes = json.loads(done.stdout)
        return f"{threads} | {files} | {processes} | {host.logins()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0].strip())
    parser.add_argument("--peer-version", default="0.2.5")
    parser.add_argument("--peer", type=pathlib.Path, default=ROOT / ".venv-peer")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 20])
    arguments = parser.parse_args()
    subjects = {
        "this module": sys.executable,
        f"published {arguments.peer_version}": peer_python(arguments.peer_version, arguments.peer),
    }
    print("| module | connections | threads | files | processes of the agent | ssh logins |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, python in subjects.items():
        for count in arguments.counts:
            print(f"| {name} | {count} | {measured(python, count)} |", flush=True)


if __name__ == "__main__":
    main()
