"""Stage timings: paired, interleaved, and of the tiles they claim."""

from types import SimpleNamespace

import numpy as np
import pytest
from model_factory import make_model, write_textured_slide

from hdmil_lib.reproduce.timing import STAGES, stage_medians, time_slides


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    return [write_textured_slide(folder / f"{name}.tif", seed=seed) for seed, name in enumerate("ab")]


def test_methods_take_turns_in_reversed_order_on_every_slide(slides):
    turns = []

    def predict(path, *, all_tiles, n_readers):
        turns.append((path.stem, all_tiles))
        stages = dict.fromkeys(STAGES, 1.0)
        return SimpleNamespace(slide_id=path.stem, n_tiles=35, n_read=35, seconds=stages | {"total": 5.0})

    model = SimpleNamespace(encoder=lambda tiles: None, predict=predict)
    timings = time_slides(model, slides, repeats=2)
    one_slide = [True, False, False, True]
    assert turns == [("a", every) for every in one_slide] + [("b", every) for every in one_slide]
    assert timings.groupby(["slide_id", "method"]).size().tolist() == [2] * 4


def test_a_budget_reads_that_share_of_the_tiles_of_each_slide(slides):
    timings = time_slides(make_model(slides[0]), slides, repeats=1, keep_ratios=(0.2, 0.6))
    read = timings.groupby("method")["keep_ratio"].unique()
    # whole tiles: 7 and 21 of 35
    assert read["HDMIL, keep 0.20"].tolist() == [0.2]
    assert read["HDMIL, keep 0.60"].tolist() == [0.6]
    assert read["HDMIL†"].tolist() == [1.0]


def test_stages_add_up_and_medians_ignore_one_disturbed_repeat(slides):
    timings = time_slides(make_model(slides[0]), slides[:1], repeats=3)
    # what lies between the stages is opening the file and a few array copies
    assert (timings[list(STAGES)].sum(axis=1) <= timings["total"]).all()
    quiet = stage_medians(timings)["total"]
    timings.loc[timings["repeat"] == 1, "total"] = np.inf
    assert np.isfinite(stage_medians(timings)["total"]).all()
    assert quiet["HDMIL†"] > 0
