"""Commands that exchange features with other tools: import, export and add-patches."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hdmil_lib.cli.app import app
from hdmil_lib.cli.options import ForceMpp, Mpp, scale_of
from hdmil_lib.storage import check_output
from hdmil_lib.terminal import print_report

if TYPE_CHECKING:
    import pandas as pd

TileSize = Annotated[
    int | None,
    typer.Option(min=1, help="Side of a tile in level-0 pixels, where the files do not say."),
]


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="Folder that the other tool wrote.")],
    tool: Annotated[Literal["clam", "trident", "torchmil"], typer.Option("--from", help="The other tool.")],
    out: Annotated[Path, typer.Option(help="Folder of the bags, one <slide>.h5 per slide.")],
    encoder: Annotated[
        str | None,
        typer.Option(help="Name of the encoder of the features; CLAM's and torchmil's files do not say."),
    ] = None,
    patches: Annotated[
        Path | None, typer.Option(help="Folder of the tool's coordinates, where it lies elsewhere.")
    ] = None,
    tile_size: TileSize = None,
) -> None:
    """Write bags from the features of CLAM, TRIDENT or torchmil; existing bags are skipped.

    The bags train every classifier. Pre-screening by LIPN needs their patches too: `hdmil add-patches`.
    """
    from hdmil_lib.config import setup
    from hdmil_lib.exchange.transfer import LABELS, import_bags

    setup()
    check_output(out, folder=True)
    report = import_bags(folder, tool, out, encoder=encoder, patches=patches, tile_size=tile_size)
    if (out / LABELS).is_file():
        typer.echo(f"labels: {out / LABELS}; set case_id there where patients have several slides")
    _finish(report)


@app.command()
def export(
    bags: Annotated[Path, typer.Argument(help="Folder of bags.")],
    tool: Annotated[Literal["clam", "torchmil"], typer.Option("--to", help="The other tool.")],
    out: Annotated[Path, typer.Option(help="Folder of the files.")],
    cohort: Annotated[
        Path | None, typer.Option(help="CSV of labeled slides; only these are written, with their labels.")
    ] = None,
) -> None:
    """Write the features of bags for CLAM or torchmil; slides that are there already are skipped."""
    from hdmil_lib.cohort import Cohort
    from hdmil_lib.config import setup
    from hdmil_lib.exchange.transfer import export_bags

    setup()
    check_output(out, folder=True)
    labeled = None if cohort is None else Cohort.from_csv(cohort, bags=bags)
    if labeled is not None and tool == "torchmil":
        typer.echo("labels: " + ", ".join(f"{name} is {i}" for i, name in enumerate(labeled.classes)))
    _finish(export_bags(bags, tool, out, cohort=labeled))


@app.command("add-patches")
def add_patches(
    bags: Annotated[Path, typer.Argument(help="Folder of bags without patches; they are changed.")],
    slides: Annotated[
        list[Path], typer.Argument(help="Slide files, folders, or a CSV with a column `path`.")
    ],
    tile_size: TileSize = None,
    mpp: Mpp = None,
    force_mpp: ForceMpp = None,
) -> None:
    """Fill in the patches that LIPN needs, from the slides; bags that have patches are skipped."""
    from hdmil_lib.config import setup
    from hdmil_lib.exchange.patches import add_patches as fill_in

    setup()
    _finish(fill_in(bags, slides, tile_size=tile_size, mpp=scale_of(mpp, force_mpp)))


def _finish(report: "pd.DataFrame") -> None:
    """Print what was done and what failed, and exit with 1 if a slide failed."""
    if print_report(report):
        raise typer.Exit(1)
