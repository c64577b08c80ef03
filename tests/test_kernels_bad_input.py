"""Every tensor of every operator, made invalid in every way, gives an error that names it."""

import pytest
import torch
from torch.nn.functional import pad

from hdmil_lib.kernels import (
    chebyshev_kan,
    gated_attention,
    gated_attention_pool,
    gumbel_mask,
    lipn_forward,
    s4d_convolution,
    segment_softmax_pool,
    selective_scan,
    tile_preprocess,
    tissue_statistics,
)
from hdmil_lib.kernels.lipn_forward.reference import LAYERS
from hdmil_lib.kernels.segments import Segments

N, E, H, C = 5, 4, 3, 2
TILES = torch.randint(256, (2, 6, 5, 3), dtype=torch.uint8)
ATTENTION = {
    "embeddings": torch.randn(N, E),
    "tanh_weight": torch.randn(H, E),
    "tanh_bias": torch.randn(H),
    "gate_weight": torch.randn(H, E),
    "gate_bias": torch.randn(H),
    "score_weight": torch.randn(C, H),
    "score_bias": torch.randn(C),
}
POOLING = {"mask": (torch.rand(N, C) < 0.5).float(), "segments": Segments((2, N - 2))}
OPERATORS = {
    chebyshev_kan: {"inputs": torch.randn(N, 6), "coefficients": torch.randn(6, C, 4)},
    gated_attention: ATTENTION,
    gated_attention_pool: ATTENTION | POOLING,
    segment_softmax_pool: {"embeddings": ATTENTION["embeddings"], "logits": torch.randn(N, C)} | POOLING,
    gumbel_mask: {"logits": torch.randn(N, C)},
    tile_preprocess: {"tiles": TILES, "mean": (0.5,) * 3, "std": (0.5,) * 3},
    tissue_statistics: {"tiles": TILES},
    selective_scan: {
        "inputs": torch.randn(2, N, E),
        "steps": torch.rand(2, N, E),
        "decay": -torch.rand(E, C),
        "input_matrix": torch.randn(2, N, C),
        "output_matrix": torch.randn(2, N, C),
        "skip": torch.randn(E),
    },
    s4d_convolution: {
        "inputs": torch.randn(2, N, E),
        "log_step": torch.randn(E),
        "decay_log": torch.randn(E, C),
        "frequency": torch.randn(E, C),
        "output": torch.randn(E, C, 2),
        "skip": torch.randn(E),
    },
}
LIPN_WEIGHTS = [torch.randn(s) / 8 for w in (*LAYERS.values(), (64, C)) for s in (w, w[-1:])]
LIPN_PATCHES = torch.randint(256, (3, 16, 16, 3), dtype=torch.uint8)
SPOILED = {
    "type": lambda t: t.double() if t.is_floating_point() else t.float(),
    "integers": lambda t: t.int() if t.dtype == torch.uint8 else t.long(),
    "device": lambda t: t.to("meta"),
    "dimension": lambda t: t[None],
    "size": lambda t: pad(t, (0, 1) * t.ndim),
    "array": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
}
ALLOWED = {("mask", "type"), ("mask", "integers")}  # these are converted
ALONE = {gumbel_mask, tile_preprocess, tissue_statistics}  # there is no other tensor to disagree with


def spoiled():
    """Yield (operator, argument, way) for each tensor that an operator must refuse."""
    for operator, given in OPERATORS.items():
        for name, value in given.items():
            for way in SPOILED if isinstance(value, torch.Tensor) else ():
                free = operator in ALONE and way in ("device", "size", "type" if name == "logits" else None)
                if not free and (name, way) not in ALLOWED:
                    yield pytest.param(operator, name, way, id=f"{operator.__name__}-{name}-{way}")


@pytest.mark.parametrize(("operator", "name", "way"), list(spoiled()))
def test_a_spoiled_tensor_is_named(operator, name, way):
    arguments = OPERATORS[operator]
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        operator(**arguments | {name: SPOILED[way](arguments[name])})


@pytest.mark.parametrize("way", ["type", "integers", "device", "dimension", "size", "array", "list"])
@pytest.mark.parametrize("place", [0, 7, 20, 21])
def test_a_spoiled_weight_is_named(place, way):
    weights = [SPOILED[way](w) if i == place else w for i, w in enumerate(LIPN_WEIGHTS)]
    with pytest.raises(ValueError, match="weights"):
        lipn_forward(LIPN_PATCHES, weights)


@pytest.mark.parametrize("way", ["type", "integers", "dimension", "list"])
def test_spoiled_patches_are_named(way):
    with pytest.raises(ValueError, match="patches"):
        lipn_forward(SPOILED[way](LIPN_PATCHES), LIPN_WEIGHTS)


@pytest.mark.parametrize("lengths", [[], [-1, 6], [4, -2, 3]])
def test_segments_of_impossible_lengths_are_refused(lengths):
    with pytest.raises(ValueError, match="lengths"):
        Segments(lengths)


@pytest.mark.parametrize(
    "offsets", [[1, 5], [-1, 5], [0, 4, 2, 5], [0], [], [[0, 5]], [0.0, 5.0], [False, True]]
)
def test_segments_of_impossible_offsets_are_refused(offsets):
    with pytest.raises(ValueError, match=r"offsets|lengths"):
        Segments.from_offsets(torch.tensor(offsets))


@pytest.mark.parametrize("operator", [segment_softmax_pool, gated_attention_pool])
@pytest.mark.parametrize(
    ("message", "segments"),
    {
        "segments covers 3 tiles": Segments([3]),
        "segments covers 6 tiles": Segments([2, 4]),
        "segments is on meta": Segments([2, N - 2], "meta"),
        "segments is a Tensor": torch.tensor([0, 2, N]),
        "segments is a list": [2, N - 2],
    }.items(),
)
def test_segments_that_do_not_fit_the_tiles_are_named(operator, message, segments):
    with pytest.raises(ValueError, match=message):
        operator(**OPERATORS[operator] | {"segments": segments})


@pytest.mark.parametrize("operator", [*OPERATORS, lipn_forward])
def test_a_kernel_on_a_cpu_says_what_to_do(operator, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = OPERATORS.get(operator, {"patches": LIPN_PATCHES, "weights": LIPN_WEIGHTS})
    with pytest.raises(ValueError, match="backend='triton' needs tensors on a GPU.*use backend='auto'"):
        operator(**arguments, backend="triton")
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        operator(**arguments, backend="cuda")


@pytest.mark.parametrize("operator", [*OPERATORS, lipn_forward])
def test_tensors_that_are_not_contiguous_give_the_same_numbers(operator):
    arguments = OPERATORS.get(operator, {"patches": LIPN_PATCHES, "weights": LIPN_WEIGHTS})

    def spread(value):
        if isinstance(value, list):
            return [spread(v) for v in value]
        return value.repeat_interleave(2, -1)[..., ::2] if isinstance(value, torch.Tensor) else value

    results = operator(**arguments), operator(**{name: spread(value) for name, value in arguments.items()})
    torch.testing.assert_close(*results)
