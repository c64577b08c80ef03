"""Run the notebooks, write their navigation, and hold them to the limits of docs/design.md.

    python tools/notebooks.py run [NAME ...]            executed copies in build/notebooks
    python tools/notebooks.py run --inplace [NAME ...]  and their outputs back into notebooks/
    python tools/notebooks.py nav                       rewrite the navigation lines
    python tools/notebooks.py alt                       rewrite the alternative texts of pictures
    python tools/notebooks.py check                     limits, order, outputs of one clean Run All

A NAME is the start of a file name, such as `04`. Solutions are run with `--solutions`.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from PIL import Image

from hdmil_lib.config import build_dir, is_fast

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_NOTE = "[interactive: run this cell to move the controls]"
NAVIGATION = "navigation"
ALT_TEXTS = "alt_texts.json"
ACRONYMS = {name.lower(): name for name in ("MIL", "DMIN", "KAN", "LIPN", "GPU")}
LIMITS = {"median code lines": 6, "longest code cell": 25, "words": 120, "code cells": 35, "kilobytes": 500}


def find(names: Sequence[str] = (), *, solutions: bool = False) -> list[Path]:
    """Notebooks in order, all or those whose file name starts with one of `names`.

    Raises:
        FileNotFoundError: A name that no notebook starts with.
    """
    paths = sorted((NOTEBOOKS / "solutions" if solutions else NOTEBOOKS).glob("[0-9]*.ipynb"))
    for name in names:
        if not any(path.name.startswith(name) for path in paths):
            raise FileNotFoundError(
                f"no notebook starts with {name!r} among: {', '.join(p.stem for p in paths)}"
            )
    return [p for p in paths if not names or p.name.startswith(tuple(names))]


# Running


@dataclass(frozen=True)
class Run:
    """One notebook's run: what it took, or why it failed."""

    name: str
    seconds: float
    peak_mb: float | None
    skipped: bool = False
    error: str | None = None

    def __str__(self) -> str:
        memory = "" if self.peak_mb is None else f"  {self.peak_mb:6.0f} MB"
        state = "FAILED" if self.error else "unchanged" if self.skipped else "ok"
        return f"{self.name:<38} {self.seconds:7.1f} s{memory}  {state}"


def fingerprint(notebook: NotebookNode) -> str:
    """Hash of all that a run depends on: the cells' sources, the library's, and the size of the run."""
    digest = hashlib.sha256(str(is_fast()).encode())
    for cell in notebook.cells:
        digest.update(f"{cell.cell_type}\0{cell.source}\0".encode())
    for path in sorted((ROOT / "hdmil_lib").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def execute(path: Path, out: Path) -> Run:
    """Execute one notebook into `out`, unless its last success there still stands.

    The copy is written to a temporary name and renamed: it is whole or absent. A failed run leaves
    `<name>.failed.ipynb` beside it, with the outputs up to the failing cell.
    """
    out.mkdir(parents=True, exist_ok=True)
    target, failed = out / path.name, out / f"{path.stem}.failed.ipynb"
    notebook = nbformat.read(path, as_version=4)
    stamp = fingerprint(notebook)
    if target.exists():
        last = nbformat.read(target, as_version=4).metadata.get("hdmil", {})
        if last.get("fingerprint") == stamp:
            return Run(path.stem, last["seconds"], last["peak_mb"], skipped=True)
    peaks: list[float | None] = [None]
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        store_widget_state=False,
        on_cell_executed=lambda **_: peaks.append(_peak_mb(client.km.provisioner.pid)),
    )
    start = time.perf_counter()
    try:
        client.execute()
    except CellExecutionError as error:
        nbformat.write(notebook, failed)
        return Run(path.stem, time.perf_counter() - start, None, error=_describe(notebook, error))
    seconds = round(time.perf_counter() - start, 1)
    _tidy(notebook)
    add_alt_texts(notebook, alt_texts(path))
    notebook.metadata["hdmil"] = {"fingerprint": stamp, "seconds": seconds, "peak_mb": peaks[-1]}
    _write(notebook, target)
    failed.unlink(missing_ok=True)
    return Run(path.stem, seconds, peaks[-1])


