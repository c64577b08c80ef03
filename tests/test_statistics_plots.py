"""What the figures of the statistics say: places, labels, marks. Their looks were checked by eye."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from hdmil_lib.viz.scores import (
    SOURCES,
    auc_intervals,
    chance_plot,
    difference_intervals,
    reliability_plot,
    score_against_keep_ratio,
    scores_by_fold,
)
from hdmil_lib.viz.style import use_style

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def style():
    with plt.rc_context():
        use_style()
        yield
    plt.close("all")


def predictions(methods=("hdmil", "max")):
    """Forty slides with probabilities of 0.2 and 0.8, and labels that agree with them exactly."""
    label = np.concatenate([np.arange(20) < 4, np.arange(20) < 16]).astype(int)
    p = np.repeat([0.2, 0.8], 20)
    columns = {"fold": 0, "label": label, "p_0": 1 - p, "p_1": p, "slide_id": [f"s{i}" for i in range(40)]}
    return pd.concat([pd.DataFrame({"method": name, **columns}) for name in methods])


def scores():
    return pd.DataFrame(
        {
            "pooled_auc": [0.7, 0.9, 0.95],
            "pooled_low": [0.6, 0.85, 0.9],
            "pooled_high": [0.8, 0.94, 0.98],
            "difference": [-0.2, np.nan, 0.05],
            "difference_low": [-0.3, np.nan, -0.01],
            "difference_high": [-0.1, np.nan, 0.11],
            "p_holm": [0.0004, np.nan, 0.2],
        },
        index=pd.Index(["max", "hdmil", "hdmil_dagger"], name="method"),
    )


def ratios(sources=tuple(SOURCES)):
    rows = [
        {"source": source, "keep_ratio": ratio, "fold": fold, "auc": 0.8 + 0.1 * ratio + 0.02 * fold}
        for source in sources
        for ratio in (1, 0.6, 0.3, 0.1, 0.05)
        for fold in (0, 1)
    ]
    return pd.DataFrame(rows)


DRAW = {
    "reliability": lambda ax: reliability_plot(predictions(), ax),
    "intervals": lambda ax: auc_intervals(scores(), ax),
    "differences": lambda ax: difference_intervals(scores(), ax),
    "chance": lambda ax: chance_plot(np.linspace(0.4, 0.6, 50), 0.55, ax),
    "ratios": lambda ax: score_against_keep_ratio(ratios(), ax),
}


@pytest.mark.parametrize("name", DRAW)
def test_draws_on_the_axes_it_is_given_and_labels_them(name):
    figure, (left, right) = plt.subplots(1, 2)
    assert DRAW[name](right) is right
    figure.canvas.draw()
    assert not left.has_data()
    assert plt.get_fignums() == [figure.number]
    assert right.get_xlabel()
    assert right.get_ylabel() or name in ("intervals", "differences")
    assert DRAW[name](None).figure is not figure


def test_calibrated_probabilities_lie_on_the_diagonal():
    ax = reliability_plot(predictions(), bins=2)
    x, y = ax.lines[1].get_data()
    assert x == pytest.approx([0.2, 0.8])
    assert y == pytest.approx(x)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["HDMIL: ECE 0.0 %", "Max-Pooling: ECE 0.0 %"]
    low, high = ax.collections[0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0.0807, 0.4160), abs=1e-4), "Wilson's interval of 4 in 20"


def test_reliability_names_the_class_and_has_the_colors_of_the_methods():
    ax = reliability_plot(predictions(["hdmil_dagger", "hdmil", "max"]), classes=("benign", "$malignant"))
    assert ax.get_ylabel() == r"share of slides with \$malignant"
    dagger, lipn, other = (line.get_color() for line in ax.lines[1:])
    assert (dagger, lipn) == (SOURCES["DMIN attention"]["color"], SOURCES["LIPN"]["color"])
    assert other not in (dagger, lipn, SOURCES["ground truth"]["color"])


def test_reliability_of_three_classes_is_of_the_predicted_class():
    table = predictions().assign(p_2=0.0)
    table.loc[table.index % 7 == 0, "label"] = 2
    assert "predicted" in reliability_plot(table).get_ylabel()


def test_intervals_are_ordered_and_marked():
    ax = auc_intervals(scores())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["HDMIL†", "HDMIL", "Max-Pooling"]
    assert [text.get_text() for text in ax.texts] == ["0.200", "reference", "<0.001 *", "p (Holm)"]
    reference, dagger, hdmil, worst = ax.lines
    assert reference.get_xdata()[0] == hdmil.get_xdata()[0] == 0.9
    assert dagger.get_markerfacecolor() == "white"
    assert worst.get_markerfacecolor() == worst.get_color()
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the best is on top"


def test_intervals_need_the_reference():
    with pytest.raises(ValueError, match="reference 'abmil' is not in the table; choose from max"):
        auc_intervals(scores(), reference="abmil")


def test_differences_are_in_points_ordered_and_marked():
    ax = difference_intervals(scores())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["HDMIL†", "Max-Pooling"]
    assert [text.get_text() for text in ax.texts] == ["0.200", "<0.001 *", "p (Holm)"]
    _, dagger, worst = ax.lines
    assert (dagger.get_xdata()[0], worst.get_xdata()[0]) == pytest.approx((5, -20))
    assert dagger.get_markerfacecolor() == "white"
    assert worst.get_markerfacecolor() == worst.get_color()
    assert ax.collections[0].get_segments()[0][:, 0] == pytest.approx([-1, 11])
    with pytest.raises(ValueError, match="reference 'abmil' is not in the table"):
        difference_intervals(scores(), reference="abmil")


def test_scores_stand_in_their_fold_and_class():
    table = predictions(["hdmil"])
    other = table.assign(fold=1, p_0=table["p_1"], p_1=table["p_0"])
    ax = scores_by_fold(pd.concat([table, other]))
    assert [text.get_text() for text in ax.texts] == ["AUC 0.80", "AUC 0.20"]
    normal, tumor = ax.lines[:2]
    assert (len(normal.get_xdata()), len(tumor.get_xdata())) == (20, 20)
    assert normal.get_xdata().max() < 0 < tumor.get_xdata().min()
    assert sorted(set(tumor.get_ydata())) == [0.2, 0.8]


def test_chance_shades_the_central_samples():
    ax = chance_plot(np.linspace(0, 1, 1001), 0.99)
    assert ax.patches[-1].get_x() == pytest.approx(0.025)
    assert ax.patches[-1].get_width() == pytest.approx(0.95)
    assert ax.lines[0].get_xdata()[0] == 0.99


def test_ratios_run_from_all_tiles_down():
    ax = score_against_keep_ratio(ratios())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(SOURCES)
    ax.figure.canvas.draw()
    shown = {label.get_text() for label in ax.get_xticklabels()}
    assert shown == {"5 %", "10 %", "30 %", "60 %", "100 %"}
    assert ax.get_xlim()[0] > 1 > ax.get_xlim()[1]
    assert ax.get_xscale() == "log"
    assert ax.lines[0].get_ydata()[-1] == pytest.approx(0.91)
    bars = [collection.get_segments() for collection in ax.collections]
    assert np.ptp(bars[0][-1][:, 1]) == pytest.approx(0.02 * np.sqrt(2))
    assert [len(own) for own in bars] == [5] + [4] * (len(SOURCES) - 1), "all tiles have one bar"
    assert len({own[0][0, 0] for own in bars}) == len(SOURCES), "no bar hides another"


def test_ratios_without_folds_or_sources():
    ax = score_against_keep_ratio(ratios(["LIPN"]).query("fold == 0"))
    assert len(ax.lines) == 1
    with pytest.raises(ValueError, match="there is no oracle; choose from ground truth"):
        score_against_keep_ratio(ratios(["oracle"]))
    with pytest.raises(ValueError, match="keep_ratio: give shares"):
        score_against_keep_ratio(ratios().assign(keep_ratio=0.0))
