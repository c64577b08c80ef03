"""Encoders: the right weights, the same features on every engine, and errors that say what to do."""

import hashlib
import importlib.metadata
import json
import shutil
import sys
import sysconfig
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import cv2
import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from conftest import REPOSITORY
from torch import nn

from hdmil_lib.config import cache_dir
from hdmil_lib.encoders import loading, networks, own
from hdmil_lib.encoders.engines import TorchEngine, has_nncf, has_openvino
from hdmil_lib.encoders.loading import ENCODERS, EncoderSpec, load_encoder
from hdmil_lib.encoders.networks import TileNetwork, build_network, fuse_batch_norms, weights_hash
from hdmil_lib.errors import HDMILError
from hdmil_lib.kernels.tile_preprocess import fit_reinhard, tile_preprocess

sys.path.insert(0, str(REPOSITORY / "tools"))
import fake_gpu

ENGINES = [
    "torch",
    pytest.param("openvino", marks=pytest.mark.skipif(not has_openvino(), reason="no openvino")),
]


def make_tiles(n: int, side: int = 256, seed: int = 0) -> np.ndarray:
    """Smooth colors with noise: closer to tissue than noise alone."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(60, 250, (n, 8, 8, 3)).repeat(side // 8, 1).repeat(side // 8, 2)
    return np.clip(coarse + rng.normal(0, 15, coarse.shape), 0, 255).astype(np.uint8)


def least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache for this module: the conversion to OpenVINO takes seconds."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def loaded(cache):
    """The default encoder on each engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HDMIL_CACHE", str(cache))
        names = ["torch", "openvino"] if has_openvino() else ["torch"]
        return {name: load_encoder(device="cpu", engine=name, precision="fp32") for name in names}


@pytest.fixture(scope="module")
def eager_features():
    """Features of four tiles by plain PyTorch: PIL-like float images, one at a time, nothing fused."""
    network = build_network(ENCODERS["efficientnet_lite0"]).backbone
    images = torch.from_numpy(make_tiles(4)).permute(0, 3, 1, 2).contiguous() / 255
    with torch.inference_mode():
        return torch.cat([network((image[None] - 0.5) / 0.5).mean((2, 3)) for image in images]).numpy()


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_features_of_plain_pytorch(loaded, eager_features, engine):
    features = loaded[engine](make_tiles(4))
    assert features.dtype == np.float32
    assert features.shape == (4, 320)
    # fp32 with fused norms and other summation orders: 1e-5 measured, on features of about 0.3
    np.testing.assert_allclose(features, eager_features, atol=1e-4)


def test_every_weight_of_the_wheel_has_its_place():
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    state = networks._timm_keys(torch.load(networks._lite0_weights(), weights_only=True), network)
    network.load_state_dict(state)  # strict: no key is left over on either side, heads included


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_of_any_length_equals_its_tiles_one_by_one(loaded, engine):
    tiles = make_tiles(5)
    one_by_one = np.concatenate([loaded[engine](tile[None]) for tile in tiles])
    for n in (0, 3, 5):
        features = loaded[engine](tiles[:n])
        assert features.shape == (n, 320)
        # 1e-5: kernels of another batch size may sum in another order
        np.testing.assert_allclose(features, one_by_one[:n], atol=1e-5)


def test_tiles_of_another_size_are_resized(loaded):
    tiles = make_tiles(2)
    smaller = tiles.reshape(2, 128, 2, 128, 2, 3).mean((2, 4)).round().astype(np.uint8)
    assert least_cosine(loaded["torch"](smaller), loaded["torch"](tiles)) > 0.5


def test_a_view_of_tiles_is_read_in_its_own_order(loaded):
    tiles = make_tiles(2)
    for encoder in loaded.values():
        flipped = tiles[:, ::-1, :, ::-1]
        np.testing.assert_allclose(encoder(flipped), encoder(flipped.copy()), atol=1e-5)


@pytest.mark.parametrize(
    "tiles",
    [
        np.zeros((2, 256, 256, 3), np.float32),
        np.zeros((256, 256, 3), np.uint8),
        np.zeros((1, 4, 4, 4), np.uint8),
    ],
)
def test_what_is_no_batch_of_tiles_is_refused(loaded, tiles):
    with pytest.raises(ValueError, match="uint8"):
        loaded["torch"](tiles)


