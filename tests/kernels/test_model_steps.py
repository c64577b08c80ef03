"""One training step of every model through the kernels has the loss and the gradients of the references.

This shows that models reach their kernels, with their masks, dropout, seeds and ragged bags.
"""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hdmil_lib.batches import BagBatch
from hdmil_lib.kernels.dispatch import default_backend
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models import DMIN, HDMIL, LIPN, MODELS, create_model, layers
from hdmil_lib.training.fit import Classification
from hdmil_lib.training.joint import JointLearning
from hdmil_lib.training.lipn import LIPNLossWeights

LENGTHS, DIM = (9, 1, 25), 18
POOL, PROJECTION = "segment_softmax_pool", "tile_projection"
ATTENTION_POOL = {"gated_attention_pool", "gated_attention", POOL}
"""The backward pass of attention and pooling in one kernel is that of the two operators."""

KERNELS = {
    "mean": {PROJECTION},
    "max": {PROJECTION},
    "abmil": {PROJECTION, *ATTENTION_POOL},
    "clam_sb": {PROJECTION, *ATTENTION_POOL},
    "clam_mb": {PROJECTION, *ATTENTION_POOL},
    "dsmil": {POOL},
    "dtfd_afs": {PROJECTION, *ATTENTION_POOL},
    "dtfd_maxs": {PROJECTION, *ATTENTION_POOL},
    "dtfd_maxmins": {PROJECTION, *ATTENTION_POOL},
    "transmil": {PROJECTION},
    "s4mil": {PROJECTION, "s4d_response"},
    "mambamil": {PROJECTION, "selective_scan", POOL},
    "smt": {PROJECTION, "gated_attention", POOL},
    "dmin": {PROJECTION, "self_distillation_pool", "chebyshev_kan"},
    "joint": {PROJECTION, "self_distillation_pool", "chebyshev_kan", "gumbel_mask"},
}
"""The operators whose kernels a training step of each model enters."""

SMALL = {
    "transmil": {"embed_dim": 16, "n_heads": 2},
    "mambamil": {"embed_dim": 16, "attention_dim": 8, "n_states": 4},
    "smt": {"embed_dim": 16, "image_dim": 8},
    "dsmil": {"attention_dim": 16},
}
TOLERANCE = 2e-5
"""Relative to the norm of a gradient, or a tenth of the largest one: about a hundred float32 roundings."""


class Entered(TorchDispatchMode):
    """Names of the operators of hdmil that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function.namespace == "hdmil":
            self.names.add(function.name().removeprefix("hdmil::").removesuffix("_backward"))
        return function(*arguments, **(named or {}))


def make_batch(device):
    """Three bags, whose features also lie in another order among those of a cohort, as on a GPU."""
    torch.manual_seed(0)
    n = sum(LENGTHS)
    fields = {
        "features": (torch.randn(n, DIM) * 3 + 1).to(device),
        "patches": torch.randint(256, (n, 16, 16, 3), dtype=torch.uint8).to(device),
        "rowcol": torch.from_numpy(np.stack(np.divmod(np.arange(n), 6), 1)),
    }
    return BagBatch(
        slide_ids=("a", "b", "c"),
        segments=Segments(LENGTHS, device),
        labels=torch.tensor([0, 1, 1]),
        rows_of=fields.get,
        **resident(fields["features"]),
    )


def resident(features):
    """The same features where the last bag comes first, with other tiles between."""
    bags = features.split(LENGTHS)[::-1]
    others = [torch.full((n, DIM), torch.nan, device=features.device) for n in (4, 2, 1)]
    starts = np.cumsum([0, *(len(bag) + len(other) for bag, other in zip(bags, others, strict=True))])[:-1]
    cohort = torch.cat([part for pair in zip(bags, others, strict=True) for part in pair])
    return {"starts": torch.tensor(starts[::-1].copy()), "cohort": cohort}


def make_objective(name, device):
    """A small network of this name with its initial weights, and its loss."""
    torch.manual_seed(1)
    if name == "joint":
        dmin = DMIN(DIM, 2, embed_dim=16, attention_dim=8, degree=4)
        return JointLearning(HDMIL(dmin, LIPN(2)).to(device), None, LIPNLossWeights())
    model = create_model(name, DIM, 2, **SMALL.get(name, {"embed_dim": 16}))
    model.standardize([make_batch("cpu").features])
    return Classification(model.to(device), None)


def step(name, device, backend):
    """Terms of the loss, gradients by parameter, and the operators that ran."""
    objective, batch = make_objective(name, device), make_batch(device)
    objective.learner.train()
    torch.manual_seed(2)
    with default_backend(backend), Entered() as entered:
        terms = objective.loss(batch)
        torch.as_tensor(sum(terms.values())).backward()
    grads = {n: p.grad.cpu() for n, p in objective.learner.named_parameters() if p.grad is not None}
    return {n: float(term) for n, term in terms.items()}, grads, entered.names


@pytest.mark.parametrize("name", KERNELS)
def test_a_step_through_the_kernels_has_the_gradients_of_the_references(name, device, monkeypatch):
    monkeypatch.setattr(layers, "use_triton", lambda *_: True)  # both draw the seeds of the kernels
    terms, grads, entered = step(name, device, "triton")
    wanted_terms, wanted, none = step(name, device, "torch")
    screened = {"lipn_forward"} if name == "joint" and device == "cuda" else set()
    assert entered == KERNELS[name] | screened
    assert not none
    assert terms == pytest.approx(wanted_terms, rel=1e-5, abs=1e-7)
    assert grads.keys() == wanted.keys()
    floor = max(grad.norm() for grad in wanted.values()) / 10
    for parameter, grad in wanted.items():
        difference = (grads[parameter] - grad).norm() / grad.norm().clamp(min=floor)
        assert difference <= TOLERANCE, f"{parameter}: {difference:.1e}"


def test_every_model_is_among_them():
    assert set(KERNELS) - {"joint"} == set(MODELS)
