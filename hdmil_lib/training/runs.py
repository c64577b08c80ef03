"""The training runs of a cross-validation as a table, and choices made on validation slides only."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from hdmil_lib.errors import CheckpointError
from hdmil_lib.storage import read_json, write_whole
from hdmil_lib.training.records import REMEDY, read_rows


def runs_table(out_dir: str | Path) -> pd.DataFrame:
    """All finished runs of a cross-validation, one row per epoch.

    Args:
        out_dir: Folder of `cross_validate`.

    Returns:
        `method`, `fold`, the columns of `fit`, `seed`, `model`, `configuration` (settings of the network, of
        training and of the loss as JSON), `commit` of the code, `changed` (whether files differed from it),
        and `seconds` of the whole run.

    Raises:
        CheckpointError: No run in this folder is finished, or a file is damaged.
    """
    tables = []
    for path in sorted(Path(out_dir).glob("*/fold*/history.csv")):
        folder = path.parent
        if not (folder / "provenance.json").is_file():
            continue
        if missing := {"settings", "model"} - set(read_json(folder / "config.json")):
            raise CheckpointError(f"{folder}/config.json: lacks {min(missing)}; {REMEDY}")
        config, provenance = (read_json(folder / f"{name}.json") for name in ("config", "provenance"))
        network = read_json(folder / "model.json") if (folder / "model.json").is_file() else None
        table = read_rows(path, ["epoch", "val_loss"], float_precision="round_trip")
        table.insert(0, "method", folder.parent.name)
        table.insert(1, "fold", int(folder.name.removeprefix("fold")))
        shown = {"network": network, "settings": config["settings"], "loss": config.get("loss")}
        table = table.assign(
            seed=config["settings"]["seed"],
            model=config["model"],
            configuration=pd.Series(shown).to_json(),
            **provenance,
        )
        tables.append(table)
    if not tables:
        raise CheckpointError(f"{out_dir}: no finished run; train first")
    return pd.concat(tables, ignore_index=True)


def save_runs(out_dir: str | Path) -> Path:
    """Write `runs_table` as `runs.parquet` to the same folder."""
    path = Path(out_dir) / "runs.parquet"
    table = runs_table(out_dir)
    write_whole(path, lambda temporary: table.to_parquet(temporary, index=False))
    return path


def chosen_by_validation(
    predictions: pd.DataFrame, runs: pd.DataFrame, candidates: Sequence[str], name: str
) -> pd.DataFrame:
    """Test predictions of the best of several methods, chosen separately on each fold's validation slides.

    In each fold the candidate with the lowest validation loss of its best epoch is chosen, without using the
    test slides, as in the inner loop of nested cross-validation.

    Args:
        predictions: Predictions of `cross_validate`, with all candidates.
        runs: `runs_table` of the same folder.
        candidates: Names of methods.
        name: Name of the choice in the column `method`.

    Returns:
        Rows as in `predictions`, with a column `chosen` that names the candidate.

    Raises:
        ValueError: A candidate has no run or no predictions.
    """
    losses = runs[runs["method"].isin(candidates)].groupby(["fold", "method"])["val_loss"].min().unstack()
    absent = set(candidates) - (set(losses.dropna(axis=1)) & set(predictions["method"]))
    if absent:
        raise ValueError(f"candidates {', '.join(sorted(absent))} were not run on every fold")
    best = losses.idxmin(axis=1)
    rows = predictions[predictions["method"] == predictions["fold"].map(best)]
    return rows.assign(chosen=rows["method"], method=name).reset_index(drop=True)
