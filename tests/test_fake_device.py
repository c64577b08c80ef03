"""Everything that runs on a GPU runs on one device and never waits for it, proved without a GPU.

`tools/fake_gpu.py` has the fake GPU and what it refuses.
"""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from hdmil_lib.models import LIPN, MODELS, create_model
from hdmil_lib.models.lipn import thresholds_for_keep_ratio
from hdmil_lib.training.fit import Classification, TrainSettings, make_optimizer, train_step
from hdmil_lib.training.joint import JointLearning
from hdmil_lib.training.lipn import LIPNLossWeights

sys.path.insert(0, str(REPOSITORY / "tools"))
import fake_gpu
from fake_gpu import assemble, made_on

LENGTHS, DIM = (40, 1, 90), 24
ROWCOL = np.stack(np.divmod(np.arange(sum(LENGTHS)), 10), 1)  # of the host, as the labels: not fake
LABELS = torch.tensor([0, 1, 0])
SETTINGS = TrainSettings(clip=1.0)


@pytest.fixture
def gpu():
    """A fake GPU."""
    with fake_gpu.fake_gpu() as device:
        yield device


def fake_batch(device, labels=LABELS):
    return fake_gpu.fake_batch(device, LENGTHS, DIM, labels, ROWCOL)


def test_the_fake_gpu_refuses_what_a_gpu_would_wait_for(gpu):
    numbers = torch.ones(3, device=gpu)
    with pytest.raises(Exception, match="two devices"):
        numbers + torch.ones(3)
    with pytest.raises(Exception, match="_local_scalar_dense"):
        float(numbers.sum())
    with pytest.raises(DynamicOutputShapeException):
        numbers.nonzero()
    with pytest.raises(AssertionError, match="non_blocking"):
        torch.ones(3).to(gpu)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_stays_on_the_gpu_and_does_not_wait(name, precision, gpu):
    model = made_on(gpu, lambda: create_model(name, DIM, 2)).train()
    objective = Classification(model, data=None)
    settings = replace(SETTINGS, precision=precision)
    optimizer = make_optimizer(objective.param_groups(), settings)
    with fake_gpu.training():
        terms = train_step(objective, optimizer, fake_batch(gpu), settings)
    assert all(term.device == gpu for term in terms.values())
    assert all(p.grad.device == gpu and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_a_loss_takes_labels_of_the_gpu_too(name, gpu):
    model = made_on(gpu, lambda: create_model(name, DIM, 2)).train()
    batch = fake_batch(gpu, torch.empty(len(LENGTHS), dtype=torch.int64, device=gpu))
    assert {term.device for term in Classification(model, data=None).loss(batch).values()} == {gpu}


@pytest.mark.parametrize("name", MODELS)
def test_a_prediction_stays_on_the_gpu_and_does_not_wait(name, gpu):
    model, batch = made_on(gpu, lambda: create_model(name, DIM, 3)).eval(), fake_batch(gpu)
    with torch.no_grad():  # under inference mode fake constants would be copied in earnest
        output = model(**batch.inputs_for(model))
    assert output.probabilities.device == gpu
    assert output.probabilities.shape == (3, 3)


@pytest.fixture
def networks(gpu):
    """A DMIN and a LIPN on the fake GPU, and the HDMIL of both."""
    dmin = made_on(gpu, lambda: create_model("dmin", DIM, 2))
    lipn = made_on(gpu, lambda: LIPN(2))
    return assemble(dmin, lipn, gpu)


@pytest.mark.parametrize("pooling", ["dmin", "lipn"])
@pytest.mark.parametrize("all_tiles", [False, True])
def test_hdmil_classifies_bags_without_waiting(all_tiles, pooling, networks, gpu):
    networks.pooling = pooling
    batch = fake_batch(gpu)
    with torch.no_grad():
        output = networks(**batch.inputs_for(networks), all_tiles=all_tiles)
    assert output.logits.device == output.attention.device == output.keep_ratio.device == gpu
    assert output.mask.shape == (sum(LENGTHS), 2)


@pytest.mark.parametrize("joint", [False, True])
def test_a_step_of_lipn_and_a_joint_step_do_not_wait(joint, networks, gpu):
    batch = fake_batch(gpu)
    if joint:
        objective = JointLearning(networks, None, LIPNLossWeights())
    else:
        objective = fake_gpu.screening(networks, LENGTHS, gpu, augment=True)
    objective.learner.train()
    optimizer = make_optimizer(objective.param_groups(), SETTINGS)
    with fake_gpu.training():
        terms = train_step(objective, optimizer, batch, SETTINGS)
    assert {term.device for term in terms.values()} == {gpu}


def test_thresholds_are_chosen_on_the_gpu(gpu):
    scores = [torch.empty(n, 2, device=gpu) for n in LENGTHS]
    with torch.no_grad():
        thresholds = thresholds_for_keep_ratio.__wrapped__(scores, 0.6)
    assert (thresholds.device, thresholds.shape) == (gpu, (2,))
