"""The operators against independent float64 implementations: loops, NumPy, SciPy, acos and cos."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial.chebyshev import chebval
from scipy.special import expit
from scipy.stats import chisquare, ks_2samp, kstest
from torch.autograd import gradcheck

from hdmil_lib.kernels import (
    chebyshev_kan,
    dispatch,
    gated_attention,
    gated_attention_pool,
    gumbel_mask,
    segment_softmax_pool,
    self_distillation_pool,
    tile_projection,
)
from hdmil_lib.kernels.random import bits, draw_seed, logistic
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models.dmin import union

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)


def draw(seed, *shapes, scale=1.0):
    """Draw float64 tensors that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(s, generator=generator, dtype=torch.float64)).requires_grad_() for s in shapes
    ]


# Chebyshev-KAN


def chebyshev_by_angles(inputs, coefficients):
    """Evaluate T_k(x) = cos(k acos x), all terms of the double sum at once."""
    angle = np.arccos(np.tanh(inputs))
    basis = np.cos(angle[:, :, None] * np.arange(coefficients.shape[2]))
    return np.einsum("bqk,qok->bo", basis, coefficients)


@few
@given(seeds, st.integers(1, 5), st.integers(1, 7), st.integers(1, 3), st.integers(1, 16))
def test_chebyshev_kan_equals_the_angle_form(seed, batch, inputs, outputs, degree):
    x, omega = draw(seed, (batch, inputs), (inputs, outputs, degree + 1))
    expected = chebyshev_by_angles(x.detach().numpy(), omega.detach().numpy())
    # acos loses half of the digits of float64 near +-1, the value of tanh for large inputs.
    np.testing.assert_allclose(chebyshev_kan(x, omega).detach(), expected, atol=1e-7)


def test_chebyshev_kan_of_one_connection_is_a_chebyshev_series():
    x, omega = draw(0, (50, 1), (1, 1, 13))
    expected = chebval(np.tanh(x.detach().numpy()[:, 0]), omega.detach().numpy()[0, 0])
    np.testing.assert_allclose(chebyshev_kan(x, omega)[:, 0].detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("degree", [1, 2, 5])
def test_chebyshev_kan_gradients(degree):
    assert gradcheck(chebyshev_kan, draw(1, (3, 4), (4, 2, degree + 1)))


def test_chebyshev_kan_is_bounded_by_its_coefficients_at_saturated_inputs():
    """|T_k| <= 1 on [-1, 1]; in float32 the recurrence must not drift at the ends of the interval."""
    omega = torch.rand(8, 1, 17)
    values = chebyshev_kan(torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4])[:, None].expand(-1, 8), omega)
    # The sum has 8 x 17 terms, each rounded to about 1e-7.
    assert (values.abs() <= omega.sum() * (1 + 1e-5)).all()
    assert values[-1].item() == pytest.approx(omega.sum().item(), rel=1e-5)


# Gated attention


def attention_arguments(seed, n, e, h, c):
    return draw(seed, (n, e), (h, e), (h,), (h, e), (h,), (c, h), (c,))


