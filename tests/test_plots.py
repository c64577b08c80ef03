"""What the figures say: labels, places, numbers in titles. Their looks were checked by eye."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cbook import is_math_text
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy.special import expit

from hdmil_lib.bags import Bag
from hdmil_lib.viz import hardware, overlays, plots
from hdmil_lib.viz.guarantee import anytime_curves
from hdmil_lib.viz.pipeline import LIT_EDGE, STEPS
from hdmil_lib.viz.scores import auc_intervals, reliability_plot
from hdmil_lib.viz.style import CYCLE, INK, SOURCES, looks, plain

matplotlib.use("Agg")
ENVIRONMENT = os.environ | {"MPLBACKEND": "agg"}
N_ROWS, N_COLS = 5, 7


@pytest.fixture(autouse=True)
def style():
    with plt.rc_context():
        plots.use_style()
        yield
    plt.close("all")


@pytest.fixture
def grid() -> SimpleNamespace:
    """Tiles on the two first rows of a 5 x 7 grid, over a thumbnail a bit larger than the grid."""
    rowcol = np.argwhere(np.arange(N_ROWS)[:, None] * np.ones(N_COLS) < 2)
    thumbnail = np.full((N_ROWS * 16 + 3, N_COLS * 16 + 9, 3), 230, np.uint8)
    tissue = np.zeros(thumbnail.shape[:2], bool)
    tissue[:32] = True
    shape = (N_ROWS, N_COLS)
    return SimpleNamespace(thumbnail=thumbnail, tissue=tissue, rowcol=rowcol, shape=shape, tile_um=128.0)


def overlay(ax: Axes) -> np.ndarray:
    """The map laid over the thumbnail, (rows, cols, 4)."""
    return np.asarray(ax.get_images()[1].get_array())


def history() -> pd.DataFrame:
    columns = ("epoch", "train_bag", "train_loss", "val_loss", "val_auc", "keep_ratio")
    return pd.DataFrame({name: np.arange(3.0) for name in columns})


CURVES = {
    "pipeline": lambda ax: plots.pipeline("lipn", ax),
    "gumbel": lambda ax: plots.gumbel_sigmoid(0.7, 0.5, ax),
    "chebyshev": lambda ax: plots.chebyshev_polynomials(4, ax),
    "phi": lambda ax: plots.phi(np.eye(4), ax),
    "phi_fit": lambda ax: plots.phi_fit(3, "wave", ax),
    "scores": lambda ax: plots.score_threshold(np.arange(9.0), 3.0, ax=ax),
    "roc": lambda ax: plots.roc([np.array([0, 1])] * 2, [np.array([0.2, 0.9])] * 2, ax),
    "stages": lambda ax: plots.stage_times(pd.DataFrame({"crop": [2.0, 1.0]}, index=["a", "b"]), ax),
    "screening": lambda ax: plots.cost_of_screening(
        pd.DataFrame(
            {"source": ["random", "random", "LIPN"], "milliseconds": [1, 4, 2], "auc": [0.6, 0.9, 0.9]}
        ),
        ax,
    ),
    "keep": lambda ax: plots.keep_ratio_curve(
        pd.DataFrame({"method": ["a", "a"], "keep_ratio": [0.1, 0.5], "auc": [0.7, 0.8]}), ax
    ),
    "methods": lambda ax: plots.method_scores(pd.DataFrame({"method": ["a", "a"], "auc": [0.7, 0.8]}), ax),
    "growth": lambda ax: plots.cost_growth(pd.DataFrame({"a": [1.0, 2.0]}, index=[10, 20]), ax),
    "slide": lambda ax: plots.slide_overview(np.zeros((30, 40, 3), np.uint8), 8.0, ax),
    "gallery": lambda ax: plots.gallery(np.zeros((3, 16, 16, 3), np.uint8), list("abc"), columns=2, ax=ax),
}


@pytest.mark.parametrize("name", CURVES)
def test_draws_on_the_axes_it_is_given_and_returns_them(name):
    figure, (left, right) = plt.subplots(1, 2)
    assert CURVES[name](right) is right
    figure.canvas.draw()
    assert not left.has_data()
    assert plt.get_fignums() == [figure.number], "no second figure is opened"


@pytest.mark.parametrize("name", sorted(set(CURVES) - {"pipeline", "gallery"}))
def test_without_axes_makes_a_labeled_figure(name):
    ax = CURVES[name](None)
    assert ax.get_xlabel()
    assert ax.get_ylabel() or name in ("stages", "methods")


def test_pipeline_highlights_the_step_and_no_other():
    lit = [box for box in plots.pipeline("features").patches if box.get_edgecolor()[:3] == rgb(LIT_EDGE)]
    assert len(lit) == 1
    x, y = STEPS["features"].center
    box = lit[0].get_path().get_extents()
    assert box.x0 < x < box.x1
    assert box.y0 < y < box.y1


def rgb(color: str) -> tuple[float, ...]:
    return matplotlib.colors.to_rgb(color)


def test_pipeline_refuses_an_unknown_step():
    with pytest.raises(ValueError, match="no step.*training.*choose from slide"):
        plots.pipeline("training")


def test_kept_overlay_grays_exactly_the_dropped_tiles(grid):
    kept = np.arange(len(grid.rowcol)) % 3 == 0
    ax = plots.kept_overlay(grid, kept)
    opacity = overlay(ax)[..., 3]
    rows, cols = grid.rowcol.T
    assert ((opacity[rows, cols] > 0) == ~kept).all()
    assert (opacity[2:] == 0).all(), "nothing is laid where no tile lies"
    assert ax.get_title(loc="left") == f"{kept.sum()} of {len(kept)} tiles kept ({kept.mean():.0%})"


def test_overlays_lie_on_the_tissue_they_belong_to(grid):
    ax = plots.kept_overlay(grid, np.zeros(len(grid.rowcol)))
    left, right, bottom, top = ax.get_images()[1].get_extent()
    assert (left, top) == (0, 0)
    assert (right, bottom) == pytest.approx((N_COLS * 0.128, N_ROWS * 0.128)), "128 um per tile, in mm"
    assert ax.get_xlim()[1] == pytest.approx((N_COLS * 16 + 9) * 0.008), "the view is the whole thumbnail"


def test_attention_overlay_leaves_unread_tiles_bare_and_orders_the_rest(grid):
    attention = np.linspace(-3, 40, len(grid.rowcol))
    attention[:4] = np.nan
    colors = overlay(plots.attention_overlay(grid, attention))[tuple(grid.rowcol.T)]
    assert (colors[:4, 3] == 0).all()
    assert (colors[4:, 3] > 0).all()
    colormap = plt.get_cmap("viridis")
    assert colors[-1, :3] == pytest.approx(colormap(1.0)[:3])
    assert colors[4, :3] == pytest.approx(colormap(0.0)[:3])


def test_attention_overlay_takes_a_single_known_tile(grid):
    attention = np.full(len(grid.rowcol), np.nan)
    attention[3] = 2.0
    plots.attention_overlay(grid, attention).figure.canvas.draw()


def test_truth_overlay_counts_tumor_tiles(grid):
    share = np.zeros(len(grid.rowcol))
    share[[0, 5]] = (0.1, 1.0)
    ax = plots.truth_overlay(grid, share)
    opacity = overlay(ax)[..., 3][tuple(grid.rowcol.T)]
    assert (opacity > 0).sum() == 2
    assert opacity[5] > opacity[0]
    assert ax.get_title(loc="left").startswith("tumor in 2 of")


def test_tissue_tiles_frames_every_tile(grid):
    frames = overlay(plots.tissue_tiles(grid))[..., 3]
    assert (frames[:32, 0] > 0).all()
    assert (frames[0] > 0).all()
    assert (frames[33:] == 0).all()


def test_mark_tile_frames_its_tile(grid):
    ax = plots.mark_tile(grid, 9, plots.slide_overview(grid.thumbnail))
    assert ax.patches[-1].get_xy() == pytest.approx((2 * 0.128, 1 * 0.128))


def test_tile_and_patch_show_the_same_field():
    axes = plots.tile_and_patch(np.zeros((256, 256, 3), np.uint8), np.zeros((16, 16, 3), np.uint8))
    assert [ax.get_images()[0].get_extent() for ax in axes] == [[0, 128, 128, 0]] * 2
    assert "0.5 µm" in axes[0].get_title(loc="left")
    assert "8 µm" in axes[1].get_title(loc="left")


@pytest.mark.parametrize(("tau", "gamma"), [(0.7, 0.5), (2.0, 0.2), (0.1, 0.9)])
def test_gumbel_sigmoid_chance_agrees_with_sampled_masks(tau, gamma):
    curve = line(plots.gumbel_sigmoid(tau, gamma), "chance of being kept in training")
    noise = np.random.default_rng(0).gumbel(size=(2, 20_000, 1))
    logits = curve[0][::40]
    kept = expit((logits + noise[0] - noise[1]) / tau) > gamma
    # 4 standard errors of a share of 20,000 draws
    assert kept.mean(0) == pytest.approx(curve[1][::40], abs=4 * 0.5 / np.sqrt(20_000))


def line(ax: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    return next(drawn.get_data() for drawn in ax.lines if drawn.get_label() == label)


def test_chebyshev_polynomials_are_cosines():
    for k, drawn in enumerate(plots.chebyshev_polynomials(6).lines):
        x, y = drawn.get_data()
        assert y == pytest.approx(np.cos(k * np.arccos(x)), abs=1e-9)


def test_phi_draws_one_activation_per_input():
    ax = plots.phi(np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    x, tanh = ax.lines[0].get_data()
    assert tanh == pytest.approx(np.tanh(x))
    assert ax.lines[1].get_ydata() == pytest.approx(1)


def test_phi_fit_improves_with_degree():
    errors = [float(plots.phi_fit(k, "bump").get_title(loc="left").split()[-1]) for k in (1, 4, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 < errors[0]


def test_training_curves_name_the_terms():
    axes = plots.training_curves(history())
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == [
        "training, sum",
        "validation",
        "bag",
    ]
    assert [ax.get_xlabel() for ax in axes] == ["epoch"] * 3


def test_roc_pools_the_folds():
    labels = [np.array([0, 1, 1]), np.array([0, 0, 1])]
    scores = [np.array([0.3, 0.2, 0.9]), np.array([0.1, 0.4, 0.8])]
    texts = [text.get_text() for text in plots.roc(labels, scores).get_legend().get_texts()]
    assert texts == ["one fold", "pooled, AUC 0.778"]  # 7 of 9 pairs in order


def test_stage_times_adds_stages_up_and_names_what_is_saved():
    seconds = pd.DataFrame(
        {"lipn": [np.nan, 0.5], "crop": [6.0, 3.0], "features": [4.0, 2.0]}, ["all", "few"]
    )
    texts = [text.get_text().strip() for text in plots.stage_times(seconds).texts]
    assert texts == ["10.00 s", "5.50 s (−45%)"]


def test_cost_growth_gives_the_slopes():
    tiles = pd.Index([1000, 2000, 8000])
    table = pd.DataFrame({"linear": 0.01 * tiles, "quadratic": 1e-6 * tiles**2}, tiles)
    legend = plots.cost_growth(table).get_legend().get_texts()
    assert [text.get_text() for text in legend] == ["linear, slope 1.00", "quadratic, slope 2.00"]


def test_score_threshold_counts_the_tumor_tiles_kept():
    ax = plots.score_threshold(np.arange(10.0), 6.0, np.array([0.0] * 6 + [0.5, 0, 0, 1]))
    assert ax.get_title(loc="left") == "tumor tiles kept: 100%"
    ax = plots.score_threshold(np.arange(10.0), 6.0, np.zeros(10))
    assert "none" in ax.get_title(loc="left")


def test_score_threshold_draws_shares_of_each_kind():
    share = np.array([0.0] * 8 + [1.0, 1.0])
    ax = plots.score_threshold(np.array([0.0] * 4 + [9.0] * 6), 5.0, share)
    tops = {rgb(s.get_edgecolor()[0]): s.get_paths()[0].vertices[:, 1].max() for s in ax.collections}
    assert tops == {rgb(plots.BLUE): 0.5, rgb(plots.VERMILION): 1.0}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["other tiles", "tumor tiles"]


def test_method_scores_shows_mean_and_folds():
    table = pd.DataFrame({"method": ["b", "b", "a", "a"], "auc": [0.6, 0.8, 0.9, 0.9]})
    ax = plots.method_scores(table)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "a"], "in the table's order"
    means = next(line for line in ax.lines if line.get_marker() == "D")
    assert means.get_xdata() == pytest.approx([0.7, 0.9])
    deviation = ax.lines[1].get_xdata()  # the caps of an interval are part of its line
    sd = np.std([0.6, 0.8], ddof=1)
    assert (np.nanmin(deviation), np.nanmax(deviation)) == pytest.approx((0.7 - sd, 0.7 + sd))
    folds = np.concatenate([dots.get_offsets() for dots in ax.collections])
    assert sorted(map(tuple, folds)) == [(0.6, 0), (0.8, 0), (0.9, 1), (0.9, 1)]


def test_keep_ratio_curve_averages_folds():
    table = pd.DataFrame({"method": "a", "keep_ratio": [0.5, 0.5, 1], "auc": [0.6, 0.8, 0.9]})
    ax = plots.keep_ratio_curve(table)
    x, y = line(ax, "a")
    assert x == pytest.approx([0.5, 1])
    assert y == pytest.approx([0.7, 0.9])
    band = ax.collections[0].get_paths()[0].vertices
    assert np.ptp(band[band[:, 0] == 0.5, 1]) == pytest.approx(2 * np.std([0.6, 0.8], ddof=1))


def test_a_source_has_one_color_in_every_figure():
    names = ["abmil", "LIPN", "random", "clam"]
    table = pd.DataFrame({"method": names, "keep_ratio": 0.5, "auc": 0.8})
    drawn = {curve.get_label(): curve.get_color() for curve in plots.keep_ratio_curve(table).lines}
    assert drawn["LIPN"] == SOURCES["LIPN"]["color"]
    assert drawn["random"] == SOURCES["random"]["color"]
    assert len(set(drawn.values())) == len(names), "other methods get other colors"
    stages = plots.stage_times(pd.DataFrame({"crop": [2.0], "lipn": [1.0]}, index=["a"]))
    assert rgb(stages.containers[1][0].get_facecolor()) == rgb(SOURCES["LIPN"]["color"])


def test_looks_repeat_when_there_are_more_names_than_colors():
    assert len(looks(map(str, range(2 * len(CYCLE))))) == 2 * len(CYCLE)


def test_a_bag_is_drawn_over_its_patches_and_without_them_over_squares(grid):
    numbers = np.arange(len(grid.rowcol), dtype=np.uint8)
    patches = np.broadcast_to(numbers[:, None, None, None], (len(numbers), 16, 16, 3))
    bag = Bag("slide", np.zeros((len(patches), 4)), 256 * grid.rowcol, grid.rowcol, grid.shape, patches)
    under = np.asarray(plots.kept_overlay(bag, np.ones(len(patches))).get_images()[0].get_array())
    assert under.shape == (N_ROWS * 16, N_COLS * 16, 3)
    row, col = grid.rowcol[9]
    assert (under[16 * row : 16 * row + 16, 16 * col : 16 * col + 16] == 9).all()
    assert (under[32:] == 255).all(), "white where no tile lies"
    bag = replace(bag, patches=None)
    bare = np.asarray(plots.truth_overlay(bag, np.ones(len(patches))).get_images()[0].get_array())
    assert (bare[:32] < 255).any()
    assert (bare[32:] == 255).all()


def test_maps_are_drawn_without_slow_imports():
    """`hdmil predict --heatmap` draws them: nobody should wait for libraries that maps do not need."""
    code = """
