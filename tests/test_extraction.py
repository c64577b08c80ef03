"""Slides to bags: only the asked tiles are read, runs resume, and failures are reported."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from model_factory import ColorEncoder, make_model, write_textured_slide
from slide_factory import INK, damage_tile, write_slide

from hdmil_lib.bags import EncoderIdentity, bag_info, read_bag, read_tile_labels
from hdmil_lib.encoders.encoding import encode_tiles
from hdmil_lib.encoders.extraction import extract, extract_slide, spread_tiles
from hdmil_lib.encoders.loading import load_encoder
from hdmil_lib.errors import BagError, CohortError, HDMILError, SlideError
from hdmil_lib.kernels.tile_preprocess import fit_reinhard
from hdmil_lib.slides import Slide, TileGrid, TileSettings
from hdmil_lib.slides.listing import slide_files
from hdmil_lib.synthetic.truth import tile_labels


class MeanColor:
    """An encoder whose features are known: the tile's mean color, then its corner pixel."""

    name, dim, weights_hash, engine, precision = "mean_color", 6, "0" * 12, "numpy", "fp32"
    batch_size = 32

    def __init__(self):
        self.batches = []

    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        self.batches.append(len(tiles))
        return np.concatenate([tiles.mean((1, 2)), tiles[:, 0, 0]], 1).astype(np.float32)


def make_slide(path, rows: int = 3, cols: int = 4, mpp=(0.5, 0.5)):
    """Tissue everywhere; each tile has a color of its own."""
    rng = np.random.default_rng(0)
    colors = INK.astype(int) + rng.integers(-30, 30, (rows, cols, 3))
    pixels = colors.astype(np.uint8).repeat(256, 0).repeat(256, 1)
    return write_slide(path, pixels, mpp, tile=256)


@pytest.fixture
def slide_path(tmp_path):
    (tmp_path / "slides").mkdir()
    return make_slide(tmp_path / "slides" / "a.tif")


@pytest.fixture
def opened(slide_path):
    with Slide(slide_path) as slide:
        yield slide, TileGrid.from_slide(slide)


