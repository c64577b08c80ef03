"""The checks of the exercises accept right answers, and say what is wrong with the usual wrong ones."""

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.polynomial import chebyshev

from hdmil_lib.course import check, exercises
from hdmil_lib.course.puzzles import PUZZLES
from hdmil_lib.errors import HDMILError
from hdmil_lib.inference.anytime import Trajectory


def top_k_pooling(logits, k):
    return logits[logits.softmax(1)[:, 1].topk(k).indices].mean(0)


def top_k_mask(attention, ratio):
    chosen = attention.amax(1).topk(round(ratio * len(attention))).indices
    hard = torch.zeros_like(attention)
    hard[chosen, attention[chosen].argmax(1)] = 1
    return hard + attention.sigmoid() - attention.sigmoid().detach()


def without_pen(thumbnail):
    red, _, blue = np.moveaxis(thumbnail.astype(int), -1, 0)
    return np.where((blue - red > 60)[..., None], np.uint8(255), thumbnail)


def clusters(features, k):
    from sklearn.cluster import KMeans

    return KMeans(k, n_init=10, random_state=0).fit_predict(features)


def clenshaw(x, coefficients):
    return torch.from_numpy(chebyshev.chebval(x.numpy(), coefficients.numpy()))


def color_scores(patches):
    pixels = patches.reshape(len(patches), -1, 3) / 255
    return pixels.mean(1).sum(1) + pixels.std(1).sum(1)


class Product(torch.nn.Module):
    """The product of two numbers, blurred by a share of noise."""

    def __init__(self, noise):
        super().__init__()
        self.noise = torch.nn.Parameter(torch.tensor(noise, dtype=torch.float64))

    def forward(self, x):
        return (x.prod(1) + self.noise * x.prod(1).std() * torch.sin(1000 * x[:, 0]) * 2**0.5)[:, None]


def trajectory(*log_odds):
    """One slide, of which each number is the log odds after one more of equal blocks."""
    p = 1 / (1 + np.exp(-np.array(log_odds)))
    return Trajectory(10 * np.arange(1, len(p) + 1), np.stack([1 - p, p], 1))


GROWN = {"trajectories": [trajectory(-5, -5, -5, -5), trajectory(3, 1, -1, -2)]}
SCORES = {"s": np.random.default_rng(0).normal(size=(20, 2))}


def careful(probabilities, share_read):
    return probabilities[-1].max() > 0.99


