"""Composed cohorts: parts share no tile, tumor is where the truth says, each slide has a stain of its own."""

from dataclasses import replace

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label as pieces

from hdmil_lib.bags import read_bag, read_tile_labels
from hdmil_lib.cohort import column_split
from hdmil_lib.errors import CohortError
from hdmil_lib.slides import Slide, TileGrid
from hdmil_lib.synthetic import composed
from hdmil_lib.synthetic.composed import (
    COLLECTIONS,
    Stain,
    collection_in,
    compose_cohort,
    grow,
    parts_of_tiles,
)
from hdmil_lib.synthetic.composition import compose_slide

PCAM, LUNG = COLLECTIONS["pcam"], COLLECTIONS["lc25000"]
COLORS = {"0": (200, 150, 190), "1": (110, 60, 150)}


@pytest.fixture
def tiles(tmp_path):
    """PatchCamelyon's layout: 24 tiles of a class, each of its own shade."""
    root = tmp_path / "tiles"
    for name, color in COLORS.items():
        (root / name).mkdir(parents=True)
        for number in range(24):
            tile = np.full((96, 96, 3), np.array(color[::-1]) + number, np.uint8)
            cv2.imwrite(str(root / name / f"patch{number:03d}.png"), tile)
    return root


def test_a_collection_is_known_by_its_folders(tiles, tmp_path):
    assert collection_in(tiles) is PCAM
    assert collection_in(tiles, "camelyon") is PCAM
    with pytest.raises(CohortError, match="slides of normal and tumor, not nsclc"):
        collection_in(tiles, "nsclc")
    with pytest.raises(CohortError, match="like is 'brca', expected camelyon or nsclc"):
        collection_in(tiles, "brca")
    with pytest.raises(CohortError, match="no folders of tiles of a known collection"):
        collection_in(tmp_path / "absent")


def test_parts_have_no_image_in_common_nor_copies_of_one(tmp_path):
    for name in (*LUNG.normal, *LUNG.tumor):
        (tmp_path / name).mkdir()
        for group in range(20):
            for copy in range(3):
                (tmp_path / name / f"group{group:03d}_{copy}.jpg").touch()
    parts = parts_of_tiles(tmp_path, LUNG, seed=0)
    for name in (*LUNG.normal, *LUNG.tumor):
        groups = [{path.stem[:8] for path in parts[part][name]} for part in parts]
        assert sum(map(len, groups)) == 20 == len(set.union(*groups))
        assert all(len(parts[part][name]) == 3 * len(g) for part, g in zip(parts, groups, strict=True))
    assert parts != parts_of_tiles(tmp_path, LUNG, seed=1)


def test_a_class_with_few_tiles_is_an_error(tiles):
    for path in sorted((tiles / "1").iterdir())[11:]:
        path.unlink()
    with pytest.raises(CohortError, match="11 different tiles are too few"):
        compose_cohort(tiles)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    share=st.floats(0, 1),
    n_foci=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_tumor_grows_in_at_most_so_many_pieces(shape, share, n_foci, seed):
    n_fields = max(1, int(share * shape[0] * shape[1]))
    taken = grow(shape, n_fields, n_foci, np.random.default_rng(seed))
    assert taken.sum() == n_fields
    assert 1 <= pieces(taken)[1] <= n_foci


def test_a_stain_without_jitter_changes_nothing_and_others_differ():
    rng = np.random.default_rng(0)
    tile = rng.integers(30, 240, (16, 16, 3), dtype=np.uint8)
    same = Stain.draw(np.random.default_rng(1), 0.0).apply(tile)
    assert np.abs(same.astype(int) - tile).max() <= 1  # rounding of the logarithm
    purple = np.full((2, 2, 3), (150, 80, 160), np.uint8)
    colors = [Stain.draw(np.random.default_rng(seed), 1.0).apply(purple)[0, 0] for seed in range(8)]
    assert np.std(colors, axis=0).max() > 5
    white = np.full((2, 2, 3), 255, np.uint8)
    assert (Stain.draw(np.random.default_rng(1), 1.0).apply(white) >= 254).all()


def test_the_share_of_tumor_is_that_of_both_kinds(tmp_path):
    tiles = {name: [np.full((64, 64, 3), 100 + 40 * i, np.uint8)] for i, name in enumerate(sorted(
        (*LUNG.normal, *LUNG.tumor)))}  # fmt: skip
    path, _ = compose_slide(
        tmp_path / "s.tif", tiles, [["lung_aca", "lung_n"], ["lung_scc", "lung_n"]], tile_mpp=2.0, mpp=0.5
    )
    with Slide(path) as slide:
        grid = TileGrid.from_slide(slide, min_tissue=0)
    assert composed.tumor_labels(path, grid, LUNG).tolist() == [1, 0, 1, 0]


def test_a_cohort_has_slides_bags_and_an_official_split(tiles, monkeypatch):
    small = {**COLLECTIONS, "pcam": replace(PCAM, fields=7)}
    monkeypatch.setattr(composed, "COLLECTIONS", small)
    made = {"n_slides": 12, "encoder": "color", "workers": 1, "progress": False}
    cohort = compose_cohort(tiles, **made)
    split = column_split(cohort)
    assert [len(part) for part in (split.train, split.val, split.test)] == [6, 2, 4]
    for slide_id, label in cohort.label_of.items():
        share = read_tile_labels(cohort.bag_path(slide_id))
        assert len(share) == len(read_bag(cohort.bag_path(slide_id)))
        assert (share.max() > 0) == bool(label)
    before = {p: p.stat().st_mtime_ns for p in (cohort.root / "slides").iterdir()}
    lost = cohort.root / cohort.table["path"][3]
    lost.unlink()
    again = compose_cohort(tiles, **made)
    assert again.table.equals(cohort.table)
    changed = {p for p in (cohort.root / "slides").iterdir() if p.stat().st_mtime_ns != before[p]}
    assert changed == {lost, composed.truth_path(lost)}


def test_further_slides_of_a_seed_are_others_of_the_same_part():
    some, further = composed.plan(PCAM, 12, seed=3), composed.plan(PCAM, 12, seed=3, first=6)
    assert len(some) == len(further) == 12
    assert not {*some["slide_id"]} & {*further["slide_id"]}
    assert not {*some["seed"]} & {*further["seed"]}
    pd.testing.assert_frame_equal(
        composed.plan(PCAM, 24, seed=3).query("split == 'train' and slide_id in @some.slide_id"),
        some.query("split == 'train'"),
    )


def test_one_part_of_larger_slides(tiles, monkeypatch):
    monkeypatch.setattr(composed, "collection_in", lambda *args: replace(PCAM, fields=7))
    options = {"n_slides": 12, "encoder": "color", "workers": 1, "progress": False}
    cohort = compose_cohort(tiles, parts=("test",), first=4, fields=9, **options)
    assert cohort.table["split"].unique().tolist() == ["test"]
    assert cohort.slide_ids[0] == "camelyon-pcam-test-004"
    whole = compose_cohort(tiles, **options)
    with (
        Slide(cohort.slide_path(cohort.slide_ids[0])) as large,
        Slide(whole.slide_path(whole.slide_ids[0])) as small,
    ):
        assert large.dimensions[0] > small.dimensions[0]


def test_real_tiles_are_composed(real_data):
    assert collection_in(real_data / "pcam", "camelyon") is PCAM
    assert collection_in(real_data / "lc25000", "nsclc") is LUNG
