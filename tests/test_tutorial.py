"""The main job: its steps run on the shipped bags in a tiny size, resume, and leave what they promise."""

import json
import sys

import pandas as pd
import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tools"))
import tutorial_steps

import hdmil_lib
from hdmil_lib.errors import HDMILError
from hdmil_lib.reproduce.recipes import RECIPES
from hdmil_lib.reproduce.tables import TABLE3_METHODS

TINY = tutorial_steps.Size(
    methods=(*TABLE3_METHODS, "abmil", "random"), n_drawn=1, n_slides=1, side=1024, repeats=1
)
TABLES = {f"table{k}.{suffix}" for k in (1, 2, 3) for suffix in ("csv", "md")} | {
    "predictions.csv",
    "timings.csv",
}
FIGURES = {f"{name}.png" for name in ("methods", "roc", "slide", "stage_times", "training_curves")}


@pytest.mark.slow
def test_leaves_tables_figures_model_and_timing_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HDMIL_FAST", "1")
    monkeypatch.setenv("HDMIL_BUILD", str(tmp_path / "build"))
    monkeypatch.setattr(tutorial_steps, "FAST", TINY)
    monkeypatch.setattr(tutorial_steps, "N_FOLDS", 3)
    monkeypatch.setattr(tutorial_steps, "RECIPES", {"camelyon-mini": RECIPES["camelyon-mini"].shorter(1)})
    monkeypatch.setattr(tutorial_steps.notebooks, "find", list)
    tutorial_steps.run(hdmil_lib.setup(seed=0))
    build = tmp_path / "build"
    assert {path.name for path in (build / "tables").iterdir()} == TABLES
    assert {path.name for path in (build / "figures").iterdir()} == FIGURES
    assert (build / "model" / "config.json").exists()
    printed = capsys.readouterr().out
    assert "HDMIL†" in printed
    assert "full run: AUC" in printed  # what the same systems reach on all slides
    before = pd.read_csv(build / "tables" / "timings.csv")

    tutorial_steps.run(hdmil_lib.setup(seed=0))
    pd.testing.assert_frame_equal(pd.read_csv(build / "tables" / "timings.csv"), before)
    first, second = json.loads((build / "timing.json").read_text())
    assert list(first["steps"]) == list(second["steps"])
    assert len(first["steps"]) == 5
    assert sum(step["seconds"] for step in second["steps"].values()) < sum(
        step["seconds"] for step in first["steps"].values()
    )


def test_a_failed_step_is_not_recorded_as_done(tmp_path):
    steps = tutorial_steps.Steps(tmp_path / "timing.json", fast=True)
    with steps.step("good"):
        pass
    with pytest.raises(ZeroDivisionError), steps.step("bad"):
        1 / 0  # noqa: B018
    (run,) = json.loads((tmp_path / "timing.json").read_text())
    assert list(run["steps"]) == ["good"]
    assert run["steps"]["good"]["peak_mb"] > 0


def test_a_failed_notebook_ends_the_job(tmp_path, monkeypatch):
    failed = tutorial_steps.notebooks.Run("04_x", 1.0, None, error="cell 3 of 9: ZeroDivisionError")
    monkeypatch.setattr(tutorial_steps.notebooks, "find", lambda: [tmp_path / "04_x.ipynb"])
    monkeypatch.setattr(tutorial_steps.notebooks, "execute", lambda path, out: failed)
    with pytest.raises(HDMILError, match="04_x.ipynb: cell 3 of 9"):
        tutorial_steps.run_notebooks(tmp_path)
