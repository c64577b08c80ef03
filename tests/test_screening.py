"""AUC against milliseconds, from the committed benchmarks."""

from pathlib import Path

import pytest

from hdmil_lib.reproduce.screening import COARSE, WHOLE, cost_table, costs_of_looks

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def test_a_row_adds_the_look_at_all_tiles_to_the_reading_of_some():
    cost = costs_of_looks(RESULTS)
    table = cost_table(RESULTS).set_index(["source", "keep_ratio"])["milliseconds"]
    assert table["random", 0.1] == pytest.approx(0.1 * cost[WHOLE])
    assert table["LIPN", 0.1] - table["random", 0.1] == pytest.approx(cost[COARSE])
    assert table["look at 2 um/px", 0.3] - table["LIPN", 0.3] == pytest.approx(cost["2 um/px"])


def test_every_look_is_cheaper_than_the_next_finer_one():
    assert sorted(costs_of_looks(RESULTS).values()) == list(costs_of_looks(RESULTS).values())
