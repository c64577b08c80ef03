"""How an answer from the most suspicious tiles becomes that of all tiles as more of them are read.

The first tiles make DMIN too certain of tumor, in slides without tumor too. On validation slides it is seen
how the class scores from a share of the tiles relate to those from all: by a factor, a summand per class, and
a spread that is left. The answer of all tiles is then expected, with a known uncertainty, before it is there.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SHARES = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares of the tiles at which the relation is known, G in number; between them it is interpolated."""

SLOPES = (0.05, 5.0)


class Expected(NamedTuple):
    """Answer of all tiles that is expected after some.

    Attributes:
        probabilities: Class probabilities, float32 (C,).
        spread: Standard deviation of the lead of the first class over the second, in log odds.
    """

    probabilities: np.ndarray
    spread: float


def neutral(n_classes: int) -> Tensor:
    """The relation without knowledge, (G, 2 + C): the answer stays, its spread is the share not yet read."""
    table = torch.zeros(len(SHARES), 2 + n_classes)
    table[:, 0], table[:, 1] = 1.0, 1 - torch.tensor(SHARES)
    return table


def expected(table: Tensor, probabilities: np.ndarray, share: float) -> Expected:
    """Expect the answer of all tiles.

    Args:
        table: Factor, spread and summands at each of `SHARES`, (G, 2 + C).
        probabilities: Class probabilities from the tiles read so far, (C,).
        share: Share of the tiles that are read.
    """
    if share >= 1:
        return Expected(probabilities, 0.0)
    columns = table.double().cpu().numpy()
    slope, spread, *bias = (np.interp(share, SHARES, column) for column in columns.T)
    scores = slope * centered(probabilities) + np.array(bias)
    weights = np.exp(scores - scores.max())
    return Expected((weights / weights.sum()).astype(np.float32), float(spread))


def centered(probabilities: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities (..., C) whose mean over classes is 0."""
    logs = np.log(np.asarray(probabilities, np.float64).clip(min=1e-37))
    return logs - logs.mean(-1, keepdims=True)


def fit_settling(scores: np.ndarray, final: np.ndarray) -> Tensor:
    """Fit the relation by least squares.

    Args:
        scores: `centered` answers of S slides at each of `SHARES`, (S, G, C); those at shares 0 and 1 are not
            used.
        final: `centered` answers of all tiles, (S, C).

    Returns:
        Factor, spread and summands at each of `SHARES`, float32 (G, 2 + C).
    """
    table = neutral(final.shape[1])
    for i in range(1, len(SHARES) - 1):
        some = scores[:, i]
        spreads = some - some.mean(0), final - final.mean(0)
        slope = float((spreads[0] * spreads[1]).sum() / max((spreads[0] ** 2).sum(), 1e-12))
        slope = float(np.clip(slope, *SLOPES))
        bias = final.mean(0) - slope * some.mean(0)
        guess = slope * some + bias
        first, second = np.argsort(-guess, axis=1)[:, :2].T
        rows = np.arange(len(final))
        error = (final - guess)[rows, first] - (final - guess)[rows, second]
        table[i] = torch.tensor([slope, max(float(np.sqrt((error**2).mean())), 1e-6), *bias])
    table[0] = table[1]  # nothing is known before the first tile
    return table
