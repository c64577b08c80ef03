"""Rules of the whole repository: style, types, layers, packaging, and lists that must agree."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import hdmil_lib
from hdmil_lib.version import __version__

PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
SOURCES = sorted((REPOSITORY / "hdmil_lib").rglob("*.py")) + sorted((REPOSITORY / "tools").glob("*.py"))
BIN = Path(sys.executable).parent


def relative(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def requirements() -> dict[str, Requirement]:
    """All requirements of the project by name, those of its extras among them."""
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return {requirement.name: requirement for names in lists for requirement in map(Requirement, names)}


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "lint-imports", "mypy"])
def test_style_layers_and_types(command):
    program, *arguments = command.split()
    result = subprocess.run([BIN / program, *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


# Source


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_module_is_finished(path):
    source = path.read_text()
    assert [node.name for node in unfinished(ast.parse(source))] == []
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", source)


def unfinished(tree: ast.AST) -> list[ast.FunctionDef]:
    """Functions without a body, unless they are declarations, overloads or callbacks for options alone."""
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
        and not any(
            word in ast.unparse(decorator)
            for decorator in node.decorator_list
            for word in ("abstractmethod", "overload", ".callback(")
        )
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


def test_only_config_reads_the_environment():
    readers = [relative(p) for p in SOURCES if re.search(r"os\.(environ|getenv)", p.read_text())]
    assert [name for name in readers if name.startswith("hdmil_lib")] == ["hdmil_lib/config.py"]


# Public names


def test_every_public_name_can_be_imported_and_is_known_to_type_checkers():
    source = ast.parse((REPOSITORY / "hdmil_lib" / "__init__.py").read_text())
    declared = {
        alias.name for node in ast.walk(source) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(hdmil_lib.__all__) <= declared
    assert [name for name in hdmil_lib.__all__ if not hasattr(hdmil_lib, name)] == []


def test_importing_the_library_imports_no_heavy_package():
    code = "import sys, hdmil_lib; print(*{'torch', 'pandas', 'matplotlib', 'timm'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.stdout.split() == [], result.stderr


# Installation


def test_the_wheel_holds_the_whole_package(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(
        REPOSITORY / "hdmil_lib", source / "hdmil_lib", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run([*command, "-w", tmp_path, source], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {path for path in (REPOSITORY / "hdmil_lib").rglob("*") if path.is_file()}
    assert packed == {relative(path) for path in files if "__pycache__" not in path.parts}
    assert "hdmil_lib/py.typed" in packed
    assert wheel.name.startswith(f"hdmil-{__version__}-")


def test_every_folder_of_the_library_is_a_package():
    folders = {path.parent for path in SOURCES if "hdmil_lib" in path.parts}
    assert [relative(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_citation_and_changelog_know_the_version():
    assert yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["version"] == __version__
    assert f"\n## [{__version__}]" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_every_dependency_has_a_lower_bound():
    for requirement in requirements().values():
        assert any(bound.operator in (">=", "==") for bound in requirement.specifier), str(requirement)


def test_conda_installs_python_and_the_extras_of_pyproject():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    python, pip, from_pip = environment["dependencies"]
    assert python == f"python{PROJECT['requires-python']}"
    assert pip == "pip"
    (package,) = from_pip["pip"]
    extras = re.fullmatch(r"-e \.\[(.+)\]", package).group(1).split(",")
    assert set(extras) == set(PROJECT["optional-dependencies"]) - {"gpu"}  # which only NVIDIA GPUs can use


def test_make_help_lists_tasks_that_make_knows():
    shown = subprocess.run(
        ["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    tasks = [line.split()[0] for line in shown.splitlines() if "  " in line]
    assert {"tutorial", "test", "lab"} <= set(tasks)
    subprocess.run(["make", "-n", *tasks], cwd=REPOSITORY, capture_output=True, check=True)


# Continuous integration


@pytest.mark.xdist_group("together")
def test_tests_of_a_group_run_in_one_process(request):
    """pytest 9.2 and pytest-xdist 3.8 forget groups, and two processes then do the same long set-ups."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("only with -n 2 --dist loadgroup, as `make test` runs it")
    assert request.node.nodeid.endswith("@together")


def workflow() -> dict:
    return yaml.safe_load((REPOSITORY / ".github" / "workflows" / "tests.yml").read_text())


def test_the_workflow_runs_the_whole_suite_on_supported_pythons():
    (job,) = workflow()["jobs"].values()
    assert any(step.get("run") == ".ci/run" for step in job["steps"])
    versions = job["strategy"]["matrix"]["python-version"]
    supported = SpecifierSet(PROJECT["requires-python"])
    assert all(isinstance(version, str) and version in supported for version in versions)


def test_the_workflow_pins_its_actions_by_commit():
    used = [step["uses"] for job in workflow()["jobs"].values() for step in job["steps"] if "uses" in step]
    assert used
    assert [action for action in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action)] == []


def test_pre_commit_formats_as_the_tests_demand():
    config = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    hooks = {hook["id"]: repo["rev"] for repo in config["repos"] for hook in repo["hooks"]}
    assert all(re.fullmatch(r"v\d+\.\d+\.\d+", revision) for revision in hooks.values())
    assert hooks["ruff-format"].removeprefix("v") in requirements()["ruff"].specifier
    assert {"ruff-check", "end-of-file-fixer", "check-added-large-files"} <= set(hooks)
