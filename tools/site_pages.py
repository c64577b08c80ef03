"""Write the pages of the site for Sphinx: home, notebooks as committed, documents, results, API, sources.

    python tools/site_pages.py FOLDER

Pages keep the paths that they have in the repository. Links to files that are no pages lead to a page of the
source, to a copy, or to the repository, if pyproject.toml or GitHub Actions names its address.
"""

import json
import os
import re
import shutil
import sys
import tomllib
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

import api_pages
import flowchart

import notebooks

ROOT = Path(__file__).resolve().parent.parent
BRANCH = "main"
LAUNCH_BRANCH = "launch"
README = "README.md"
NAMES = {
    "table1": "Table 1",
    "table2": "Table 2",
    "table3": "Table 3",
    "camelyon-pcam": "Composed lymph nodes",
}
NAMES |= {"nsclc-lc25000": "Composed lung", "claims_evidence": "Claims, LIPN taught evidence"}
NAMES |= {"table1_another_processor": "Table 1 on another processor", "auc": "AUC of all methods"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def repository() -> str:
    """`owner/name` on GitHub: of the running workflow, else the one in pyproject.toml, else empty."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project["urls"].get("Repository", "").removeprefix("https://github.com/").removesuffix(".git")
    return os.environ.get("GITHUB_REPOSITORY", address)


# What there is


def course() -> list[str]:
    """Paths of the notebooks, in order."""
    return [path.relative_to(ROOT).as_posix() for path in notebooks.find()]


def solutions() -> list[str]:
    """Paths of the notebooks with solutions, in order."""
    return [path.relative_to(ROOT).as_posix() for path in notebooks.find(solutions=True)]


def documents() -> list[str]:
    """Paths of the documents, results excepted."""
    docs = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
    return [*docs, "CONTRIBUTING.md", "CHANGELOG.md"]


def results() -> list[str]:
    """Paths of the tables of results, those of each cohort together."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "results").rglob("*.md"))


def label(path: str) -> str:
    """Name of a page of results: of its table, or the words of its file name."""
    stem = PurePosixPath(path).stem
    return NAMES.get(stem, stem[:1].upper() + stem[1:].replace("_", " "))


# Links


class Site:
    """The folder that is written, and the links of its pages."""

    def __init__(self, folder: Path, address: str = "") -> None:
        self.folder = folder
        self.address = f"https://github.com/{address}" if address else ""
        self.pages = {path: path for path in [*course(), *solutions(), *documents(), *results()]}
        self.pages |= {README: "index.md", "notebooks": "index.md"}
        self.pages["notebooks/solutions"] = "notebooks/solutions/index.md"
        self.pages["docs/results"] = "docs/results/index.md"
        for path in results():
            home = str(PurePosixPath(path).parent)
            if home != "docs/results":
                self.pages[home] = f"{home}/index.md"
        self.api = api_pages.pages(api_pages.modules(ROOT / api_pages.LIBRARY))
        self.sources: set[str] = set()

    def write(self, path: str, text: str) -> None:
        """Write a page of the site."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")

    def linked(self, text: str, path: str, page: str = "") -> str:
        """The Markdown of a file of the repository with its links as they lead from its page."""
        change = partial(self._link, home=PurePosixPath(path).parent, page=page or path)
        parts = FENCE.split(text)
        return "".join(
            self._fenced(part, page or path) if part.startswith("```") else LINK.sub(change, part)
            for part in parts
        )

    def _fenced(self, block: str, page: str) -> str:
        """A block of code as it is; a flowchart as a picture."""
        if not block.startswith("```mermaid\n"):
            return block
        chart = block.split("\n", 1)[1].removesuffix("```")
        name = f"flowchart-{zlib.crc32(chart.encode()):08x}.svg"
        self.write(str(PurePosixPath(page).parent / name), flowchart.draw(chart))
        return f"![Flowchart: {', '.join(flowchart.read(chart)[0].values())}]({name})"

    def _link(self, match: re.Match, home: PurePosixPath, page: str) -> str:
        image, words, target = match.groups()
        if "[" in words:  # an image in the words of a link
            words = LINK.sub(partial(self._link, home=home, page=page), words)
        place, _, anchor = target.partition("#")
        if not place or ":" in place:
            return f"{image}[{words}]({target})"
        path = os.path.normpath(home / place)
        leads = self._target(path, bool(image))
        if not leads:
            return words
        if ":" not in leads:
            leads = os.path.relpath(leads, PurePosixPath(page).parent)
        return f"{image}[{words}]({leads}{anchor and '#' + anchor})"

    def _target(self, path: str, is_image: bool) -> str:
        """Page or copy of a file of the repository, or its address; empty for a folder without either."""
        if path in self.pages:
            return self.pages[path]
        file = ROOT / path
        module = path.removesuffix(".py").replace("/", ".") + ".md"
        if file.is_dir():
            page = f"docs/api/{module}" if module in self.api else self.on_github(path, "tree")
            return page or ("docs/api/index.md" if path.startswith(api_pages.LIBRARY) else "")
        if file.suffix == ".py":
            self.sources.add(path)
            return f"{path}.md"
        if self.address and not is_image:
            return self.on_github(path, "blob")
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, self.folder / path)
        return path

    def on_github(self, path: str, kind: str) -> str:
        return f"{self.address}/{kind}/{BRANCH}/{path}" if self.address else ""


# Pages


def toctree(entries: dict[str, str], caption: str = "", *, hidden: bool = True) -> str:
    """A table of contents: titles by page, relative to its own; an empty one is the page's title."""
    options = [":hidden:"] if hidden else []
    options += [f":caption: {caption}"] if caption else []
    lines = [f"{title} <{page}>" if title else page for page, title in entries.items()]
    return "\n".join(["```{toctree}", *options, "", *lines, "```"]) + "\n"


def readme() -> tuple[str, str]:
    """The README in two: all but its results, and its results."""
    text = (ROOT / README).read_text(encoding="utf-8")
    text = re.sub(r"<!-- launch: begin -->.*?<!-- launch: end -->\n*", "", text, flags=re.DOTALL)
    before, results_text, after = re.split(r"^(?=## Results$|## Your own slides$)", text, flags=re.MULTILINE)
    return before + after, results_text


def write_home(site: Site) -> None:
    """The README without its results, and the contents of the whole site."""
    text = site.linked(readme()[0], README, "index.md")
    trees = [
        toctree({path: notebooks.title(Path(path)) for path in course()}, "Course"),
        toctree(
            {"notebooks/solutions/index": "Solutions", "docs/glossary": "", "docs/notation": ""},
            "Course materials",
        ),
    ]
    rest = [path.removesuffix(".md") for path in documents()]
    shown = {"docs/glossary", "docs/notation"}
    trees.append(toctree({"docs/results/index": "Results", "docs/api/index": "API"}, "Library"))
    trees.append(toctree({path: "" for path in rest if path not in shown}, "Documents"))
    site.write("index.md", "\n\n".join([text, *trees]))


def write_notebooks(site: Site) -> None:
    """Notebooks with their outputs; the site has its own navigation."""
    for path in [*course(), *solutions()]:
        notebook = json.loads((ROOT / path).read_text(encoding="utf-8"))
        notebook["cells"] = [
            cell for cell in notebook["cells"] if notebooks.NAVIGATION not in cell["metadata"].get("tags", [])
        ]
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = site.linked("".join(cell["source"]), path)
            elif texts := list(alt_texts(cell)):
                cell["metadata"]["mystnb"] = {"image": {"alt": " ".join(texts)}}
        site.write(path, json.dumps(notebook))
    entries = {Path(path).name: notebooks.title(Path(path)) for path in solutions()}
    text = "# Solutions\n\nOf the exercises of each notebook, with their outputs.\n\n"
    site.write("notebooks/solutions/index.md", text + toctree(entries, hidden=False))


def alt_texts(cell: dict) -> Iterator[str]:
    """What the pictures of a code cell show, as tools/notebooks.py noted it in its outputs."""
    for output in cell["outputs"]:
        for options in output.get("metadata", {}).values():
            if isinstance(options, dict) and "alt" in options:
                yield options["alt"]


def write_documents(site: Site) -> None:
    """Documents, and results by cohort with their figures."""
    for path in documents():
        site.write(path, site.linked((ROOT / path).read_text(encoding="utf-8"), path))
    for path in results():
        text = (ROOT / path).read_text(encoding="utf-8")
        heading = "" if text.startswith("# ") else f"# {label(path)}\n\n"
        site.write(path, heading + site.linked(text, path))
    homes = sorted({PurePosixPath(path).parent for path in results()}, reverse=True)
    for home in homes:
        entries = {PurePosixPath(path).name: "" for path in results() if PurePosixPath(path).parent == home}
        if home == PurePosixPath("docs/results"):
            folders = {f"{folder.name}/index": folder.name for folder in sorted(homes) if folder != home}
            text = site.linked(readme()[1].replace("## Results", "# Results", 1), README, f"{home}/index.md")
            site.write(f"{home}/index.md", text + "\n\n" + toctree(entries | folders))
        else:
            figures = "\n\n".join(
                f"![{label(file.name)}]({home / file.name})" for file in sorted((ROOT / home).glob("*.png"))
            )
            text = f"# {home.name}\n\n{toctree(entries, hidden=False)}\n{figures}"
            site.write(f"{home}/index.md", site.linked(text, README, f"{home}/index.md"))


def write_api(site: Site) -> None:
    """A page per public module, each below the nearest package that has one."""
    names = [name.removesuffix(".md") for name in site.api]
    for name, text in site.api.items():
        owner = name.removesuffix(".md")
        below = {child: child.removeprefix("hdmil_lib.") for child in names if parent(child, names) == owner}
        site.write(f"docs/api/{name}", text + "\n" + (toctree(below) if below else ""))


def parent(name: str, names: list[str]) -> str:
    """The page of the API that lists another one."""
    owner = name.rpartition(".")[0]
    while owner and owner not in names:
        owner = owner.rpartition(".")[0]
    return owner if "." in owner else "" if name == "index" else "index"


def write_sources(site: Site) -> None:
    """The files of Python that pages link to; search leaves them out."""
    for path in sorted(site.sources):
        link = f"[On GitHub]({site.on_github(path, 'blob')})\n\n" if site.address else ""
        text = (ROOT / path).read_text(encoding="utf-8").rstrip("\n")
        heading = f"---\norphan: true\nnosearch: true\n---\n# `{path}`\n\n"
        site.write(f"{path}.md", f"{heading}{link}`````python\n{text}\n`````\n")


def all_pages(folder: Path) -> Iterator[str]:
    """Pages in a written folder."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".md", ".ipynb"):
            yield path.relative_to(folder).as_posix()


def main(folder: Path, address: str | None = None) -> None:
    """Write all pages, in place of those that a former run left in the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    site = Site(folder, repository() if address is None else address)
    write_home(site)
    write_notebooks(site)
    write_documents(site)
    write_api(site)
    write_sources(site)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
