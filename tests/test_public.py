"""What a user types, with `import hdmil_lib as hdmil` alone: from slides to predictions; and the names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from bag_factory import make_bags, make_split
from model_factory import ColorEncoder, write_textured_slide

import hdmil_lib as hdmil

N_SLIDES = 12


def draw_cohort(folder: Path, side: int = 2) -> None:
    """`slides/` with a dozen small slides, and `labels.csv`."""
    (folder / "slides").mkdir()
    rows = []
    for i in range(N_SLIDES):
        path = write_textured_slide(folder / "slides" / f"s{i:02d}.tif", side, side + 1, seed=i)
        label = ("normal", "tumor")[i % 2]
        rows.append(
            {"slide_id": path.stem, "case_id": f"c{i}", "label": label, "path": f"slides/{path.name}"}
        )
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A user's first session, in a folder of its own: all that the lines below have made."""
    folder = tmp_path_factory.mktemp("session")
    draw_cohort(folder)
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HDMIL_CACHE", str(folder / "cache"))
        os.chdir(folder)
        try:
            encoder = ColorEncoder()  # in place of hdmil.load_encoder("efficientnet_lite0")
            report = hdmil.extract("slides/", encoder, "bags/", progress=False)
            cohort = hdmil.Cohort.from_csv("labels.csv", bags="bags/")
            cv = hdmil.cross_validate(cohort, ["abmil", "hdmil"], folds=3, workers=1, progress=False)
            yield folder, report, cohort, cv
        finally:
            os.chdir(before)


@pytest.fixture
def model(session, tmp_path):
    """The best HDMIL, saved and read again."""
    session[3].best("hdmil").save_pretrained(tmp_path / "model")
    model = hdmil.HDMIL.from_pretrained(f"{tmp_path / 'model'}/").to("cpu")
    model.encoder = ColorEncoder()
    return model


def test_slides_become_bags(session):
    folder, report, cohort, _ = session
    assert isinstance(report, pd.DataFrame)
    assert len(report) == N_SLIDES
    assert report["status"].tolist() == ["done"] * N_SLIDES
    assert report["n_tiles"].tolist() == [6] * N_SLIDES
    assert len(cohort) == N_SLIDES
    assert cohort.classes == ("normal", "tumor")
    bag = hdmil.read_bag(folder / "bags" / "s00.h5")
    assert isinstance(bag, hdmil.Bag)
    assert bag.features.shape == (6, 6)


def test_methods_are_compared(session):
    folder, _, _, cv = session
    assert isinstance(cv, hdmil.CrossValidation)
    table = cv.table()
    assert table.index.tolist() == ["ABMIL", "HDMIL"]
    assert cv.folder.is_relative_to(folder / "cache")
    assert (cv.folder / "config.json").is_file()
    assert isinstance(cv.best("hdmil"), hdmil.HDMIL)
    abmil = cv.model("abmil", fold=2)
    assert abmil(torch.randn(5, 6)).probabilities.shape == (1, 2)
    again = hdmil.CrossValidation(cv.folder)
    # Opened again, it also has "hdmil_dagger", on which "hdmil" builds.
    asked = again.predictions["method"].isin(["abmil", "hdmil"])
    pd.testing.assert_frame_equal(again.predictions[asked].reset_index(drop=True), cv.predictions)


def test_splits_come_from_a_folder_or_the_table(session, tmp_path):
    folder, _, cohort, cv = session
    options = {"out": tmp_path / "out", "workers": 1, "progress": False}
    given = hdmil.cross_validate(cohort, ["max"], splits=f"{cv.folder / 'splits'}/", **options)
    assert given.splits == cv.splits
    table = cohort.table.assign(split=["train"] * 6 + ["val"] * 3 + ["test"] * 3)
    table.to_csv(folder / "official.csv", index=False)
    official = hdmil.Cohort.from_csv(folder / "official.csv", bags=folder / "bags")
    options["out"] = tmp_path / "official"
    (split,) = hdmil.cross_validate(official, ["max"], **options).splits
    assert list(split.test) == official.slide_ids[9:]


def test_a_slide_is_predicted_drawn_and_exported(session, model, tmp_path):
    slide = session[0] / "slides" / "s00.tif"
    prediction = model.predict(str(slide))
    assert prediction.label in ("normal", "tumor")
    assert prediction.probabilities.sum() == pytest.approx(1)
    figure = prediction.plot()
    assert len(figure.axes) == 3
    plt.close(figure)
    prediction.to_geojson(str(tmp_path / "kept.geojson"))
    kept = json.loads((tmp_path / "kept.geojson").read_text())["features"]
    assert len(kept) == prediction.kept.sum()
    assert model.predict(slide, all_tiles=True).n_read == 6
    bag = hdmil.read_bag(session[0] / "bags" / "s00.h5")
    np.testing.assert_allclose(model.predict(bag).probabilities, prediction.probabilities, atol=2e-3)


def test_a_slide_is_streamed(session, model):
    steps = list(model.stream(session[0] / "slides" / "s00.tif", max_seconds=10))
    assert steps[-1].end == "all tiles"
    assert len(steps[-1].rows) == 6


