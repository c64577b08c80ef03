"""The checks of the exercises accept right answers, and say what is wrong with the usual wrong ones."""

import numpy as np
import pytest
import torch

from hdmil_lib.course import check, exercises
from hdmil_lib.errors import HDMILError


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


LABELS = [0] * 18 + [1] * 19
STEPS = [[0.2, 0.8], [0.1, 0.9]]
BLOCKS = {"kept": 20, "block": 16, "probabilities": np.array([0.1, 0.9])}

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
    ("10.1", 125, {}),
    ("10.2", "largest first", {}),
    ("10.3", lambda seconds, count: max(seconds[k::count].sum() for k in range(count)), {}),
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
    ("10.1", 1000, {}, "eight bits"),
    ("10.1", 12, {}, "per second"),
    ("10.2", "smallest first", {}, "last minutes"),
    ("10.3", lambda seconds, count: seconds.sum() / count, {}, "the mean over the shards"),
    ("10.3", lambda seconds, count: seconds.sum(), {}, "every count-th slide"),
]


def test_every_exercise_is_tested():
    assert [number for number, _, _ in RIGHT] == exercises()


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
