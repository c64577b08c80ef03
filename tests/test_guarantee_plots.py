"""What the figures of anytime prediction and of its guarantee say. Their looks were checked by eye."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from model_factory import made_up

from hdmil_lib.inference.risk import control_risk
from hdmil_lib.viz.guarantee import anytime_curves, risk_curve
from hdmil_lib.viz.style import ORANGE, use_style

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def style():
    with plt.rc_context():
        use_style()
        yield
    plt.close("all")


def ends(ax):
    """Places of the single marks."""
    return [tuple(line.get_xydata()[0]) for line in ax.lines if len(line.get_xdata()) == 1]


def test_anytime_curves_mark_where_reading_stops():
    grown = [made_up(0.6, 0.9, 0.95, 0.99), made_up(0.4, 0.45, 0.4, 0.2)]
    ax = anytime_curves(grown, [1, 0], margin=4)
    np.testing.assert_allclose(ends(ax), [(0.5, np.log(9)), (1.0, np.log(1 / 4))])
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["true class: normal", "true class: tumor"]
    bounds = [line.get_ydata().tolist() for line in ax.lines if line.get_linestyle() == ":"]
    assert bounds == [[-4, 0], [4, 0]]


def test_risk_curve_marks_the_rule_that_was_chosen():
    errors = np.array([0, 0, 30])
    losses = np.arange(100)[:, None] < errors
    ax = risk_curve(control_risk(losses, [1.0, 0.4, 0.1], epsilon=0.05))
    marks = [line for line in ax.lines if line.get_markeredgecolor() == ORANGE and len(line.get_xdata())]
    assert [tuple(line.get_xydata()[0]) for line in marks] == [(0.4, 0.0)]
    assert ax.get_xlim()[0] > ax.get_xlim()[1]
    assert [text.get_text().strip() for text in ax.texts] == ["allowed: ε = 0.05", "chosen: reads 40%"]
    certified, refused = (bars.get_segments() for bars in ax.collections)
    assert [bar[0].tolist() for bar in certified] == [[1.0, 0.0], [0.4, 0.0]]
    assert [bar[0].tolist() for bar in refused] == [[0.1, 0.3]]


def test_risk_curve_without_a_certified_rule_marks_none():
    ax = risk_curve(control_risk(np.zeros((10, 2)), [1.0, 0.4], epsilon=0.05))
    assert not [line for line in ax.lines if line.get_markeredgecolor() == ORANGE and len(line.get_xdata())]
