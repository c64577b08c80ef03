"""Commands that make cohorts: samples and fetch-tiles."""

from pathlib import Path
from typing import Annotated

import typer

from hdmil_lib.cli.app import app
from hdmil_lib.cli.options import Device, Looks


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
