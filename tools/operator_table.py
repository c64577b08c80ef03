"""Write docs/operators.md: the operators that a training step and a prediction of each model enter, counted.

    python tools/operator_table.py [FILE]

Every model runs on a fake GPU (`fake_gpu.py`), forward, backward and optimizer, and every operator that
PyTorch enters there is recorded with its bytes and its floating-point operations. Nothing is measured, and
nothing depends on the machine.
"""

import math
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import fake_gpu
import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hdmil_lib.batches import BagBatch
from hdmil_lib.kernels import cost, dispatch, work
from hdmil_lib.kernels.cost import H100
from hdmil_lib.kernels.work import Work
from hdmil_lib.models import LIPN, MODELS, create_model
from hdmil_lib.training.fit import (
    Classification,
    Objective,
    TrainSettings,
    autocast,
    make_optimizer,
    train_step,
)
from hdmil_lib.training.joint import JointLearning
from hdmil_lib.training.lipn import LIPNLossWeights
from hdmil_lib.training.recipes import published_recipe

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "operators.md"
LIBRARY = str(REPOSITORY / "hdmil_lib")

LENGTHS, DIM, SIDE, CLASSES = (10_000,) * 64, 1024, 100, 2
TOP = 15  # rows of the table of DMIN

# What an operator of PyTorch moves is what it takes and returns, except for these.
FREE = {"_unsafe_view", "_reshape_alias", "lift_fresh", "_local_scalar_dense"}
FREE |= {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
MAKE = {
    "new_zeros",
    "new_ones",
    "new_full",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
}
"""They take a tensor for its type or shape and do not read it."""
OVERWRITE = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_"}
"""They do not read what they change."""
GATHER = {"index", "index_select", "gather", "embedding"}
"""They read as much of their first input as they return."""
SCATTER = {"index_put": 2, "index_add": 3, "index_copy": 3, "scatter": 3, "scatter_add": 3}
"""They write to places of their first input; the number says which argument has the values."""


@dataclass(frozen=True)
class Call:
    """An operator that was entered.

    Attributes:
        name: Its name, such as "hdmil::gumbel_mask" or "aten::add".
        phase: "forward", "backward" or "update".
        where: In the forward pass the function of the library that called it, in the backward pass the node
            of the autograd graph.
        result: Shape and type of what it returned, or changed in place.
        work: Its bytes and operations.
    """

    name: str
    phase: str
    where: str
    result: str
    work: Work

    @property
    def kind(self) -> str:
        """Whether it is one of our kernels, a matrix product of PyTorch, or another operator of PyTorch."""
        if self.name.startswith("hdmil::"):
            return "kernels"
        return "products" if self.work.matrix_flops or self.work.vector_flops else "others"


@dataclass
class Recorder(TorchDispatchMode):
    """Records the operators that are entered on a GPU within a `with` block, except those that only view.

    Attributes:
        calls: The operators in their order.
        node: Name of the autograd node whose gradients are being computed.
        phase: The phase of the step.
    """

    calls: list[Call] = field(default_factory=list)
    node: str = ""
    phase: str = "forward"

    def __post_init__(self):
        super().__init__()

    def enter_node(self, node: torch.autograd.graph.Node | None) -> None:
        """Say whose gradients are computed next; `None` after the last."""
        self.phase, self.node = ("update", "") if node is None else ("backward", node.name())

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        result = function(*arguments, **named)
        counted = work_of(function, arguments, named, result, derived=self.phase == "backward")
        if counted is not None:
            shown = [t for t in tree_leaves((result, arguments)) if _on_gpu(t)][0]
            where = self.node or _caller(sys._getframe(1))
            name = f"{function.namespace}::{function.overloadpacket.__name__}"
            self.calls.append(Call(name, self.phase, where, _described(shown), counted))
        return result


def _caller(frame: FrameType | None) -> str:
    """The function of the library, operators aside, that is running in or around a frame."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(LIBRARY) and not file.startswith(f"{LIBRARY}/kernels/"):
            return frame.f_code.co_qualname.replace(".<locals>", "")
        frame = frame.f_back
    return ""


def _described(tensor: Tensor) -> str:
    shape = ", ".join(f"{size:,}" for size in tensor.shape)
    return f"({shape}) {str(tensor.dtype).removeprefix('torch.')}"


def _on_gpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


def size(tensor: Tensor) -> int:
    """Bytes of the elements of a tensor; one that is expanded along an axis has them once."""
    lengths = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not n]
    return math.prod(lengths) * tensor.element_size()


def work_of(
    function: torch._ops.OpOverload, arguments: Sequence, named: dict, result: Any, *, derived: bool = False
) -> Work | None:
    """Count the work of a call of an operator; `None` if it does nothing on a GPU.

    Args:
        function: The operator.
        arguments: Its positional arguments.
        named: Its other arguments.
        result: What it returned.
        derived: Whether it was called in a backward pass.

    Raises:
        ValueError: It is one of our operators, and hdmil_lib/kernels/work.py has no formula for it.
    """
    name = function.overloadpacket.__name__
    idle = function.is_view or torch.Tag.inplace_view in function.tags or name in FREE
    if function.namespace == "prim" or idle or not any(map(_on_gpu, tree_leaves((arguments, named, result)))):
        return None
    if function.namespace == "hdmil":
        assert not named
        return work.work(f"hdmil::{name}", *arguments)
    moved = bytes_of(function, arguments, named, result, derived)
    products, others = 0, 0
    if function.overloadpacket in flop_registry:
        flops = flop_registry[function.overloadpacket](*arguments, **named, out_val=result)
        narrow = next(filter(_on_gpu, tree_leaves(result))).element_size() == 2
        products, others = (flops, 0) if narrow else (0, flops)
    elif name.startswith("_fft_"):
        others = transform_flops(arguments[0], result, arguments[1])
    return Work(moved, products, others)


def transform_flops(inputs: Tensor, result: Tensor, axes: Sequence[int]) -> float:
    """Operations of a fast Fourier transform: 5 n log2 n for n complex numbers, half of it for real ones."""
    longer = max(inputs, result, key=lambda t: t.numel())
    length = math.prod(longer.shape[axis] for axis in axes)
    share = 1 if inputs.is_complex() and result.is_complex() else 0.5
    return 5 * share * longer.numel() * math.log2(max(length, 2))


def bytes_of(
    function: torch._ops.OpOverload, arguments: Sequence, named: dict, result: Any, derived: bool
) -> int:
    """Bytes that an operator of PyTorch reads and writes on a GPU: its tensors, each once."""
    name = function.overloadpacket.__name__
    if name in MAKE:
        return _total([result])
    if name in GATHER:
        return 2 * _total([result]) + _total(arguments[1:])
    if name.removesuffix("_") in SCATTER:
        return _scattered(name, arguments, in_place=derived or name.endswith("_"))
    parameters = function._schema.arguments
    given = [*zip(parameters, arguments, strict=False)]
    given += [(p, named[p.name]) for p in parameters if p.name in named]
    changed = [value for p, value in given if p.alias_info is not None and p.alias_info.is_write]
    read = [value for p, value in given if name not in OVERWRITE or p.alias_info is None]
    return _total(read) + _total([changed, result])


def _scattered(name: str, arguments: Sequence, *, in_place: bool) -> int:
    """Values and their places are read; as much of the target is written, and read if values are added.

    An operator that does not work in place copies the target before. In a backward pass PyTorch works in
    place, but with fake tensors it does not.
    """
    name = name.removesuffix("_")
    target, rest = arguments[0], arguments[1:]
    touched = min(_total([arguments[SCATTER[name]]]), size(target))
    adds = name in ("index_add", "scatter_add") or any(value is True for value in rest)
    return _total(rest) + touched * (2 if adds else 1) + (0 if in_place else 2 * size(target))


def _total(values: Iterable) -> int:
    """Bytes of all tensors of a GPU among these, one that occurs twice counted once."""
    return sum({id(t): size(t) for t in tree_leaves(list(values)) if _on_gpu(t)}.values())


# What is run


def training_steps(precision: str) -> dict[str, list[Call]]:
    """The operators of a training step of every model, of LIPN, and of both networks together, by name."""
    recipe = published_recipe()
    steps = {}
    for name in MODELS:
        settings = recipe.training_of(name)
        steps[name] = _step(
            lambda gpu, name=name: Classification(_model(name, gpu), None), settings, precision
        )

    def screening(gpu: torch.device) -> Objective:
        return fake_gpu.screening(_hdmil(gpu), LENGTHS, gpu)

    def joint(gpu: torch.device) -> Objective:
        return JointLearning(_hdmil(gpu), None, LIPNLossWeights())

    steps["LIPN"] = _step(screening, recipe.lipn_training, precision)
    steps["DMIN and LIPN"] = _step(joint, recipe.joint_training, precision)
    return steps


def predictions(precision: str) -> dict[str, list[Call]]:
    """The operators of a prediction of every model, of LIPN in its kernel, and of HDMIL, by name."""

    def hdmil(gpu: torch.device) -> torch.nn.Module:
        model = _hdmil(gpu)
        model.packed_lipn()  # kept until the weights change
        return model

    made: dict[str, Callable[[torch.device], torch.nn.Module]] = {
        name: partial(_model, name) for name in MODELS
    }
    answers = {name: _prediction(make, precision) for name, make in (made | {"HDMIL": hdmil}).items()}
    return answers | {
        "LIPN": _prediction(hdmil, precision, lambda model, batch: model.lipn_logits(batch.patches))
    }


def _model(name: str, gpu: torch.device) -> torch.nn.Module:
    settings = published_recipe().models.get(name, {})
    return fake_gpu.made_on(gpu, lambda: create_model(name, DIM, CLASSES, **settings))


def _hdmil(gpu: torch.device) -> torch.nn.Module:
    return fake_gpu.assemble(_model("dmin", gpu), fake_gpu.made_on(gpu, lambda: LIPN(CLASSES)), gpu)


def _batch(gpu: torch.device) -> BagBatch:
    """Bags of square slides, whose classes alternate."""
    rowcol = np.concatenate([np.stack(np.divmod(np.arange(length), SIDE), 1) for length in LENGTHS])
    with unset_fake_temporarily():  # labels are read on the host
        labels = torch.arange(len(LENGTHS)) % CLASSES
    return fake_gpu.fake_batch(gpu, LENGTHS, DIM, labels, rowcol)


@contextmanager
def _paper_gpu() -> Iterator[torch.device]:
    """The fake GPU, made independent of the machine.

    It runs our kernels whatever real GPU is there. Transformers have their plain form, since which fused one
    would run depends on the machine.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    runs_kernels = patch.object(dispatch, "_runs_kernels", lambda gpu, bfloat16: True)
    try:
        with fake_gpu.fake_gpu() as gpu, sdpa_kernel(SDPBackend.MATH), runs_kernels:
            yield gpu
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _step(make: Callable[[torch.device], Objective], settings: TrainSettings, precision: str) -> list[Call]:
    """The operators of a step that is not the first, which allocates the optimizer's state."""
    settings = replace(settings, precision=precision, optimizer="adam")
    recorder = Recorder()
    with _paper_gpu() as gpu:
        objective = make(gpu)
        objective.learner.train()
        optimizer = make_optimizer(objective.param_groups(), settings)
        for parameter in objective.learner.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        batch = _batch(gpu)
        with fake_gpu.training(recorder.enter_node), recorder:
            train_step(objective, optimizer, batch, settings)
    return recorder.calls


def _prediction(
    make: Callable[[torch.device], torch.nn.Module],
    precision: str,
    predict: Callable[[torch.nn.Module, BagBatch], Any] = lambda model, batch: model(
        **batch.inputs_for(model)
    ),
) -> list[Call]:
    """The operators of a prediction, made as in the validation of a training."""
    recorder = Recorder()
    with _paper_gpu() as gpu, fake_gpu.training():
        model, batch = make(gpu).eval(), _batch(gpu)
        with torch.no_grad(), autocast(gpu, TrainSettings(precision=precision)), recorder:
            predict(model, batch)
    return recorder.calls


# The page

EXPLANATION = """\
# The operators of a step, counted

Which operators of PyTorch a training step and a prediction of each model enter, how many bytes they move,
how many floating-point operations they do, and how long an H100 would need for that. **These are
calculations on paper, not measurements**: [tools/operator_table.py](../tools/operator_table.py) writes this
page on any machine, without a GPU, and a test holds that the page is what it writes.

**The size.** {bags} bags of {tiles:,} tiles, {dim:,} features in 16 bits in the memory of the GPU,
{classes} classes. Networks and losses are those of [the paper's recipe](../hdmil_lib/training/recipes.py),
the optimizer is Adam. A prediction takes all bags at once.

**How it is counted.** A step runs on [a fake GPU](../tools/fake_gpu.py), whose tensors have shapes and no
memory, through the code that runs on a real one. Every operator is recorded as PyTorch enters it, forward,
backward and in the optimizer. What the host does, views and allocations count nothing.

- *Bytes of PyTorch's operators:* every tensor that is read or written, once. An operator that chooses rows
  reads only those. Sorting, batch normalization and softmax over long rows pass over their input more than
  once, so for them this is a lower bound.
- *Bytes of our kernels:* the formulas of [kernels/work.py](../hdmil_lib/kernels/work.py), read off each
  kernel: all that it moves, partial sums included, and PyTorch's operators within a backward pass.
- *Operations:* those of matrix products, convolutions, Fourier transforms, and our kernels. PyTorch's other
  operators are limited by memory alone.
- *Time on paper:* {memory:.1f} TB/s; {matrix:.0f} TFLOP/s for products of 16-bit numbers, {vector:.0f}
  TFLOP/s for all else, products of float32 numbers included. A step takes at least the longer of the two
  times. Small steps take longer, since launching an operator takes some microseconds, which are not
  counted.

*Operators* are those that do something on the GPU, and one of ours may launch several kernels; *ours* is the
share of our kernels. The transformer within the images of `smt` is counted in its plain form, of which a GPU
has a fused one. LIPN is trained on masks of DMIN that exist already, and predicts in its kernel, in 16 bits.
*DMIN and LIPN* is a step of their [joint training](../hdmil_lib/training/joint.py), *HDMIL* the prediction
in two stages of [models/hdmil.py](../hdmil_lib/models/hdmil.py); both process all tiles, since a GPU is not
asked how many are selected.
"""

HEAD = """\
| | operators | GB | ours | ms by memory | TFLOP | ours | ms by arithmetic |
|---|---:|---:|---:|---:|---:|---:|---:|"""


def total(calls: Iterable[Call]) -> Work:
    """The work of all calls."""
    return sum((call.work for call in calls), Work())


def table(steps: dict[str, list[Call]]) -> str:
    """One row per model."""
    return "\n".join([HEAD, *(_row(name, calls) for name, calls in steps.items())])


def _row(name: str, calls: list[Call]) -> str:
    whole, ours = total(calls), total(call for call in calls if call.kind == "kernels")
    cells = [
        f"`{name}`" if name in MODELS else name,
        f"{len(calls):,}",
        f"{whole.bytes / 1e9:.1f}",
        _share(ours.bytes, whole.bytes),
        _milliseconds(whole.memory_seconds(H100)),
        f"{whole.flops / 1e12:.2f}",
        _share(ours.flops, whole.flops),
        _milliseconds(whole.arithmetic_seconds(H100)),
    ]
    return f"| {' | '.join(cells)} |"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"


def breakdown(calls: list[Call], top: int = TOP) -> str:
    """The operators that move the most bytes, calls that are alike in one row, and all others in the last."""
    whole, rows = total(calls), []

    def alike(call: Call) -> tuple[str, str, str, str]:
        return call.phase, call.where, call.name, call.result

    groups = [(key, list(group)) for key, group in groupby(sorted(calls, key=alike), alike)]
    groups.sort(key=lambda group: (-total(group[1]).bytes, group[0]))
    for (phase, where, name, result), group in groups[:top]:
        times = f"{len(group)} x " if len(group) > 1 else ""
        rows.append(([phase, f"`{_short(where)}`", f"`{name}`", times + result], total(group)))
    left = [call for _, group in groups[top:] for call in group]
    rows.append((["", "", f"{len(left):,} more operators", ""], total(left)))
    rows.append((["", "", f"**all {len(calls):,}**", ""], whole))
    lines = [
        "| | phase | where | operator | result | GB | share | ms by memory | ms by arithmetic |",
        "|---:|---|---|---|---|---:|---:|---:|---:|",
    ]
    for number, (cells, done) in enumerate(rows, 1):
        cells = [str(number) if number <= min(top, len(groups)) else "", *cells]
        cells += [f"{done.bytes / 1e9:.2f}", _share(done.bytes, whole.bytes)]
        cells += [_milliseconds(done.memory_seconds(H100)), _milliseconds(done.arithmetic_seconds(H100))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(where: str) -> str:
    """Name of an autograd node without what PyTorch adds to it."""
    return where.removeprefix("GeneratedBackwardFor_").removesuffix("_defaultBackward")


KINDS = {
    "others": "PyTorch's passes over tensors, which a fused operator saves",
    "products": "PyTorch's matrix products",
    "kernels": "our kernels",
}

DMIN = """\
## DMIN: where a training step in bf16 spends its time

{breakdown}

*Where* is the function of the library that called the operator, in the backward pass the node of the
autograd graph. If every operator took the longer of its two times, a step would take {floor} ms.

{kinds}

### What a step must move

Suppose that the projection with its ReLU and dropout is one operator, and that attention, selection and
both poolings are another, forward and backward. Then a step moves 2 N (2 D + 5 E) bytes in 16 bits. The
features (N, D) are read in the forward pass, and again for the gradient of the projection's weight. The
embeddings (N, E) are written, read in the forward pass, and read in the backward pass; the gradient of the
projection before its ReLU, (N, E), is written and read. The hidden units of the attention are computed
twice, noise and dropout come from a seed, and weights and sums are small
([`cost.dmin_step`](../hdmil_lib/kernels/cost.py)).

With N = {tiles:,}, D = {in_dim:,} and E = {embed_dim:,} this is {least:.2f} GB, {least_ms} ms at {rate:.1f}
TB/s. **A step moves {moved:.2f} GB, {ratio:.2f} times as much.** Its matrix products alone take {products} ms
on paper, and no step with these products is faster, however little it moves.
"""


def dmin_section(calls: list[Call]) -> str:
    """Where a step of DMIN spends its time, and how far it is from what it must move."""
    whole, tiles, embed_dim = total(calls), sum(LENGTHS), _embed_dim()
    least = cost.dmin_step(tiles, DIM, embed_dim)
    kinds = ["| | operators | GB | share | ms by memory |", "|---|---:|---:|---:|---:|"]
    for kind, meaning in KINDS.items():
        chosen = [call for call in calls if call.kind == kind]
        moved = total(chosen)
        cells = [meaning, f"{len(chosen):,}", f"{moved.bytes / 1e9:.2f}", _share(moved.bytes, whole.bytes)]
        kinds.append(f"| {' | '.join(cells)} | {_milliseconds(moved.memory_seconds(H100))} |")
    longer = (max(c.work.memory_seconds(H100), c.work.arithmetic_seconds(H100)) for c in calls)
    return _wrapped(
        DMIN.format(
            breakdown=breakdown(calls),
            floor=_milliseconds(sum(longer)),
            kinds="\n".join(kinds),
            tiles=tiles,
            in_dim=DIM,
            embed_dim=embed_dim,
            least=least / 1e9,
            least_ms=_milliseconds(least / H100.bytes),
            rate=H100.bytes / 1e12,
            moved=whole.bytes / 1e9,
            ratio=whole.bytes / least,
            products=_milliseconds(whole.matrix_flops / H100.matrix_flops),
        )
    )


def _wrapped(text: str) -> str:
    """Text with its paragraphs and lists filled again, now that the numbers are in; tables stay."""

    def fill(lines: str, indent: str = "") -> str:
        words = " ".join(lines.split())
        return textwrap.fill(
            words, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )

    blocks = []
    for block in text.strip().split("\n\n"):
        if block.startswith("- "):
            block = "\n".join(fill(f"- {item}", "  ") for item in block.removeprefix("- ").split("\n- "))
        elif not block.startswith(("|", "#")):
            block = fill(block)
        blocks.append(block)
    return "\n\n".join(blocks) + "\n"


def _embed_dim() -> int:
    with fake_gpu.fake_gpu() as gpu:
        return _model("dmin", gpu).settings.embed_dim


def page() -> str:
    """The text of docs/operators.md."""
    explanation = EXPLANATION.format(
        bags=len(LENGTHS),
        tiles=LENGTHS[0],
        dim=DIM,
        classes=CLASSES,
        memory=H100.bytes / 1e12,
        matrix=H100.matrix_flops / 1e12,
        vector=H100.vector_flops / 1e12,
    )
    steps = {precision: training_steps(precision) for precision in ("bf16", "fp32")}
    answers = {precision: predictions(precision) for precision in ("bf16", "fp32")}
    parts = [_wrapped(explanation)]
    for precision, name in (("bf16", "bf16 (autocast)"), ("fp32", "fp32")):
        parts.append(f"## A training step in {name}\n\n{table(steps[precision])}\n")
    for precision, name in (("bf16", "bf16 (autocast)"), ("fp32", "fp32")):
        parts.append(f"## A prediction in {name}\n\n{table(answers[precision])}\n")
    parts.append(dmin_section(steps["bf16"]["dmin"]))
    return "\n".join(parts)


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE).write_text(page(), encoding="utf-8")
