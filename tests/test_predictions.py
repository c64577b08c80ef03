"""Predictions of one slide as picture and GeoJSON, and of many as a table that is resumed."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from threading import Barrier

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from model_factory import ColorEncoder, make_model, write_textured_slide
from slide_factory import damage_tile, write_slide

from hdmil_lib.encoders.extraction import extract_slide
from hdmil_lib.errors import CheckpointError, CohortError, HDMILError, SlideError
from hdmil_lib.inference import slides as inference


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three slides of 3 x 3 tiles."""
    folder = tmp_path_factory.mktemp("slides")
    for i in range(3):
        write_textured_slide(folder / f"s{i}.tif", 3, 3, seed=i)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return make_model(folder / "s0.tif")


@pytest.fixture
def encoded(monkeypatch):
    """Number of tiles of every call of the encoder."""
    calls, encode = [], ColorEncoder.__call__
    monkeypatch.setattr(
        ColorEncoder, "__call__", lambda self, tiles: calls.append(len(tiles)) or encode(self, tiles)
    )
    return calls


# Many slides


def test_each_slide_gets_a_row(folder, model, tmp_path):
    out = tmp_path / "new" / "predictions.csv"
    table = model.predict_many(folder, out=out, progress=False)
    assert table.columns.tolist() == [
        *("slide_id", "label", "p_class 0", "p_class 1", "n_tiles", "n_read", "n_broken", "seconds"),
        *("made_with", "error"),
    ]
    assert table["slide_id"].tolist() == ["s0", "s1", "s2"]
    assert (table["error"] == "").all()
    for row in table.to_dict(orient="records"):
        prediction = model.predict(folder / f"{row['slide_id']}.tif")
        made = row["made_with"]
        assert row | {"seconds": 0} == prediction.to_row() | {"seconds": 0, "made_with": made, "error": ""}
    written = pd.read_csv(out, keep_default_na=False)
    pd.testing.assert_frame_equal(written, table, check_dtype=False)
    assert [path.name for path in out.parent.glob("[!.]*")] == ["predictions.csv"]


def test_a_second_run_predicts_nothing_anew(folder, model, tmp_path, encoded):
    first = model.predict_many(folder, out=tmp_path / "t.csv", progress=False)
    n_encoded, content = len(encoded), (tmp_path / "t.csv").read_bytes()
    assert n_encoded > 0
    second = model.predict_many(folder, out=tmp_path / "t.csv", progress=False)
    assert len(encoded) == n_encoded
    assert (tmp_path / "t.csv").read_bytes() == content
    pd.testing.assert_frame_equal(first, second, check_exact=True)


