"""Tiles decoded in batches: the same fields, few calls, and a bad tile, file or decoder spoils nothing.

nvImageCodec itself decodes on a CPU too, without a driver, and then by libjpeg-turbo: where it is installed
the tests run with it. Everywhere else a stand-in with its calls decodes by imagecodecs. What nvJPEG makes of
the streams is seen on a GPU alone.
"""

import sys
from types import SimpleNamespace

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slide_factory import damage_tile, write_slide

from hdmil_lib.bags import read_bag
from hdmil_lib.encoders.encoding import encode_tiles
from hdmil_lib.encoders.extraction import extract, extract_slide
from hdmil_lib.encoders.loading import load_encoder
from hdmil_lib.errors import HDMILError, SlideError
from hdmil_lib.slides import Slide, TileGrid, gpu_decoding, stored_tiles
from hdmil_lib.slides.gpu_decoding import RGB_MARKER, NvImageCodec, complete_stream, nvjpeg

CPU = torch.device("cpu")
SIZE = (300, 420)  # not a multiple of the tile size


def has_nvimagecodec() -> bool:
    try:
        import nvidia.nvimgcodec  # noqa: F401
    except ImportError:
        return False
    return True


class StandIn:
    """The part of `nvidia.nvimgcodec` that is called, with images of the host, decoded by imagecodecs."""

    HW_GPU_ONLY, HYBRID_CPU_GPU, GPU_ONLY = "hardware", "hybrid", "gpu"

    def __init__(self):
        self.calls = []

    def Backend(self, kind):
        return kind

    def CodeStream(self, stream):
        assert isinstance(stream, bytes)
        return SimpleNamespace(stream=stream)

    def DecodeParams(self, *, apply_exif_orientation):
        return apply_exif_orientation

    def Decoder(self, *, device_id, backends, options):
        assert set(backends) == {"hardware", "hybrid", "gpu"}
        return self

    def decode(self, sources, *, params, cuda_stream):
        assert params is False
        assert cuda_stream == 0
        self.calls.append(len(sources))
        return [self.image(source.stream) for source in sources]

    def image(self, stream):
        try:
            return imagecodecs.jpeg8_decode(stream)
        except Exception:
            return None


class Installed(StandIn):
    """nvImageCodec on the CPU, whose images become arrays since their DLPack needs a driver."""

    def __init__(self):
        from nvidia import nvimgcodec

        super().__init__()
        self.own, self.CodeStream, self.DecodeParams = (
            nvimgcodec,
            nvimgcodec.CodeStream,
            nvimgcodec.DecodeParams,
        )

    def Decoder(self, *, device_id, backends, options):
        backend = self.own.Backend(self.own.CPU_ONLY)
        decoder = self.own.Decoder(
            device_id=self.own.NVIMGCODEC_DEVICE_CPU_ONLY, backends=[backend], options=options
        )

        def decode(sources, *, params, cuda_stream):
            self.calls.append(len(sources))
            images = decoder.decode(sources, params=params, cuda_stream=cuda_stream)
            return [None if image is None else np.array(image) for image in images]

        return SimpleNamespace(decode=decode)


KINDS = [
    StandIn,
    pytest.param(
        Installed, marks=pytest.mark.skipif(not has_nvimagecodec(), reason="nvImageCodec is not installed")
    ),
]


@pytest.fixture(params=KINDS)
def module(request):
    return request.param()


@pytest.fixture
def decoder(module):
    return NvImageCodec(module, CPU)


