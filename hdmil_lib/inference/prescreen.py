"""LIPN over all patches of a slide: which tiles are worth reading (paper: inference, first stage)."""

from functools import partial

import numpy as np
import torch

from hdmil_lib.kernels import lipn_forward
from hdmil_lib.models import LIPN
from hdmil_lib.training.two_stage import Threshold, lipn_mask


@torch.inference_mode()
def prescreen(
    lipn: LIPN, patches: np.ndarray, threshold: Threshold = 0.5, *, batch: int = 4096
) -> tuple[np.ndarray, np.ndarray]:
    """Score each patch and select tiles for each branch: M_LR,c = [sigmoid(P_c) > gamma].

    The tiles to read are the union over branches, `mask.any(axis=1)`. Where no branch keeps anything, the
    single tile of highest score is kept for its branch, so that every slide gets an answer.

    Args:
        lipn: The pre-screening network; used in evaluation mode and left in the mode it was in.
        patches: RGB at 8 um/px, uint8 (N, 16, 16, 3), N >= 1.
        threshold: gamma, or one threshold a branch.
        batch: Patches a forward pass; bounds the memory.

    Returns:
        The mask, bool (N, C), and the scores sigmoid(P), float32 (N, C).

    Raises:
        BagError: The patches have another shape or type.
    """
    training = lipn.training
    lipn.eval()
    device = next(lipn.parameters()).device
    run = lipn
    if device.type == "cuda":  # on a CPU the convolutions are faster
        run = partial(lipn_forward, weights=lipn.packed(torch.float16))
    chunks = torch.from_numpy(patches).split(batch)
    logits = torch.cat([run(chunk.to(device)).float().cpu() for chunk in chunks])
    lipn.train(training)
    return lipn_mask(logits, threshold).numpy(), logits.sigmoid().numpy()