def test_an_interrupted_run_is_resumed(folder, model, tmp_path, monkeypatch):
    whole = model.predict_many(folder, out=tmp_path / "whole.csv", progress=False)
    predicted, predict_slide = [], inference.predict_slide

    def interrupted(model, path, **options):
        if path.stem == "s2" and len(predicted) == 2:
            raise KeyboardInterrupt
        predicted.append(path.stem)
        return predict_slide(model, path, **options)

    monkeypatch.setattr(inference, "predict_slide", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.predict_many(folder, out=tmp_path / "t.csv", progress=False)
    assert pd.read_csv(tmp_path / "t.csv")["slide_id"].tolist() == ["s0", "s1"]
    predicted.append("again")
    table = model.predict_many(folder, out=tmp_path / "t.csv", progress=False)
    assert predicted == ["s0", "s1", "again", "s2"]
    pd.testing.assert_frame_equal(table.drop(columns="seconds"), whole.drop(columns="seconds"))


def test_one_bad_slide_ends_nothing_and_is_tried_again(folder, model, tmp_path):
    bad = tmp_path / "a.tif"
    bad.write_text("not a slide")
    paths = [bad, tmp_path / "absent.svs", folder / "s0.tif"]
    table = model.predict_many(paths, out=tmp_path / "t.csv", progress=False)
    assert table["slide_id"].tolist() == ["a", "absent", "s0"]
    assert "a.tif" in table["error"][0]
    assert "absent.svs" in table["error"][1]
    assert table["error"][2] == ""
    assert table["n_tiles"].isna().tolist() == [True, True, False]
    assert table["n_tiles"][2] == 9
    assert all(len(error.splitlines()) <= 1 for error in table["error"])
    text = (tmp_path / "t.csv").read_text()
    assert text.splitlines()[0].endswith(",error")
    assert ",9," in text
    assert ",9.0," not in text

    write_textured_slide(bad, 3, 3, seed=5)
    again = model.predict_many(paths, out=tmp_path / "t.csv", progress=False)
    assert (again["error"] == "").tolist() == [True, False, True]
    pd.testing.assert_series_equal(again.loc[2], table.loc[2], check_names=False)


@pytest.mark.parametrize(
    "error",
    [ValueError("many\nlines"), ZeroDivisionError(), MemoryError(), AttributeError("x"), OSError(28, "full")],
    ids=lambda error: type(error).__name__,
)
def test_whatever_fails_on_a_slide_is_its_own(folder, model, tmp_path, monkeypatch, error):
    predict_slide = inference.predict_slide

    def poisoned(model, path, **options):
        if path.stem == "s0":
            raise error
        return predict_slide(model, path, **options)

    monkeypatch.setattr(inference, "predict_slide", poisoned)
    table = model.predict_many(folder, out=tmp_path / "t.csv", progress=False)
    assert (table["error"] == "").tolist() == [False, True, True]
    assert table["error"][0] == (" ".join(str(error).split()) or type(error).__name__)


def test_damaged_tiles_are_counted_or_refused(folder, model, tmp_path):
    whole = write_textured_slide(tmp_path / "whole.tif", 3, 3, compression="jpeg")
    bad = damage_tile(whole, tmp_path / "bad.tif", [0])
    options = {"all_tiles": True, "progress": False}
    row = model.predict_many(bad, out=tmp_path / "t.csv", **options).loc[0]
    assert (row["n_read"], row["n_broken"], row["error"]) == (8, 1, "")
    row = model.predict_many(bad, out=tmp_path / "strict.csv", strict=True, **options).loc[0]
    assert "bad.tif" in row["error"]


def test_slides_come_from_folders_tables_and_lists(folder, model, tmp_path):
    (folder / "labels.csv").write_text("slide_id,path\nx,s2.tif\ny,s1.tif\n")
    for i, (source, expected) in enumerate(
        [
            (str(folder), ["s0", "s1", "s2"]),
            (folder / "labels.csv", ["x", "y"]),
            ([folder / "s1.tif", folder / "labels.csv"], ["s1", "x"]),
            (str(folder / "s1.tif"), ["s1"]),
        ]
    ):
        table = model.predict_many(source, out=tmp_path / f"{i}.csv", progress=False)
        assert table["slide_id"].tolist() == expected
    with pytest.raises(CohortError, match=r"absent\.csv"):
        model.predict_many(tmp_path / "absent.csv", out=tmp_path / "t.csv")
    with pytest.raises(SlideError, match="no slides in it"):
        model.predict_many(tmp_path, out=tmp_path / "t.csv")


def test_slides_of_one_name_are_refused_before_any_is_read(folder, model, tmp_path, encoded):
    twin = write_textured_slide(tmp_path / "s0.tif", 1, 1)
    with pytest.raises(SlideError, match="several slides are called 's0'"):
        model.predict_many([folder, twin], out=tmp_path / "t.csv", progress=False)
    assert encoded == []
    assert not (tmp_path / "t.csv").exists()


def test_names_that_read_as_something_else_stay(model, tmp_path, encoded):
    """Tables turn "007" into a number, and "NA" into nothing."""
    names = ["007", "NA", "1.50", "nan", "a,b", 'a"b', "a b"]
    for i, name in enumerate(names):
        write_textured_slide(tmp_path / f"{name}.tif", 1, 2, seed=i)
    paths = [tmp_path / f"{name}.tif" for name in names]
    model = make_model(paths[0])
    model = model.with_rules()
    model.info = model.info.model_copy(update={"classes": ("0", "NA")})
    first = model.predict_many(paths, out=tmp_path / "t.csv", progress=False)
    n_encoded = len(encoded)
    second = model.predict_many(paths, out=tmp_path / "t.csv", progress=False)
    assert len(encoded) == n_encoded
    assert second["slide_id"].tolist() == names
    pd.testing.assert_frame_equal(first, second)


def test_a_name_that_is_no_utf_8_ends_nothing(folder, model, tmp_path):
    odd = tmp_path / os.fsdecode(b"a\xff.tif")
    odd.write_bytes((folder / "s0.tif").read_bytes())
    for _ in range(2):
        table = model.predict_many([odd, folder / "s1.tif"], out=tmp_path / "t.csv", progress=False)
        assert table["slide_id"].tolist() == ["a\\xff", "s1"]
        assert (table["error"] == "").all()
        assert table["n_tiles"].tolist() == [9, 9]
    odd.write_text("no slide any more")
    table = model.predict_many(odd, out=tmp_path / "again.csv", progress=False)
    assert "a\\xff.tif" in table["error"][0]


@pytest.mark.parametrize(
    "content",
    [b"", b"slide_id,n\na,1\n", b"error\n\n", b"\xff\xfes\x00l\x00", b'slide_id,error\n"a', b"\x00" * 100],
    ids=["empty", "other columns", "no slide_id", "UTF-16", "open quote", "binary"],
)
def test_another_file_is_not_written_over(folder, model, tmp_path, encoded, content):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"t\.csv: no table of predictions") as caught:
        model.predict_many(folder, out=tmp_path / "t.csv", progress=False)
    assert len(str(caught.value).splitlines()) == 1
    assert encoded == []
    assert (tmp_path / "t.csv").read_bytes() == content


