"""Links names of our own to where they are public, whatever file they are defined in."""

from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

PUBLIC = ("inmanta_plugins.mitogen", "inmanta_mitogen", "pytest_inmanta_mitogen")


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: nodes.TextElement
) -> nodes.reference | None:
    """
    :return: A link for ``inmanta_plugins.mitogen.errors.Cause`` to the public
        ``inmanta_plugins.mitogen.Cause``; None for what has no public name.
    """
    package = next((name for name in PUBLIC if node["reftarget"].startswith(f"{name}.")), None)
    if node["refdomain"] != "py" or package is None:
        return None
    name = node["reftarget"].rpartition(".")[2]
    return env.domains.python_domain.resolve_xref(
        env, node["refdoc"], app.builder, "obj", f"{package}.{name}", node, shown
    )


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True}
