"""Synthetic cohorts are drawn and encoded once, and their bags know the truth."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from bag_factory import make_bags, make_cohort

from hdmil_lib.bags import read_tile_labels
from hdmil_lib.cohort import Cohort
from hdmil_lib.errors import CohortError
from hdmil_lib.slides import Slide, TileGrid
from hdmil_lib.synthetic import cohorts, presets
from hdmil_lib.synthetic.cohorts import large_slides, prepare_cohort
from hdmil_lib.synthetic.truth import tile_labels, truth_path, tumor_share


class FakeEncoder:
    """An encoder whose features are the mean color."""

    name, dim, weights_hash, engine, precision, input_size = "fake", 3, "0" * 12, "torch", "fp32", 256
    batch_size = 32

    def __call__(self, tiles):
        return tiles.mean((1, 2)).astype(np.float32)


@pytest.fixture
def tiny(monkeypatch):
    """The preset camelyon-mini with few and small slides."""
    preset = replace(presets.PRESETS["camelyon-mini"], tiles=(12, 14), n_slides=4)
    monkeypatch.setitem(presets.PRESETS, "camelyon-mini", preset)
    monkeypatch.setattr("hdmil_lib.encoders.loading.load_encoder", lambda name, device: FakeEncoder())
    return preset


def test_a_prepared_cohort_has_slides_bags_and_is_resumed(tiny):
    cohort = prepare_cohort("camelyon-mini", workers=1, progress=False)
    assert len(cohort) == 4
    assert cohort.classes == ("normal", "tumor")
    assert all(cohort.slide_path(s).is_file() for s in cohort.slide_ids)
    assert all(len(bag) for bag in cohort.load_bags().values())
    read_back = Cohort.from_csv(cohort.root / "cohort.csv", cohort.classes, bags=cohort.bag_dir)
    pd.testing.assert_frame_equal(read_back.table, cohort.table)

    kept, lost = (cohort.bag_path(s) for s in cohort.slide_ids[:2])
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    again = prepare_cohort("camelyon-mini", workers=1, progress=False)
    assert again.root == cohort.root
    assert lost.is_file()
    assert kept.stat().st_mtime_ns == stamp
    other = replace(tiny, tiles=(13, 14))
    assert cohorts._cohort_digest(other, 4) != cohorts._cohort_digest(tiny, 4)


@pytest.mark.usefixtures("tiny")
def test_the_bags_of_a_prepared_cohort_know_the_share_of_tumor():
    cohort = prepare_cohort("camelyon-mini", n_slides=2, workers=1, progress=False)
    for slide_id, label in zip(cohort.slide_ids, cohort.labels, strict=True):
        with Slide(cohort.slide_path(slide_id)) as slide:
            grid = TileGrid.from_slide(slide)
        stored = read_tile_labels(cohort.bag_path(slide_id))
        np.testing.assert_array_equal(stored, tile_labels(slide.path, grid))
        np.testing.assert_array_equal(stored, tumor_share(truth_path(slide.path), grid.rowcol))
        assert (stored.max() > 0) == label


@pytest.mark.usefixtures("tiny")
def test_slides_that_cannot_be_encoded_are_named(monkeypatch):
    monkeypatch.setattr(FakeEncoder, "__call__", lambda self, tiles: np.full((len(tiles), 3), np.nan))
    with pytest.raises(CohortError, match=r"no bags of camelyon-mini-000-a, .*the first error is: "):
        prepare_cohort("camelyon-mini", workers=1, progress=False)


def test_a_slide_without_truth_has_no_tile_labels():
    (path,) = large_slides("camelyon-mini", 1, 1024, mpp=0.5)
    with Slide(path) as slide:
        grid = TileGrid.from_slide(slide)
    assert tile_labels(path, grid).shape == (len(grid),)
    truth_path(path).unlink()
    assert tile_labels(path, grid) is None


def test_large_slides_are_drawn_once():
    paths = large_slides("camelyon-mini", 2, 512, mpp=0.5)
    stamps = [path.stat().st_mtime_ns for path in paths]
    assert paths[0].read_bytes() != paths[1].read_bytes()
    assert large_slides("camelyon-mini", 2, 512, mpp=0.5) == paths
    assert [path.stat().st_mtime_ns for path in paths] == stamps
    with Slide(paths[0]) as slide:
        assert slide.dimensions == (512, 512)
        assert slide.mpp == pytest.approx((0.5, 0.5))
    assert large_slides("camelyon-mini", 1, 512, mpp=0.25)[0].parent != paths[0].parent


def test_fast_takes_the_shipped_bags(tmp_path, monkeypatch):
    monkeypatch.setattr(cohorts, "SAMPLES", tmp_path)
    with pytest.raises(CohortError, match=r"make_samples\.py"):
        prepare_cohort("camelyon-mini", fast=True)
    bags, labels = make_bags(6)
    make_cohort(tmp_path / "camelyon-mini", bags, labels)
    cohort = prepare_cohort("camelyon-mini", fast=True)
    assert list(cohort.load_bags()) == list(bags)
    assert cohort.labels.tolist() == list(labels.values())
    with pytest.raises(CohortError, match="no such preset"):
        prepare_cohort("camelyon", fast=True)


def test_the_shipped_bags_are_found_in_a_clone():
    assert len(prepare_cohort("camelyon-mini", fast=True)) > 0


def test_an_installed_package_without_samples_says_where_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(cohorts, "SAMPLES", tmp_path / "site-packages" / "data_samples")
    with pytest.raises(CohortError, match="run from a clone of the repository") as error:
        prepare_cohort("camelyon-mini", fast=True)
    assert "\n" not in str(error.value)
