"""Sphinx: how the pages that tools/site_pages.py wrote become the site (`make site`)."""

import sys
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import site_pages  # noqa: E402

project = "hdmil"
extensions = ["myst_nb"]
nb_execution_mode = "off"  # the committed outputs are shown
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
html_theme = "sphinx_book_theme"
html_title = "hdmil"
html_show_copyright = False
html_math_renderer = "mathml"
html_static_path = [str(ROOT / "site" / "static")]
html_css_files = ["site.css"]
html_copy_source = False
html_use_index = False
html_context = {"default_mode": "light"}  # as the figures are
html_theme_options = {
    "collapse_navbar": True,
    "home_page_in_toc": True,
    "navbar_persistent": [],  # search is in the sidebar
    "use_download_button": False,
}

if site_pages.repository():
    html_theme_options |= {
        "repository_url": f"https://github.com/{site_pages.repository()}",
        "repository_branch": site_pages.LAUNCH_BRANCH,
        "use_repository_button": True,
        "launch_buttons": {
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
            "notebook_interface": "jupyterlab",
        },
    }


def visit_formula(translator, node):
    """Write a formula as MathML, which browsers draw without a script."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    formula = convert(node.astext().replace(r"\arg", r"\operatorname{arg}"), display=display)
    if "\\" in formula:
        logging.getLogger(__name__).warning("an unknown command in %s", node.astext(), location=node)
    translator.body.append(formula)
    raise nodes.SkipNode


def setup(app):
    """Give Sphinx the renderer of formulas."""
    app.add_html_math_renderer("mathml", (visit_formula, None), (visit_formula, None))