def test_the_default_is_within_the_promised_cosine_of_fp32(eager_features, cache, monkeypatch):
    monkeypatch.setenv("HDMIL_CACHE", str(cache))
    assert least_cosine(load_encoder()(make_tiles(4)), eager_features) >= 0.999


def test_bf16_is_only_taken_where_it_is_faster_and_close_to_fp32(monkeypatch, loaded, tmp_path):
    """Where bf16 is faster the probe tiles decide whether it is taken; the cache keeps the answer."""
    monkeypatch.setattr(loading, "has_bf16", lambda device: True)

    def chosen(cosine, ratio, folder):
        monkeypatch.setenv("HDMIL_CACHE", str(tmp_path / folder))
        monkeypatch.setattr(loading, "_least_cosine", lambda exact, fast: cosine)
        monkeypatch.setattr(loading, "_speed_ratio", lambda exact, fast: ratio)
        return load_encoder(device="cpu", engine="torch").precision

    assert chosen(0.9991, 1.3, "a") == "bf16"
    assert chosen(0.9989, 1.3, "b") == "fp32"
    assert chosen(0.9991, 1.1, "c") == "fp32"
    assert chosen(0.0, 0.0, "a") == "bf16"
    record = next((tmp_path / "a" / "precision").glob("*.json"))
    record.write_text("{")
    assert chosen(0.9989, 1.3, "a") == "fp32"


def test_torch_bf16_differs_from_fp32_by_rounding_only(loaded):
    fast = load_encoder(device="cpu", engine="torch", precision="bf16")
    tiles = make_tiles(1)
    assert fast.precision == "bf16"
    assert fast(tiles).dtype == np.float32
    # bf16 has 8 bits: 0.4 % per product, through about fifty layers
    assert 0.99 < least_cosine(fast(tiles), loaded["torch"](tiles)) < 1 - 1e-7


@pytest.mark.skipif(not (has_openvino() and has_nncf()), reason="no openvino or no nncf")
def test_int8_is_quantized_once_for_the_tiles_and_stays_close(loaded, cache, monkeypatch):
    monkeypatch.setenv("HDMIL_CACHE", str(cache))
    calls, quantize = [], loading.quantize
    monkeypatch.setattr(loading, "quantize", lambda *args: calls.append(args) or quantize(*args))
    seen, unseen = make_tiles(16), make_tiles(8, seed=1)
    for _ in range(2):
        fast = load_encoder(device="cpu", precision="int8", int8_tiles=seen)
    assert len(calls) == 1
    assert fast.precision == "int8"
    assert fast.weights_hash == loaded["openvino"].weights_hash
    features, exact = fast(unseen), loaded["openvino"](unseen)
    # On tissue the smallest cosine is 0.96, the median 0.997 (benchmarks/results/precision.json).
    assert 0.95 < least_cosine(features, exact) < 1 - 1e-6
    load_encoder(device="cpu", precision="int8", int8_tiles=unseen)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"engine": "torch"}, "pip install openvino nncf"),
        ({"engine": "openvino"}, "int8_tiles="),
        ({"engine": "openvino", "int8_tiles": np.empty((0, 256, 256, 3), np.uint8)}, "int8_tiles="),
    ],
)
@pytest.mark.skipif(not (has_openvino() and has_nncf()), reason="no openvino or no nncf")
def test_int8_says_what_it_needs(options, remedy):
    with pytest.raises(HDMILError, match=remedy):
        load_encoder(device="cpu", precision="int8", **options)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("side", [256, 128])
def test_a_tensor_on_the_encoders_device_is_taken_as_an_array(loaded, engine, side):
    tiles = make_tiles(2, side)
    features = loaded[engine](torch.from_numpy(tiles))
    assert isinstance(features, np.ndarray)
    # 1e-5: OpenVINO may sum in another order from call to call
    difference = np.abs(features - loaded[engine](tiles)).max()
    # Tiles that are resized on their device have some colors rounded to the next level.
    assert difference <= (1e-5 if side == 256 else 1e-2)
    assert loaded[engine](torch.empty(0, side, side, 3, dtype=torch.uint8)).shape == (0, 320)


