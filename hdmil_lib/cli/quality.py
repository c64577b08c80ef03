"""Commands for a look at slides before a long run: tissue, report and doctor."""

from pathlib import Path
from typing import Annotated

import typer

from hdmil_lib.cli.app import app
from hdmil_lib.cli.options import (
    ForceMpp,
    MaxHole,
    MinPiece,
    MinSaturation,
    MinSharpness,
    MinTissue,
    Mpp,
    Tissue,
    scale_of,
    tissue_of,
)
from hdmil_lib.errors import HDMILError, SlideError
from hdmil_lib.storage import check_output
from hdmil_lib.terminal import print_error

Slides = Annotated[list[Path], typer.Argument(help="Slide files, folders, or a CSV with a column `path`.")]


@app.command()
def tissue(
    slides: Slides,
    out: Annotated[Path, typer.Option(help="Folder of the pictures, one per slide.")] = Path("tissue"),
    preset: Annotated[
        list[str], typer.Option(help="Preset to compare; can be repeated. all is every preset.")
    ] = ["all"],  # noqa: B006
    mpp: Mpp = None,
    force_mpp: ForceMpp = None,
) -> None:
    """Draw what tissue each preset of `hdmil extract --tissue` finds on a slide."""
    from hdmil_lib.slides import PRESETS, Slide, tissue_settings
    from hdmil_lib.slides.listing import list_slides
    from hdmil_lib.slides.quality import slide_quality
    from hdmil_lib.viz.quality import preset_sheet
    from hdmil_lib.viz.report import save_picture

    names = list(PRESETS) if "all" in preset else preset
    for name in names:
        tissue_settings(name)
    check_output(out, folder=True)
    failed, scale = False, scale_of(mpp, force_mpp)
    for file in list_slides(slides):
        try:
            with Slide(file.path, file.scale(scale), name=file.slide_id) as slide:
                found = {name: slide_quality(slide, name, focus=False) for name in names}
        except (SlideError, OSError) as error:
            print_error(str(error))
            failed = True
            continue
        picture = out / f"{file.slide_id}.png"
        save_picture(preset_sheet(file.slide_id, found), picture)
        tiles = ", ".join(f"{name} {quality.n_tiles:,}" for name, quality in found.items())
        typer.echo(f"{picture}: tiles by preset: {tiles}")
    if failed:
        raise typer.Exit(1)


@app.command()
def report(
    slides: Slides,
    out: Annotated[
        Path, typer.Option(help="Folder of the report: index.html, slides.csv and a picture each.")
    ],
    bags: Annotated[
        Path | None, typer.Option(help="Folder that `hdmil extract` wrote, to compare with its bags.")
    ] = None,
    tissue: Tissue = "default",
    min_tissue: MinTissue = None,
    min_saturation: MinSaturation = None,
    min_piece: MinPiece = None,
    max_hole: MaxHole = None,
    min_sharpness: MinSharpness = None,
    mpp: Mpp = None,
    force_mpp: ForceMpp = None,
) -> None:
    """Write a contact sheet per slide and one page about all: tiles, tissue, scale, ink, focus, failures.

    The page opens without a connection. Nothing is encoded. The exit code is 1 if a slide cannot be read or
    gives no tile.
    """
    from hdmil_lib.viz.report import write_report

    settings = tissue_of(tissue, min_tissue, min_saturation, min_piece, max_hole, min_sharpness)
    check_output(out, folder=True)
    if bags is not None and not bags.is_dir():
        raise HDMILError(f"{bags}: no such folder of bags")
    table = write_report(slides, out, tissue=settings, mpp=scale_of(mpp, force_mpp), bags=bags)
    failed = table[table["error"] != ""]
    warned = int(((table["warnings"] != "") & (table["error"] == "")).sum())
    typer.echo(
        f"{out / 'index.html'}: {len(table)} slides, {int(table['n_tiles'].sum()):,} tiles, {warned} with "
        f"warnings, {len(failed)} failed"
    )
    for slide_id, error in zip(failed["slide_id"], failed["error"], strict=True):
        print_error(f"{slide_id}: {error}")
    if len(failed):
        raise typer.Exit(1)


@app.command()
def doctor(
    slides: Annotated[
        list[Path] | None, typer.Argument(help="Slides to open as well: files, folders, or a CSV.")
    ] = None,
    mpp: Mpp = None,
    force_mpp: ForceMpp = None,
) -> None:
    """Check libraries, encoders, cache, disk, GPU and every slide's header before a long run.

    Each line ends in ok, a warning, or a failure with what to do. The exit code is 1 if something fails.
    """
    from hdmil_lib import doctor as checks

    colors = {"ok": typer.colors.GREEN, "warning": typer.colors.YELLOW, "fails": typer.colors.RED}
    count = dict.fromkeys(colors, 0)
    for check in checks.examine(slides or [], mpp=scale_of(mpp, force_mpp)):
        count[check.state] += 1
        typer.echo(f"{typer.style(f'{check.state:8}', fg=colors[check.state])} {check.name}: {check.finding}")
    typer.echo(f"{count['ok']} ok, {count['warning']} warnings, {count['fails']} fail")
    if count["fails"]:
        raise typer.Exit(1)
