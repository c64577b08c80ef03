"""The paper's claims, tested on a cross-validation: which hold, which do not, which are within noise."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from hdmil_lib.errors import CohortError
from hdmil_lib.evaluation.auc_tests import Interval, percentiles, resample_weights
from hdmil_lib.evaluation.metrics import mean_sd
from hdmil_lib.evaluation.out_of_fold import OutOfFold, align_methods, case_ids
from hdmil_lib.evaluation.statistics import compare
from hdmil_lib.methods import title


@dataclass(frozen=True)
class _Evidence:
    """The predictions, as a table and aligned by slide, and the options of `judge_claims`."""

    predictions: pd.DataFrame
    slides: OutOfFold
    cases: Mapping[str, str] | None
    margin: float
    level: float
    n_resamples: int
    seed: int

    def difference(self, method: str, reference: str, level: float | None = None) -> Interval:
        value, low, high, _ = compare(
            self.slides,
            method,
            reference,
            level=level or self.level,
            n_resamples=self.n_resamples,
            seed=self.seed,
        )
        return Interval(value, low, high)

    def aucs(self, *methods: str) -> str:
        return ", ".join(f"{title(name)}: AUC {mean_sd(self.slides.fold_aucs(name))}" for name in methods)


@dataclass(frozen=True)
class _Finding:
    """An estimate with its interval, the bound that it must exceed for the claim to hold, and two texts.

    `numbers` gives the scores behind the estimate, `how` says how the claim was judged.
    """

    estimate: Interval
    numbers: str
    how: str
    bound: float = 0.0

    @property
    def outcome(self) -> str:
        if self.estimate.low > self.bound:
            return "holds"
        return "does not hold" if self.estimate.high < self.bound else "within noise"


def _best_of_all(evidence: _Evidence) -> _Finding:
    rivals = [name for name in evidence.slides.probabilities if name != "hdmil_dagger"]
    if not rivals:
        raise CohortError("claim 'best': there is no method beside 'hdmil_dagger'; add the baselines")
    together = 1 - (1 - evidence.level) / len(rivals)
    all_differences = [evidence.difference("hdmil_dagger", name, together) for name in rivals]
    best = max(rivals, key=lambda name: np.mean(evidence.slides.fold_aucs(name)))
    how = (
        f"AUC minus that of the best of {len(rivals)} others, > 0; lowest ends of their intervals, which "
        "hold jointly (Bonferroni)"
    )
    estimate = Interval(*np.min(all_differences, axis=0).tolist())
    return _Finding(estimate, evidence.aucs("hdmil_dagger", best), how)


def _loses_little(evidence: _Evidence) -> _Finding:
    how = f"difference of AUC > -{100 * evidence.margin:g} points (non-inferiority: a gain holds too)"
    pair = ("hdmil", "hdmil_dagger")
    return _Finding(evidence.difference(*pair), evidence.aucs(*pair), how, -evidence.margin)


def _gains(method: str, reference: str) -> Callable[[_Evidence], _Finding]:
    def finding(evidence: _Evidence) -> _Finding:
        numbers = evidence.aucs(method, reference)
        return _Finding(evidence.difference(method, reference), numbers, "difference of AUC > 0")

    return finding


def _keeps_tumor(evidence: _Evidence) -> _Finding:
    """Recall of tumor tiles minus the share of tiles kept, which is the recall of random tiles."""
    table = evidence.predictions[evidence.predictions["method"] == "hdmil"]
    if "tumor_recall" not in table or table["tumor_recall"].isna().all():
        raise CohortError(
            "claim 'keeps_tumor': 'hdmil' has no tumor_recall on any slide; add it with add_mask_scores"
        )
    table = table.dropna(subset="tumor_recall").reset_index(drop=True)
    gain = (table["tumor_recall"] - table["keep_ratio"]).to_numpy()
    folds = table["fold"].to_numpy()
    weights = resample_weights(
        np.zeros(len(table), int), folds, case_ids(table, evidence.cases), evidence.n_resamples, evidence.seed
    )
    parts = [folds == fold for fold in np.unique(folds)]
    drawn = np.mean([weights[:, part] @ gain[part] / weights[:, part].sum(1) for part in parts], axis=0)
    value = float(np.mean([gain[part].mean() for part in parts]))
    means = 100 * table.groupby("fold")[["tumor_recall", "keep_ratio"]].mean().mean()
    numbers = f"tumor tiles kept {means['tumor_recall']:.2f}, all tiles kept {means['keep_ratio']:.2f}"
    how = f"share of tumor tiles kept minus that of random tiles, > 0; {len(table)} slides with tumor"
    return _Finding(Interval(value, *percentiles(drawn, evidence.level)), numbers, how)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: its text, the methods that it is about, and how it is judged."""

    text: str
    methods: tuple[str, ...]
    judge: Callable[[_Evidence], _Finding]