def test_a_tensor_elsewhere_or_of_another_kind_is_refused(loaded):
    with pytest.raises(ValueError, match="tiles are on meta, the encoder is on cpu"):
        loaded["torch"](torch.empty(1, 256, 256, 3, dtype=torch.uint8, device="meta"))
    with pytest.raises(ValueError, match=r"got torch.float32 \(1, 256, 256, 3\)"):
        loaded["torch"](torch.zeros(1, 256, 256, 3))


@pytest.mark.parametrize(("resize", "input_size"), [(256, 256), (256, 224), (224, 224), (248, 224)])
def test_tiles_are_fitted_on_their_device_as_on_the_host(resize, input_size):
    tiles = make_tiles(2)
    mine = loading._fit_on_device(torch.from_numpy(tiles), resize, input_size)
    expected = loading._fit(tiles, resize, input_size)
    assert mine.is_contiguous()
    assert np.abs(mine.numpy().astype(int) - expected).max() <= (0 if resize == 256 else 1)


class Limited(nn.Module):
    """The mean color; the memory is enough for a number of tiles."""

    def __init__(self, most: int):
        super().__init__()
        self.most, self.seen = most, []

    def forward(self, tiles):
        self.seen.append(len(tiles))
        if len(tiles) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tiles.float().mean((1, 2))


def test_too_little_memory_halves_the_tiles_at_a_time_once():
    network = Limited(16)
    engine, tiles = TorchEngine(network, torch.device("cpu"), "fp32"), make_tiles(70, 16)
    with pytest.warns(RuntimeWarning, match="not enough for 32 tiles at a time; from now on 16 are") as said:
        features = engine(tiles)
    assert len(said) == 1
    np.testing.assert_allclose(features, tiles.mean((1, 2)), rtol=1e-5)
    assert network.seen == [32, 16, 16, 16, 16, 6]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine(tiles)
    assert network.seen[6:] == [16, 16, 16, 16, 6]
    network.most = 8
    with pytest.raises(
        HDMILError, match="16 tiles at a time of a batch of 70; pass a batch_size of 8 or less"
    ):
        engine(tiles)


@pytest.mark.parametrize(("most", "n", "tried"), [(8, 70, 16), (0, 1, 1), (2, 10, 5)])
def test_too_little_memory_says_what_to_lower(most, n, tried):
    engine = TorchEngine(Limited(most), torch.device("cpu"), "fp32")
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(
            HDMILError, match=f"memory of cpu is not enough for {tried} tiles .* batch of {n}; .*batch_size"
        ),
    ):
        engine(make_tiles(n, 16))


def test_a_copy_has_a_network_of_its_own(loaded):
    copy = loaded["torch"].to("cpu")
    tiles = make_tiles(2)
    expected = loaded["torch"](tiles)
    np.testing.assert_array_equal(copy(tiles), expected)
    assert (copy.name, copy.weights_hash, copy.precision, copy.device) == (
        "efficientnet_lite0",
        loaded["torch"].weights_hash,
        "fp32",
        torch.device("cpu"),
    )
    copy._run._network.backbone.conv_stem.weight.mul_(2)
    np.testing.assert_array_equal(loaded["torch"](tiles), expected)
    assert not np.array_equal(copy(tiles), expected)
    with pytest.raises(HDMILError, match="no device 'cuda:77'"):
        copy.to("cuda:77")


def test_a_copy_of_a_compiled_encoder_is_compiled(loaded, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network, dynamic: compiled.append(network) or network)
    first = load_encoder("efficientnet_lite0_random", device="cpu", engine="torch", compiled=True)
    assert first.to("cpu")._run.compiled
    assert not loaded["torch"].to("cpu")._run.compiled
    assert len(set(map(id, compiled))) == 2