def test_many_slides_become_a_table(session, model, tmp_path):
    table = model.predict_many(f"{session[0] / 'slides'}/", out=tmp_path / "predictions.csv", progress=False)
    assert len(table) == N_SLIDES
    assert (table["error"] == "").all()
    assert set(pd.read_csv(tmp_path / "predictions.csv")["label"]) <= {"normal", "tumor"}


def test_a_model_is_made_and_fitted(tmp_path):
    bags, labels = make_bags(12)
    data = hdmil.BagDataset(bags, labels)
    model = hdmil.create_model("abmil", data.dim, 2, embed_dim=8)
    settings = hdmil.TrainSettings(epochs=1, min_epochs=0)
    history = hdmil.fit(model, data, make_split(bags), settings, out=tmp_path / "run", progress=False)
    assert len(history) == 1
    batch = data.batch(["s00", "s01"])
    assert isinstance(batch, hdmil.BagBatch)
    output = model(**batch.inputs_for(model))
    assert output.logits.shape == (2, 2)
    assert sum(model.loss(output, batch.labels).values()).ndim == 0


def test_a_grid_is_laid_over_a_slide(session):
    with hdmil.Slide(session[0] / "slides" / "s00.tif") as slide:
        grid = hdmil.TileGrid.from_slide(slide)
        assert len(grid) == 6
        assert grid.read_tile(slide, 0).shape == (256, 256, 3)


@pytest.mark.slow
def test_the_first_session_with_the_real_encoder(tmp_path):
    """As written in the README: nothing but `hdmil`, paths as text, the default encoder, two processes."""
    draw_cohort(tmp_path)
    script = """
import hdmil_lib as hdmil

if __name__ == "__main__":
    encoder = hdmil.load_encoder("efficientnet_lite0")
    hdmil.extract("slides/", encoder, "bags/")
    cohort = hdmil.Cohort.from_csv("labels.csv", bags="bags/")
    cv = hdmil.cross_validate(cohort, ["abmil", "hdmil"], folds=3)
    print(cv.table())
    model = cv.best("hdmil")
    model.save_pretrained("model/")
    model = hdmil.HDMIL.from_pretrained("model/")
    prediction = model.predict("slides/s00.tif")
    print(prediction)
    prediction.plot("s00.png"); prediction.to_geojson("kept.geojson")
    for step in model.stream("slides/s00.tif", max_seconds=10):
        print(step.probabilities)
    table = model.predict_many("slides/", out="predictions.csv")
    print(len(table), "slides,", (table["error"] != "").sum(), "failed")
"""
    (tmp_path / "session.py").write_text(script)
    env = os.environ | {
        "HDMIL_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(hdmil.__file__).parents[1]),
    }
    result = subprocess.run(
        [sys.executable, "session.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "HDMIL" in result.stdout
    assert "12 slides, 0 failed" in result.stdout
    assert {"bags", "model", "s00.png", "kept.geojson", "predictions.csv"} <= {
        p.name for p in tmp_path.iterdir()
    }


# Names


def test_the_names_that_there_are():
    assert dir(hdmil) == sorted(hdmil.__all__)
    for name in hdmil.__all__:
        assert getattr(hdmil, name) is not None
    assert isinstance(hdmil.__version__, str)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("load_encodr", "load_encoder"),
        ("cross_valdate", "cross_validate"),
        ("hdmil", "HDMIL"),
        ("Hdmil", "HDMIL"),
        ("cohort_", "Cohort"),
        ("CreateModel", "create_model"),
        ("read_bags", "read_bag"),
        ("tilegrid", "TileGrid"),
    ],
)
def test_an_unknown_name_names_the_nearest_one(name, nearest):
    with pytest.raises(AttributeError, match=f"hdmil_lib has no '{name}'; did you mean '{nearest}'"):
        getattr(hdmil, name)
    assert not hasattr(hdmil, name)


def test_a_name_that_is_near_to_none_is_told_all():
    with pytest.raises(AttributeError, match="has no 'xyzzy'; it has .*HDMIL.*cross_validate"):
        hdmil.xyzzy  # noqa: B018


def test_all_names_can_be_imported_at_once():
    code = """
from hdmil_lib import *
import hdmil_lib
names = set(globals())
assert set(hdmil_lib.__all__) <= names, set(hdmil_lib.__all__) - names
assert HDMIL.from_pretrained and load_encoder and Cohort
try:
    from hdmil_lib import cross_valdate
except ImportError as error:
    assert "cross_valdate" in str(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_type_checkers_see_what_is_imported_when_first_used():
    """The names under TYPE_CHECKING are those of `__all__`, and come from where they are found."""
    import ast

    tree = ast.parse(Path(hdmil.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    homes = {alias.name: statement.module for statement in block.body for alias in statement.names}
    assert set(homes) | {"__version__"} == set(hdmil.__all__)
    for name, module in homes.items():
        assert getattr(__import__(module, fromlist=[name]), name) is getattr(hdmil, name)