CLAIMS: dict[str, Claim] = {
    "best": Claim("HDMIL† is the best of all", ("hdmil_dagger",), _best_of_all),
    "loses_little": Claim(
        "HDMIL loses no more than the margin to HDMIL†", ("hdmil", "hdmil_dagger"), _loses_little
    ),
    "cka": Claim(
        "The Chebyshev-KAN classifier beats a linear head",
        ("dmin_no_distillation", "dmin_linear"),
        _gains("dmin_no_distillation", "dmin_linear"),
    ),
    "distillation": Claim(
        "Self-distillation helps",
        ("hdmil_dagger", "dmin_no_distillation"),
        _gains("hdmil_dagger", "dmin_no_distillation"),
    ),
    "keeps_tumor": Claim("LIPN keeps what matters", ("hdmil",), _keeps_tumor),
}
"""Claims by short name: of Tables 1 and 3, and the premise of pre-screening (sections 3.2 to 3.4)."""


def judge_claims(
    predictions: pd.DataFrame,
    claims: Sequence[str] = tuple(CLAIMS),
    *,
    cases: Mapping[str, str] | None = None,
    margin: float = 0.01,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Judge the paper's claims by means over folds and their confidence intervals over test slides.

    Every claim is that some quantity exceeds a bound. It "holds" if the interval of the quantity lies above
    the bound, "does not hold" if it lies below, and is "within noise" if the interval contains the bound.

    Args:
        predictions: Predictions of `cross_validate`; "keeps_tumor" needs `add_mask_scores`.
        claims: Keys of `CLAIMS`.
        cases: Case by slide_id; see `align_methods`.
        margin: Largest loss of AUC, in [0, 1], that HDMIL may have against HDMIL†.
        level: Confidence level.
        n_resamples: Number of bootstrap samples, where the bootstrap is needed; see `compare`.
        seed: Seed of the bootstrap.

    Returns:
        Indexed by claim: `outcome`; `holds`, whether the estimate is above the bound, whatever its interval;
        `difference`, `low`, `high` and `bound` in percentage points; `numbers`, the scores as text;
        `judged by`, the quantity and its bound in words.

    Raises:
        ValueError: A claim is unknown.
        CohortError: The methods or mask scores of a claim are missing, or `align_methods` rejects the
            predictions.
    """
    if unknown := [name for name in claims if name not in CLAIMS]:
        raise ValueError(f"claims: there is no {', '.join(unknown)}; choose from {', '.join(CLAIMS)}")
    evidence = _Evidence(
        predictions, align_methods(predictions, cases), cases, margin, level, n_resamples, seed
    )
    rows = {}
    for name in claims:
        claim = CLAIMS[name]
        if missing := [m for m in claim.methods if m not in evidence.slides.probabilities]:
            raise CohortError(
                f"claim '{name}' needs method {', '.join(missing)}, which has no predictions; run it, or "
                "leave the claim out"
            )
        finding = claim.judge(evidence)
        points = {part: 100 * end for part, end in zip(Interval._fields, finding.estimate, strict=True)}
        rows[claim.text] = {
            "outcome": finding.outcome,
            "holds": finding.estimate.value > finding.bound,
            "difference": points.pop("value"),
            **points,
            "bound": 100 * finding.bound,
            "numbers": finding.numbers,
            "judged by": finding.how,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("claim")
