"""`load_encoder`: a frozen network that turns tiles into features, fast on the machine at hand."""

import hashlib
import json
import math
import platform
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hdmil_lib import devices
from hdmil_lib.config import cache_dir
from hdmil_lib.encoders.engines import (
    OpenVINOEngine,
    Precision,
    TorchEngine,
    convert,
    has_bf16,
    has_nncf,
    has_openvino,
    quantize,
)
from hdmil_lib.encoders.networks import (
    build_network,
    fuse_batch_norms,
    hub_revision,
    weights_hash,
    weights_source,
)
from hdmil_lib.encoders.own import find_spec
from hdmil_lib.encoders.registry import ENCODERS, TIMM, EncoderSpec, is_code
from hdmil_lib.errors import HDMILError
from hdmil_lib.kernels.tile_preprocess import StainTransform
from hdmil_lib.slides.gpu_decoding import nvjpeg
from hdmil_lib.slides.resampling import resample
from hdmil_lib.storage import write_json
from hdmil_lib.version import __version__

ENGINES = ("auto", "torch", "openvino")
PRECISIONS = ("auto", "fp32", "bf16", "int8")
DECODERS = ("cpu", "auto", "nvjpeg")
COMPILES_ITSELF = "The engine 'openvino' compiles by itself; compiled=True is for engine='torch'."

__all__ = ["ENCODERS", "Encoder", "EncoderSpec", "load_encoder"]

MIN_COSINE = 0.999
"""Least cosine between features in bf16 and in fp32 at which precision="auto" takes bf16."""

MIN_SPEED_UP = 1.2
"""Least speed of bf16, relative to fp32, at which precision="auto" takes it on a CPU."""


