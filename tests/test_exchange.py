"""Bags from files laid out as CLAM, TRIDENT and torchmil lay them out, and back."""

import io
import pickle
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from bag_factory import make_bag, make_bags, make_cohort
from model_factory import ColorEncoder, write_textured_slide
from typer.testing import CliRunner

from hdmil_lib.bags import EncoderIdentity, bag_info, read_bag, read_tile_labels, write_bag
from hdmil_lib.cli import app
from hdmil_lib.encoders.extraction import extract_slide
from hdmil_lib.errors import HDMILError
from hdmil_lib.exchange.patches import add_patches
from hdmil_lib.exchange.transfer import export_bags, import_bags
from hdmil_lib.slides import Slide

CELLS = np.array([[0, 0], [0, 1], [3, 1], [2, 7]])
DIM = 6


def features_of(seed: int, n: int = len(CELLS)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, DIM)).astype(np.float32)


def write_h5(path: Path, coords_attrs: dict | None = None, **arrays) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
        file["coords"].attrs.update(coords_attrs or {})
    return path


def write_clam(root: Path, slide_id: str, features: np.ndarray, coords: np.ndarray, *, h5=True) -> None:
    """As `create_patches_fp.py` and `extract_features_fp.py` do: patches of 256 px of level 1 at 2x."""
    attrs = {"patch_size": 256, "patch_level": 1, "downsample": (2.0, 2.0), "name": slide_id}
    attrs |= {"downsampled_level_dim": (5000, 4000), "level_dim": (5000, 4000), "save_path": "patches"}
    write_h5(root / "patches" / f"{slide_id}.h5", attrs, coords=coords)
    if h5:
        write_h5(root / "h5_files" / f"{slide_id}.h5", features=features, coords=coords.astype(np.int32))
    (root / "pt_files").mkdir(exist_ok=True)
    torch.save(torch.from_numpy(features), root / "pt_files" / f"{slide_id}.pt")


