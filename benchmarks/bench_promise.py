"""Is the promise of anytime prediction kept? Rules learned again and again from slides of a known population.

    python benchmarks/bench_promise.py --tiles DIR [--repeats 200] [--timed N]

A cascade is trained on slides composed of lymph-node tiles. Larger slides of the same test tiles, which
served for nothing else, are the population. Each repeat draws slides from it with replacement, as the theorem
assumes, and learns the margin at which reading stops, so that at most a share epsilon of the slides gets
another label than from all tiles, with confidence 90 %. The share of the whole population that does is then
known. The promise is broken if it is above epsilon, which may happen in 10 % of the repeats. The same is done
without what the model knows of how answers settle. On some slides the seconds are measured, in turns.
Everything goes to `benchmarks/results/promise.json`.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np

from hdmil_lib.config import setup
from hdmil_lib.encoders.loading import processor
from hdmil_lib.inference.anytime import Trajectory
from hdmil_lib.inference.risk import control_risk
from hdmil_lib.inference.rules import MARGINS, learn_margin
from hdmil_lib.models import HDMIL
from hdmil_lib.models.settling import neutral
from hdmil_lib.reproduce.recipes import RECIPES
from hdmil_lib.synthetic.composed import compose_cohort
from hdmil_lib.training.crossval import cross_validate

RESULTS = Path(__file__).resolve().parent / "results" / "promise.json"
SEED, SIDE, N_TRAINED = 2, 64, 480
N_DEVELOPED = 60
"""Slides on which the rule was developed, at the beginning of the held-out cohort; they are left out."""

HELD_OUT = {"n_slides": 540, "parts": ("test",), "first": 160, "fields": 34}
METHODS = ["hdmil_dagger", "hdmil_evidence", "hdmil_cascade"]
N_LEARN, DELTA, EPSILONS = 105, 0.1, (0.02, 0.05, 0.1)


def kept_promises(trajectories: list[Trajectory], epsilon: float, repeats: int) -> dict:
    """How often the promise is kept, and what the learned margins read."""
    rng, broken, shares, changed, read_all = np.random.default_rng(0), 0, [], [], 0
    errors = np.array([[t.probabilities[t.stop(m)].argmax() for m in MARGINS] for t in trajectories])
    errors = errors != np.array([t.probabilities[-1].argmax() for t in trajectories])[:, None]
    read = np.array([[t.n_read[t.stop(m)] / t.n_read[-1] for m in MARGINS] for t in trajectories])
    for _ in range(repeats):
        drawn = rng.integers(len(trajectories), size=N_LEARN)
        control = control_risk(errors[drawn], read[drawn].mean(0), epsilon=epsilon, delta=DELTA)
        read_all += control.index is None
        at = control.index or 0  # the first margin reads everything
        broken += bool(errors[:, at].mean() > epsilon)
        shares.append(read[:, at].mean())
        changed.append(errors[:, at].mean())
    return {
        "broken": round(broken / repeats, 4),
        "may be broken": DELTA,
        "nothing certified": round(read_all / repeats, 4),
        "share of tiles read": [round(float(v), 4) for v in np.quantile(shares, (0.5, 0.05, 0.95))],
        "labels changed": [round(float(v), 4) for v in np.quantile(changed, (0.5, 0.05, 0.95))],
    }


def seconds_of(model: HDMIL, paths: list[Path], margin: float) -> dict:
    """Seconds per slide from all tiles, by the cascade and by the margin, in turns."""

    def anytime(path: Path) -> tuple[int, int]:
        *_, last = model.stream(path, margin=margin)
        return int(last.probabilities.argmax()), len(last.rows)

    def predict(path: Path, all_tiles: bool) -> tuple[int, int]:
        prediction = model.predict(path, all_tiles=all_tiles)
        return int(prediction.probabilities.argmax()), prediction.n_read

    ways = {
        "HDMIL†": lambda path: predict(path, True),
        "cascade, 10 %": lambda path: predict(path, False),
        "anytime, learned margin": anytime,
    }
    found: dict[str, list] = {name: [] for name in ways}
    for turn, path in enumerate(paths):
        path.read_bytes()  # all find it in the file cache
        for name in ways if turn % 2 == 0 else reversed(ways):
            start = time.perf_counter()
            label, n_read = ways[name](path)
            found[name].append((time.perf_counter() - start, n_read, label))
    every = np.array([seconds for seconds, *_ in found["HDMIL†"]])
    labels = [label for *_, label in found["HDMIL†"]]
    return {
        name: {
            "seconds per slide": round(float(np.mean([seconds for seconds, *_ in rows])), 3),
            "tiles read": round(float(np.mean([n_read for _, n_read, _ in rows])), 1),
            "times faster": round(float(every.sum() / sum(seconds for seconds, *_ in rows)), 2),
            "other labels": int(sum(a != b for (*_, a), b in zip(rows, labels, strict=True))),
        }
        for name, rows in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=Path, help="folder of PatchCamelyon tiles; needed")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--timed", type=int, default=24, help="slides whose seconds are measured")
    given = parser.parse_args()
    if given.tiles is None:
        print("skipped: it needs the tiles of PatchCamelyon; see `hdmil fetch-tiles`")
        return
    setup()
    trained = compose_cohort(given.tiles, n_slides=N_TRAINED, seed=SEED, looks=[SIDE])
    cv = cross_validate(trained, METHODS, recipe=RECIPES["camelyon-pcam"], seed=0)
    model = cv.hdmil(0, "hdmil_cascade")
    population = compose_cohort(given.tiles, seed=SEED, looks=[SIDE], **HELD_OUT)
    slide_ids = population.slide_ids[N_DEVELOPED:]
    bags = population.load_bags()
    plain = model.with_rules()
    plain.settling.copy_(neutral(model.n_classes))
    trajectories, without = ([m.trajectory(bags[slide_id]) for slide_id in slide_ids] for m in (model, plain))
    first = learn_margin(trajectories[:N_LEARN], epsilon=0.05, delta=DELTA)
    result = {
        "device": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "population": len(trajectories),
        "tiles per slide": round(float(np.mean([t.n_read[-1] for t in trajectories])), 1),
        "learned on": N_LEARN,
        "repeats": given.repeats,
        "epsilon": {str(e): kept_promises(trajectories, e, given.repeats) for e in EPSILONS},
        "epsilon, without settling": {str(e): kept_promises(without, e, given.repeats) for e in EPSILONS},
        "margin of the first 105, epsilon 0.05": None if math.isinf(first.value) else first.value,
    }
    print(json.dumps(result, indent=1))
    if given.timed:
        paths = [population.slide_path(s) for s in slide_ids[-given.timed :]]
        result["timed slides"] = len(paths)
        result["seconds"] = seconds_of(model, paths, float(first.value))
        result["load average"] = round(os.getloadavg()[0], 1)
    RESULTS.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
