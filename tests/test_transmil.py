"""TransMIL and Nystrom attention: against the nystrom-attention package, closed forms and bags one by one."""

import math

import pytest
import torch
from nystrom_attention import NystromAttention as Oracle

from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models.nystrom import NystromAttention, pseudo_inverse
from hdmil_lib.models.transmil import PositionEncoding, TransMIL

DIM, LENGTHS = 16, [1, 7, 2, 9, 60, 5, 8]
SMALL = {"embed_dim": DIM, "n_landmarks": 6}


def attentions(n_landmarks, seed=0, sharpness=3.0):
    """The package's attention and ours with its weights, in float64; `sharpness` of the softmax."""
    torch.manual_seed(seed)
    oracle = Oracle(DIM, dim_head=DIM // 8, heads=8, num_landmarks=n_landmarks).eval()
    own = NystromAttention(DIM, n_landmarks=n_landmarks).eval()
    oracle.to_qkv.weight.data *= sharpness
    with torch.no_grad():
        own.projection.weight.copy_(oracle.to_qkv.weight)
        own.neighbors.weight.copy_(oracle.res_conv.weight)
        own.output[0].weight.copy_(oracle.to_out[0].weight)
        own.output[0].bias.copy_(oracle.to_out[0].bias)
    return oracle.double(), own.double()


@pytest.fixture
def double():
    """The package makes its identity matrix in the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def relative(a, b):
    return float(((a - b).abs().max() / b.abs().max()).detach())


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("n_landmarks", [1, 4, 16, 64])
@pytest.mark.parametrize("n", [2, 4, 5, 17, 33, 64, 122])
def test_attention_is_that_of_the_package(n, n_landmarks):
    """One sequence at a time: the package starts its pseudo-inverse from the largest sums of the batch.

    Both put zero tokens in front and do not mask them, so that they take their share of attention. The
    differences left are rounding, which the iteration amplifies: 1.4e-13 was the most over 40 seeds.
    """
    oracle, own = attentions(n_landmarks, seed=n)
    tokens = torch.randn(1, n, DIM)
    expected, weights = oracle(tokens, return_attn=True)
    zeros = -n % n_landmarks
    assert relative(own(tokens), expected) < 1e-11
    first, attention = own.first(tokens)
    assert relative(first, expected[:, 0]) < 1e-11
    assert relative(attention, weights[:, :, zeros, zeros:]) < 1e-11


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("n", [5, 22])
def test_gradients_are_those_of_the_package(n):
    oracle, own = attentions(8)
    tokens = torch.randn(1, n, DIM, requires_grad=True)
    up = torch.randn(1, n, DIM)
    expected = torch.autograd.grad(
        (oracle(tokens) * up).sum(), [tokens, oracle.to_qkv.weight, oracle.res_conv.weight]
    )
    got = torch.autograd.grad((own(tokens) * up).sum(), [tokens, own.projection.weight, own.neighbors.weight])
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) < 1e-9


@pytest.mark.usefixtures("double")
def test_sequences_of_a_batch_do_not_affect_one_another():
    """Here the package differs: what it makes of a sequence depends on the others in the batch."""
    oracle, own = attentions(8)
    tokens = torch.randn(3, 20, DIM) * torch.tensor([0.1, 1.0, 10.0])[:, None, None]
    singly = torch.cat([oracle(one[None]) for one in tokens])
    assert relative(own(tokens), singly) < 1e-10
    assert relative(oracle(tokens), singly) > 1e-6


def test_with_a_landmark_a_token_and_many_iterations_attention_is_exact():
    """A A^+ A = A: with all tokens as landmarks Nystrom's product is softmax(Q K^T) itself."""
    torch.manual_seed(0)
    own = NystromAttention(8, n_heads=2, n_landmarks=5, iterations=40).double()
    own.projection.weight.data *= 3
    tokens = torch.randn(2, 5, 8, dtype=torch.float64)
    q, k, _ = own.projection(tokens).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    expected = (q @ k.mT / 2).softmax(-1)[:, :, 0]
    torch.testing.assert_close(own.first(tokens)[1], expected, rtol=1e-6, atol=1e-8)


def test_pseudo_inverse_ends_at_that_of_linear_algebra():
    matrices = torch.randn(3, 2, 6, 6, dtype=torch.float64).mul(2).softmax(-1)
    right = torch.randn(3, 2, 6, 4, dtype=torch.float64)
    norm = matrices.sum(2).amax((1, 2))[:, None, None, None]
    expected = torch.linalg.pinv(matrices) @ right
    torch.testing.assert_close(pseudo_inverse(matrices, right, norm, 40), expected, rtol=1e-6, atol=1e-6)


def test_position_encoding_is_the_sum_of_three_convolutions_and_the_tiles():
    torch.manual_seed(0)
    encoding, tiles = PositionEncoding(6).double(), torch.randn(2, 25, 6, dtype=torch.float64)
    image = tiles.mT.reshape(2, 6, 5, 5)
    expected = image.clone()
    for convolution, size in zip(encoding.convolutions, (7, 5, 3), strict=True):
        expected += torch.nn.functional.conv2d(
            image, convolution.weight, convolution.bias, padding=size // 2, groups=6
        )
    torch.testing.assert_close(encoding(tiles), expected.flatten(2).mT)


def by_hand(model, features):
    """TransMIL as its definition reads, for one bag, with all tokens of the last layer."""
    tiles = model.projection(features)
    side = math.ceil(math.sqrt(len(tiles)))
    tokens = torch.cat([model.class_token[None], tiles, tiles[: side**2 - len(tiles)]])[None]
    tokens = tokens + model.attentions[0](model.norms[0](tokens))
    tokens = torch.cat([tokens[:, :1], model.positions(tokens[:, 1:])], 1)
    tokens = tokens + model.attentions[1](model.norms[1](tokens))
    return model.classifier(tokens[0, 0])


def draw(n_classes=2, **settings):
    torch.manual_seed(0)
    model = TransMIL(5, n_classes, **SMALL | settings).double().eval()
    segments = Segments(LENGTHS)
    return model, torch.randn(segments.n_tiles, 5, dtype=torch.float64), segments


@pytest.mark.parametrize("n_classes", [2, 4])
def test_batched_logits_and_gradients_are_those_of_the_definition_bag_by_bag(n_classes):
    model, features, segments = draw(n_classes)
    output = model(features, segments)
    singly = torch.stack([by_hand(model, bag) for bag in features.split(LENGTHS)])
    torch.testing.assert_close(output.logits, singly, rtol=1e-8, atol=1e-10)
    up, parameters = torch.randn_like(singly), list(model.parameters())
    got = torch.autograd.grad((output.logits * up).sum(), parameters)
    expected = torch.autograd.grad((singly * up).sum(), parameters)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_in_float32_batches_agree_with_single_bags():
    model, features, segments = draw()
    model, features = model.float(), features.float()
    batched = model(features, segments)
    outputs = [model(bag) for bag in features.split(LENGTHS)]
    torch.testing.assert_close(batched.logits, torch.cat([o.logits for o in outputs]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        batched.attention.exp(), torch.cat([o.attention for o in outputs]).exp(), rtol=1e-4, atol=1e-6
    )


def test_attention_is_the_class_tokens_share_with_copies_of_a_tile_added():
    """7 tiles fill a square of 9: the first two count twice."""
    model, features, _ = draw()
    bag = features[1:8]
    weights = model.encode(model.projection(bag)[[0, 1, 2, 3, 4, 5, 6, 0, 1]][None])[1][0]
    expected = weights[:7] + torch.cat([weights[7:], weights.new_zeros(5)])
    attention = model(bag).attention
    assert attention.shape == (7, 1)
    torch.testing.assert_close(attention[:, 0].exp(), expected.clamp(min=1e-12))
    assert expected.min() > 0


def test_a_huge_bag_beside_it_changes_nothing():
    model, features, _ = draw()
    small, huge = features[:6], 100 * torch.randn(500, 5, dtype=torch.float64)
    both = model(torch.cat([small, huge]), Segments([6, 500])).logits
    torch.testing.assert_close(both[:1], model(small).logits)


def test_the_order_of_tiles_matters():
    model, features, _ = draw()
    bag = features[:30]
    change = model(bag).logits - model(bag.flip(0)).logits
    assert change.abs().min() > 1e-3


def test_one_tile_trains():
    torch.manual_seed(0)
    model = TransMIL(5, 3, embed_dim=8)
    output = model(torch.randn(1, 5), Segments([1]))
    sum(model.loss(output, torch.tensor([2])).values()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)
    assert model.class_token.grad.abs().sum() > 0


def test_landmarks_are_half_the_width_by_default():
    assert {a.n_landmarks for a in TransMIL(5, 2, embed_dim=32).attentions} == {16}


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="dim is 20, expected a multiple of n_heads = 8"):
        TransMIL(5, 2, embed_dim=20)


def test_an_even_convolution_is_refused():
    with pytest.raises(ValueError, match="taps is 4, expected an odd number"):
        NystromAttention(8, taps=4)
