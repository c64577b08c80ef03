"""The table of runs, and choices that only validation slides decide."""

import json

import pandas as pd
import pytest

from hdmil_lib.errors import CheckpointError
from hdmil_lib.training.runs import chosen_by_validation, runs_table, save_runs


def write_run(folder, val_losses, seed=4, finished=True):
    folder.mkdir(parents=True)
    config = {"model": "ABMIL", "model_settings": None, "settings": {"seed": seed, "epochs": 2}, "loss": {}}
    (folder / "config.json").write_text(json.dumps(config))
    history = pd.DataFrame({"epoch": range(len(val_losses)), "val_loss": val_losses})
    history.to_csv(folder / "history.csv", index=False)
    if finished:
        provenance = {"commit": "abc", "changed": False, "seconds": 1.5}
        (folder / "provenance.json").write_text(json.dumps(provenance))


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "careful" / "fold0", [0.5, 0.4])
    write_run(tmp_path / "careful" / "fold1", [0.5, 0.45])
    write_run(tmp_path / "bold" / "fold0", [0.9, 0.41])
    write_run(tmp_path / "bold" / "fold1", [0.2, 0.9])
    write_run(tmp_path / "bold" / "fold2", [0.1], finished=False)
    return tmp_path


def test_a_row_an_epoch_with_configuration_seed_and_commit(runs):
    table = pd.read_parquet(save_runs(runs))
    assert len(table) == 8 and table.groupby(["method", "fold"]).size().eq(2).all()
    assert set(table["seed"]) == {4} and set(table["commit"]) == {"abc"}
    assert json.loads(table["configuration"].iloc[0])["settings"] == {"seed": 4, "epochs": 2}
    assert table.query("method == 'bold' and fold == 1")["val_loss"].tolist() == [0.2, 0.9]


def test_a_folder_without_finished_runs_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no finished run"):
        runs_table(tmp_path)


def test_the_lowest_validation_loss_of_each_fold_answers_for_its_test_slides(runs):
    rows = [
        {"method": method, "fold": fold, "slide_id": f"s{fold}", "label": 0, "p_1": p}
        for method, p in (("careful", 0.1), ("bold", 0.9))
        for fold in (0, 1)
    ]
    chosen = chosen_by_validation(pd.DataFrame(rows), runs_table(runs), ["careful", "bold"], "best")
    assert chosen[["method", "fold", "p_1", "chosen"]].values.tolist() == [
        ["best", 0, 0.1, "careful"],
        ["best", 1, 0.9, "bold"],
    ]
    with pytest.raises(ValueError, match="timid"):
        chosen_by_validation(pd.DataFrame(rows), runs_table(runs), ["careful", "timid"], "best")
