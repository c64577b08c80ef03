"""Runs that survive kills, full disks and broken slides, and `hdmil check`, which says what is whole."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bag_factory import make_bag
from slide_factory import damage_tile, write_slide
from test_extraction import MeanColor, make_slide
from typer.testing import CliRunner

from hdmil_lib.bags import read_bag, write_bag
from hdmil_lib.checking import check_files
from hdmil_lib.cli import app
from hdmil_lib.encoders.extraction import extract
from hdmil_lib.encoders.failures import read_failure
from hdmil_lib.errors import HDMILError
from hdmil_lib.storage import TEMPORARY

TESTS = str(Path(__file__).parent)

RUN = f"""
import sys
sys.path.insert(0, {TESTS!r})
from test_extraction import MeanColor
from hdmil_lib.encoders.extraction import extract
print("ready", flush=True)
table = extract(sys.argv[1], MeanColor(), sys.argv[2], progress=False)
print(",".join(table.status), *table.error)
"""

KILLED = """
import os, signal, sys
from pathlib import Path
left = int(sys.argv[3])

def step():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def hook(event, args):
    if event in ("open", "os.rename", "os.chmod") and ".hdmil-" in str(args[0]):
        step()

def write_half(self, content, write=Path.write_bytes):
    write(self, content[: len(content) // 2])
    step()
    return write(self, content)

Path.write_bytes = write_half
sys.addaudithook(hook)
"""
"""Ends the process at a step of its writes: as a file is opened, half written or renamed."""


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Twelve small slides and the bags of an undisturbed run."""
    folder = tmp_path_factory.mktemp("cohort")
    (folder / "slides").mkdir()
    for i in range(12):
        make_slide(folder / "slides" / f"s{i:02d}.tif", 1 + i % 3, 2)
    extract(folder / "slides", MeanColor(), folder / "whole", progress=False)
    return folder


def check_equal(bags: Path, whole: Path) -> None:
    names = sorted(path.name for path in bags.glob("[!.]*.h5"))
    for name in names:
        one, other = read_bag(bags / name), read_bag(whole / name)
        np.testing.assert_array_equal(one.features, other.features)
        np.testing.assert_array_equal(one.patches, other.patches)
        assert one.attrs == other.attrs


def test_kills_at_random_moments_lose_nothing(cohort, tmp_path):
    """What is there after each kill is whole, and stays as it is; the last run completes the rest."""
    rng, seen = np.random.default_rng(0), {}
    for step in rng.integers(1, 25, 5):
        command = [sys.executable, "-c", KILLED + RUN, cohort / "slides", tmp_path, str(step)]
        assert subprocess.run(command, capture_output=True, check=False).returncode in (-9, 0)
        assert len(list(tmp_path.glob("[!.]*.h5"))) >= len(seen)
        check_equal(tmp_path, cohort / "whole")
        for path, content in seen.items():
            assert path.read_bytes() == content
        seen = {path: path.read_bytes() for path in tmp_path.glob("[!.]*.h5")}
        for path in tmp_path.glob(".hdmil-*"):
            assert TEMPORARY.fullmatch(path.name)
            os.utime(path, (0, 0))
    assert seen, "the kills came after some bags"
    table = extract(cohort / "slides", MeanColor(), tmp_path, progress=False)
    assert set(table.status) <= {"done", "skipped"}
    check_equal(tmp_path, cohort / "whole")
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == [f"s{i:02d}.h5" for i in range(12)]


def test_a_disk_that_fills_up_leaves_whole_bags_and_the_run_goes_on_later(cohort, tmp_path):
    """A limit between the sizes of the bags stands for the disk: it lets small ones through."""
    sizes = sorted(path.stat().st_size for path in (cohort / "whole").glob("*.h5"))
    limit = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({sizes[5]}, {sizes[5]}))
"""
    command = [sys.executable, "-c", limit + RUN, cohort / "slides", tmp_path]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "failed" in printed
    assert "make room or choose another place" in printed
    n_done = len(list(tmp_path.glob("[!.]*.h5")))
    assert 0 < n_done < 12
    assert n_done == len(list(tmp_path.glob("[!.]*"))), (
        "no partial file, and a full disk is no reason to remember"
    )
    table = extract(cohort / "slides", MeanColor(), tmp_path, progress=False)
    assert (table.status == "done").sum() == 12 - n_done
    check_equal(tmp_path, cohort / "whole")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no program `mount`")
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_extract_onto_a_full_disk_does_what_fits_and_the_next_run_the_rest(cohort, small_disk):
    bags, filler = small_disk / "bags", small_disk / "filler"
    with filler.open("wb") as file:
        room = os.statvfs(small_disk)
        file.write(bytes(room.f_bavail * room.f_frsize - 150_000))
    code = "from hdmil_lib.cli import main; main()"
    command = [sys.executable, "-c", code, "extract", cohort / "slides", "--out", bags, "--encoder", "color"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 1
    done = {path.name: path.read_bytes() for path in bags.glob("[!.]*.h5")}
    assert 0 < len(done) < 12
    said = [line for line in (first.stdout + first.stderr).splitlines() if "No space left on device" in line]
    assert 1 <= len(said) <= 12 - len(done)
    for line in said:
        assert f"{bags}/" in line
        assert "make room or choose another place, and start again: what is finished is kept" in line
    assert "Traceback" not in first.stderr
    assert [path for path in bags.rglob(".hdmil-*") if path.is_file()] == []
    assert {found.state for found in check_files(bags)} == {"ok"}

    filler.unlink()
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert f"skipped: {len(done)} slides" in second.stdout
    assert f"done: {12 - len(done)} slides" in second.stdout
    assert len(list(bags.glob("[!.]*.h5"))) == 12
    for name, content in done.items():
        assert (bags / name).read_bytes() == content
    assert {found.state for found in check_files(bags)} == {"ok"}


def huge_header(path: Path) -> Path:
    """A tiled TIFF that says that it has 2^31 - 1 pixels along each side."""
    side = 2**31 - 1
    tags = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [(277, 3, 1, 1), (322, 4, 1, 2**20), (323, 4, 1, 2**20), (324, 4, 1, 8), (325, 4, 1, 8)]
    body = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4))
    return path


def test_a_folder_with_many_broken_slides_gives_all_good_bags_and_a_reason_for_each(tmp_path, monkeypatch):
    slides = tmp_path / "slides"
    slides.mkdir()
    for i in range(5):
        whole = make_slide(slides / f"good{i}.tif", 2, 3)
    content = whole.read_bytes()
    (slides / "empty.svs").touch()
    (slides / "truncated.tif").write_bytes(content[: len(content) // 3])
    (slides / "text.svs").write_text("slide_id,label\n")
    make_slide(slides / "no_scale.tif", mpp=None)
    make_slide(slides / "absurd_scale.tif", mpp=(0.01, 0.01))
    write_slide(slides / "no_tissue.tif", np.full((600, 600, 3), 255, np.uint8), tile=256)
    closed = make_slide(slides / "closed.tif")
    (slides / "dangling.svs").symlink_to(tmp_path / "away.svs")
    (slides / "folder.svs").mkdir()
    rng = np.random.default_rng(0)
    noise = rng.integers(60, 200, (768, 1024, 3)).astype(np.uint8)
    jpeg = write_slide(tmp_path / "jpeg.tif", noise, tile=256, compression="jpeg", pyramid=False)
    damage_tile(jpeg, slides / "damaged.tif", range(6))
    huge_header(slides / "huge.tif")
    broken = ["absurd_scale", "closed", "damaged", "dangling", "empty", "folder", "huge"]
    broken += ["no_scale", "no_tissue", "text", "truncated"]
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and access(path, mode))
    table = extract(slides, MeanColor(), tmp_path / "bags", progress=False)
    failed = table[table.status == "failed"]
    assert sorted(failed.slide_id) == broken
    assert sorted(path.stem for path in (tmp_path / "bags").glob("*.h5")) == [f"good{i}" for i in range(5)]
    for row in failed.itertuples():
        assert row.slide_id in row.error
        assert len(row.error.splitlines()) == 1
        assert "Error(" not in row.error
    kept = {path.stem: read_failure(path).reason for path in (tmp_path / "bags/failed").iterdir()}
    assert kept == dict(zip(failed.slide_id, failed.error, strict=True))

    again = extract(slides, MeanColor(), tmp_path / "bags", progress=False)
    assert again.error.tolist() == table.error.tolist()
    assert not again.tried.any()
    (slides / "dangling.svs").unlink()
    make_slide(slides / "dangling.svs")
    monkeypatch.undo()
    third = extract(slides, MeanColor(), tmp_path / "bags", progress=False)
    assert third[third.tried][["slide_id", "status"]].values.tolist() == [["dangling", "done"]]
    retried = extract(slides, MeanColor(), tmp_path / "bags", progress=False, retry_failed=True)
    assert sorted(retried[retried.tried & (retried.status == "done")].slide_id) == ["closed"]
    assert {found.state for found in check_files(tmp_path / "bags")} == {"ok"}


# hdmil check


def states(folder: Path) -> dict[str, str]:
    return {str(found.path.relative_to(folder)): found.state for found in check_files(folder)}


def test_check_tells_whole_damaged_and_unfinished_files_apart(tmp_path):
    for name in "abc":
        write_bag(tmp_path / "bags" / f"{name}.h5", make_bag(name, 1))
    damaged = tmp_path / "bags/b.h5"
    content = bytearray(damaged.read_bytes())
    place = content.index(read_bag(damaged).patches.tobytes()[:64])
    content[place] ^= 1
    damaged.write_bytes(content)
    (tmp_path / "bags/.hdmil-0123456789ab.h5").touch()
    (tmp_path / "bags/failed").mkdir()
    (tmp_path / "bags/failed/x.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    rows = {"slide_id": ["a", "b"], "p_x": [0.25, 0.5], "p_y": [0.75, 0.5], "error": ["", ""]}
    pd.DataFrame(rows).to_csv(tmp_path / "good.csv", index=False)
    pd.DataFrame(rows | {"p_x": [0.25, 0.9]}).to_csv(tmp_path / "bad.csv", index=False)
    pd.DataFrame(rows | {"slide_id": ["a", "a"]}).to_csv(tmp_path / "twice.csv", index=False)
    assert states(tmp_path) == {
        "bad.csv": "damaged",
        "bags/.hdmil-0123456789ab.h5": "unfinished",
        "bags/a.h5": "ok",
        "bags/b.h5": "damaged",
        "bags/c.h5": "ok",
        "bags/failed/x.json": "damaged",
        "good.csv": "ok",
        "twice.csv": "damaged",
    }


def test_the_command_exits_with_1_and_prints_no_escape_sequences(tmp_path):
    write_bag(tmp_path / "a.h5", make_bag("a", 1))
    result = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert (result.exit_code, result.output) == (0, "1 ok, 0 damaged, 0 unfinished, 0 unreadable\n")
    (tmp_path / "\x1b[31mred\n.h5").write_text("no bag")
    result = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert result.exit_code == 1
    assert "\x1b" not in result.output
    assert r"damaged    bag" in result.output
    assert r"\x1b[31mred\n.h5" in result.output
    assert CliRunner().invoke(app, ["check", str(tmp_path / "absent")]).exit_code == 1


def test_check_of_a_place_that_is_not_there(tmp_path):
    with pytest.raises(HDMILError, match="no such file or folder"):
        list(check_files(tmp_path / "absent"))
