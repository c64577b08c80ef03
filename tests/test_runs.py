"""The table of runs, the commit that they record, and choices that only validation slides decide."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from hdmil_lib.errors import CheckpointError
from hdmil_lib.training import provenance
from hdmil_lib.training.provenance import source_commit
from hdmil_lib.training.runs import chosen_by_validation, runs_table, save_runs
from hdmil_lib.training.state import claim_folder

NEEDS_GIT = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
NO_COMMIT = {"commit": None, "changed": False}


def write_run(folder, val_losses, seed=4, finished=True):
    folder.mkdir(parents=True)
    config = {"model": "ABMIL", "settings": {"seed": seed, "epochs": 2}}
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


def test_one_row_per_epoch_with_configuration_seed_and_commit(runs):
    table = pd.read_parquet(save_runs(runs))
    assert len(table) == 8
    assert table.groupby(["method", "fold"]).size().eq(2).all()
    assert set(table["seed"]) == {4}
    assert set(table["commit"]) == {"abc"}
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


# The commit of the code


def git(folder, *arguments):
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
    nowhere = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    command = ["git", "-C", str(folder), *identity, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=nowhere)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A repository with one commit of `package/code.py`."""
    folder = tmp_path / "repository"
    (folder / "package").mkdir(parents=True)
    (folder / "package" / "code.py").write_text("x = 1\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "first")
    return folder


@NEEDS_GIT
def test_code_in_its_own_checkout_records_its_commit(repository):
    code = repository / "package" / "code.py"
    head = git(repository, "rev-parse", "HEAD")
    assert len(head) == 40
    assert source_commit(code) == {"commit": head, "changed": False}
    (repository / "notes.txt").write_text("not tracked\n")
    assert source_commit(str(code)) == {"commit": head, "changed": False}
    code.write_text("x = 2\n")
    assert source_commit(code) == {"commit": head, "changed": True}


@NEEDS_GIT
@pytest.mark.parametrize("ignored", [False, True])
def test_code_installed_inside_another_repository_records_no_commit(repository, ignored):
    """As in a virtual environment in a project's folder, whether the project ignores it or not."""
    installed = repository / ".venv" / "lib" / "hdmil_lib" / "provenance.py"
    installed.parent.mkdir(parents=True)
    shutil.copy(provenance.__file__, installed)
    if ignored:
        (repository / ".gitignore").write_text(".venv\n")
    assert source_commit(installed) == NO_COMMIT


@NEEDS_GIT
def test_code_outside_of_repositories_records_no_commit(tmp_path):
    code = tmp_path / "code.py"
    code.touch()
    assert source_commit(code) == NO_COMMIT


def test_without_git_no_commit_is_recorded(repository_without_git):
    assert source_commit(repository_without_git) == NO_COMMIT
    assert source_commit() == NO_COMMIT


@pytest.fixture
def repository_without_git(tmp_path, monkeypatch):
    """A file beside which there is a `.git`, where no program can be found."""
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert shutil.which("git") is None
    return tmp_path / "code.py"


@NEEDS_GIT
def test_the_library_records_its_own_commit():
    file = Path(provenance.__file__)
    try:
        git(file.parent, "ls-files", "--error-unmatch", file.name)
    except subprocess.CalledProcessError:
        pytest.skip("the library does not run from a checkout")
    assert source_commit()["commit"] == git(file.parent, "rev-parse", "HEAD")


def test_a_folder_of_another_run_says_which_settings_differ(tmp_path):
    recipe = {"training": {"epochs": 2, "rate": 0.1}, "lipn": {"epochs": 2}}
    claim_folder(tmp_path, {"seed": 0, "recipe": recipe})
    claim_folder(tmp_path, {"seed": 0, "recipe": recipe})
    other = {"training": {"epochs": 5, "rate": 0.1}, "lipn": {"epochs": 2}}
    with pytest.raises(CheckpointError, match=r"with recipe\.training\.epochs 2, not 5; choose another"):
        claim_folder(tmp_path, {"seed": 0, "recipe": other})
    with pytest.raises(CheckpointError, match=r"holds a run with other settings; choose another"):
        claim_folder(tmp_path, {"seed": 0, "recipe": {}})
