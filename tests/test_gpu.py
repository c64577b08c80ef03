"""Training and classification on a real GPU; `make gpu` runs these, and they are skipped without one."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from bag_factory import make_bags, make_cohort, make_split
from model_factory import make_model, write_textured_slide

from hdmil_lib import batches, devices
from hdmil_lib.batches import BagDataset
from hdmil_lib.models import MODELS, create_model
from hdmil_lib.training import fit as loop
from hdmil_lib.training.crossval import cross_validate
from hdmil_lib.training.fit import TrainSettings, fit, predict_slides
from hdmil_lib.training.recipes import recipe_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
GPU = torch.device("cuda", 0)
SHORT = TrainSettings(learning_rate=3e-3, epochs=3, min_epochs=3, patience=3)


@pytest.fixture(scope="module")
def bags():
    return make_bags()


@pytest.mark.parametrize("free", [2**40, 0])
def test_batches_are_those_of_the_host_wherever_the_features_lie(bags, free, monkeypatch):
    monkeypatch.setattr(batches.devices, "free_memory", lambda gpu: free)
    here, there = BagDataset(*bags), BagDataset(*bags, GPU)
    assert set(there.resident) == ({"features", "patches"} if free else set())
    groups = [["s03", "s00"], ["s05"], ["s01", "s02", "s04"]]
    moved = there.batches_of(groups, ("features", "patches"))
    for ours, wanted in zip(moved, map(here.batch, groups), strict=True):
        assert ours.features.device == ours.patches.device == ours.segments.offsets.device == GPU
        assert torch.equal(ours.features.cpu().float(), wanted.features)
        assert torch.equal(ours.patches.cpu(), wanted.patches)
        assert ours.labels.tolist() == wanted.labels.tolist()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_trained_on_the_gpu_predicts_the_same_on_the_cpu(bags, name, precision, tmp_path):
    data = BagDataset(*bags)
    split = make_split(data.slide_ids)
    torch.manual_seed(0)
    model = create_model(name, data.dim, 2)
    history = fit(model, data, split, replace(SHORT, precision=precision), out=tmp_path, device="cuda")
    assert np.isfinite(history.drop(columns="val_auc")).all(axis=None)
    assert next(model.parameters()).device == torch.device("cpu")
    here, _ = predict_slides(model, data, split.test)
    there, _ = predict_slides(model.to(GPU), data.to(GPU), split.test)
    assert (there.cpu() - here).abs().max() <= 1e-3 * here.abs().max().clamp(min=1)


def test_a_run_on_the_gpu_resumes_with_its_random_numbers(bags, tmp_path, monkeypatch):
    data = BagDataset(*bags)
    split = make_split(data.slide_ids)

    def run(folder):
        torch.manual_seed(0)
        return fit(create_model("dmin", data.dim, 2), data, split, SHORT, out=folder, device="cuda")

    epoch, calls = loop.train_epoch, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return epoch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "resumed")
    resumed, whole = run(tmp_path / "resumed"), run(tmp_path / "whole")
    # PyTorch adds in any order on a GPU; other noise would be far off.
    pd.testing.assert_frame_equal(resumed, whole, rtol=1e-4)


def test_methods_are_cross_validated_on_the_gpu(bags, tmp_path):
    cohort = make_cohort(tmp_path, *bags)
    recipe = recipe_for(len(cohort), 6).shorter(2)
    cv = cross_validate(
        cohort, ["abmil", "hdmil", "random"], folds=3, recipe=recipe, out=tmp_path / "runs", progress=False
    )
    assert np.isfinite(cv.predictions["p_0"]).all()
    assert cv.hdmil(0).device == torch.device("cpu")


def test_a_slide_is_classified_on_the_gpu_as_on_the_cpu(tmp_path):
    slide = write_textured_slide(tmp_path / "s.tif")
    model = make_model(slide)
    here, there = (model.predict(slide, device=device) for device in ("cpu", "auto"))
    assert model.device == torch.device("cpu")
    np.testing.assert_allclose(there.probabilities, here.probabilities, atol=1e-2)  # LIPN has 16 bits there
    assert model.to("auto").device == devices.resolve("auto") == GPU
    assert model.predict(slide).n_read == there.n_read
