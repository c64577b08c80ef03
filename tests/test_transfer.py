"""Downloads: what a server may do wrong, and that the file is whole and right at the end, or not there."""

import hashlib

import numpy as np
import pytest
from bucket_server import serve_bucket

from hdmil_lib.errors import CohortError
from hdmil_lib.public import transfer
from hdmil_lib.public.buckets import list_bucket
from hdmil_lib.public.transfer import Client, RemoteFile, Stopped, check_content

CONTENT = np.random.default_rng(0).bytes(3_000_000)


@pytest.fixture
def bucket():
    with serve_bucket() as bucket:
        bucket.files["a/slide.tif"] = CONTENT
        yield bucket


@pytest.fixture
def client():
    return Client(pause=0.001)


def remote_of(bucket) -> RemoteFile:
    return list_bucket(Client(), bucket.url, "a/")["a/slide.tif"]


@pytest.mark.parametrize(
    "faults",
    [
        [],
        ["503", "429", "redirect"],
        ["drop", "stall", "drop", "503", "drop"],
        ["drop", "whole"],
        ["drop", "other range"],
        ["drop", "416"],
        ["wrong"],
        ["drop", "wrong"],
        ["short"],
        ["long"],
        ["drop"] * 9,
    ],
    ids=" ".join,
)
def test_a_file_is_whole_and_right_whatever_the_server_does_first(bucket, client, tmp_path, faults):
    bucket.faults["a/slide.tif"] = faults
    arrived = []
    path = tmp_path / "new" / "slide.tif"
    assert client.download(remote_of(bucket), path, arrived.append) == "etag"
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == ["slide.tif"]
    assert sum(arrived) == len(CONTENT)


def test_an_interrupted_download_goes_on_from_where_it_stopped(bucket, client, tmp_path):
    path = tmp_path / "slide.tif"
    bucket.faults["a/slide.tif"] = ["drop", *["503"] * 6]
    with pytest.raises(CohortError, match="503.*try again later"):
        client.download(remote_of(bucket), path)
    assert not path.exists()
    kept = (tmp_path / "slide.tif.part").stat().st_size
    assert 0 < kept < len(CONTENT)
    bucket.ranges.clear()
    client.download(remote_of(bucket), path)
    assert bucket.ranges == [f"bytes={kept}-"]
    assert path.read_bytes() == CONTENT


def test_a_part_that_is_too_long_is_begun_again(bucket, client, tmp_path):
    (tmp_path / "slide.tif.part").write_bytes(CONTENT + b"more")
    client.download(remote_of(bucket), tmp_path / "slide.tif")
    assert (tmp_path / "slide.tif").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (["404"], "404"),
        (["403"], "403"),
        (["wrong", "wrong"], "another checksum.*twice"),
        (["stall"] * 6, "Connection broken.*try again later"),
        (["long"] * 6, "more bytes arrived"),
    ],
)
def test_what_stays_wrong_is_an_error_and_no_file(bucket, client, tmp_path, faults, message):
    bucket.faults["a/slide.tif"] = faults
    with pytest.raises(CohortError, match=message):
        client.download(remote_of(bucket), tmp_path / "slide.tif")
    assert not (tmp_path / "slide.tif").exists()


def test_a_server_that_is_not_there_is_named(client):
    with pytest.raises(CohortError, match=r"http://127.0.0.1:1/: cannot be downloaded \(.*refused"):
        client.read("http://127.0.0.1:1/")


def test_downloads_end_when_they_are_stopped(bucket, client, tmp_path):
    with pytest.raises(Stopped):
        client.download(remote_of(bucket), tmp_path / "slide.tif", lambda n: client.stop())
    assert (tmp_path / "slide.tif.part").stat().st_size < len(CONTENT)


def test_a_full_disk_names_the_file_and_keeps_what_was_written(bucket, client, tmp_path):
    (tmp_path / "slide.tif.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*slide.tif.part"):
        client.download(remote_of(bucket), tmp_path / "slide.tif")
    assert not (tmp_path / "slide.tif").exists()


def test_an_empty_file_is_a_file(bucket, client, tmp_path):
    bucket.files["a/slide.tif"] = b""
    client.download(remote_of(bucket), tmp_path / "slide.tif")
    assert (tmp_path / "slide.tif").read_bytes() == b""


def test_a_file_is_compared_with_the_sum_that_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "PART_SIZES", (1000, 1024, 2000))
    content = CONTENT[:2500]
    path = tmp_path / "file"
    path.write_bytes(content)
    md5 = hashlib.md5(content).hexdigest()
    parts = b"".join(hashlib.md5(content[i : i + 1024]).digest() for i in range(0, 2500, 1024))
    of_parts = f"{hashlib.md5(parts).hexdigest()}-3"
    unknown = f"{hashlib.md5(b'x').hexdigest()}-7"
    other = hashlib.md5(b"other").hexdigest()
    for remote, expected in [
        (RemoteFile("", 2500, md5=md5.upper()), "md5"),
        (RemoteFile("", 2500, etag=unknown, md5=other), None),
        (RemoteFile("", 2500, etag=md5), "etag"),
        (RemoteFile("", 2500, etag=other), None),
        (RemoteFile("", 2500, etag=of_parts), "etag"),
        (RemoteFile("", 2500, etag=unknown), "size"),
        (RemoteFile("", 2500), "size"),
        (RemoteFile("", 2501), None),
    ]:
        assert check_content(path, remote) == expected


def test_lists_have_several_pages_and_odd_names(bucket, client):
    names = [f"b/{name}" for name in ("a&b.tif", "c d.tif", "e+f.tif", "ü.tif", "z.tif")]
    bucket.files |= dict.fromkeys(names, b"12345")
    files = list_bucket(client, bucket.url, "b/")
    assert list(files) == sorted(names)
    for key, remote in files.items():
        assert remote.size == 5
        assert client.read(remote.url) == bucket.files[key]


@pytest.mark.parametrize(
    "answer",
    [b"<html>", b"", b"<a><Contents><Key>k</Key></Contents></a>", b"<a><Contents><Key>k</Key><Size>x</Size>"],
)
def test_an_answer_that_is_no_list_is_refused(bucket, client, answer, monkeypatch):
    monkeypatch.setattr(bucket, "listing", lambda prefix, token: answer)
    with pytest.raises(CohortError, match="no list of a bucket"):
        list_bucket(client, bucket.url, "b/")


def test_a_document_without_end_is_refused(bucket, client, monkeypatch):
    monkeypatch.setattr(transfer, "LARGEST_DOCUMENT", 1_000_000)
    with pytest.raises(CohortError, match="is larger than"):
        client.read(f"{bucket.url}a/slide.tif")
