"""The command `hdmil`: samples, fetch-tiles, extract, train, evaluate, calibrate, predict and encoders."""

import io
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from hdmil_lib.errors import HDMILError, nearest
from hdmil_lib.storage import check_output
from hdmil_lib.terminal import (
    predict_anytime,
    predict_table,
    print_answer,
    print_error,
    print_seconds,
    write_heatmap,
)

if TYPE_CHECKING:
    from hdmil_lib.training.recipes import Recipe

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Decoder = Annotated[
    Literal["cpu", "auto", "nvjpeg"],
    typer.Option(help="What decodes JPEG tiles; auto is the GPU, where `pip install hdmil[gpu]` was done."),
]
Devices = Annotated[str, typer.Option(help="auto (all GPUs), cpu, cuda:1, mps, or several: cuda:0,cuda:1.")]
Looks = Annotated[
    list[int],
    typer.Option(help="Side in pixels of a coarser look at each tile: 64 is 2 um/px; can be repeated."),
]
Mpp = Annotated[
    float | None, typer.Option(help="Micrometers per level-0 pixel of the slides that do not say.")
]
ForceMpp = Annotated[
    float | None, typer.Option(help="Micrometers per level-0 pixel of all slides, whatever their files say.")
]
PICTURE_SUFFIXES = (".png", ".jpg", ".pdf", ".svg")


