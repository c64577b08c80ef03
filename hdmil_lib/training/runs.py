"""What a folder of training runs holds: one row per epoch, and choices made on validation slides alone."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from hdmil_lib.errors import CheckpointError
from hdmil_lib.storage import read_json, write_whole


def runs_table(out_dir: str | Path) -> pd.DataFrame:
    """Every finished run of a cross-validation, one row per epoch.

    Args:
        out_dir: Folder of `cross_validate`.

    Returns:
        `method`, `fold`, `epoch`; losses and scores as `fit` names them; `seed`, `model`,
        `configuration` (JSON text: settings of the network, of training and of the loss), `commit` of the
        code, `changed` (whether files differed from it), and `seconds` of the whole run.

    Raises:
        CheckpointError: No run in this folder is finished, or a file is damaged.
    """
    tables = []
    for path in sorted(Path(out_dir).glob("*/fold*/history.csv")):
        folder = path.parent
        if not (folder / "provenance.json").is_file():
            continue
        config, provenance = (read_json(folder / f"{name}.json") for name in ("config", "provenance"))
        network = read_json(folder / "model.json") if (folder / "model.json").is_file() else None
        table = pd.read_csv(path, float_precision="round_trip")
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
    """Write `runs_table` as `runs.parquet` in the same folder."""
    path = Path(out_dir) / "runs.parquet"
    table = runs_table(out_dir)
    write_whole(path, lambda temporary: table.to_parquet(temporary, index=False))
    return path


def chosen_by_validation(
    predictions: pd.DataFrame, runs: pd.DataFrame, candidates: Sequence[str], name: str
) -> pd.DataFrame:
    """Test predictions of the best of several methods, chosen anew on each fold's validation slides.

    The inner loop of nested cross-validation: of the candidates, the one whose best epoch has the lowest
    validation loss answers for the fold's test slides, which had no say in it.

    Args:
        predictions: Predictions of `cross_validate`, with all candidates.
        runs: What `runs_table` says of the same folder.
        candidates: Names of methods.
        name: What the choice is called in the column `method`.

    Returns:
        Rows as in `predictions`, and a column `chosen` that names the candidate.

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
