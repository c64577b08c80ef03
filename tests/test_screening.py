"""AUC against milliseconds, from the committed benchmarks."""

import json
from pathlib import Path

import pytest

from hdmil_lib.reproduce.screening import COARSE, WHOLE, cost_table, costs_of_looks

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def test_a_row_adds_the_look_at_all_tiles_to_the_reading_of_some():
    cost = costs_of_looks(RESULTS)
    table = cost_table(RESULTS).set_index(["source", "keep_ratio"])["milliseconds"]
    assert table["random", 0.1] == pytest.approx(0.1 * cost[WHOLE])
    assert table["LIPN", 0.1] - table["random", 0.1] == pytest.approx(cost[COARSE])
    assert table["look at 2 µm/px", 0.3] - table["LIPN", 0.3] == pytest.approx(cost["2 um/px"])


def test_every_look_is_cheaper_than_the_next_finer_one():
    assert sorted(costs_of_looks(RESULTS).values()) == list(costs_of_looks(RESULTS).values())


@pytest.mark.parametrize(
    "cohort", ["camelyon-mini", "nsclc-mini", "brca-mini", "camelyon-pcam", "nsclc-lc25000"]
)
def test_the_cascade_is_nowhere_worse_than_random_tiles(cohort):
    """At most a standard error below, on test slides, at each share (benchmarks/against_chance.py)."""
    found = json.loads((RESULTS / "against_chance.json").read_text())[cohort]
    assert {*found} == {"0.6", "0.3", "0.1"}
    for part in found.values():
        assert part["lead"] >= -part["standard error"]


def test_promises_are_broken_as_seldom_as_they_may_be():
    """Over 200 repeats the share is known to within 2 standard errors, of 2 points each."""
    found = json.loads((RESULTS / "promise.json").read_text())
    for row in found["epsilon"].values():
        assert row["broken"] <= row["may be broken"] + 0.04
