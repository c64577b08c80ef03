"""Show what `make gpu` measured in the README, between the two `gpu` markers.

    python tools/publish_gpu.py

A test holds the README against the files in `benchmarks/results/gpu`.
"""

from collections.abc import Mapping
from pathlib import Path

from hdmil_lib.reproduce.gpu_results import (
    NOT_MEASURED,
    Result,
    operator_table,
    prediction_table,
    read_gpu_results,
    training_table,
)
from hdmil_lib.reproduce.tables import to_markdown

REPOSITORY = Path(__file__).resolve().parent.parent
README = REPOSITORY / "README.md"
FOLDER = REPOSITORY / "benchmarks" / "results" / "gpu"
BEGIN, END = "<!-- gpu: begin -->\n", "<!-- gpu: end -->\n"

UNMEASURED = """**GPU: not measured.** `make gpu` fills this table, and those of training and prediction, on a
machine with a GPU, in about eight minutes.

"""
OPERATORS = """**{device}**, {day}, with torch {torch} and Triton {triton}
([all figures](benchmarks/results/gpu)). Tests on it: {passed} passed, {failed} failed, {skipped} skipped.
Operators, in 16 bits where they have them: how long a call takes, in which the host launches the kernels,
and how long the GPU is busy with them, against the roof of a copy and of matrix products in the same run
({roof}).{note}

"""
TRAINING = """Training in bf16 on {bags} random features, one bag a step; memory besides that of the bags.

"""
PREDICTION = """From the file of a slide to the answer, per tile of the slide, read or not ({slide}).

"""


def section(result: Result) -> str:
    """The part of the README about one device."""
    operators, training, prediction = (
        result.get(name, {}) for name in ("operators", "training", "prediction")
    )
    peaks = operators.get("roof", {"copy_gb_s": 0, "matrix_tflop_s": {}})
    rates = [f"{rate:,.0f} TFLOP/s in {name}" for name, rate in peaks["matrix_tflop_s"].items()]
    roof = ", ".join([f"{peaks['copy_gb_s']:,.0f} GB/s", *rates]) if rates else NOT_MEASURED
    intro = OPERATORS.format(
        device=f"{result['device']}{', a quick run' if result['quick'] else ''}",
        day=result["date"][:10],
        torch=result["torch"],
        triton=result["triton"],
        roof=roof,
        note=f" {result['note']}" if "note" in result else "",
        **{key: result["tests"][key] for key in ("passed", "failed", "skipped")},
    )
    parts = [intro + to_markdown(operator_table(result))]
    if "bags" in training:
        bags = training["bags"]["paper"]
        parts.append(TRAINING.format(bags=bags) + to_markdown(training_table(result)))
    if "slide" in prediction:
        slide = prediction["slide"]
        parts.append(PREDICTION.format(slide=slide) + to_markdown(prediction_table(result)))
    return "\n".join(parts)


def render(results: Mapping[str, Result]) -> str:
    """The part of the README between the markers.

    Args:
        results: Results by device, from `read_gpu_results`.
    """
    if not results:
        return UNMEASURED + to_markdown(operator_table(None))
    return "\n".join(map(section, results.values()))


def readme_with(text: str) -> str:
    """The README with this text between its markers."""
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    return before + BEGIN + text + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(readme_with(render(read_gpu_results(FOLDER))), encoding="utf-8")
