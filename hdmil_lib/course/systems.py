"""Exercises of 05 to 08, 10 and 11: the head, LIPN, fast inference, statistics, clusters, own slides."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hdmil_lib.course.verdicts import Wrong, call, choose, exercise, number

if TYPE_CHECKING:  # an exercise needs trajectories, not the models that made them
    from hdmil_lib.inference.anytime import Trajectory

# Notebook 05


@exercise("05.1")
def _left_half(answer: Mapping[str, str]) -> str:
    options = ("mirrored", "zero", "whatever their polynomial happens to be")
    choose(
        answer.get("left of zero"),
        options[2],
        options,
        "A curve holds even and odd polynomials, and only their sum is trained. What fixes it where no "
        "slide lies?",
    )
    choose(
        answer.get("matters for DMIN"),
        "no",
        ("yes", "no"),
        "Where do the embeddings of new slides lie? They come from the same layer as those of the training.",
    )
    return (
        "Only the right half is trained, and only the right half is used, as long as a ReLU stands before it."
    )


@exercise("05.2")
def _product_of_two(answer: object) -> str:
    import torch

    generator = torch.Generator().manual_seed(7)
    points = 4 * torch.rand(4000, 2, generator=generator, dtype=torch.float64) - 2
    kind = points.dtype
    if isinstance(answer, torch.nn.Module):
        kind = next((parameter.dtype for parameter in answer.parameters()), kind)
    with torch.inference_mode():
        found = torch.as_tensor(call(answer, points.to(kind)))
    if found.shape != (4000, 1):
        raise Wrong(
            f"For 4,000 points the network gives {tuple(found.shape)}; one number per point is (4000, 1)."
        )
    product = points.prod(1)
    error = float((found[:, 0].double() - product).std() / product.std())
    if error > 0.9:
        raise Wrong(
            f"On new points the error is {error:.2f} of the spread of the product, as bad as a constant. One "
            "layer is a sum of curves; is there a second one, and was the network trained?"
        )
    if error > 0.3:
        raise Wrong(f"The error on new points is {error:.2f} of the product's spread. Train for more steps.")
    return f"The error on new points is {error:.2f} of the spread: sums of curves of sums can multiply."


@exercise("05.3")
def _clenshaw(answer: object) -> str:
    import torch
    from numpy.polynomial import chebyshev

    x = torch.linspace(-1, 1, 50, dtype=torch.float64)
    for degree in (0, 1, 2, 12):
        c = torch.randn(degree + 1, generator=torch.Generator().manual_seed(degree), dtype=torch.float64)
        exact = chebyshev.chebval(x.numpy(), c.numpy())
        mine = torch.as_tensor(call(answer, x, c))
        if mine.shape != x.shape:
            raise Wrong(f"For 50 values of x the result has shape {tuple(mine.shape)}; it has to be (50,).")
        if not np.allclose(mine, exact, atol=1e-9):
            raise Wrong(
                f"For degree {degree} the sum is another. What do b_1 and b_2 have to hold before the first "
                "step, and how does c_0 enter the last one?"
            )
    return "It agrees with another implementation for degrees 0 to 12, and it never formed a polynomial."


@exercise("05.4")
def _degree_and_start(answer: Sequence[object], *, means: Mapping[str, float]) -> str:
    degree, interaction = (number(part) for part in answer)
    mean = {
        (k, start): 100 * means[f"K = {k}, {start} start"] for k in (3, 12) for start in ("linear", "random")
    }
    alone = mean[12, "linear"] - mean[3, "linear"]
    both = mean[12, "random"] - mean[3, "linear"]
    start = {k: mean[k, "random"] - mean[k, "linear"] for k in (3, 12)}
    if abs(degree - both) < 0.2:
        raise Wrong("Between these two heads both the degree and the start differ. Change one thing only.")
    if abs(degree + alone) < 0.2:
        raise Wrong("The degree is right but for its sign: take K = 12 minus K = 3.")
    if abs(degree - alone) > 0.2:
        raise Wrong(
            "For the degree alone, compare the two heads with a linear start; 0.01 of AUC is one point."
        )
    if abs(interaction - start[12]) < 0.2:
        raise Wrong("This is what the start changes at K = 12. By how much more is that than at K = 3?")
    if abs(interaction - (start[12] - start[3])) > 0.2:
        raise Wrong(
            "The interaction is a difference of two differences: that of the starts at K = 12, and at K = 3."
        )
    return (
        "A comparison of K = 12 from a random with K = 3 from a linear start would have mixed all three "
        "effects."
    )


# Notebook 06


@exercise("06.1")
def _mean_color(answer: object) -> str:
    choose(
        answer,
        "nothing",
        ("nothing", "some", "most"),
        "Look at tiles of tumor and of its look-alikes in the gallery: which of them could a mean color "
        "tell apart? Exercise 3 measures it.",
    )
    return "A mean color has no texture, and texture is what tells tumor from look-alikes of the same color."


@exercise("06.2")
def _tumor_branch(answer: Mapping[str, Any], *, scores: Mapping[str, Any]) -> str:
    for slide_id, ranking in answer.items():
        both = np.asarray(scores[slide_id], float)
        mine = np.asarray(ranking, float)
        if mine.shape != both[:, 1].shape:
            raise Wrong(f"{slide_id}: the ranking has shape {mine.shape}; it holds one score per tile.")
        order = np.argsort(-mine, kind="stable")
        if np.array_equal(both[order, 1], np.sort(both[:, 1])[::-1]):
            continue
        if np.array_equal(both[order, 0], np.sort(both[:, 0])[::-1]):
            raise Wrong("These are the scores of the normal branch. Which column belongs to which class?")
        raise Wrong("Tiles do not stand in the order of the tumor branch. Does the other branch still count?")
    return "Tiles are ranked by the tumor branch alone. Compare its recall with that of chance, 0.3."


@exercise("06.3")
def _color_scores(answer: object) -> str:
    patches = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    patches = (patches * np.linspace(0.3, 1, 20)[:, None, None, None]).astype(np.uint8)
    scores = np.asarray(call(answer, patches), float)
    if scores.shape != (20,):
        raise Wrong(
            f"For 20 patches the result has shape {scores.shape}; there is one score per tile, (20,)."
        )
    if not np.isfinite(scores).all():
        raise Wrong("Some scores are not finite. Which patches have no spread of color at all?")
    if np.ptp(scores) < 1e-9:
        raise Wrong("All patches get the same score, although their colors differ.")
    pixels = patches.reshape(20, 256, 3)
    shuffled = pixels[:, np.random.default_rng(1).permutation(256)].reshape(patches.shape)
    if not np.allclose(call(answer, shuffled), scores, rtol=1e-3, atol=1e-4):
        raise Wrong(
            "The score changes when the pixels of a patch are shuffled, so it knows more than mean and "
            "spread."
        )
    return "It sees colors and nothing else. Now let it compete with LIPN at a share of 0.3."


# Notebook 07


@exercise("07.1")
def _slower_encoder(answer: object) -> str:
    choose(
        answer,
        "grow",
        ("grow", "shrink", "stay"),
        "The saved share is (1 - r) N t1 / (t0 + N t1). What becomes of it when t1 is far larger than t0?",
    )
    return "It grows towards 1 - r, since the fixed part t0 counts for less and less."


@exercise("07.2")
def _smallest_margin(answer: Sequence[object], *, trajectories: "Sequence[Trajectory]") -> str:
    if any(part is None for part in answer):
        raise Wrong("Give both numbers: the margin, and the share of the tiles that is read with it.")
    margin, share = (number(part) for part in answer)
    if margin <= 0:
        raise Wrong("A margin is above 0: at 0 reading stops after the first block.")
    if changed := _changed(trajectories, [t.stop(margin) for t in trajectories]):
        raise Wrong(f"With a margin of {margin:g}, {changed} of {len(trajectories)} labels change.")
    smaller = margin - 0.5
    if smaller > 0 and not _changed(trajectories, [t.stop(smaller) for t in trajectories]):
        raise Wrong(f"No label changes with {margin:g}, but none changes with {smaller:g} either. Go on.")
    read = _share_read(trajectories, [t.stop(margin) for t in trajectories])
    if abs(share - read) > 0.01:
        raise Wrong(
            f"The margin is right. The share of {share:.0%} is not: divide per slide, and average over the "
            "slides."
        )
    return (
        f"It reads {read:.0%} and changes no label *here*. It was chosen on these slides, so this is no "
        "promise."
    )


@exercise("07.3")
def _stopping_rule(answer: object, *, trajectories: "Sequence[Trajectory]") -> str:
    stops = [_first_stop(answer, t) for t in trajectories]
    read, margin = (
        _share_read(trajectories, stops),
        _share_read(trajectories, [t.stop(8) for t in trajectories]),
    )
    if changed := _changed(trajectories, stops):
        raise Wrong(
            f"It reads {read:.0%} of the tiles, but {changed} of {len(trajectories)} slides get another "
            "label. The more is unread, the surer the answer has to be."
        )
    if read >= margin:
        raise Wrong(
            f"No label changes, but {read:.0%} of the tiles are read; the margin of 8 reads {margin:.0%}."
        )
    return (
        f"It reads {read:.0%} of the tiles where the margin of 8 reads {margin:.0%}, and no label changes. "
        "On how many new slides would you try it before you promise anything?"
    )


@exercise("07.4")
def _what_to_ask(answer: object) -> str:
    choose(
        answer,
        "random tiles",
        ("random tiles", "seconds", "more digits"),
        "At this share, what would a selection score that knows nothing? Look at the table of the answer.",
    )
    return "At 60 % random tiles lose as little. Only beside them does the number say something."


def _first_stop(rule: object, trajectory: "Trajectory") -> int:
    """Block after which the reader's rule stops, at latest the last; it sees no later block."""
    share = trajectory.n_read / trajectory.n_read[-1]
    for block in range(len(share) - 1):
        if call(rule, trajectory.probabilities[: block + 1].copy(), float(share[block])):
            return block
    return len(share) - 1


