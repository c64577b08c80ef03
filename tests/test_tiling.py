"""A tile and its patch show the same tissue: row i is the same square of the slide in all arrays."""

import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slide_factory import (
    INK,
    bounds_properties,
    damage_tile,
    find_ink,
    paint_disc,
    slide_properties,
    write_slide,
)

from hdmil_lib.errors import SlideError
from hdmil_lib.slides import Slide, TileGrid, tissue_mask

TILE_UM = 128.0
RADIUS_UM = 16.0
inside_a_tile = st.floats(RADIUS_UM + 10, TILE_UM - RADIUS_UM - 10)  # a patch pixel away from the border


@settings(max_examples=30, deadline=None)
@given(
    mpp_x=st.floats(0.2, 1.0),
    aspect=st.floats(0.8, 1.25),
    offset=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    odd=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    rowcol=st.tuples(st.integers(0, 1), st.integers(0, 2)),
    place=st.tuples(inside_a_tile, inside_a_tile),
    pyramid=st.booleans(),
)
def test_tile_and_patch_show_the_same_place(mpp_x, aspect, offset, odd, rowcol, place, pyramid):
    """A disc painted in tile (row, col) is found at its place, both in the tile and in its patch."""
    mpp = (mpp_x, mpp_x * aspect)
    extent = [math.ceil(n * TILE_UM / m) + o + 1 for n, m, o in zip((3, 2), mpp, odd, strict=True)]
    size = [e + o + 3 for e, o in zip(extent, offset, strict=True)]
    in_bounds = [i * TILE_UM + p for i, p in zip(rowcol[::-1], place, strict=True)]
    center = [o * m + c for o, m, c in zip(offset, mpp, in_bounds, strict=True)]

    with tempfile.TemporaryDirectory() as folder, slide_properties(bounds_properties(*offset, *extent)):
        path = Path(folder) / "disc.tif"
        write_slide(path, paint_disc(size, mpp, center, RADIUS_UM), mpp, pyramid=pyramid, tile=32)
        with Slide(path, mpp=mpp) as slide:
            assert (len(slide.levels) >= 5) == pyramid
            grid = TileGrid.from_slide(slide, min_tissue=0, allow_upsampling=True)
            i = grid.rowcol.tolist().index(list(rowcol))
            tile, patch = grid.read_tile(slide, i), grid.patches[i]

    assert grid.shape == (2, 3)
    assert len(grid) == 6
    assert tile.shape == (256, 256, 3)
    assert patch.shape == (16, 16, 3)
    # Patches lie exactly on the grid; the error comes from rounding colors (a tenth of a pixel is 0.8 um).
    assert find_ink(patch, 8.0) == pytest.approx(place, abs=0.4)
    # Tiles start on whole level-0 pixels, which adds up to half a pixel.
    assert find_ink(tile, 0.5) == pytest.approx(place, abs=0.5 * max(mpp) + 0.025)
    others = np.delete(grid.patches, i, axis=0)
    assert (others == 255).all()


def checkerboard(tmp_path, mpp=(0.5, 0.5), **kwargs) -> Path:
    """A slide of 3 x 4 tiles and a remainder, in which tiles with even row + col are full of ink."""
    tile_w, tile_h = (round(TILE_UM / m) for m in mpp)
    pixels = np.full((3 * tile_h + 11, 4 * tile_w + 17, 3), 255, np.uint8)
    for row in range(3):
        for col in range(4):
            if (row + col) % 2 == 0:
                pixels[row * tile_h : (row + 1) * tile_h, col * tile_w : (col + 1) * tile_w] = INK - row - col
    return write_slide(tmp_path / "board.tif", pixels, mpp, tile=128, **kwargs)


@pytest.mark.parametrize("mpp", [(0.5, 0.5), (0.25, 0.5), (1.0, 1.0)])
def test_row_i_is_the_same_tile_in_all_arrays(tmp_path, mpp):
    with Slide(checkerboard(tmp_path, mpp)) as slide:
        grid = TileGrid.from_slide(slide, allow_upsampling=True)
        assert grid.rowcol.tolist() == [[0, 0], [0, 2], [1, 1], [1, 3], [2, 0], [2, 2]]
        assert grid.shape == (3, 4)
        assert grid.tile_size_level0 == (round(TILE_UM / mpp[0]), round(TILE_UM / mpp[1]))
        assert np.array_equal(grid.coords, grid.rowcol[:, ::-1] * grid.tile_size_level0)
        assert grid.coords.dtype == grid.rowcol.dtype == np.int64
        for i, (row, col) in enumerate(grid.rowcol):
            # At the rim, resampling may mix in the white neighbor.
            assert (grid.read_tile(slide, i)[4:-4, 4:-4] == INK - row - col).all()
            assert (grid.patches[i] == INK - row - col).all()
            y, x = 16 * row, 16 * col
            assert np.array_equal(grid.patches[i], grid.thumbnail[y : y + 16, x : x + 16])


