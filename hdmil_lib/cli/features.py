"""Commands from slides to features: extract and encoders."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hdmil_lib.cli.app import app
from hdmil_lib.cli.options import (
    AllowUpsampling,
    Decoder,
    Devices,
    EncoderWeights,
    ForceMpp,
    Looks,
    MaxHole,
    MinPiece,
    MinSaturation,
    MinSharpness,
    MinTissue,
    Mpp,
    Scheduler,
    ShardOption,
    TileMpp,
    TileSize,
    Tissue,
    client_of,
    scale_of,
    shard_of,
    tissue_of,
)
from hdmil_lib.terminal import print_error

if TYPE_CHECKING:
    import pandas as pd


SOURCES = {
    "given": "--force-mpp",
    "table": "the column mpp",
    "properties": "the file's properties",
    "given, unknown": "--mpp",
}
"""What the sources of a scale are called, where they need other words than those of `Scale.source`."""


@app.command()
def extract(
    slides: Annotated[
        list[Path], typer.Argument(help="Slide files, folders, or a CSV with a column `path`.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the bags, one <slide>.h5 per slide.")],
    encoder: Annotated[
        str, typer.Option(help="Name of an encoder, timm:NAME or module:function; see `hdmil encoders`.")
    ] = "efficientnet_lite0",
    encoder_weights: EncoderWeights = None,
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
    tile_size: TileSize = 256,
    tile_mpp: TileMpp = 0.5,
    allow_upsampling: AllowUpsampling = False,
    tissue: Tissue = "default",
    min_tissue: MinTissue = None,
    min_saturation: MinSaturation = None,
    min_piece: MinPiece = None,
    max_hole: MaxHole = None,
    min_sharpness: MinSharpness = None,
    shard: ShardOption = None,
    scheduler: Scheduler = None,
    max_broken: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of a slide's tiles that may be unreadable and left out."),
    ] = 0.1,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail slides of which any tile is unreadable.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try slides again that could not be read before.")
    ] = False,
) -> None:
    """Turn slides into bags of features; skip existing bags, and continue if a slide fails.

    Several such commands with the same --out share the slides; `hdmil status OUT` shows how far they are.
    """
    from hdmil_lib.config import setup
    from hdmil_lib.devices import resolve_all
    from hdmil_lib.encoders import extraction
    from hdmil_lib.encoders.loading import load_encoder
    from hdmil_lib.slides import TileSettings
    from hdmil_lib.slides.listing import list_slides

    setup()
    settings = tissue_of(tissue, min_tissue, min_saturation, min_piece, max_hole, min_sharpness)
    tiles = TileSettings(tile_size, tile_mpp, allow_upsampling)
    scale, gpus, part = scale_of(mpp, force_mpp), resolve_all(device), shard_of(shard)
    files = list_slides(slides)  # nothing is loaded where there are none
    if part is not None and not part.of(files):
        typer.echo(f"shard {shard} is empty: there are {len(files)} slides")
        return
    options: dict[str, Any] = {"precision": precision, "compiled": compiled, "decoder": decoder}
    if encoder_weights is not None:
        options["weights"] = encoder_weights
    given: dict[str, Any] = {
        "mpp": scale,
        "batch_size": batch_size,
        "looks": look,
        "shard": part,
        "tissue": settings,
        "tiles": tiles,
        "max_broken": 0 if strict else max_broken,
        "retry_failed": retry_failed,
    }
    if scheduler is not None:
        from hdmil_lib import cluster

        with client_of(scheduler) as client:
            given |= {"client": client, "encoder": encoder, "device": device, "load": options}
            _print_report(cluster.extract(files, out, **given))
        return
    if precision == "int8":
        options["int8_tiles"] = extraction.spread_tiles(slides, mpp=scale, tissue=settings, tiles=tiles)
    loaded = load_encoder(encoder, device=gpus[0], **options)
    copies = [loaded, *(loaded.to(gpu) for gpu in gpus[1:])]
    _print_report(extraction.extract(files, copies, out, **given))


def _print_report(report: "pd.DataFrame") -> None:
    """Print what became of the slides; exit with 1 if one failed."""
    failed = report[report["status"] == "failed"]
    for status, rows in report.groupby("status", sort=False):
        typer.echo(f"{status}: {len(rows)} slides, {int(rows['n_tiles'].sum()):,} tiles")
    if scales := _scales(report):
        typer.echo(f"scale: {scales}")
    if not report["tried"].any():
        typer.echo("nothing to do: no slide is new")
    if len(failed) and not failed["tried"].all():
        n_known = int((~failed["tried"]).sum())
        typer.echo(f"{n_known} slides could not be read before; --retry-failed tries them again")
    for slide_id, n_broken in zip(report["slide_id"], report["n_broken"], strict=True):
        if n_broken:
            typer.echo(f"note: {slide_id}: {n_broken:,} tiles could not be read and were left out")
    odd = report[report["note"].fillna("") != ""]
    for slide_id, mpp_used, note in zip(odd["slide_id"], odd["mpp"], odd["note"], strict=True):
        typer.echo(f"note: {slide_id}: {mpp_used:.4g} um/px was used; {note}")
    for slide_id, error in zip(failed["slide_id"], failed["error"], strict=True):
        print_error(f"{slide_id}: {error}")
    if len(failed):
        raise typer.Exit(1)


def _scales(report: "pd.DataFrame") -> str:
    """Which sources said how large the pixels are, for how many slides, and what they said."""
    parts = []
    for source, rows in report.dropna(subset=["mpp_source"]).groupby("mpp_source", sort=False):
        low, high = (f"{value:.4g}" for value in (rows["mpp"].min(), rows["mpp"].max()))
        values = low if low == high else f"{low} to {high}"
        noun = "slide" if len(rows) == 1 else "slides"
        parts.append(f"{len(rows)} {noun} from {SOURCES.get(str(source), f'the {source}')} ({values} um/px)")
    return ", ".join(parts)


@app.command()
def encoders() -> None:
    """List the encoders that `hdmil extract` knows."""
    from hdmil_lib.encoders.loading import ENCODERS

    for name, spec in ENCODERS.items():
        gate = ", accept its license on the hub first" if spec.gated else ""
        typer.echo(f"{name:20} {spec.dim:5} features, {spec.license}{gate}")
    typer.echo("timm:NAME            any model of timm; NAME@COMMIT pins the revision on the hub")
    typer.echo("module:function      your own function, which returns a torch module and its input settings")
