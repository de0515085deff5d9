"""How `make docs` builds these pages: Markdown by MyST, in Furo's clothes, with nothing from another host."""

import re
import sys
from importlib.metadata import version as version_of
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import reference  # noqa: E402  # beside this file

project = "Relight"
version = release = version_of("relight")
copyright = "the Relight authors"
extensions = ["myst_parser", "sphinx.ext.autodoc"]

myst_heading_anchors = 4

html_theme = "furo"
html_title = "Relight"
html_static_path = ["_static"]
html_css_files = ["relight.css"]
html_copy_source = False
html_show_sphinx = False

default_role = "code"  # docstrings are written as these pages are
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
nitpick_ignore_regex = [("py:.*", ".*")]  # the types of other libraries, which are documented elsewhere

# Pages that live at the root of the repository, where forges look for them.
AT_THE_ROOT = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md", "security": "SECURITY.md"}
_MADE = re.compile(r"^<!-- made from code: (\w+) -->$", re.MULTILINE)


def setup(app: Sphinx) -> None:
    app.connect("source-read", _complete)
    app.connect("autodoc-process-docstring", _as_rst)


def _complete(_: Sphinx, docname: str, source: list[str]) -> None:
    """What stands only as a comment in the source, so that a forge shows the rest of the page."""
    if docname in AT_THE_ROOT:
        source[0] = (DOCS.parent / AT_THE_ROOT[docname]).read_text().replace("](docs/", "](")
        for page, file in AT_THE_ROOT.items():
            source[0] = source[0].replace(f"]({file})", f"]({page}.md)")
    source[0] = _MADE.sub(lambda found: getattr(reference, found[1])(), source[0])


def _as_rst(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """An indented block after a colon is code in our docstrings."""
    for number in range(len(lines) - 2):
        if lines[number].endswith(":") and not lines[number + 1].strip() and lines[number + 2].startswith("    "):
            lines[number] += ":"
