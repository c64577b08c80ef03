"""The command predict."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from hdmil_lib.cli.app import app
from hdmil_lib.cli.options import (
    AllowUpsampling,
    Decoder,
    Devices,
    EncoderWeights,
    ForceMpp,
    Mpp,
    Scheduler,
    ShardOption,
    client_of,
    scale_of,
    shard_of,
)
from hdmil_lib.errors import HDMILError
from hdmil_lib.storage import check_output
from hdmil_lib.terminal import (
    predict_anytime,
    print_answer,
    print_seconds,
    print_table,
    write_heatmap,
)

PICTURE_SUFFIXES = (".png", ".jpg", ".pdf", ".svg", ".ome.tif", ".ome.tiff")


@app.command()
def predict(
    slides: Annotated[
        list[Path], typer.Argument(help="Slide files, folders, or a CSV with a column `path`.")
    ],
    model: Annotated[str, typer.Option(help="Model folder, or owner/name on the Hugging Face hub.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Table to write, .csv or .parquet, one row per slide; needed for several slides."),
    ] = None,
    heatmap: Annotated[
        Path | None,
        typer.Option(
            help="Picture to write of attention and kept tiles: .png, .pdf, or .ome.tif for QuPath."
        ),
    ] = None,
    geojson: Annotated[
        Path | None, typer.Option(help="GeoJSON file to write of the kept tiles, for QuPath.")
    ] = None,
    all_tiles: Annotated[bool, typer.Option("--all-tiles", help="Read every tile (HDMIL†).")] = False,
    anytime: Annotated[
        bool, typer.Option("--anytime", help="Stop reading once the class is certain; see `hdmil calibrate`.")
    ] = False,
    max_tiles: Annotated[int | None, typer.Option(min=1, help="Largest number of tiles to read.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Seconds after which reading stops.")] = None,
    encoder: Annotated[
        str | None, typer.Option(help="The model's encoder, where it is your own code: module:function.")
    ] = None,
    encoder_weights: EncoderWeights = None,
    device: Devices = "auto",
    decoder: Decoder = "cpu",
    mpp: Mpp = None,
    force_mpp: ForceMpp = None,
    allow_upsampling: AllowUpsampling = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if a tile is damaged.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try slides again that ended processes before.")
    ] = False,
    shard: ShardOption = None,
    scheduler: Scheduler = None,
) -> None:
    """Classify slides from the tiles that LIPN selects on the thumbnail.

    With --anytime, --max-tiles or --max-seconds the most suspicious tiles are read first. With --out the
    predictions are written to a table; slides that are in it already are skipped. Several such commands with
    the same --out share the slides; `hdmil status OUT` shows how far they are.
    """
    from hdmil_lib.config import setup
    from hdmil_lib.devices import resolve_all
    from hdmil_lib.models import HDMIL
    from hdmil_lib.slides.listing import list_slides

    setup()
    for output in filter(None, (heatmap, geojson, out)):
        check_output(output)
    if heatmap is not None and not heatmap.name.endswith(PICTURE_SUFFIXES):
        raise HDMILError(f"{heatmap}: cannot write such a picture; name it {' or '.join(PICTURE_SUFFIXES)}")
    budget = {"max_tiles": max_tiles, "max_seconds": max_seconds}
    by_tiles = anytime or any(value is not None for value in budget.values())
    pictures = heatmap is not None or geojson is not None
    if by_tiles and (all_tiles or strict or pictures or out is not None):
        raise HDMILError(
            "--anytime, --max-tiles and --max-seconds cannot be combined with --all-tiles, --strict, --out, "
            "--heatmap or --geojson"
        )
    scale, files, part = scale_of(mpp, force_mpp), list_slides(slides), shard_of(shard)
    if (part is not None or scheduler is not None) and out is None:
        raise HDMILError("--shard and --scheduler need --out, the table that all processes write")
    if scheduler is not None and (encoder is not None or encoder_weights is not None):
        raise HDMILError("--scheduler: workers load the encoder that the model names; leave out --encoder")
    if part is not None and not part.of(files):
        typer.echo(f"shard {shard} is empty: there are {len(files)} slides")
        return
    many: dict[str, Any] = {"all_tiles": all_tiles, "mpp": scale, "strict": strict}
    many |= {"retry_failed": retry_failed, "allow_upsampling": allow_upsampling}
    if scheduler is not None and out is not None:
        from hdmil_lib import cluster

        given = many | {"decoder": decoder, "device": device}
        with client_of(scheduler) as client:
            print_table(cluster.predict_many(model, files, out=out, client=client, shard=part, **given), out)
        return
    gpus = resolve_all(device)
    loaded = HDMIL.from_pretrained(model).to(gpus[0])
    loaded.decoder = decoder
    if encoder is not None or encoder_weights is not None:
        from hdmil_lib.encoders.loading import load_encoder

        own = encoder or loaded.known_info.encoder
        loaded.encoder = load_encoder(own, device=gpus[0], decoder=decoder, weights=encoder_weights)
    if out is not None or len(files) > 1:
        if out is None or by_tiles or pictures:
            raise HDMILError(
                "--out is needed for several slides, and cannot be combined with --anytime, --max-tiles, "
                "--max-seconds, --heatmap or --geojson"
            )
        print_table(loaded.predict_many(files, out=out, device=gpus, shard=part, **many), out)
        return
    slide, own_scale = files[0].path, files[0].scale(scale)
    if by_tiles:
        margin = None if anytime else math.inf  # that of the model, or none
        rules: dict[str, Any] = {"margin": margin, "allow_upsampling": allow_upsampling, **budget}
        predict_anytime(loaded, slide, device=gpus[0], mpp=own_scale, **rules)
        return
    options: dict[str, Any] = {"all_tiles": all_tiles, "device": gpus[0], "mpp": own_scale, "strict": strict}
    options["allow_upsampling"] = allow_upsampling
    prediction = loaded.predict(slide, progress=True, **options)
    print_answer(slide, prediction.classes, prediction.probabilities)
    typer.echo(f"tiles    {prediction.n_read:,} of {prediction.n_tiles:,} read")
    if len(prediction.broken):
        typer.echo(f"damaged  {len(prediction.broken):,} tiles could not be read and were ignored")
    print_seconds(prediction.seconds)
    if heatmap is not None:
        write_heatmap(prediction, heatmap)
        typer.echo(f"heatmap  {heatmap}")
    if geojson is not None:
        prediction.to_geojson(geojson)
        typer.echo(f"geojson  {geojson}")
