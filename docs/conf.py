"""The guide, as Sphinx builds it: `make docs`."""

import configparser
import datetime
import os
import pathlib
import sys

DOCS = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS / "_ext"))

_setup = configparser.ConfigParser()
_setup.read(DOCS.parent / "setup.cfg")

project = _setup["metadata"]["name"]
release = version = _setup["metadata"]["version"]
author = _setup["metadata"]["author"]
copyright = f"{datetime.date.today().year}, {author}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    "sphinxcontrib.inmanta.dsl",
    "inmanta_model",
    "public_names",
]
exclude_patterns = ["_build", "tutorial", "requirements.txt"]
nitpicky = True
# What other projects define is named, and can't be linked to without a network.
nitpick_ignore_regex = [
    (r"inmanta:.*", r"std::.*"),
    (r"py:.*", r"(?!(inmanta_plugins\.mitogen|inmanta_mitogen|pytest_inmanta_mitogen)\b).*"),
    # Type variables.
    (r"py:.*", r"inmanta_plugins\.mitogen\.\w+\.[A-Z]{1,2}"),
]

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["guide.css"]
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "monokai"

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True

# On a machine without a network only the links between pages are checked; CI checks all.
linkcheck_ignore = [] if "CI" in os.environ else [r"https?://.*"]
