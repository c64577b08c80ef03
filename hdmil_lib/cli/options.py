"""Options that several commands have."""

from pathlib import Path
from typing import Annotated, Literal

import typer

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


def scale_of(mpp: float | None, force_mpp: float | None) -> float | None:
    """The scale as `Slide` takes it: forced, or for slides that do not say."""
    from hdmil_lib.slides.scale import IfUnknown

    if force_mpp is not None:
        return force_mpp
    return None if mpp is None else IfUnknown(mpp)