@pytest.mark.skipif(not has_openvino(), reason="no openvino")
@pytest.mark.parametrize("threads", [1, 2])
def test_openvino_keeps_to_the_threads_that_it_is_given(threads, loaded, monkeypatch):
    """Processes that share a machine rely on OMP_NUM_THREADS, which OpenVINO itself does not read."""
    openvino = pytest.importorskip("openvino")
    asked, compiled = [], openvino.Core.compile_model

    def compile_model(core, *arguments):
        model = compiled(core, *arguments)
        asked.append(model.get_property("INFERENCE_NUM_THREADS"))
        return model

    monkeypatch.setattr(openvino.Core, "compile_model", compile_model)
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    load_encoder("color", device="cpu", engine="openvino", precision="fp32")
    assert asked == [threads]


@pytest.mark.skipif(not has_openvino(), reason="no openvino")
def test_openvino_has_no_copies(loaded):
    with pytest.raises(HDMILError, match="'openvino' runs on the CPU alone.*engine='torch'"):
        loaded["openvino"].to("cpu")


@pytest.fixture(scope="module")
def stain():
    source, target = make_tiles(2, seed=3), make_tiles(2, seed=4)
    return fit_reinhard(source, target)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_stain_is_normalized_before_the_network(loaded, cache, monkeypatch, stain, engine):
    monkeypatch.setenv("HDMIL_CACHE", str(cache))
    tiles = make_tiles(2)
    encoder = load_encoder(device="cpu", engine=engine, precision="fp32", stain=stain)
    again = load_encoder(device="cpu", engine=engine, precision="fp32", stain=stain)
    spec = encoder.spec
    pixels = tile_preprocess(torch.from_numpy(tiles), spec.mean, spec.std, stain=stain)
    with torch.inference_mode():
        expected = build_network(spec).backbone(pixels).mean((2, 3)).numpy()
    # as test_every_engine_gives_the_features_of_plain_pytorch, and logarithms differ in their last digits
    np.testing.assert_allclose(encoder(tiles), expected, atol=2e-4)
    np.testing.assert_allclose(again(tiles), expected, atol=2e-4)
    assert least_cosine(expected, loaded[engine](tiles)) < 0.999, "the stain must matter to be tested"


def test_the_stain_is_part_of_the_hash(loaded, stain):
    spec = ENCODERS["efficientnet_lite0"]
    other = fit_reinhard(make_tiles(2, seed=4), make_tiles(2, seed=3))
    hashes = [weights_hash(build_network(spec, s)) for s in (None, stain, other, stain)]
    assert len(set(hashes)) == 3
    assert hashes[0] == loaded["torch"].weights_hash
    assert hashes[1] == hashes[3]


@pytest.mark.skipif(not has_openvino(), reason="no openvino")
def test_each_stain_is_converted_once(stain, built):
    name = "efficientnet_lite0_random"
    digests = [load_encoder(name, device="cpu", stain=s).weights_hash for s in (None, stain, None, stain)]
    assert built == [name, name]
    assert digests[0] == digests[2] != digests[1] == digests[3]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_encoder_of_colors_takes_no_stain(engine, stain):
    with pytest.raises(HDMILError, match="'color' describes colors as they are"):
        load_encoder("color", device="cpu", engine=engine, stain=stain)


def test_features_on_a_gpu_are_computed_without_waiting():
    """On a fake GPU, where a copy from the host that waits is an error and so is a number that is read."""
    with fake_gpu.fake_gpu() as gpu:
        network = fake_gpu.made_on(gpu, lambda: nn.Sequential(Halves(), nn.Flatten(), nn.Linear(48, 4)))
        with patch.object(nn.Module, "to", lambda network, *arguments, **named: network):  # it is there
            engine = TorchEngine(network, gpu, "fp32")
        pinned, stream = [], SimpleNamespace(wait_stream=lambda other: None)
        with (
            patch.object(torch.cuda, "current_stream", lambda device: stream),
            patch.object(torch.cuda, "Stream", lambda device: stream),
            patch.object(torch.cuda, "stream", lambda stream: nullcontext()),
            patch.object(torch.cuda, "device", lambda device: nullcontext()),
            patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None),
            patch.object(torch.Tensor, "pin_memory", lambda tensor: pinned.append(len(tensor)) or tensor),
        ):
            for tiles in (torch.zeros(150, 4, 4, 3, dtype=torch.uint8), torch.zeros(3, 4, 4, 3, device=gpu)):
                features = engine.features(tiles)
                assert (features.device, features.shape, features.dtype) == (
                    gpu,
                    (len(tiles), 4),
                    torch.float32,
                )
    assert pinned == [64, 64, 22], "tiles of the host, and those alone"


