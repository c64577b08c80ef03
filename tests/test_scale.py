"""The scale of a slide: who says it, in which order, and what is not believed."""

import pytest

from hdmil_lib.slides.scale import IfUnknown, scale_of

MPP = {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25"}
POWER = {"openslide.objective-power": "20"}


def resolution(per_unit, unit="centimeter"):
    return {"tiff.ResolutionUnit": unit, "tiff.XResolution": str(per_unit), "tiff.YResolution": str(per_unit)}


@pytest.mark.parametrize(
    ("properties", "mpp", "expected", "source"),
    [
        (MPP | resolution(20_000) | POWER, None, 0.25, "properties"),
        (resolution(20_000) | POWER, None, 0.5, "TIFF resolution"),
        (POWER, None, 0.5, "objective power"),
        (MPP, 0.4, 0.4, "given"),
        (MPP, IfUnknown(0.4), 0.25, "properties"),
        ({}, IfUnknown(0.4), 0.4, "given, unknown"),
        (resolution(600, "inch"), IfUnknown(0.4), 0.4, "given, unknown"),  # 42 um/px, of a printer
    ],
)
def test_sources_come_in_their_order(properties, mpp, expected, source):
    found = scale_of(properties, mpp)
    assert found.mpp == pytest.approx((expected, expected))
    assert found.source == source


@pytest.mark.parametrize("stated", ["0.025", "2.5", "0", "-1", "nan", "inf", "x"])
def test_a_scale_that_is_not_credible_is_passed_over_and_said(stated):
    properties = {"openslide.mpp-x": stated, "openslide.mpp-y": stated}
    found = scale_of(properties | POWER)
    assert (found.source, found.mpp) == ("objective power", (0.5, 0.5))
    if stated in ("0.025", "2.5"):
        assert found.notes == (f"properties say {stated} um/px, which is not credible",)
        with pytest.raises(ValueError, match=f"properties say {stated} um/px.*--force-mpp"):
            scale_of(properties)


def test_a_contradiction_is_said():
    assert "0.25 um/px, while the objective power says 0.5" in scale_of(MPP | POWER).notes[0]
    assert scale_of(MPP | {"openslide.objective-power": "40"}).notes == ()


@pytest.mark.parametrize("mpp", [0, -1.0, float("nan"), 250, (0.5, 0)])
def test_what_is_given_must_be_possible(mpp):
    with pytest.raises(ValueError, match="mpp must be positive"):
        scale_of(MPP, mpp)
