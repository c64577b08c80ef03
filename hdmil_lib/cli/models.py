"""Commands that train and judge models: train, evaluate and calibrate."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hdmil_lib.cli.app import app
from hdmil_lib.cli.options import Device, Devices, Scheduler, client_of
from hdmil_lib.errors import HDMILError, nearest
from hdmil_lib.storage import check_output

if TYPE_CHECKING:
    from hdmil_lib.cohort import Cohort
    from hdmil_lib.models import HDMIL
    from hdmil_lib.training.recipes import Recipe


@app.command()
def train(
    cohort: Annotated[Path, typer.Option(help="CSV with slide_id, case_id and label.")],
    bags: Annotated[Path, typer.Option(help="Folder that `hdmil extract` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder of the model, its test scores and all trainings.")],
    folds: Annotated[
        int,
        typer.Option(
            help="Number of cross-validation folds, three or more; within the rest, if the column `split` of "
            "the cohort names train and test slides."
        ),
    ] = 5,
    splits: Annotated[
        Path | None, typer.Option(help="Folder with CLAM's splits_<k>.csv, instead of --folds.")
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
    no_screening: Annotated[
        bool,
        typer.Option(
            "--no-screening",
            help="Train bag classifiers alone, of bags without patches; no model is written.",
        ),
    ] = False,
    balance: Annotated[
        Literal["sampling", "loss"],
        typer.Option(help="Make up for unequal classes by drawing them equally often, or by class weights."),
    ] = "sampling",
    epochs: Annotated[int | None, typer.Option(min=1, help="Largest number of epochs.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of folds, initial weights and training.")
    ] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes, at least one per GPU.")] = 2,
    device: Devices = "auto",
    scheduler: Scheduler = None,
) -> None:
    """Cross-validate, and write the model of one fold to OUT/model for `hdmil predict`.

    The model is that of the fold with the lowest validation loss. The printed scores are those of the test
    slides of all folds. An interrupted training resumes if started again.
    """
    from hdmil_lib.cluster import cross_validate
    from hdmil_lib.cohort import Cohort
    from hdmil_lib.config import setup
    from hdmil_lib.reproduce.tables import save_table, to_markdown

    setup(seed)
    check_output(out, folder=True)
    labeled = Cohort.from_csv(cohort, bags=bags)
    for name, rows in labeled.table.groupby("label"):
        typer.echo(f"{name}: {len(rows)} slides of {rows['case_id'].nunique()} patients")
    for note in labeled.class_notes() + labeled.patient_notes():
        typer.echo(f"note: {note}")
    loaded = labeled.load_bags()
    dim = next(iter(loaded.values())).features.shape[1]
    wanted = "hdmil_cascade" if cascade else "hdmil"
    screening = [] if no_screening else ["hdmil", wanted]
    methods = list(dict.fromkeys([*compare, "hdmil_dagger", *screening]))
    settings = _recipe(recipe, epochs, n_slides=len(labeled), in_dim=dim, subtyping=subtyping)
    settings = settings.balanced(balance)
    with client_of(scheduler) as client:
        cv = cross_validate(
            labeled,
            methods,
            client=client,
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
    if no_screening:
        typer.echo(to_markdown(scores))
        return
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
    out: Annotated[
        Path | None, typer.Option(help="Table for the predictions of all slides, .csv or .parquet.")
    ] = None,
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
    _say_seen(trained, labeled)
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
    _say_seen(trained, table)
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


def _say_seen(model: "HDMIL", cohort: "Cohort") -> None:
    """Say how many slides of a cohort the model was trained on, if any."""
    if seen := model.known_info.seen_among(cohort.slide_ids):
        typer.echo(
            f"note: the model was trained on {len(seen)} of these {len(cohort)} slides, such as {seen[0]}, "
            "and looks too good on them; use slides that it has not seen"
        )


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
