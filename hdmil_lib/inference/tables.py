"""Tables of predictions, one row per slide: what stands in one, and of which model and slide each row is."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdmil_lib.errors import CheckpointError
from hdmil_lib.models.hdmil import HDMIL
from hdmil_lib.schema import to_json
from hdmil_lib.slides.fingerprint import fingerprint
from hdmil_lib.slides.listing import SlideFile
from hdmil_lib.slides.scale import IfUnknown
from hdmil_lib.storage import remove_stale, weights_digest
from hdmil_lib.system_errors import read_error

if TYPE_CHECKING:
    import pandas as pd

COUNTS = ("n_tiles", "n_read", "n_broken")
DIGITS = 12
"""Digits of each of the two hashes in the column `made_with`."""


def origin_of(model: HDMIL, all_tiles: bool) -> str:
    """Hash of all that the predictions of a model depend on, beside the slide.

    Args:
        model: The model.
        all_tiles: Whether every tile is read.
    """
    info = model.known_info
    tiles = (info.tile_size, info.tile_mpp, info.tissue, info.min_tissue)
    rules = (model.screening, model.random_share, model.pooling, to_json(model.dmin.settings))
    about = (weights_digest(model), info.classes, info.encoder, info.encoder_weights, tiles, rules, all_tiles)
    return hashlib.sha256(repr(about).encode()).hexdigest()[:DIGITS]


def made_with(origin: str, file: SlideFile, mpp: float | tuple[float, float] | None) -> str:
    """What stands in the column `made_with` for a prediction of this slide.

    Args:
        origin: Of `origin_of`.
        file: The slide.
        mpp: Scale that is given for all slides. One that only fills in does not count.

    Returns:
        Two hashes, of the model and of the slide, joined by a hyphen; the second is "-" if there is no file.
    """
    found, scale = fingerprint(file.path), file.scale(mpp)
    if found is None:
        return f"{origin}--"
    about = (found, None if isinstance(scale, IfUnknown) else scale)
    return f"{origin}-{hashlib.sha256(repr(about).encode()).hexdigest()[:DIGITS]}"


def finished(
    out: Path,
    classes: Sequence[str],
    origin: str,
    files: Mapping[str, SlideFile],
    mpp: float | tuple[float, float] | None,
) -> set[str]:
    """Slides that have a prediction of this model in a table; its folder is created.

    A slide whose file is gone stays finished; one whose file or scale has changed is not.

    Args:
        out: The table, which need not exist.
        classes: Classes that it must have.
        origin: Of `origin_of`.
        files: The slides by name.
        mpp: Scale that is given for all slides.

    Raises:
        CheckpointError: The file is no such table, or holds predictions of another model.
    """
    made = {
        name: str(row.get("made_with", "")) for name, row in rows_of(out, classes).items() if not row["error"]
    }
    if other := next((name for name, by in made.items() if not by.startswith(f"{origin}-")), None):
        raise CheckpointError(
            f"{out}: holds predictions of another model, or made with other options or an earlier version, "
            f"such as that of {other}; choose another file, or delete this one"
        )
    known = {name: made_with(origin, files[name], mpp) for name in made if name in files}
    return {name for name, by in made.items() if known.get(name, by) in (by, f"{origin}--")}


def table_of(
    out: Path, classes: Sequence[str], names: Sequence[str], failures: Mapping[str, str] | None = None
) -> "pd.DataFrame":
    """The rows of these slides in a table of predictions.

    Args:
        out: The table.
        classes: Its classes.
        names: The slides.
        failures: Reasons why slides are not in it, by name.

    Raises:
        CheckpointError: The file is no such table.
    """
    rows = rows_of(out, classes)
    rows |= {name: {"slide_id": name, "error": message} for name, message in (failures or {}).items()}
    return in_order(rows[name] for name in names)


def in_order(rows: Iterable[dict[str, Any]]) -> "pd.DataFrame":
    """Rows as a table, `error` last; counts are integers also if slides without counts are among them."""
    import pandas as pd

    table = pd.DataFrame(list(rows) or {"slide_id": [], "error": []})
    last = [name for name in ("made_with", "error") if name in table]
    table = table[[name for name in table if name not in last] + last]
    return table.astype({name: "Int64" for name in COUNTS if name in table})


def rows_of(out: Path, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Rows of an earlier run by slide_id; creates the folder of the table, so that errors come early.

    Args:
        out: The table, which need not exist.
        classes: Classes that it must have.

    Raises:
        CheckpointError: The file is no such table.
    """
    import pandas as pd

    if out.is_dir():
        raise CheckpointError(f"{out}: is a folder; name a CSV file in it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{out.parent}: cannot be a folder ({error.strerror}); choose another"
        ) from error
    remove_stale(out.parent)
    if not out.is_file():
        return {}
    try:
        table = _read_predictions(out)
    except (OSError, MemoryError, ValueError, pd.errors.ParserError) as error:
        damage = f"no table of predictions ({error}); choose another file"
        raise read_error(CheckpointError, out, error, damage) from error
    found = {name for name in table if name.startswith("p_")}
    if not {"slide_id", "error"} <= set(table) or found - {f"p_{name}" for name in classes}:
        raise CheckpointError(
            f"{out}: no table of predictions of {', '.join(classes)}, but of the columns "
            f"{', '.join(map(str, table))}; choose another file"
        )
    rows = table.fillna({"error": ""}).to_dict(orient="records")
    return {row["slide_id"]: {key: value for key, value in row.items() if not pd.isna(value)} for row in rows}


def _read_predictions(path: Path) -> "pd.DataFrame":
    import pandas as pd

    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    return pd.read_csv(
        path,
        dtype={"slide_id": str, "label": str, "made_with": str, "error": str},
        keep_default_na=False,  # a slide or a class may be called "NA"
        na_values=[""],
        float_precision="round_trip",
    )
