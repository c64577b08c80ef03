"""The command line `hdmil`: samples, extract, train, calibrate, predict, encoders; thin over the library."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from hdmil_lib.errors import CohortError, HDMILError, SlideError

if TYPE_CHECKING:
    import numpy as np

    from hdmil_lib.inference import Prediction, Predictor
    from hdmil_lib.training.recipes import Recipe

SLIDE_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".svslide", ".vms", ".bif", ".dcm")
"""Files in a folder that are taken for slides."""

PICTURE_SUFFIXES = (".png", ".jpg", ".pdf", ".svg")


class _OneLineErrors(TyperGroup):
    """Prints what the user can mend as one red line on stderr, without a traceback, and exits with 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (HDMILError, OSError) as error:
            typer.secho(f"error: {' '.join(str(error).split())}", fg=typer.colors.RED, err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_OneLineErrors,
    help="HDMIL: fast and accurate classification of gigapixel pathology slides.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def samples(
    cohort: Annotated[str, typer.Option(help="camelyon-mini, nsclc-mini or brca-mini.")] = "camelyon-mini",
    fast: Annotated[bool, typer.Option("--fast", help="A few slides only.")] = False,
) -> None:
    """Prepare a synthetic cohort, slides and bags, in the cache; and the real sample slide."""
    from hdmil_lib.config import is_fast, setup
    from hdmil_lib.data import prepare_cohort, sample_slide

    setup()
    prepared = prepare_cohort(cohort, fast=fast or is_fast())
    typer.echo(f"{cohort} (synthetic): {len(prepared)} slides, {' / '.join(prepared.classes)}")
    typer.echo(f"  labels  {prepared.root / 'cohort.csv'}")
    typer.echo(f"  bags    {prepared.bag_dir}")
    typer.echo(f"real slide: {sample_slide()}")


@app.command()
def extract(
    slides: Annotated[
        list[Path], typer.Argument(help="Slide files, folders, or a CSV with a column `path`.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the bags, one <slide>.h5 each.")],
    encoder: Annotated[str, typer.Option(help="See `hdmil encoders`.")] = "efficientnet_lite0",
    mpp: Annotated[
        float | None, typer.Option(help="um per level-0 pixel, for slides that do not say.")
    ] = None,
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "int8"],
        typer.Option(help="int8 is the fastest on a CPU; it is fitted to tiles of the first eight slides."),
    ] = "auto",
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Compile the encoder first; for a GPU and many slides.")
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Tiles an encoder call; by default what suits the machine.")
    ] = None,
) -> None:
    """Turn slides into bags of features; skips what is done, and goes on when a slide fails."""
    from hdmil_lib.config import setup
    from hdmil_lib.features.encoders import load_encoder
    from hdmil_lib.features.extraction import calibration_tiles, extract_slides

    setup()
    paths = _slide_paths(slides)
    options = {"precision": precision, "compiled": compiled}
    if precision == "int8":
        options["calibration"] = calibration_tiles(paths[:8], mpp=mpp)
    report = extract_slides(paths, load_encoder(encoder, **options), out, mpp=mpp, batch_size=batch_size)
    failed = report[report["status"] == "failed"]
    for status, rows in report.groupby("status", sort=False):
        typer.echo(f"{status}: {len(rows)} slides, {int(rows['n_tiles'].sum()):,} tiles")
    for error in failed["error"]:
        typer.secho(f"error: {' '.join(error.split())}", fg=typer.colors.RED, err=True)
    if len(failed):
        raise typer.Exit(1)