def _changed(trajectories: "Sequence[Trajectory]", stops: Sequence[int]) -> int:
    """Number of slides whose label where reading stops is not that of all tiles."""
    pairs = zip(trajectories, stops, strict=True)
    return sum(int(t.probabilities[b].argmax() != t.probabilities[-1].argmax()) for t, b in pairs)


def _share_read(trajectories: "Sequence[Trajectory]", stops: Sequence[int]) -> float:
    """Share of the tiles that is read, mean over slides."""
    return float(np.mean([t.n_read[b] / t.n_read[-1] for t, b in zip(trajectories, stops, strict=True)]))


# Notebook 08


@exercise("08.1")
def _two_scales(answer: object) -> str:
    value = number(answer)
    hints = {
        1.0: "Compare a tumor slide of the first fold with a normal slide of the second.",
        0.5: "Within a fold all pairs are right. Which share of all pairs lies within a fold?",
    }
    for wrong, hint in hints.items():
        if abs(value - wrong) < 1e-6:
            raise Wrong(hint)
    if abs(value - 0.75) > 0.005:
        raise Wrong(
            "Draw the four groups on one axis, and count for which of the four kinds of pairs tumor is "
            "higher."
        )
    return (
        "Three of four kinds of pairs are right. Both networks are perfect; the missing quarter is their "
        "scale."
    )