def _peak_mb(pid: int) -> float | None:
    """Peak resident memory of a process so far, where the system tells (Linux)."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return None
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text()).group(1)) / 1024


def _describe(notebook: NotebookNode, error: CellExecutionError) -> str:
    for number, cell in enumerate(notebook.cells, 1):
        if any(output.output_type == "error" for output in cell.get("outputs", [])):
            return f"cell {number} of {len(notebook.cells)}:\n{error.traceback.strip()}"
    return str(error)


def _write(notebook: NotebookNode, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    nbformat.write(notebook, temporary)
    os.replace(temporary, path)


def _tidy(notebook: NotebookNode) -> None:
    """Make outputs readable without a kernel, and small: no dead widgets or bars, small figures."""
    for cell in notebook.cells:
        kept = []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if WIDGET_VIEW in data and "image/png" in data:
                del data[WIDGET_VIEW]  # the widget brings its own picture
            elif WIDGET_VIEW in data:
                if "children=" not in data.get("text/plain", ""):
                    continue  # a finished progress bar
                output["data"] = {"text/plain": WIDGET_NOTE}
            if "image/png" in data:
                data |= _smaller(data.pop("image/png"))
            kept.append(output)
        if cell.cell_type == "code":
            cell.outputs = kept
    notebook.metadata.pop("widgets", None)


def _smaller(png: str) -> dict[str, str]:
    """A figure by its type, in base64: a PNG of 256 colors, or a JPEG where smaller, as tissue is."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    drawn, photographed = io.BytesIO(), io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(drawn, "PNG", optimize=True)
    image.save(photographed, "JPEG", quality=80, subsampling="4:2:0", optimize=True)
    if photographed.tell() < 0.9 * drawn.tell():
        return {"image/jpeg": base64.b64encode(photographed.getvalue()).decode()}
    return {"image/png": min(base64.b64encode(drawn.getvalue()).decode(), png, key=len)}


def write_back(path: Path, out: Path) -> None:
    """Copy the outputs of the executed copy into the notebook itself, for committing."""
    notebook = nbformat.read(out / path.name, as_version=4)
    notebook.metadata.pop("hdmil", None)
    _write(notebook, path)


# Alternative texts


def alt_texts(path: Path) -> dict[str, list[str]]:
    """What the pictures of a notebook show, by the id of their cell, one text per picture."""
    file = NOTEBOOKS / ALT_TEXTS
    name = path.relative_to(NOTEBOOKS).with_suffix("").as_posix()
    texts = json.loads(file.read_text()).get(name, {}) if file.exists() else {}
    return {cell: [text] if isinstance(text, str) else text for cell, text in texts.items()}


def pictures(cell: NotebookNode) -> Iterator[tuple[str, NotebookNode]]:
    """The pictures among a cell's outputs: type and output."""
    for output in cell.get("outputs", []):
        for kind in output.get("data", {}):
            if kind.startswith("image/"):
                yield kind, output


def add_alt_texts(notebook: NotebookNode, texts: dict[str, list[str]]) -> None:
    """Give each picture its text: as `alt` in its metadata, which HTML converters read, and as plain text."""
    for cell in notebook.cells:
        for (kind, output), text in zip(pictures(cell), texts.get(cell.get("id"), []), strict=False):
            output.metadata = {**output.metadata, kind: {"alt": text}}
            output.data["text/plain"] = text


def check_alt_texts(path: Path) -> Iterator[str]:
    """Pictures without a text that says what they show or with an old one, and texts without a picture."""
    notebook, texts = nbformat.read(path, as_version=4), alt_texts(path)
    for number, cell in enumerate(notebook.cells, 1):
        shown, told = list(pictures(cell)), texts.pop(cell.get("id"), [])
        if len(shown) != len(told):
            yield f"cell {number} ({cell.id}) has {len(shown)} pictures, {ALT_TEXTS} {len(told)} texts for it"
        elif any(
            output.metadata.get(kind, {}).get("alt", text) != text
            for (kind, output), text in zip(shown, told, strict=True)
        ):
            yield f"cell {number} has an old alternative text: run `python tools/notebooks.py alt`"
    for cell_id in texts:
        yield f"{ALT_TEXTS} describes cell {cell_id}, which does not exist"


# Navigation


def title(path: Path) -> str:
    """`03_mil_baselines` -> `03 MIL baselines`."""
    number, *words = path.stem.split("_")
    words = [ACRONYMS.get(word, word) for word in words]
    return " ".join([number, words[0][:1].upper() + words[0][1:], *words[1:]])


def navigation(path: Path, paths: Sequence[Path]) -> str:
    """The line at a notebook's head and foot: the one before, this one, the one after."""
    i = list(paths).index(path)
    parts = [f"**{title(path)}**"]
    if i > 0:
        parts.insert(0, f"[← {title(paths[i - 1])}]({paths[i - 1].name})")
    if i + 1 < len(paths):
        parts.append(f"[{title(paths[i + 1])} →]({paths[i + 1].name})")
    return " · ".join(parts)


