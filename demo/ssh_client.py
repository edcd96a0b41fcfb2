"""
The part of OpenSSH's ``ssh`` that a connection needs, for machines that do not have it.

It takes the options that it knows how to follow and passes over the others. The key of the
environment variable ``DEMO_SSH_KEY`` is what it has in place of an agent.
"""

import asyncio
import dataclasses
import os
import sys
import typing

import asyncssh

# Those with a value of their own.
_WITH_VALUE = "BbcDEeFIiJLlmOopQRSWw"

_CHUNK = 1 << 18


@dataclasses.dataclass
class Arguments:
    """
    What a command line asks for.
    """

    hostname: str = ""
    command: str = ""
    username: str | None = None
    port: int = 22
    key: str | None = None
    #: The values of ``-o``, by their names in lower case.
    options: dict[str, str] = dataclasses.field(default_factory=dict)


def parse(arguments: list[str]) -> Arguments:
    """
    :param arguments: A command line of ssh, without the program's name.
    :raises ValueError: When it names no host or no command.
    """
    found = Arguments()
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        flag = rest.pop(0)
        if flag[1] not in _WITH_VALUE:
            continue
        value = flag[2:] or rest.pop(0)
        if flag[1] == "l":
            found.username = value
        elif flag[1] == "p":
            found.port = int(value)
        elif flag[1] == "i":
            found.key = value
        elif flag[1] == "o":
            name, _, text = value.replace("=", " ", 1).partition(" ")
            # As with OpenSSH, the first one counts.
            found.options.setdefault(name.lower(), text.strip())
    if len(rest) < 2:
        raise ValueError("usage: ssh [OPTION...] HOST COMMAND...")
    user, at, found.hostname = rest[0].rpartition("@")
    if at:
        found.username = user
    found.command = " ".join(rest[1:])
    return found


async def _run(arguments: Arguments) -> int:
    known_hosts: str | None = None
    if arguments.options.get("stricthostkeychecking", "ask") not in ("no", "off"):
        known_hosts = arguments.options.get("userknownhostsfile", "~/.ssh/known_hosts")
        known_hosts = os.path.expanduser(known_hosts)
    async with asyncssh.connect(
        arguments.hostname,
        arguments.port,
        username=arguments.username or (),
        client_keys=[arguments.key or os.environ["DEMO_SSH_KEY"]],
        known_hosts=known_hosts,
        agent_path=None,
        config=None,
    ) as connection:
        process = await connection.create_process(arguments.command, encoding=None)
        sending = asyncio.create_task(_send(process))
        await asyncio.gather(_receive(process.stdout, 1), _receive(process.stderr, 2))
        status = (await process.wait()).exit_status
        sending.cancel()
        return 255 if status is None else status


# Threads wait for the standard streams, not the event loop: with one socket for input and output,
# as mitogen has it, asyncio takes the coming of input for the end of the output.


async def _send(process: asyncssh.SSHClientProcess[bytes]) -> None:
    while data := await asyncio.to_thread(os.read, 0, _CHUNK):
        process.stdin.write(data)
        await process.stdin.drain()
    process.stdin.write_eof()


async def _receive(source: asyncssh.SSHReader[bytes], descriptor: int) -> None:
    while data := await source.read(_CHUNK):
        while data:
            data = data[await asyncio.to_thread(os.write, descriptor, data) :]


async def _main() -> typing.NoReturn:
    """
    Ends the process, with the exit status of the command, or 255 when the connection failed.
    """
    try:
        status = await _run(parse(sys.argv[1:]))
    except (OSError, ValueError, asyncssh.Error) as error:
        print(f"ssh: {error}", file=sys.stderr, flush=True)
        status = 255
    # Not the ordinary way, which would wait for the thread that waits for input.
    os._exit(status)


if __name__ == "__main__":
    asyncio.run(_main())