@exercise("08.2")
def _thresholds(answer: Mapping[int, float], *, predictions: pd.DataFrame) -> str:
    for fold in sorted(predictions["fold"].unique()):
        if fold not in answer:
            raise Wrong(f"There is no threshold for fold {fold}.")
        here, others = predictions[predictions["fold"] == fold], predictions[predictions["fold"] != fold]
        if _balanced(others, number(answer[fold])) > _best_balanced(others) - 0.005:
            continue
        if _balanced(here, number(answer[fold])) > _best_balanced(here) - 0.005:
            raise Wrong(
                f"The threshold of fold {fold} is the best one for its own slides, which it must not see."
            )
        raise Wrong(f"For fold {fold}, another threshold has a higher balanced accuracy on the other folds.")
    pairs = zip(predictions["fold"], predictions["p_1"], strict=True)
    called = np.array([p > number(answer[fold]) for fold, p in pairs])
    chosen = float((called == predictions["label"]).mean())
    plain = float(((predictions["p_1"] > 0.5) == predictions["label"]).mean())
    return (
        f"Accuracy is {chosen:.3f} with these thresholds and {plain:.3f} with 0.5. Was it worth the effort?"
    )


def _balanced(rows: pd.DataFrame, threshold: float) -> float:
    called = rows["p_1"] > threshold
    return float(np.mean([(called == c)[rows["label"] == c].mean() for c in (0, 1)]))


def _best_balanced(rows: pd.DataFrame) -> float:
    return max(_balanced(rows, threshold) for threshold in np.linspace(0.05, 0.95, 91))


@exercise("08.3")
def _disagreement(answer: Callable[..., Any]) -> str:
    rng = np.random.default_rng(0)
    cases = np.repeat([f"case {i}" for i in range(40)], 5)
    first = np.repeat(rng.integers(0, 2, 40), 5)
    second = np.where(np.repeat(rng.random(40) < 0.25, 5), 1 - first, first)  # all slides of a case, or none
    exact = float((first != second).mean())
    share, low, high = (number(value) for value in call(answer, first, second, cases))
    if abs(share - exact) > 1e-6:
        raise Wrong(f"On a small example {exact:.1%} of the labels differ, and you find {share:.1%}.")
    expected = 2 * 1.96 * np.sqrt(exact * (1 - exact) / 40)
    if not low <= share <= high:
        raise Wrong(f"The interval, {low:.2f} to {high:.2f}, does not contain the share, {share:.2f}.")
    if high - low < 0.75 * expected:
        raise Wrong(
            f"The interval is too narrow by a factor of {expected / (high - low):.1f}: the example has five "
            "slides per case that agree with each other. Are cases drawn, or slides?"
        )
    if high - low > 1.4 * expected:
        raise Wrong(
            "The interval is too wide. Draw as many cases as there are; take quantiles 0.025 and 0.975."
        )
    if number(call(answer, first, first, cases)[0]) != 0:
        raise Wrong("A method disagrees with itself.")
    return "The interval holds for cases, which is what patients are. With slides it would be half as wide."