def set_navigation(notebook: NotebookNode, line: str) -> None:
    """Put the line into the first and last cell, which carry the tag `navigation`; add them where missing."""
    for place, position in ((0, 0), (-1, len(notebook.cells) + 1)):
        if not notebook.cells or NAVIGATION not in notebook.cells[place].metadata.get("tags", []):
            cell = nbformat.v4.new_markdown_cell(metadata={"tags": [NAVIGATION]}, id=f"navigation{place}")
            notebook.cells.insert(position, cell)
        notebook.cells[place].source = line


# Limits


def check(path: Path, paths: Sequence[Path]) -> Iterator[str]:
    """Each way in which a notebook breaks the rules of docs/design.md, "A notebook"."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    lines = [cell.source.splitlines() for cell in code if 'quiz("' not in cell.source]  # nothing to read
    words = [len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown"]
    measured = {
        "median code lines": statistics.median(sum(map(bool, cell)) for cell in lines) if lines else 0,
        "longest code cell": max(map(len, lines), default=0),
        "words": max(words, default=0),
        "code cells": len(lines),
        "kilobytes": path.stat().st_size / 1000,
    }
    for name, limit in LIMITS.items():
        if measured[name] > limit:
            yield f"{name}: {measured[name]:.0f}, at most {limit}"
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        yield "outputs are not from one clean Run All: run `python tools/notebooks.py run --inplace`"
    for number, cell in enumerate(notebook.cells, 1):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                yield f"cell {number} holds an error: {output.ename}"
            if output.output_type == "stream" and output.name == "stderr":
                yield f"cell {number} wrote to stderr: {output.text.strip().splitlines()[-1]}"
    yield from check_alt_texts(path)
    line = navigation(path, paths)
    if len(notebook.cells) < 3 or any(notebook.cells[place].source != line for place in (0, -1)):
        yield "navigation is out of date: run `python tools/notebooks.py nav`"
    elif not re.match(r"# .*\?$", notebook.cells[1].source.splitlines()[0]):
        yield "the title, second cell, is not a question"
    source = "\n".join(cell.source for cell in code)
    for needed in ("hdmil.setup(", "pipeline(", "assert "):
        if needed not in source:
            yield f"no code cell has `{needed}`"


def check_order(paths: Sequence[Path]) -> Iterator[str]:
    """Gaps and doubles in the numbers, and solutions without a notebook."""
    numbers = [path.name[:2] for path in paths]
    if numbers != [f"{i:02d}" for i in range(len(paths))]:
        yield f"notebooks are not numbered 00, 01, ...: {', '.join(numbers)}"
    for path in find(solutions=True):
        if not (NOTEBOOKS / path.name).exists():
            yield f"solutions/{path.name} has no notebook of that name"


# Command line


def run_command(arguments: argparse.Namespace) -> int:
    out = arguments.out / "solutions" if arguments.solutions else arguments.out
    for path in find(arguments.names, solutions=arguments.solutions):
        run = execute(path, out)
        print(run, flush=True)
        if run.error:
            print(run.error, file=sys.stderr)
            return 1
        if arguments.inplace:
            write_back(path, out)
    return 0


def nav_command(_arguments: argparse.Namespace) -> int:
    paths = find()
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        set_navigation(notebook, navigation(path, paths))
        _write(notebook, path)
    return 0


def alt_command(_arguments: argparse.Namespace) -> int:
    for path in [*find(), *find(solutions=True)]:
        notebook = nbformat.read(path, as_version=4)
        add_alt_texts(notebook, alt_texts(path))
        _write(notebook, path)
    return 0


def check_command(_arguments: argparse.Namespace) -> int:
    paths = find()
    faults = [f"{path.name}: {fault}" for path in paths for fault in check(path, paths)]
    faults += [
        f"solutions/{path.name}: {fault}" for path in find(solutions=True) for fault in check_alt_texts(path)
    ]
    faults += check_order(paths)
    print("\n".join(faults) or f"{len(paths)} notebooks within the limits")
    return bool(faults)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="execute notebooks")
    run.add_argument("names", nargs="*", help="starts of file names; none: all")
    run.add_argument("--out", type=Path, default=build_dir() / "notebooks", help="folder of executed copies")
    run.add_argument("--inplace", action="store_true", help="also write the outputs into notebooks/")
    run.add_argument("--solutions", action="store_true", help="run notebooks/solutions instead")
    run.set_defaults(command=run_command)
    commands.add_parser("nav", help="rewrite navigation lines").set_defaults(command=nav_command)
    commands.add_parser("alt", help="rewrite alternative texts").set_defaults(command=alt_command)
    commands.add_parser("check", help="hold notebooks to the limits").set_defaults(command=check_command)
    arguments = parser.parse_args()
    return arguments.command(arguments)


if __name__ == "__main__":
    sys.exit(main())
