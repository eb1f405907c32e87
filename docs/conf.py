"""Sphinx configuration: ``sphinx-build -W docs docs/_build`` from the repository's root."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_extensions")]

from gflowgr import __version__  # noqa: E402 (needs the path above)

project = "gflowgr"
author = "The gflowgr authors"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "api_pages",
    "command_help",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"gflowgr {__version__}"

myst_heading_anchors = 3

# Docstrings are in Google's style. Attributes as fields of their class, so that the attributes of a
# dataclass are not described a second time as its members.
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 88