@exercise("08.4")
def _four_judgments(answer: Mapping[str, str]) -> str:
    hints = {
        "A": (
            ("real", "not shown"),
            "not shown",
            "Seven tests were made. Which of the two, interval or adjusted p, knows that?",
        ),
        "B": (
            ("equal", "not shown"),
            "not shown",
            "The interval contains zero. Does it contain nothing else?",
        ),
        "C": (
            ("too sure", "not sure enough"),
            "too sure",
            "It says 80 %. How often is it right?",
        ),
        "D": (
            ("shown", "not shown"),
            "not shown",
            "With a true rate of 20 %, how often are there no errors on ten slides?",
        ),
    }
    for letter, (options, right, hint) in hints.items():
        if letter not in answer:
            raise Wrong(f"There is no answer for {letter}.")
        choose(answer[letter], right, options, f"{letter}: {hint}")
    return "Three of four say that something was *not shown*, which is not the same as that it is not so."


# Notebook 10


@exercise("10.1")
def _cores_that_saturate_a_network(answer: object) -> str:
    cores = number(answer)
    if 900 < cores < 1100:
        raise Wrong("The network gives 10 Gbit/s, which is 1.25 GB/s: a byte has eight bits.")
    if not 115 <= cores <= 135:
        raise Wrong(
            "How many MB of slides does one core read per second? How often does that fit in 10 Gbit/s?"
        )
    return "One core reads 10 MB/s, and 125 of them 1.25 GB/s. Beyond that, more cores wait."


@exercise("10.2")
def _order_of_the_slides(answer: object) -> str:
    choose(
        answer,
        "largest first",
        ("largest first", "smallest first", "as they come"),
        "Draw the last minutes of the run: who works, and who has nothing left to take?",
    )
    return "A large slide that begins last runs alone while all other workers have ended."


@exercise("10.3")
def _makespan_of_shards(answer: object) -> str:
    rng = np.random.default_rng(0)
    for n, count in ((40, 16), (5, 1), (3, 4)):
        seconds = rng.lognormal(0, 0.6, n)
        exact = max(seconds[k::count].sum() for k in range(count))
        mine = number(call(answer, seconds, count))
        if np.isclose(mine, seconds.sum() / count) and not np.isclose(mine, exact):
            raise Wrong("That is the mean over the shards. The run ends when the last shard does.")
        if not np.isclose(mine, exact):
            raise Wrong(
                f"For {n} slides in {count} shards the run takes another time. Shard k gets every count-th "
                "slide, from the k-th on."
            )
    return "The slowest shard decides. With locks a worker that is free takes the next slide."


# Notebook 11


@exercise("11.1")
def _tiles_of_a_doubled_scale(answer: object) -> str:
    choose(
        answer,
        "four times as many",
        ("a quarter", "as many", "four times as many"),
        "How wide is the slide in micrometers, if each pixel is said to be twice as wide? How many tiles of "
        "128 um fit?",
    )
    return "The slide is believed to be twice as wide and twice as high."


@exercise("11.2")
def _tiles_of_ink(answer: object) -> str:
    left_out = number(answer)
    if 5 <= left_out <= 7:
        raise Wrong("The preset also keeps squares that the default does not: compare square by square.")
    if not 8 <= left_out <= 10:  # nine; another JPEG library may move one
        raise Wrong("Count the squares that are Square.KEPT by the default and not by the preset.")
    return "These tiles are ink. Encoded, they would look like tissue of a strange kind."


@exercise("11.3")
def _slides_to_look_at(answer: object) -> str:
    report = pd.DataFrame(
        {
            "slide_id": ["good", "gone", "odd", "holes", "tiny", "nine", "ten"],
            "status": ["done", "failed", "done", "done", "done", "skipped", "skipped"],
            "note": ["", None, "two scales", "", None, "", ""],
            "n_broken": [0, 0, 0, 3, 0, 0, 0],
            "n_tiles": [500, 0, 300, 200, 2, 9, 10],
        }
    )
    found = set(call(answer, report))
    reasons = {"gone": "failed", "odd": "has a note", "holes": "has broken tiles", "tiny": "has two tiles"}
    for name, why in (reasons | {"nine": "has nine tiles"}).items():
        if name not in found:
            raise Wrong(f"A slide that {why} is missing.")
    if found & {"good", "ten"}:
        raise Wrong("A whole slide with ten tiles or more and no note need not be looked at.")
    return "Such a list is short, and those are the slides that make a result strange."