def test_the_table_of_a_model_with_other_classes_is_refused(folder, model, tmp_path):
    make_model(n_classes=3).predict_many(folder, out=tmp_path / "t.csv", progress=False)
    with pytest.raises(CheckpointError, match="class 0, class 1, but of .*p_class 2"):
        model.predict_many(folder, out=tmp_path / "t.csv", progress=False)


def test_a_table_holds_predictions_of_one_model(folder, model, tmp_path, encoded):
    out = tmp_path / "t.csv"
    model.predict_many(folder / "s0.tif", out=out, progress=False)
    content, n_encoded = out.read_bytes(), len(encoded)
    other = make_model(folder / "s0.tif", keep=0.9)
    for predict in (other.predict_many, partial(model.predict_many, all_tiles=True)):
        with pytest.raises(
            CheckpointError, match=r"t\.csv: holds predictions of another model.*choose another"
        ):
            predict(folder / "s1.tif", out=out, progress=False)
    pd.read_csv(out).drop(columns="made_with").to_csv(tmp_path / "old.csv", index=False)
    with pytest.raises(CheckpointError, match="an earlier version"):
        model.predict_many(folder, out=tmp_path / "old.csv", progress=False)
    assert (out.read_bytes(), len(encoded)) == (content, n_encoded)


def test_a_slide_that_was_replaced_is_predicted_again(folder, model, tmp_path, encoded):
    slide, out = tmp_path / "s.tif", tmp_path / "t.csv"
    shutil.copy(folder / "s0.tif", slide)
    first = model.predict_many(slide, out=out, progress=False)
    shutil.copy(folder / "s1.tif", slide)
    second = model.predict_many(slide, out=out, progress=False)
    assert first["p_class 0"][0] != second["p_class 0"][0]
    forced = model.predict_many(slide, out=out, mpp=0.4, progress=False)
    assert len(forced) == 1
    assert forced["n_tiles"][0] < second["n_tiles"][0]
    slide.unlink()
    n_encoded = len(encoded)
    kept = model.predict_many(slide, out=out, mpp=0.4, progress=False)
    assert (kept["error"][0], len(encoded)) == ("", n_encoded)


def test_an_output_that_cannot_be_written_fails_before_any_slide(folder, model, tmp_path, encoded):
    (tmp_path / "file").write_text("notes")
    with pytest.raises(CheckpointError, match="is a folder; name a CSV file in it"):
        model.predict_many(folder, out=tmp_path, progress=False)
    with pytest.raises(CheckpointError, match="file: cannot be a folder"):
        model.predict_many(folder, out=tmp_path / "file" / "t.csv", progress=False)
    assert encoded == []