class _OneLineErrors(TyperGroup):
    """Prints errors that the user can fix as one red line on stderr, and exits with 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (HDMILError, OSError) as error:
            print_error(str(error))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            print_error("interrupted; what is finished is kept, and the same command goes on from there")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_OneLineErrors,
    help="HDMIL: fast and accurate classification of gigapixel pathology slides.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from hdmil_lib.version import __version__

        typer.echo(f"hdmil {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """HDMIL: fast and accurate classification of gigapixel pathology slides."""


@app.command()
def samples(
    cohort: Annotated[str, typer.Option(help="camelyon-mini, nsclc-mini or brca-mini.")] = "camelyon-mini",
    fast: Annotated[bool, typer.Option("--fast", help="A few slides only.")] = False,
    tiles: Annotated[
        Path | None, typer.Option(help="Folder of labeled tiles of which slides are composed instead.")
    ] = None,
    like: Annotated[
        str | None, typer.Option(help="With --tiles: camelyon or nsclc, which the tiles must give.")
    ] = None,
    n_slides: Annotated[int, typer.Option(min=12, help="With --tiles: number of slides.")] = 480,
    look: Looks = [],  # noqa: B006
    device: Device = "auto",
) -> None:
    """Prepare the slides and bags of a synthetic cohort, and a real sample slide, in the cache.

    With --tiles, slides are composed of the tiles of PatchCamelyon (folders 0 and 1), NCT-CRC-HE or LC25000:
    real texture, known content, neighbors that never met. Training and test slides share no tile.
    """
    from hdmil_lib.config import is_fast, setup
    from hdmil_lib.slides.sample import sample_slide

    setup()
    if tiles is not None:
        from hdmil_lib.synthetic.composed import compose_cohort

        prepared = compose_cohort(tiles, like=like, n_slides=n_slides, looks=look, device=device)
        typer.echo(f"composed of {tiles}: {len(prepared)} slides, {' / '.join(prepared.classes)}")
        typer.echo(f"  labels  {prepared.root / 'cohort.csv'}")
        typer.echo(f"  bags    {prepared.bag_dir}")
        return
    from hdmil_lib.synthetic.cohorts import prepare_cohort

    prepared = prepare_cohort(cohort, fast=fast or is_fast(), looks=look, device=device)
    typer.echo(f"{cohort} (synthetic): {len(prepared)} slides, {' / '.join(prepared.classes)}")
    typer.echo(f"  labels  {prepared.root / 'cohort.csv'}")
    typer.echo(f"  bags    {prepared.bag_dir}")
    typer.echo(f"real slide: {sample_slide()}")


@app.command("fetch-tiles")
def fetch_tiles(
    name: Annotated[str, typer.Argument(help="pcam, nct-7k or nct-100k.")],
    out: Annotated[Path, typer.Argument(help="New folder of the tiles, with one folder per class.")],
    per_class: Annotated[int, typer.Option(min=1, help="Largest number of tiles per class.")] = 4000,
    yes: Annotated[bool, typer.Option("--yes", help="Download without asking.")] = False,
) -> None:
    """Download a public collection of tiles, of which `hdmil samples --tiles` composes slides."""
    from hdmil_lib.synthetic import collections

    source = collections.source_of(name)
    typer.echo(f"{source.title}\n  licence {source.licence}, {source.gigabytes} GB to download")
    if not yes:
        typer.confirm("Download?", abort=True)
    found = collections.fetch_tiles(name, out, per_class=per_class)
    typer.echo(f"tiles in {found}; next: hdmil samples --tiles {found}")


@app.command()
def extract(
    slides: Annotated[
        list[Path], typer.Argument(help="Slide files, folders, or a CSV with a column `path`.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the bags, one <slide>.h5 per slide.")],
    encoder: Annotated[
        str, typer.Option(help="Name of an encoder; see `hdmil encoders`.")
    ] = "efficientnet_lite0",
    device: Devices = "auto",
    mpp: Mpp = None,
    force_mpp: ForceMpp = None,
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "int8"],
        typer.Option(
            help="int8 is the fastest on a CPU; it is calibrated on tiles of the first eight slides."
        ),
    ] = "auto",
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Compile the encoder first; for a GPU and many slides.")
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Tiles per encoder call; by default chosen for the device.")
    ] = None,
    look: Looks = [],  # noqa: B006
    decoder: Decoder = "cpu",
) -> None:
    """Turn slides into bags of features; skip existing bags, and continue if a slide fails."""
    from hdmil_lib.config import setup
    from hdmil_lib.devices import resolve_all
    from hdmil_lib.encoders import extraction
    from hdmil_lib.encoders.loading import load_encoder
    from hdmil_lib.slides.listing import list_slides

    setup()
    scale, gpus = _scale(mpp, force_mpp), resolve_all(device)
    list_slides(slides)  # nothing is loaded where there are none
    options: dict[str, Any] = {"precision": precision, "compiled": compiled, "decoder": decoder}
    if precision == "int8":
        options["int8_tiles"] = extraction.spread_tiles(slides, mpp=scale)
    loaded = load_encoder(encoder, device=gpus[0], **options)
    copies = [loaded, *(loaded.to(gpu) for gpu in gpus[1:])]
    report = extraction.extract(slides, copies, out, mpp=scale, batch_size=batch_size, looks=look)
    failed = report[report["status"] == "failed"]
    for status, rows in report.groupby("status", sort=False):
        typer.echo(f"{status}: {len(rows)} slides, {int(rows['n_tiles'].sum()):,} tiles")
    odd = report[report["note"].fillna("") != ""]
    for slide_id, mpp_used, note in zip(odd["slide_id"], odd["mpp"], odd["note"], strict=True):
        typer.echo(f"note: {slide_id}: {mpp_used:.4g} um/px was used; {note}")
    for slide_id, error in zip(failed["slide_id"], failed["error"], strict=True):
        print_error(f"{slide_id}: {error}")
    if len(failed):
        raise typer.Exit(1)


@app.command()
def train(
    cohort: Annotated[Path, typer.Option(help="CSV with slide_id, case_id and label.")],
    bags: Annotated[Path, typer.Option(help="Folder that `hdmil extract` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder of the model, its test scores and all trainings.")],
    folds: Annotated[int, typer.Option(help="Number of cross-validation folds, three or more.")] = 5,
    splits: Annotated[
        Path | None, typer.Option(help="Folder with splits_<k>.csv, instead of --folds.")
    ] = None,
    compare: Annotated[
        list[str],
        typer.Option(help="A further method, such as abmil, clam_mb or random; can be repeated."),
    ] = [],  # noqa: B006
    recipe: Annotated[
        str,
        typer.Option(help="Settings: auto (by the size of the cohort), camelyon16, nsclc, brca and others."),
    ] = "auto",
    subtyping: Annotated[
        bool, typer.Option("--subtyping", help="With auto: every class has tiles of its own.")
    ] = False,
    cascade: Annotated[
        bool,
        typer.Option(
            "--cascade",
            help="Screen by LIPN taught evidence and a second look; see `hdmil extract --look 64`.",
        ),
    ] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="Largest number of epochs.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of folds, initial weights and training.")
    ] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes, at least one per GPU.")] = 2,
    device: Devices = "auto",
) -> None:
    """Cross-validate, and write the model of one fold to OUT/model for `hdmil predict`.

    The model is that of the fold with the lowest validation loss. The printed scores are those of the test
    slides of all folds. An interrupted training resumes if started again.
    """
    from hdmil_lib.cohort import Cohort
    from hdmil_lib.config import setup
    from hdmil_lib.reproduce.tables import save_table, to_markdown
    from hdmil_lib.training.crossval import cross_validate

    setup(seed)
    check_output(out, folder=True)
    labeled = Cohort.from_csv(cohort, bags=bags)
    for name, rows in labeled.table.groupby("label"):
        typer.echo(f"{name}: {len(rows)} slides of {rows['case_id'].nunique()} patients")
    loaded = labeled.load_bags()
    dim = next(iter(loaded.values())).features.shape[1]
    wanted = "hdmil_cascade" if cascade else "hdmil"
    methods = list(dict.fromkeys([*compare, "hdmil_dagger", "hdmil", wanted]))
    settings = _recipe(recipe, epochs, n_slides=len(labeled), in_dim=dim, subtyping=subtyping)
    cv = cross_validate(
        labeled,
        methods,
        folds=folds,
        splits=splits,
        recipe=settings,
        seed=seed,
        out=out / "runs",
        bags=loaded,
        workers=workers,
        device=device,
    )
    scores = cv.table()
    save_table(scores, out / "scores")
    fold = cv.best_fold(wanted)
    model = cv.hdmil(fold, wanted)
    model.save_pretrained(out / "model")
    typer.echo(to_markdown(scores))
    if model.screening == "random":
        typer.echo(
            "note: on the validation slides the cascade was no better than random tiles, so the model reads "
            f"{model.random_share:.0%} of the tiles at random; use --all-tiles, or train without --cascade"
        )
    typer.echo(f"{out / 'model'}: model of fold {fold}, for `hdmil predict SLIDE --model {out / 'model'}`")


@app.command()
def evaluate(
    model: Annotated[Path, typer.Option(help="Model folder that `hdmil train` wrote.")],
    cohort: Annotated[Path, typer.Option(help="CSV of labeled slides: slide_id, case_id and label.")],
    bags: Annotated[Path, typer.Option(help="Folder that `hdmil extract` wrote for them.")],
    out: Annotated[Path | None, typer.Option(help="CSV for the predictions of all slides.")] = None,
    all_tiles: Annotated[bool, typer.Option("--all-tiles", help="Use every tile (HDMIL†).")] = False,
    device: Device = "auto",
) -> None:
    """Score a trained model on the slides of a labeled cohort, by slide and by patient.

    A patient's probabilities are the mean over the patient's slides, the label is the highest class among
    them. Intervals are from a bootstrap of the patients.
    """
    import pandas as pd

    from hdmil_lib.cohort import Cohort
    from hdmil_lib.config import setup
    from hdmil_lib.inference.evaluation import by_patient, scores_of
    from hdmil_lib.inference.evaluation import evaluate as predictions_of
    from hdmil_lib.models import HDMIL
    from hdmil_lib.storage import write_table

    setup()
    if out is not None:
        check_output(out)
    trained = HDMIL.from_pretrained(model).to(device)
    labeled = Cohort.from_csv(cohort, bags=bags)
    predictions = predictions_of(trained, labeled, all_tiles=all_tiles, device=device)
    levels = {"slides": predictions}
    if predictions["case_id"].duplicated().any():
        levels["patients"] = by_patient(predictions)
    scores = pd.DataFrame({name: scores_of(rows) for name, rows in levels.items()}).T
    typer.echo(scores.astype({"n": int}).round(3).to_string())
    absent = sorted({*trained.classes} - {*labeled.classes})
    if absent:
        typer.echo(f"note: no slide has class {', '.join(absent)}, so that there is no AUC")
    if out is not None:
        write_table(out, predictions)
        typer.echo(f"predictions  {out}")


@app.command()
def calibrate(
    model: Annotated[Path, typer.Option(help="Model folder that `hdmil train` wrote; it is not changed.")],
    out: Annotated[Path, typer.Option(help="Model folder to write, with the rules learned here.")],
    cohort: Annotated[Path, typer.Option(help="CSV of held-out slides: slide_id, case_id and label.")],
    bags: Annotated[Path, typer.Option(help="Folder that `hdmil extract` wrote for them.")],
    epsilon: Annotated[
        float, typer.Option(help="Share of slides that may get another label than from all tiles.")
    ] = 0.05,
    delta: Annotated[float, typer.Option(help="Probability that more slides do.")] = 0.1,
    device: Device = "auto",
) -> None:
    """Learn how few tiles the model needs, on slides that were not used for anything else.

    Chooses LIPN's thresholds, and the margin of `hdmil predict --anytime`, so that at most a share epsilon of
    all slides gets another label than from all tiles, with confidence 1 - delta for each of the two. The
    candidates depend on the thresholds chosen in training, so a second run on the same slides has the same
    result. One slide per case is used.
    """
    from hdmil_lib.cohort import Cohort
    from hdmil_lib.config import setup
    from hdmil_lib.inference.rules import learn_margin, learn_thresholds
    from hdmil_lib.models import HDMIL

    setup()
    check_output(out, folder=True)
    if out.resolve() == model.resolve():
        raise HDMILError(
            f"{out}: is the model itself; give another folder, so that the trained model is kept"
        )
    trained = HDMIL.from_pretrained(model).to(device)
    table = Cohort.from_csv(cohort, bags=bags)
    held_out = table.select(table.table.drop_duplicates("case_id")["slide_id"].tolist())
    loaded = list(held_out.load_bags().values())
    rules: dict[str, Any] = {}
    try:
        if not trained.looks_again:
            rules["thresholds"] = learn_thresholds(trained, loaded, epsilon=epsilon, delta=delta)
        trajectories = [trained.trajectory(bag) for bag in loaded]
        rules["margin"] = learn_margin(trajectories, epsilon=epsilon, delta=delta)
    except ValueError as error:
        raise HDMILError(str(error)) from error
    for name, rule in rules.items():
        typer.echo(f"{name:10} {rule.control}")
        typer.echo(f"{'':10} reads {rule.keep_ratio:.0%} of the tiles")
    certified = "thresholds" in rules and rules["thresholds"].keep_ratio < 1
    chosen = rules["thresholds"].value if certified else trained.trained_thresholds
    trained.with_rules(thresholds=chosen, margin=rules["margin"].value).save_pretrained(out)
    if trained.looks_again:
        typer.echo(
            "the rules of the second look stay, without a guarantee; `hdmil predict --anytime` has one"
        )
    elif not certified:
        typer.echo("the trained thresholds stay; if the guarantee is needed, predict with --all-tiles")
    typer.echo(f"{out}: the model with these rules")


@app.command()
def predict(
    slides: Annotated[
        list[Path], typer.Argument(help="Slide files, folders, or a CSV with a column `path`.")
    ],
    model: Annotated[str, typer.Option(help="Model folder, or owner/name on the Hugging Face hub.")],
    out: Annotated[
        Path | None, typer.Option(help="CSV file to write, one row per slide; needed for several slides.")
    ] = None,
    heatmap: Annotated[
        Path | None, typer.Option(help="Picture to write of attention and kept tiles.")
    ] = None,
    geojson: Annotated[
        Path | None, typer.Option(help="GeoJSON file to write of the kept tiles, for QuPath.")
    ] = None,
    all_tiles: Annotated[bool, typer.Option("--all-tiles", help="Read every tile (HDMIL†).")] = False,
    anytime: Annotated[
        bool, typer.Option("--anytime", help="Stop reading once the class is certain; see `hdmil calibrate`.")
    ] = False,
    max_tiles: Annotated[int | None, typer.Option(min=1, help="Largest number of tiles to read.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Seconds after which reading stops.")] = None,
    device: Devices = "auto",
    decoder: Decoder = "cpu",
    mpp: Mpp = None,
    force_mpp: ForceMpp = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if a tile is damaged.")] = False,
) -> None:
    """Classify slides from the tiles that LIPN selects on the thumbnail.

    With --anytime, --max-tiles or --max-seconds the most suspicious tiles are read first. With --out the
    predictions are written to a table; slides that are in it already are skipped.
    """
    from hdmil_lib.config import setup
    from hdmil_lib.devices import resolve_all
    from hdmil_lib.models import HDMIL
    from hdmil_lib.slides.listing import list_slides

    setup()
    for output in filter(None, (heatmap, geojson, out)):
        check_output(output)
    if heatmap is not None and heatmap.suffix not in PICTURE_SUFFIXES:
        raise HDMILError(f"{heatmap}: cannot write such a picture; name it {' or '.join(PICTURE_SUFFIXES)}")
    budget = {"max_tiles": max_tiles, "max_seconds": max_seconds}
    by_tiles = anytime or any(value is not None for value in budget.values())
    pictures = heatmap is not None or geojson is not None
    if by_tiles and (all_tiles or strict or pictures or out is not None):
        raise HDMILError(
            "--anytime, --max-tiles and --max-seconds cannot be combined with --all-tiles, --strict, --out, "
            "--heatmap or --geojson"
        )
    scale, files = _scale(mpp, force_mpp), list_slides(slides)
    gpus = resolve_all(device)
    loaded = HDMIL.from_pretrained(model).to(gpus[0])
    loaded.decoder = decoder
    if out is not None or len(files) > 1:
        if out is None or by_tiles or pictures:
            raise HDMILError(
                "--out is needed for several slides, and cannot be combined with --anytime, --max-tiles, "
                "--max-seconds, --heatmap or --geojson"
            )
        predict_table(loaded, slides, out, device=gpus, all_tiles=all_tiles, mpp=scale, strict=strict)
        return
    slide, own_scale = files[0].path, files[0].scale(scale)
    if by_tiles:
        margin = None if anytime else math.inf  # that of the model, or none
        predict_anytime(loaded, slide, margin=margin, device=gpus[0], mpp=own_scale, **budget)
        return
    options: dict[str, Any] = {"all_tiles": all_tiles, "device": gpus[0], "mpp": own_scale, "strict": strict}
    prediction = loaded.predict(slide, progress=True, **options)
    print_answer(slide, prediction.classes, prediction.probabilities)
    typer.echo(f"tiles    {prediction.n_read:,} of {prediction.n_tiles:,} read")
    if len(prediction.broken):
        typer.echo(f"damaged  {len(prediction.broken):,} tiles could not be read and were ignored")
    print_seconds(prediction.seconds)
    if heatmap is not None:
        write_heatmap(prediction, heatmap)
        typer.echo(f"heatmap  {heatmap}")
    if geojson is not None:
        prediction.to_geojson(geojson)
        typer.echo(f"geojson  {geojson}")


@app.command()
def encoders() -> None:
    """List the encoders that `hdmil extract` knows."""
    from hdmil_lib.encoders.loading import ENCODERS

    for name, spec in ENCODERS.items():
        gate = ", accept its license on the hub first" if spec.gated else ""
        typer.echo(f"{name:20} {spec.dim:5} features, {spec.license}{gate}")


def _scale(mpp: float | None, force_mpp: float | None) -> float | None:
    """The scale as `Slide` takes it: forced, or for slides that do not say."""
    from hdmil_lib.slides.scale import IfUnknown

    if force_mpp is not None:
        return force_mpp
    return None if mpp is None else IfUnknown(mpp)


def _recipe(name: str, epochs: int | None, *, n_slides: int, in_dim: int, subtyping: bool) -> "Recipe":
    """The recipe of this name, with at most this many epochs."""
    from hdmil_lib.reproduce.recipes import RECIPES
    from hdmil_lib.training.recipes import recipe_for

    if name == "auto":
        recipe = recipe_for(n_slides, in_dim, subtyping=subtyping)
    elif name in RECIPES:
        recipe = RECIPES[name]
    else:
        hint = nearest(name, RECIPES)
        raise HDMILError(f"there is no recipe {name!r}{hint}; choose from auto, {', '.join(RECIPES)}")
    return recipe if epochs is None else recipe.shorter(epochs)


def main() -> None:
    """Entry point of the command `hdmil`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that has no dagger shows a question mark
            stream.reconfigure(errors="replace")
    app()