@few
@given(seeds, st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_gated_attention_tile_by_tile(seed, n, e, h, c):
    arguments = attention_arguments(seed, n, e, h, c)
    f, v, v0, u, u0, w, w0 = (a.detach().numpy() for a in arguments)
    expected = np.zeros((n, c))
    for j in range(n):
        for branch in range(c):
            hidden = [np.tanh(f[j] @ v[i] + v0[i]) * expit(f[j] @ u[i] + u0[i]) for i in range(h)]
            expected[j, branch] = w[branch] @ hidden + w0[branch]
    np.testing.assert_allclose(gated_attention(*arguments).detach(), expected, rtol=1e-12, atol=1e-12)


def test_gated_attention_gradients():
    assert gradcheck(gated_attention, attention_arguments(2, 3, 4, 2, 2))


def test_gated_attention_drops_each_factor_on_its_own():
    """A hidden unit is kept if both of its factors are, a share (1 - p)^2 that is scaled by 1 / (1 - p)^2."""
    one = torch.ones(1)
    many = torch.ones(4000, 1)
    # With large weights, tanh and sigmoid are both 1, so that a score is 0 or the scale.
    weights = (50 * one[None], one, 50 * one[None], one, one[None], 0 * one)
    scores = gated_attention(many, *weights, dropout=0.25, seed=0)
    assert scores.unique().tolist() == pytest.approx([0.0, 1 / 0.75**2])
    # The standard error of the share is 0.008.
    assert (scores > 0).float().mean().item() == pytest.approx(0.75**2, abs=0.04)


# Masked softmax pooling


def pool_by_loops(embeddings, logits, mask):
    """Pool each branch by itself: softmax over the kept tiles, or the best tile if none is kept."""
    pooled = []
    for branch in range(logits.shape[1]):
        kept = [j for j in range(len(logits)) if mask[j, branch]]
        kept = kept or [int(np.argmax(logits[:, branch]))]
        largest = max(logits[j, branch] for j in kept)
        weights = [np.exp(logits[j, branch] - largest) for j in kept]
        pooled.append(sum(w * embeddings[j] for w, j in zip(weights, kept, strict=True)) / sum(weights))
    return np.stack(pooled)


@few
@given(seeds, st.integers(1, 12), st.integers(1, 4), st.floats(0, 1), st.sampled_from([1.0, 50.0, 1e4]))
def test_pooling_normalizes_each_branch_over_its_own_tiles(seed, n, branches, share, scale):
    embeddings, logits = draw(seed, (n, 3), (n, branches))
    logits = logits * scale
    mask = torch.rand(n, branches, generator=torch.Generator().manual_seed(seed)) < share
    pooled = segment_softmax_pool(embeddings, logits, mask).detach()
    expected = pool_by_loops(embeddings.detach().numpy(), logits.detach().numpy(), mask.numpy())
    np.testing.assert_allclose(pooled, expected, rtol=1e-9, atol=1e-9)


def test_pooling_without_a_mask_keeps_every_tile():
    embeddings, logits = draw(3, (9, 4), (9, 2))
    everything = segment_softmax_pool(embeddings, logits, torch.ones(9, 2, dtype=torch.bool))
    torch.testing.assert_close(segment_softmax_pool(embeddings, logits), everything)


@pytest.mark.parametrize("masked", [False, True])
def test_pooling_does_not_overflow(masked):
    """exp(1e4) is infinite in any format, and the published formula divides infinity by infinity."""
    embeddings = torch.randn(6, 3, requires_grad=True)
    logits = torch.tensor([1e4, 1e4, -1e4, 0.0, 5e3, 1e4])[:, None].repeat(1, 2).requires_grad_()
    mask = torch.tensor([[0, 1], [0, 0], [1, 0], [1, 0], [0, 1], [0, 0]]).float() if masked else None
    pooled = segment_softmax_pool(embeddings, logits, mask)
    expected = embeddings[[3, 0]] if masked else embeddings[[0, 1, 5]].mean(0).repeat(2, 1)
    torch.testing.assert_close(pooled, expected)
    pooled.sum().backward()
    assert logits.grad.isfinite().all()
    assert embeddings.grad.isfinite().all()


def test_pooling_ignores_dropped_tiles_of_any_size():
    """The largest logit is taken over the kept tiles: a large dropped one must not reduce them to zero."""
    embeddings = torch.randn(3, 2)
    pooled = segment_softmax_pool(
        embeddings, torch.tensor([[1e4], [0.0], [0.0]]), torch.tensor([[0], [1], [1]])
    )
    torch.testing.assert_close(pooled[0], embeddings[1:].mean(0))


def test_pooling_of_an_empty_branch_takes_its_best_tile():
    """The best tile also gives the gradient of the mask, exp(A_j - A_best) (F_j - F_best)."""
    embeddings, logits = torch.randn(5, 3), torch.tensor([[0.0, 4], [3, 1], [4, 2], [1, 0], [2, 3]])
    mask = torch.tensor([[0.0, 1], [0, 0], [0, 0], [0, 0], [0, 1]], requires_grad=True)
    pooled = segment_softmax_pool(embeddings, logits, mask)
    torch.testing.assert_close(pooled[0], embeddings[2])
    pooled[0].sum().backward()
    expected = (logits[:, 0] - 4).exp() * (embeddings - embeddings[2]).sum(1)
    torch.testing.assert_close(mask.grad[:, 0], expected)
    nothing = torch.zeros(5, 2)
    torch.testing.assert_close(segment_softmax_pool(embeddings, logits, nothing), embeddings[[2, 0]])


def test_pooling_gradients():
    """All gradients, with that of the mask; each branch keeps its largest logit, so no bound applies."""
    embeddings, logits = draw(4, (5, 3), (5, 2))
    mask = torch.zeros(5, 2, dtype=torch.float64).scatter_(0, logits.argmax(0, keepdim=True), 1.0)
    mask[0] = 1
    assert gradcheck(segment_softmax_pool, (embeddings, logits, mask.requires_grad_()))


def test_pooling_passes_gradients_to_the_mask_as_the_equation_says():
    """dE/dM_j = exp(A_j) (F_j - E) / sum_s exp(A_s) M_s for kept and dropped tiles."""
    embeddings, logits = draw(5, (6, 3), (6, 1))
    mask = torch.ones(6, 1, dtype=torch.float64)
    mask[logits.argmin()] = 0
    mask.requires_grad_()
    pooled = segment_softmax_pool(embeddings, logits, mask)
    direction = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (pooled[0] @ direction).backward()
    with torch.no_grad():
        weights = logits.exp() / (logits.exp() * mask).sum()
        expected = weights * ((embeddings - pooled) @ direction)[:, None]
    torch.testing.assert_close(mask.grad, expected)
    assert (mask.grad[logits.argmin()] != 0).all()


def test_pooling_bounds_the_gradient_of_a_dropped_tile_above_all_kept_ones():
    embeddings = torch.tensor([[1.0], [0.0]])
    mask = torch.tensor([[0.0], [1.0]], requires_grad=True)
    segment_softmax_pool(embeddings, torch.tensor([[50.0], [0.0]]), mask).sum().backward()
    assert mask.grad[0].item() == pytest.approx(1.0)  # it is e^50 without the bound


# Gumbel mask


@few
@given(seeds, st.integers(1, 20), st.integers(1, 4), st.floats(0.1, 5), st.floats(0.05, 0.95))
def test_gumbel_mask_binarizes_the_noisy_sigmoid(seed, n, branches, temperature, threshold):
    (logits,) = draw(seed, (n, branches))
    mask = gumbel_mask(logits, seed=seed, temperature=temperature, threshold=threshold)
    soft = expit((logits + logistic(seed, logits)).detach().numpy() / temperature)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    np.testing.assert_array_equal(mask.detach(), soft > threshold)


@few
@given(seeds, st.floats(0.3, 3))
def test_gumbel_mask_has_the_gradient_of_the_sigmoid(seed, temperature):
    logits, upstream = draw(seed, (7, 2), (7, 2))
    mask = gumbel_mask(logits, seed=seed, temperature=temperature)
    (mask * upstream.detach()).sum().backward()
    soft = expit((logits + logistic(seed, logits)).detach().numpy() / temperature)
    expected = upstream.detach().numpy() * soft * (1 - soft) / temperature
    np.testing.assert_allclose(logits.grad, expected, rtol=1e-10, atol=1e-14)


def test_gumbel_mask_without_noise_thresholds_the_sigmoid_alone():
    """At gamma = 0.5 the temperature has no effect; at other thresholds, evaluation uses temperature 1."""
    logits = torch.tensor([[-0.1], [0.1], [1.0], [2.0]])
    assert gumbel_mask(logits).flatten().tolist() == [0, 1, 1, 1]
    assert gumbel_mask(logits, threshold=float(expit(1.5))).flatten().tolist() == [0, 0, 0, 1]


# Keep ratio: DMIN's union of the branches of a mask


@few
@given(seeds, st.integers(1, 20), st.integers(1, 4), st.floats(0.1, 5), st.floats(0.05, 0.95))
def test_keep_ratio_counts_the_union_of_all_branches(seed, n, branches, temperature, threshold):
    (logits,) = draw(seed, (n, branches))
    mask = gumbel_mask(logits, seed=seed, temperature=temperature, threshold=threshold)
    kept = sum(any(row) for row in mask.tolist())
    assert union(mask).mean().item() == pytest.approx(kept / n, abs=1e-12)


def test_keep_ratio_counts_a_tile_that_only_the_third_branch_keeps():
    logits = torch.tensor([[-1.0, -1, 1], [-1, -1, -1], [1, -1, 1], [-1, -1, -1]])
    assert union(gumbel_mask(logits)).mean().item() == 0.5


def test_keep_ratio_moves_a_branch_only_where_no_other_branch_keeps_the_tile():
    """d r~ / dM_c^j = 1/N prod_{o != c} (1 - M_o^j), through the straight-through mask."""
    (logits,) = draw(6, (30, 3))
    mask = gumbel_mask(logits)
    union(mask).mean().backward()
    hard, soft = mask.detach().numpy(), expit(logits.detach().numpy())
    expected = np.zeros((30, 3))
    for j in range(30):
        for c in range(3):
            others = np.prod([1 - hard[j, o] for o in range(3) if o != c])
            expected[j, c] = others * soft[j, c] * (1 - soft[j, c]) / 30
    np.testing.assert_allclose(logits.grad, expected, rtol=1e-10, atol=1e-14)
    assert (expected == 0).any()
    assert (expected > 0).any()


# Random numbers


def test_noise_is_the_difference_of_two_gumbel_variables():
    noise = logistic(0, torch.empty(20_000, dtype=torch.float64)).numpy()
    gumbel = np.random.default_rng(0).gumbel(size=(2, 20_000))
    # The draw is fixed; if the scale is wrong by 5 %, the p-values fall below 1e-3.
    assert kstest(noise, "logistic").pvalue > 0.01
    assert ks_2samp(noise, gumbel[0] - gumbel[1]).pvalue > 0.01
    assert logistic(1, torch.empty(1_000_000)).abs().max() < 17


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**62 - 1])
def test_bits_are_uniform_and_differ_between_places_and_seeds(seed):
    words = bits(seed, (2**16,)).numpy().view(np.uint32)
    other = bits(seed + 1, (2**16,)).numpy().view(np.uint32)
    for part in (words & 0xFF, words >> 24, (words ^ other) & 0xFF, (words[1:] ^ words[:-1]) >> 24):
        assert chisquare(np.bincount(part, minlength=256)).pvalue > 1e-3
    assert len(np.unique(words)) == 2**16  # no two positions have the same hash
    assert abs(np.corrcoef(words[1:], words[:-1])[0, 1]) < 0.02