def write_trident(
    job: Path, slide_id: str, features: np.ndarray, coords: np.ndarray, encoder="uni_v1"
) -> None:
    """As the tasks `coords` and `feat` do."""
    attrs = {"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "overlap": 0}
    attrs |= {"target_magnification": 20, "name": slide_id, "savetodir": str(job)}
    attrs |= {"level0_width": 10_000, "level0_height": 8_000}
    folder = job / "20x_256px_0px_overlap"
    write_h5(folder / "patches" / f"{slide_id}_patches.h5", attrs, coords=coords)
    path = write_h5(
        folder / f"features_{encoder}" / f"{slide_id}.h5", attrs, features=features, coords=coords
    )
    with h5py.File(path, "a") as file:
        file["features"].attrs.update({"name": slide_id, "savetodir": str(folder)})


def write_torchmil(root: Path, slide_id: str, features, coords, label=1, tile_labels=None) -> None:
    """As the folders of torchmil's own data sets."""
    arrays = {"features/features_UNI": features, "coords": coords, "labels": np.array(label)}
    if tile_labels is not None:
        arrays["patch_labels"] = tile_labels
    for folder, values in arrays.items():
        path = root / "patches_512" / folder / f"{slide_id}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, values)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    assert "Traceback" not in result.output
    return result.stdout if code == 0 else result.stderr


def statuses(report: pd.DataFrame) -> dict[str, str]:
    return dict(zip(report["slide_id"], report["status"], strict=True))


def error_of(report: pd.DataFrame, slide_id: str) -> str:
    return report.set_index("slide_id").loc[slide_id, "error"]


# CLAM


def test_clams_features_become_bags(tmp_path):
    coords = 100 + CELLS[:, ::-1] * 512
    write_clam(tmp_path / "clam", "a.b", features_of(0), coords)
    write_clam(tmp_path / "clam", "b", features_of(1), coords, h5=False)
    report = import_bags(
        tmp_path / "clam", "clam", tmp_path / "bags", encoder="resnet50_trunc", progress=False
    )
    assert statuses(report) == {"a.b": "done", "b": "done"}
    for seed, slide_id in enumerate(("a.b", "b")):
        bag = read_bag(tmp_path / "bags" / f"{slide_id}.h5")
        np.testing.assert_array_equal(bag.features, features_of(seed).astype(np.float16))
        np.testing.assert_array_equal(bag.coords, coords)
        np.testing.assert_array_equal(bag.rowcol, CELLS)
        assert bag.attrs["patch_size_level0"] == 512
        assert bag.patches is None
        assert bag.slide_id == slide_id
        assert bag.encoder == EncoderIdentity("resnet50_trunc", "imported from clam")


def test_what_failed_is_named_and_done_bags_are_skipped(tmp_path):
    root, coords = tmp_path / "clam", CELLS[:, ::-1] * 512
    for slide_id in ("good", "short", "code", "damaged", "bare", "other"):
        write_clam(root, slide_id, features_of(0), coords, h5=False)
    torch.save(torch.zeros(3, DIM), root / "pt_files" / "short.pt")
    (root / "pt_files" / "code.pt").write_bytes(pickle.dumps(Path("x")))
    (root / "pt_files" / "damaged.pt").write_bytes((root / "pt_files" / "good.pt").read_bytes()[:700])
    (root / "pt_files" / "bare.pt").unlink()
    (root / "patches" / "other.h5").write_bytes((root / "patches" / "good.h5").read_bytes())
    arguments = "import", root, "--from", "clam", "--out", tmp_path / "bags", "--encoder", "r50"
    printed = run(*arguments, code=1)
    for reason in (
        "short: .* 3 tiles have features, but the coordinates have shape (4, 2)",
        "code: .* cannot be read as a tensor",
        "damaged: .* cannot be read as a tensor",
        "bare: .* has coordinates, but no features",
        "other: .* says that it is of slide 'good'",
    ):
        start, end = reason.split(" .* ")
        assert any(line.startswith(f"error: {start}") and end in line for line in printed.splitlines()), (
            printed
        )
    report = import_bags(root, "clam", tmp_path / "bags", encoder="r50", progress=False)
    assert statuses(report)["good"] == "skipped"
    assert sum(report["status"] == "failed") == 5
    report = import_bags(root, "clam", tmp_path / "bags", encoder="uni", progress=False)
    assert "already there, with 4 tiles of r50" in error_of(report, "good")


def test_a_tensor_that_declares_more_than_it_has_is_refused(tmp_path):
    root = tmp_path / "clam"
    write_clam(root, "wide", features_of(0), CELLS * 512, h5=False)
    torch.save(torch.zeros(1).expand(10**9, 1024), root / "pt_files" / "wide.pt")
    report = import_bags(root, "clam", tmp_path / "bags", encoder="r50", progress=False)
    assert "numbers that the file does not have" in error_of(report, "wide")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(2**24))
    (root / "pt_files" / "wide.pt").write_bytes(packed.getvalue())
    report = import_bags(root, "clam", tmp_path / "bags", encoder="r50", progress=False)
    assert "bytes that the file does not have" in error_of(report, "wide")


def test_features_whose_encoder_is_not_known_are_refused(tmp_path):
    write_clam(tmp_path / "clam", "a", features_of(0), CELLS * 512)
    printed = run("import", tmp_path / "clam", "--from", "clam", "--out", tmp_path / "bags", code=1)
    assert "does not say which encoder made the features; name it (--encoder)" in printed
    assert not (tmp_path / "bags").exists()


# TRIDENT


