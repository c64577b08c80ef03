"""Training on a GPU: bags per second of every model, with kernels and with formulas."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu.operators import describe

from hdmil_lib.bags import Bag
from hdmil_lib.batches import BagBatch, BagDataset
from hdmil_lib.kernels.dispatch import default_backend
from hdmil_lib.models import MODELS, create_model
from hdmil_lib.training.fit import Classification, TrainSettings, make_optimizer, train_step
from hdmil_lib.training.recipes import Recipe, published_recipe, recipe_for, small_recipe

WARM_UP = 12  # steps, of bags of different lengths, after which the memory that they need is at hand
BACKENDS, PRECISIONS = ("triton", "torch"), ("bf16", "fp32")


@dataclass(frozen=True)
class Cohort:
    """Random bags, and the recipe that is meant for a cohort like theirs.

    Attributes:
        name: Name in the results.
        bags: Number of bags in memory.
        tiles: Tiles per bag; lengths lie up to a fifth above and below.
        dim: Width of the features.
        batch_size: Bags per step.
        recipe: Settings of the models and of their training.
    """

    name: str
    bags: int
    tiles: int
    dim: int
    batch_size: int
    recipe: Recipe


PAPER = Cohort("paper", bags=64, tiles=10_000, dim=1024, batch_size=1, recipe=recipe_for(1000, 1024))
SMALL = Cohort("small", bags=8, tiles=150, dim=320, batch_size=8, recipe=recipe_for(200, 320))
NARROW = small_recipe(published_recipe(), embed_dim=16)
TINY = Cohort("tiny", bags=2, tiles=6, dim=8, batch_size=1, recipe=NARROW)
"""Bags for Triton's interpreter."""


def make_data(cohort: Cohort, device: torch.device) -> BagDataset:
    """Random bags with alternating labels; they share their numbers, shifted, since drawing takes long."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(int(0.8 * cohort.tiles), int(1.2 * cohort.tiles), cohort.bags, endpoint=True)
    shape = (int(lengths.max()) + cohort.bags, cohort.dim)
    numbers = rng.standard_normal(shape, np.float32).astype(np.float16)
    colors = rng.integers(0, 256, (len(numbers), 16, 16, 3), np.uint8)
    bags = {}
    for i, length in enumerate(map(int, lengths)):
        side = math.isqrt(length) + 1
        rowcol = np.stack(np.divmod(np.arange(length), side), 1)
        rows = slice(i, i + length)
        bags[f"s{i}"] = Bag(f"s{i}", numbers[rows], rowcol * 256, rowcol, (side, side), colors[rows])
    return BagDataset(bags, {f"s{i}": i % 2 for i in range(cohort.bags)}, device)


def measure(
    cohort: Cohort, device: torch.device, seconds: float, precisions: tuple[str, ...] = PRECISIONS
) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Functions that each measure one model in one way.

    Args:
        cohort: The bags.
        device: Where to train.
        seconds: Time of the timed steps; 0 to take a single step.
        precisions: Precisions to measure.
    """
    data = make_data(cohort, device)
    for precision in precisions:
        for backend in BACKENDS:
            for name in MODELS:
                yield partial(row, cohort, data, name, backend, precision, seconds)


def row(
    cohort: Cohort, data: BagDataset, name: str, backend: Any, precision: Any, seconds: float
) -> list[dict[str, Any]]:
    """The row of one model, with an `error` in place of figures if it fails."""
    found = {"cohort": cohort.name, "model": name, "backend": backend, "precision": precision}
    try:
        with default_backend(backend):
            found |= rate(cohort, data, name, precision, seconds)
    except Exception as error:  # any error concerns this row only
        found["error"] = describe(error)
    if data.device.type == "cuda":
        torch.cuda.empty_cache()
    return [found]


def rate(cohort: Cohort, data: BagDataset, name: str, precision: Any, seconds: float) -> dict[str, Any]:
    """Bags per second and peak memory of the steps of `fit`, with the recipe's settings for the model."""
    on_gpu = data.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    torch.manual_seed(0)
    model = create_model(name, cohort.dim, 2, **cohort.recipe.models.get(name, {})).to(data.device)
    settings = replace(cohort.recipe.training_of(name), precision=precision, batch_size=cohort.batch_size)
    if settings.standardize:
        model.standardize([data.batch(data.slide_ids[:1]).features])
    objective = Classification(model.train(), data)
    optimizer = make_optimizer(objective.param_groups(), settings)
    batches = _endless(data, objective, settings)

    def timed(n_steps: int) -> float:
        start, loss = time.perf_counter(), torch.zeros(())
        for _ in range(n_steps):
            loss = train_step(objective, optimizer, next(batches), settings)["loss"]
        last = float(loss)  # waits for the device
        if not math.isfinite(last):
            raise ValueError(f"the loss is {last}")
        return time.perf_counter() - start

    n_steps, taken = 1, timed(1)
    if (
        seconds
    ):  # the first step compiles, the next ones find memory, and one tells how many there is time for
        timed(WARM_UP)
        n_steps = max(3, min(500, int(seconds / timed(1))))
        taken = timed(n_steps)
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9 if on_gpu else None
    return {
        "bags_per_s": float(f"{n_steps * cohort.batch_size / taken:.4g}"),
        "steps": n_steps,
        "peak_gb_beside_bags": None if peak is None else round(peak, 3),
    }


def _endless(data: BagDataset, objective: Classification, settings: TrainSettings) -> Iterator[BagBatch]:
    """Batches of all bags, again and again."""
    size = settings.batch_size
    groups = [data.slide_ids[i : i + size] for i in range(0, len(data), size)]
    while True:
        yield from data.batches_of(groups, objective.inputs)
