"""The operators that are timed on a GPU and their sizes; a new operator gets a case in `cases`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_kernels import STAIN, normal, random_bags, random_s4d, random_scan, random_tiles
from textbook.kernels import MEAN, STD
from torch import Tensor

from hdmil_lib.kernels import (
    chebyshev_kan,
    cost,
    gated_attention,
    gated_attention_pool,
    gumbel_mask,
    lipn_forward,
    s4d_convolution,
    segment_softmax_pool,
    selective_scan,
    self_distillation_pool,
    tile_preprocess,
    tile_projection,
    tissue_statistics,
)
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models import HDMIL

MODEL = Path(__file__).resolve().parents[2] / "data_samples" / "camelyon-mini" / "model"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the operators; the defaults are those of a slide in the paper.

    Attributes:
        tiles: Tiles of a slide, N.
        features: Width of the features, D.
        embed: Width of the embeddings, E.
        hidden: Width of the attention, H.
        heads: Rows of a small classifier, B.
        patches: Patches of LIPN.
        rgb: Tiles of an encoder's batch.
        side: Their side, in pixels.
        states: States of a channel.
    """

    tiles: int = 10_000
    features: int = 1024
    embed: int = 512
    hidden: int = 256
    heads: int = 64
    patches: int = 50_000
    rgb: int = 256
    side: int = 256
    states: int = 16