import sys
slow = ["seaborn", "pandas", "sklearn", "scipy.stats", "torch", "timm", "triton", "hdmil_lib.models"]
sys.modules.update(dict.fromkeys(slow))  # importing any of them fails
import numpy as np
from types import SimpleNamespace
from hdmil_lib.viz import overlays, style
style.use_style()
picture = np.zeros((32, 48, 3))
grid = SimpleNamespace(thumbnail=picture, rowcol=np.array([[0, 1]]), shape=(2, 3), tile_um=128.0)
overlays.attention_overlay(grid, np.ones(1)).figure.canvas.draw()
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)


NAME = r"a$b$\frac{0}"
"""A name that matplotlib would take for a formula."""


def made_up_prediction(grid: SimpleNamespace) -> SimpleNamespace:
    n = len(grid.rowcol)
    return SimpleNamespace(
        **vars(grid),
        slide_id=NAME,
        classes=("normal", NAME),
        label=NAME,
        probabilities=np.array([0.2, 0.8]),
        attention=np.ones((n, 2)),
    )


def folds_of_name(n_slides: int = 40) -> pd.DataFrame:
    p = np.linspace(0.1, 0.9, n_slides)
    columns = {"method": NAME, "fold": 0, "label": np.arange(n_slides) % 2, "p_0": 1 - p, "p_1": p}
    return pd.DataFrame({**columns, "slide_id": np.arange(n_slides).astype(str)})


