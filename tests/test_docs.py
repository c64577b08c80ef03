"""Documents agree with the code: docs/paper_map.md names what exists, the README shows what was measured."""

import ast
import re
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from hdmil_lib import kernels, models

PAPER_MAP = REPOSITORY / "docs" / "paper_map.md"
LINKS = re.findall(r"\[`?([^`\]]+)`?\]\((?!https)([^)]+)\)", PAPER_MAP.read_text(encoding="utf-8"))


def definitions(path: Path) -> set[str]:
    """Names of functions, classes, methods (`Class.method`) and constants of a module."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


@pytest.mark.parametrize(("name", "target"), sorted(set(LINKS)))
def test_every_link_of_the_paper_map_leads_to_what_it_names(name, target):
    path = (PAPER_MAP.parent / target).resolve()
    assert path.is_file(), f"docs/paper_map.md links to {target}, which does not exist"
    if path.suffix == ".py":
        assert name in definitions(path), f"docs/paper_map.md: {target} defines no {name}"
    else:
        assert path.name.startswith(name), f"docs/paper_map.md: [{name}] leads to {path.name}"


def test_the_paper_map_names_every_operator_model_and_loss():
    linked = {name for name, _ in LINKS}
    modules = [
        path for room in ("models", "training") for path in (REPOSITORY / "hdmil_lib" / room).glob("*.py")
    ]
    losses = {
        name
        for path in modules
        for name in definitions(path)
        if name.endswith("_loss") and not name.startswith("_")
    }
    classifiers = {c.__name__ for c in models.MILModel.__subclasses__() if c is not models.DMIN}
    others = {"LIPN", "ChebyshevKAN", "DMIN.classify", "DMIN.loss", "HDMIL.forward"}
    assert set(kernels.__all__) | losses | classifiers | others <= linked


def test_every_row_has_the_columns_of_its_table():
    rows = [line for line in PAPER_MAP.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(rows) > 30
    assert {line.count("|") for line in rows} == {5, 6}


def test_the_readme_shows_the_committed_results():
    sys.path.insert(0, str(REPOSITORY / "tools"))
    import publish_results

    assert publish_results.README.read_text(encoding="utf-8") == publish_results.readme_with(
        publish_results.render()
    ), "run `python tools/publish_results.py` after a full `make tutorial`"
