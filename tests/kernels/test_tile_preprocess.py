"""The kernels of tile_preprocess: tiles around a block of pixels, both layouts, with and without a stain."""

import numpy as np
import pytest
import torch

from hdmil_lib.kernels import tile_preprocess
from hdmil_lib.kernels.tile_preprocess import StainTransform, reference
from hdmil_lib.kernels.tile_preprocess.gpu import PIXELS, VALUES
from hdmil_lib.kernels.tile_preprocess.op import _forward
from hdmil_lib.kernels.tile_preprocess.stain import LMS_OF_RGB

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
LMS, RGB = (tuple(map(tuple, m.tolist())) for m in (LMS_OF_RGB, np.linalg.inv(LMS_OF_RGB)))
ZERO = (0.0, 0.0, 0.0)
MIX = ((0.9, 0.2, -0.1), (0.05, 1.1, 0.02), (-0.2, 0.1, 0.8))
FAR = tuple(tuple(-40 * v for v in row) for row in MIX)
STAINS = {
    "none": None,
    "macenko": StainTransform(IDENTITY, MIX, ZERO, IDENTITY),
    "reinhard": StainTransform(LMS, MIX, (0.1, -0.05, 0.2), RGB),
    "far": StainTransform(IDENTITY, FAR, ZERO, IDENTITY),
}


def draw(device, *shape):
    return torch.randint(
        0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    ).to(device)


def assert_close(tiles, stain="none", tolerance=1e-5, **options):
    """Compare the kernel with the reference in float64."""
    ours = tile_preprocess(tiles, MEAN, STD, stain=STAINS[stain], backend="triton", **options)
    scale, shift = [1 / (255 * s) for s in STD], [-m / s for m, s in zip(MEAN, STD, strict=True)]
    numbers = STAINS[stain].numbers() if STAINS[stain] else []
    channels_last = options.get("channels_last", False)
    wanted = reference.tile_preprocess(tiles, scale, shift, numbers, torch.float64, channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert ours.shape == wanted.shape
    assert ours.is_contiguous(memory_format=layout)
    assert ours.dtype == options.get("dtype", torch.float32)
    assert (ours.double() - wanted).abs().amax() <= tolerance * wanted.abs().amax()
    return ours


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, PIXELS - 1), (1, 16, 32), (2, 27, 19), (3, 10, 30)])
@pytest.mark.parametrize("stain", ["none", "macenko", "reinhard"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_tiles_around_a_block_of_pixels(device, shape, stain, channels_last):
    assert_close(draw(device, *shape), stain, channels_last=channels_last)


@pytest.mark.parametrize("n_pixels", [VALUES // 3, VALUES // 3 + 1, 2 * VALUES // 3, VALUES])
def test_channels_go_on_over_blocks_of_values(device, n_pixels):
    assert_close(draw(device, 1, 1, n_pixels), channels_last=True)


@pytest.mark.parametrize("stain", STAINS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_float16(device, stain, channels_last):
    """Results are rounded once, at the end: the error is half of the last of 11 bits."""
    assert_close(
        draw(device, 2, 5, 7), stain, 2**-11 + 1e-5, dtype=torch.float16, channels_last=channels_last
    )


def test_every_byte_of_every_channel(device):
    """Results for all 256 values are finite, and clipped where the map leads beyond black or white."""
    tiles = torch.arange(256, dtype=torch.uint8, device=device)[None, None, :, None].expand(1, 1, 256, 3)
    for stain in STAINS:
        assert assert_close(tiles, stain).isfinite().all()


@pytest.mark.parametrize("stain", ["none", "macenko"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_tiles_that_are_not_contiguous_and_no_tiles(device, stain, channels_last):
    assert_close(draw(device, 2, 9, 8)[:, ::2].transpose(1, 2), stain, channels_last=channels_last)
    for shape in ((0, 8, 8), (2, 0, 8)):
        options = {"stain": STAINS[stain], "channels_last": channels_last, "backend": "triton"}
        assert tile_preprocess(draw(device, *shape), MEAN, STD, **options).shape == (shape[0], 3, *shape[1:])


@pytest.mark.parametrize("stain", [[], STAINS["reinhard"].numbers()])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_operator_is_registered_correctly(device, stain, channels_last):
    arguments = (draw(device, 2, 4, 5), [1.0, 2.0, 3.0], [0.0, 1.0, 2.0], stain, torch.float16, channels_last)
    torch.library.opcheck(_forward, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("stain", ["none", "macenko", "reinhard"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_bfloat16_and_repetition(device, stain, channels_last):
    if device == "cpu":
        pytest.skip("the interpreter computes bfloat16 wrongly")
    options = {"dtype": torch.bfloat16, "channels_last": channels_last}
    tiles = draw(device, 64, 256, 256)
    # bfloat16 has 8 bits.
    first = assert_close(tiles, stain, 2**-8, **options)
    for _ in range(20):
        assert torch.equal(first, tile_preprocess(tiles, MEAN, STD, stain=STAINS[stain], **options))
