"""How much faster is the training engine than a plain loop, at equal validation AUC?

    python benchmarks/bench_training.py [--epochs N] [--models abmil dmin]

The plain loop takes one bag per step, in float32, from a list of tensors, fold after fold, in one process
with one torch thread. The engine is `cross_validate`: bags from memory in half precision, several per step
through the segment operators, folds side by side in two processes of one thread. Both train the same
networks on the same folds of `camelyon-mini` (synthetic) for the same number of epochs, by default the
longest that the recipe allows; the engine's seconds include starting its second process. The GEMM floor is
the time that the matrix products of all steps alone take at the rate of a large float32 product on as many
cores. Results go to `benchmarks/results/training.json`.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from hdmil_lib.batches import BagDataset
from hdmil_lib.cohort import make_splits
from hdmil_lib.config import setup
from hdmil_lib.evaluation.metrics import auc
from hdmil_lib.models import MILModel, create_model
from hdmil_lib.reproduce.recipes import RECIPES
from hdmil_lib.reproduce.tables import to_markdown
from hdmil_lib.splits import Split
from hdmil_lib.synthetic.cohorts import prepare_cohort
from hdmil_lib.training.crossval import cross_validate
from hdmil_lib.training.recipes import Recipe
from hdmil_lib.training.runs import runs_table

RESULTS = Path(__file__).resolve().parent / "results" / "training.json"
COHORT, FOLDS, WORKERS = "camelyon-mini", 5, 2
METHOD = {"abmil": "abmil_gated", "dmin": "hdmil_dagger"}
PLAIN_RATE = 5e-4  # one bag a step wants smaller steps than several; chosen on validation slides


def plain_loop(
    name: str, recipe: Recipe, splits: list[Split], bags: dict[str, torch.Tensor], labels: dict[str, int]
) -> list[float]:
    """The usual MIL training script; returns each fold's best validation AUC by validation loss."""
    best = []
    for split in tqdm(splits, desc=f"{name}, plain loop"):
        torch.manual_seed(0)
        model = create_model(name, next(iter(bags.values())).shape[1], 2, **recipe.models[name])
        model.standardize([bags[s] for s in split.train])
        optimizer = torch.optim.Adam(model.parameters(), lr=PLAIN_RATE, weight_decay=1e-5)
        classes = np.array([labels[s] for s in split.train])
        weights = torch.from_numpy(1 / np.bincount(classes)[classes])
        scores = []
        for _ in range(recipe.training.epochs):
            model.train()
            for i in torch.multinomial(weights, len(split.train), replacement=True).tolist():
                slide_id = split.train[i]
                terms = model.loss(model(bags[slide_id]), torch.tensor([labels[slide_id]]))
                loss = torch.as_tensor(sum(terms.values()))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            scores.append(validate(model.eval(), split, bags, labels))
        best.append(min(scores)[1])
    return best


@torch.inference_mode()
def validate(
    model: MILModel, split: Split, bags: dict[str, torch.Tensor], labels: dict[str, int]
) -> tuple[float, float]:
    """Validation loss and AUC."""
    logits = torch.cat([model(bags[s]).logits for s in split.val])
    truth = torch.tensor([labels[s] for s in split.val])
    return float(cross_entropy(logits, truth)), auc(truth.numpy(), logits.double().softmax(1).numpy())


def gemm_rate(cores: int) -> float:
    """Multiply-adds a second, times two, of a large float32 product on so many cores."""
    torch.set_num_threads(cores)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    torch.set_num_threads(1)
    return 2 * 2048**3 / float(np.median(times))


def flops(name: str, recipe: Recipe, data: BagDataset, slide_ids: list[str]) -> float:
    """Of the matrix products of one training step on these bags, forward and backward, a bag."""
    model = create_model(name, 320, 2, **recipe.models[name]).train()
    with FlopCounterMode(display=False) as counter:
        batch = data.batch(slide_ids)
        terms = model.loss(model(**batch.inputs_for(model)), batch.labels)
        torch.as_tensor(sum(terms.values())).backward()
    return counter.get_total_flops() / len(slide_ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=RECIPES[COHORT].training.epochs)
    parser.add_argument("--models", nargs="+", choices=METHOD, default=list(METHOD))
    arguments = parser.parse_args()
    setup()
    cohort = prepare_cohort(COHORT)
    bags = cohort.load_bags()
    splits, labels = make_splits(cohort, FOLDS, 0), cohort.label_of
    recipe = RECIPES[COHORT]
    training = replace(recipe.training, epochs=arguments.epochs, min_epochs=arguments.epochs)
    recipe = replace(recipe, training=training)
    features = {s: torch.from_numpy(bag.features).float() for s, bag in bags.items()}
    n_bags = arguments.epochs * sum(len(split.train) for split in splits)
    rate, rows = gemm_rate(WORKERS), {}
    for name in arguments.models:
        start = time.perf_counter()
        plain_aucs = plain_loop(name, recipe, splits, features, labels)
        plain = n_bags / (time.perf_counter() - start)
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            cross_validate(
                cohort,
                [METHOD[name]],
                folds=FOLDS,
                seed=0,
                recipe=recipe,
                out=folder,
                bags=bags,
                workers=WORKERS,
            )
            engine = n_bags / (time.perf_counter() - start)
            table = runs_table(folder)
        best = table.loc[table.groupby("fold")["val_loss"].idxmin()]
        work = flops(name, recipe, BagDataset(bags, labels), list(splits[0].train[:8]))
        rows[name] = {
            "plain loop, bags/s": round(plain, 1),
            "engine, bags/s": round(engine, 1),
            "ratio": round(engine / plain, 2),
            "share of GEMM floor": round(engine * work / rate, 3),
            "plain loop, val AUC": round(float(np.mean(plain_aucs)), 4),
            "engine, val AUC": round(float(best["val_auc"].mean()), 4),
            "val AUC, sd over folds": round(float(best["val_auc"].std()), 4),
        }
        print(name, rows[name], flush=True)
    result = {
        "cohort": f"{COHORT} (synthetic), {len(cohort)} bags",
        "device": f"{platform.machine()} CPU, {WORKERS} cores",
        "torch": torch.__version__,
        "load_average": round(os.getloadavg()[0], 1),
        "epochs": arguments.epochs,
        "folds": FOLDS,
        "training": asdict(training),
        "plain_learning_rate": PLAIN_RATE,
        "models": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(to_markdown(pd.DataFrame(rows).T))


if __name__ == "__main__":
    main()
