"""
Executables that stand in for the command-line programs of container managers.
"""

import dataclasses
import json
import pathlib
import shlex
import sys

from hosts import commands


@dataclasses.dataclass(frozen=True)
class StandIns:
    """
    The stand-ins of all programs of the module ``commands``. They know one container, "box", one
    pod of that name, in the namespace "prod", and one image, "debian".
    """

    directory: pathlib.Path
    """Where their executables are."""

    def install(self, leader: int) -> None:
        """
        Write the executables.

        :param leader: The process id that they tell for the container's first process.
        """
        state = self.directory / "state.json"
        containers = {"box": leader, "prod/box": leader}
        state.write_text(json.dumps({"containers": containers, "images": ["debian"]}))
        for program in commands.PROGRAMS:
            script = [sys.executable, "-I", "-S", commands.__file__, program, str(state)]
            executable = self.directory / program
            executable.write_text(f'#!/bin/sh\nexec {shlex.join(script)} "$@"\n')
            executable.chmod(0o755)

    def path(self, program: str) -> str:
        """Return the absolute path of a program's stand-in."""
        return str(self.directory / program)
