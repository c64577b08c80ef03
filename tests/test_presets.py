"""Each preset finds the tissue that it is for, on drawn thumbnails whose tissue is known."""

from dataclasses import asdict

import numpy as np
import pytest
from tissue_factory import GLASS, INKS, UM, Drawing, agreement, biopsy, microarray, section, stained_beside

from hdmil_lib.errors import HDMILError
from hdmil_lib.slides import PRESETS, TissueSettings, tissue_mask, tissue_settings
from hdmil_lib.slides.ink import glass_color
from hdmil_lib.slides.presets import describe, described
from hdmil_lib.slides.tissue import black_mask, pen_mask

HE = {"hematoxylin": 0.15, "eosin": 0.2}
CLEAN = [name for name in PRESETS if name != "default"]


def found(preset: str, thumbnail: np.ndarray) -> np.ndarray:
    return tissue_mask(thumbnail, UM, PRESETS[preset].settings)


@pytest.mark.parametrize(
    ("preset", "drawing", "least"),
    [
        ("default", section(HE), 0.99),
        ("he", section(HE), 0.99),
        ("he", section({"eosin": 0.08}), 0.95),  # pale stroma alone
        ("faint", section({"hematoxylin": 0.015, "eosin": 0.02}), 0.95),
        ("faint", section({"hematoxylin": 0.008, "eosin": 0.015}), 0.92),
        ("ihc", stained_beside({"dab": 0.5}, {"blue counterstain": 0.06}), 0.95),
        ("ihc", stained_beside({"dab": 0.8}, {"blue counterstain": 0.1}), 0.97),
        ("ihc", stained_beside({"dab": 0.3, "blue counterstain": 0.35}, {"blue counterstain": 0.08}), 0.95),
        ("biopsy", biopsy(110), 0.97),
        ("biopsy", biopsy(70), 0.95),
        ("tma", microarray(HE), 0.99),
        ("tma", microarray({"blue counterstain": 0.08}), 0.95),
    ],
)
def test_a_preset_finds_the_tissue_that_it_is_for(preset, drawing, least):
    """Dice's coefficient; the rims of the pieces, where half a pixel is tissue, cost a hundredth or two."""
    assert agreement(found(preset, drawing.render()), drawing.truth) >= least


@pytest.mark.parametrize(
    ("preset", "drawing"),
    [
        ("faint", section({"hematoxylin": 0.008, "eosin": 0.015})),
        ("ihc", stained_beside({"dab": 0.8}, {"blue counterstain": 0.1})),
        ("biopsy", biopsy(110)),
    ],
)
def test_the_default_fails_where_a_preset_is_needed(preset, drawing):
    thumbnail = drawing.render()
    ours, default = (agreement(found(name, thumbnail), drawing.truth) for name in (preset, "default"))
    assert default < 0.5 < 0.9 < ours


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("noise", [1, 3])
def test_blank_glass_has_no_tissue(preset, noise):
    """Also if its tint drifts over the slide by two levels, or its brightness by a fifth."""
    blank = Drawing.blank().render(noise)
    drift = np.linspace(-2, 2, blank.shape[1])[:, None] * [1, 0, -1]
    shaded = blank * np.linspace(0.8, 1, blank.shape[1])[:, None]
    for picture in (blank, blank + drift, shaded):
        assert not found(preset, np.rint(picture).clip(0, 255).astype(np.uint8)).any()


@pytest.mark.parametrize("color", INKS)
@pytest.mark.parametrize("preset", CLEAN)
def test_pen_ink_is_not_tissue(preset, color):
    drawing = section(HE)
    ink = drawing.stroke(color, [(300, 3600), (4700, 3500)])
    ink |= drawing.stroke(color, [(500, 300), (900, 2000), (1500, 3000)], 300)
    thumbnail = drawing.render()
    mask = found(preset, thumbnail)
    assert not (mask & ink).any()
    # The rim of 40 um around the stroke through the tissue is lost with it.
    assert agreement(mask, drawing.truth) >= 0.92
    assert (pen_mask(thumbnail, UM) & ink).sum() >= 0.99 * ink.sum()


@pytest.mark.parametrize("dyes", [HE, {"dab": 0.8}, {"blue counterstain": 0.25}, {"eosin": 0.4}])
def test_no_stain_is_taken_for_ink(dyes):
    thumbnail = section(dyes).render()
    assert not pen_mask(thumbnail, UM).any()


@pytest.mark.parametrize("preset", CLEAN)
def test_a_black_border_is_not_tissue(preset):
    """A border of black with the noise of compression, whose saturation is anything."""
    drawing = section(HE)
    thumbnail = drawing.render()
    rng = np.random.default_rng(0)
    thumbnail[:, :60] = rng.integers(0, 6, thumbnail[:, :60].shape)
    thumbnail[-40:] = 0
    drawing.truth[:, :60] = drawing.truth[-40:] = False
    mask = found(preset, thumbnail)
    assert not mask[:, :60].any()
    assert not mask[-40:].any()
    assert agreement(mask, drawing.truth) >= 0.98
    assert black_mask(thumbnail, UM)[:, :60].all()
    assert not pen_mask(thumbnail, UM)[:, :50].any()


def test_white_that_was_not_scanned_is_no_glass():
    """Readers fill gaps between scanned areas, and transparent ones, with white."""
    thumbnail = section({"hematoxylin": 0.008, "eosin": 0.015}).render()
    thumbnail[:, :80] = 255
    assert glass_color(thumbnail) == pytest.approx(GLASS, abs=1)
    assert not found("faint", thumbnail)[:, :80].any()


