"""Lets ``pip install .`` carry all that ``inmanta module build`` puts into a wheel.

All metadata is in setup.cfg.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = Path("inmanta_plugins") / "mitogen"


class BuildInmantaModule(build_py):
    """Puts the model and setup.cfg inside the package, where inmanta looks for them."""

    def run(self) -> None:
        # inmanta finds both in the folder that an editable install points to.
        if self.editable_mode:
            super().run()
            return
        # What a former build left there may be no more among the sources.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        target = Path(self.build_lib) / PACKAGE
        for name, source in self._data().items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target / name)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        target = Path(self.build_lib) / PACKAGE
        return super().get_outputs(include_bytecode) + [str(target / name) for name in self._data()]

    @staticmethod
    def _data() -> dict[str, Path]:
        """Return the files to add: path below the package to path of the source.

        ``inmanta module build`` has moved the model into the package before it gets here.
        """
        data = {str(path.relative_to(ROOT)): path for path in ROOT.glob("model/**/*.cf")}
        return {**data, "setup.cfg": ROOT / "setup.cfg"}


setup(cmdclass={"build_py": BuildInmantaModule})
