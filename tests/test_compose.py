"""The tiles of a composed slide lie where the layout puts them, at the scale of the slide."""

import cv2
import numpy as np
import openslide
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdmil_lib.errors import SlideError
from hdmil_lib.slides import Slide, TileGrid
from hdmil_lib.synthetic.composition import compose_slide
from hdmil_lib.synthetic.truth import tile_labels, truth_path, tumor_share

GRAY = {"a": 60, "b": 120, "c": 180}
TILES = {name: [np.full((32, 32, 3), value, np.uint8)] for name, value in GRAY.items()}


@settings(max_examples=10, deadline=None)
@given(
    layout=st.integers(1, 4).flatmap(
        lambda cols: st.lists(
            st.lists(st.sampled_from(["", "a", "b", "c"]), min_size=cols, max_size=cols),
            min_size=1,
            max_size=4,
        )
    ),
    mpp=st.floats(0.3, 1.0),
)
def test_fields_and_truth_follow_the_layout(tmp_path_factory, layout, mpp):
    path = tmp_path_factory.mktemp("c") / "s.tif"
    if not any(name for row in layout for name in row):
        with pytest.raises(SlideError, match="layout"):
            compose_slide(path, TILES, layout, tile_mpp=2.0, mpp=mpp)
        return
    _, classes = compose_slide(path, TILES, layout, tile_mpp=2.0, mpp=mpp)
    truth = cv2.imread(str(truth_path(path)), cv2.IMREAD_UNCHANGED)
    with openslide.OpenSlide(path) as slide:
        pixels = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[..., 0]
    for i, row in enumerate(layout):
        for j, name in enumerate(row):
            y, x = (int((k + 0.5) * 64 / mpp) for k in (i, j))  # a field is 32 px * 2 um = 64 um
            assert abs(int(pixels[y, x]) - (GRAY[name] if name else 243)) <= 4  # JPEG
            assert (
                truth[8 * i : 8 * i + 8, 8 * j : 8 * j + 8] == (classes.index(name) + 1 if name else 0)
            ).all()


def test_truth_of_a_composed_slide_gives_shares(tmp_path):
    path, classes = compose_slide(tmp_path / "s.tif", TILES, [["a", "b"], ["b", "b"]], tile_mpp=2.0)
    value = classes.index("a") + 1
    share = tumor_share(truth_path(path), np.array([[0, 0]]), value=value)
    assert share == pytest.approx([0.25])  # 4 fields of 64 um make one tile of 128 um
    with Slide(path) as slide:
        grid = TileGrid.from_slide(slide, min_tissue=0)
    assert tile_labels(path, grid, value=value) == pytest.approx([0.25])


def test_every_tile_is_used_before_one_repeats(tmp_path):
    tiles = {"a": [np.full((16, 16, 3), v, np.uint8) for v in range(20, 240, 20)]}
    path, _ = compose_slide(tmp_path / "s.tif", tiles, np.full((1, 11), "a"), tile_mpp=1.0, mpp=1.0, seed=3)
    with openslide.OpenSlide(path) as slide:
        centers = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[8, 8::16, 0]
    assert sorted(np.rint(centers / 20) * 20) == list(range(20, 240, 20))


def test_the_seed_determines_the_order(tmp_path):
    tiles = {"a": [np.full((16, 16, 3), v, np.uint8) for v in range(20, 240, 20)]}
    layout = np.full((4, 4), "a")
    files = [
        compose_slide(tmp_path / f"{i}.tif", tiles, layout, tile_mpp=1.0, seed=seed)[0].read_bytes()
        for i, seed in enumerate((0, 0, 1))
    ]
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize(
    ("tiles", "layout", "problem"),
    [
        (TILES, [["a", "d"]], "'d'"),
        ({"a": []}, [["a"]], "no tiles"),
        ({"a": [np.zeros((8, 9, 3), np.uint8)]}, [["a"]], "square"),
        (
            {"a": [np.zeros((8, 8, 3), np.uint8)], "b": [np.zeros((9, 9, 3), np.uint8)]},
            [["a", "b"]],
            "side 9",
        ),
        ({"a": ["missing.png"]}, [["a"]], "missing.png"),
    ],
)
def test_bad_tiles_name_the_problem_and_leave_nothing(tmp_path, tiles, layout, problem):
    with pytest.raises(SlideError, match=problem):
        compose_slide(tmp_path / "s.tif", tiles, layout, tile_mpp=1.0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_per_class_is_the_same_as_a_mapping(tmp_path):
    for name, tiles in TILES.items():
        (tmp_path / "tiles" / name).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "tiles" / name / "1.png"), tiles[0])
    layout = [["a", "b"], ["c", ""]]
    from_folder, classes = compose_slide(tmp_path / "f.tif", tmp_path / "tiles", layout, tile_mpp=1.0)
    from_mapping, _ = compose_slide(tmp_path / "m.tif", TILES, layout, tile_mpp=1.0)
    assert classes == ("a", "b", "c")
    assert from_folder.read_bytes() == from_mapping.read_bytes()


def test_real_tiles_keep_their_content(tmp_path, real_data):
    folders = {name: sorted((real_data / "pcam" / name).glob("*.jpg"))[:5] for name in "01"}
    originals = {name: [cv2.imread(str(f))[..., ::-1] for f in files] for name, files in folders.items()}
    layout = [["0", "1", ""], ["", "1", "0"]]
    path, classes = compose_slide(tmp_path / "s.tif", folders, layout, tile_mpp=0.97, mpp=0.5)
    assert classes == ("0", "1")
    with openslide.OpenSlide(path) as slide:
        assert slide.dimensions == (559, 372)  # 3 x 2 fields of 96 px * 0.97 um at 0.5 um/px
        field = np.asarray(slide.read_region((0, 0), 0, (186, 186)))[..., :3].mean((0, 1))
        # The field shows one tile of its class: the mean color survives resizing and JPEG.
        means = np.array([tile.mean((0, 1)) for tile in originals["0"]])
        assert np.abs(means - field).max(1).min() < 1.5