def test_the_mask_determines_which_tiles_are_kept(tmp_path):
    with Slide(checkerboard(tmp_path)) as slide:
        grid = TileGrid.from_slide(slide, min_tissue=0.25)
        assert np.array_equal(grid.tissue, tissue_mask(grid.thumbnail, 8.0))
        everything = TileGrid.from_slide(slide, min_tissue=0)
        assert len(everything) == 12
        shares = [
            grid.tissue[16 * r : 16 * r + 16, 16 * c : 16 * c + 16].mean() for r, c in everything.rowcol
        ]
        kept = everything.rowcol[np.array(shares) >= 0.25]
        assert np.array_equal(grid.rowcol, kept)


def test_values_go_back_on_the_grid(tmp_path):
    with Slide(checkerboard(tmp_path)) as slide:
        grid = TileGrid.from_slide(slide)
    values = np.array([1, 2, 3, 4, 5, 6])
    nan = np.nan
    expected = [[1, nan, 2, nan], [nan, 3, nan, 4], [5, nan, 6, nan]]
    np.testing.assert_array_equal(grid.to_map(values), expected)
    np.testing.assert_array_equal(grid.to_map(values, fill=0), np.nan_to_num(expected))


def test_other_tile_sizes_keep_the_pairing(tmp_path):
    with Slide(checkerboard(tmp_path)) as slide:
        grid = TileGrid.from_slide(slide, tile_size=128, mpp=1.0, patch_size=32)
        assert grid.patch_mpp == 4.0
        assert grid.patches.shape == (6, 32, 32, 3)
        assert grid.read_tile(slide, 0).shape == (128, 128, 3)
        assert grid.tile_size_level0 == (256, 256)


def test_a_slide_smaller_than_a_tile(tmp_path):
    pixels = np.full((600, 255, 3), INK, np.uint8)
    path = write_slide(tmp_path / "small.tif", pixels)
    too_small = pytest.raises(SlideError, match=r"small\.tif: 128 x 300 um is smaller than a tile .*mpp=")
    with Slide(path) as slide, too_small:
        TileGrid.from_slide(slide)
    with Slide(path, mpp=1.0) as slide:
        assert TileGrid.from_slide(slide, allow_upsampling=True).shape == (4, 1)


def test_no_tissue(tmp_path):
    pixels = np.full((600, 600, 3), 245, np.uint8)
    with (
        Slide(write_slide(tmp_path / "blank.tif", pixels)) as slide,
        pytest.raises(SlideError, match=r"blank\.tif: no tile has 25% tissue .*lower min_tissue"),
    ):
        TileGrid.from_slide(slide)


def test_real_slide(real_data):
    with Slide(real_data / "cmu_small_region.svs") as slide:
        grid = TileGrid.from_slide(slide)
        assert grid.shape == (11, 8)
        assert 35 <= len(grid) <= 45
        tiles = np.stack([grid.read_tile(slide, i) for i in range(len(grid))])
    cells = tiles.reshape(len(grid), 16, 16, 16, 16, 3).mean((2, 4))
    # A tile averaged to 8 um/px equals its patch, except that coordinates are rounded by up to half a pixel.
    # With a shift of one patch pixel the difference is several times larger.
    difference = np.abs(cells - grid.patches).mean()
    shifted = np.abs(cells[:, :, 1:] - grid.patches[:, :, :-1]).mean()
    assert difference < 1.5
    assert shifted > 5 * difference


def test_a_damaged_tile_of_a_file_without_a_pyramid_stays_on_the_grid(tmp_path):
    pixels = np.full((1024, 1024, 3), INK, np.uint8)
    options = {"pyramid": False, "tile": 256, "compression": "jpeg"}
    whole = write_slide(tmp_path / "a.tif", pixels, **options)
    with Slide(whole) as slide:
        expected = TileGrid.from_slide(slide)
    with Slide(damage_tile(whole, tmp_path / "bad.tif", [5])) as slide:
        grid = TileGrid.from_slide(slide)
        with pytest.raises(SlideError, match=r"bad\.tif: 6\.25% of it cannot be read"):
            slide.thumbnail()
        np.testing.assert_array_equal(grid.coords, expected.coords)
        white = (grid.patches == 255).all(axis=(1, 2, 3))
        assert np.flatnonzero(white).tolist() == [5]
        np.testing.assert_array_equal(grid.patches[~white], expected.patches[~white])
        with pytest.raises(SlideError, match="cannot read level 0"):
            grid.read_tile(slide, 5)
    everything = damage_tile(whole, tmp_path / "worse.tif", range(16))
    with Slide(everything) as slide, pytest.raises(SlideError, match=r"worse\.tif: cannot read level 0"):
        TileGrid.from_slide(slide)