GROWN = SimpleNamespace(n_read=np.array([1, 2]), probabilities=np.full((2, 2), 0.5), stop=lambda margin: 1)
COST = SimpleNamespace(flops=1e9, eager_bytes=1e8, intensity=20.0, matrix=True)
DEVICE = SimpleNamespace(name=NAME, bytes=3e12, matrix_flops=8e14, vector_flops=6e13)
INTERVAL = {"pooled_auc": 0.9, "pooled_low": 0.8, "pooled_high": 0.95, "p_holm": np.nan}
TIMES = pd.DataFrame({"roof": 0.1, "kernel": 0.3, "formula": np.nan, "call of the kernel": 1.0}, ["op"])
NAMED = {
    "attention_overlay": lambda grid: overlays.attention_overlay(grid, np.ones(len(grid.rowcol)), label=NAME),
    "gallery": lambda grid: overlays.gallery(np.zeros((1, 16, 16, 3), np.uint8), [NAME]),
    "prediction_figure": lambda grid: overlays.prediction_figure(made_up_prediction(grid)),
    "method_scores": lambda grid: plots.method_scores(
        pd.DataFrame({"method": [NAME] * 2, "auc": [0.7, 0.8]})
    ),
    "keep_ratio_curve": lambda grid: plots.keep_ratio_curve(
        pd.DataFrame({"method": [NAME], "keep_ratio": [0.5], "auc": [0.7]})
    ),
    "cost_growth": lambda grid: plots.cost_growth(pd.DataFrame({NAME: [1.0, 2.0]}, index=[10, 20])),
    "stage_times, method": lambda grid: plots.stage_times(pd.DataFrame({"crop": [2.0]}, index=[NAME])),
    "stage_times, stage": lambda grid: plots.stage_times(pd.DataFrame({NAME: [2.0]}, index=["a"])),
    "training_curves": lambda grid: plots.training_curves(history().assign(**{f"train_{NAME}": 1.0})),
    "roofline, operator": lambda grid: plots.roofline({NAME: COST}, DEVICE),
    "roofline, device": lambda grid: plots.roofline({"a": COST}, DEVICE),
    "program_grid": lambda grid: plots.program_grid(4, 4, (2, 2), axes=(NAME, "column")),
    "gpu_times": lambda grid: plots.gpu_times(TIMES.rename(index={"op": NAME})),
    "anytime_curves, legend": lambda grid: anytime_curves([GROWN], [0], classes=(NAME, "tumor")),
    "anytime_curves, axis": lambda grid: anytime_curves([GROWN], [1], classes=("normal", NAME)),
    "reliability_plot": lambda grid: reliability_plot(folds_of_name()),
    "auc_intervals": lambda grid: auc_intervals(pd.DataFrame(INTERVAL, [NAME]), reference=NAME),
}