def test_a_tint_of_the_glass_does_not_count():
    yellow = np.array([238.0, 236.0, 226.0])
    drawing = section({"hematoxylin": 0.015, "eosin": 0.02})
    assert agreement(found("faint", drawing.render(glass=yellow)), drawing.truth) >= 0.95


def test_a_hole_is_filled_up_to_its_area():
    """A gland of 0.02 mm2 belongs to a core, a lumen of 0.1 mm2 does not."""
    drawing = Drawing.blank()
    disc = drawing.blob((2500, 2000), 1500)
    gland, lumen = drawing.blob((2000, 2000), 80), drawing.blob((3000, 2000), 180)
    drawing.stain(disc & ~gland & ~lumen, HE)
    thumbnail = drawing.render()
    for preset, gland_filled in (("tma", True), ("he", False)):
        mask = found(preset, thumbnail)
        assert mask[250, 250] == gland_filled
        assert not mask[250, 375]


def test_fragments_are_kept_from_the_stated_area_on():
    drawing = Drawing.blank()
    for i, diameter in enumerate((100, 200, 300, 400)):
        drawing.stain(drawing.blob((700 + 1100 * i, 2000), diameter / 2), HE)
    thumbnail = drawing.render()
    for mm2, kept in ((0.001, 4), (0.02, 3), (0.05, 2), (0.1, 1)):
        settings = tissue_settings("he", min_object_um2=mm2 * 1e6)
        mask = tissue_mask(thumbnail, UM, settings)
        assert [bool(mask[250, round((700 + 1100 * i) / UM)]) for i in range(4)] == [False] * (4 - kept) + [
            True
        ] * kept


def test_the_values_of_presets_do_not_change():
    """Bags record a preset by its name."""
    default = asdict(TissueSettings())
    assert default == {
        "min_saturation": 15,
        "max_saturation": 40,
        "median_um": 40.0,
        "closing_um": 56.0,
        "max_hole_um2": 8192.0,
        "min_object_um2": 16384.0,
        "min_tissue": 0.25,
        "white_balance": False,
        "min_density": None,
        "exclude_ink": False,
        "min_sharpness": 0.0,
    }
    clean = {"white_balance": True, "exclude_ink": True}
    dense = {"min_saturation": 5, "max_saturation": 8, "min_density": 0.2}
    changed = {
        "default": {},
        "he": clean | {"min_saturation": 10, "max_saturation": 24},
        "faint": clean | {"min_saturation": 5, "max_saturation": 8},
        "ihc": clean | dense,
        "biopsy": clean
        | {"min_saturation": 8, "max_saturation": 20, "median_um": 24.0}
        | {"min_object_um2": 2500.0, "min_tissue": 0.1},
        "tma": clean | dense | {"max_hole_um2": 30_000.0, "min_object_um2": 50_000.0},
    }
    assert {name: asdict(preset.settings) for name, preset in PRESETS.items()} == {
        name: default | values for name, values in changed.items()
    }


def test_settings_by_name_and_single_changes():
    assert tissue_settings() == tissue_settings("default") == TissueSettings()
    assert tissue_settings("ihc", min_tissue=None) == PRESETS["ihc"].settings
    changed = tissue_settings("biopsy", min_tissue=0.5, min_object_um2=1000.0)
    assert (changed.min_tissue, changed.min_object_um2, changed.median_um) == (0.5, 1000.0, 24.0)
    assert describe(tissue_settings("biopsy", min_tissue=0.5)) == "biopsy"
    assert describe(tissue_settings(min_saturation=7)) == "min_saturation=7"
    assert describe(tissue_settings("default", exclude_ink=True)) == "exclude_ink=1"


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("ich", {}, "no tissue preset 'ich' .did you mean 'ihc'"),
        ("he", {"min_tissue": 1.5}, "min_tissue is 1.5, expected a share of 0 to 1"),
        ("he", {"min_tissue": float("nan")}, "min_tissue is nan"),
        ("he", {"min_saturation": 300}, "min_saturation is 300, expected 0 to 255"),
        ("he", {"min_saturation": 30}, "min_saturation 30 is above max_saturation 24"),
        ("he", {"min_object_um2": -1.0}, "min_object_um2 is -1, expected 0 or more"),
        ("he", {"median_um": float("inf")}, "median_um is inf"),
    ],
)
def test_wrong_settings(preset, changes, message):
    with pytest.raises(HDMILError, match=message):
        tissue_settings(preset, **changes)


def test_no_ink_and_more_stroma_on_a_real_slide(real_data):
    from hdmil_lib.slides import Slide, TileGrid

    with Slide(real_data / "cmu_small_region.svs") as slide:
        grids = {name: TileGrid.from_slide(slide, tissue=name) for name in PRESETS}
    assert not pen_mask(grids["he"].thumbnail, UM).any()
    areas = {name: grid.tissue.mean() for name, grid in grids.items()}
    assert areas["default"] <= areas["he"] <= areas["faint"] <= areas["ihc"] <= areas["tma"]
    assert areas["tma"] < 1.2 * areas["default"]


@pytest.mark.parametrize("name", PRESETS)
def test_settings_are_read_from_their_description(name):
    for changes in ({}, {"min_object_um2": 123.0, "exclude_ink": True}, {"min_density": 0.5}):
        settings = tissue_settings(name, min_tissue=0.3, **changes)
        assert described(describe(settings), 0.3) == settings


def test_a_text_that_describes_no_settings_is_refused():
    for text in ("unknown", "min_object_um2=much", "colour=3"):
        with pytest.raises(HDMILError, match="describes no tissue settings"):
            described(text, 0.25)