# Pictures


def test_a_plot_shows_attention_beside_the_kept_tiles(folder, model, tmp_path):
    prediction = model.predict(folder / "s0.tif")
    assert 0 < prediction.kept.sum() < 9
    figure = prediction.plot()
    left, right, bar = figure.axes
    assert bar.get_ylabel() == f"attention for {prediction.label}, rank among tiles"
    assert right.get_title(loc="left").startswith(f"{prediction.kept.sum()} of 9 tiles kept") or (
        right.get_title().startswith(f"{prediction.kept.sum()} of 9 tiles kept")
    )
    assert figure.get_suptitle().startswith(f"s0: {prediction.label} 0.")
    np.testing.assert_array_equal(left.images[0].get_array(), prediction.thumbnail)
    drawn = left.images[1].get_array()[..., 3].reshape(-1) > 0  # opacity of the 3 x 3 cells
    np.testing.assert_array_equal(drawn, prediction.kept)
    grayed = right.images[1].get_array()[..., 3].reshape(-1) > 0
    np.testing.assert_array_equal(grayed, ~prediction.kept)
    plt.close(figure)


def test_a_plot_of_all_tiles_shows_the_attention_of_all(folder, model):
    figure = model.predict(folder / "s0.tif", all_tiles=True).plot()
    assert (figure.axes[0].images[1].get_array()[..., 3] > 0).all()
    plt.close(figure)


def test_a_plot_is_written_whole_and_closed(folder, model, tmp_path):
    prediction = model.predict(folder / "s0.tif")
    before = plt.get_fignums()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(22):  # matplotlib warns from 21 open figures on
            prediction.plot(tmp_path / "deep" / f"{i % 2}.png")
    assert plt.get_fignums() == before
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"0.png", "1.png"}
    assert (tmp_path / "deep" / "0.png").read_bytes().startswith(b"\x89PNG")
    prediction.plot(str(tmp_path / "s.pdf"))
    assert (tmp_path / "s.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match="xyz"):
        prediction.plot(tmp_path / "s.xyz")
    assert plt.get_fignums() == before
    assert not (tmp_path / "s.xyz").exists()


@pytest.mark.parametrize(
    "name", ["$\\frac$", "a$b", "br{0}", "a[b]*", "a_b^c", "\\alpha", "100%", os.fsdecode(b"\xff")]
)
def test_names_are_drawn_as_they_are(folder, model, tmp_path, name):
    prediction = model.predict(folder / "s0.tif")
    object.__setattr__(prediction, "slide_id", name)
    object.__setattr__(prediction, "classes", (name, name + "2"))
    prediction.plot(tmp_path / "s.png")


def test_a_plot_of_a_bag_without_patches(folder, model, tmp_path):
    bag = extract_slide(folder / "s0.tif", ColorEncoder(), tmp_path / "s0.h5")
    object.__setattr__(bag, "patches", None)
    model.predict(bag, all_tiles=True).plot(tmp_path / "s.png")


def test_plotting_needs_neither_seaborn_nor_models():
    code = """
import sys
import hdmil_lib.viz.overlays
print(*{"seaborn", "torch", "hdmil_lib.models", "openslide"} & set(sys.modules))
"""
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert loaded.split() == []


# GeoJSON


def area(ring):
    """Twice the signed area: positive where corners go clockwise on the screen."""
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(ring, ring[1:], strict=False))


