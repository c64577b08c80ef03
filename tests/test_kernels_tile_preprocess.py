"""tile_preprocess and its stain fits against NumPy in float64, and on pixels of known stains."""

import numpy as np
import pytest
import torch

from hdmil_lib.kernels import tile_preprocess
from hdmil_lib.kernels.tile_preprocess import StainTransform, fit_macenko, fit_reinhard, stain_vectors

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = dict(mean=(0, 0, 0), std=(1 / 255,) * 3)  # does not change pixels
# Two scanners; columns are optical densities of hematoxylin and eosin, similar to Ruifrok & Johnston 2001.
PURPLE = np.array([[0.65, 0.07], [0.70, 0.99], [0.29, 0.11]])
BROWNISH = np.array([[0.55, 0.20], [0.76, 0.85], [0.35, 0.48]])


def draw(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8))


def stained_pixels(stains, strengths=(1.5, 0.9), n=40_000, background=0.4, seed=0):
    """Draw pixels with one stain, with both, and with none, rounded to bytes."""
    rng = np.random.default_rng(seed)
    amounts = rng.uniform(0, 1, (n, 2)) * strengths
    amounts[: n // 5, 0], amounts[n // 5 : 2 * n // 5, 1] = 0, 0
    amounts[rng.uniform(size=n) < background] = 0
    stains = stains / np.linalg.norm(stains, axis=0)
    return np.clip(256 * np.exp(-amounts @ stains.T) - 1, 0, 255).round().astype(np.uint8)


def angle_degrees(a, b):
    return np.degrees(np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))


def normalized(pixels, stain):
    """Apply the operator to pixels (n, 3) and return pixels (n, 3)."""
    tiles = torch.from_numpy(pixels)[None, None]
    return tile_preprocess(tiles, **PLAIN, stain=stain)[0, :, 0].T.double().numpy()


# Normalization


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_channel_is_normalized(dtype, channels_last):
    tiles = draw(2, 5, 7)
    ours = tile_preprocess(tiles, MEAN, STD, dtype=dtype, channels_last=channels_last)
    assert ours.dtype == dtype
    assert ours.shape == (2, 3, 5, 7)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert ours.is_contiguous(memory_format=layout)
    for b in range(2):
        for c in range(3):
            expected = (tiles[b, ..., c].numpy() / 255.0 - MEAN[c]) / STD[c]
            # The error is half of the last bit of the type, for numbers below 4.
            np.testing.assert_allclose(ours[b, c].double(), expected, atol=2 * torch.finfo(dtype).eps)


def test_no_tiles():
    assert tile_preprocess(draw(0, 8, 8), MEAN, STD).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("fit", [None, fit_macenko, fit_reinhard])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_compiled_operator_equals_the_eager_one(fit, channels_last):
    stain = fit and fit(stained_pixels(PURPLE), stained_pixels(BROWNISH))
    tiles = draw(2, 8, 8)

    def operator(tiles):
        return tile_preprocess(tiles, MEAN, STD, stain=stain, channels_last=channels_last)

    compiled = torch.compile(operator, fullgraph=True)(tiles)
    assert compiled.stride() == operator(tiles).stride()
    torch.testing.assert_close(compiled, operator(tiles))


# Stains


@pytest.mark.parametrize("stains", [PURPLE, BROWNISH])
@pytest.mark.parametrize("background", [0.0, 0.9])
def test_known_stains_are_found(stains, background):
    found, strengths = stain_vectors(stained_pixels(stains, background=background))
    for column in range(2):
        # Rounding to bytes changes the angles of pale pixels, and percentiles lie slightly inside the wedge.
        assert angle_degrees(found[:, column], stains[:, column]) < 2.0
    np.testing.assert_allclose(np.linalg.norm(found, axis=0), 1)
    np.testing.assert_allclose(strengths, (1.5, 0.9), rtol=0.05)


