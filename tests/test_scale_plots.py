"""What the figures about many workers say; their looks were checked by eye."""

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest

from hdmil_lib.viz.scale import saturation, worker_timeline

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    plt.close("all")


def test_each_process_has_a_row_with_its_slides():
    done = pd.DataFrame({"pid": [7, 9, 7], "begin": [0.0, 0.5, 2.0], "end": [2.0, 1.5, 3.0]})
    ax = worker_timeline(done.assign(lost=[None, True, None]), killed=1.5)
    assert [bool(bar.get_hatch()) for bar in ax.patches] == [False, False, True]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["process 7", "process 9"]
    assert [(bar.get_x(), bar.get_width()) for bar in ax.patches] == [(0, 2), (2, 1), (0.5, 1)]
    assert [text.get_text() for text in ax.texts] == ["SIGKILL"]


def test_wide_bars_and_lost_slides_have_their_names():
    done = pd.DataFrame({"pid": [7, 9, 7], "begin": [0.0, 0.5, 90.0], "end": [90.0, 1.5, 100.0]})
    ax = worker_timeline(done.assign(lost=[False, True, False], slide_id=["a$", "b", "c"]))
    assert [text.get_text().strip() for text in ax.texts] == [r"a\$", "b lost", "c"]
    ax = worker_timeline(done.assign(slide_id=["a", "b", "c"]))
    assert [text.get_text() for text in ax.texts] == ["a", "c"], "a narrow bar has no place for a name"


def test_the_lines_rise_with_the_cores_until_a_network_is_full():
    ax = saturation({"small": 10.0, "large": 1.0}, {"1 Gbit/s": 125.0}, most=100)
    rising, level, crossing, large = ax.lines[:4]
    assert (rising.get_ydata()[-1], large.get_ydata()[-1]) == (1000, 100)
    assert level.get_xydata().tolist() == [[12.5, 125], [100, 125]]
    assert crossing.get_xydata().tolist() == [[12.5, 125]]
    assert [text.get_text() for text in ax.texts] == ["12", "1 Gbit/s"], "100 slow cores do not fill it"
    assert "MB/s" in ax.get_ylabel()