@pytest.mark.parametrize("n_readers", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_features_stand_in_the_order_of_the_rows(opened, n_readers, batch_size):
    slide, grid = opened
    rows = [7, 0, 3, 11, 4, 5]
    encoder = MeanColor()
    features = encode_tiles(slide, grid, rows, encoder, batch_size=batch_size, n_readers=n_readers)
    expected = MeanColor()(np.stack([grid.read_tile(slide, row) for row in rows]))
    np.testing.assert_array_equal(features, expected)
    assert max(encoder.batches) <= batch_size
    assert sum(encoder.batches) == len(rows)
    assert len(np.unique(expected, axis=0)) == len(rows), "the tiles must differ for this to test anything"


def test_only_the_asked_tiles_are_read(opened, monkeypatch):
    slide, grid = opened
    read = []
    field = Slide.read_field
    monkeypatch.setattr(
        Slide, "read_field", lambda self, x, y, *rest: read.append((x, y)) or field(self, x, y, *rest)
    )
    encode_tiles(slide, grid, np.array([2, 9]), MeanColor())
    assert sorted(read) == sorted(map(tuple, grid.coords[[2, 9]].tolist()))


def test_tiles_for_int8_are_spread_over_the_slides(opened, slide_path):
    slide, grid = opened
    copy = slide_path.with_name("copy.tif")
    copy.write_bytes(slide_path.read_bytes())
    tiles = spread_tiles([slide_path, copy], n_tiles=7)
    expected = [grid.read_tile(slide, row) for row in (0, (len(grid) - 1) // 2, len(grid) - 1)]
    np.testing.assert_array_equal(tiles, expected + expected)
    assert len(spread_tiles([slide_path])) == len(grid)  # it has fewer than asked for


def test_no_rows_need_no_reading(opened):
    slide, grid = opened
    assert encode_tiles(slide, grid, [], MeanColor()).shape == (0, 6)


def test_reading_ahead_is_bounded():
    """A slow encoder must not let the readers fill the memory with tiles."""
    read, encoded, ahead = [0], [0], []
    lock = threading.Lock()

    class Grid:
        tile_size = 4

        def read_tile(self, slide, i, out):
            with lock:
                read[0] += 1
                ahead.append(read[0] - encoded[0])
            out[:] = 0

    class Slow(MeanColor):
        def __call__(self, tiles):
            time.sleep(0.005)
            with lock:
                encoded[0] += len(tiles)
            return super().__call__(tiles)

    encode_tiles(SimpleNamespace(name="s"), Grid(), range(200), Slow(), batch_size=4, n_readers=2)
    assert read[0] == 200
    assert max(ahead) <= 4 * (2 + 2)  # the batch being encoded, and n_readers + 1 read or waiting


def threads_that_work():
    """All threads but those that end with the process, such as that of progress bars."""
    return {thread for thread in threading.enumerate() if not thread.daemon}


@pytest.mark.parametrize("signal_", [KeyboardInterrupt, MemoryError])
def test_when_interrupted_no_thread_reads_on(slide_path, signal_):
    """The error is held, as notebooks do; readers must be gone before the slide is closed."""

    class Interrupted(MeanColor):
        def __call__(self, tiles):
            raise signal_

    before, read = threads_that_work(), []

    class Slow(TileGrid):
        def read_tile(self, slide, i, out):
            time.sleep(0.01)
            read.append(slide._file._slide._osr is not None)  # still open
            return super().read_tile(slide, i, out)

    with Slide(slide_path) as slide:
        grid = Slow(**vars(TileGrid.from_slide(slide)))
        with pytest.raises(signal_) as caught:
            encode_tiles(slide, grid, range(12), Interrupted(), batch_size=1, n_readers=2)
        assert threads_that_work() == before
        n_read = len(read)
    time.sleep(0.05)
    assert len(read) == n_read <= 4
    assert all(read)
    assert caught.value is not None


def test_the_seconds_of_both_stages_accumulate(opened):
    slide, grid = opened
    seconds = {"crop": 100.0, "other": 1.0}
    start = time.perf_counter()
    encode_tiles(slide, grid, range(12), MeanColor(), n_readers=0, seconds=seconds)
    spent = time.perf_counter() - start
    assert seconds["other"] == 1.0
    assert seconds["features"] > 0
    assert seconds["crop"] - 100 > 0
    assert seconds["crop"] - 100 < spent
    assert seconds["crop"] - 100 + seconds["features"] <= spent


def test_a_slide_becomes_a_bag_with_its_geometry(slide_path, tmp_path):
    bag = extract_slide(slide_path, MeanColor(), tmp_path / "bags" / "a.h5")
    with Slide(slide_path) as slide:
        grid = TileGrid.from_slide(slide)
        tiles = np.stack([grid.read_tile(slide, i) for i in range(len(grid))])
    np.testing.assert_array_equal(bag.features, MeanColor()(tiles).astype(np.float16))
    np.testing.assert_array_equal(bag.coords, grid.coords)
    np.testing.assert_array_equal(bag.rowcol, grid.rowcol)
    np.testing.assert_array_equal(bag.patches, grid.patches)
    assert bag.slide_id == "a"
    assert bag.shape == grid.shape == (3, 4)
    assert bag.encoder == EncoderIdentity("mean_color", "0" * 12)
    assert bag_info(tmp_path / "bags" / "a.h5")["encoder"] == "mean_color"
    assert bag.attrs["patch_size_level0"] == 256
    assert bag.attrs["level0_magnification"] == 20
    assert (bag.attrs["level0_width"], bag.attrs["level0_height"]) == (1024, 768)


def test_a_given_mpp_overrides_the_files(tmp_path):
    path = make_slide(tmp_path / "a.tif", mpp=None)
    with pytest.raises(SlideError, match="mpp="):
        extract_slide(path, MeanColor(), tmp_path / "a.h5")
    assert not (tmp_path / "a.h5").exists()
    bag = extract_slide(path, MeanColor(), tmp_path / "a.h5", mpp=0.25)
    assert len(bag) == 2
    assert bag.attrs["patch_size_level0"] == 512
    assert bag.attrs["mpp_x"] == 0.25


def test_tile_labels_are_stored(slide_path, tmp_path):
    """Here those of `synthetic.truth`: from the mask beside the slide, where there is one."""
    extract_slide(slide_path, MeanColor(), tmp_path / "without.h5", tile_labels=tile_labels)
    assert read_tile_labels(tmp_path / "without.h5") is None
    truth = np.zeros((48, 64), np.uint8)
    truth[0:16, 16:32] = 255  # tile (0, 1)
    truth[16:24, 0:16] = 255  # upper half of tile (1, 0)
    truth[32:48, 48:64] = 2  # tile (2, 3) is another class of a composed slide
    cv2.imwrite(str(slide_path.with_name("a.truth.png")), truth)
    extract_slide(slide_path, MeanColor(), tmp_path / "with.h5", tile_labels=tile_labels)
    expected = np.zeros(12, np.float32)
    expected[[1, 4]] = 1.0, 0.5
    np.testing.assert_array_equal(read_tile_labels(tmp_path / "with.h5"), expected)
    extract_slide(
        slide_path, MeanColor(), tmp_path / "composed.h5", tile_labels=partial(tile_labels, value=2)
    )
    np.testing.assert_array_equal(read_tile_labels(tmp_path / "composed.h5"), np.eye(12)[11])
    extract_slide(slide_path, MeanColor(), tmp_path / "not_asked.h5")
    assert read_tile_labels(tmp_path / "not_asked.h5") is None


def test_tile_labels_of_many_slides_are_asked_for_by_path(slide_path, tmp_path):
    other = make_slide(slide_path.with_name("b.tif"))
    shares = {"a": np.linspace(0, 1, 12, dtype=np.float32), "b": None}

    def labels(path, grid):
        assert path in (slide_path, other)
        assert len(grid) == 12
        return shares[path.stem]

    extract(slide_path.parent, MeanColor(), tmp_path, tile_labels=labels, progress=False)
    np.testing.assert_array_equal(read_tile_labels(tmp_path / "a.h5"), shares["a"])
    assert read_tile_labels(tmp_path / "b.h5") is None


def test_failures_are_reported_and_do_not_stop_the_run(slide_path, tmp_path):
    folder = slide_path.parent
    (folder / "text.svs").write_text("no slide")
    blank = write_slide(folder / "blank.tif", np.full((600, 600, 3), 255, np.uint8), tile=256)
    last = make_slide(folder / "z.tif", 1, 2)
    paths = [folder / "text.svs", slide_path, blank, folder / "absent.svs", last]
    table = extract(paths, MeanColor(), tmp_path / "bags", progress=False)
    assert table.slide_id.tolist() == ["text", "a", "blank", "absent", "z"]
    assert table.status.tolist() == ["failed", "done", "failed", "failed", "done"]
    assert table.n_tiles.tolist() == [0, 12, 0, 0, 2]
    for row in table[table.status == "failed"].itertuples():
        assert row.slide_id in row.error
    assert (table[table.status == "done"].error == "").all()
    assert sorted(p.name for p in (tmp_path / "bags").glob("*.h5")) == ["a.h5", "z.h5"]


def test_what_is_done_is_skipped_and_what_is_different_is_reported(slide_path, tmp_path):
    def run(encoder=None, **options):
        table = extract([slide_path], encoder or MeanColor(), tmp_path, progress=False, **options)
        return table.iloc[0]

    assert run().status == "done"
    before = (tmp_path / "a.h5").stat().st_mtime_ns
    again = run()
    assert (again.status, again.n_tiles) == ("skipped", 12)
    assert (tmp_path / "a.h5").stat().st_mtime_ns == before

    other = MeanColor()
    other.weights_hash = "f" * 12
    wide = run(tiles=TileSettings(128, 1.0))
    for changed in (run(other), run(min_tissue=0.5), run(mpp=0.4), wide):
        assert changed.status == "failed"
        assert "made with" in changed.error
        assert "another folder, or delete the bag" in changed.error
    assert run(other, overwrite=True).status == "done"
    assert bag_info(tmp_path / "a.h5")["weights_hash"] == "f" * 12


@pytest.mark.parametrize(("size", "mpp"), [(128, 1.0), (512, 0.5), (224, 0.5), (128, 0.7)])
def test_tiles_of_other_sizes_and_scales_are_recorded_and_repeated_by_prediction(tmp_path, size, mpp):
    path = write_textured_slide(tmp_path / "s.tif", 6, 7)
    tiles = TileSettings(size, mpp)
    bag = extract_slide(path, ColorEncoder(), tmp_path / "bags" / "s.h5", tiles=tiles)
    assert (bag.attrs["patch_size"], bag.attrs["tile_mpp"]) == (size, mpp)
    with Slide(path) as slide:
        fields = [slide.read_field(x, y, (size, size), mpp) for x, y in bag.coords.tolist()]
    np.testing.assert_array_equal(bag.features, ColorEncoder()(np.stack(fields)).astype("f2"))
    model = make_model()
    model.info = model.info.model_copy(update={"tile_size": size, "tile_mpp": mpp})
    prediction = model.predict(path, all_tiles=True, device="cpu")
    np.testing.assert_array_equal(prediction.coords, bag.coords)


def test_a_slide_that_is_much_coarser_than_its_tiles_is_refused_or_enlarged(tmp_path):
    make_slide(tmp_path / "10x.tif", 6, 8, mpp=(1.0, 1.0))
    make_slide(tmp_path / "0.55.tif", 3, 4, mpp=(0.55, 0.55))
    table = extract(tmp_path, MeanColor(), tmp_path / "bags", progress=False).set_index("slide_id")
    assert table.status.to_dict() == {"0.55": "done", "10x": "failed"}
    assert "enlarged 2.0 times" in table.error["10x"]
    assert "--allow-upsampling" in table.error["10x"]
    assert table.note["0.55"] == "tiles of 0.5 um/px are enlarged 1.10 times"
    for tiles, note in (
        (TileSettings(allow_upsampling=True), "tiles of 0.5 um/px are enlarged 2.00 times"),
        (TileSettings(mpp=1.0), ""),
    ):
        out = tmp_path / f"{tiles.mpp}"
        row = extract(tmp_path / "10x.tif", MeanColor(), out, tiles=tiles, progress=False).iloc[0]
        assert (row.status, row.note) == ("done", note)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("not a slide\nafter all"),
        ZeroDivisionError(),
        MemoryError(),
        AttributeError("no attribute"),
        RuntimeError("h5py"),
        UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"),
        OSError(28, "No space left on device"),
        RecursionError("too deep"),
        AssertionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_poison_slide_stops_no_other(slide_path, tmp_path, error):
    """Whatever is raised on a slide, and wherever: the row says so, and those after it are done."""
    last = make_slide(slide_path.with_name("z.tif"), 1, 2)

    class Poisoned(MeanColor):
        def __call__(self, tiles):
            if len(tiles) == 12:
                raise error
            return super().__call__(tiles)

    for _ in range(2):  # and on the next run
        table = extract([slide_path, last], Poisoned(), tmp_path / "bags", progress=False)
        assert table.slide_id.tolist() == ["a", "z"]
        assert table.status.tolist() in (["failed", "done"], ["failed", "skipped"])
        assert table.error[0].startswith(" ".join(str(error).split()) or type(error).__name__)
        assert [p.name for p in (tmp_path / "bags").glob("*.h5")] == ["z.h5"]
    assert extract([slide_path, last], MeanColor(), tmp_path / "bags", progress=False).status.tolist() == [
        "done",
        "skipped",
    ]


def test_a_poison_bag_or_labels_stop_no_other(slide_path, tmp_path):
    last = make_slide(slide_path.with_name("z.tif"), 1, 2)
    with h5py.File(tmp_path / "a.h5", "w") as file:  # HDF5, but no bag
        file.create_group("features")
    table = extract([slide_path, last], MeanColor(), tmp_path, progress=False)
    assert table.status.tolist() == ["failed", "done"]
    assert table.error[0]

    def poison(path, grid):
        return np.zeros(100 // (12 - len(grid)))

    table = extract([slide_path, last], MeanColor(), tmp_path / "b", tile_labels=poison, progress=False)
    assert table.status.tolist() == ["failed", "failed"]
    assert "division" in table.error[0]
    assert "same tiles" in table.error[1]


def test_a_name_that_is_not_utf_8_is_extracted_like_others(slide_path, tmp_path):
    odd = slide_path.with_name(os.fsdecode(b"a\xff.tif"))
    odd.write_bytes(slide_path.read_bytes())
    for status in ("done", "skipped"):
        table = extract([odd, slide_path], MeanColor(), tmp_path / "bags", progress=False)
        assert table.slide_id.tolist() == ["a\\xff", "a"]
        assert table.status.tolist() == [status, status]
    assert read_bag(tmp_path / "bags" / f"{odd.stem}.h5").slide_id == "a\\xff"
    odd.write_text("no slide any more")
    table = extract([odd], MeanColor(), tmp_path / "again", progress=False)
    assert table.status.tolist() == ["failed"]
    assert "a\\xff.tif" in table.error[0]


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_no_failure_of_a_slide(slide_path, tmp_path, ending):
    class Ending(MeanColor):
        def __call__(self, tiles):
            raise ending

    with pytest.raises(ending):
        extract([slide_path], Ending(), tmp_path / "bags", progress=False)


def test_several_encoders_share_the_slides_and_change_nothing(slide_path, tmp_path):
    """Two engines of PyTorch, each in a thread; a slide that fails stays the only one."""
    folder = slide_path.parent
    for i in range(5):
        make_slide(folder / f"b{i}.tif", 1 + i % 2, 2)
    (folder / "text.svs").write_text("no slide")
    first = load_encoder("efficientnet_lite0_random", device="cpu", engine="torch")
    encoders = [first, first.to("cpu")]
    used, threads = [[], []], torch.get_num_threads()
    for encoder, calls in zip(encoders, used, strict=True):
        encoder._run = CountedEngine(encoder._run, calls)
    table = extract(folder, encoders, tmp_path / "two", progress=False)
    assert all(used), "both had slides"
    assert len({thread for calls in used for thread in calls}) == 2
    assert torch.get_num_threads() == threads
    alone = extract(folder, first, tmp_path / "one", progress=False)
    pd.testing.assert_frame_equal(table.drop(columns="seconds"), alone.drop(columns="seconds"))
    assert table.slide_id.tolist() == ["a", "b0", "b1", "b2", "b3", "b4", "text"]
    assert table.status.tolist() == ["done"] * 6 + ["failed"]
    for name in table.slide_id[:6]:
        bags = [read_bag(tmp_path / out / f"{name}.h5") for out in ("one", "two")]
        np.testing.assert_array_equal(bags[0].features, bags[1].features)
        assert bags[0].attrs == bags[1].attrs
    again = extract(folder, encoders, tmp_path / "two", progress=False)
    assert again.status.tolist() == ["skipped"] * 6 + ["failed"]


class CountedEngine:
    """An engine that notes the threads of its calls, slow enough that another one gets slides too."""

    def __init__(self, engine, calls):
        self.engine, self.calls = engine, calls

    def __call__(self, tiles):
        self.calls.append(threading.get_ident())
        time.sleep(0.1)
        return self.engine(tiles)


def test_an_interrupt_ends_all_encoders(slide_path, tmp_path):
    """One is interrupted; the other ends with its slide."""
    paths = [slide_path, *(make_slide(slide_path.with_name(f"b{i}.tif"), 1, 2) for i in range(20))]

    class Interrupted(MeanColor):
        def __call__(self, tiles):
            raise KeyboardInterrupt

    class Slow(MeanColor):
        def __call__(self, tiles):
            time.sleep(0.05)
            return super().__call__(tiles)

    before = threads_that_work()
    with pytest.raises(KeyboardInterrupt):
        extract(paths, [Slow(), Interrupted()], tmp_path / "bags", progress=False)
    assert threads_that_work() == before
    assert len(list((tmp_path / "bags").glob("[!.]*"))) < 15


def test_several_encoders_must_be_copies_of_one(slide_path, tmp_path):
    other = MeanColor()
    other.weights_hash = "f" * 12
    with pytest.raises(HDMILError, match=r"2 encoders of 2 kinds; .*Encoder\.to"):
        extract([slide_path], [MeanColor(), other], tmp_path, progress=False)
    with pytest.raises(HDMILError, match="2 encoders of 1 kinds"):
        extract([slide_path], [other, other], tmp_path, progress=False)
    with pytest.raises(HDMILError, match="0 encoders"):
        extract([slide_path], [], tmp_path, progress=False)


def test_bags_with_and_without_a_stain_are_not_mixed(slide_path, tmp_path):
    rng = np.random.default_rng(0)
    stain = fit_reinhard(*rng.integers(60, 250, (2, 16, 16, 3), np.uint8))
    plain, normalized = (
        load_encoder("efficientnet_lite0_random", device="cpu", engine="torch", stain=s)
        for s in (None, stain)
    )
    for encoder, other in ((plain, normalized), (normalized, plain)):
        out = tmp_path / encoder.weights_hash
        for status in ("done", "skipped"):
            assert extract([slide_path], encoder, out, progress=False).status[0] == status
        row = extract([slide_path], other, out, progress=False).iloc[0]
        assert row.status == "failed"
        assert "made with weights_hash" in row.error


def test_bags_of_earlier_versions_were_decoded_by_the_cpu(slide_path, tmp_path):
    """They do not say so."""
    extract([slide_path], MeanColor(), tmp_path, progress=False)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        del file.attrs["decoder"], file.attrs["decoded_by"], file.attrs["attrs_sha256"]
        file.attrs["schema_version"] = 2
    assert extract([slide_path], MeanColor(), tmp_path, progress=False).status[0] == "skipped"
    other = MeanColor()
    other.decoder = "nvjpeg"
    assert "made with decoder 'cpu'" in extract([slide_path], other, tmp_path, progress=False).error[0]


def test_an_output_that_is_a_file_fails_before_anything_is_encoded(slide_path, tmp_path):
    (tmp_path / "bags").write_text("notes")
    encoder = MeanColor()
    for out in (tmp_path / "bags", tmp_path / "bags" / "deeper"):
        with pytest.raises(BagError, match=f"{out}: cannot be a folder"):
            extract([slide_path], encoder, out, progress=False)
    assert encoder.batches == []
    assert (tmp_path / "bags").read_text() == "notes"


def test_slides_are_found_in_files_folders_and_tables(slide_path, tmp_path):
    other = make_slide(slide_path.with_name("B.TIF"), 1, 2)
    (slide_path.parent / "notes.txt").write_text("no slide")
    (tmp_path / "labels.csv").write_text("slide_id,path\na,slides/a.tif\nb,\nc,slides/absent.svs\n")
    absent = tmp_path / "slides" / "absent.svs"
    assert slide_files(slide_path.parent) == [other, slide_path]
    assert slide_files(str(slide_path)) == [slide_path]
    assert slide_files(tmp_path / "labels.csv") == [slide_path, absent]
    assert slide_files([slide_path, tmp_path / "labels.csv", slide_path.parent]) == [
        slide_path,
        absent,
        other,
    ]
    table = extract(tmp_path / "labels.csv", MeanColor(), tmp_path / "bags", progress=False)
    assert table.status.tolist() == ["done", "failed"]


def test_sources_without_slides_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_path.csv").write_text("slide_id,file\na,a.svs\n")
    (tmp_path / "no_rows.csv").write_text("path\n")
    with pytest.raises(SlideError, match="empty: no slides in it; known suffixes are .svs"):
        slide_files(tmp_path / "empty")
    with pytest.raises(SlideError, match="no_rows.csv: no slides"):
        slide_files(tmp_path / "no_rows.csv")
    with pytest.raises(SlideError, match="no slides are named"):
        slide_files([])
    with pytest.raises(CohortError, match="no_path.csv: missing column path; it has slide_id, file"):
        slide_files(tmp_path / "no_path.csv")
    with pytest.raises(CohortError, match="absent.csv: no such label file"):
        slide_files(tmp_path / "absent.csv")


def test_a_damaged_bag_is_reported(slide_path, tmp_path):
    (tmp_path / "a.h5").write_bytes(b"half a bag")
    row = extract([slide_path], MeanColor(), tmp_path, progress=False).iloc[0]
    assert row.status == "failed"
    assert "Delete the file" in row.error


def test_slides_of_one_name_are_refused(tmp_path):
    with pytest.raises(BagError, match="called 'a'"):
        extract([tmp_path / "x" / "a.svs", tmp_path / "y" / "a.tif"], MeanColor(), tmp_path)


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from test_extraction import MeanColor, extract
class Slow(MeanColor):
    def __call__(self, tiles):
        print("encoding", flush=True)
        time.sleep(0.2)
        return super().__call__(tiles)
extract({paths!r}, Slow(), {out!r}, batch_size=3, progress=False)
"""


def test_a_killed_run_leaves_whole_bags_and_is_resumed(slide_path, tmp_path):
    paths = [str(slide_path), str(make_slide(slide_path.with_name("b.tif")))]
    out = tmp_path / "bags"
    code = KILLED.format(tests=str(Path(__file__).parent), paths=paths, out=str(out))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for _ in range(4 + 2):  # four batches a slide: killed within the second slide
        assert process.stdout.readline() == "encoding\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [p.name for p in out.glob("[!.]*")] == ["a.h5"]
    assert len(read_bag(out / "a.h5")) == 12
    table = extract(paths, MeanColor(), out, progress=False)
    assert table.status.tolist() == ["skipped", "done"]
    assert len(read_bag(out / "b.h5")) == 12


def test_a_real_slide_with_the_default_encoder(real_data, tmp_path):
    encoder = load_encoder(device="cpu", engine="torch")
    bag = extract_slide(real_data / "cmu_small_region.svs", encoder, tmp_path / "cmu.h5")
    assert bag.features.shape == (len(bag), 320)
    assert len(bag) > 20
    assert bag.attrs["level0_magnification"] == 20
    with Slide(real_data / "cmu_small_region.svs") as slide:
        grid = TileGrid.from_slide(slide)
        alone = encoder(grid.read_tile(slide, 5)[None])[0]
    # stored as float16: 2^-11 relative
    np.testing.assert_allclose(bag.features[5], alone, rtol=1e-3, atol=1e-4)


# Broken tiles, failed slides, changed slides


@pytest.fixture
def broken_path(tmp_path):
    """A JPEG slide of 60 tiles, of which two are damaged at every level that has them alone."""
    rng = np.random.default_rng(0)
    pixels = (INK.astype(int) + rng.integers(-30, 30, (6, 10, 3))).astype(np.uint8)
    whole = write_slide(
        tmp_path / "whole.tif",
        pixels.repeat(256, 0).repeat(256, 1),
        tile=256,
        pyramid=False,
        compression="jpeg",
    )
    return damage_tile(whole, tmp_path / "broken.tif", [7, 33])


def test_broken_tiles_are_left_out_and_counted(broken_path, tmp_path):
    """The file has one level: neither tile nor thumbnail can be read there."""
    table = extract([broken_path], MeanColor(), tmp_path / "bags", progress=False)
    assert table[["status", "n_tiles", "n_broken"]].values.tolist() == [["done", 58, 2]]
    bag, whole = read_bag(tmp_path / "bags/broken.h5"), read_bag(write_whole_bag(tmp_path))
    assert bag.attrs["n_broken"] == 2
    kept = np.isin(np.arange(60), [7, 33], invert=True)
    for name in ("features", "coords", "rowcol", "patches"):
        np.testing.assert_array_equal(getattr(bag, name), getattr(whole, name)[kept])
    again = extract([broken_path], MeanColor(), tmp_path / "bags", progress=False).iloc[0]
    assert (again.status, again.n_broken, again.tried) == ("skipped", 2, False)


def write_whole_bag(folder):
    extract_slide(folder / "whole.tif", MeanColor(), folder / "whole.h5")
    return folder / "whole.h5"


def test_a_level_that_is_damaged_is_replaced_by_finer_ones(slide_path, tmp_path):
    """Only tiles of level 0 are lost for the bag; labels are those of the tiles that are left."""
    path = damage_tile(slide_path, tmp_path / "b.tif", [5])
    labels = np.linspace(0, 1, 12, dtype=np.float32)
    bag = extract_slide(path, MeanColor(), tmp_path / "b.h5", tile_labels=lambda *_: labels)
    if bag.attrs["n_broken"]:  # packbits may decode to something
        np.testing.assert_array_equal(read_tile_labels(tmp_path / "b.h5"), np.delete(labels, 5))


@pytest.mark.parametrize("max_broken", [0, 0.03])
def test_more_broken_tiles_than_allowed_fail_the_slide(broken_path, tmp_path, max_broken):
    row = extract([broken_path], MeanColor(), tmp_path / "b", progress=False, max_broken=max_broken).iloc[0]
    assert row.status == "failed"
    expected = "2 of 60 tiles cannot be read, more than" if max_broken else "no JPEG stream"
    assert expected in row.error
    extract([broken_path], MeanColor(), tmp_path / "b", progress=False)
    row = extract([broken_path], MeanColor(), tmp_path / "b", progress=False, max_broken=max_broken).iloc[0]
    assert "without 2 tiles that could not be read" in row.error


def test_a_broken_look_takes_the_tile_with_it(slide_path, tmp_path, monkeypatch):
    encoder = MeanColor()
    encoder.at = lambda side: encoder
    read = TileGrid.read_tile

    def fail(self, slide, i, out=None):
        if self.tile_size == 64 and i == 3:
            raise SlideError("damaged")
        return read(self, slide, i, out)

    monkeypatch.setattr(TileGrid, "read_tile", fail)
    bag = extract_slide(slide_path, encoder, tmp_path / "a.h5", looks=[64])
    assert (len(bag), len(bag.looks[64]), bag.attrs["n_broken"]) == (11, 11, 1)
    assert [1, 0] in bag.rowcol.tolist()
    assert [0, 3] not in bag.rowcol.tolist()


def test_what_failed_is_not_tried_again_unless_asked_or_changed(slide_path, tmp_path, monkeypatch):
    bad, out = slide_path.with_name("bad.svs"), tmp_path / "bags"
    bad.write_text("no slide")
    first = extract(slide_path.parent, MeanColor(), out, progress=False)
    assert first.tried.tolist() == [True, True]
    opened = []
    init = Slide.__init__
    monkeypatch.setattr(
        Slide, "__init__", lambda self, path, *a, **k: opened.append(path) or init(self, path, *a, **k)
    )
    second = extract(slide_path.parent, MeanColor(), out, progress=False)
    assert opened == []
    assert second.status.tolist() == ["skipped", "failed"]
    assert second.error.tolist() == first.error.tolist()
    assert second.tried.tolist() == [False, False]

    assert extract([bad], MeanColor(), out, progress=False, retry_failed=True).tried[0]
    assert extract([bad], MeanColor(), out, progress=False, min_tissue=0.1).tried[0]
    (out / "failed" / "bad.json").write_text("{")
    assert extract([bad], MeanColor(), out, progress=False).tried[0]
    bad.write_bytes(slide_path.read_bytes())
    assert extract([bad], MeanColor(), out, progress=False).status[0] == "done"
    assert list((out / "failed").iterdir()) == []


def test_a_slide_that_was_replaced_is_noticed(slide_path, tmp_path):
    def run():
        return extract([slide_path], MeanColor(), tmp_path, progress=False).iloc[0]

    assert run().status == "done"
    os.utime(slide_path, (0, 0))
    assert run().status == "skipped"
    content = bytearray(slide_path.read_bytes())
    make_slide(slide_path, 3, 5)
    assert "the slide has changed since" in run().error
    slide_path.write_bytes(content)
    assert run().status == "skipped"
    slide_path.unlink()
    assert run().status == "skipped"


def test_an_old_leftover_of_a_killed_run_is_removed(slide_path, tmp_path):
    leftover = tmp_path / ".hdmil-0123456789ab.h5"
    leftover.touch()
    os.utime(leftover, (0, 0))
    extract([slide_path], MeanColor(), tmp_path, progress=False)
    assert not leftover.exists()