class Encoder:
    """A frozen encoder; call it with uint8 tiles (B, H, W, 3) for float32 features (B, D).

    Attributes:
        device: Device that computes the features.
        spec: Entry in `ENCODERS`, or that of an encoder of the user's own.
        name: Its name.
        dim: Number of features per tile, D.
        input_size: Side of the image that the network sees, in pixels; tiles of other sizes are resized.
        weights_hash: First 12 hex digits of the sha256 of weights and normalization, that of the stain too.
        engine: "openvino" or "torch".
        precision: "fp32", "bf16" or "int8", as the engine really computes.
        batch_size: Number of tiles per call at which it is fast: 32 on a CPU, where more only adds waiting,
            256 on a GPU.
        decoder: What decodes the tiles of slides for it: "cpu", or "nvjpeg" where a slide allows it.
        revision: Commit of the weights on the Hugging Face hub; empty for other encoders.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        weights_hash: str,
        run: OpenVINOEngine | TorchEngine,
        decoder: Literal["cpu", "nvjpeg"] = "cpu",
        load: "Callable[[int], Encoder] | None" = None,
    ):
        self.spec = spec
        self.name, self.dim, self.input_size = spec.name, spec.dim, spec.input_size
        self.weights_hash, self.revision = weights_hash, hub_revision(spec)
        self.engine, self.precision, self.device = run.name, run.precision, run.device
        self.batch_size = 256 if run.device.type == "cuda" else 32
        self.decoder = decoder
        self._run, self._load = run, load
        self._others: dict[int, Encoder] = {}

    def __call__(self, tiles: np.ndarray | Tensor) -> np.ndarray:
        """Encode tiles.

        Args:
            tiles: RGB pixels, uint8 (B, H, W, 3), an array or a tensor on the encoder's device; B may be 0.

        Returns:
            float32 (B, D), in the order of the tiles.

        Raises:
            ValueError: `tiles` is not a batch of RGB images in uint8, or on another device.
            HDMILError: The memory of the GPU is not enough.
        """
        if tiles.dtype not in (np.uint8, torch.uint8) or tiles.ndim != 4 or tiles.shape[3] != 3:
            raise ValueError(f"tiles must be uint8 (B, H, W, 3), got {tiles.dtype} {tuple(tiles.shape)}")
        if isinstance(tiles, Tensor) and tiles.device != self.device:
            raise ValueError(f"tiles are on {tiles.device}, the encoder is on {self.device}")
        if len(tiles) == 0:
            return np.empty((0, self.dim), np.float32)
        if isinstance(tiles, Tensor) and isinstance(self._run, TorchEngine):
            return self._run(_fit_on_device(tiles, self.spec.resize, self.input_size))
        return self._run(_fit(np.asarray(tiles), self.spec.resize, self.input_size))

    def at(self, side: int) -> "Encoder":
        """The same network for images of another side, in pixels; kept after the first call.

        Raises:
            HDMILError: The network takes images of one size only.
        """
        if side == self.input_size:
            return self
        if self._load is None or self.spec.pool != "mean":
            raise HDMILError(
                f"The encoder {self.name!r} takes images of {self.input_size} pixels only; for a second look "
                "take efficientnet_lite0."
            )
        if side not in self._others:
            self._others[side] = self._load(side)
        return self._others[side]

    def to(self, device: str | torch.device) -> "Encoder":
        """A copy on another device with a network of its own, so that several GPUs can encode at once.

        Args:
            device: Device, as `devices.resolve` takes it. On a CPU slides are decoded by the CPU.

        Raises:
            HDMILError: There is no such device, the engine is not "torch", or nvJPEG does not work there.
        """
        if not isinstance(self._run, TorchEngine):
            raise HDMILError(
                f"The engine {self.engine!r} runs on the CPU alone; load the encoder with engine='torch'."
            )
        target = devices.resolve(device)
        decoder = _choose_decoder(self.decoder if target.type == "cuda" else "cpu", target)
        load = self._load
        resized = None if load is None else lambda side: load(side).to(target)
        other = Encoder(self.spec, self.weights_hash, self._run.to(target), decoder, resized)
        if self._run.compiled:
            other.compile()
        return other

    def compile(self) -> None:
        """Compile the network by `torch.compile` for tiles of `input_size`, now; this takes about a minute.

        Raises:
            HDMILError: The engine is not "torch", or there is no compiler that it can use.
        """
        if not isinstance(self._run, TorchEngine):
            raise HDMILError(COMPILES_ITSELF)
        self._run.compile(self.input_size)

    def __repr__(self) -> str:
        return f"Encoder({self.name!r}, dim={self.dim}, {self.engine} {self.precision}, {self.weights_hash})"


def load_encoder(
    name: str = "efficientnet_lite0",
    *,
    device: str | torch.device = "auto",
    engine: Literal["auto", "torch", "openvino"] = "auto",
    precision: Literal["auto", "fp32", "bf16", "int8"] = "auto",
    int8_tiles: np.ndarray | None = None,
    compiled: bool = False,
    stain: StainTransform | None = None,
    decoder: Literal["cpu", "auto", "nvjpeg"] = "cpu",
    weights: str | Path | None = None,
) -> Encoder:
    """Load a frozen encoder (paper, section 3.1: instance features).

    The OpenVINO model of an encoder is kept in the cache; from the second call on it is read without building
    the network. For an encoder of the hub it is that of the revision in the hub's local cache.

    Args:
        name: A key of `ENCODERS`, or an encoder of your own: `timm:NAME` or `module:function`; `@COMMIT`
            after a name pins the revision on the hub. See `own.find_spec`. The default's weights are
            installed with hdmil; others are downloaded.
        device: Device that runs the encoder, as `devices.resolve` takes it.
        engine: "auto" takes OpenVINO on a CPU where it is installed, else PyTorch.
        precision: "auto" takes bf16 where it is faster, which on a CPU is measured once, and the features of
            probe tiles stay within a cosine of 0.999 of fp32. "int8" is used only when named: the fastest on
            a CPU, at a cosine of about 0.998 on tiles like `int8_tiles`.
        int8_tiles: Tiles from which int8 takes the ranges of its numbers, uint8 (n, H, W, 3). A hundred
            from several slides like those to be encoded suffice; see `extraction.spread_tiles`.
        compiled: Whether to call `Encoder.compile`; for the engine "torch" only. Features differ from those
            of the uncompiled network by rounding.
        stain: Stain normalization of all tiles, from `fit_macenko` or `fit_reinhard`, computed with the rest
            of the network. It is part of `weights_hash`, so that no bag or model mixes both.
        decoder: What decodes the JPEG tiles of slides. "nvjpeg" does it on the NVIDIA GPU of the encoder,
            many tiles in one call, where a slide allows it; "auto" takes it where it is installed. Its pixels
            differ by a few levels from those of OpenSlide, which "cpu" gives, and features with them; a model
            should be used as it was trained. Bags record it.
        weights: Local file of weights for the architecture of `name`, instead of those that are downloaded.

    Raises:
        HDMILError: The name, the device or the combination is unknown, or the weights are not available, or
            "nvjpeg" does not work here.
    """
    spec, backbone = find_spec(name, weights)
    options: dict[str, Any] = {"precision": precision, "int8_tiles": int8_tiles, "compiled": compiled}
    return _load(spec, devices.resolve(device), engine, stain, decoder, backbone=backbone, **options)


def load_recorded(name: str, **options: Any) -> Encoder:
    """Load the encoder that a file names, such as that of a model.

    Args:
        name: As for `load_encoder`, but no Python code: a file must not choose what is run.
        **options: Options of `load_encoder`.

    Raises:
        HDMILError: As from `load_encoder`, or the name is Python code.
    """
    if is_code(name):
        raise HDMILError(
            f"The model's encoder is Python code, {name}, which runs only if you name it yourself: --encoder "
            f"{name}, or model.encoder = load_encoder({name!r})."
        )
    return load_encoder(name, **options)


def _load(
    spec: EncoderSpec,
    device: torch.device,
    engine: str,
    stain: StainTransform | None,
    decoder: str,
    *,
    precision: Literal["auto", "fp32", "bf16", "int8"],
    int8_tiles: np.ndarray | None,
    compiled: bool,
    backbone: nn.Module | None = None,
) -> Encoder:
    """As `load_encoder`, for any specification."""
    if spec.weights == "code" and engine == "auto":
        engine = "torch"  # a converted copy would not notice that the code was changed
    engine = _choose_engine(engine, device)
    if spec.weights == "code" and engine != "torch":
        raise HDMILError(f"The encoder {spec.name!r} is your own code, which runs with engine='torch'.")
    if compiled and engine != "torch":
        raise HDMILError(COMPILES_ITSELF)
    if precision not in PRECISIONS:
        raise HDMILError(f"Unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    seen = _checked_int8_tiles(int8_tiles, engine, spec) if precision == "int8" else None
    reading = _choose_decoder(decoder, device)

    if engine == "openvino":
        digest, model_path = _converted(spec, stain)
        if seen is not None:
            model_path = _quantized(model_path, seen)
    else:
        network = build_network(spec, stain, backbone)
        digest = weights_hash(network)
        _fuse(network, spec)

    def start(precision: Precision) -> Encoder:
        def resized(side: int) -> Encoder:
            other = replace(spec, resize=side, input_size=side)
            options: dict[str, Any] = {"precision": precision, "int8_tiles": int8_tiles, "compiled": compiled}
            return _load(other, device, engine, stain, decoder, **options)

        if engine == "openvino":
            return Encoder(spec, digest, OpenVINOEngine(model_path, precision), reading, resized)
        return Encoder(spec, digest, TorchEngine(network, device, precision), reading, resized)

    encoder = start("fp32" if precision == "auto" else precision)
    if precision == "auto" and has_bf16(device):
        encoder = _better(encoder, start)
    if compiled:
        encoder.compile()
    return encoder


def _choose_engine(engine: str, device: torch.device) -> Literal["torch", "openvino"]:
    if engine not in ENGINES:
        raise HDMILError(f"Unknown engine {engine!r}; choose one of {', '.join(ENGINES)}.")
    if engine == "auto":
        return "openvino" if device.type == "cpu" and has_openvino() else "torch"
    if engine == "openvino" and not has_openvino():
        raise HDMILError(
            "The engine 'openvino' is not installed. Run `pip install openvino`, or use 'torch'."
        )
    if engine == "openvino" and device.type != "cpu":
        raise HDMILError(f"The engine 'openvino' runs on the CPU, not on {device}; use engine='torch' there.")
    return "openvino" if engine == "openvino" else "torch"


def _choose_decoder(decoder: str, device: torch.device) -> Literal["cpu", "nvjpeg"]:
    if decoder not in DECODERS:
        raise HDMILError(f"Unknown decoder {decoder!r}; choose one of {', '.join(DECODERS)}.")
    if decoder == "cpu":
        return "cpu"
    try:
        nvjpeg(device)
    except HDMILError:
        if decoder == "nvjpeg":
            raise
        return "cpu"
    return "nvjpeg"


def _converted(spec: EncoderSpec, stain: StainTransform | None) -> tuple[str, Path]:
    """Weights hash of an encoder and its OpenVINO model in the cache, converted where it is missing.

    A record beside the model maps the source of the weights to their hash, which is part of the model's name.
    Where the record is missing, damaged or of other weights, the network is built and the record is replaced.
    """
    import openvino as ov

    versions = f"{__version__}-openvino{ov.__version__.split('-')[0]}"
    folder = cache_dir() / "encoders"
    normalized = "" if stain is None else f"-{hashlib.sha256(repr(stain).encode()).hexdigest()[:12]}"
    name = re.sub(r"[^\w.-]", "_", spec.name)
    of_file = "-file" if spec.weights == "file" else ""
    record_path = folder / f"{name}{of_file}{normalized}-{versions}.json"

    def model_path(digest: str) -> Path:
        usual = ENCODERS.get(spec.name, spec).input_size
        size = "" if spec.input_size == usual else f"-{spec.input_size}px"
        return folder / f"{name}{size}-{digest}-{versions}.xml"

    source = weights_source(spec)
    digest = _recorded_hash(record_path, source)
    if digest is not None and model_path(digest).is_file():
        return digest, model_path(digest)
    network = build_network(spec, stain)
    digest = weights_hash(network)
    if not model_path(digest).is_file():
        _fuse(network, spec)
        convert(network, spec.input_size, model_path(digest))
    # Weights that were replaced meanwhile get no record; those downloaded just now have no source before.
    source_after = weights_source(spec)
    if source_after is not None and source in (None, source_after):
        with suppress(OSError):  # without the record the next call is slower, no more
            write_json(record_path, {"weights_hash": digest, "source": source_after})
    return digest, model_path(digest)


def _fuse(network: nn.Module, spec: EncoderSpec) -> None:
    """Fuse the batch norms of a known encoder; others may run their layers in another order than listed."""
    if spec.weights != "code" and not spec.name.startswith(TIMM):
        fuse_batch_norms(network)


def _recorded_hash(path: Path, source: dict[str, str] | None) -> str | None:
    """Hash of the weights of a source, or None without a readable record of that source."""
    if source is None:
        return None
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("source") != source:
        return None
    digest = record.get("weights_hash")
    return digest if isinstance(digest, str) and re.fullmatch("[0-9a-f]{12}", digest) else None


def _quantized(model_path: Path, tiles: np.ndarray) -> Path:
    """The int8 copy of a model in the cache for these tiles, written where it is missing."""
    path = model_path.with_name(f"{model_path.stem}-int8-{hashlib.sha256(tiles.data).hexdigest()[:8]}.xml")
    if not path.is_file():
        quantize(model_path, tiles, path)
    return path


def _checked_int8_tiles(tiles: np.ndarray | None, engine: str, spec: EncoderSpec) -> np.ndarray:
    if engine != "openvino" or not has_nncf():
        raise HDMILError("int8 needs OpenVINO and NNCF, on a CPU. Run `pip install openvino nncf`.")
    if tiles is None or len(tiles) == 0:
        raise HDMILError("int8 takes the ranges of its numbers from tiles: pass int8_tiles=.")
    return _fit(tiles, spec.resize, spec.input_size)


def _fit(tiles: np.ndarray, resize: int, input_size: int) -> np.ndarray:
    """Tiles resized and center-cropped as the encoder's authors do, contiguous in memory."""
    if tiles.shape[1:3] != (resize, resize):
        resized = (Image.fromarray(t).resize((resize, resize), Image.Resampling.BICUBIC) for t in tiles)
        tiles = np.stack([np.asarray(image) for image in resized])
    edge = (resize - input_size) // 2
    return np.ascontiguousarray(tiles[:, edge : edge + input_size, edge : edge + input_size])


