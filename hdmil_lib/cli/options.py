"""Options that several commands have."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from distributed import Client

    from hdmil_lib.sharing import Shard

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
    """The scale as `Slide` takes it: forced, or for slides that do not say."""
    from hdmil_lib.slides.scale import IfUnknown

    if force_mpp is not None:
        return force_mpp
    return None if mpp is None else IfUnknown(mpp)
