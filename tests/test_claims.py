"""Claims on cross-validations that were made so that they hold, do not hold, or cannot be told."""

import numpy as np
import pandas as pd
import pytest

from hdmil_lib.errors import CohortError
from hdmil_lib.reproduce.claims import CLAIMS, judge_claims
from hdmil_lib.reproduce.tables import save_table

AS_CLAIMED = {
    "max": 0.4,
    "dmin_linear": 0.8,
    "dmin_no_distillation": 1.7,
    "hdmil": 3.0,
    "hdmil_dagger": 3.0,
    "random": 1.2,
}


def predictions(effects=AS_CLAIMED, recall=0.7, n_slides=200, seed=0):
    """Five folds; a method's scores are the label times its effect, and noise that is partly shared."""
    rng = np.random.default_rng(seed)
    label = np.arange(n_slides) % 2
    shared, own = rng.normal(size=(2, n_slides))
    tables = []
    for method, effect in effects.items():
        noise = own if method.startswith("hdmil") else rng.normal(size=n_slides)
        p = 1 / (1 + np.exp(-(effect * (label - 0.5) + 0.6 * shared + 0.4 * noise)))
        table = pd.DataFrame({"method": method, "fold": np.arange(n_slides) // 2 % 5, "label": label})
        table["slide_id"] = [f"s{i:03d}" for i in range(n_slides)]
        kept = np.clip(recall + 0.2 * rng.normal(size=n_slides), 0, 1)
        table["tumor_recall"] = np.where((label == 1) & (method == "hdmil"), kept, np.nan)
        tables.append(table.assign(p_0=1 - p, p_1=p, keep_ratio=0.3 if method == "hdmil" else 1.0))
    return pd.concat(tables, ignore_index=True)


def outcomes(table, **options):
    judged = judge_claims(table, **options)
    return dict(zip(CLAIMS, judged["outcome"], strict=True)), judged


def test_effects_without_noise_hold():
    found, judged = outcomes(predictions(AS_CLAIMED | {"hdmil": 1.5}), margin=0.2)
    assert found == dict.fromkeys(CLAIMS, "holds")
    assert judged["holds"].all()
    assert (judged["low"] <= judged["difference"]).all()
    assert (judged["difference"] <= judged["high"]).all()


def test_effects_turned_round_do_not_hold():
    turned = {
        "max": 3.0,
        "dmin_linear": 2.6,
        "dmin_no_distillation": 1.6,
        "hdmil": 0.1,
        "hdmil_dagger": 0.8,
    }
    found, judged = outcomes(predictions(turned, recall=0.05))
    assert found == dict.fromkeys(CLAIMS, "does not hold")
    assert not judged["holds"].any()


def test_no_effect_is_within_noise():
    found, _ = outcomes(
        predictions(dict.fromkeys(AS_CLAIMED, 1.0) | {"hdmil": 0.95}, recall=0.3, n_slides=60)
    )
    assert found == dict.fromkeys(CLAIMS, "within noise")


def test_the_same_predictions_lose_nothing_and_are_no_better():
    same = pd.concat(
        [predictions({"hdmil": 1.0}).assign(method=name) for name in ("hdmil", "hdmil_dagger")],
    )
    judged = judge_claims(same, ["best", "loses_little"])
    assert judged["outcome"].tolist() == ["within noise", "holds"]
    assert judged["difference"].tolist() == [0, 0]
    assert judged["bound"].tolist() == [0, -1]


def test_the_best_is_held_against_the_best_of_the_others():
    judged = judge_claims(predictions(), ["best"]).iloc[0]
    assert "HDMIL†: AUC" in judged["numbers"]
    assert ", HDMIL: AUC" in judged["numbers"]
    assert "best of 5 others" in judged["judged by"]
    alone = judge_claims(predictions({"hdmil_dagger": 3.0, "max": 0.4}), ["best"]).iloc[0]
    assert alone["outcome"] == "holds"
    assert "Max-Pooling" in alone["numbers"]


def test_tumor_recall_is_held_against_the_share_of_tiles_kept():
    table = predictions({"hdmil": 1.0})
    judged = judge_claims(table, ["keeps_tumor"]).iloc[0]
    by_fold = table.dropna().groupby("fold")["tumor_recall"].mean()
    assert judged["difference"] == pytest.approx(100 * (by_fold.mean() - 0.3))
    gain = table["tumor_recall"].dropna()
    # 100 slides in five folds of 20: the bootstrap within folds has the variance of the mean
    assert judged["high"] - judged["low"] == pytest.approx(100 * 2 * 1.96 * gain.std() / 10, rel=0.2)
    assert "100 slides with tumor" in judged["judged by"]


def test_claims_can_be_written(tmp_path):
    save_table(judge_claims(predictions()), tmp_path / "claims")
    lines = (tmp_path / "claims.md").read_text().splitlines()
    assert len(lines) == 2 + len(CLAIMS)
    assert {line.count("|") for line in lines} == {10}
    assert len(pd.read_csv(tmp_path / "claims.csv")) == len(CLAIMS)


@pytest.mark.parametrize(
    ("spoil", "claims", "message"),
    [
        (lambda t: t[t["method"] != "dmin_linear"], ["cka"], "claim 'cka' needs method dmin_linear"),
        (lambda t: t.drop(columns="tumor_recall"), ["keeps_tumor"], "no tumor_recall.*add_mask_scores"),
        (lambda t: t.assign(tumor_recall=np.nan), ["keeps_tumor"], "no tumor_recall"),
        (lambda t: t[t["method"] == "hdmil_dagger"], ["best"], "no method beside"),
        (lambda t: t[t["label"] == 1], ["best"], "none of its 20 test slides has class 0"),
    ],
)
def test_what_cannot_be_judged_is_named(spoil, claims, message):
    with pytest.raises(CohortError, match=message):
        judge_claims(spoil(predictions()), claims)


def test_an_unknown_claim_is_named():
    with pytest.raises(ValueError, match="there is no fastest; choose from best, "):
        judge_claims(predictions(), ["fastest"])
