"""The directive ``inmanta-model``: the reference of a module's model, from its docstrings."""

import contextlib
import io
import warnings
from typing import Any, ClassVar

from docutils import nodes
from docutils.statemachine import StringList
from inmanta.ast import TypeDeprecationWarning
from inmanta.ast.entity import Entity
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinxcontrib.inmanta.api import DocModule

# The entities that most models use come first, the others by name.
FIRST = ("Local", "Ssh", "Sudo", "Su")


def place(entity: str) -> tuple[int, str]:
    name = entity.rpartition("::")[2]
    return (FIRST.index(name) if name in FIRST else len(FIRST), name)


class Model(DocModule):  # type: ignore[misc]  # inmanta-sphinx is not typed
    """What inmanta-sphinx writes about a module, the entities first, each under a heading."""

    def doc_compile(self, *args: Any) -> list[str]:
        self.entities: dict[str, list[str]] = {}
        others: list[str] = super().doc_compile(*args)
        heading = self.emit_heading("Entities", "-")
        begin = others.index("Entities")
        del others[begin : begin + len(heading)]
        entities = [
            line for name in sorted(self.entities, key=place) for line in self.entities[name]
        ]
        return [*heading, *entities, *others]

    def emit_intro(self, module: object) -> list[str]:
        return []

    def emit_entity(self, entity: Entity) -> list[str]:
        name = entity.get_full_name()
        lines: list[str] = super().emit_entity(entity)
        self.entities[name] = [*self.emit_heading(name, "~"), *lines]
        return []

    def emit_attributes(self, entity: Entity, attributes: dict[str, str]) -> list[str]:
        known = {"method_name": "The connection method, as mitogen calls it.", **attributes}
        lines: list[str] = super().emit_attributes(entity, known)
        # From here on it is about implementations, of which there are none.
        ends = [number for number, line in enumerate(lines) if "implements statements" in line]
        return lines[: ends[0]] if ends else lines


class InmantaModel(SphinxDirective):
    """
    Takes the name of a module that is installed where the documentation is built.
    """

    required_arguments: ClassVar[int] = 1

    def run(self) -> list[nodes.Node]:
        (module,) = self.arguments
        # It tells what it does, and the compiler what it thinks of the type number.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", TypeDeprecationWarning)
            lines = Model().run(None, module, []).splitlines()
        return self.parse_text_to_nodes(
            StringList(lines, source=f"the model of {module}"), allow_section_headings=True
        )


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("inmanta-model", InmantaModel)
    return {"parallel_read_safe": True}