def test_tridents_features_become_bags_with_one_more_dimension_too(tmp_path):
    coords = CELLS[:, ::-1] * 512
    write_trident(tmp_path / "job", "a", features_of(0), coords)
    write_trident(tmp_path / "job", "b", features_of(1)[None], coords)
    (tmp_path / "job" / "20x_256px_0px_overlap" / "slide_features_titan").mkdir()
    report = import_bags(tmp_path / "job", "trident", tmp_path / "bags", progress=False)
    assert statuses(report) == {"a": "done", "b": "done"}
    bag = read_bag(tmp_path / "bags" / "b.h5")
    np.testing.assert_array_equal(bag.features, features_of(1).astype(np.float16))
    assert bag.encoder == EncoderIdentity("uni_v1", "imported from trident")
    assert {bag.attrs[key] for key in ("patch_size", "patch_size_level0")} == {256, 512}
    assert (bag.attrs["level0_width"], bag.attrs["level0_magnification"]) == (10_000, 40)


def test_of_several_encoders_one_must_be_given(tmp_path):
    for encoder in ("uni_v1", "conch_v15"):
        write_trident(tmp_path / "job", "a", features_of(0), CELLS * 512, encoder)
    folder = tmp_path / "job" / "20x_256px_0px_overlap"
    for given in (tmp_path / "job", folder):
        with pytest.raises(HDMILError, match=r"several folders of features \(.*features_conch_v15, .*uni_v1"):
            import_bags(given, "trident", tmp_path / "bags", progress=False)
    import_bags(folder / "features_uni_v1", "trident", tmp_path / "bags", progress=False)
    assert read_bag(tmp_path / "bags" / "a.h5").encoder.name == "uni_v1"


def test_one_vector_per_slide_is_no_bag(tmp_path):
    write_trident(tmp_path / "job", "a", features_of(0)[0], CELLS * 512)
    report = import_bags(tmp_path / "job", "trident", tmp_path / "bags", progress=False)
    assert "one vector per slide is no bag" in error_of(report, "a")


# torchmil


def test_torchmils_folders_become_bags_with_labels(tmp_path):
    coords = CELLS[:, ::-1] * 512
    write_torchmil(tmp_path / "data", "a", features_of(0), coords, 1, np.array([[1], [0], [0], [1]]))
    write_torchmil(tmp_path / "data", "b", features_of(1), coords, 0, -np.ones(4))
    out = run(
        "import", tmp_path / "data", "--from", "torchmil", "--out", tmp_path / "bags", "--tile-size", 512
    )
    assert "done: 2 slides, 8 tiles" in out
    bag = read_bag(tmp_path / "bags" / "a.h5")
    np.testing.assert_array_equal(bag.coords, coords)
    assert bag.encoder.name == "UNI"
    assert bag.attrs["patch_size_level0"] == 512
    assert read_tile_labels(tmp_path / "bags" / "a.h5").tolist() == [1, 0, 0, 1]
    assert read_tile_labels(tmp_path / "bags" / "b.h5") is None
    labels = pd.read_csv(tmp_path / "bags" / "cohort.csv", dtype=str)
    assert labels.to_dict("list") == {"slide_id": ["a", "b"], "case_id": ["a", "b"], "label": ["1", "0"]}


def test_pickled_arrays_are_not_read(tmp_path):
    write_torchmil(tmp_path / "data", "a", np.array([{}], dtype=object), CELLS)
    report = import_bags(tmp_path / "data", "torchmil", tmp_path / "bags", progress=False)
    assert "cannot be read as a NumPy array" in error_of(report, "a")


# Round trips


@pytest.fixture
def bags(tmp_path):
    made, labels = make_bags(4)
    return make_cohort(tmp_path, made, labels)


def assert_same(before, after) -> None:
    np.testing.assert_array_equal(before.features, after.features)
    np.testing.assert_array_equal(before.coords, after.coords)
    np.testing.assert_array_equal(before.rowcol, after.rowcol)
    assert before.slide_id == after.slide_id


def test_bags_come_back_from_clam_with_their_encoder(bags, tmp_path):
    assert "done: 4 slides, 48 tiles" in run(
        "export", bags.bag_dir, "--to", "clam", "--out", tmp_path / "clam"
    )
    assert "skipped: 4" in run("export", bags.bag_dir, "--to", "clam", "--out", tmp_path / "clam")
    run("import", tmp_path / "clam", "--from", "clam", "--out", tmp_path / "again")
    for slide_id in bags.slide_ids:
        before, after = (read_bag(f / f"{slide_id}.h5") for f in (bags.bag_dir, tmp_path / "again"))
        assert_same(before, after)
        assert before.encoder == after.encoder
        tensor = torch.load(tmp_path / "clam" / "pt_files" / f"{slide_id}.pt", weights_only=True)
        np.testing.assert_array_equal(tensor.numpy(), before.features.astype(np.float32))