def folds(n=40):
    """Two folds, of which the second has probabilities that are 0.2 higher."""
    label = np.resize([0, 1], n)
    fold = np.repeat([0, 1], n // 2)
    p = 0.3 + 0.2 * label + 0.2 * fold + np.linspace(0, 0.05, n)
    return pd.DataFrame({"fold": fold, "label": label, "p_1": p})


FOLDS = {"predictions": folds()}


def disagreement(first, second, cases, n_draws=1000):
    table = (
        pd.DataFrame({"differ": first != second, "case": cases})
        .groupby("case")["differ"]
        .agg(["sum", "size"])
    )
    drawn = np.random.default_rng(0).integers(len(table), size=(n_draws, len(table)))
    differ, slides = table.to_numpy()[drawn].sum(1).T
    return (first != second).mean(), *np.quantile(differ / slides, (0.025, 0.975))


def by_slide(first, second, cases):
    return disagreement(first, second, np.arange(len(cases)))


HEADS = {
    "means": {
        "K = 3, linear start": 0.9,
        "K = 3, random start": 0.905,
        "K = 12, linear start": 0.87,
        "K = 12, random start": 0.805,
    }
}
LABELS = [0] * 18 + [1] * 19
STEPS = [[0.2, 0.8], [0.1, 0.9]]
BLOCKS = {"kept": 20, "block": 16, "probabilities": np.array([0.1, 0.9])}


def odd_slides(report):
    odd = (report.status == "failed") | (report.note.fillna("") != "") | (report.n_broken > 0)
    return report.slide_id[odd | (report.n_tiles < 10)].tolist()


RIGHT = [
    ("00.1", "about the same", {}),
    ("00.2", 0.3, {}),
    ("00.3", STEPS, BLOCKS),
    ("01.1", 25_134, {}),
    ("01.2", (0.95, 0.01), {}),
    ("01.3", without_pen, {}),
    ("02.1", 28.32, {}),
    ("02.2", 0.38, {}),
    ("02.3", clusters, {}),
    ("03.1", "mean", {}),
    ("03.2", (0.31, 0.68), {"labels": LABELS}),
    ("03.3", top_k_pooling, {}),
    ("04.1", {0.5: "stays", 0.7: "falls"}, {}),
    ("04.2", {"with noise": 0.18, "without": 0.12}, {}),
    ("04.3", top_k_mask, {}),
    ("05.1", {"left of zero": "whatever their polynomial happens to be", "matters for DMIN": "no"}, {}),
    ("05.2", Product(0.1), {}),
    ("05.3", clenshaw, {}),
    ("05.4", (-3, -7), HEADS),
    ("06.1", "nothing", {}),
    ("06.2", {"s": 3 * SCORES["s"][:, 1] + 1}, {"scores": SCORES}),
    ("06.3", color_scores, {}),
    ("07.1", "grow", {}),
    ("07.2", (4.5, 0.625), GROWN),
    ("07.3", careful, GROWN),
    ("07.4", "random tiles", {}),
    ("08.1", 0.75, {}),
    ("08.2", {0: 0.6, 1: 0.4}, FOLDS),
    ("08.3", disagreement, {}),
    ("08.4", {"A": "not shown", "B": "not shown", "C": "too sure", "D": "not shown"}, {}),
    ("09.1", 512, {}),
    ("10.1", 125, {}),
    ("10.2", "largest first", {}),
    ("10.3", lambda seconds, count: max(seconds[k::count].sum() for k in range(count)), {}),
    ("11.1", "four times as many", {}),
    ("11.2", 9, {}),
    ("11.3", odd_slides, {}),
]

WRONG = [
    ("00.1", "fewer", {}, "which of them keeps"),
    ("00.1", "less", {}, "none of the options: more, fewer"),
    ("00.2", 0.67, {}, "keeps 67%"),
    ("00.2", 0.1, {}, "only 10%"),
    ("00.3", STEPS[:1], BLOCKS, "give 2"),
    ("00.3", [[0.2, 0.8], [0.3, 0.7]], BLOCKS, "that of HDMIL"),
    ("00.3", [[0.2, 0.9], [0.1, 0.9]], BLOCKS, "sum to one"),
    ("01.1", 100, {}, "order of magnitude"),
    ("01.1", 25_276, {}, "over an edge"),
    ("01.1", "many", {}, "to be a number"),
    ("01.2", (0.34, 0.0), {}, "finds 34%"),
    ("01.2", (1.0, 0.9), {}, "adds 90%"),
    ("01.3", lambda picture: picture, {}, "still there"),
    ("01.3", lambda picture: np.full_like(picture, 255), {}, "not ink"),
    ("01.3", lambda picture: picture / 255, {}, "float64"),
    ("02.1", 48.8, {}, "two bytes"),
    ("02.1", float("nan"), {}, "finite"),
    ("02.2", 1.0, {}, "Change the argument"),
    ("02.3", lambda features, k: np.zeros(len(features), int), {}, "1 clusters"),
    ("02.3", lambda features, k: np.arange(len(features)) % k, {}, "mixed"),
    ("03.1", "max", {}, "figure on dilution"),
    ("03.2", (0.6, 0.9), {"labels": LABELS}, "about 0.5"),
    ("03.2", (0.45, 0.55), {"labels": LABELS}, "narrow"),
    ("03.3", lambda logits, k: logits[logits[:, 1].topk(k).indices].mean(0), {}, "both logits"),
    ("03.3", lambda logits, k: logits.mean(), {}, r"shape \(\)"),
    ("03.3", lambda logits, k: logits.undefined, {}, "raised AttributeError"),
    ("03.3", lambda logits, k: None, {}, "returns None"),
    ("03.3", 3, {}, "the function itself"),
    ("04.1", {0.5: "stays", 0.7: "stays"}, {}, "gamma = 0.7"),
    ("04.1", {0.5: "stays"}, {}, "no answer for gamma = 0.7"),
    ("04.2", {"with noise": 0.61, "without": 0.39}, {}, "keep_ratio=0.2"),
    ("04.3", lambda a, ratio: top_k_mask(a, 0.5), {}, "keeps 25 of 50"),
    ("04.3", lambda a, ratio: top_k_mask(a, ratio).detach(), {}, "no gradient"),
    ("04.3", lambda a, ratio: top_k_mask(-a, ratio), {}, "dropped whose highest"),
    ("04.3", lambda a, ratio: a.sigmoid(), {}, "neither 0 nor 1"),
    ("05.1", {"left of zero": "mirrored", "matters for DMIN": "no"}, {}, "even and odd"),
    ("05.1", {"left of zero": "whatever their polynomial happens to be"}, {}, "None is none of the options"),
    ("05.2", Product(0.5), {}, "more steps"),
    ("05.2", Product(2.0), {}, "One layer is a sum"),
    ("05.2", torch.nn.Identity(), {}, r"\(4000, 2\)"),
    ("05.2", "deep", {}, "the function itself"),
    ("05.3", lambda x, c: clenshaw(x, c) + c[0], {}, "degree 0"),
    ("05.3", lambda x, c: clenshaw(x, c)[:1], {}, r"\(1,\)"),
    ("05.4", (-9.5, -7), HEADS, "one thing only"),
    ("05.4", (3, -7), HEADS, "its sign"),
    ("05.4", (-0.03, -7), HEADS, "one point"),
    ("05.4", (-3, -6.5), HEADS, "more is that"),
    ("05.4", (-3, 0), HEADS, "two differences"),
    ("06.1", "some", {}, "gallery"),
    ("06.2", {"s": SCORES["s"][:, 0]}, {"scores": SCORES}, "normal branch"),
    ("06.2", {"s": SCORES["s"].max(1)}, {"scores": SCORES}, "other branch still count"),
    ("06.2", {"s": SCORES["s"]}, {"scores": SCORES}, r"shape \(20, 2\)"),
    ("06.3", lambda patches: patches[:, 0, 0, 0], {}, "shuffled"),
    ("06.3", lambda patches: np.zeros(len(patches)), {}, "same score"),
    ("06.3", lambda patches: color_scores(patches)[:3], {}, r"shape \(3,\)"),
    ("06.3", lambda patches: np.full(len(patches), np.nan), {}, "not finite"),
    ("07.1", "shrink", {}, "far larger"),
    ("07.2", (None, 0.5), GROWN, "both numbers"),
    ("07.2", (0, 0.5), GROWN, "above 0"),
    ("07.2", (3.0, 0.5), GROWN, "1 of 2 labels change"),
    ("07.2", (8.0, 0.6), GROWN, "none changes with 7.5"),
    ("07.2", (4.5, 0.9), GROWN, "margin is right"),
    ("07.3", lambda p, share: True, GROWN, "1 of 2 slides"),
    ("07.3", lambda p, share: False, GROWN, "100% of the tiles"),
    ("07.4", "seconds", {}, "knows nothing"),
    ("08.4", {"A": "real", "B": "not shown", "C": "too sure", "D": "not shown"}, {}, "A: Seven tests"),
    ("08.4", {"A": "not shown", "B": "equal", "C": "too sure", "D": "not shown"}, {}, "B: The interval"),
    ("08.4", {"A": "not shown"}, {}, "no answer for B"),
    ("08.1", 1, {}, "of the second"),
    ("08.1", 0.5, {}, "share of all pairs"),
    ("08.1", 0.6, {}, "four groups"),
    ("08.2", {0: 0.6}, FOLDS, "fold 1"),
    ("08.2", {0: 0.4, 1: 0.4}, FOLDS, "its own slides"),
    ("08.2", {0: 0.9, 1: 0.4}, FOLDS, "higher balanced accuracy"),
    ("08.3", by_slide, {}, "cases drawn, or slides"),
    ("08.3", lambda a, b, cases: ((a == b).mean(), 0, 1), {}, "labels differ"),
    ("08.3", lambda a, b, cases: ((a != b).mean(), 0, 1), {}, "too wide"),
    ("08.3", lambda a, b, cases: ((a != b).mean(), 0.9, 1), {}, "does not contain"),
    ("09.1", 1024, {}, "bytes apart"),
    ("09.1", 128, {}, "whole sectors"),
    ("10.1", 1000, {}, "eight bits"),
    ("10.1", 12, {}, "per second"),
    ("10.2", "smallest first", {}, "last minutes"),
    ("10.3", lambda seconds, count: seconds.sum() / count, {}, "the mean over the shards"),
    ("10.3", lambda seconds, count: seconds.sum(), {}, "every count-th slide"),
    ("11.1", "a quarter", {}, "How wide is the slide"),
    ("11.2", 6, {}, "square by square"),
    ("11.2", 40, {}, "Square.KEPT"),
    ("11.3", lambda report: report.slide_id[report.status == "failed"], {}, "has a note is missing"),
    ("11.3", lambda report: report.slide_id, {}, "need not be looked at"),
]


def test_every_exercise_is_tested():
    assert sorted([number for number, _, _ in RIGHT] + list(PUZZLES)) == exercises()


@pytest.mark.parametrize(("number", "answer", "given"), RIGHT, ids=[case[0] for case in RIGHT])
def test_a_right_answer_is_accepted(number, answer, given):
    verdict = check(number, answer, **given)
    assert verdict.state == "right", verdict
    assert repr(verdict).startswith(f"Exercise {number}, right. ")


@pytest.mark.parametrize(("number", "answer", "given", "hint"), WRONG)
def test_a_wrong_answer_gets_a_hint(number, answer, given, hint):
    verdict = check(number, answer, **given)
    assert verdict.state == "wrong", verdict
    with pytest.raises(AssertionError, match=hint):
        raise AssertionError(verdict.text)


@pytest.mark.parametrize("answer", [None, [], {0.5: None, 0.7: "falls"}])
def test_a_placeholder_is_no_answer(answer):
    assert check("04.1", answer).state == "open"


def test_an_unknown_exercise_is_refused():
    with pytest.raises(HDMILError, match="no exercise '04.9'"):
        check("04.9", 1)