class Halves(nn.Module):
    def forward(self, tiles):
        return tiles.float() / 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_copies_beside_the_computation_change_nothing(loaded, monkeypatch, chunk):
    monkeypatch.setattr("hdmil_lib.encoders.engines.GPU_CHUNK", chunk)
    on_gpu = load_encoder(device="cuda", precision="fp32")
    tiles = make_tiles(10)
    assert on_gpu.batch_size == 256
    for _ in range(3):  # memory that was released too early would be filled again
        assert least_cosine(on_gpu(tiles), loaded["torch"](tiles)) > 0.9999
        assert least_cosine(on_gpu(torch.from_numpy(tiles).cuda()), loaded["torch"](tiles)) > 0.9999


def test_one_size_is_compiled(loaded, monkeypatch):
    seen = []

    def spy(network, dynamic):
        return lambda tiles: (seen.append(tuple(tiles.shape)), network(tiles))[1]

    monkeypatch.setattr(torch, "compile", spy)
    compiled = load_encoder(device="cpu", engine="torch", precision="fp32", compiled=True)
    assert len(seen) == 1, "compiled when loaded"
    for n in (3, 33):
        tiles = make_tiles(n)
        np.testing.assert_allclose(compiled(tiles), loaded["torch"](tiles), atol=1e-5)
    assert len(seen) == 4
    assert len(set(seen)) == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.skipif(not (Path(sysconfig.get_path("include")) / "Python.h").exists(), reason="no Python.h")
def test_compiling_changes_no_feature(loaded):
    compiled = load_encoder(device="cpu", engine="torch", precision="fp32", compiled=True)
    tiles = make_tiles(3)
    assert least_cosine(compiled(tiles), loaded["torch"](tiles)) > 0.9999


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiling_changes_no_feature_on_a_gpu(loaded, precision):
    compiled = load_encoder(device="cuda", precision=precision, compiled=True)
    for n in (3, 70):
        tiles = make_tiles(n)
        assert least_cosine(compiled(tiles), loaded["torch"](tiles)) > (
            0.9999 if precision == "fp32" else 0.99
        )


def test_without_a_compiler(monkeypatch):
    def fail(network):
        raise torch._dynamo.exc.TorchDynamoException("no g++")

    monkeypatch.setattr(torch, "compile", lambda network, dynamic: fail)
    with pytest.raises(HDMILError, match="g\\+\\+"):
        load_encoder(device="cpu", engine="torch", precision="fp32", compiled=True)


@pytest.mark.skipif(not has_openvino(), reason="no openvino")
def test_compiling_is_for_torch():
    with pytest.raises(HDMILError, match="engine='torch'"):
        load_encoder(device="cpu", engine="openvino", compiled=True)
    with pytest.raises(HDMILError, match="engine='torch'"):
        load_encoder("color", device="cpu", engine="openvino").compile()


def test_the_hash_belongs_to_the_weights(loaded):
    assert {encoder.weights_hash for encoder in loaded.values()} == {"043840c8f73a"}, "stored bags carry it"
    network = build_network(ENCODERS["efficientnet_lite0"])
    assert weights_hash(network) == loaded["torch"].weights_hash
    network.backbone.conv_stem.weight[0, 0, 0, 0] += 1e-3
    assert weights_hash(network) != loaded["torch"].weights_hash


def test_random_weights_are_the_same_every_time_and_tell_tiles_apart():
    state = torch.get_rng_state()
    first, second = (
        load_encoder("efficientnet_lite0_random", device="cpu", engine="torch") for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), state), "loading must not touch the caller's generator"
    assert first.weights_hash == second.weights_hash
    features = first(make_tiles(4))
    np.testing.assert_array_equal(features, second(make_tiles(4)))
    assert np.isfinite(features).all()
    assert features.std(axis=0).mean() > 0.01