def test_torchmil_reads_what_is_exported_and_finds_neighbors(bags, tmp_path):
    from torchmil.datasets import ProcessedMILDataset

    write_bag(bags.bag_path("s01"), read_bag(bags.bag_path("s01")), np.linspace(0, 1, 12))
    out = run(
        *("export", bags.bag_dir, "--to", "torchmil", "--out", tmp_path / "data"),
        *("--cohort", tmp_path / "cohort.csv"),
    )
    assert "normal is 0, tumor is 1" in out
    folder = tmp_path / "data"
    data = ProcessedMILDataset(
        *(f"{folder}/{name}" for name in ("features", "labels")),
        coords_path=f"{folder}/coords",
        bag_keys=["X", "Y", "adj", "coords"],
        norm_adj=False,
        verbose=False,
    )
    assert len(data) == 4
    bag = read_bag(bags.bag_path("s01"))
    item = data[1]
    np.testing.assert_array_equal(item["X"].numpy(), bag.features.astype(np.float32))
    assert item["Y"].tolist() == [1]
    near = np.abs(bag.rowcol[:, None] - bag.rowcol).max(-1) == 1
    adjacent = item["adj"].to_dense().numpy() > 0
    np.fill_diagonal(adjacent, False)
    np.testing.assert_array_equal(adjacent, near)
    assert np.load(folder / "patch_labels" / "s01.npy").sum() == 6
    import_bags(folder, "torchmil", tmp_path / "again", encoder="test", progress=False)
    assert_same(bag, read_bag(tmp_path / "again" / "s01.h5"))


def test_coordinates_that_count_tiles_need_the_size_of_a_tile(tmp_path):
    write_torchmil(tmp_path / "data", "a", features_of(0, 9), np.stack(np.divmod(np.arange(9), 3), 1))
    report = import_bags(tmp_path / "data", "torchmil", tmp_path / "bags", progress=False)
    assert "count tiles, not pixels; name the side of a tile" in error_of(report, "a")
    import_bags(tmp_path / "data", "torchmil", tmp_path / "bags", tile_size=512, progress=False)
    assert read_bag(tmp_path / "bags" / "a.h5").coords.max() == 1024


def test_an_export_goes_on_when_a_bag_is_damaged(bags, tmp_path):
    bags.bag_path("s02").write_bytes(b"no bag")
    write_bag(bags.bag_path("s03"), make_bag("another", 1))
    report = export_bags(bags.bag_dir, "clam", tmp_path / "clam", progress=False)
    assert statuses(report) == {"s00": "done", "s01": "done", "s02": "failed", "s03": "failed"}
    assert "says that it is of slide 'another'" in error_of(report, "s03")


@pytest.mark.parametrize("tool", ["clam", "trident", "torchmil"])
def test_a_folder_without_features_is_named(tmp_path, tool):
    with pytest.raises(HDMILError, match="in it; give the"):
        import_bags(tmp_path, tool, tmp_path / "bags")
    with pytest.raises(HDMILError, match="no such folder"):
        import_bags(tmp_path / "none", tool, tmp_path / "bags")


# Patches


def without_patches(slide: Path, folder: Path, **changes) -> Path:
    """The bag of a slide as another tool would have written it."""
    bag = extract_slide(slide, ColorEncoder(), folder / "whole" / f"{slide.stem}.h5")
    attrs = {"patch_size": 256, "patch_size_level0": bag.attrs["patch_size_level0"], "name": slide.stem}
    attrs = {key: value for key, value in (attrs | changes).items() if value is not None}
    job = folder / "job"
    write_h5(job / "features_color" / f"{slide.stem}.h5", attrs, features=bag.features, coords=bag.coords)
    import_bags(job, "trident", folder / "bags", progress=False)
    return folder / "whole" / f"{slide.stem}.h5"


