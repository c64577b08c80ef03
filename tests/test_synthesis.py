"""The seed of a synthetic slide determines every byte, and the truth mask shows where tumor was painted."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdmil_lib.errors import CohortError, SlideError
from hdmil_lib.synthetic.anatomy import Anatomy, SlideContent
from hdmil_lib.synthetic.drawing import plan_cohort, slide_painter, synthesize_cohort, synthesize_slide
from hdmil_lib.synthetic.histology import Painter
from hdmil_lib.synthetic.presets import PRESETS
from hdmil_lib.synthetic.truth import truth_path, tumor_share

TINY = {name: replace(preset, tiles=(6, 9)) for name, preset in PRESETS.items()}


def test_the_picture_does_not_depend_on_the_strips():
    painter = Painter(SlideContent(tumor_share=0.1), 700, 900, 0.5, seed=3)
    pictures = [np.concatenate(list(painter.strips(height))) for height in (61, 512, 2000)]
    assert pictures[0].shape == (900, 700, 3)
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] == pictures[2]).all()


def test_a_slide_of_60000_pixels_is_painted_in_bounded_memory():
    tracemalloc.start()
    painter = Painter(SlideContent(tumor_share=0.05), 60_000, 60_000, 0.5, seed=0)
    strip = next(painter.strips())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert strip.shape == (512, 60_000, 3)
    assert peak < 500e6


@pytest.mark.parametrize("name", PRESETS)
def test_the_seed_determines_every_byte(tmp_path, name):
    preset = TINY[name]
    first, again, other = (
        synthesize_slide(tmp_path / f"{i}.tif", preset, preset.classes[1], seed)
        for i, seed in enumerate((5, 5, 6))
    )
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    assert truth_path(first).read_bytes() == truth_path(again).read_bytes()


def test_openslide_reads_scale_levels_and_size(tmp_path):
    path = synthesize_slide(tmp_path / "a.tif", "camelyon-mini", "normal", 1, size=(832, 640), mpp=0.47)
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.47, rel=1e-5)
        assert slide.dimensions == (832, 640)
        assert slide.level_count >= 4
    truth = cv2.imread(str(truth_path(path)), cv2.IMREAD_UNCHANGED)
    assert truth.shape == (38, 49)  # 300.8 x 391.04 um in whole pixels of 8 um
    assert not truth.any()


@settings(max_examples=10, deadline=None)
@given(share=st.floats(0.005, 0.6), seed=st.integers(0, 10_000))
def test_tumor_covers_the_requested_share_of_the_tissue(share, seed):
    anatomy = Anatomy(SlideContent(tumor_share=share), (1800.0, 1800.0), seed)
    points = np.arange(2, 1800, 4, dtype=np.float32)
    grid = np.meshgrid(points, points)
    covered = (anatomy.tumor_level(*grid) > 0).sum() / (anatomy.outline > 0).sum() * 16 / anatomy.pitch**2
    # The map has pixels of 8 um and warped borders: errors of a fifth, or of a few pixels of a small focus.
    assert covered == pytest.approx(share, rel=0.2, abs=0.002)


def tissue_of(other_share, seed=0):
    content = SlideContent("lung", 0.5, "solid", "glands", other_share)
    points = np.arange(0, 1800, 8, dtype=np.float32)
    return Anatomy(content, (1800.0, 1800.0), seed).at(*np.meshgrid(points, points))["tissue"]


def test_a_mixed_tumor_has_both_architectures():
    shares = []
    for seed in range(4):
        own, mixed, other = (tissue_of(share, seed) for share in (0.0, 0.4, 1.0))
        differ = own != other
        assert ((mixed == own) | (mixed == other)).all()
        shares.append((mixed == other)[differ].mean())
    # The field is smooth, with two or three patches across a slide: its share varies around the set value.
    assert np.mean(shares) == pytest.approx(0.4, abs=0.15)
    content = SlideContent("lung", 0.5, "solid", "glands", 0.0)
    plain = Anatomy(replace(content, other=None), (1800.0, 1800.0), 0)
    points = np.meshgrid(*[np.arange(0, 1800, 8, dtype=np.float32)] * 2)
    assert (plain.at(*points)["tissue"] == tissue_of(0.0)).all()


def test_truth_marks_what_the_tumor_changes():
    """A slide painted with and without its tumor differs inside the mask and nowhere else."""
    content = SlideContent(tumor_share=0.15, grade=0.9)
    with_tumor, without = (
        Painter(c, 1536, 1536, 0.5, seed=2) for c in (content, replace(content, tumor_share=0.0))
    )
    truth = with_tumor.truth()
    pictures = [np.concatenate(list(p.strips())).astype(int) for p in (with_tumor, without)]
    changed = np.abs(pictures[0] - pictures[1]).max(-1).reshape(96, 16, 96, 16).mean((1, 3)) > 8
    near = cv2.dilate(truth.astype(np.uint8), np.ones((5, 5))) > 0  # nuclei reach across the border
    assert truth.sum() > 200
    assert (changed & ~near).sum() == 0
    assert changed[truth].mean() > 0.8


def test_normal_and_tumor_slides_have_similar_colors():
    """Color hardly separates the classes: the stain varies more than the content."""
    preset = replace(PRESETS["camelyon-mini"], tiles=(6, 8))
    means = {}
    for label in preset.classes:
        painters = [slide_painter(preset, label, seed) for seed in range(4)]
        means[label] = np.array([np.concatenate(list(p.strips())).mean((0, 1)) for p in painters])
    gap = np.abs(means["normal"].mean(0) - means["tumor"].mean(0))
    assert (gap < means["normal"].std(0) + means["tumor"].std(0)).all()


def test_a_cohort_is_drawn_once_and_resumed(tmp_path):
    preset = TINY["camelyon-mini"]
    table = synthesize_cohort(preset, tmp_path, 3, seed=1, progress=False, workers=1)
    assert list(table.columns) == ["slide_id", "case_id", "label", "path"]
    files = [Path(path) for path in table.path]
    before = [file.read_bytes() for file in files]
    times = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    truth_path(files[2]).unlink()
    again = synthesize_cohort(preset, tmp_path, 3, seed=1, progress=False, workers=1)
    assert again.equals(table)
    assert [file.read_bytes() for file in files] == before
    assert files[0].stat().st_mtime_ns == times[0]
    assert {f.name for f in tmp_path.iterdir()} == {n for f in files for n in (f.name, truth_path(f).name)}


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(sorted(PRESETS)), n=st.integers(20, 300), seed=st.integers(0, 99))
def test_plans_have_the_size_the_classes_and_whole_cases(name, n, seed):
    preset = PRESETS[name]
    plan = plan_cohort(preset, n, seed)
    assert len(plan) == n
    assert plan.slide_id.is_unique
    assert plan.seed.is_unique
    assert (plan.groupby("case_id").label.nunique() == 1).all()
    assert plan.groupby("case_id").size().max() <= 2
    share = plan.groupby("case_id").label.first().value_counts(normalize=True)
    for label, wanted in zip(preset.classes, preset.proportions, strict=True):
        assert share[label] == pytest.approx(wanted, abs=1 / plan.case_id.nunique())


@settings(max_examples=20, deadline=None)
@given(data=st.data(), rows=st.integers(1, 70), cols=st.integers(1, 70))
def test_tumor_share_counts_the_pixels_of_each_tile(tmp_path_factory, data, rows, cols):
    mask = np.random.default_rng(data.draw(st.integers(0, 99))).random((rows, cols)) < 0.3
    path = tmp_path_factory.mktemp("t") / "s.truth.png"
    cv2.imwrite(str(path), mask.astype(np.uint8) * 255)
    tiles = data.draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8))
    shares = tumor_share(path, np.array(tiles, dtype=int).reshape(-1, 2))
    assert shares.dtype == np.float32
    assert shares.shape == (len(tiles),)
    for (row, col), share in zip(tiles, shares, strict=True):
        window = mask[16 * row : 16 * row + 16, 16 * col : 16 * col + 16]
        assert share == pytest.approx(window.sum() / 256)


def test_wrong_names_are_named(tmp_path):
    with pytest.raises(CohortError, match="camelyon-maxi.*camelyon-mini"):
        synthesize_slide(tmp_path / "a.tif", "camelyon-maxi", "normal", 0)
    with pytest.raises(CohortError, match="benign.*normal"):
        synthesize_slide(tmp_path / "a.tif", "camelyon-mini", "benign", 0)
    with pytest.raises(SlideError, match=r"a\.truth\.png"):
        tumor_share(tmp_path / "a.truth.png", np.zeros((1, 2), int))
    assert list(tmp_path.iterdir()) == []
