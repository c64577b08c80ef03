"""What `make gpu` measured on GPUs, as tables; a cell says so where nothing was measured."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from hdmil_lib import kernels
from hdmil_lib.kernels.cost import Cost
from hdmil_lib.models import MODELS
from hdmil_lib.reproduce.timing import STAGES

NOT_MEASURED, FAILED = "not measured", "failed"

WIDTHS = ("bfloat16", "float16", "uint8", "float32")
"""Types of numbers, the one that a table shows first."""

Result = Mapping[str, Any]


def read_gpu_results(folder: str | Path) -> dict[str, Result]:
    """Read the result files of a folder.

    Args:
        folder: Folder of `<device>.json` files that `benchmarks/bench_gpu.py` wrote; it need not exist.

    Returns:
        The results by the name of the device. A quick run is left out if there is a full one.
    """
    found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    return {result["device"]: result for result in sorted(found, key=lambda r: not r["quick"])}


def operator_table(result: Result | None) -> pd.DataFrame:
    """Milliseconds of each operator in its three forms on one GPU.

    Args:
        result: Results of a device; `None` if there are none.

    Returns:
        Text, indexed by operator, each at its first size, in 16 bits, forward and backward where it has both:
        `size`, `pass`; milliseconds of a call of the `formula`, the formula `compiled` and the `kernel`, in
        which the host launches them; milliseconds in which the GPU is busy, for formula and kernel, how many
        times faster the kernel is by these, and its share of the roof (100 % is as fast as a copy or a matrix
        product of the same device).
    """
    rows = {}
    for name in kernels.__all__:
        own = [row for row in _rows(result, "operators") if row["operator"] == name]
        own = _best(own, "dtype", WIDTHS)
        own = [row for row in own if row["size"] == own[0]["size"]]
        own = _best(own, "pass", ("forward and backward", "forward"))
        forms = {row["form"]: row for row in own}
        eager, kernel = forms.get("eager"), forms.get("triton")
        share = _figure(kernel, "share_of_roof", 100)
        rows[name] = {
            "size": f"{own[0]['size']}, {own[0]['dtype']}" if own else NOT_MEASURED,
            "pass": own[0]["pass"] if own else NOT_MEASURED,
            "call of the formula, ms": _figure(eager, "ms"),
            "compiled, ms": _figure(forms.get("compiled"), "ms"),
            "kernel, ms": _figure(kernel, "ms"),
            "GPU busy with the formula, ms": _figure(eager, "gpu_ms"),
            "GPU busy with the kernel, ms": _figure(kernel, "gpu_ms"),
            "times faster": _ratio(eager, kernel, "gpu_ms"),
            "of the roof": share if share in (NOT_MEASURED, FAILED) else f"{share} %",
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("operator")


def operator_box(
    results: Mapping[str, Result], operator: str, size: str, bound: Cost, *, step: str = "forward"
) -> pd.DataFrame:
    """One operator on a GPU: the bytes of its formula and of its fused form, and what was measured.

    Args:
        results: Results of `read_gpu_results`.
        operator: Name of the operator in `hdmil_lib.kernels`.
        size: Size as in the results.
        bound: Its calculated cost at this size.
        step: "forward" or "forward and backward".

    Returns:
        Text with the columns `formula` and `kernel`: megabytes moved (calculated), and for each device with
        results the milliseconds in which the GPU is busy, those of a whole call, and the number of launches.
        A device without this operator, and the absence of devices, read "not measured".
    """
    moved = [_short(n / 1e6) for n in (bound.eager_bytes, bound.fused_bytes)]
    table = {"MB moved, calculated": moved}
    devices: Mapping[str, Result | None] = results or {"a GPU": None}
    for device, result in devices.items():
        wanted = (operator, size, step)
        own = [r for r in _rows(result, "operators") if (r["operator"], r["size"], r["pass"]) == wanted]
        forms = {row["form"]: row for row in _best(own, "dtype", WIDTHS)}
        pair = forms.get("eager"), forms.get("triton")
        for key, name in (("gpu_ms", "GPU busy, ms"), ("ms", "whole call, ms"), ("launches", "launches")):
            table[f"{name}, {device}"] = [_figure(row, key) for row in pair]
    return pd.DataFrame.from_dict(table, orient="index", columns=["formula", "kernel"])


def training_table(result: Result | None, *, precision: str = "bf16", cohort: str = "paper") -> pd.DataFrame:
    """Bags per second of a training step of each model on one GPU, with kernels and with formulas.

    Args:
        result: Results of a device; `None` if there are none.
        precision: "bf16" or "fp32".
        cohort: "paper" for bags of about 10,000 tiles with 1,024 features, "small" for 150 tiles with 320.

    Returns:
        Text, indexed by model: bags per second with `kernels` and `formulas`, how many times faster the
        former are, and the peak memory of both in GB, besides that of the bags.
    """
    rows = {}
    for name in MODELS:
        own = {
            row["backend"]: row
            for row in _rows(result, "training")
            if (row["model"], row["precision"], row["cohort"]) == (name, precision, cohort)
        }
        kernel, formula = own.get("triton"), own.get("torch")
        rows[name] = {
            "kernels, bags/s": _figure(kernel, "bags_per_s"),
            "formulas, bags/s": _figure(formula, "bags_per_s"),
            "times faster": _ratio(kernel, formula, "bags_per_s"),
            "kernels, GB": _figure(kernel, "peak_gb_beside_bags"),
            "formulas, GB": _figure(formula, "peak_gb_beside_bags"),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def prediction_table(result: Result | None) -> pd.DataFrame:
    """Milliseconds per tile of a slide on one GPU, and the encoder alone.

    Args:
        result: Results of a device; `None` if there are none.

    Returns:
        Text, one row per method, precision of the encoder and decoder of the tiles: the encoder's tiles per
        second alone; per tile of the slide, read or not, milliseconds as in use, and of each stage when they
        do not overlap.
    """
    measured = _rows(result, "prediction")
    encoders = {row["precision"]: row for row in measured if row["what"] == "encoder"}
    slides: dict[tuple[str, str, str], Any] = {
        (what, precision, "cpu"): None for what in ("HDMIL†", "HDMIL") for precision in ("fp32", "bf16")
    }
    slides |= {(r["what"], r["precision"], r["decoder"]): r for r in measured if r["what"] != "encoder"}
    rows = {}
    for (what, precision, decoder), row in slides.items():
        stages = row.get("ms_per_tile_by_stage") if row else None
        rows[f"{what}, {precision}, decoder: {decoder}"] = {
            "encoder, tiles/s": _figure(encoders.get(precision), "tiles_per_s"),
            "ms per tile": _figure(row, "ms_per_tile"),
            **{stage: _figure(stages or row, stage) for stage in STAGES},
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def _rows(result: Result | None, part: str) -> list[dict[str, Any]]:
    return [] if result is None else result.get(part, {}).get("rows", [])


def _best(rows: list[dict[str, Any]], key: str, order: Iterable[str]) -> list[dict[str, Any]]:
    """The rows with the first of these values that any has."""
    found = {row[key] for row in rows}
    first = next((value for value in order if value in found), None)
    return [row for row in rows if row[key] == first]


def _figure(row: Result | None, key: str, factor: float = 1) -> str:
    """A number with three digits, or what became of it."""
    if row is None:
        return NOT_MEASURED
    if "error" in row:
        return FAILED
    value = row.get(key)
    return NOT_MEASURED if value is None else _short(factor * value)


def _ratio(above: Result | None, below: Result | None, key: str) -> str:
    figures = [_figure(row, key) for row in (above, below)]
    if above is None or below is None:
        return NOT_MEASURED
    if FAILED not in figures and NOT_MEASURED in figures:
        return NOT_MEASURED
    return FAILED if FAILED in figures else _short(above[key] / below[key])


def _short(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    text = f"{float(f'{value:.3g}'):,.6f}".rstrip("0").rstrip(".")
    return text or "0"