def test_patches_are_filled_in_as_extraction_makes_them(tmp_path):
    slide = write_textured_slide(tmp_path / "s.tif")
    whole = read_bag(without_patches(slide, tmp_path))
    assert read_bag(tmp_path / "bags" / "s.h5").patches is None
    assert "done: 1 slides" in run("add-patches", tmp_path / "bags", slide)
    filled = read_bag(tmp_path / "bags" / "s.h5")
    # Corners are rounded to whole level-0 pixels, so that means differ where the pitch is no whole number.
    difference = np.abs(filled.patches.astype(int) - whole.patches)
    assert difference.max() <= 1
    np.testing.assert_array_equal(filled.features, whole.features)
    with Slide(slide) as opened:
        assert filled.attrs["mpp_x"] == opened.mpp[0]
    assert "skipped: 1 slides" in run("add-patches", tmp_path / "bags", slide)


def test_patches_of_an_exported_bag_come_back_at_any_scale(tmp_path):
    """At 0.499 um/px a tile has 256.5 level-0 pixels; its corner is stored to the nearest one."""
    slide = write_textured_slide(tmp_path / "s.tif")
    whole = extract_slide(slide, ColorEncoder(), tmp_path / "bags" / "s.h5", mpp=0.499)
    export_bags(tmp_path / "bags", "clam", tmp_path / "clam", progress=False)
    import_bags(tmp_path / "clam", "clam", tmp_path / "again", progress=False)
    report = add_patches(tmp_path / "again", slide, mpp=0.499, progress=False)
    assert statuses(report) == {"s": "done"}
    filled = read_bag(tmp_path / "again" / "s.h5")
    np.testing.assert_array_equal(filled.rowcol, whole.rowcol - whole.rowcol.min(axis=0))
    # Half a pixel of the 16 in a patch's: the steps between tiles weigh up to 130 levels / 32 in their rim.
    assert np.abs(filled.patches.astype(int) - whole.patches).max() <= 5


def test_tiles_outside_of_the_slide_are_refused(tmp_path):
    slide = write_textured_slide(tmp_path / "s.tif")
    without_patches(slide, tmp_path)
    bag = read_bag(tmp_path / "bags" / "s.h5")
    far = np.array(bag.coords)
    far[0] = 50_000
    write_h5(
        tmp_path / "far" / "features_color" / "s.h5",
        {"patch_size_level0": 256},
        features=bag.features.astype(np.float32),
        coords=far,
    )
    import_bags(tmp_path / "far", "trident", tmp_path / "far" / "bags", progress=False)
    report = add_patches(tmp_path / "far" / "bags", slide, progress=False)
    assert "1 of its" in error_of(report, "s")
    assert "lie outside of" in error_of(report, "s")
    assert bag_info(tmp_path / "far" / "bags" / "s.h5")["n_tiles"] == len(bag)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level0_width": 99, "level0_height": 98}, "was made from a slide of 99 x 98 pixels"),
        ({"patch_size_level0": None}, "does not say how large its tiles are"),
    ],
)
def test_a_bag_that_does_not_fit_the_slide_is_named(tmp_path, changes, message):
    slide = write_textured_slide(tmp_path / "s.tif")
    without_patches(slide, tmp_path, **changes)
    assert message in run("add-patches", tmp_path / "bags", slide, code=1)


def test_a_bag_without_a_slide_is_named(tmp_path, bags):
    slide = write_textured_slide(tmp_path / "s.tif")
    without_patches(slide, tmp_path / "x")
    (tmp_path / "x" / "bags" / "s.h5").rename(tmp_path / "x" / "bags" / "t.h5")
    report = add_patches(tmp_path / "x" / "bags", slide, progress=False)
    assert "none of the slides is called t" in error_of(report, "t")
