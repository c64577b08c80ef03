"""Copy what a full `make tutorial` measured into `docs/results` and show it in the README.

    python tools/publish_results.py [--readme]

Takes the tables and figures out of `build/`, and rewrites the part of the README between the two
`results` markers; with `--readme` it does only that. A test holds the README against the committed files.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from PIL import Image

from hdmil_lib.config import build_dir
from hdmil_lib.reproduce.tables import to_markdown
from hdmil_lib.viz.plots import cost_growth, use_style

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "docs" / "results"
README = REPOSITORY / "README.md"
BENCHMARKS = REPOSITORY / "benchmarks" / "results"
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"
COHORTS = {"camelyon-mini": "Camelyon16", "nsclc-mini": "NSCLC", "brca-mini": "BRCA"}
TABLE1 = """**Table 1.** Test AUC in percent, mean (sd) over 5 folds of 200 synthetic slides of each cohort,
beside the paper's on real slides (10 folds). Tiles read and seconds are for `camelyon-mini`; seconds, for
slides of 2,000 tiles and more. Accuracy, calibration, intervals, paired tests and controls:
[camelyon-mini](docs/results/camelyon-mini), [nsclc-mini](docs/results/nsclc-mini),
[brca-mini](docs/results/brca-mini).

"""
CLAIMS = """**The paper's claims**, judged on each synthetic cohort: the difference in points of AUC (in the
last row, of tumor tiles kept) with its 95 % interval; a claim is within noise where the interval holds the
bound.

"""
CASCADE = """A synthetic slide of {tiles:,} tiles takes {all:.1f} s from all tiles, {thirty:.1f} s by the
cascade at 30 % of them and {ten:.1f} s at 10 %: {by_thirty:.1f} and {by_ten:.1f} times less ({device},
encoder in {precision}). A second look costs {share:.0f} % of what a tile costs in full
and is given to 60 % of the tiles ([cascade.json](benchmarks/results/cascade.json)).
"""
LOCALIZATION = """Within test slides HDMIL†'s attention tells tumor tiles from the others with an AUC of
{attention:.2f}, its answer for each tile alone with {alone:.2f}: a map of attention shows what the answer
is pooled from, a map of tiles alone where the tumor is.

"""
CHANCE = """**Never worse than chance.** AUC of the cascade minus AUC of as many random tiles, in points,
mean and standard error over folds and seeds, on drawn and composed cohorts
([against_chance.json](benchmarks/results/against_chance.json)). Where the cascade is no better on
validation slides, it reads random tiles.

"""
PROMISE = """**Anytime by the cascade.** {n} composed slides of {tiles:.0f} tiles, which served for nothing
else. In {repeats} repeats a margin is learned on {learned} slides that are drawn from them; the promise,
with confidence 90 %, is broken if more than a share epsilon of all {n} then gets another label
([promise.json](benchmarks/results/promise.json)).

"""
TOOLS = """The tools themselves were run by hand, not by a command of this repository, on a drawn slide of
1,339 tiles with the same encoder and tiles (2-core AMD Zen 4 with AVX512_BF16 and without AMX, medians,
seconds from the slide to its features): hdmil in fp32 8.7, bf16 5.0, int8 4.1; TRIDENT 0.3 83.5 at its
defaults, 30.4 tuned, 12.4 with this project's engine put into it; CLAM 93.8 and tuned 36; LazySlide 73 and
tuned 29. In fp32 that is 8 to 11 times their defaults, 3 to 4 times the same tools tuned, and 1.4 times
with our engine inside TRIDENT.
"""
COMPOSED = {
    "camelyon-pcam": """**Composed lymph nodes.** Test scores in percent, mean (sd) over 5 seeds of training.
480 slides are composed of 8,000 tiles of PatchCamelyon, with 2 to 10 % tumor in half of them. Training,
validation and test slides share no tile. ABMIL, CLAM-MB and HDMIL† had ten tuning trials each on other slides
([tuning_composed.json](benchmarks/results/tuning_composed.json)). "Against HDMIL†" is the mean difference of
AUC and its standard error.

""",
    "nsclc-lc25000": """**Composed lung.** The same over 3 seeds, for 300 slides of 371 groups of tiles of
LC25000. Their class is the more frequent of two kinds of tumor.

""",
}
"""Captions of the tables of `tools/compare_composed.py`."""

TABLES = {
    "table2": "**Table 2.** Seconds per slide and stage on 2 CPU cores, above the paper's on a GPU.",
    "table3": "**Table 3.** What each component adds: our test scores, the paper's validation scores.",
}
FIGURES = ("slide", "stage_times")
SPEED = """**Speed** on a synthetic slide of {tiles:,} tiles, from the file to the answer, in turns with two
yardsticks of which only the way from given coordinates to features counts: one `read_region` and one encoder
call per tile, and a DataLoader over OpenSlide with the encoder in eager fp32 at batch 256
([inference.json](benchmarks/results/inference.json)).

"""
GROWTH = """![Seconds per slide against its number of tiles](docs/results/growth.jpg)

