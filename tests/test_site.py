"""The site and where notebooks open: pages, links, flowcharts, the cell that installs; and one build."""

import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import REPOSITORY
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

sys.path.insert(0, str(REPOSITORY / "tools"))
import flowchart
import launch
import site_pages

SECONDS = 180
"""Longest build of the site on two cores."""

BUILDERS = ("myst_nb", "sphinx_book_theme", "latex2mathml")


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    """All pages of the site of a repository without an address."""
    folder = tmp_path_factory.mktemp("site") / "pages"
    site_pages.main(folder, "")
    return folder


@pytest.fixture(scope="module")
def sites(tmp_path_factory) -> tuple[site_pages.Site, site_pages.Site]:
    """A site of a repository without an address, and one with."""
    folder = tmp_path_factory.mktemp("sites")
    return site_pages.Site(folder), site_pages.Site(folder, "o/n")


def listed(folder: Path, page: str) -> list[str]:
    """Pages in the tables of contents of a page, and of those that they list."""
    text = (folder / page).read_text(encoding="utf-8") if page.endswith(".md") else ""
    found = []
    for block in re.findall(r"^```\{toctree\}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line and not line.startswith(":"):
                name = (folder / page).parent / (line[line.find("<") + 1 : -1] if "<" in line else line)
                file = name if name.suffix in (".md", ".ipynb") and name.exists() else Path(f"{name}.md")
                assert file.exists(), f"{page} lists {line}, which is no page"
                child = file.relative_to(folder).as_posix()
                found += [child, *listed(folder, child)]
    return found


def test_the_contents_list_every_page_once(pages):
    contents = listed(pages, "index.md")
    orphans = [
        page for page in site_pages.all_pages(pages) if "orphan: true" in (pages / page).read_text()[:40]
    ]
    assert len(contents) == len(set(contents))
    assert {*contents, *orphans, "index.md"} == set(site_pages.all_pages(pages))
    assert all(page.endswith(".py.md") for page in orphans)


def test_notebooks_documents_and_results_are_pages_in_order(pages):
    contents = listed(pages, "index.md")
    numbered = [page for page in contents if re.fullmatch(r"notebooks/\d\d_\w+\.ipynb", page)]
    assert numbered == sorted(
        p.relative_to(REPOSITORY).as_posix() for p in REPOSITORY.glob("notebooks/*.ipynb")
    )
    for pattern in ("notebooks/solutions/*.ipynb", "docs/*.md", "docs/results/**/*.md"):
        files = {path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob(pattern)}
        assert files
        assert files <= set(contents)
    assert "docs/api/hdmil_lib.slides.tiling.md" in contents


def test_notebooks_keep_their_outputs_and_leave_their_navigation(pages):
    path = "notebooks/00_start_here.ipynb"
    shown = json.loads((pages / path).read_text())["cells"]
    committed = json.loads((REPOSITORY / path).read_text())["cells"]
    assert [c.get("outputs") for c in shown] == [c.get("outputs") for c in committed[1:-1]]


def test_every_link_of_a_page_leads_to_a_file(pages):
    broken, count = [], 0
    for page in site_pages.all_pages(pages):
        text = (pages / page).read_text(encoding="utf-8")
        if page.endswith(".ipynb"):
            cells = json.loads(text)["cells"]
            text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        if page.endswith(".py.md"):
            continue
        for part in site_pages.FENCE.split(text)[::2]:
            for _, _, target in site_pages.LINK.findall(part):
                place = target.partition("#")[0]
                count += 1
                if place and ":" not in place and not ((pages / page).parent / place).is_file():
                    broken.append((page, target))
    assert count > 500
    assert broken == []


@pytest.mark.parametrize(
    ("link", "without", "with_address"),
    [
        ("[a](../README.md)", "[a](../index.md)", "[a](../index.md)"),
        ("[a](../docs/glossary.md#gpu-kernels)",) + ("[a](../docs/glossary.md#gpu-kernels)",) * 2,
        ("[a](solutions)", "[a](solutions/index.md)", "[a](solutions/index.md)"),
        ("[a](../hdmil_lib/bags.py)", "[a](../hdmil_lib/bags.py.md)", "[a](../hdmil_lib/bags.py.md)"),
        ("[a](../hdmil_lib/viz/viewer)",) + ("[a](../docs/api/hdmil_lib.viz.viewer.md)",) * 2,
        (
            "[a](../CITATION.cff)",
            "[a](../CITATION.cff)",
            "[a](https://github.com/o/n/blob/main/CITATION.cff)",
        ),
        ("[a](../benchmarks/gpu)", "a", "[a](https://github.com/o/n/tree/main/benchmarks/gpu)"),
        ("[a](https://arxiv.org)", "[a](https://arxiv.org)", "[a](https://arxiv.org)"),
        ("```python\nx[0](y)\n```",) + ("```python\nx[0](y)\n```",) * 2,
    ],
)
def test_where_a_link_leads(sites, link, without, with_address):
    for site, expected in zip(sites, (without, with_address), strict=True):
        assert site.linked(link, "notebooks/00_start_here.ipynb") == expected


def test_the_address_of_the_running_workflow_comes_first(monkeypatch):
    monkeypatch.setenv("GITHUB_REPOSITORY", "some/fork")
    assert site_pages.repository() == "some/fork"


# Flowcharts

CHART = """flowchart LR
  A["a text & more"] --> B --> D
  A --> C["third"] --> D
"""


def test_a_flowchart_is_read_and_laid_out():
    texts, arrows = flowchart.read(CHART)
    assert texts == {"A": "a text & more", "B": "B", "C": "third", "D": "D"}
    assert sorted(arrows) == [("A", "B"), ("A", "C"), ("B", "D"), ("C", "D")]
    assert flowchart.places(list(texts), arrows) == {"A": (0, 0), "B": (1, -0.5), "C": (1, 0.5), "D": (2, 0)}
    assert flowchart.draw(CHART).count("<rect") == 4
    assert "&amp;" in flowchart.draw(CHART)


@pytest.mark.parametrize(
    ("chart", "message"),
    [
        ("flowchart TD\n A --> B", "left to right"),
        ("flowchart LR\n A -- no --> B", "not understood"),
        ("flowchart LR\n A --> B --> A", "circle"),
    ],
)
def test_a_flowchart_that_cannot_be_drawn_is_refused(chart, message):
    with pytest.raises(ValueError, match=message):
        flowchart.draw(chart)


# Colab and Binder


def test_the_first_code_cell_of_launched_notebooks_installs_where_hdmil_is_missing():
    from IPython.core.inputtransformer2 import TransformerManager

    notebook = new_notebook(cells=[new_markdown_cell("# Why?"), new_code_cell("x = 1")])
    for _ in range(2):  # once is enough
        launch.with_install_cell(notebook, "notebooks", "owner/name")
    assert [cell.cell_type for cell in notebook.cells] == ["markdown", "code", "code"]
    source = TransformerManager().transform_cell(notebook.cells[1].source)
    compile(source, "cell", "exec")
    ran = {"get_ipython": lambda: pytest.fail("hdmil is here, and yet something is installed")}
    exec(source, ran)
    assert "https://github.com/owner/name" in source
    assert launch.histolab().startswith("histolab==")
    nbformat.validate(notebook)


def test_badges_stand_between_their_marks_and_need_an_address():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert launch.with_badges(readme, site_pages.repository()) == readme, "run `make badges`"
    table = launch.badges("owner/name")
    for path in site_pages.course():
        assert f"https://colab.research.google.com/github/owner/name/blob/launch/{path})" in table
        assert f"https://mybinder.org/v2/gh/owner/name/launch?labpath={path.replace('/', '%2F')})" in table
    assert launch.badges("") == ""


def test_the_places_are_set_up_from_what_the_makefile_knows():
    container = json.loads((REPOSITORY / ".devcontainer" / "devcontainer.json").read_text())
    makefile = (REPOSITORY / "Makefile").read_text()
    assert container["image"].endswith(":3.11")
    assert f"\n{container['postCreateCommand'].split()[1]}: $(INSTALLED)" in makefile
    script = (REPOSITORY / "binder" / "postBuild").read_text()
    pinned = re.search(r"\$\((sed .*)\)", script)[1]
    shown = subprocess.run(["bash", "-c", pinned], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == launch.histolab()


def test_the_workflow_of_the_site_pins_its_actions():
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "site.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used
    assert all(re.search(r"@[0-9a-f]{40}$", action) for action in used)
    assert {"run": "make site"} in steps


# The site itself


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, BUILDERS)), reason="needs the extra: pip install 'hdmil[site]'"
)
def test_the_site_is_built_without_a_warning_and_without_the_network(pages, tmp_path):
    command = [sys.executable, "-m", "sphinx", "-j", "2", "-W", "--keep-going", "-q", "-b", "html"]
    start = time.perf_counter()
    result = subprocess.run(
        [*command, "-c", REPOSITORY / "site", pages, tmp_path], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert time.perf_counter() - start < SECONDS
    notebook = (tmp_path / "notebooks" / "00_start_here.html").read_text(encoding="utf-8")
    pictures = re.findall(r'<img[^>]* alt="([^"]*)"', notebook)
    assert len(pictures) >= 5
    assert all(" " in text for text in pictures), "a picture has no text"
    assert "<math" in notebook
    assert "tumor" in (tmp_path / "searchindex.js").read_text(encoding="utf-8")
    for page in tmp_path.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img)\b[^>]*?(?:src|href)=\"(https?:[^\"]+)\"", text)
        assert loaded == [], f"{page.name} loads from elsewhere"