@pytest.mark.parametrize("name", NAMED)
def test_names_are_drawn_as_they_are(grid, name):
    made = NAMED[name](grid)
    figure = made if isinstance(made, Figure) else plt.gcf()
    began = time.process_time()  # not by the clock, which other processes delay
    FigureCanvasAgg(figure).draw()
    assert time.process_time() - began < 10  # under one where nothing else runs
    texts = [text.get_text() for text in figure.findobj(matplotlib.text.Text)]
    drawn = [text.replace(r"\$", "$") for text in texts if not is_math_text(text)]
    assert any(NAME in text for text in drawn), texts


@pytest.mark.parametrize(
    "name", ["br{0}.svs", "a[b]*.svs", r"$\frac$", "$$", "\\$", "odd \udcff byte", "100 %"]
)
def test_every_name_can_be_drawn(grid, name):
    assert not is_math_text(plain(name))
    ax = plots.attention_overlay(grid, np.ones(len(grid.rowcol)), label=name)
    ax.figure.canvas.draw()
    assert plain(name).replace(r"\$", "$") == name.replace("\udcff", "?")


def test_a_prediction_is_drawn_in_the_house_style_beside_other_settings(grid):
    drawn = []
    for look in ("default", "dark_background"):
        with plt.style.context(look):
            before = dict(plt.rcParams)
            figure = overlays.prediction_figure(made_up_prediction(grid))
            assert dict(plt.rcParams) == before
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            drawn.append(np.asarray(canvas.buffer_rgba()))
    assert (drawn[1] == drawn[0]).all()
    assert {to_hex(label.get_color()) for label in figure.axes[0].get_xticklabels()} == {INK}