@app.command()
def train(
    cohort: Annotated[Path, typer.Option(help="CSV with slide_id, case_id and label.")],
    bags: Annotated[Path, typer.Option(help="Folder that `hdmil extract` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder of the model, its test scores and all runs.")],
    folds: Annotated[int, typer.Option(help="Cross-validation folds, three or more.")] = 5,
    compare: Annotated[
        list[str],
        typer.Option(help="A further method, such as abmil, clam_mb, random."),
    ] = [],  # noqa: B006
    preset: Annotated[
        str, typer.Option(help="Settings: camelyon16, nsclc, brca, or camelyon-mini and so on.")
    ] = "camelyon-mini",
    epochs: Annotated[int | None, typer.Option(min=1, help="At most; default: the preset's.")] = None,
    seed: Annotated[int, typer.Option(help="Of folds, weights and order.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
) -> None:
    """Cross-validate, and write the model of one fold to OUT for `hdmil predict`.

    The model kept is that of the fold whose networks reached the lowest validation loss; the scores
    printed are of test slides that the networks of their fold never saw. Training resumes where it was
    interrupted.
    """
    from hdmil_lib.config import setup
    from hdmil_lib.data import Cohort, load_bags
    from hdmil_lib.evaluation.tables import save_table, table1, to_markdown
    from hdmil_lib.inference import Predictor, best_fold
    from hdmil_lib.training.crossval import run_crossval

    setup(seed)
    recipe = _recipe(preset, epochs)
    labeled = Cohort.from_csv(cohort, bag_dir=bags)
    loaded = load_bags(labeled)
    methods = list(dict.fromkeys([*compare, "hdmil_dagger", "hdmil"]))
    runs = out / "runs"
    predictions = run_crossval(labeled, loaded, methods, folds, seed, recipe, runs, workers=workers)
    scores = table1(predictions)[["AUC", "ACC", "tiles read"]]
    save_table(scores, out / "scores")
    fold = best_fold(runs)
    Predictor.from_fold(runs, fold, labeled.classes, next(iter(loaded.values()))).save(out)
    typer.echo(to_markdown(scores))
    typer.echo(f"{out}: model of fold {fold}, for `hdmil predict SLIDE --model {out}`")


@app.command()
def calibrate(
    model: Annotated[Path, typer.Option(help="Folder that `hdmil train` wrote; its rules are replaced.")],
    cohort: Annotated[Path, typer.Option(help="CSV of held-out slides: slide_id, case_id and label.")],
    bags: Annotated[Path, typer.Option(help="Folder that `hdmil extract` wrote of them.")],
    epsilon: Annotated[float, typer.Option(help="Share of slides that may get another label.")] = 0.05,
    delta: Annotated[float, typer.Option(help="Probability that a rule errs on more.")] = 0.1,
) -> None:
    """Learn how few tiles the model needs, on slides that served for nothing else.

    LIPN's thresholds, and the margin for `hdmil predict --anytime`, become the fastest with which at most a
    share epsilon of all slides gets another label than from all tiles, with confidence 1 - delta for each of
    the two. One slide of each case is used.
    """
    from hdmil_lib.config import setup
    from hdmil_lib.data import Cohort, load_bags
    from hdmil_lib.inference import Predictor
    from hdmil_lib.inference.rules import learn_margin, learn_thresholds, threshold_ladder

    setup()
    predictor = Predictor.load(model)
    table = Cohort.from_csv(cohort, bag_dir=bags)
    held_out = table.select(table.table.drop_duplicates("case_id")["slide_id"].tolist())
    loaded = list(load_bags(held_out).values())
    level = {"epsilon": epsilon, "delta": delta}
    ladder = threshold_ladder(predictor.config.thresholds)
    trajectories = [predictor.trajectory(bag) for bag in loaded]
    try:
        thresholds = learn_thresholds(predictor.dmin, predictor.lipn, loaded, ladder, **level)
        margin = learn_margin(trajectories, **level)
    except ValueError as error:
        raise HDMILError(str(error)) from error
    for name, rule in (("thresholds", thresholds), ("margin", margin)):
        typer.echo(f"{name:10} {rule.control}")
        typer.echo(f"{'':10} reads {rule.keep_ratio:.0%} of the tiles")
    fewer = thresholds.value if thresholds.keep_ratio < 1 else None
    predictor.with_rules(thresholds=fewer, margin=margin.value).save(model)
    if fewer is None:
        typer.echo("the thresholds stay; where the guarantee is needed, predict with --all-tiles")


@app.command()
def predict(
    slide: Annotated[Path, typer.Argument(help="The slide file.")],
    model: Annotated[Path, typer.Option(help="Folder that `hdmil train` wrote.")],
    heatmap: Annotated[Path | None, typer.Option(help="Write attention and kept tiles as a picture.")] = None,
    all_tiles: Annotated[bool, typer.Option("--all-tiles", help="Read every tile (HDMIL†).")] = False,
    anytime: Annotated[
        bool, typer.Option("--anytime", help="Read until the answer is sure, see `hdmil calibrate`.")
    ] = False,
    max_tiles: Annotated[int | None, typer.Option(min=1, help="Tiles to read at most.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Seconds to read at most.")] = None,
    mpp: Annotated[float | None, typer.Option(help="um per level-0 pixel, if the file does not say.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where a tile is damaged.")] = False,
) -> None:
    """Classify a slide: choose tiles on the thumbnail, read those, and say what they show.

    With --anytime, or a budget of tiles or seconds, the most promising tiles are read first.
    """
    from hdmil_lib.config import setup
    from hdmil_lib.inference import Predictor

    setup()
    if heatmap is not None and heatmap.suffix not in PICTURE_SUFFIXES:
        raise HDMILError(f"{heatmap}: cannot write such a picture; name it {' or '.join(PICTURE_SUFFIXES)}")
    budget = {"max_tiles": max_tiles, "max_seconds": max_seconds}
    predictor = Predictor.load(model)
    if anytime or any(value is not None for value in budget.values()):
        if all_tiles or strict or heatmap is not None:
            raise HDMILError("--anytime and budgets do not go with --all-tiles, --strict or --heatmap")
        margin = None if anytime else math.inf  # the model's, or a budget alone
        _predict_anytime(predictor, slide, margin=margin, mpp=mpp, **budget)
        return
    options = dict(prescreen=not all_tiles, mpp=mpp, strict=strict, progress=True)
    prediction = predictor.predict(slide, **options)
    _print_answer(slide, prediction.classes, prediction.probabilities)
    typer.echo(f"tiles    {prediction.n_read:,} of {prediction.n_tiles:,} read")
    if len(prediction.broken):
        typer.echo(f"damaged  {len(prediction.broken):,} tiles could not be read; the others decided")
    _print_seconds(prediction.seconds)
    if heatmap is not None:
        _write_heatmap(prediction, heatmap)
        typer.echo(f"heatmap  {heatmap}")


@app.command()
def encoders() -> None:
    """List the encoders that `hdmil extract` knows."""
    from hdmil_lib.features.encoders import ENCODERS

    for name, spec in ENCODERS.items():
        gate = ", accept its licence on the hub first" if spec.gated else ""
        typer.echo(f"{name:20} {spec.dim:5} features, {spec.licence}{gate}")


def _predict_anytime(predictor: "Predictor", slide: Path, **options: Any) -> None:
    from tqdm.auto import tqdm

    try:
        steps = predictor.anytime(slide, **options)
    except ValueError as error:
        raise HDMILError(str(error)) from error
    with tqdm(unit="tile", leave=False) as bar:
        for step in steps:
            bar.total = step.n_tiles
            bar.update(len(step.rows) - bar.n)
    _print_answer(slide, predictor.config.classes, step.probabilities)
    typer.echo(f"tiles    {len(step.rows):,} of {step.n_tiles:,} read, then stopped: {step.end}")
    _print_seconds(step.seconds)


def _print_answer(slide: Path, classes: Sequence[str], probabilities: "np.ndarray") -> None:
    order = probabilities.argsort()[::-1]
    ranked = ", ".join(f"{classes[c]} {probabilities[c]:.3f}" for c in order)
    typer.echo(f"slide    {slide.stem}")
    typer.echo(f"class    {classes[order[0]]} ({ranked})")


def _print_seconds(seconds: dict[str, float]) -> None:
    typer.echo("seconds  " + ", ".join(f"{stage} {spent:.2f}" for stage, spent in seconds.items()))


def _slide_paths(sources: Sequence[Path]) -> list[Path]:
    """Slide files out of files, folders and label files.

    Raises:
        SlideError: A folder or label file names no slide.
        CohortError: A label file is missing or has no column `path`.
    """
    paths: list[Path] = []
    for source in sources:
        found = [source]
        if source.is_dir():
            found = sorted(p for p in source.iterdir() if p.suffix.lower() in SLIDE_SUFFIXES)
        elif source.suffix.lower() == ".csv":
            found = _paths_of_csv(source)
        if not found:
            raise SlideError(f"{source}: no slides in it; known suffixes are {', '.join(SLIDE_SUFFIXES)}")
        paths += found
    return list(dict.fromkeys(paths))


def _paths_of_csv(source: Path) -> list[Path]:
    import pandas as pd

    if not source.is_file():
        raise CohortError(f"{source}: no such label file; give a CSV with a column `path`")
    table = pd.read_csv(source, dtype=str)
    if "path" not in table:
        raise CohortError(f"{source}: missing column path; it has {', '.join(table.columns)}")
    return [source.parent / path for path in table["path"].dropna()]


def _recipe(preset: str, epochs: int | None) -> "Recipe":
    from hdmil_lib.training.recipes import RECIPES

    if preset not in RECIPES:
        raise HDMILError(f"there is no preset {preset!r}; choose from {', '.join(RECIPES)}")
    recipe = RECIPES[preset]
    return recipe if epochs is None else recipe.shorter(epochs)


def _write_heatmap(prediction: "Prediction", path: Path) -> None:
    """Attention of the predicted class beside the tiles that were read."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from hdmil_lib.training.checkpoint import write_whole
    from hdmil_lib.viz.plots import attention_overlay, kept_overlay, use_style

    use_style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    branch = prediction.classes.index(prediction.label)
    label = f"attention for {prediction.label}, rank among tiles"
    attention_overlay(prediction, prediction.attention[:, branch], left, label=label)
    kept_overlay(prediction, ~np.isnan(prediction.attention[:, branch]), right)
    figure.suptitle(f"{prediction.slide_id}: {prediction.label} {prediction.probabilities[branch]:.2f}")
    write_whole(path, lambda part: figure.savefig(part, dpi=150, format=path.suffix[1:]))
    plt.close(figure)


def main() -> None:
    """Entry point of the command `hdmil`."""
    app()
