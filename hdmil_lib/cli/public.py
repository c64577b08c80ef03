"""Commands for public cohorts: fetch and reproduce."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hdmil_lib.cli.app import app
from hdmil_lib.errors import HDMILError
from hdmil_lib.terminal import print_error

if TYPE_CHECKING:
    from hdmil_lib.public.fetching import Fetched, Plan


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

    Sizes and licences are shown first. An interrupted download goes on from where it stopped. Checksums are
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
        typer.echo(f"{name:12} {cohort.title}\n{'':12} licence {cohort.licence}, {cohort.home}")
    typer.echo("sizes: hdmil fetch NAME --list")


def _print_plan(plan: "Plan") -> None:
    """What a download takes, under what licence, and what is known to be wrong with the slides."""
    from hdmil_lib.public.catalog import describe
    from hdmil_lib.public.fetching import gigabytes

    cohort, here = plan.cohort, plan.n_bytes_here
    typer.echo(f"{cohort.title}\n  licence  {cohort.licence}, {cohort.home}")
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