@pytest.mark.parametrize("engine", ENGINES)
def test_color_features_are_histograms_and_the_share_of_tissue(engine):
    tiles = make_tiles(3)
    encoder = load_encoder("color", device="cpu", engine=engine)
    features = encoder(tiles)
    assert features.shape == (3, encoder.dim)
    hsv = np.stack([cv2.cvtColor(tile, cv2.COLOR_RGB2HSV) for tile in tiles])
    for channel, top in enumerate((180, 256, 256)):
        for row, planes in zip(features[:, 16 * channel :], hsv, strict=True):
            expected = cv2.calcHist([planes], [channel], None, [16], [0, top]).ravel() / 256**2
            np.testing.assert_array_equal(row[:16], expected)
    np.testing.assert_array_equal(features[:, 48], (hsv[..., 1] > 15).mean((1, 2), dtype=np.float32))


@pytest.mark.skipif(not has_openvino(), reason="no openvino")
def test_the_converted_model_is_kept_and_a_damaged_copy_is_named():
    first = load_encoder("efficientnet_lite0_random")
    folder = cache_dir() / "encoders"
    assert sorted(f.suffix for f in folder.iterdir()) == [".bin", ".json", ".xml"]
    (model,) = folder.glob("*.xml")
    changed = model.stat().st_mtime_ns
    np.testing.assert_array_equal(
        load_encoder("efficientnet_lite0_random")(make_tiles(1)), first(make_tiles(1))
    )
    assert model.stat().st_mtime_ns == changed
    model.write_text("<net")
    with pytest.raises(HDMILError, match="damaged copy of an encoder; delete"):
        load_encoder("efficientnet_lite0_random")


@pytest.fixture
def built(monkeypatch):
    """Names of the encoders whose network was built, in order."""
    names = []

    def build(spec, stain=None, backbone=None):
        names.append(spec.name)
        return build_network(spec, stain, backbone)

    monkeypatch.setattr(loading, "build_network", build)
    return names


@pytest.mark.skipif(not has_openvino(), reason="no openvino")
@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite0_random", "color"])
def test_a_converted_encoder_is_loaded_without_its_network(built, name):
    first, second = (load_encoder(name, device="cpu", engine="openvino") for _ in range(2))
    assert built == [name]
    assert first.weights_hash == second.weights_hash == weights_hash(build_network(ENCODERS[name]))
    np.testing.assert_array_equal(first(make_tiles(2)), second(make_tiles(2)))
    load_encoder(name, device="cpu", engine="torch")
    assert built == [name, name], "PyTorch needs the network"


@pytest.fixture
def color_record(cache, monkeypatch) -> Path:
    """The record of the encoder "color", which was loaded before."""
    monkeypatch.setenv("HDMIL_CACHE", str(cache))
    load_encoder("color", device="cpu", engine="openvino")
    (path,) = (cache / "encoders").glob("color-*.json")
    return path


def altered(**changes: object):
    """Bytes of a record in which some fields differ."""
    return lambda record: json.dumps(record | changes).encode()


def from_other_source(**changes: str):
    """Bytes of a record whose source differs in some fields."""
    return lambda record: altered(source=record["source"] | changes)(record)


@pytest.mark.skipif(not has_openvino(), reason="no openvino")
@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: b"",
        lambda record: b"{",
        lambda record: b"[]",
        lambda record: b"{}",
        lambda record: b"\xff\xfe\x00",
        altered(weights_hash=None),
        altered(weights_hash="../../other"),
        altered(weights_hash="0" * 12),
        altered(source=None),
        from_other_source(torch="1.0"),
        from_other_source(timm="0.1"),
        from_other_source(spec="another"),
    ],
)
def test_a_damaged_or_stale_record_is_made_anew(color_record, built, spoil):
    whole = color_record.read_bytes()
    color_record.write_bytes(spoil(json.loads(whole)))
    load_encoder("color", device="cpu", engine="openvino")
    assert built == ["color"]
    assert color_record.read_bytes() == whole


@pytest.mark.skipif(not has_openvino(), reason="no openvino")
def test_a_record_without_its_model_is_not_believed(color_record, built):
    (model,) = color_record.parent.glob("color-*.xml")
    model.unlink()
    load_encoder("color", device="cpu", engine="openvino")
    assert built == ["color"]
    assert model.is_file()


