"""Options that several commands have."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from distributed import Client

    from hdmil_lib.sharing import Shard
    from hdmil_lib.slides.tissue import TissueSettings

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Decoder = Annotated[
    Literal["cpu", "auto", "nvjpeg"],
    typer.Option(help="What decodes JPEG tiles; auto is the GPU, where `pip install hdmil[gpu]` was done."),
]
Devices = Annotated[str, typer.Option(help="auto (all GPUs), cpu, cuda:1, mps, or several: cuda:0,cuda:1.")]
EncoderWeights = Annotated[
    Path | None, typer.Option(help="File of weights for the named encoder, instead of a download.")
]
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
Tissue = Annotated[
    str,
    typer.Option(
        help="Preset of tissue detection: default, he, faint, ihc, biopsy or tma; see `hdmil tissue`."
    ),
]
MinTissue = Annotated[
    float | None, typer.Option(help="Smallest share of tissue in a tile, 0 to 1; else that of the preset.")
]
MinSaturation = Annotated[
    int | None, typer.Option(help="Lowest saturation of tissue, 0 to 255; else that of the preset.")
]
MinPiece = Annotated[
    float | None, typer.Option(help="Smallest piece of tissue in mm2; else that of the preset.")
]
MaxHole = Annotated[
    float | None, typer.Option(help="Largest hole that is filled in mm2; else that of the preset.")
]
TileSize = Annotated[int, typer.Option(help="Side of the tiles in pixels.")]
TileMpp = Annotated[float, typer.Option(help="Scale of the tiles in um/px: 0.5 is 20x, 1 is 10x.")]
AllowUpsampling = Annotated[
    bool,
    typer.Option("--allow-upsampling", help="Enlarge slides that are much coarser than the tiles are to be."),
]
MinSharpness = Annotated[
    float | None,
    typer.Option(help="Leave out tiles that are less sharp: 0.05 is a blur of 2 um; reads all tiles twice."),
]


def tissue_of(
    preset: str,
    min_tissue: float | None,
    min_saturation: int | None,
    min_piece: float | None,
    max_hole: float | None,
    min_sharpness: float | None,
) -> "TissueSettings":
    """Tissue settings of a preset with those options that are given; areas are in mm2."""
    from hdmil_lib.slides.presets import tissue_settings

    settings = tissue_settings(preset)
    lowest = None if min_saturation is None else max(min_saturation, settings.max_saturation)
    return tissue_settings(
        settings,
        min_tissue=min_tissue,
        min_saturation=min_saturation,
        max_saturation=lowest,
        min_object_um2=None if min_piece is None else min_piece * 1e6,
        max_hole_um2=None if max_hole is None else max_hole * 1e6,
        min_sharpness=min_sharpness,
    )


ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard", help="The part of the slides to do, such as 3/16: the third of sixteen; for job arrays."
    ),
]

Scheduler = Annotated[
    str | None,
    typer.Option(help="Address of a Dask scheduler whose workers do it, such as tcp://node1:8786."),
]


@contextmanager
def client_of(scheduler: str | None) -> "Iterator[Client | None]":
    """A client of the scheduler that `--scheduler` names, if any; closed in the end."""
    if scheduler is None:
        yield None
        return
    from hdmil_lib.cluster import connect

    client = connect(scheduler)
    try:
        yield client
    finally:
        client.close(timeout=2)


def shard_of(text: str | None) -> "Shard | None":
    """The shard that `--shard` names, if any."""
    from hdmil_lib.sharing import Shard

    return None if text is None else Shard.parse(text)


def scale_of(mpp: float | None, force_mpp: float | None) -> float | None:
    """The scale as `Slide` takes it: forced, or for slides that do not say.

    Raises:
        HDMILError: A scale is none that a slide can have; also where all slides state theirs.
    """
    from hdmil_lib.errors import HDMILError
    from hdmil_lib.slides.scale import GIVEN_MPP, IfUnknown

    low, high = GIVEN_MPP
    for option, given in (("--mpp", mpp), ("--force-mpp", force_mpp)):
        if given is not None and not low <= given <= high:
            raise HDMILError(
                f"{option} must be positive, {low:g} to {high:g} micrometers per pixel, got {given:g}"
            )
    if force_mpp is not None:
        return force_mpp
    return None if mpp is None else IfUnknown(mpp)
