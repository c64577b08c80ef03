"""A GPU that is not there: training steps and predictions on it, for tests and for tools/operator_table.py.

PyTorch's fake tensors have shapes, types and a device, and no memory. Two faults that a CPU hides are errors
on a fake GPU: a tensor on another device, and a number that the host reads, for which a real GPU would have
to be waited for. `NoWaitingCopies` adds a third: a copy from the host that waits.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode

from hdmil_lib.batches import BagBatch, BagDataset
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models import DMIN, HDMIL, LIPN
from hdmil_lib.training.lipn import LIPNLossWeights, Screening


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


@contextmanager
def fake_gpu() -> Iterator[torch.device]:
    """A GPU on which tensors are fake, within a `with` block."""
    with FakeTensorMode(allow_non_fake_inputs=True), NoWaitingCopies():
        yield torch.device("cuda", 0)


@contextmanager
def training(before_node: Callable[[Node | None], None] = lambda node: None) -> Iterator[None]:
    """Make `train_step` work on a fake GPU, with autocast too, within a `with` block.

    Args:
        before_node: Called with every node of the autograd graph before its gradients are computed, and with
            `None` after the last.
    """
    with (
        patch.object(Tensor, "backward", lambda loss: backward(loss, before_node)),
        patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        patch.object(torch.cuda, "is_bf16_supported", lambda: True),
    ):
        yield


@torch.no_grad()  # as in PyTorch's engine, where formulas of second derivatives are not needed
def backward(loss: Tensor, before_node: Callable[[Node | None], None] = lambda node: None) -> None:
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
        before_node(node)
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
    before_node(None)


def grads_of_inputs(node: Node, grads: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs of a node, given those of its outputs by place."""
    outputs = node._input_metadata
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        found = node(*[grads.get(place) for place in range(len(outputs))])
    else:
        found = node.apply(*[_or_zeros(grads.get(place), output) for place, output in enumerate(outputs)])
    return found if isinstance(found, tuple) else (found,)


def _or_zeros(grad: Tensor | None, output: Any) -> Tensor:
    """The gradient of an output, zeros if there is none."""
    return torch.zeros(output.shape, dtype=output.dtype, device=output.device) if grad is None else grad


def made_on(device: torch.device, make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Build a network on the device; moving one there is not possible under the fake mode."""
    NoWaitingCopies.watches = False
    try:
        with torch.device(device):
            return make()
    finally:
        NoWaitingCopies.watches = True


def assemble(dmin: DMIN, lipn: LIPN, device: torch.device) -> HDMIL:
    """`HDMIL(dmin, lipn)`, which checks its thresholds on the host, with its buffers on the fake GPU."""
    model = HDMIL(dmin, lipn)
    for name, buffer in model.named_buffers(recurse=False):
        setattr(model, name, torch.empty(buffer.shape, device=device))
    return model


def screening(
    networks: HDMIL, lengths: Sequence[int], device: torch.device, *, augment: bool = False
) -> Screening:
    """Training of LIPN on masks of DMIN for the slides of `fake_batch`, which are not computed."""
    objective = Screening.__new__(Screening)
    objective.learner = objective.lipn = networks.lipn
    objective.dmin, objective.target, objective.weights = networks.dmin, "mask", LIPNLossWeights()
    objective.augment = augment
    objective.targets = {
        f"s{i}": torch.empty(n, networks.n_classes, device=device) for i, n in enumerate(lengths)
    }
    return objective


def fake_batch(
    device: torch.device, lengths: Sequence[int], dim: int, labels: Tensor, rowcol: np.ndarray
) -> BagBatch:
    """A batch as `BagDataset` makes it from bags that lie on the GPU; positions and labels lie on the host.

    Args:
        device: The fake GPU.
        lengths: Tiles of each bag.
        dim: Width of the features.
        labels: Classes of the bags, (B,).
        rowcol: Position of the tiles, (N, 2); NumPy's, since tensors made under the fake mode are fake.
    """
    n, ends = sum(lengths), np.cumsum(lengths)
    resident = {
        "features": torch.empty(n, dim, dtype=torch.float16, device=device),
        "patches": torch.empty(n, 16, 16, 3, dtype=torch.uint8, device=device),
    }
    data = SimpleNamespace(resident=resident, _host={}, device=device)
    with unset_fake_temporarily():  # they lie on the host
        starts = torch.tensor(ends - np.array(lengths))
    spans = [(int(end) - length, int(end)) for length, end in zip(lengths, ends, strict=True)]
    batch = BagBatch(
        slide_ids=tuple(f"s{i}" for i in range(len(lengths))),
        segments=Segments(lengths, device),
        labels=labels,
        rows_of=partial(BagDataset._take, data, spans),
        starts=starts,
        cohort=resident["features"],
    )
    batch.__dict__["rowcol"] = rowcol
    return batch