def test_a_prediction_is_not_left_open_in_pyplot(grid):
    """A notebook shows what is open after each cell: the figure that `plot` returns would come twice."""
    figure = overlays.prediction_figure(made_up_prediction(grid))
    assert isinstance(figure, Figure)
    assert plt.get_fignums() == []


@pytest.mark.parametrize(("stride", "moved"), [(1, 4), (2, 8), (8, 32), (13, 32)])
def test_a_warp_touches_as_many_sectors_as_counted_by_hand(stride, moved):
    assert hardware.sectors(stride) == moved


def test_coalescing_tells_the_share_of_bytes_that_is_used():
    labels = [label.get_text() for label in plots.coalescing((1, 13)).get_yticklabels()]
    assert labels == ["stride 1: 128 B moved, 100% used", "stride 13: 1,024 B moved, 12% used"]


@pytest.mark.parametrize(
    ("registers", "warps", "held"), [(32, 4, 64), (128, 4, 16), (129, 4, 12), (136, 8, 8), (255, 4, 8)]
)
def test_warps_that_fit_are_as_counted_by_hand(registers, warps, held):
    """65,536 registers; 129 per thread are handed out as 136, that is 4,352 per warp, of which 15 fit."""
    assert hardware.resident_warps(registers, warps) == held


def test_occupancy_names_kernels_with_their_warps():
    legend = plots.occupancy({"forward": 110, "backward": 182}).get_legend()
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["forward: 110 registers, 16 warps", "backward: 182 registers, 8 warps"]


def test_a_measured_operator_stands_below_the_roof():
    ax = plots.roofline({"a": COST}, DEVICE, seconds={"a": 1e-5})
    (cross,) = [line for line in ax.lines if line.get_marker() == "X"]
    assert cross.get_xydata()[0] == pytest.approx([20, 100])  # 1e9 operations in 10 us are 100 TFLOP/s


def test_tissue_needs_a_mask(grid):
    del grid.tissue
    with pytest.raises(ValueError, match="SimpleNamespace has no tissue mask"):
        plots.tissue_tiles(grid)


def test_maps_of_wide_tiles_have_their_scale(grid):
    grid.tile_um = 512.0
    ax = overlays.tissue_tiles(grid)
    height, width = grid.thumbnail.shape[:2]
    assert ax.get_xlim() == pytest.approx((0, width * 0.032))
    assert ax.get_ylim() == pytest.approx((height * 0.032, 0))
    frame = overlays.mark_tile(grid, 3, ax).patches[-1]
    assert frame.get_width() == pytest.approx(0.512)
    assert frame.get_x() == pytest.approx(grid.rowcol[3, 1] * 0.512)