@pytest.mark.skipif(not has_openvino(), reason="no openvino")
def test_a_record_that_cannot_be_written_is_done_without(built, monkeypatch):
    def fail(path, content):
        raise PermissionError(path)

    monkeypatch.setattr(loading, "write_json", fail)
    for _ in range(2):
        load_encoder("color", device="cpu", engine="openvino")
    assert built == ["color", "color"]
    assert not list((cache_dir() / "encoders").glob("*.json"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one encoder, `tiny`: its newest revision, None if out of reach, and the one in the cache."""
    spec = EncoderSpec("tiny", "hf-hub:owner/tiny", 4, license="", input_size=16, resize=16, pool="mean")
    cached = tmp_path / "hub" / "models--owner--tiny" / "refs" / "main"
    state = SimpleNamespace(newest="aaa", cached=cached)

    def create(source, pretrained):
        assert source == spec.source
        assert pretrained
        if state.newest is None:
            raise OSError("offline")
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.write_text(state.newest)
        network = nn.Conv2d(3, 4, 3, bias=False)
        nn.init.constant_(network.weight, len(state.newest))
        return network

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(own, "ENCODERS", {"tiny": spec})
    return state


@pytest.mark.skipif(not has_openvino(), reason="no openvino")
def test_an_encoder_of_the_hub_is_built_once_per_revision(built, hub):
    first = load_encoder("tiny", device="cpu", engine="openvino")
    hub.newest = None
    offline = load_encoder("tiny", device="cpu", engine="openvino")
    assert built == ["tiny"]
    assert offline.weights_hash == first.weights_hash
    np.testing.assert_array_equal(offline(make_tiles(2, 16)), first(make_tiles(2, 16)))

    hub.newest = "aaaa"
    hub.cached.write_text("aaaa")
    newer = load_encoder("tiny", device="cpu", engine="openvino")
    assert built == ["tiny", "tiny"]
    assert newer.weights_hash != first.weights_hash
    assert not np.array_equal(newer(make_tiles(2, 16)), first(make_tiles(2, 16)))


@pytest.mark.skipif(not has_openvino(), reason="no openvino")
def test_weights_that_are_replaced_while_they_are_read_get_no_record(built, hub):
    """The hub has a newer revision than the local cache: it is not certain which of the two was hashed."""
    hub.cached.parent.mkdir(parents=True)
    hub.cached.write_text("older")
    for count in (1, 2, 2):
        load_encoder("tiny", device="cpu", engine="openvino")
        assert len(built) == count


@pytest.mark.skipif(not has_openvino(), reason="no openvino")
def test_weights_out_of_the_local_cache_are_asked_for_again(built, hub):
    load_encoder("tiny", device="cpu", engine="openvino")
    hub.cached.unlink()
    hub.newest = None
    with pytest.raises(HDMILError, match="owner/tiny.*Connect to the internet once"):
        load_encoder("tiny", device="cpu", engine="openvino")


@pytest.mark.parametrize("name", [name for name, spec in ENCODERS.items() if spec.weights == "hub"])
def test_the_repository_is_the_one_that_timm_loads_from(name):
    source = ENCODERS[name].source
    known = None if source.startswith("hf-hub:") else timm.get_pretrained_cfg(source).hf_hub_id
    assert networks._hub_repository(ENCODERS[name]) == (known or source.removeprefix("hf-hub:"))


@pytest.mark.parametrize("name", ["uni2-h", "virchow2"])
def test_layers_that_the_registry_names_are_given_to_timm_as_classes(monkeypatch, name):
    given = {}
    monkeypatch.setattr(timm, "create_model", lambda source, **kwargs: given.update(kwargs) or nn.Identity())
    build_network(ENCODERS[name])
    assert given.pop("mlp_layer") is timm.layers.SwiGLUPacked
    assert given.pop("act_layer") is nn.SiLU
    rest = {k: v for k, v in ENCODERS[name].kwargs.items() if k not in ("mlp_layer", "act_layer")}
    assert given == rest | {"pretrained": True}


def test_resnet50_ends_after_its_third_stage(monkeypatch):
    """Without its weights, which come from the hub: shapes, pooling and folding."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create(*a, **k | {"pretrained": False}))
    network = build_network(ENCODERS["resnet50"])
    assert not any("layer4" in name for name, _ in network.named_modules())
    randomize_norms(network)
    tiles = torch.from_numpy(make_tiles(2))
    expected = network(tiles)
    assert expected.shape == (2, 1024)
    fuse_batch_norms(network)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    # folding reorders float32 products over 40 layers
    torch.testing.assert_close(network(tiles), expected, rtol=1e-3, atol=1e-4)


def randomize_norms(network: nn.Module) -> None:
    """Give batch norms values as after training; fresh ones are almost the identity and hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data = torch.rand(tensor.shape, generator=generator) + 0.5
            for tensor in (module.bias, module.running_mean):
                tensor.data = torch.rand(tensor.shape, generator=generator) - 0.5


def test_virchow2_joins_the_class_token_to_the_mean_of_the_patch_tokens():
    spec = EncoderSpec("small", source="", dim=64, license="", pool="token+mean")
    backbone = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, num_classes=0, embed_dim=32, num_heads=2, depth=1,
        reg_tokens=4, global_pool="",
    ).eval()  # fmt: skip
    tiles = torch.from_numpy(make_tiles(2, 224))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec.mean, spec.std))
    tokens = backbone((tiles.permute(0, 3, 1, 2) / 255 - mean) / std)
    assert tokens.shape == (2, 1 + 4 + 196, 32)
    expected = torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1)
    torch.testing.assert_close(TileNetwork(backbone, spec)(tiles), expected)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_entry_says_what_it_is(name):
    spec = ENCODERS[name]
    assert spec.name == name
    assert spec.license
    assert spec.dim > 0
    assert spec.input_size <= spec.resize
    assert min(spec.std) > 0
    known = timm.is_model(spec.source.split(".")[0]) or spec.source.startswith("hf-hub:")
    assert known or (spec.weights == "none" and not spec.source)


def test_offline_a_gated_model_says_what_to_do(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HDMILError, match="huggingface.co/MahmoodLab/UNI.*hf auth login"):
        load_encoder("uni")
    with pytest.raises(HDMILError, match="resnet50.*Connect to the internet once"):
        load_encoder("resnet50")


def test_an_unknown_name_or_engine_is_refused(monkeypatch):
    with pytest.raises(HDMILError, match="efficientnet_lite0, "):
        load_encoder("vgg")
    with pytest.raises(HDMILError, match="did you mean 'virchow2'"):
        load_encoder("virchow")
    with pytest.raises(HDMILError, match="no device 'cuda:77'"):
        load_encoder(device="cuda:77")
    with pytest.raises(HDMILError, match="engine 'onnx'; choose one of auto, torch, openvino"):
        load_encoder(engine="onnx")
    with pytest.raises(HDMILError, match="precision 'fp16'; choose one of auto, fp32, bf16, int8"):
        load_encoder(precision="fp16")
    monkeypatch.setattr(loading, "has_openvino", lambda: True)
    monkeypatch.setattr(loading.devices, "resolve", lambda device: torch.device(device))
    with pytest.raises(HDMILError, match="runs on the CPU, not on cuda"):
        load_encoder(engine="openvino", device="cuda")
    monkeypatch.setattr(loading, "has_openvino", lambda: False)
    with pytest.raises(HDMILError, match="pip install openvino"):
        load_encoder(engine="openvino", device="cpu")
    assert load_encoder(device="cpu").engine == "torch"


def test_a_damaged_weights_file_is_named(monkeypatch, tmp_path):
    if has_openvino():
        load_encoder()  # a converted copy in the cache does not hide the damage
    bad = tmp_path / "efficientnet-lite0-57934424.pth"
    bad.write_bytes(b"damaged")
    digest = hashlib.sha256(b"damaged").hexdigest()[:8]
    entry = type("Entry", (), {"name": bad.name, "locate": lambda self: bad})()
    monkeypatch.setattr(importlib.metadata, "files", lambda package: [entry])
    with pytest.raises(HDMILError, match=f"{bad.name}: damaged, its sha256 starts with {digest}.*reinstall"):
        load_encoder()
