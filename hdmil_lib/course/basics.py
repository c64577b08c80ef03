"""Exercises of notebooks 00 to 04: slides, features, MIL and DMIN."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hdmil_lib.course.verdicts import Wrong, call, choose, exercise, number

# Notebook 00


@exercise("00.1")
def _share_of_a_normal_slide(answer: object) -> str:
    choose(
        answer,
        "about the same",
        ("more", "fewer", "about the same"),
        "Draw the slide and compare the two shares. LIPN imitates a mask with one column per class: which of "
        "them keeps tiles where there is no tumor?",
    )
    return "LIPN imitates the masks of both branches, and that of the class normal keeps tiles on any slide."


@exercise("00.2")
def _keep_thirty_percent(answer: object) -> str:
    kept = number(answer)
    if kept > 0.35:
        raise Wrong(
            f"The model keeps {kept:.0%}. A tile is kept where its score exceeds the threshold: move it."
        )
    if kept < 0.25:
        raise Wrong(f"The model keeps only {kept:.0%}. Which quantile of the scores leaves 30 % above it?")
    return f"The model keeps {kept:.0%}. Look at which tiles went before you trust it."


@exercise("00.3")
def _anytime(answer: Sequence[Any], *, kept: int, block: int, probabilities: Any) -> str:
    blocks = -(-kept // block)
    if len(answer) != blocks:
        raise Wrong(
            f"There are {len(answer)} answers. {kept} tiles in blocks of {block} give {blocks}; the last "
            "block may be shorter."
        )
    course = np.stack([np.asarray(step, dtype=float) for step in answer])
    if course.shape[1:] != np.shape(probabilities) or not np.allclose(course.sum(1), 1, atol=1e-3):
        raise Wrong("Each answer is to hold one probability per class, and they are to sum to one.")
    if not np.allclose(course[-1], probabilities, atol=1e-3):
        raise Wrong(
            "After the last block all kept tiles are read, so the answer has to be that of HDMIL. Does each "
            "step pool all tiles read so far?"
        )
    far = np.flatnonzero(np.abs(course - course[-1]).max(1) > 0.05)
    first = far.max() + 2 if len(far) else 1
    return f"From block {first} of {blocks} on it stays within 0.05 of the last answer."


# Notebook 01


@exercise("01.1")
def _squares(answer: object) -> str:
    squares = number(answer)
    if not 10_000 < squares < 60_000:
        raise Wrong("The order of magnitude is another one. How many micrometers wide is the scan?")
    if squares != 177 * 142:
        raise Wrong(
            "Close. A square that reaches over an edge does not count: round each side down by itself."
        )
    return "Tens of thousands of squares: this is why nobody wants to encode them all."


@exercise("01.2")
def _faint_tissue(answer: Sequence[float]) -> str:
    found, added = answer
    if added > 0.1:
        raise Wrong(f"This adds {added:.0%} that is glass. The setting that you changed went too far.")
    if found < 0.9:
        raise Wrong(
            f"This finds {found:.0%} of the tissue. Print the saturation of the faint tissue: which of the "
            "limits lies above it?"
        )
    return "Now apply your settings to a picture of blank glass with a little noise before you keep them."


@exercise("01.3")
def _without_pen(answer: object) -> str:
    picture = np.full((60, 60, 3), 242, np.uint8)
    picture[10:50, 10:50] = np.random.default_rng(0).integers((190, 90, 160), (225, 140, 200), (40, 40, 3))
    picture[30:50, 30:50] = (110, 60, 140)  # nuclei: purple, and darker than the stroma
    marked = picture.copy()
    marked[25:30] = (30, 60, 160)
    cleaned = np.asarray(call(answer, marked.copy()))
    if cleaned.shape != marked.shape or cleaned.dtype != np.uint8:
        raise Wrong(f"The result is {cleaned.dtype} {cleaned.shape}; a thumbnail is uint8 {marked.shape}.")
    if (cleaned[25:30] < 250).any():
        raise Wrong("Some of the ink is still there. By how much does its red lie below its blue?")
    lost = (cleaned != picture).any(-1)
    lost[20:35] = False  # the rim of the ink may go with it
    if lost.any():
        raise Wrong(
            f"{lost.mean():.0%} of the picture is blanked though it is not ink. Compare red with blue."
        )
    return "Ink is gone and tissue is not. Green and black ink need rules of their own."


# Notebook 02


@exercise("02.1")
def _megabytes(answer: object) -> str:
    megabytes = number(answer)
    slips = {
        48.8: "A number in float16 has two bytes.",
        20.6: "The patches are missing.",
        28.2: "The coordinates are missing.",
        27.0: "A megabyte has 1,000,000 bytes here.",
    }
    for value, hint in slips.items():
        if abs(megabytes - value) < 0.05:
            raise Wrong(hint)
    if abs(megabytes - 28.32) > 0.1:
        raise Wrong("Add three products: numbers per tile times bytes per number times 10,000 tiles.")
    return "The features are the largest part, and the patches that HDMIL adds are more than a quarter."


@exercise("02.2")
def _shared_neighbors(answer: object) -> str:
    shared = number(answer)
    if shared > 0.99:
        raise Wrong("These are the neighbors of the features compared with themselves. Change the argument.")
    if not 0.08 < shared < 0.9:
        raise Wrong(f"{shared:.0%} is not above the 8 % of chance. Are the rows still the tiles, in order?")
    return f"{shared:.0%} are shared, where chance is 8 %: part of what makes tiles alike is color, not all."


@exercise("02.3")
def _clusters(answer: object) -> str:
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(4), 15)
    points = 20 * rng.normal(size=(4, 30))[truth] + rng.normal(size=(60, 30))
    found = np.asarray(call(answer, points.astype(np.float32), 4))
    if found.shape != truth.shape:
        raise Wrong(f"The result has shape {found.shape}; there is to be one number per tile, {truth.shape}.")
    if len(set(found.tolist())) != 4:
        raise Wrong(f"There are {len(set(found.tolist()))} clusters on data with four, where k is 4.")
    if len(set(zip(truth.tolist(), found.tolist(), strict=True))) != 4:
        raise Wrong("Four groups that lie far apart are mixed. Is each tile given to the nearest center?")
    return "Four groups that lie far apart are told apart. Compare the share of neighbors with chance."


# Notebook 03


@exercise("03.1")
def _who_gains(answer: object) -> str:
    choose(
        answer,
        "mean",
        ("max", "mean", "attention"),
        "In the figure on dilution, find 0.5 to 10 % and then 20 to 70 %. Whose curve rises most in between?",
    )
    return "A class that fills much of the slide moves the mean. The maximum never lacked a tile of tumor."


@exercise("03.2")
def _interval_of_luck(answer: Sequence[float], *, labels: Sequence[int]) -> str:
    low, high = (float(limit) for limit in answer)
    y = np.asarray(labels)
    n_1, n = int(y.sum()), len(y)
    half = 1.96 * np.sqrt((n + 1) / (12 * n_1 * (n - n_1)))  # the rank sum's variance without ties
    if not low < 0.5 < high or abs((low + high) / 2 - 0.5) > half / 3:
        raise Wrong(
            f"Luck knows no direction, so the interval lies about 0.5; yours is {low:.2f} to {high:.2f}. Are "
            "the labels shuffled anew in each round?"
        )
    if not 0.75 < (high - low) / (2 * half) < 1.25:
        wide = "wide" if high - low > 2 * half else "narrow"
        raise Wrong(f"The interval is too {wide}. Take the quantiles 0.025 and 0.975 of the shuffled AUCs.")
    return f"With {n} slides, an AUC between {low:.2f} and {high:.2f} could be luck."


@exercise("03.3")
def _top_k_pooling(answer: object) -> str:
    import torch

    logits = 3 * torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    order = sorted(range(40), key=lambda j: -float(logits[j, 1] - logits[j, 0]))
    for k in (1, 5, 40):
        mine = torch.as_tensor(call(answer, logits, k))
        if mine.shape != (2,):
            raise Wrong(f"The result has shape {tuple(mine.shape)}; a bag has one logit per class, (2,).")
        if not torch.allclose(mine, logits[order[:k]].mean(0), atol=1e-4):
            raise Wrong(
                f"For k = {k} the result is another. Which tiles have the highest probability of tumor? It "
                "depends on both logits."
            )
    return "It equals max pooling for k = 1 and mean pooling for k = N, and it is right in between."


# Notebook 04


@exercise("04.1")
def _temperature(answer: Mapping[float, str]) -> str:
    hints = {
        0.5: "For gamma = 0.5, where does the noise have to lie for the sigmoid to exceed one half?",
        0.7: "For gamma = 0.7, the score has to exceed tau times the logit of gamma. What does tau do to it?",
    }
    for gamma, right in ((0.5, "stays"), (0.7, "falls")):
        if gamma not in answer:
            raise Wrong(f"There is no answer for gamma = {gamma}.")
        choose(answer[gamma], right, ("rises", "falls", "stays"), hints[gamma])
    return "The chance is sigma(a - tau logit gamma), and the logit of one half is zero."


@exercise("04.2")
def _fewer_tiles(answer: Mapping[str, float]) -> str:
    noisy, quiet = number(answer.get("with noise")), number(answer.get("without"))
    if abs(noisy - 0.2) > 0.12:
        raise Wrong(f"With noise this model keeps {noisy:.0%}. Was it trained with `keep_ratio=0.2`?")
    if abs(noisy - quiet) < 1e-6:
        raise Wrong("Both shares are the same number. The second one is measured without noise.")
    return f"Training holds {noisy:.0%}, close to its target; inference keeps {quiet:.0%}."


@exercise("04.3")
def _top_k_mask(answer: object) -> str:
    import torch

    attention = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask = call(answer, attention, 0.3)
    if tuple(mask.shape) != (50, 2):
        raise Wrong(
            f"The mask has shape {tuple(mask.shape)}; it has one row per tile and one column per class."
        )
    hard = mask.detach().round()
    if (mask.detach() - hard).abs().max() > 1e-5 or not set(hard.unique().tolist()) <= {0.0, 1.0}:
        raise Wrong("Forward, the mask has values that are neither 0 nor 1.")
    if (kept := int(hard.amax(1).sum())) != 15:
        raise Wrong(f"It keeps {kept} of 50 tiles; a share of 0.3 is 15 tiles.")
    best = attention.detach().amax(1)
    if best[hard.amax(1) == 0].max() > best[hard.amax(1) == 1].min():
        raise Wrong("A tile was dropped whose highest score exceeds that of a kept one.")
    if not torch.equal(hard[hard.amax(1) == 1].argmax(1), attention.detach()[hard.amax(1) == 1].argmax(1)):
        raise Wrong("A tile is kept in another branch than the one in which it scores highest.")
    if not mask.requires_grad:
        raise Wrong("The mask has no gradient. Add a smooth function and subtract a copy that is detached.")
    (slope,) = torch.autograd.grad(mask.sum(), attention)
    soft = attention.detach().sigmoid()
    if not torch.allclose(slope, soft * (1 - soft), atol=1e-4):
        raise Wrong("The gradient is not that of sigmoid(attention), for kept and dropped tiles alike.")
    return "The budget holds exactly, with noise and without, and the mask can be trained."