@pytest.fixture(scope="module")
def pixels():
    """Blobs of color, rough enough to reveal a wrong position."""
    noise = np.random.default_rng(0).integers(0, 256, (SIZE[1] // 10, SIZE[0] // 10, 3), np.uint8)
    return cv2.resize(noise, SIZE, interpolation=cv2.INTER_CUBIC)


def write_aperio(path, pixels, photometric, compression="jpeg"):
    """A slide of Aperio: its JPEG tiles may hold RGB, of which they say nothing."""
    options = {"outcolorspace": photometric} if compression == "jpeg" else {"level": 40}
    tifffile.imwrite(
        path,
        jpeg_tiles(pixels, photometric) if compression == "jpeg" else pixels,
        shape=pixels.shape,
        dtype=np.uint8,
        tile=(64, 64),
        photometric=photometric,
        compression=compression,
        description="Aperio Image Library v1\r\n300x420|AppMag = 20|MPP = 0.5",
        metadata=None,
        compressionargs=options,
    )
    return path


def jpeg_tiles(pixels, colors):
    height, width, _ = pixels.shape
    padded = np.pad(pixels, ((0, -height % 64), (0, -width % 64), (0, 0)))
    for y in range(0, height, 64):
        for x in range(0, width, 64):
            tile = np.ascontiguousarray(padded[y : y + 64, x : x + 64])
            stream = imagecodecs.jpeg8_encode(tile, level=90, colorspace="rgb", outcolorspace=colors)
            yield bytes(stream).replace(RGB_MARKER, b"")


@pytest.fixture(scope="module")
def path(tmp_path_factory, pixels):
    """A pyramid whose tiles share their tables, as libtiff writes it."""
    path = write_slide(tmp_path_factory.mktemp("s") / "a.tif", pixels, compression="jpeg")
    with tifffile.TiffFile(path) as file:
        assert file.pages[0].jpegtables
    return path


def on_device(slide, decoder):
    return slide._tiles_on(decoder)


@settings(max_examples=60, deadline=None)
@given(
    level=st.integers(0, 2),
    corners=st.lists(st.tuples(st.integers(-90, 320), st.integers(-90, 440)), min_size=1, max_size=5),
    width=st.integers(1, 200),
    height=st.integers(1, 200),
)
def test_rectangles_have_the_pixels_of_one_at_a_time(path, level, corners, width, height):
    decoder = NvImageCodec(StandIn(), CPU)
    with Slide(path) as slide:
        fields, errors = on_device(slide, decoder).read(level, np.array(corners), (width, height))
        expected = [slide._stored.read(level, x, y, width, height) for x, y in corners]
    np.testing.assert_array_equal(fields.numpy(), expected)
    assert errors == {}


@pytest.mark.parametrize("mpp", [0.5, 0.515, 0.61, 1.0, 1.7])
@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_fields_are_those_that_the_cpu_reads(path, decoder, mpp, fraction):
    corners = np.array([[-20, -30], [33, 71], [250, 390], [600, 0]]) + fraction
    with Slide(path) as slide:
        assert slide.can_decode(mpp, decoder)
        fields, errors = slide.read_fields(corners, (96, 80), mpp, decoder)
        expected = np.stack([slide.read_field(x, y, (96, 80), mpp) for x, y in corners])
    difference = np.abs(fields.numpy().astype(int) - expected)
    assert difference.max() <= (0 if mpp == 0.5 and fraction == 0 else 1)  # a color that is rounded
    assert (difference > 0).mean() < 0.002
    assert errors == {}


@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_both_kinds_of_colors(tmp_path, pixels, decoder, photometric):
    """Nothing in a tile of Aperio says that it holds RGB: the stream gets a marker that does."""
    with Slide(write_aperio(tmp_path / "a.svs", pixels, photometric)) as slide:
        assert slide._stored.levels[0].stores_rgb == (photometric == "rgb")
        assert slide.can_decode(0.5, decoder)
        fields, _ = slide.read_fields(np.array([[10, 20]]), (100, 100), 0.5, decoder)
        np.testing.assert_array_equal(fields[0].numpy(), slide.read_field(10, 20, (100, 100), 0.5))


def test_the_real_slide(real_data, decoder):
    with Slide(real_data / "cmu_small_region.svs") as slide:
        assert slide.can_decode(slide.mpp[0], decoder)
        corners = np.array([[0, 0], [501, 733], [2000, 2800]])
        fields, _ = slide.read_fields(corners, (300, 200), slide.mpp[0], decoder)
        expected = [slide.read_field(x, y, (300, 200), slide.mpp[0]) for x, y in corners]
    np.testing.assert_array_equal(fields.numpy(), expected)


def test_a_stream_says_all_by_itself(path):
    with tifffile.TiffFile(path) as file:
        tables = file.pages[0].jpegtables
        tile = path.read_bytes()[file.pages[0].dataoffsets[0] :][: file.pages[0].databytecounts[0]]
    expected = imagecodecs.jpeg8_decode(tile, tables=tables)
    for padding in (b"", b"\0", b"\0\0\0"):
        stream = complete_stream(tile + padding, tables, False)
        np.testing.assert_array_equal(imagecodecs.jpeg8_decode(stream), expected)
    alone = imagecodecs.jpeg8_encode(expected)
    assert complete_stream(alone, None, False) == alone
    for bad in (b"", b"\0" * 50, b"\xa5" * 50, tile[:-30], tile[10:]):
        assert complete_stream(bad, tables, False) is None


def test_a_block_takes_one_call_and_a_tile_is_decoded_once(path, decoder, module):
    rows = [np.array([(x + 0.5, y + 0.5) for x in range(0, 300, 60)]) for y in range(0, 420, 60)]
    with Slide(path) as slide:
        slide.can_decode(0.5, decoder)
        module.calls.clear()
        for corners in rows:
            slide.read_fields(corners, (60, 60), 0.5, decoder)
    assert len(module.calls) <= len(rows)
    assert sum(module.calls) == 5 * 7


def test_memory_is_bounded(path, decoder, monkeypatch):
    monkeypatch.setattr(stored_tiles, "ROWS_HELD", 1)
    monkeypatch.setattr(stored_tiles, "MOST_THREADS", 0)
    with Slide(path) as slide:
        for _ in range(2):
            whole, _ = slide.read_fields(np.array([[0, 0]]), SIZE, 0.5, decoder)
        np.testing.assert_array_equal(whole[0].numpy(), slide.read_field(0, 0, SIZE, 0.5))
        slide.read_fields(np.array([[0, 0]]), (10, 10), 0.5, decoder)
        assert len(on_device(slide, decoder)._held[0]) <= 5 + 1  # of 35


@pytest.mark.parametrize("how", ["garbage", "cut off", "cut within"])
def test_a_damaged_tile_is_named_and_affects_no_other(tmp_path, path, decoder, how):
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        offset, size = page.dataoffsets[6], page.databytecounts[6]  # second row, second column of 64
    data = bytearray(path.read_bytes())
    tile = {
        "garbage": b"\xa5" * size,
        "cut off": bytes(data[offset : offset + 30]).ljust(size, b"\0"),
        "cut within": b"\xff\xd8" + b"\xff\xd9".rjust(size - 2, b"\0"),
    }[how]
    data[offset : offset + size] = tile
    bad = tmp_path / "bad.tif"
    bad.write_bytes(data)
    corners = np.array([[130, 130], [100, 100], [0, 130], [64, 64]])
    with Slide(bad) as slide:
        assert slide.can_decode(0.5, decoder)
        fields, errors = slide.read_fields(corners, (60, 60), 0.5, decoder)
        with pytest.raises(SlideError) as alone:
            slide.read_field(100, 100, (60, 60), 0.5)
    assert sorted(errors) == [1, 3]
    assert str(errors[1]) == str(alone.value)
    assert "bad.tif: cannot read level 0 at its pixel (64, 64)" in str(errors[1])
    with Slide(path) as slide:
        for row in (0, 2):
            expected = slide.read_field(*corners[row], (60, 60), 0.5)
            np.testing.assert_array_equal(fields[row].numpy(), expected)


def test_a_file_that_lacks_a_tile_is_left_to_openslide(tmp_path, pixels, decoder):
    path = write_aperio(tmp_path / "a.svs", pixels, "ycbcr")
    with tifffile.TiffFile(path, mode="r+") as file:
        counts = list(file.pages[0].databytecounts)
        counts[0] = 0
        file.pages[0].tags["TileByteCounts"].overwrite(counts)
    with Slide(path) as slide:
        assert not slide.can_decode(0.5, decoder)


@pytest.mark.parametrize("wrong", [None, np.zeros((8, 8, 3), np.uint8)])
def test_what_the_gpu_cannot_decode_the_cpu_does(path, wrong):
    """Once the decoder is trusted, it fails on every other tile."""

    class Half(StandIn):
        def image(self, stream):
            every_other = len(self.calls) > 1 and len(stream) % 2
            return wrong if every_other else super().image(stream)

    decoder = NvImageCodec(Half(), CPU)
    with Slide(path) as slide:
        assert slide.can_decode(0.5, decoder)
        fields, errors = slide.read_fields(np.array([[0, 0]]), SIZE, 0.5, decoder)
        np.testing.assert_array_equal(fields[0].numpy(), slide.read_field(0, 0, SIZE, 0.5))
    assert errors == {}


def swapped_colors(stream):
    return imagecodecs.jpeg8_decode(stream)[..., ::-1].copy()


def noisy(stream):
    noise = np.random.default_rng(0).integers(-3, 4, (64, 64, 3))
    return np.clip(imagecodecs.jpeg8_decode(stream).astype(int) + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("image", "trusted"), [(swapped_colors, False), (lambda stream: None, False), (noisy, True)]
)
def test_a_decoder_with_other_colors_is_not_trusted(path, image, trusted):
    module = StandIn()
    module.image = image
    with Slide(path) as slide:
        assert slide.can_decode(0.5, NvImageCodec(module, CPU)) == trusted


def test_other_files_are_left_to_the_cpu(tmp_path, pixels, decoder):
    files = [write_slide(tmp_path / f"{c}.tif", pixels, compression=c) for c in ("packbits", "deflate")]
    files.append(write_aperio(tmp_path / "a.svs", pixels, "rgb", "APERIO_JP2000_RGB"))
    for path in files:
        with Slide(path) as slide:
            assert not slide.can_decode(0.5, decoder)


def test_without_the_package_or_an_nvidia_gpu(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    with pytest.raises(HDMILError, match=r"not work on cuda:0: .*pip install 'hdmil\[gpu\]'"):
        nvjpeg(gpu)
    with pytest.raises(HDMILError, match="needs an NVIDIA GPU, not cpu"):
        nvjpeg(CPU)
    with pytest.raises(HDMILError, match="needs an NVIDIA GPU, not cpu"):
        load_encoder("color", device="cpu", engine="torch", decoder="nvjpeg")
    assert load_encoder("color", device="cpu", engine="torch", decoder="auto").decoder == "cpu"
    assert load_encoder("color", device="cpu", engine="torch").decoder == "cpu"
    with pytest.raises(HDMILError, match="decoder 'gpu'; choose one of cpu, auto, nvjpeg"):
        load_encoder("color", device="cpu", decoder="gpu")


@pytest.mark.parametrize("works", [True, False])
def test_the_decoder_of_a_gpu_is_started_once_and_tried(monkeypatch, works):
    module, started = StandIn(), []
    if not works:
        module.image = lambda stream: None

    def start(given, device):
        started.append(device)
        return NvImageCodec(given, CPU)

    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", module)
    monkeypatch.setattr(gpu_decoding, "NvImageCodec", start)
    gpu_decoding.nvjpeg.cache_clear()
    try:
        if works:
            assert nvjpeg(torch.device("cuda", 3)) is nvjpeg(torch.device("cuda", 3))
            assert started == [torch.device("cuda", 3)]
        else:
            with pytest.raises(HDMILError, match="cannot decode a JPEG image"):
                nvjpeg(torch.device("cuda", 3))
    finally:
        gpu_decoding.nvjpeg.cache_clear()


@pytest.fixture
def slides(tmp_path):
    """One slide of 3 x 4 tiles that a GPU can decode, and one of JPEG 2000."""
    rng = np.random.default_rng(0)
    colors = np.array([130, 60, 150]) + rng.integers(-30, 30, (3, 4, 3))
    pixels = colors.astype(np.uint8).repeat(256, 0).repeat(256, 1)
    folder = tmp_path / "slides"
    folder.mkdir()
    jpeg = write_slide(folder / "jpeg.tif", pixels, compression="jpeg")
    return jpeg, write_aperio(folder / "jp2.svs", pixels, "rgb", "APERIO_JP2000_RGB")


@pytest.fixture
def gpu_encoder(monkeypatch, decoder):
    """An encoder whose slides are decoded by `decoder`."""
    monkeypatch.setattr(gpu_decoding, "nvjpeg", lambda device: decoder)
    encoder = load_encoder("color", device="cpu", engine="torch")
    encoder.decoder = "nvjpeg"
    return encoder


@pytest.mark.parametrize("n_readers", [0, 3])
def test_features_are_those_of_tiles_that_the_cpu_decodes(slides, gpu_encoder, module, n_readers):
    own = load_encoder("color", device="cpu", engine="torch")
    with Slide(slides[0]) as slide:
        grid = TileGrid.from_slide(slide)
        rows = [7, 0, 3, 11, 4]
        features = encode_tiles(slide, grid, rows, gpu_encoder, batch_size=2, n_readers=n_readers)
        np.testing.assert_array_equal(features, encode_tiles(slide, grid, rows, own))
    assert len(module.calls) <= 1 + 3


@pytest.mark.parametrize("strict", [True, False])
def test_a_damaged_tile_of_a_slide(slides, gpu_encoder, tmp_path, strict):
    bad = damage_tile(slides[0], tmp_path / "bad.tif", [4 * 4])  # a stored tile is a quarter of a tile wide
    with Slide(bad) as slide:
        grid = TileGrid.from_slide(slide, min_tissue=0)
        if strict:
            with pytest.raises(SlideError, match="cannot read level 0"):
                encode_tiles(slide, grid, range(len(grid)), gpu_encoder)
            return
        features = encode_tiles(slide, grid, range(len(grid)), gpu_encoder, strict=False)
    assert np.isnan(features).all(axis=1).sum() == 1
    with Slide(slides[0]) as slide:
        whole = encode_tiles(slide, grid, range(len(grid)), gpu_encoder)
    kept = ~np.isnan(features).any(axis=1)
    np.testing.assert_array_equal(features[kept], whole[kept])


def test_a_bag_records_what_decoded_it_and_resuming_notices(slides, gpu_encoder, tmp_path):
    own = load_encoder("color", device="cpu", engine="torch")
    extract(slides, own, tmp_path / "cpu", progress=False)
    table = extract(slides, gpu_encoder, tmp_path / "gpu", progress=False)
    assert table.status.tolist() == ["done", "done"]
    found = {}
    for name in ("jpeg", "jp2"):
        bags = [read_bag(tmp_path / folder / f"{name}.h5") for folder in ("cpu", "gpu")]
        np.testing.assert_array_equal(bags[0].features, bags[1].features)
        found[name] = [(bag.attrs["decoder"], bag.attrs["decoded_by"]) for bag in bags]
    assert found == {
        "jpeg": [("cpu", "cpu"), ("nvjpeg", "nvjpeg")],
        "jp2": [("cpu", "cpu"), ("nvjpeg", "cpu")],
    }
    assert extract(slides, gpu_encoder, tmp_path / "gpu", progress=False).status.tolist() == ["skipped"] * 2
    for encoder, folder in ((own, "gpu"), (gpu_encoder, "cpu")):
        table = extract(slides, encoder, tmp_path / folder, progress=False)
        assert table.status.tolist() == ["failed", "failed"]
        assert "made with decoder" in table.error[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or not has_nvimagecodec(), reason="no GPU or nvImageCodec")
@pytest.mark.parametrize("mpp", [0.5, 0.515])
def test_nvjpeg_gives_fields_close_to_those_of_the_cpu(path, tmp_path, pixels, mpp):
    decoder = nvjpeg(torch.device("cuda", 0))
    corners = np.array([[-20, -30], [33, 71], [250, 390], [100, 10]])
    for file in (path, write_aperio(tmp_path / "a.svs", pixels, "rgb")):
        with Slide(file) as slide:
            assert slide.can_decode(mpp, decoder)
            fields, errors = slide.read_fields(corners, (96, 80), mpp, decoder)
            expected = np.stack([slide.read_field(x, y, (96, 80), mpp) for x, y in corners])
        assert fields.is_cuda
        assert errors == {}
        assert np.abs(fields.cpu().numpy().astype(int) - expected).mean() < 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or not has_nvimagecodec(), reason="no GPU or nvImageCodec")
def test_a_bag_that_nvjpeg_decoded_is_close_to_that_of_the_cpu(slides, tmp_path):
    bags = [
        extract_slide(
            slides[0],
            load_encoder(device="cuda", precision="fp32", decoder=decoder),
            tmp_path / f"{decoder}.h5",
        )
        for decoder in ("cpu", "nvjpeg")
    ]
    a, b = (bag.features.astype(np.float32) for bag in bags)
    assert ((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min() > 0.99
    assert bags[1].attrs["decoded_by"] == "nvjpeg"
