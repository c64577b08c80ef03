"""Everything that runs on a GPU runs on one device and never waits for it, proved without a GPU.

PyTorch's fake tensors have shapes, types and a device, and no memory. Two faults that a CPU hides are errors
on a fake GPU: a tensor on another device, and a number that the host reads, for which a real GPU would have
to be waited for. `NoWaitingCopies` adds a third: a copy from the host that waits.
"""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hdmil_lib.batches import BagBatch
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models import HDMIL, LIPN, MODELS, create_model
from hdmil_lib.models.lipn import thresholds_for_keep_ratio
from hdmil_lib.training.fit import Classification, TrainSettings, make_optimizer, train_step
from hdmil_lib.training.joint import JointLearning
from hdmil_lib.training.lipn import LIPNLossWeights, Screening

LENGTHS, DIM = (40, 1, 90), 24
ROWCOL = np.stack(np.divmod(np.arange(sum(LENGTHS)), 10), 1)  # of the host, as the labels: not fake
LABELS = torch.tensor([0, 1, 0])
SETTINGS = TrainSettings(clip=1.0)


class NoWaitingCopies(TorchDispatchMode):
    """Refuses copies from the host to a GPU that wait until they are done, except where networks are made."""

    watches = True

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        if function is torch.ops.aten._to_copy.default:
            here, there = arguments[0].device.type, torch.device(named.get("device") or "cpu").type
            waits = here == "cpu" and there == "cuda" and not named.get("non_blocking")
            assert not (waits and self.watches), "a copy to the GPU without non_blocking=True"
        return function(*arguments, **named)


@pytest.fixture
def gpu():
    """A fake GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True), NoWaitingCopies():
        yield torch.device("cuda", 0)


def backward(loss):
    """`loss.backward()` node by node: PyTorch's engine asks a fake GPU for its streams, which it has not."""
    users, seen, stack = Counter(), set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            following = [other for other, _ in node.next_functions if other is not None]
            users.update(following)
            stack += following
    grads, ready = defaultdict(dict), [loss.grad_fn]
    grads[loss.grad_fn][0] = torch.ones_like(loss)
    while ready:
        node = ready.pop()
        if hasattr(node, "variable"):
            node.variable.grad = grads[node].get(0)
            continue
        for (other, place), grad in zip(
            node.next_functions, grads_of_inputs(node, grads[node]), strict=False
        ):
            if other is None:
                continue
            if grad is not None:
                wanted, before = other._input_metadata[place], grads[other].get(place)
                assert grad.device == wanted.device
                grad = grad.sum_to_size(wanted.shape).to(wanted.dtype)
                grads[other][place] = grad if before is None else before + grad
            users[other] -= 1
            if not users[other]:
                ready.append(other)


def grads_of_inputs(node, grads):
    """The gradients of the inputs of a node, given those of its outputs by place."""
    outputs = node._input_metadata
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        found = node(*[grads.get(place) for place in range(len(outputs))])
    else:
        zeros = [torch.zeros(o.shape, dtype=o.dtype, device=o.device) for o in outputs]
        found = node.apply(*[grads.get(place, zero) for place, zero in enumerate(zeros)])
    return found if isinstance(found, tuple) else (found,)


def made_on(device, make):
    """Build a network on the device; moving one there is not possible under the fake mode."""
    NoWaitingCopies.watches = False
    try:
        with torch.device(device):
            return make()
    finally:
        NoWaitingCopies.watches = True


def fake_batch(device, labels=LABELS, lengths=LENGTHS):
    """A batch as `BagDataset` makes it: features and patches on the GPU, positions and labels on the host."""
    n = sum(lengths)
    fields = {
        "features": torch.empty(n, DIM, dtype=torch.float16, device=device),
        "patches": torch.empty(n, 16, 16, 3, dtype=torch.uint8, device=device),
    }
    batch = BagBatch(
        slide_ids=tuple(f"s{i}" for i in range(len(lengths))),
        segments=Segments(lengths, device),
        labels=labels,
        rows_of=fields.get,
    )
    batch.__dict__["rowcol"] = ROWCOL
    return batch


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
def test_a_training_step_stays_on_the_gpu_and_does_not_wait(name, precision, gpu, monkeypatch):
    model = made_on(gpu, lambda: create_model(name, DIM, 2)).train()
    objective = Classification(model, data=None)
    settings = replace(SETTINGS, precision=precision)
    optimizer = make_optimizer(objective.param_groups(), settings)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
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


def assemble(dmin, lipn, gpu):
    """`HDMIL(dmin, lipn)`, which checks its thresholds on the host, with its buffers on the fake GPU."""
    model = HDMIL(dmin, lipn)
    for name, buffer in model.named_buffers(recurse=False):
        setattr(model, name, torch.empty(buffer.shape, device=gpu))
    return model


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
def test_a_step_of_lipn_and_a_joint_step_do_not_wait(joint, networks, gpu, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    batch = fake_batch(gpu)
    if joint:
        objective = JointLearning(networks, None, LIPNLossWeights())
    else:
        objective = Screening.__new__(Screening)
        objective.learner = objective.lipn = networks.lipn
        objective.dmin, objective.target, objective.weights = networks.dmin, "mask", LIPNLossWeights()
        objective.augment = True
        objective.targets = {
            slide_id: torch.empty(n, 2, device=gpu)
            for slide_id, n in zip(batch.slide_ids, LENGTHS, strict=True)
        }
    objective.learner.train()
    optimizer = make_optimizer(objective.param_groups(), SETTINGS)
    terms = train_step(objective, optimizer, batch, SETTINGS)
    assert {term.device for term in terms.values()} == {gpu}


def test_thresholds_are_chosen_on_the_gpu(gpu):
    scores = [torch.empty(n, 2, device=gpu) for n in LENGTHS]
    with torch.no_grad():
        thresholds = thresholds_for_keep_ratio.__wrapped__(scores, 0.6)
    assert (thresholds.device, thresholds.shape) == (gpu, (2,))