@pytest.mark.parametrize("mpp", [(0.5, 0.5), (0.25, 0.25), (0.37, 0.28)])
@pytest.mark.parametrize("kept_only", [True, False])
def test_geojson_has_one_polygon_per_tile_in_level_0_pixels(tmp_path, mpp, kept_only):
    rng = np.random.default_rng(0)
    shades = rng.integers(110, 190, (5, 6, 3)) - [0, 90, 0]
    pixels = shades.repeat(round(135 / mpp[1]), 0).repeat(round(135 / mpp[0]), 1)
    path = write_slide(tmp_path / "s.tif", pixels.astype(np.uint8), mpp)
    prediction = make_model(path).predict(path)
    width, height = (round(128 / m) for m in mpp)
    prediction.to_geojson(tmp_path / "deep" / "s.geojson", kept_only=kept_only)
    content = json.loads((tmp_path / "deep" / "s.geojson").read_text(encoding="utf-8"))
    assert content["type"] == "FeatureCollection"
    rows = np.flatnonzero(prediction.kept) if kept_only else np.arange(prediction.n_tiles)
    assert len(content["features"]) == len(rows) > 0
    assert len({feature["id"] for feature in content["features"]}) == len(rows)
    for i, feature in zip(rows, content["features"], strict=True):
        assert feature["type"] == "Feature"
        assert feature["geometry"]["type"] == "Polygon"
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1]
        assert len(ring) == 5
        assert len(set(map(tuple, ring))) == 4
        assert all(type(value) is int for corner in ring for value in corner)
        x, y = prediction.coords[i].tolist()
        assert {tuple(corner) for corner in ring} == {
            *((x, y), (x + width, y), (x, y + height), (x + width, y + height)),
        }
        assert abs(area(ring)) == 2 * width * height
        assert x >= 0
        assert x + width <= pixels.shape[1] + 1
        assert y >= 0
        assert y + height <= len(pixels) + 1
        properties = feature["properties"]
        assert properties["classification"]["name"] == ("kept" if prediction.kept[i] else "dropped")
        read = prediction.read[i]
        assert properties["measurements"].keys() == (
            {f"attention {name}" for name in prediction.classes} if read else set()
        )
        for name, value in zip(prediction.classes, prediction.attention[i], strict=True):
            if read:
                assert properties["measurements"][f"attention {name}"] == pytest.approx(value, abs=1e-4)
    assert "NaN" not in (tmp_path / "deep" / "s.geojson").read_text()


def test_a_prediction_says_what_it_is(folder, model):
    prediction = model.predict(folder / "s0.tif")
    assert prediction.label in repr(prediction)
    assert "'s0'" in repr(prediction)
    assert f"{prediction.n_read} of 9 tiles read" in repr(prediction)
    assert prediction.keep_ratio == prediction.kept.mean()
    assert prediction.ranking[0] == prediction.probabilities.argmax()
    assert Path(folder / "s0.tif").stem == prediction.slide_id


def test_several_devices_share_the_slides(folder, model, tmp_path, monkeypatch):
    """Two devices, both of which are the CPU: each has its own networks; no slide is lost or done twice."""
    alone = model.predict_many(folder, out=tmp_path / "alone.csv", progress=False)
    monkeypatch.setattr(inference.devices, "resolve_all", lambda device: [torch.device("cpu")] * 2)
    used, predict_slide = [], inference.predict_slide
    both = Barrier(2, timeout=60)

    def predict(own, path, **options):
        used.append(id(own))
        if path.stem != "s2":
            both.wait()  # the first two slides are predicted at the same time
        return predict_slide(own, path, **options)

    monkeypatch.setattr(inference, "predict_slide", predict)
    shared = model.predict_many(folder, out=tmp_path / "shared.csv", progress=False)
    assert len(used) == 3
    assert len(set(used)) == 2
    pd.testing.assert_frame_equal(shared.drop(columns="seconds"), alone.drop(columns="seconds"))
    assert len(pd.read_csv(tmp_path / "shared.csv")) == 3


def test_a_replica_shares_no_weight_with_its_model(model):
    replica = model.replica()
    ours, theirs = model.state_dict(), replica.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(ours[key].data_ptr() != theirs[key].data_ptr() for key in ours)
    assert replica.info == model.info
    assert not replica.training


def test_a_device_that_is_not_there_is_named(folder, model, tmp_path):
    slide = folder / "s0.tif"
    calls = (
        lambda: model.predict(slide, device="cuda:77"),
        lambda: model.predict_many(folder, out=tmp_path / "t.csv", device="cpu,cuda:77"),
        lambda: model.stream(slide, device="cuda:77"),
        lambda: model.to("cuda:77"),
    )
    for call in calls:
        with pytest.raises(HDMILError, match="There is no device 'cuda:77' here"):
            call()
    assert model.to("auto") is model