def test_the_order_of_pixels_and_their_shape_do_not_matter():
    pixels = stained_pixels(PURPLE)
    for a, b in zip(stain_vectors(pixels), stain_vectors(pixels[::-1].reshape(200, 200, 3)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_macenko_pixel_by_pixel():
    """Unmix with the source stains, scale, and mix with the target stains, pixel by pixel."""
    pixels, target = stained_pixels(PURPLE), stained_pixels(BROWNISH, (0.8, 1.2), seed=1)
    (source, strengths), (wanted, wanted_strengths) = stain_vectors(pixels), stain_vectors(target)
    ours = normalized(draw(50).numpy(), fit_macenko(pixels, target))
    for pixel, result in zip(draw(50).numpy(), ours, strict=True):
        density = [-np.log((float(x) + 1) / 256) for x in pixel]
        amounts = np.linalg.lstsq(source, density, rcond=None)[0]
        density = wanted @ [a * t / s for a, s, t in zip(amounts, strengths, wanted_strengths, strict=True)]
        expected = [min(max(256 * np.exp(-d) - 1, 0), 255) for d in density]
        # Errors are those of float32 for numbers up to 255.
        np.testing.assert_allclose(result, expected, atol=1e-3)


def test_reinhard_pixel_by_pixel():
    """The published sequence: RGB, LMS, log10, l-alpha-beta, mean and standard deviation, and back."""
    to_lms = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
    to_lab = np.diag([3**-0.5, 6**-0.5, 2**-0.5]) @ [[1, 1, 1], [1, 1, -2], [1, -1, 0]]

    def lab(pixel):
        return to_lab @ np.log10(to_lms @ [(float(x) + 1) / 256 for x in pixel])

    pixels = stained_pixels(PURPLE, n=3000, background=0.0)
    target = stained_pixels(BROWNISH, (0.8, 1.2), n=3000, background=0.0, seed=1)
    stained = [p[np.linalg.norm(np.log((p + 1.0) / 256), axis=1) > 0.15] for p in (pixels, target)]
    source, wanted = (np.array([lab(pixel) for pixel in p]) for p in stained)
    ours = normalized(draw(50).numpy(), fit_reinhard(pixels, target))
    for pixel, result in zip(draw(50).numpy(), ours, strict=True):
        moved = (lab(pixel) - source.mean(0)) / source.std(0) * wanted.std(0) + wanted.mean(0)
        rgb = np.linalg.inv(to_lms) @ 10 ** (np.linalg.inv(to_lab) @ moved)
        # Errors are those of float32 for numbers up to 255, times coefficients of about 4 from LMS to RGB.
        np.testing.assert_allclose(result, np.clip(256 * rgb - 1, 0, 255), atol=5e-3)


def test_macenko_takes_one_scanner_to_the_other():
    """If the same tissue is stained in both ways, the first image becomes the second."""
    pixels, target = stained_pixels(PURPLE, (1.5, 0.9)), stained_pixels(BROWNISH, (1.0, 1.2))
    before = np.abs(pixels.astype(float) - target).mean()
    after = np.abs(normalized(pixels, fit_macenko(pixels, target)) - target).mean()
    assert after < 2.0 < 10.0 < before


def test_reinhard_gives_stained_pixels_the_mean_color_of_the_target():
    pixels, target = stained_pixels(PURPLE, background=0), stained_pixels(BROWNISH, background=0)
    after = normalized(pixels, fit_reinhard(pixels, target)).mean(0)
    np.testing.assert_allclose(after, target.mean(0), atol=4)


@pytest.mark.parametrize("fit", [fit_macenko, fit_reinhard])
def test_a_slide_fitted_to_itself_stays_as_it_is(fit):
    pixels = stained_pixels(PURPLE)
    # Densities are two-dimensional except for the rounding to bytes, which Macenko's method removes.
    np.testing.assert_allclose(normalized(pixels, fit(pixels, pixels)), pixels, atol=1.5)


@pytest.mark.parametrize("fit", [fit_macenko, fit_reinhard])
def test_black_and_white_stay_between_0_and_255(fit):
    stain = fit(stained_pixels(PURPLE), stained_pixels(BROWNISH))
    corners = np.array(np.meshgrid([0, 255], [0, 255], [0, 255])).reshape(3, -1).T.astype(np.uint8)
    result = normalized(corners, stain)
    assert np.isfinite(result).all()
    assert result.min() >= 0
    assert result.max() <= 255


@pytest.mark.parametrize("fit", [fit_macenko, fit_reinhard])
def test_a_blank_tile_is_refused(fit):
    tissue, blank = stained_pixels(PURPLE), np.full((64, 64, 3), 250, np.uint8)
    with pytest.raises(ValueError, match="pixels has no tissue: 0 of 4096 pixels are stained"):
        fit(blank, tissue)
    with pytest.raises(ValueError, match="target has no tissue"):
        fit(tissue, blank)
    # A blank tile can be normalized, and stays white.
    assert normalized(blank[0], fit(tissue, tissue)).min() > 245


def test_too_few_colors_are_refused():
    tissue, one_color = stained_pixels(PURPLE), np.full((64, 3), 100, np.uint8)
    with pytest.raises(ValueError, match="pixels shows one stain only"):
        fit_macenko(one_color, tissue)
    with pytest.raises(ValueError, match="pixels vary along fewer than three axes"):
        fit_reinhard(one_color, tissue)


def test_fits_take_tensors_and_refuse_other_numbers():
    pixels = stained_pixels(PURPLE)
    assert fit_macenko(torch.from_numpy(pixels), pixels) == fit_macenko(pixels, pixels)
    with pytest.raises(ValueError, match="pixels is float64"):
        fit_macenko(pixels / 255, pixels)
    with pytest.raises(ValueError, match="target is uint8"):
        fit_reinhard(pixels, pixels[:, :2])


# Invalid arguments


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tiles", dict(tiles=draw(1, 4, 4).float())),
        ("tiles", dict(tiles=draw(4, 4))),
        ("tiles", dict(tiles=draw(1, 4, 4).permute(0, 3, 1, 2))),
        ("tiles", dict(tiles=draw(1, 4, 4).numpy())),
        ("mean", dict(mean=(0.5,))),
        ("std", dict(std=torch.ones(3))),
        ("std", dict(std=(1.0, 0.0, 1.0))),
        ("stain", dict(stain="macenko")),
        ("dtype", dict(dtype=torch.float64)),
        ("backend", dict(backend="cuda")),
        ("backend", dict(backend="triton")),
    ],
)
def test_a_bad_argument_is_named(name, change, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=name):
        tile_preprocess(**dict(tiles=draw(1, 4, 4), mean=MEAN, std=STD) | change)


def test_the_numbers_of_a_stain_end_with_the_way_back():
    stain = fit_reinhard(stained_pixels(PURPLE), stained_pixels(BROWNISH))
    assert isinstance(stain, StainTransform)
    assert hash(stain)
    space, back = (np.reshape(stain.numbers()[i : i + 9], (3, 3)) for i in (0, 21))
    np.testing.assert_allclose(space @ back, np.eye(3), atol=1e-12)
