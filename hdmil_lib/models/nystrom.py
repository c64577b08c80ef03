"""Nystrom attention: every token attends to all others through landmarks (Xiong et al. 2021)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


class Factors(NamedTuple):
    """Factors of the attention matrix, with K landmarks: to_landmarks between^+ to_tokens.

    Attributes:
        to_landmarks: Softmax from queries to landmarks, (B, H, n, K).
        between: Softmax from landmarks to landmarks, (B, H, K, K).
        norm: Largest column sum of `between` in any head, (B, 1, 1, 1).
        to_tokens: Softmax from landmarks to tokens, (B, H, K, n).
        values: Values of the tokens, (B, H, n, d).
    """

    to_landmarks: Tensor
    between: Tensor
    norm: Tensor
    to_tokens: Tensor
    values: Tensor


class NystromAttention(nn.Module):
    """Self-attention of H heads with softmax(Q K~^T) softmax(Q~ K~^T)^+ softmax(Q~ K^T) for softmax(Q K^T).

    The landmarks Q~ and K~ are means over m equal stretches of the sequence. Zero tokens in front make its
    length divisible by m; they are not masked, as in TransMIL. A depthwise convolution of the values along
    the sequence is added.

    Args:
        dim: Width of the tokens, a multiple of `n_heads`.
        n_heads: Number of heads, H, each of width d = `dim` / H.
        n_landmarks: Number of landmarks, m.
        iterations: Number of iterations of the pseudo-inverse.
        taps: Kernel size of the convolution of the values, odd.
        dropout: Dropout rate of the output.

    Raises:
        ValueError: `dim` is not a multiple of `n_heads`, or `taps` is even.
    """

    def __init__(
        self,
        dim: int,
        *,
        n_heads: int = 8,
        n_landmarks: int = 256,
        iterations: int = 6,
        taps: int = 33,
        dropout: float = 0.0,
    ):
        super().__init__()
        if dim % n_heads:
            raise ValueError(f"dim is {dim}, expected a multiple of n_heads = {n_heads}")
        if taps % 2 == 0:
            raise ValueError(f"taps is {taps}, expected an odd number")
        self.n_heads, self.n_landmarks, self.iterations = n_heads, n_landmarks, iterations
        self.reach = taps // 2
        self.projection = nn.Linear(dim, 3 * dim, bias=False)
        self.neighbors = nn.Conv2d(
            n_heads, n_heads, (taps, 1), padding=(self.reach, 0), groups=n_heads, bias=False
        )
        self.output = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(dropout))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, n, dim) to tokens (B, n, dim)."""
        to_landmarks, between, norm, to_tokens, values = self.factors(tokens)
        mixed = to_landmarks @ pseudo_inverse(between, to_tokens @ values, norm, self.iterations)
        return self.output((mixed + self.neighbors(values)).transpose(1, 2).flatten(2))

    def first(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Output of the first token, without the cost of the others.

        Returns:
            The first row of `forward`, (B, dim), and the attention of the first token to each token in each
            head, (B, H, n), without the convolution. It need not sum to 1, since the zero tokens in front
            have a share, and it can be negative.
        """
        to_landmarks, between, norm, to_tokens, values = self.factors(tokens, n_queries=1)
        weights = pseudo_inverse(between.mT, to_landmarks.mT, norm, self.iterations).mT @ to_tokens
        near = values[:, :, : self.reach + 1]
        kernel = self.neighbors.weight[:, 0, self.reach : self.reach + near.shape[2]]
        mixed = weights @ values + (near * kernel).sum(2, keepdim=True)
        return self.output(mixed.transpose(1, 2).flatten(1)), weights[:, :, 0]

    def factors(self, tokens: Tensor, n_queries: int | None = None) -> Factors:
        """Factors of the attention from the first `n_queries` tokens (all by default) to all tokens.

        The p landmarks that are means of zero tokens only are equal. One landmark, with its row and column
        multiplied by sqrt(p), replaces them: all products, and so the pseudo-inverse, stay the same.
        """
        n = tokens.shape[1]
        stretch = math.ceil(n / self.n_landmarks)
        n_zeros = stretch * self.n_landmarks - n
        equal = n_zeros // stretch
        heads = self.projection(tokens).unflatten(2, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = heads.unbind(0)
        queries = queries * queries.shape[-1] ** -0.5
        zeros_left = n_zeros - stretch * max(equal - 1, 0)
        near, far = (
            pad(t, (0, 0, zeros_left, 0)).unflatten(2, (-1, stretch)).mean(3) for t in (queries, keys)
        )
        root = tokens.new_ones(far.shape[2])
        root[0] = math.sqrt(max(equal, 1))

        to_landmarks = _softmax(queries[:, :, :n_queries] @ far.mT, root)
        between = _softmax(near @ far.mT, root) * root[:, None]
        norm = (root @ between / root).amax((1, 2))
        zero_logit = math.log(n_zeros) if n_zeros else -math.inf
        to_tokens = pad(near @ keys.mT, (1, 0), value=zero_logit).softmax(-1)[..., 1:] * root[:, None]
        return Factors(to_landmarks, between, norm[:, None, None, None], to_tokens, values)


def _softmax(scores: Tensor, root: Tensor) -> Tensor:
    """Softmax over landmarks each of which replaces root^2 equal ones, times root."""
    return (scores + 2 * root.log()).softmax(-1) / root


def pseudo_inverse(matrices: Tensor, right: Tensor, norm: Tensor, iterations: int) -> Tensor:
    """Moore-Penrose inverse times `right`: A^+ R, by an iteration of third order (Xiong et al. 2021, eq. 11).

    Z <- Z (13 I - P (15 I - P (7 I - P))) / 4 with P = A Z, from Z = A^T / norm. P is a polynomial of A A^T
    with an iteration of its own, which takes two products instead of four, so Z is never formed.

    Args:
        matrices: A, (B, H, K, K).
        right: R, (B, H, K, d).
        norm: Upper bound of the squared largest singular value of each A, (B, 1, 1, 1).
        iterations: Number of steps; with few steps small singular values are not inverted.

    Returns:
        (B, H, K, d).
    """
    shape = right.shape
    product = (matrices @ matrices.mT / norm).flatten(0, 1)
    right = right.flatten(0, 1)
    for step in range(iterations):
        inner = torch.baddbmm(right, product, right, beta=7, alpha=-1)
        inner = torch.baddbmm(right, product, inner, beta=15, alpha=-1)
        right = torch.baddbmm(right, product, inner, beta=13 / 4, alpha=-1 / 4)
        if step < iterations - 1:
            square = product @ product
            low, high = product.sub(square, alpha=15 / 13), product.sub(square, alpha=1 / 7)
            product = torch.baddbmm(low, square, high, beta=13 / 4, alpha=7 / 4)
    return matrices.mT @ right.view(shape) / norm