TINY = Sizes(tiles=12, features=8, embed=8, hidden=8, heads=3, patches=4, rgb=1, side=16, states=2)
"""Sizes for Triton's interpreter."""


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    Attributes:
        operator: Name in `hdmil_lib.kernels`.
        size: Size, for a table.
        function: The operator; takes the tensors and `backend`.
        tensors: Function that draws the tensors on a device; floating ones are cast to the type.
        cost: Cost of the forward pass, given the bytes per number.
        options: Further arguments of the operator, given the type of its result.
        constants: Number of leading tensors that are neither cast nor differentiated.
        dtypes: Types in which there is a kernel; "narrow" is the 16-bit type of the device.
        differentiable: Whether there is a backward pass.
        compiles: Whether the formula can be compiled in reasonable time.
    """

    operator: str
    size: str
    function: Callable[..., Tensor]
    tensors: Callable[[torch.device], Sequence[Tensor]]
    cost: Callable[[int], cost.Cost]
    options: Callable[[torch.dtype], dict[str, Any]] = lambda _: {}
    constants: int = 0
    dtypes: tuple[str, ...] = ("narrow", "float32")
    differentiable: bool = True
    compiles: bool = True


def lipn_case(n_patches: int) -> Case:
    """The pre-screening network of the sample model; its kernel needs weights of 16 bits."""
    weights = HDMIL.from_pretrained(MODEL).lipn.packed(torch.float32)
    return Case(
        "lipn_forward",
        f"{n_patches:,} patches",
        lambda patches, *weights, backend: lipn_forward(patches, weights, backend=backend),
        lambda device: [*random_tiles(n_patches, 16)(device), *(w.to(device) for w in weights)],
        lambda width: cost.lipn_forward(n_patches, width=width),
        dtypes=("float16", "narrow"),
        differentiable=False,
    )


def tile_cases(n: int, side: int) -> list[Case]:
    """Tiles for an encoder, with and without stain normalization, and their color statistics."""
    tiles, size = random_tiles(n, side), f"{n:,} tiles of {side}"

    def prepared(note: str, **options: Any) -> Case:
        return Case(
            "tile_preprocess",
            size + note,
            partial(tile_preprocess, mean=MEAN, std=STD, channels_last=True, **options),
            tiles,
            lambda width: cost.tile_preprocess(n, side, width, stain=bool(options)),
            options=lambda dtype: {"dtype": dtype},
            differentiable=False,
        )

    return [
        prepared(""),
        prepared(", Macenko", stain=STAIN),
        Case(
            "tissue_statistics",
            size,
            lambda tiles, backend: tissue_statistics(tiles, backend=backend).histogram,
            tiles,
            lambda _: cost.tissue_statistics(n * side * side),
            dtypes=("uint8",),
            differentiable=False,
        ),
    ]


def distilled(*tensors: Tensor, backend: Any) -> Tensor:
    """Bag embeddings of student and teacher, one below the other."""
    options = {"dropout": 0.25, "seed": 0, "noise_seed": 1, "backend": backend}
    return torch.cat(self_distillation_pool(*tensors, **options)[:2])


def stored_features(tiles: int, features: int, embed: int) -> Callable[[torch.device], list[Tensor]]:
    """Return a function that draws features as they are stored, in half precision, a weight and a bias."""

    def tensors(device: torch.device) -> list[Tensor]:
        stored, weight, bias = normal((tiles, features), (embed, features), (embed,))(device)
        return [stored.half(), weight, bias]

    return tensors


def projection_cost(tiles: int, features: int, embed: int, width: int) -> cost.Cost:
    """Features of 16 bits; PyTorch casts them, and passes over the embeddings for ReLU and dropout."""
    stored, weights, embedded = 2 * tiles * features, width * embed * (features + 1), width * tiles * embed
    fused = stored + weights + embedded
    eager = fused + 2 * width * tiles * features + 4 * embedded
    return cost.Cost(fused, eager, 2 * tiles * features * embed, matrix=True)


def cases(s: Sizes, device: torch.device) -> list[Case]:
    """All operators; the first case of an operator stands for it in short tables."""
    n, e, h = s.tiles, s.embed, s.hidden
    weights = [(h, e), (h,), (h, e), (h,), (2, h), (2,)]
    bags = Segments([n // 4] * 4, device)
    length, tiles = f"L = {n:,}, D = ", f"N = {n:,}, E = {e}"
    return [
        *(
            Case(
                "chebyshev_kan",
                f"B = {rows:,}, Q = {e}, K = 12",
                chebyshev_kan,
                normal((rows, e), (e, 1, 13)),
                partial(cost.chebyshev_kan, rows, e, 1, 12),
            )
            for rows in (n, s.heads)
        ),
        Case(
            "gated_attention",
            f"{tiles}, dropout",
            partial(gated_attention, dropout=0.25, seed=0),
            normal((n, e), *weights),
            partial(cost.gated_attention, n, e, h, 2),
        ),
        Case(
            "gated_attention_pool",
            tiles,
            lambda *tensors, backend: gated_attention_pool(*tensors, backend=backend)[0],
            normal((n, e), *weights),
            partial(cost.gated_attention_pool, n, e, h, 2),
        ),
        Case(
            "gumbel_mask",
            f"N = {n:,}, noise",
            partial(gumbel_mask, seed=0, temperature=0.7),
            normal((n, 2)),
            partial(cost.gumbel_mask, n, 2),
        ),
        lipn_case(s.patches),
        Case(
            "s4d_convolution",
            f"{length}{e}",
            s4d_convolution,
            random_s4d(n, e, s.states),
            partial(cost.s4d_convolution, 1, n, e, s.states),
        ),
        Case(
            "segment_softmax_pool",
            f"{tiles}, 4 masked bags",
            partial(segment_softmax_pool, segments=bags),
            random_bags((n, e), (n, 2)),
            partial(cost.segment_softmax_pool, n, e, 2),
        ),
        Case(  # compiled, each of the steps would be a piece of the graph
            "selective_scan",
            f"{length}{2 * e}",
            selective_scan,
            random_scan(n, 2 * e, s.states),
            partial(cost.selective_scan, 1, n, 2 * e, s.states),
            compiles=False,
        ),
        Case(
            "self_distillation_pool",
            f"{tiles}, dropout, noise",
            distilled,
            normal((n, e), *weights),
            partial(cost.self_distillation_pool, n, e, h, 2),
        ),
        Case(
            "tile_projection",
            f"N = {n:,}, D = {s.features:,}, E = {e}, dropout",
            partial(tile_projection, dropout=0.25, seed=0),
            stored_features(n, s.features, e),
            partial(projection_cost, n, s.features, e),
            constants=1,
        ),
        *tile_cases(s.rgb, s.side),
    ]