Reading beside encoding, as in use, a further tile takes HDMIL† {ms:.1f} ms and {memory:,} bytes. Reading and
decoding a tile takes {grid:.1f} times less CPU than `read_region` where tiles lie on the grid of stored ones,
{off:.1f} times less off it, with the same pixels ([reading.json](benchmarks/results/reading.json)).
"""
GUARANTEE = """**Fewer tiles with a guarantee.** Rules learned on {n} held-out synthetic slides of {tiles:.0f}
tiles so that, with confidence 90 %, at most 5 % of all slides get another label than from all tiles; then
tried on {m} others ([guarantee.json](benchmarks/results/guarantee.json)).

"""
PRECISION = """**Bits.** The encoder on a CPU {amx} AMX, over all tiles of `camelyon-mini`
([precision.json](benchmarks/results/precision.json)).

"""


def collect(build: Path) -> None:
    """Copy tables, seconds and figures of the last full run.

    Raises:
        SystemExit: The last run in `build` was not a full one that ended.
    """
    last = json.loads((build / "timing.json").read_text())[-1]
    if last["fast"] or "Notebooks" not in last["steps"]:
        sys.exit(f"{build}: the last run was fast or did not end; run `make tutorial` first")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "timing.json").write_text(json.dumps(last, indent=1) + "\n")
    for name in ("table1", *TABLES):
        for suffix in (".csv", ".md"):
            shutil.copy(build / "tables" / f"{name}{suffix}", RESULTS)
    for name in FIGURES:
        Image.open(build / "figures" / f"{name}.png").convert("RGB").save(RESULTS / f"{name}.jpg", quality=85)


def table1() -> pd.DataFrame:
    """AUC of all systems on all cohorts, and what they read of `camelyon-mini`."""
    timed = pd.read_csv(RESULTS / "table1.csv", index_col="method")
    tables = {name: pd.read_csv(RESULTS / name / "table1.csv", index_col="method") for name in COHORTS}
    both = pd.DataFrame({name: table["AUC"] for name, table in tables.items()}).loc[timed.index]
    both[["tiles read", "s/slide"]] = timed[["tiles read", "s/slide"]]
    for name, real in COHORTS.items():
        both[f"paper, {real}"] = tables[name]["paper AUC"]
    return both


def claims() -> pd.DataFrame:
    """What became of the paper's claims on each cohort."""
    columns = {}
    for name in COHORTS:
        table = pd.read_csv(RESULTS / name / "claims.csv", index_col="claim")
        numbers = zip(*(table[c] for c in ("outcome", "difference", "low", "high")), strict=True)
        columns[name] = [f"{outcome}: {d:+.1f} ({a:+.1f} to {b:+.1f})" for outcome, d, a, b in numbers]
    return pd.DataFrame(columns, index=table.index)


def measured(name: str) -> dict[str, Any]:
    """A result file of the benchmarks."""
    return json.loads((BENCHMARKS / f"{name}.json").read_text())


def growth_table() -> pd.DataFrame:
    """Seconds per slide by its number of tiles."""
    slides = measured("inference")["growth"]["slides"]
    columns = {method: [s["table"][method]["total"] for s in slides] for method in slides[0]["table"]}
    return pd.DataFrame(columns, [s["tiles"] for s in slides])


def draw_growth() -> None:
    """The figure of the growth."""
    use_style()
    figure, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    cost_growth(growth_table(), ax)
    figure.savefig(RESULTS / "growth.jpg", dpi=120, pil_kwargs={"quality": 85})
    plt.close(figure)


def speed() -> list[str]:
    """What the benchmarks of inference measured."""
    inference, reading, rules = map(measured, ("inference", "reading", "guarantee"))
    yardsticks, growth = inference["yardsticks"], inference["growth"]
    on, off = (reading["slides"][f"synthetic, JPEG tiles of 256, {k} the grid"] for k in ("on", "off"))
    learned = {
        f"{networks}: {'LIPN thresholds' if kind == 'thresholds' else 'anytime, margin'}": {
            "tiles read": f"{100 * rule['share of tiles read']:.0f} %",
            "other labels, learned on": rule["errors"],
            "other labels, tried on": (rule["on other slides"] or {}).get("errors"),
        }
        for networks, by_epsilon in rules["rules"].items()
        for kind, rule in by_epsilon["epsilon 0.05"].items()
    }
    precision = measured("precision")
    rows = pd.DataFrame(precision["precisions"]).T.drop(columns="AUC minus fp32, by fold")
    slides = rules["slides"]
    return [
        SPEED.format(tiles=yardsticks["tiles"])
        + to_markdown(_with_cosines(pd.DataFrame(yardsticks["rows"]).T).rename_axis("pipeline")),
        TOOLS,
        GROWTH.format(
            ms=growth["HDMIL† in use, ms a further tile"],
            memory=growth["memory, bytes a further tile"],
            grid=on["openslide / stored"],
            off=off["openslide / stored"],
        ),
        GUARANTEE.format(n=slides["learned on"], m=slides["tried on"], tiles=rules["tiles per slide"])
        + to_markdown(pd.DataFrame(learned).T.rename_axis("rule")),
        PRECISION.format(amx="with" if precision["amx"] else "without")
        + to_markdown(_with_cosines(rows).rename_axis("precision")),
    ]


