"""LIPN over all patches of a slide: which tiles are worth reading (paper: inference, first stage)."""

from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from hdmil_lib.kernels import lipn_forward
from hdmil_lib.models import LIPN
from hdmil_lib.training.two_stage import Threshold, lipn_mask

_PACKED: WeakKeyDictionary[LIPN, tuple[list[tuple[int, int]], list[Tensor]]] = WeakKeyDictionary()


@torch.inference_mode()
def prescreen(
    lipn: LIPN, patches: np.ndarray, threshold: Threshold = 0.5, *, batch: int = 4096
) -> tuple[np.ndarray, np.ndarray]:
    """Score each patch and select tiles for each branch: M_LR,c = [sigmoid(P_c) > gamma].

    The tiles to read are the union over branches, `mask.any(axis=1)`. Where no branch keeps anything, the
    single tile of highest score is kept for its branch, so that every slide gets an answer. On a CPU the
    scores are those of the module to the bit, as cross-validation has them; on a GPU `lipn_forward` computes
    them in 16 bits.

    Args:
        lipn: The pre-screening network; used in evaluation mode and left in the mode it was in.
        patches: RGB at 8 um/px, uint8 (N, 16, 16, 3), N >= 1.
        threshold: gamma, or one threshold a branch.
        batch: Patches a forward pass; bounds the memory.

    Returns:
        The mask, bool (N, C), and the scores sigmoid(P), float32 (N, C).

    Raises:
        BagError: The patches have another shape or type (on a GPU: ValueError).
    """
    training = lipn.training
    lipn.eval()
    device = next(lipn.parameters()).device
    run = partial(lipn_forward, weights=packed(lipn)) if device.type == "cuda" else lipn
    chunks = torch.from_numpy(patches).split(batch)
    logits = torch.cat([run(chunk.to(device)).float().cpu() for chunk in chunks])
    lipn.train(training)
    return lipn_mask(logits, threshold).numpy(), logits.sigmoid().numpy()


def packed(lipn: LIPN) -> list[Tensor]:
    """`LIPN.packed` in float16, again only after a number has changed: it takes longer than a slide."""
    state = [(t.data_ptr(), t._version) for t in (*lipn.parameters(), *lipn.buffers())]
    if lipn not in _PACKED or _PACKED[lipn][0] != state:
        _PACKED[lipn] = state, lipn.packed(torch.float16)
    return _PACKED[lipn][1]