def test_a_seed_is_drawn_from_the_generator():
    first, second = (draw_seed(torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == second != draw_seed(torch.Generator().manual_seed(4))


# Bags of different lengths


@few
@given(seeds, st.lists(st.integers(0, 6), min_size=1, max_size=5), st.booleans())
def test_ragged_bags_are_pooled_as_if_alone(seed, lengths, masked):
    n = sum(lengths)
    arguments = attention_arguments(seed, n, 3, 4, 2)
    mask = (torch.rand(n, 2, generator=torch.Generator().manual_seed(seed)) < 0.5) if masked else None
    pooled, logits = gated_attention_pool(*arguments, mask, Segments(lengths))
    torch.testing.assert_close(pooled, segment_softmax_pool(arguments[0], logits, mask, Segments(lengths)))
    end = 0
    for bag, length in enumerate(lengths):
        start, end = end, end + length
        part = None if mask is None else mask[start:end]
        alone, scores = gated_attention_pool(arguments[0][start:end], *arguments[1:], part)
        torch.testing.assert_close(pooled[bag], alone)
        torch.testing.assert_close(logits[start:end], scores)
        assert end > start or not alone.any()


def test_gradients_of_ragged_bags():
    arguments = attention_arguments(7, 6, 3, 2, 2)
    segments = Segments((2, 0, 4))
    assert gradcheck(lambda *a: gated_attention_pool(*a, None, segments, dropout=0.3, seed=2), arguments)


@few
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_segments_describe_bags_of_these_lengths(lengths):
    segments = Segments(lengths)
    numbers = [bag for bag, length in enumerate(lengths) for _ in range(length)]
    assert segments.lengths == tuple(lengths)
    assert segments.offsets.tolist() == [sum(lengths[:bag]) for bag in range(len(lengths) + 1)]
    assert segments.offsets.dtype == torch.int64
    assert (segments.n_bags, segments.n_tiles) == (len(lengths), sum(lengths))
    assert segments.longest == max(lengths)
    assert segments.bag.tolist() == numbers
    assert Segments.from_offsets(segments.offsets.int()).lengths == segments.lengths


# Bad input

F, A = torch.randn(5, 3), torch.randn(5, 2)
WEIGHTS = [torch.randn(s) for s in ((4, 3), (4,), (4, 3), (4,), (2, 4), (2,))]
BAGS = Segments((2, 0, 3))
assert BAGS.n_tiles == len(F)


@pytest.mark.parametrize(
    ("message", "call"),
    {
        "logits has shape": lambda: gumbel_mask(A[0]),
        "logits is torch.int64": lambda: gumbel_mask(A.long()),
        "at least one tile": lambda: gumbel_mask(A[:0]),
        "temperature is 0": lambda: gumbel_mask(A, temperature=0.0),
        "threshold is 1": lambda: gumbel_mask(A, threshold=1.0),
        "GPU": lambda: gumbel_mask(A, backend="triton"),
        "backend is 'cuda'": lambda: gumbel_mask(A, backend="cuda"),
        "logits has shape .* N = 5": lambda: segment_softmax_pool(F, A[:4]),
        "mask has shape": lambda: segment_softmax_pool(F, A, A[:, :1]),
        "logits is torch.float64": lambda: segment_softmax_pool(F, A.double()),
        "mask is on meta": lambda: segment_softmax_pool(F, A, A.to("meta")),
        "gate_bias has shape": lambda: gated_attention(F, *WEIGHTS[:3], WEIGHTS[3][:2], *WEIGHTS[4:]),
        "score_weight is a list": lambda: gated_attention(F, *WEIGHTS[:4], [1.0], WEIGHTS[5]),
        "dropout is 1": lambda: gated_attention(F, *WEIGHTS, dropout=1.0, seed=0),
        "seed is None": lambda: gated_attention_pool(F, *WEIGHTS, dropout=0.5),
        "embeddings has shape": lambda: gated_attention_pool(F[0], *WEIGHTS),
    }.items(),
)
def test_bad_input_is_refused_by_name(message, call):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("operator", "arguments", "options"),
    [
        (chebyshev_kan, (F, torch.randn(3, 1, 13)), {}),
        (chebyshev_kan, (F, torch.randn(3, 2, 13)), {}),
        (gumbel_mask, (A,), {"seed": 3, "temperature": 0.7}),
        (gated_attention, (F, *WEIGHTS), {"dropout": 0.25, "seed": 3}),
        (segment_softmax_pool, (F, A, (A > 0).float()), {}),
        (segment_softmax_pool, (F, A), {"segments": BAGS}),
        (gated_attention_pool, (F, *WEIGHTS), {}),
        (gated_attention_pool, (F, *WEIGHTS), {"segments": BAGS}),
        (
            self_distillation_pool,
            (F, *WEIGHTS),
            {"segments": BAGS, "dropout": 0.25, "seed": 3, "noise_seed": 4},
        ),
        (tile_projection, (F, *WEIGHTS[:2], F[0].detach(), F[1].detach().abs()), {"dropout": 0.5, "seed": 1}),
    ],
)
def test_compiled_without_a_break(operator, arguments, options):
    """Outputs and gradients equal those of eager mode."""
    torch.compiler.reset()  # more cases than PyTorch compiles of one function
    leaves = [a.clone().requires_grad_() for a in arguments]
    compiled = torch.compile(lambda *a: operator(*a, **options), fullgraph=True)(*leaves)
    eager = operator(*leaves, **options)
    torch.testing.assert_close(compiled, eager)
    ours, wanted = (x[0] if isinstance(x, tuple) else x for x in (compiled, eager))
    grads = [torch.autograd.grad(x.square().sum(), leaves, materialize_grads=True) for x in (ours, wanted)]
    largest = max(reference.norm() for reference in grads[1])
    for mine, reference in zip(*grads, strict=True):
        # Both are float32 sums in different orders. Small entries cancel, and a gradient may be zero (that of
        # the bias of a softmax), so norms are compared, as in tests/kernels.
        assert (mine - reference).norm() <= 2e-5 * reference.norm().clamp(min=largest / 10)


def test_operators_follow_autocast():
    """Like `linear`, they compute in bfloat16, whatever the types of their arguments."""
    with torch.autocast("cpu", torch.bfloat16):
        pooled, logits = gated_attention_pool(F, *[w.bfloat16() for w in WEIGHTS])
    assert pooled.dtype == logits.dtype == torch.bfloat16


def test_the_first_layer_standardizes_projects_and_rectifies_tile_by_tile():
    rng = torch.Generator().manual_seed(0)
    features, weight = torch.randn(7, 5, generator=rng).double(), torch.randn(4, 5, generator=rng).double()
    bias, mean, std = torch.randn(4, generator=rng).double(), features.mean(0), features.std(0)
    embeddings = tile_projection(features, weight, bias, mean, std)
    for i in range(7):
        for e in range(4):
            total = bias[e] + sum((features[i, d] - mean[d]) / std[d] * weight[e, d] for d in range(5))
            assert embeddings[i, e] == pytest.approx(max(float(total), 0.0), abs=1e-12)
    plain = tile_projection(features, weight)
    torch.testing.assert_close(plain, (features @ weight.T).relu())


def test_dropout_of_the_first_layer_is_that_of_pytorch_or_of_a_seed():
    features, weight = torch.ones(2000, 3), torch.ones(8, 3)
    torch.manual_seed(3)
    ours = tile_projection(features, weight, dropout=0.25)
    torch.manual_seed(3)
    assert torch.equal(ours, torch.nn.functional.dropout(torch.full((2000, 8), 3.0), 0.25))
    seeded = tile_projection(features, weight, dropout=0.25, seed=5)
    assert torch.equal(seeded, tile_projection(features, weight, dropout=0.25, seed=5))
    assert set(seeded.unique().tolist()) == {0.0, 4.0}
    # 0.25 +- 4 standard errors of 16,000 fair draws
    assert float((seeded == 0).float().mean()) == pytest.approx(0.25, abs=4 * (0.1875 / 16_000) ** 0.5)


def test_student_and_teacher_are_those_of_the_three_operators():
    """With noise and dropout, for bags side by side and for one bag, values and gradients."""
    torch.manual_seed(0)
    tensors = [torch.randn(9, 3), *(torch.randn_like(w) for w in WEIGHTS)]
    for segments in (Segments((5, 4)), None):
        results = []
        for fused in (True, False):
            leaves = [t.double().requires_grad_() for t in tensors]
            options = {"dropout": 0.25, "seed": 3}
            if fused:
                student, teacher, logits, mask = self_distillation_pool(
                    *leaves, segments=segments, noise_seed=4, temperature=0.7, threshold=0.4, **options
                )
            else:
                logits = gated_attention(*leaves, **options)
                mask = gumbel_mask(logits, seed=4, temperature=0.7, threshold=0.4)
                student = segment_softmax_pool(leaves[0], logits, mask, segments)
                teacher = segment_softmax_pool(leaves[0], logits, None, segments)
            total = student.square().sum() + (teacher * mask.sum()).sum()
            results.append((student, teacher, logits, mask, *torch.autograd.grad(total, leaves)))
        for ours, wanted in zip(*results, strict=True):
            torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize(
    ("message", "call"),
    {
        r"features is torch.float32 of shape \(5, 3\), expected .* \(N, 4\)": lambda: tile_projection(
            F, torch.ones(2, 4)
        ),
        "features is torch.int64": lambda: tile_projection(F.long(), torch.ones(2, 3)),
        "features is on meta, but weight is on cpu": lambda: tile_projection(F.to("meta"), torch.ones(2, 3)),
        "mean and std come together": lambda: tile_projection(F, torch.ones(2, 3), mean=torch.ones(3)),
        "dropout is 1.5": lambda: tile_projection(F, torch.ones(2, 3), dropout=1.5),
        "temperature is -1": lambda: self_distillation_pool(F, *WEIGHTS, temperature=-1),
        "seed is None": lambda: self_distillation_pool(F, *WEIGHTS, dropout=0.5),
        "segments covers 5 tiles, embeddings has 4": lambda: self_distillation_pool(
            F[:4], *WEIGHTS, segments=BAGS
        ),
    }.items(),
)
def test_bad_input_of_the_fused_operators_is_refused_by_name(message, call):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture
def old_gpu(monkeypatch):
    """Pretend that all tensors lie on a GPU of this compute capability, which warns anew."""

    def pretend(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Made-up GPU")
        dispatch._runs_kernels.cache_clear()

    yield pretend
    dispatch._runs_kernels.cache_clear()


@pytest.mark.parametrize(
    ("capability", "narrow", "reason"),
    [
        ((7, 0), False, "Made-up GPU has compute capability 7.0, Triton needs 7.5"),
        ((7, 5), True, "Made-up GPU has compute capability 7.5, bfloat16 needs 8.0"),
        ((7, 5), False, None),
        ((9, 0), True, None),
    ],
)
def test_a_gpu_that_is_too_old_runs_the_references_which_is_said_once(old_gpu, capability, narrow, reason):
    old_gpu(capability)
    gpu = torch.device("cuda", 0)
    if reason is None:
        assert dispatch._runs_kernels(gpu, narrow)
        return
    with pytest.warns(RuntimeWarning, match=reason):
        assert not dispatch._runs_kernels(gpu, narrow)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not dispatch._runs_kernels(gpu, narrow)


def test_a_gpu_without_triton_runs_the_references(old_gpu, monkeypatch):
    old_gpu((9, 0))
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(RuntimeWarning, match="Triton is not installed: the operators run as formulas"):
        assert not dispatch._runs_kernels(torch.device("cuda", 0), False)
