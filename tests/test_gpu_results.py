"""What `make gpu` measures and shows, without a GPU: a run in the interpreter, the tables, the README."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
from conftest import REPOSITORY

from hdmil_lib import kernels
from hdmil_lib.kernels import cost
from hdmil_lib.models import MODELS
from hdmil_lib.reproduce.gpu_results import (
    FAILED,
    NOT_MEASURED,
    operator_box,
    operator_table,
    prediction_table,
    read_gpu_results,
    training_table,
)

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
sys.path.insert(0, str(REPOSITORY / "tools"))
import bench_gpu
import publish_gpu

SCRIPT = REPOSITORY / "benchmarks" / "bench_gpu.py"


def run_script(*arguments, **environment):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """The results of a run in the interpreter."""
    folder = tmp_path_factory.mktemp("gpu")
    run = run_script("--interpret", "--out", folder, TRITON_INTERPRET="1", HDMIL_CACHE=str(folder / "cache"))
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    (path,) = folder.glob("*.json")
    assert str(path) in run.stdout
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.xdist_group("interpreter")  # one worker runs it
def test_the_run_measures_every_operator_form_and_model(interpreted):
    assert interpreted["device"] == "interpreter (CPU), times mean nothing"
    assert {"torch", "triton", "date", "commit", "changed", "seconds"} <= set(interpreted)
    assert interpreted["tests"]["passed"] > 10
    assert interpreted["tests"]["failures"] == []

    operators = interpreted["operators"]["rows"]
    shown = {(row["operator"], row["pass"], row["dtype"], row["form"]) for row in operators}
    forms = {"eager", "triton", "compiled"}
    for name in kernels.__all__:
        found = {form for operator, *_, form in shown if operator == name}
        assert found == forms - ({"compiled"} if name == "selective_scan" else set()), name
    for name in ("tile_preprocess", "tissue_statistics", "lipn_forward"):
        assert {p for operator, p, *_ in shown if operator == name} == {"forward"}
    floats = {(operator, dtype) for operator, _, dtype, _ in shown if operator != "lipn_forward"}
    expected = {(name, dtype) for name in kernels.__all__ for dtype in ("float16", "float32")}
    assert floats == expected - {
        (name, dtype) for name, dtype in expected if name in ("lipn_forward", "tissue_statistics")
    } | {("tissue_statistics", "uint8")}
    for row in operators:
        assert row["ms"] > 0
        assert row["gb_s"] > 0
        assert row["tflop_s"] > 0
        assert row["share_of_roof"] == pytest.approx(row["roof_ms"] / row["ms"], rel=2e-3)

    training = interpreted["training"]["rows"]
    assert [(r["model"], r["backend"], r["precision"]) for r in training] == [
        (name, backend, precision)
        for precision in ("bf16", "fp32")
        for backend in ("triton", "torch")
        for name in MODELS
    ]
    assert all(row["bags_per_s"] > 0 for row in training)

    prediction = interpreted["prediction"]["rows"]
    assert [(r["what"], r["precision"]) for r in prediction] == [
        (what, precision) for precision in ("fp32", "bf16") for what in ("encoder", "HDMIL†", "HDMIL")
    ]
    assert all(row["ms_per_tile"] > 0 for row in prediction if row["what"] != "encoder")
    assert not any("error" in row for row in (*operators, *training, *prediction))
    assert not any(interpreted[part]["left_out"] for part in bench_gpu.PARTS)


@pytest.mark.slow
@pytest.mark.xdist_group("interpreter")
def test_the_tables_show_what_the_run_measured(interpreted):
    operators = operator_table(interpreted)
    scan = operators.loc["selective_scan"]
    assert scan["compiled, ms"] == NOT_MEASURED
    busy = [c for c in operators.columns if c.startswith("GPU busy")]
    assert (operators[[*busy, "times faster"]] == NOT_MEASURED).all(axis=None)  # there is no GPU
    others = operators.drop(index="selective_scan", columns=[*busy, "times faster"])
    assert not others.isin([NOT_MEASURED, FAILED]).any(axis=None)
    training = training_table(interpreted, cohort="tiny")
    assert (
        not training[["kernels, bags/s", "formulas, bags/s", "times faster"]]
        .isin([NOT_MEASURED])
        .any(axis=None)
    )
    assert (training["kernels, GB"] == NOT_MEASURED).all()  # a CPU counts no such memory
    assert not prediction_table(interpreted).isin([NOT_MEASURED]).any(axis=None)


def test_without_a_gpu_one_line_says_what_to_do():
    run = run_script()
    assert run.returncode == 1
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("There is no GPU here")
    assert "make gpu" in line


def test_the_interpreter_writes_no_results():
    run = run_script("--interpret", "--out", bench_gpu.RESULTS)
    assert run.returncode == 2
    assert "no results" in run.stderr


def test_failed_tests_are_counted_and_named(tmp_path):
    (tmp_path / "test_example.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_not_here(): pytest.skip('no')\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    found = bench_gpu.tested([[str(tmp_path), "-c", str(tmp_path / "pytest.ini")]], lambda: 60, workers=0)
    assert found == {"passed": 1, "failed": 1, "skipped": 1, "failures": ["test_example::test_bad"]}


def test_tests_that_do_not_end_are_named(tmp_path):
    (tmp_path / "test_example.py").write_text("import time\ndef test_slow(): time.sleep(60)\n")
    found = bench_gpu.tested([[str(tmp_path)]], lambda: 1, workers=0)
    assert "did not end within 1 s" in found["error"]


def plan(path, minutes=1.0):
    return bench_gpu.Plan(path, interpret=True, quick=False, minutes=minutes, started=bench_gpu.time.time())


@pytest.mark.parametrize("minutes", [1.0, 0.0])
def test_rows_are_written_at_once_and_counted_when_the_time_is_over(tmp_path, monkeypatch, minutes):
    path = tmp_path / "device.json"
    seen = []

    def measures(_plan, section):
        section["roof"] = 1
        for number in range(3):
            yield lambda number=number: [{"what": f"row {number}"}]
            seen.append(json.loads(path.read_text()).get("operators") if path.exists() else None)

    monkeypatch.setitem(bench_gpu.PARTS, "operators", measures)
    bench_gpu.run_part("operators", plan(path, minutes))
    section = json.loads(path.read_text())["operators"]
    assert section["roof"] == 1
    assert section["left_out"] == (0 if minutes else 3)
    assert len(section["rows"]) == (3 if minutes else 0)
    assert [s and len(s["rows"]) for s in seen] == ([1, 2, 3] if minutes else [None] * 3)


def test_a_form_that_fails_has_an_error_in_its_row(monkeypatch):
    from gpu import operators
    from gpu.cases import TINY, cases

    bench = operators.bench_for(interpret=True, quick=False)
    peaks = {"copy_gb_s": 1.0, "matrix_tflop_s": {"float32": 1.0, "float16": 1.0}}
    case = cases(TINY, bench.device)[0]
    right, wrong = [
        operators.rows(replace(case, function=function), "float32", "eager", bench, peaks)
        for function in (case.function, lambda x, w, backend: case.function(x, w) + x.dtype.itemsize)
    ]
    assert [row["pass"] for row in right] == ["forward", "forward and backward"]
    assert not any("error" in row for row in right)
    assert all("deviates" in row["error"] for row in wrong)
    assert not any("ms" in row for row in wrong)
    (row, _) = operators.rows(case, "float32", "triton", bench, peaks)
    assert "TRITON_INTERPRET" in row["error"]


def result(**parts):
    return {"device": "Some GPU", "quick": False, "date": "2026-01-02T", "torch": "2", "triton": "3"} | parts


def operator_rows():
    row = {"operator": "gumbel_mask", "size": "N = 9", "dtype": "bfloat16", "pass": "forward"}
    fast = row | {"form": "triton", "ms": 0.05, "gpu_ms": 0.01, "share_of_roof": 0.256}
    return [
        fast,
        row | {"form": "eager", "ms": 0.4, "gpu_ms": 0.123},
        row | {"form": "compiled", "error": "it broke"},
        fast | {"dtype": "float32", "ms": 7},
        fast | {"size": "N = 8", "ms": 7},
    ]


def test_cells_say_what_was_not_measured_and_what_failed():
    for table in (operator_table, training_table, prediction_table):
        assert (table(None) == NOT_MEASURED).all(axis=None)
        pd.testing.assert_frame_equal(table(result()), table(None))
    assert list(operator_table(None).index) == kernels.__all__
    assert list(training_table(None).index) == list(MODELS)
    shown = operator_table(result(operators={"rows": operator_rows()})).loc["gumbel_mask"].to_dict()
    assert shown == {
        "size": "N = 9, bfloat16",
        "pass": "forward",
        "call of the formula, ms": "0.4",
        "compiled, ms": FAILED,
        "kernel, ms": "0.05",
        "GPU busy with the formula, ms": "0.123",
        "GPU busy with the kernel, ms": "0.01",
        "times faster": "12.3",
        "of the roof": "25.6 %",
    }


def test_a_full_run_is_shown_in_place_of_a_quick_one(tmp_path):
    assert read_gpu_results(tmp_path / "absent") == {}
    for quick in (False, True):
        path = tmp_path / bench_gpu.file_name("NVIDIA H100 80GB HBM3", quick)
        path.write_text(json.dumps(result(quick=quick)))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "nvidia-h100-80gb-hbm3-quick.json",
        "nvidia-h100-80gb-hbm3.json",
    ]
    assert read_gpu_results(tmp_path) == {"Some GPU": result()}


def test_the_readme_shows_the_committed_gpu_results():
    shown = publish_gpu.render(read_gpu_results(publish_gpu.FOLDER))
    text = publish_gpu.README.read_text(encoding="utf-8")
    assert text == publish_gpu.readme_with(shown), "run `python tools/publish_gpu.py`"


def test_the_readme_names_the_device_and_its_roof():
    roof = {"copy_gb_s": 2900.0, "matrix_tflop_s": {"float32": 50.0, "bfloat16": 700.0}}
    parts = {
        "operators": {"roof": roof, "rows": operator_rows()},
        "training": {"bags": {"paper": "64 of about 10,000 x 1024"}, "rows": []},
        "prediction": {"slide": "synthetic", "rows": []},
        "tests": {"passed": 3, "failed": 1, "skipped": 2},
    }
    text = publish_gpu.render({"Some GPU": result(**parts)})
    for part in (
        "Some GPU",
        "2,900 GB/s",
        "700 TFLOP/s in bfloat16",
        "3 passed, 1 failed",
        "| dmin |",
        "25.6 %",
    ):
        assert part in text
    assert NOT_MEASURED in text
    lost = publish_gpu.render({"Some GPU": result(tests=parts["tests"])})  # all parts broke
    assert "| gumbel_mask |" in lost


@pytest.mark.slow
@pytest.mark.xdist_group("interpreter")
def test_the_search_for_blocks_launches_every_kernel_with_others():
    """One candidate for each kernel, in the interpreter and in a process of its own."""
    code = (
        "import torch; from gpu import blocks as b; b.TILES, b.FEATURES, b.EMBED, b.HIDDEN = 70, 64, 64, 32\n"
        "slide, seen = b.Slide(torch.device('cpu')), set()\n"
        "for name, sizes in b.candidates():\n"
        "    if name not in seen: b.run(slide, name, sizes, lambda call, kernel: call()); seen.add(name)\n"
        "print(len(seen))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(REPOSITORY / "benchmarks")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout.split() == ["7"], run.stderr[-2000:]


def test_the_box_of_an_operator_has_bytes_and_what_was_measured():
    row = {"operator": "gumbel_mask", "size": "N = 10", "pass": "forward", "dtype": "float32"}
    rows = [
        {**row, "form": "eager", "gpu_ms": 2.0, "ms": 3.0, "launches": 9},
        {**row, "form": "triton", "gpu_ms": 0.5, "ms": 1.0},
    ]
    bound = cost.gumbel_mask(10, 2)
    box = operator_box({"A": {"operators": {"rows": rows}}}, "gumbel_mask", "N = 10", bound)
    assert box.loc["MB moved, calculated"].astype(float).tolist() == [
        bound.eager_bytes / 1e6,
        bound.fused_bytes / 1e6,
    ]
    assert box.loc["GPU busy, ms, A"].tolist() == ["2", "0.5"]
    assert box.loc["launches, A"].tolist() == ["9", NOT_MEASURED]
    for results in ({}, {"A": None}):
        box = operator_box(results, "gumbel_mask", "N = 10", bound)
        assert (box.iloc[1:] == NOT_MEASURED).all(axis=None)
