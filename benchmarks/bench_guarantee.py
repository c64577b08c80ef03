"""How few tiles may be read, with a guarantee? Rules learned on held-out slides, then tried on others.

    python benchmarks/bench_guarantee.py [--timed N]

The networks are those of the best fold of the cross-validation on camelyon-mini (synthetic; trained where
they are not yet). 150 further slides, five times as large, are drawn and encoded once. On the first 105 of
them LIPN's thresholds, and the margin at which anytime prediction stops, are learned so that at most a share
epsilon of all slides gets another label than from all tiles, with confidence 90 %; on the other 45 the rules
are tried. On some of these 45 the seconds of all ways are measured, in turns, reading and encoding overlapped
as in use. Everything goes to `benchmarks/results/guarantee.json`.
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from held_out import METHODS, held_out_cohort, trained_models
from tqdm import tqdm

from hdmil_lib.bags import Bag
from hdmil_lib.config import setup
from hdmil_lib.evaluation.metrics import auc
from hdmil_lib.inference.rules import MARGINS, LearnedRule, learn_margin, learn_thresholds
from hdmil_lib.models import HDMIL

RESULTS = Path(__file__).resolve().parent / "results" / "guarantee.json"
N_LEARN, DELTA, EPSILONS = 105, 0.1, (0.02, 0.05, 0.1)


def described(rule: LearnedRule, tried: LearnedRule) -> dict[str, Any]:
    """A rule, the candidates that it was chosen from, and how all of them do on other slides."""
    control, index = rule.control, rule.control.index
    return {
        "outcome": str(control),
        "value": None if rule.value == math.inf else rule.value,
        "share of tiles read": round(rule.keep_ratio, 4),
        "errors": None if index is None else int(control.errors[index]),
        "on other slides": None
        if index is None
        else {
            "share of tiles read": round(float(tried.control.costs[index]), 4),
            "errors": int(tried.control.errors[index]),
        },
        "candidates": {
            "share of tiles read": control.costs.round(4).tolist(),
            "errors": control.errors.tolist(),
            "upper bounds": control.upper_bounds.round(4).tolist(),
            "certified": control.certified.tolist(),
            "errors on other slides": tried.control.errors.tolist(),
        },
    }


def learn(model: HDMIL, bags: Sequence[Bag], labels: np.ndarray) -> dict[str, Any]:
    """Thresholds and margins of one model, for every epsilon, and for missed positives."""
    trajectories = [model.trajectory(bag) for bag in bags]
    first, rest = slice(N_LEARN), slice(N_LEARN, None)
    tried = learn_thresholds(model, bags[rest]), learn_margin(trajectories[rest])
    result = {}
    for epsilon in EPSILONS:
        options = {"epsilon": epsilon, "delta": DELTA}
        rules = (
            learn_thresholds(model, bags[first], **options),
            learn_margin(trajectories[first], **options),
        )
        thresholds, margin = map(described, rules, tried)
        result[f"epsilon {epsilon}"] = {"thresholds": thresholds, "margin": margin}
    said = np.stack([t.probabilities[-1] for t in trajectories])
    positive = np.flatnonzero(labels[first] == 1)
    missed = learn_margin(
        [trajectories[i] for i in positive], labels=[1] * len(positive), epsilon=0.1, delta=DELTA
    )
    result["missed positives, epsilon 0.1"] = str(missed.control)
    result["AUC of all tiles, all slides"] = round(100 * auc(labels, said), 1)
    return result


def seconds_of(model: HDMIL, paths: Sequence[Path], result: dict[str, Any]) -> dict[str, Any]:
    """Seconds per slide of all tiles, of the learned thresholds and of the learned margin, in turns."""
    rules = result["epsilon 0.05"]
    screened = model.with_rules(thresholds=rules["thresholds"]["value"])
    margin = rules["margin"]["value"] or math.inf

    def anytime(path: Path) -> tuple[int, int]:
        *_, last = model.stream(path, margin=margin)
        return int(last.probabilities.argmax()), len(last.rows)

    def predict(path: Path, model: HDMIL, all_tiles: bool) -> tuple[int, int]:
        prediction = model.predict(path, all_tiles=all_tiles)
        return int(prediction.probabilities.argmax()), prediction.n_read

    ways = {
        "HDMIL†": lambda path: predict(path, model, True),
        "HDMIL, learned thresholds": lambda path: predict(path, screened, False),
        "anytime, learned margin": anytime,
    }
    model.encoder(np.zeros((1, 256, 256, 3), np.uint8))
    spent, read, labels = ({name: [] for name in ways} for _ in range(3))
    for turn, path in enumerate(tqdm(paths, desc="timing")):
        path.read_bytes()  # all find it in the file cache
        for name in ways if turn % 2 == 0 else reversed(ways):
            start = time.perf_counter()
            label, n_read = ways[name](path)
            spent[name].append(time.perf_counter() - start)
            read[name].append(n_read)
            labels[name].append(label)
    every = np.array(spent["HDMIL†"])
    return {
        name: {
            "seconds per slide": round(float(np.mean(spent[name])), 2),
            "tiles read": round(float(np.mean(read[name])), 1),
            "times faster than all tiles": round(float(every.sum() / np.sum(spent[name])), 2),
            "other labels": int(np.sum(np.array(labels[name]) != labels["HDMIL†"])),
        }
        for name in ways
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--timed", type=int, default=20, help="slides whose seconds are measured")
    args = parser.parse_args()
    setup()
    cohort, by_id = held_out_cohort()
    bags, labels = [by_id[s] for s in cohort.slide_ids], cohort.labels
    networks = trained_models()
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "slides": {"learned on": N_LEARN, "tried on": len(bags) - N_LEARN, "with tumor": int(labels.sum())},
        "tiles per slide": round(float(np.mean([len(bag) for bag in bags])), 1),
        "delta": DELTA,
        "margins": [None, *MARGINS[1:]],
        "rules": {METHODS[name]: learn(p, bags, labels) for name, p in networks.items()},
    }
    paths = [cohort.slide_path(s) for s in cohort.slide_ids[N_LEARN:][: args.timed]]
    result["timed slides"] = len(paths)
    result["encoder"] = f"{networks['hdmil'].encoder!r}"
    result["load_average"] = round(os.getloadavg()[1], 1)
    name = "hdmil_evidence"
    result["seconds"] = {METHODS[name]: seconds_of(networks[name], paths, result["rules"][METHODS[name]])}
    print(json.dumps(result["seconds"], indent=1, ensure_ascii=False))
    RESULTS.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
