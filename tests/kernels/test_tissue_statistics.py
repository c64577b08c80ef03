"""The counting kernel: exactly the counts of the reference, for tiles around a block of pixels."""

import pytest
import torch

from hdmil_lib.kernels import tissue_statistics
from hdmil_lib.kernels.tissue_statistics import gpu
from hdmil_lib.kernels.tissue_statistics.gpu import PIXELS
from hdmil_lib.kernels.tissue_statistics.op import _forward


def draw(device, *shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator).to(device)


def assert_equal(tiles, **options):
    """Compare the kernel with the reference exactly."""
    ours = tissue_statistics(tiles, backend="triton", **options)
    wanted = tissue_statistics(tiles, backend="torch", **options)
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert (ours.histogram.sum(2) == tiles.shape[1] * tiles.shape[2]).all()
    return ours


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (2, 1, PIXELS - 1), (1, 32, 32), (1, 25, 41), (2, 3, 683), (3, 10, 30), (1, 100, 101)],
)
def test_tiles_around_a_block_of_pixels(device, shape):
    assert_equal(draw(device, *shape))


@pytest.mark.parametrize("bins", [1, 2, 15, 16, 17, 100, 128])
@pytest.mark.parametrize("threshold", [0, 200, 255])
def test_bins_and_thresholds(device, bins, threshold):
    assert_equal(draw(device, 2, 20, 31), bins=bins, threshold=threshold)


@pytest.mark.parametrize("programs", [1, 2, 100])
def test_any_number_of_shares_gives_the_same_counts(device, programs, monkeypatch):
    monkeypatch.setattr(gpu, "PROGRAMS", programs)
    assert_equal(draw(device, 1, 90, 91))


def test_every_chroma_of_every_value(device):
    """All pairs of largest and smallest byte, with each channel as the largest: hues of both signs."""
    value, least = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    least = least.minimum(value)
    middle = (value + 2 * least) // 3
    orders = [(value, middle, least), (least, value, middle), (middle, least, value), (value, least, middle)]
    tiles = torch.stack([torch.stack(o, -1) for o in orders]).to(torch.uint8).to(device)
    assert_equal(tiles, bins=128)


def test_tiles_that_are_not_contiguous_and_no_tiles(device):
    tiles = draw(device, 2, 18, 7)
    assert_equal(tiles[:, ::2].transpose(1, 2))
    histogram, share = tissue_statistics(tiles[:0], backend="triton")
    assert histogram.shape == (0, 3, 16)
    assert share.shape == (0,)


def test_the_operator_is_registered_correctly(device):
    torch.library.opcheck(_forward, (draw(device, 2, 4, 5), 16, 15))


@pytest.mark.gpu
def test_many_tiles_and_repetition(device):
    if device == "cpu":
        pytest.skip("large: takes minutes in the interpreter")
    tiles = draw(device, 512, 256, 256)
    first = assert_equal(tiles)
    for _ in range(20):
        again = tissue_statistics(tiles)
        assert torch.equal(first.histogram, again.histogram)
        assert torch.equal(first.tissue_share, again.tissue_share)
