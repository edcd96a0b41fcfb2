"""
An ssh server for machines without OpenSSH's: it lets one key in and runs commands as the current
user.

Usage: ``python -m demo.ssh_server DIRECTORY``. It reads ``host_key`` and ``identity.pub`` there
and, once it is up, writes its address, port and user to ``address``.
"""

import asyncio
import os
import pathlib
import pwd
import signal
import sys

import asyncssh

_ADDRESS = "127.0.0.1"


async def _run_command(process: asyncssh.SSHServerProcess[bytes]) -> None:
    connection = process.channel.get_connection()
    client = connection.get_extra_info("peername")[:2]
    server = connection.get_extra_info("sockname")[:2]
    command = await asyncio.create_subprocess_exec(
        "/bin/sh",
        "-c",
        process.command or "exit 1",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={
            **os.environ,
            "SSH_CONNECTION": " ".join(map(str, (*client, *server))),
        },
        start_new_session=True,
    )
    await process.redirect(stdin=command.stdin, stdout=command.stdout, stderr=command.stderr)
    try:
        process.exit(await command.wait())
        await process.wait_closed()
    except asyncio.CancelledError:
        if command.returncode is None:
            os.killpg(command.pid, signal.SIGHUP)
        raise


async def _serve(directory: pathlib.Path) -> None:
    server = await asyncssh.create_server(
        asyncssh.SSHServer,
        _ADDRESS,
        0,
        server_host_keys=[str(directory / "host_key")],
        authorized_client_keys=str(directory / "identity.pub"),
        process_factory=_run_command,
        encoding=None,
    )
    user = pwd.getpwuid(os.geteuid()).pw_name
    ready = directory / "address.new"
    ready.write_text(f"{_ADDRESS} {server.get_port()} {user}\n")
    ready.rename(directory / "address")
    await server.wait_closed()


if __name__ == "__main__":
    asyncio.run(_serve(pathlib.Path(sys.argv[1])))