def cascade_speed() -> str:
    """How much faster a cascade is than reading all tiles."""
    measured = json.loads((BENCHMARKS / "cascade.json").read_text())
    seconds, ratios = measured["seconds"], measured["times as fast"]
    return CASCADE.format(
        tiles=measured["tiles"],
        device=measured["device"],
        precision=measured["precision"],
        all=seconds["all tiles"],
        thirty=seconds["cascade, 30%"],
        ten=seconds["cascade, 10%"],
        by_thirty=ratios["cascade, 30%"],
        by_ten=ratios["cascade, 10%"],
        share=100 * measured["look per tile / all of a tile"],
    )


def chance() -> pd.DataFrame:
    """Leads of the cascade over random tiles, one row per cohort and one column per share of tiles."""
    found = measured("against_chance")
    rows = {
        name: {f"{100 * float(ratio):.0f} % of the tiles": _lead(part) for ratio, part in by_ratio.items()}
        for name, by_ratio in found.items()
    }
    return pd.DataFrame(rows).T.rename_axis("cohort")


def _lead(part: dict) -> str:
    fell_back = sum(row["screening"] == "random" for row in part["rows"])
    text = f"{100 * part['lead']:+.1f} ± {100 * part['standard error']:.1f}"
    return text + (f" (random in {fell_back} of {len(part['rows'])})" if fell_back else "")


def promise() -> str:
    """How often a promise is kept, what it reads, and how fast."""
    found = measured("promise")
    rows = {
        f"epsilon {epsilon}": {
            "promise broken": f"{100 * row['broken']:.1f} %",
            "nothing certified": f"{100 * row['nothing certified']:.0f} %",
            "tiles read, median": f"{100 * row['share of tiles read'][0]:.0f} %",
            "labels changed, median": f"{100 * row['labels changed'][0]:.1f} %",
        }
        for epsilon, row in found["epsilon"].items()
    }
    text = PROMISE.format(
        n=found["population"],
        tiles=found["tiles per slide"],
        repeats=found["repeats"],
        learned=found["learned on"],
    ) + to_markdown(pd.DataFrame(rows).T.rename_axis("promise"))
    times = pd.DataFrame(found["seconds"]).T.rename_axis("rule")
    times["other labels"] = times["other labels"].astype(int)
    return f"{text}\nOn {found['timed slides']} of them, in turns:\n\n{to_markdown(times)}"


def _with_cosines(table: pd.DataFrame) -> pd.DataFrame:
    """Cosines with the decimals that tell them apart."""
    cosines = [column for column in table if "cosine" in column]
    shown = {c: ["-" if pd.isna(v) else f"{v:.4f}" for v in table[c]] for c in cosines}
    return table.assign(**shown)


def render() -> str:
    """The results part of the README, from the committed files."""
    parts = [
        f"![Synthetic slide: tumor in the ground truth, the tiles HDMIL reads, and its attention]"
        f"({RESULTS.relative_to(REPOSITORY) / 'slide.jpg'})\n"
    ]
    for name, caption in COMPOSED.items():
        parts.append(caption + (RESULTS / "composed" / f"{name}.md").read_text())
        if name == "camelyon-pcam":
            places = pd.read_csv(RESULTS / "composed" / f"{name}-localization.csv").mean() / 100
            parts.append(LOCALIZATION.format(attention=places["attention"], alone=places["tiles alone"]))
    parts.append(CHANCE + to_markdown(chance()))
    parts.append(cascade_speed())
    parts.append(promise())
    parts.append(TABLE1 + to_markdown(table1()))
    parts.append(CLAIMS + to_markdown(claims()))
    for name, caption in TABLES.items():
        parts.append(f"{caption}\n\n{(RESULTS / f'{name}.md').read_text()}")
    parts.append(f"![Seconds per slide and stage]({RESULTS.relative_to(REPOSITORY) / 'stage_times.jpg'})\n")
    steps = json.loads((RESULTS / "timing.json").read_text())["steps"].values()
    minutes, gigabytes = sum(s["seconds"] for s in steps) / 60, max(s["peak_mb"] for s in steps) / 1024
    parts.append(
        f"The run of the tutorial took {minutes:.0f} minutes on 2 CPU cores, from an empty cache, and "
        f"{gigabytes:.1f} GB of memory at most.\n"
    )
    parts += speed()
    return "\n".join(parts)


def readme_with(results: str) -> str:
    """The README with this text between its markers."""
    before, rest = README.read_text().split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + results + END + after


if __name__ == "__main__":
    if "--readme" not in sys.argv:
        collect(build_dir())
        draw_growth()
    README.write_text(readme_with(render()))
