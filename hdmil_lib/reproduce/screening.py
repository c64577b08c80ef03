"""What a look at every tile costs, and what it finds: AUC against milliseconds, by the benchmarks."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

SCREENS = {
    "random": ("random", None),
    "LIPN, masks as published": ("LIPN", None),
    "LIPN, evidence": ("LIPN, evidence", None),
    "look, 4 um/px": ("look at 4 µm/px", "4 um/px"),
    "look, 2 um/px": ("look at 2 µm/px", "2 um/px"),
    "look, 1 um/px": ("look at 1 µm/px", "1 um/px"),
}
"""Names in `second_look.json`, in figures, and in `looks.json`."""

COARSE, WHOLE = "8 um/px, LIPN", "0.5 um/px, in full"


def costs_of_looks(results: str | Path) -> dict[str, float]:
    """Milliseconds per tile of each way to look at it, reading included, as `bench_looks.py` measured them.

    Args:
        results: Folder `benchmarks/results`.
    """
    spent = json.loads((Path(results) / "looks.json").read_text())["milliseconds per tile"]
    return {name: sum(stages.values()) for name, stages in spent.items()}


def cost_table(results: str | Path, cohort: str = "composed, lymph node") -> pd.DataFrame:
    """AUC and cost of all ways to choose tiles, as `second_look.py` and `bench_looks.py` measured them.

    Args:
        results: Folder `benchmarks/results`.
        cohort: Name of the cohort in `second_look.json`.

    Returns:
        Columns `source`, `keep_ratio`, `auc` (mean over seeds) and `milliseconds` per tile of the slide: a
        look at all of them, and the reading of some in full.
    """
    found = json.loads((Path(results) / "second_look.json").read_text())[cohort]["sources"]
    cost, rows = costs_of_looks(results), []
    for name, (source, look) in SCREENS.items():
        screening = 0.0 if source == "random" else cost[COARSE] + (cost[look] if look else 0.0)
        for ratio, scores in found[name].items():
            rows.append(
                {
                    "source": source,
                    "keep_ratio": float(ratio),
                    "auc": float(np.mean(scores["auc by seed"])),
                    "milliseconds": screening + float(ratio) * cost[WHOLE],
                }
            )
    return pd.DataFrame(rows)
