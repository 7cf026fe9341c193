"""Sphinx's configuration: `make docs` builds the site into build/docs."""

from __future__ import annotations

import sys
from pathlib import Path

import lrt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "lrt"
author = copyright = "the lrt authors"
version = release = lrt.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "plain_docstrings",
    "log_pages",
    "project_pages",
    "study_pages",
]
exclude_patterns = ["_ext"]
nitpicky = True
# Python names stand in annotations alone, and most of them are torch's or internal. Links and anchors are checked.
nitpick_ignore_regex = [(r"py:.*", r".*")]
suppress_warnings = ["myst.header"]  # the contract and log entries begin where it suits them

html_theme = "furo"
html_title = "lrt"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
highlight_language = "none"  # of blocks that name none: commands
pygments_style = "default"
pygments_dark_style = "github-dark"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
copybutton_exclude = ".linenos, .gp, .go"

# Notebooks are run by the build, each once per change; an error in one ends it.
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE.parent / "build" / "notebooks")
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_in_temp = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