def _fit_on_device(tiles: Tensor, resize: int, input_size: int) -> Tensor:
    """As `_fit`, by `resample`, on the device of the tiles."""
    if tiles.is_cuda:  # the stream that made them must not use their memory again before this one is done
        tiles.record_stream(torch.cuda.current_stream(tiles.device))
    height, width = tiles.shape[1:3]
    if (height, width) != (resize, resize):
        scale = (width / resize, height / resize)
        tiles = resample(tiles, np.zeros((len(tiles), 2)), scale, (resize, resize))
    edge = (resize - input_size) // 2
    return tiles[:, edge : edge + input_size, edge : edge + input_size].contiguous()


def _better(exact: Encoder, start: Callable[[Precision], Encoder]) -> Encoder:
    """The encoder in fp32, or in bf16 where it is faster and nearly the same.

    On a GPU bf16 is taken to be faster. On a CPU some tiles are timed, once: the cache keeps the answer for
    this encoder, processor and number of threads.
    """
    if exact.device.type != "cpu":
        fast = start("bf16")
        return fast if _least_cosine(exact, fast) >= MIN_COSINE else exact
    what = (exact.name, exact.input_size, exact.weights_hash, exact.engine, __version__, torch.__version__)
    key = repr((what, processor(), torch.get_num_threads()))
    path = cache_dir() / "precision" / f"{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return start("bf16") if json.loads(path.read_text())["bf16"] else exact
    fast = start("bf16")
    ratio, cosine = _speed_ratio(exact, fast), _least_cosine(exact, fast)
    chosen = ratio >= MIN_SPEED_UP and cosine >= MIN_COSINE
    with suppress(OSError):  # without the record the next call is slower, no more
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"bf16": chosen, "times as fast": ratio, "least cosine": cosine})
    return fast if chosen else exact


