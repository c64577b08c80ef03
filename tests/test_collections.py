"""Collections of tiles: downloaded from a local server, checked, and unpacked whole or not at all."""

import gzip
import hashlib
import http.server
import io
import threading
import zipfile
from dataclasses import replace
from functools import partial

import h5py
import numpy as np
import pytest
from PIL import Image

from hdmil_lib.errors import CohortError
from hdmil_lib.synthetic import collections
from hdmil_lib.synthetic.collections import SOURCES, fetch_tiles
from hdmil_lib.synthetic.composed import COLLECTIONS, collection_in

NCT = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An HTTP server of small files of the same layout as the collections': its URL."""
    monkeypatch.setenv("HDMIL_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 96, 96, 3), np.uint8)
    labels = (np.arange(40) % 4 == 0).astype(np.uint8).reshape(-1, 1, 1, 1)
    contents = {}
    for key, name, values in (("x", "train_x", pixels), ("y", "train_y", labels)):
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            file[key] = values
        contents["pcam", f"camelyonpatch_level_2_split_{name}.h5.gz"] = gzip.compress(buffer.getvalue())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("CRC-VAL-HE-7K/README.txt", "no tile")
        for label in NCT:
            for i in range(5):
                tile = io.BytesIO()
                Image.fromarray(pixels[i]).save(tile, "TIFF")
                archive.writestr(f"CRC-VAL-HE-7K/{label}/../{label}/{label}-{i}.tif", tile.getvalue())
    contents["nct-7k", "CRC-VAL-HE-7K.zip"] = buffer.getvalue()
    for (name, file), content in contents.items():
        path = folder / SOURCES[name].folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        sums = {**SOURCES[name].files, file: hashlib.md5(content).hexdigest()}
        monkeypatch.setitem(SOURCES, name, replace(SOURCES[name], files=sums))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/", pixels, folder
        httpd.shutdown()


def test_hdf5_files_become_a_folder_per_class(server, tmp_path):
    url, pixels, _ = server
    out = fetch_tiles("pcam", tmp_path / "tiles", per_class=7, base_url=url, progress=False)
    found = {folder.name: sorted(folder.iterdir()) for folder in out.iterdir()}
    assert {label: len(paths) for label, paths in found.items()} == {"0": 7, "1": 7}
    for label, paths in found.items():
        for path in paths:
            row = int(path.stem.removeprefix("patch"))
            assert (row % 4 == 0) == (label == "1")
            np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels[row])
    assert collection_in(out) is COLLECTIONS["pcam"]


def test_a_zip_becomes_a_folder_per_class(server, tmp_path):
    out = fetch_tiles("nct-7k", tmp_path / "tiles", per_class=4, base_url=server[0], progress=False)
    assert {folder.name: len(list(folder.iterdir())) for folder in out.iterdir()} == dict.fromkeys(NCT, 4)
    assert {path.name for path in tmp_path.iterdir()} == {"tiles", "cache", "served"}
    assert collection_in(out) is COLLECTIONS["nct"]


def test_a_download_is_kept(server, tmp_path):
    url, _, folder = server
    fetch_tiles("nct-7k", tmp_path / "a", base_url=url, progress=False)
    for path in folder.rglob("*.zip"):
        path.unlink()
    assert fetch_tiles("nct-7k", tmp_path / "b", base_url=url, progress=False).is_dir()


@pytest.mark.parametrize("what", ["other content", "cut off", "absent"])
def test_a_damaged_download_leaves_nothing(server, tmp_path, what):
    url, _, folder = server
    path = next(folder.rglob("*.zip"))
    if what == "absent":
        path.unlink()
    else:
        path.write_bytes(b"other" if what == "other content" else path.read_bytes()[:-100])
    with pytest.raises(CohortError, match="cannot be downloaded"):
        fetch_tiles("nct-7k", tmp_path / "tiles", base_url=url, progress=False)
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", "served"}


def test_an_interruption_leaves_no_folder(server, tmp_path, monkeypatch):
    def interrupted(paths, per_class):
        yield "TUM", "a.tif", lambda path: path.write_bytes(b"x")
        raise KeyboardInterrupt

    monkeypatch.setattr(collections, "_unpack_zip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_tiles("nct-7k", tmp_path / "tiles", base_url=server[0], progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "served"}


def test_what_cannot_be_fetched_is_refused(tmp_path):
    with pytest.raises(CohortError, match="did you mean 'pcam'"):
        fetch_tiles("pcan", tmp_path / "a")
    with pytest.raises(CohortError, match="exists already"):
        fetch_tiles("pcam", tmp_path)
    with pytest.raises(CohortError, match="per_class"):
        fetch_tiles("pcam", tmp_path / "a", per_class=0)
