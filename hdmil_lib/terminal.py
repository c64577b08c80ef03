"""What the commands print on the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hdmil_lib.errors import HDMILError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from hdmil_lib.inference.prediction import Prediction
    from hdmil_lib.models import HDMIL
    from hdmil_lib.progress import Progress


def print_report(report: "pd.DataFrame") -> int:
    """Print the number of slides of each status and the errors; return the number of slides that failed.

    Args:
        report: One row per slide: slide_id, status ("done", "skipped" or "failed"), n_tiles, error.
    """
    for status, rows in report.groupby("status", sort=False):
        typer.echo(f"{status}: {len(rows)} slides, {int(rows['n_tiles'].sum()):,} tiles")
    failed = report[report["status"] == "failed"]
    for slide_id, error in zip(failed["slide_id"], failed["error"], strict=True):
        print_error(f"{slide_id}: {error}")
    return len(failed)


def print_table(table: "pd.DataFrame", out: Path) -> None:
    """Say how many slides were predicted into a table, and what failed; then exit with 1."""
    failed = table[table["error"] != ""]
    typer.echo(f"{out}: {len(table) - len(failed)} of {len(table)} slides predicted")
    for slide_id, error in zip(failed["slide_id"], failed["error"], strict=True):
        print_error(f"{slide_id}: {error}")
    if len(failed):
        raise typer.Exit(1)


def predict_anytime(model: "HDMIL", slide: Path, **options: Any) -> None:
    """Predict one slide until it is certain or a budget is spent, and print the answer."""
    from tqdm.auto import tqdm

    try:
        steps = model.stream(slide, **options)
    except ValueError as error:
        raise HDMILError(str(error)) from error
    with tqdm(unit="tile", leave=False) as bar:
        for step in steps:
            bar.total = step.n_tiles
            bar.update(len(step.rows) - bar.n)
    print_answer(slide, model.classes, step.probabilities)
    n_read = len(step.rows) - len(step.broken)
    typer.echo(f"tiles    {n_read:,} of {step.n_tiles:,} read, then stopped: {step.end}")
    if len(step.broken):
        typer.echo(f"damaged  {len(step.broken):,} tiles could not be read and were ignored")
    print_seconds(step.seconds)


def write_heatmap(prediction: "Prediction", path: Path) -> None:
    """Write a picture of a prediction, without a window in any environment, or an OME-TIFF."""
    from hdmil_lib.viz.heatmap import SUFFIXES

    if path.name.endswith(SUFFIXES):
        prediction.to_ome_tiff(path)
        return
    import matplotlib

    from hdmil_lib.viz.style import use_style

    matplotlib.use("Agg")
    use_style()
    prediction.plot(path)


def printable(text: str) -> str:
    """Text in which control characters, which a terminal would obey, are written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_answer(slide: Path, classes: Sequence[str], probabilities: "np.ndarray") -> None:
    """Print the name of a slide and its classes by falling probability, (C,)."""
    order = probabilities.argsort()[::-1]
    ranked = ", ".join(f"{classes[c]} {probabilities[c]:.3f}" for c in order)
    typer.echo(printable(f"slide    {slide.stem}"))
    typer.echo(printable(f"class    {classes[order[0]]} ({ranked})"))


def print_seconds(seconds: dict[str, float]) -> None:
    """Print the seconds of each stage in one line."""
    typer.echo("seconds  " + ", ".join(f"{stage} {spent:.2f}" for stage, spent in seconds.items()))


def print_progress(out: Path, progress: "Progress") -> None:
    """Print the counts of a run, a line per process, and what failed."""
    counts = progress.slides["status"].value_counts()
    order = ("done", "running", "waiting", "interrupted", "failed")
    shown = ", ".join(f"{counts[name]} {name}" for name in order if name in counts)
    typer.echo(f"{out}: {len(progress.slides)} slides: {shown}")
    if len(progress.processes):
        typer.echo(progress.processes.rename(columns={"tiles_per_second": "tiles/s"}).to_string(index=False))
    for slide in progress.slides[progress.slides["status"].isin(["interrupted", "failed"])].itertuples():
        print_error(f"{slide.slide_id}: {slide.status}: {slide.error}")


def print_error(message: str) -> None:
    """Print an error as one red line on stderr."""
    typer.secho(f"error: {printable(' '.join(message.split()))}", fg=typer.colors.RED, err=True)
