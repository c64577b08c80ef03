"""Public cohorts: slides and labels from a server on this machine, small parts, downloads, label tables."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bucket_server import serve_bucket
from dicom_factory import write_series
from typer.testing import CliRunner

from hdmil_lib.cli import app
from hdmil_lib.cohort import Cohort
from hdmil_lib.errors import CohortError
from hdmil_lib.public import fetching, sources
from hdmil_lib.public.catalog import COHORTS, PublicCohort, describe
from hdmil_lib.public.choice import choose
from hdmil_lib.public.fetching import fetch, plan_fetch
from hdmil_lib.public.sources import Addresses, RemoteSlide
from hdmil_lib.public.transfer import Client
from hdmil_lib.slides import Slide, TileGrid
from hdmil_lib.slides.listing import list_slides


def content(name: str, n_bytes: int = 5000) -> bytes:
    return np.random.default_rng([*name.encode()]).bytes(n_bytes)


def add_camelyon16(bucket) -> None:
    """Nine training and five test slides, with the two that were withdrawn, which the real bucket lacks."""
    names = [f"normal_{i:03d}" for i in (1, 2, 3, 4, 86)] + [f"tumor_{i:03d}" for i in (1, 2, 3, 111)]
    names += [f"test_{i:03d}" for i in (1, 2, 16, 49, 114)]
    for i, name in enumerate(names):
        bucket.files[f"CAMELYON16/images/{name}.tif"] = content(name, 5000 + 10 * i)
    bucket.files["CAMELYON16/images/README"] = b"no slide"
    sums = [f"{hashlib.md5(c).hexdigest()}  {k.removeprefix('CAMELYON16/')}" for k, c in bucket.files.items()]
    bucket.documents["CAMELYON16/checksums.md5"] = "\n".join(sums).encode()
    bucket.documents["CAMELYON16/evaluation/reference.csv"] = (
        b"image,type,center,class\r\ntest_001.tif,Tumor,1,macro\r\ntest_002.tif,Normal,0,negative\r\n"
        b"test_016.tif,Tumor,1,micro\r\ntest_049.tif,Normal,0,negative\r\ntest_114.tif,Tumor,0,micro\r\n"
    )


def add_idc(bucket, folder: Path, monkeypatch, collections=("tcga_luad", "tcga_lusc"), n: int = 6) -> None:
    """Series of three files, for `n` patients of each collection, of which the first has two slides."""
    rows = []
    for c, collection in enumerate(collections):
        for i in range(n + 1):
            series = f"{c}{i:07d}-0000-4000-8000-000000000000"
            sizes = [4000 + 100 * i, 900, 50]
            for j, size in enumerate(sizes):
                bucket.files[f"{series}/level{j}.dcm"] = content(f"{series}{j}", size)
            patient = f"TCGA-{c:02d}-{max(i - 1, 0):04d}"
            name = "DX1" if i else "DX2"
            rows.append([collection, patient, name, series, 3, f"{sum(sizes) / 1e6:.3f}"])
    columns = ["collection", "patient", "name", "series", "files", "megabytes"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "idc.csv", index=False)
    monkeypatch.setattr(sources, "IDC_TABLE", folder / "idc.csv")


@pytest.fixture
def bucket(monkeypatch):
    with serve_bucket() as bucket:
        monkeypatch.setattr(fetching, "ADDRESSES", Addresses(bucket.url, bucket.url, bucket.url))
        yield bucket


@pytest.fixture
def client():
    return Client(pause=0.001)


def test_camelyon16_has_its_official_test_part_and_not_what_was_withdrawn(bucket, client, tmp_path):
    add_camelyon16(bucket)
    plan = plan_fetch("camelyon16", tmp_path, client=client)
    assert plan.n_by_class == {"normal (test)": 1, "normal (train)": 4, "tumor (test)": 3, "tumor (train)": 4}
    assert {"normal_086", "test_049"}.isdisjoint(slide.slide_id for slide in plan.slides)
    fetched = fetch(plan, client=client, progress=False)
    assert (fetched.n_slides, fetched.failed, fetched.checked) == (12, {}, {"md5": 12})
    cohort = Cohort.from_csv(fetched.labels)
    assert cohort.classes == ("normal", "tumor")
    table = cohort.table.set_index("slide_id")
    assert table.loc["test_114", ["label", "split", "case_id"]].tolist() == ["tumor", "test", "test_114"]
    assert table.loc["tumor_111", ["label", "split"]].tolist() == ["tumor", "train"]
    for slide_id in table.index:
        key = f"CAMELYON16/images/{slide_id}.tif"
        assert cohort.slide_path(slide_id).read_bytes() == bucket.files[key]
    source = json.loads((tmp_path / "source.json").read_text())
    assert source["license"] == "CC0 1.0"
    assert any("tumor_111" in fault for fault in source["faults"])


def test_a_test_slide_without_a_class_is_refused(bucket, client, tmp_path):
    add_camelyon16(bucket)
    bucket.documents["CAMELYON16/evaluation/reference.csv"] = b"image,class\ntest_001.tif,macro\n"
    with pytest.raises(CohortError, match="has no class of test_"):
        plan_fetch("camelyon16", tmp_path, client=client)


def test_camelyon17_has_the_patients_whose_findings_are_published(bucket, client, tmp_path):
    stages = ["patient,stage,center"]
    for patient, found in (("000", "negative"), ("001", "itc"), ("002", "macro")):
        stages.append(f"patient_{patient}.zip,pN0,0")
        for node in range(2):
            stages.append(f"patient_{patient}_node_{node}.tif,{found},0")
    for patient in ("000", "001", "002", "150"):
        for node in range(2):
            name = f"patient_{patient}_node_{node}"
            bucket.files[f"CAMELYON17/images/{name}.tif"] = content(name)
    bucket.documents["CAMELYON17/stages.csv"] = "\n".join(stages).encode()
    bucket.documents["CAMELYON17/checksums.md5"] = b""
    fetched = fetch(plan_fetch("camelyon17", tmp_path, client=client), client=client, progress=False)
    assert fetched.checked == {"etag": 6}
    table = Cohort.from_csv(fetched.labels).table
    assert table["case_id"].tolist() == [f"patient_{p}" for p in ("000", "001", "002") for _ in range(2)]
    assert table["label"].tolist() == ["normal"] * 2 + ["tumor"] * 4
    assert table["stage"].tolist() == ["negative"] * 2 + ["itc"] * 2 + ["macro"] * 2


def test_a_series_is_one_slide_and_its_largest_file_is_its_path(bucket, client, tmp_path, monkeypatch):
    add_idc(bucket, tmp_path, monkeypatch)
    fetched = fetch(plan_fetch("nsclc", tmp_path / "out", client=client), client=client, progress=False)
    cohort = Cohort.from_csv(fetched.labels)
    assert cohort.classes == ("LUAD", "LUSC")
    assert (len(cohort), cohort.table["case_id"].nunique()) == (14, 12)
    path = cohort.slide_path("TCGA-01-0003-DX1")
    assert path.name == "level0.dcm"
    assert {file.name for file in path.parent.iterdir()} == {"level0.dcm", "level1.dcm", "level2.dcm"}


def test_a_fetched_dicom_series_is_read_as_a_slide(bucket, client, tmp_path, monkeypatch):
    add_idc(bucket, tmp_path, monkeypatch, n=1)
    rng = np.random.default_rng(0)
    for number, series in enumerate(sorted({key.split("/")[0] for key in bucket.files})):
        pixels = np.full((900, 1100, 3), 245, np.uint8)
        pixels[100:800, 100:1000] = rng.integers([140, 60, 150], [200, 110, 210], (700, 900, 3))
        for key in [key for key in bucket.files if key.startswith(series)]:
            del bucket.files[key]
        for path in write_series(tmp_path / f"series{number}", pixels):
            bucket.files[f"{series}/{path.name}"] = path.read_bytes()
    fetched = fetch(plan_fetch("nsclc", tmp_path / "out", client=client), client=client, progress=False)
    slides = list_slides(fetched.labels)
    assert [slide.slide_id for slide in slides] == pd.read_csv(fetched.labels)["slide_id"].tolist()
    for slide in slides:
        with Slide(slide.path) as image:
            assert (image.mpp, image.dimensions) == ((0.5, 0.5), (1100, 900))
            assert len(TileGrid.from_slide(image)) > 6
    assert len(list_slides(tmp_path / "out" / "slides")) == len(slides)


def test_classes_of_breast_cancer_are_the_primary_morphology(bucket, client, tmp_path, monkeypatch):
    add_idc(bucket, tmp_path, monkeypatch, ("tcga_brca",), n=5)
    primary = {"diagnosis_is_primary_disease": "true"}
    hits = [
        {"submitter_id": "TCGA-00-0000", "diagnoses": [{"morphology": "8500/3"}]},
        {"submitter_id": "TCGA-00-0001", "diagnoses": [{"morphology": "8520/3"}]},
        {"submitter_id": "TCGA-00-0002", "diagnoses": [{"morphology": "8522/3"}]},
        {
            "submitter_id": "TCGA-00-0003",
            "diagnoses": [{"morphology": "8140/3"}, {"morphology": "8520/3", **primary}],
        },
        {"submitter_id": "TCGA-00-0004", "diagnoses": [{"morphology": "8500/3"}, {"morphology": "8520/3"}]},
        {"submitter_id": "TCGA-99-0000"},
    ]
    answer = {"data": {"hits": hits, "pagination": {"total": len(hits)}}}
    bucket.documents["cases"] = json.dumps(answer).encode()
    plan = plan_fetch("brca", tmp_path, client=client)
    labels = {slide.slide_id: slide.label for slide in plan.slides}
    assert labels == {
        "TCGA-00-0000-DX1": "IDC",
        "TCGA-00-0000-DX2": "IDC",
        "TCGA-00-0001-DX1": "ILC",
        "TCGA-00-0003-DX1": "ILC",
    }
    bucket.documents["cases"] = b'{"data": []}'
    with pytest.raises(CohortError, match="no list of cases"):
        plan_fetch("brca", tmp_path, client=client)


def test_the_table_here_names_each_series_once_and_has_the_counts_of_the_literature():
    addresses = Addresses()
    counts = {}
    for name in ("nsclc", "cptac-nsclc"):
        cohort = COHORTS[name]
        left_out = {fault.slide_id for fault in cohort.faults if fault.left_out}
        slides = cohort.slides(Client(), addresses)
        ids = [slide.slide_id for slide in slides]
        assert len(ids) == len(set(ids))
        assert left_out <= set(ids)
        counts |= Counter(f"{name} {slide.label}" for slide in slides if slide.slide_id not in left_out)
    assert counts["nsclc LUAD"] == 529
    assert counts["nsclc LUSC"] == 512
    table = pd.read_csv(sources.IDC_TABLE)
    assert table["series"].is_unique
    assert table[["megabytes", "files"]].gt(0).all(axis=None)


def slides_of(counts: dict[tuple[str, str], int], per_case: int = 1) -> list[RemoteSlide]:
    """Slides of each class and part, of growing size, `per_case` of each patient."""
    return [
        RemoteSlide(
            f"{label}-{part}-{i}", f"{label}-{part}-{i // per_case}", label, 100 + i, 1, dict, part or None
        )
        for (label, part), count in counts.items()
        for i in range(count)
    ]


def test_a_small_part_is_balanced_small_and_the_same_again():
    slides = slides_of({("a", ""): 100, ("b", ""): 10, ("c", ""): 40})
    chosen = choose(slides, 20)
    assert Counter(slide.label for slide in chosen) == {"a": 7, "b": 7, "c": 6}
    assert max(slide.size for slide in chosen if slide.label == "a") < 100 + 11
    assert choose(slides[::-1], 20)[::-1] == chosen
    assert choose(slides, 20, seed=1) != chosen
    assert choose(slides, 1000) == slides


def test_a_small_part_has_the_share_of_test_slides_of_the_whole():
    parts = {("n", "train"): 60, ("n", "test"): 30, ("t", "train"): 40, ("t", "test"): 20}
    chosen = choose(slides_of(parts), 18)
    assert Counter((slide.label, slide.split) for slide in chosen) == {
        ("n", "train"): 6,
        ("n", "test"): 3,
        ("t", "train"): 6,
        ("t", "test"): 3,
    }


def test_a_small_part_has_as_many_patients_as_possible():
    slides = slides_of({("a", ""): 30, ("b", ""): 30}, per_case=3)
    assert len({slide.case_id for slide in choose(slides, 12)}) == 12
    assert len({slide.case_id for slide in choose(slides, 30)}) >= 15


def test_what_fails_is_that_slide_alone_and_is_fetched_by_the_next_run(bucket, client, tmp_path):
    add_camelyon16(bucket)
    bad, missing = "CAMELYON16/images/tumor_002.tif", "CAMELYON16/images/test_002.tif"
    bucket.faults[bad] = ["wrong", "wrong"]
    bucket.faults[missing] = ["404"]
    plan = plan_fetch("camelyon16", tmp_path, client=client)
    fetched = fetch(plan, client=client, progress=False)
    assert set(fetched.failed) == {"tumor_002", "test_002"}
    assert len(Cohort.from_csv(fetched.labels)) == fetched.n_slides == 10
    bucket.requests.clear()
    again = fetch(plan, client=client, progress=False)
    assert again.n_slides == 12
    assert {key: n for key, n in bucket.requests.items() if key.endswith(".tif")} == {bad: 1, missing: 1}


def test_a_file_that_was_not_checked_yet_is_checked_and_fetched_again_if_it_is_damaged(
    bucket, client, tmp_path
):
    add_camelyon16(bucket)
    plan = plan_fetch("camelyon16", tmp_path, client=client)
    fetch(plan, client=client, progress=False)
    damaged = tmp_path / "slides" / "tumor_001.tif"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    (tmp_path / "files.csv").unlink()
    assert fetch(plan, client=client, progress=False).n_slides == 12
    assert damaged.read_bytes() == bucket.files["CAMELYON16/images/tumor_001.tif"]


def test_an_interruption_ends_all_downloads_and_keeps_what_arrived(bucket, tmp_path, monkeypatch):
    add_camelyon16(bucket)
    client = Client(pause=0.001)
    plan = plan_fetch("camelyon16", tmp_path, client=client)
    kept = tmp_path / "slides" / "tumor_003.tif.part"

    def interrupted(self, remote, path, report):
        if path.stem == "normal_001":
            raise KeyboardInterrupt
        return download(self, remote, path, report)

    download = Client.download
    kept.parent.mkdir()
    kept.write_bytes(bucket.files["CAMELYON16/images/tumor_003.tif"][:1000])
    with monkeypatch.context() as patch:
        patch.setattr(Client, "download", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(plan, client=client, jobs=1, progress=False)
    assert not (tmp_path / "cohort.csv").exists()
    bucket.ranges.clear()
    assert fetch(plan, client=Client(), progress=False).n_slides == 12
    assert "bytes=1000-" in bucket.ranges


def test_a_file_name_cannot_leave_the_folder(bucket, client, tmp_path, monkeypatch):
    add_idc(bucket, tmp_path, monkeypatch)
    table = pd.read_csv(tmp_path / "idc.csv")
    table.loc[0, "patient"] = "../../TCGA"
    table.to_csv(tmp_path / "idc.csv", index=False)
    fetched = fetch(plan_fetch("nsclc", tmp_path / "out", client=client), client=client, progress=False)
    (reason,) = fetched.failed.values()
    assert "leads out of the folder" in reason


def test_what_cannot_be_fetched_is_refused(bucket, client, tmp_path, monkeypatch):
    add_camelyon16(bucket)
    with pytest.raises(CohortError, match="did you mean 'camelyon17'"):
        plan_fetch("camelyon61", tmp_path)
    with pytest.raises(CohortError, match="1 slides cannot hold normal and tumor"):
        plan_fetch("camelyon16", tmp_path, n_slides=1, client=client)
    plan = plan_fetch("camelyon16", tmp_path, client=client)
    with monkeypatch.context() as patch:
        patch.setattr(fetching, "RESERVE", 10**18)
        with pytest.raises(CohortError, match="are free on its disk.*--slides"):
            fetch(plan, client=client, progress=False)
    with fetching._alone(tmp_path), pytest.raises(CohortError, match="another `hdmil fetch`"):
        fetch(plan, client=client, progress=False)
    for key in bucket.files:
        bucket.faults[key] = ["404"]
    with pytest.raises(CohortError, match="no slide arrived"):
        fetch(plan, client=client, progress=False)


@pytest.mark.parametrize("cohort", COHORTS.values(), ids=COHORTS)
def test_each_cohort_has_a_license_a_page_and_sources_of_its_faults(cohort: PublicCohort):
    assert cohort.license.startswith("CC")
    assert cohort.home.startswith("https://")
    assert len(cohort.classes) == 2
    assert all(fault.source for fault in cohort.faults)
    assert len(describe(cohort.faults)) <= 4


def run(*arguments: str, answer: str = ""):
    return CliRunner().invoke(app, ["fetch", *map(str, arguments)], input=answer)


def test_the_command_lists_cohorts_and_slides_and_fetches_nothing(bucket, tmp_path):
    add_camelyon16(bucket)
    listed = run()
    assert all(name in listed.output for name in COHORTS)
    slides = run("camelyon16", "--list", "--slides", "4")
    assert slides.exit_code == 0
    assert "license  CC0 1.0" in slides.output
    assert "4 of 12: 1 normal (test), 1 normal (train), 1 tumor (test), 1 tumor (train)" in slides.output
    assert "in 4 files" in slides.output
    assert not any(key.endswith(".tif") for key in bucket.requests)


def test_the_command_asks_first_and_says_what_failed(bucket, tmp_path):
    add_camelyon16(bucket)
    out = tmp_path / "c16"
    assert run("camelyon16", "--out", out, answer="n\n").exit_code == 1
    assert not out.exists()
    bucket.faults["CAMELYON16/images/tumor_001.tif"] = ["404"]
    result = run("camelyon16", "--out", out, "--yes")
    assert result.exit_code == 1
    assert "error: tumor_001" in result.stderr
    assert "11 slides are here; files checked: 11 by the MD5 sum" in result.output
    done = run("camelyon16", "--out", out, answer="y\n")
    assert done.exit_code == 0
    assert f"next: hdmil extract {out / 'cohort.csv'}" in done.output
    without = run("camelyon16")
    assert without.exit_code == 1
    assert "--out" in without.stderr
