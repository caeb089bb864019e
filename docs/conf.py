"""Sphinx's configuration: ``sphinx-build -W --keep-going -b html docs docs/_build/html``."""

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from dfmath import __version__

project, author, version = "dfmath", "The dfmath developers", __version__
copyright = author
html_title = f"dfmath {version}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "numpydoc",
    "mathml",
    "equations",
    "commands",
    "results",
    "names",
    "notebooks",
]
smartquotes = False  # options begin with two hyphens
exclude_patterns = ["_build", "_ext"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist", "attrs_block"]
myst_heading_anchors = 3

default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: name for name in ("Array", "Number", "Tensor", "Model", "Prior", "Product", "Trace")}
# Adapters to libraries that are not installed are documented all the same.
autodoc_mock_imports = [name for name in ("azula", "cupy", "diffusers", "torch", "dask") if find_spec(name) is None]
numpydoc_show_class_members = False
maximum_signature_line_length = 80
add_module_names = False
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True

html_theme = "furo"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["dfmath.css"]
html_copy_source = html_show_sourcelink = html_show_sphinx = False
