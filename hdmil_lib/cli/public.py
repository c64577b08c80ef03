"""Commands for public cohorts: fetch and reproduce."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hdmil_lib.cli.app import app
from hdmil_lib.cli.options import Devices
from hdmil_lib.errors import CohortError, HDMILError, nearest
from hdmil_lib.storage import check_output
from hdmil_lib.terminal import print_error

if TYPE_CHECKING:
    from hdmil_lib.public.fetching import Fetched, Plan
    from hdmil_lib.reproduce.experiment import Experiment


@app.command()
def fetch(
    name: Annotated[
        str | None, typer.Argument(help="camelyon16, camelyon17, nsclc, brca or cptac-nsclc.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the slides and their label table.")] = None,
    slides: Annotated[
        int | None, typer.Option(min=2, help="Fetch this many slides, of all classes, small ones.")
    ] = None,
    list_only: Annotated[
        bool, typer.Option("--list", help="List cohorts, or the slides of NAME; fetch nothing.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, max=32, help="Downloads at the same time.")] = 4,
    yes: Annotated[bool, typer.Option("--yes", help="Download without asking.")] = False,
) -> None:
    """Download a public cohort with its labels, for `hdmil extract` and `hdmil train`.

    Sizes and licenses are shown first. An interrupted download goes on from where it stopped. Checksums are
    compared where the source has them.
    """
    from hdmil_lib.public.fetching import fetch as fetch_slides
    from hdmil_lib.public.fetching import plan_fetch

    if name is None:
        _print_cohorts()
        return
    if out is None and not list_only:
        raise HDMILError("say with --out where the slides are to be, or list them with --list")
    plan = plan_fetch(name, out or Path(), n_slides=slides)
    _print_plan(plan)
    if list_only:
        _print_slides(plan)
        return
    plan.check_space()
    if not yes:
        typer.confirm("Download?", abort=True)
    fetched = fetch_slides(plan, jobs=jobs)
    _print_fetched(fetched)
    bags = fetched.labels.parent / "bags"
    typer.echo(f"labels  {fetched.labels}; next: hdmil extract {fetched.labels} --out {bags}")
    if fetched.failed:
        raise typer.Exit(1)


def _print_cohorts() -> None:
    from hdmil_lib.public.catalog import COHORTS

    for name, cohort in COHORTS.items():
        typer.echo(f"{name:12} {cohort.title}\n{'':12} license {cohort.license}, {cohort.home}")
    typer.echo("sizes: hdmil fetch NAME --list")


def _print_plan(plan: "Plan") -> None:
    """What a download takes, under what license, and what is known to be wrong with the slides."""
    from hdmil_lib.public.catalog import describe
    from hdmil_lib.public.fetching import gigabytes

    cohort, here = plan.cohort, plan.n_bytes_here
    typer.echo(f"{cohort.title}\n  license  {cohort.license}, {cohort.home}")
    counts = ", ".join(f"{count} {name}" for name, count in plan.n_by_class.items())
    typer.echo(f"  slides   {len(plan.slides)} of {plan.n_all}: {counts}; {plan.n_patients} patients")
    there = f", of which {gigabytes(here)} are here" if here else ""
    typer.echo(f"  size     {gigabytes(plan.size)} in {plan.n_files} files{there}")
    if len(plan.slides) < plan.n_all:
        typer.echo(
            "  choice   drawn from the smallest slides, with a fixed seed: scores are not those of the cohort"
        )
    for line in describe(cohort.faults):
        typer.echo(f"  fault    {line}")
    for note in cohort.notes:
        typer.echo(f"  note     {note}")


def _print_slides(plan: "Plan") -> None:
    from hdmil_lib.public.fetching import gigabytes

    for slide in plan.slides:
        part = f" {slide.split}" if slide.split else ""
        typer.echo(f"{slide.slide_id:30} {slide.label}{part} {gigabytes(slide.size)}")


def _print_fetched(fetched: "Fetched") -> None:
    ways = {"md5": "by the MD5 sum", "etag": "by the sum of the bucket", "size": "by the length alone"}
    counts = ", ".join(f"{count} {ways[how]}" for how, count in fetched.checked.items())
    typer.echo(f"{fetched.n_slides} slides are here; files checked: {counts}")
    for slide_id, reason in fetched.failed.items():
        print_error(f"{slide_id}: {reason}")


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="camelyon16, nsclc or brca.")],
    folder: Annotated[Path, typer.Option("--dir", help="Folder of slides, bags, runs and tables.")],
    slides: Annotated[
        int | None, typer.Option(min=2, help="The small version, on this many slides; see `hdmil fetch`.")
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="resnet50 is the paper's; efficientnet_lite0 needs no download.")
    ] = "resnet50",
    method: Annotated[
        list[str], typer.Option(help="A system to train, instead of the paper's; can be repeated.")
    ] = [],  # noqa: B006
    folds: Annotated[int, typer.Option(help="Number of folds, three or more.")] = 10,
    epochs: Annotated[int | None, typer.Option(min=1, help="Largest number of epochs.")] = None,
    timed: Annotated[int, typer.Option(min=1, help="Number of slides for Table 2.")] = 3,
    skip: Annotated[
        list[str], typer.Option(help="Stage to skip: fetch, extract, train, time; can be repeated.")
    ] = [],  # noqa: B006
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of folds, initial weights and training.")
    ] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes, at least one per GPU.")] = 2,
    device: Devices = "auto",
    yes: Annotated[bool, typer.Option("--yes", help="Begin without asking.")] = False,
) -> None:
    """Fetch a cohort of the paper, train its systems, and write Tables 1 to 3 beside the paper's figures.

    What it takes is shown first. An interrupted run goes on from where it stopped. On Camelyon16 all folds
    are tested on the official test part.
    """
    from hdmil_lib.config import setup
    from hdmil_lib.reproduce import experiment as stages

    methods = tuple(method) if method else ()
    wanted = stages.Experiment(
        name, folder, encoder, methods, folds, epochs, timed, seed, device=device, workers=workers
    )
    stages.check_experiment(wanted)
    _check_stages(skip, stages.STAGES[:-1])
    setup(seed)
    check_output(folder, folder=True)
    if not methods:
        wanted = replace(wanted, methods=stages.paper_methods(name))
    plan = None if "fetch" in skip else _plan_of_paper(name, folder, slides)
    n_slides = len(plan.slides) if plan else len(stages.labels_of(wanted))
    for stage, line in stages.remaining(wanted, n_slides).items():
        typer.echo(f"  {stage:8} {'skipped' if stage in skip else line}")
    if not yes:
        typer.confirm("Begin?", abort=True)
    failed = _run_stages(wanted, plan, skip)
    typer.echo(stages.write_tables(wanted, failed))
    typer.echo(f"tables  {wanted.tables / 'report.md'}")
    if failed:
        raise typer.Exit(1)


def _run_stages(experiment: "Experiment", plan: "Plan | None", skip: Sequence[str]) -> dict[str, str]:
    """Run the stages up to the tables; returns reasons by slide_id of slides that failed."""
    from hdmil_lib.public.fetching import fetch as fetch_slides
    from hdmil_lib.reproduce import experiment as stages

    failed: dict[str, str] = {}
    if plan is not None:
        fetched = fetch_slides(plan)
        _print_fetched(fetched)
        failed |= fetched.failed
    if "extract" not in skip:
        failed |= stages.extract_bags(experiment)
    for slide_id, reason in failed.items():
        print_error(f"{slide_id}: {reason}; left out")
    if "train" not in skip:
        stages.train_systems(experiment)
    if "time" not in skip:
        stages.time_systems(experiment)
    return failed


def _plan_of_paper(name: str, folder: Path, slides: int | None) -> "Plan":
    """The plan of the download, printed."""
    from hdmil_lib.public.fetching import plan_fetch

    try:
        plan = plan_fetch(name, folder, n_slides=slides)
    except CohortError as error:
        raise CohortError(f"{error}; or use the slides in {folder} with --skip fetch") from error
    _print_plan(plan)
    plan.check_space()
    return plan


def _check_stages(skip: Sequence[str], known: Sequence[str]) -> None:
    for stage in skip:
        if stage not in known:
            raise HDMILError(
                f"there is no stage {stage!r}{nearest(stage, known)}; --skip takes {', '.join(known)}"
            )