def processor() -> str:
    """Name of the CPU."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        named = next((line for line in lines if line.startswith("model name")), ":")
        return named.partition(":")[2].strip()
    return platform.processor()


def _speed_ratio(exact: Encoder, fast: Encoder, n_tiles: int = 16, repeats: int = 3) -> float:
    """How many times as fast the second encoder is, by the best of several runs in turns."""
    tiles = np.random.default_rng(0).integers(0, 256, (n_tiles, *[exact.input_size] * 2, 3), dtype=np.uint8)
    best = {exact: math.inf, fast: math.inf}
    for repeat in range(repeats + 1):
        for encoder in best:
            start = time.perf_counter()
            encoder(tiles)
            if repeat:  # the first run warms up
                best[encoder] = min(best[encoder], time.perf_counter() - start)
    return best[exact] / best[fast]


def _least_cosine(exact: Encoder, fast: Encoder) -> float:
    """Smallest cosine between two encoders' features of the same probe tiles: coarse colors with noise."""
    rng = np.random.default_rng(0)
    side = exact.input_size
    colors = rng.integers(0, 256, (8, 8, 8, 3)).repeat(-(-side // 8), 1).repeat(-(-side // 8), 2)
    noise = rng.normal(0, 20, (8, side, side, 3))
    tiles = np.clip(colors[:, :side, :side] + noise, 0, 255).astype(np.uint8)
    a, b = exact(tiles), fast(tiles)
    return float(((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())
