"""Whether the files that hdmil wrote are whole: bags, models, trainings, tables of predictions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from hdmil_lib.bags import bag_info, read_bag, read_tile_labels
from hdmil_lib.encoders.failures import FOLDER, read_failure
from hdmil_lib.errors import CheckpointError, HDMILError
from hdmil_lib.storage import TEMPORARY
from hdmil_lib.system_errors import is_refused

CONFIG, PENDING, WEIGHTS, CARD = "config.json", "config.json.pending", "model.safetensors", "README.md"


@dataclass(frozen=True)
class Checked:
    """What was found about a file or, for a model or a training, about a folder.

    Attributes:
        path: The file or folder.
        kind: What it is.
        state: "ok", "damaged", "unfinished" if it was never written to its end, or "unreadable" if the system
            refused to read it, so that nothing can be said.
        detail: What is wrong and what to do, or what could not be checked; empty if all is well.
    """

    path: Path
    kind: Literal["bag", "model", "training", "cross-validation", "predictions", "failed slide", "part"]
    state: Literal["ok", "damaged", "unfinished", "unreadable"]
    detail: str = ""


def check_files(folder: str | Path) -> Iterator[Checked]:
    """Check all files of hdmil in a folder and those below; everything else is passed over.

    All of every file is read: digests of bags and weights, schemas of everything else.

    Args:
        folder: The folder, or a single file.

    Yields:
        One record per file, or per folder of a model or a training, sorted by path.

    Raises:
        HDMILError: There is no such file or folder.
    """
    folder = Path(folder)
    if not folder.exists():
        raise HDMILError(f"{folder}: no such file or folder; give one that hdmil wrote")
    for path in [folder] if folder.is_file() else sorted([folder, *folder.rglob("*")]):
        checked = _check_folder(path) if path.is_dir() else _check_file(path)
        if checked is not None:
            yield checked


def _check_file(path: Path) -> Checked | None:
    if TEMPORARY.fullmatch(path.name):
        detail = "was being written when a process ended, or is being written now; the next run removes it"
        return Checked(path, "part", "unfinished", detail)
    if path.suffix == ".h5":
        return _checked(path, "bag", partial(_bag, path))
    if path.suffix == ".json" and path.parent.name == FOLDER:
        return _checked(path, "failed slide", partial(_nothing, read_failure, path))
    if path.suffix == ".csv" and _first_line(path).startswith(b"slide_id,") and b",p_" in _first_line(path):
        return _checked(path, "predictions", partial(_predictions, path))
    return None


def _check_folder(folder: Path) -> Checked | None:
    if not any((folder / name).is_file() for name in (CONFIG, PENDING)):
        return None
    if folder.name.startswith("fold") and folder.name.removeprefix("fold").isdigit():
        return _checked(folder, "training", partial(_training, folder))
    if any((folder / name).is_file() for name in (PENDING, CARD, WEIGHTS)):
        return _checked(folder, "model", partial(_model, folder))
    if (folder / "slides.csv").is_file() or (folder / "splits").is_dir():
        return _checked(folder, "cross-validation", partial(_cross_validation, folder))
    return None


def _checked(path: Path, kind: str, check: Callable[[], str]) -> Checked:
    """Run a check, which returns a detail or raises an error; "unfinished: " in front says of which kind."""
    try:
        detail = check()
    except (HDMILError, OSError, MemoryError) as error:
        state = "unreadable" if is_refused(error) else "damaged"
        return Checked(path, kind, state, " ".join(str(error).split()).removeprefix(f"{path}: "))  # type: ignore[arg-type]
    if detail.startswith("unfinished: "):
        return Checked(path, kind, "unfinished", detail.removeprefix("unfinished: "))  # type: ignore[arg-type]
    return Checked(path, kind, "ok", detail)  # type: ignore[arg-type]


def _nothing(read: Callable[[Path], object], path: Path) -> str:
    read(path)
    return ""


def _bag(path: Path) -> str:
    read_bag(path)
    read_tile_labels(path)
    return "" if bag_info(path).get("schema_version", 0) >= 3 else "has no digests to be compared"


def _model(folder: Path) -> str:
    from hdmil_lib.models import HDMIL

    HDMIL.from_pretrained(folder)
    return "a save was interrupted; the next one completes it" if (folder / PENDING).is_file() else ""


def _training(folder: Path) -> str:
    from hdmil_lib.training.records import fitting, read_run
    from hdmil_lib.training.trained import CrossValidation

    read_run(folder)
    if not (folder / "predictions.csv").is_file():
        return "unfinished: train again, it goes on from here"
    with fitting(folder):
        trained = CrossValidation(folder.parents[1], [folder.parent.name])
        trained.model(folder.parent.name, int(folder.name.removeprefix("fold")))
    return ""


def _cross_validation(folder: Path) -> str:
    from hdmil_lib.training.trained import CrossValidation

    trained = CrossValidation(folder, [])
    if len(trained.splits) != trained.n_folds:
        raise CheckpointError(f"{folder}: has {len(trained.splits)} splits for {trained.n_folds} folds")
    _ = trained.cases
    return ""


def _predictions(path: Path) -> str:
    from hdmil_lib.training.records import read_rows

    table = read_rows(path, ["slide_id"], dtype={"slide_id": str}, keep_default_na=False, na_values=[""])
    shares = table[[name for name in table if name.startswith("p_")]]
    numbers = shares.select_dtypes("number")
    rows = numbers.dropna()
    if numbers.shape != shares.shape or (abs(rows.sum(axis=1) - 1) > 1e-3).any() or (rows < 0).any(axis=None):
        raise CheckpointError(f"{path}: holds probabilities that are none; predict the slides again")
    if table["slide_id"].isna().any() or table["slide_id"].duplicated().any():
        raise CheckpointError(f"{path}: a slide has no name or two rows; predict the slides again")
    failed = len(numbers) - len(rows)
    return f"{failed} slides without a prediction" if failed else ""


def _first_line(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.readline(10_000)
    except OSError:
        return b""
