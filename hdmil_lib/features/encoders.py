"""`load_encoder`: a frozen network that turns tiles into features, fast on the machine at hand."""

import hashlib
from typing import Literal

import numpy as np
import torch
from PIL import Image

from hdmil_lib import __version__
from hdmil_lib.config import cache_dir
from hdmil_lib.errors import HDMILError
from hdmil_lib.features.engines import (
    OpenVINOEngine,
    Precision,
    TorchEngine,
    convert,
    has_fast_bf16,
    has_nncf,
    has_openvino,
    quantize,
)
from hdmil_lib.features.networks import build_network, fuse_batch_norms, weights_hash
from hdmil_lib.features.registry import ENCODERS, EncoderSpec

__all__ = ["ENCODERS", "Encoder", "EncoderSpec", "load_encoder"]

MIN_COSINE = 0.999
"""Features in bf16 must be this close to fp32 to be chosen unasked."""


class Encoder:
    """A frozen encoder; call it with uint8 tiles (B, H, W, 3) for float32 features (B, D).

    Attributes:
        spec: Its entry in `ENCODERS`.
        name: Name in `ENCODERS`.
        dim: Features a tile, D.
        input_size: Side in pixels that the network sees; tiles of other sizes are resized.
        weights_hash: First 12 hex digits of the sha256 of weights and normalisation.
        engine: "openvino" or "torch".
        precision: "fp32", "bf16" or "int8", as the engine really computes.
        batch_size: Tiles a call with which it is fast: 32 on a CPU, where more would only wait, 256 on a GPU.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        weights_hash: str,
        run: OpenVINOEngine | TorchEngine,
        batch_size: int = 32,
    ):
        self.spec = spec
        self.name, self.dim, self.input_size = spec.name, spec.dim, spec.input_size
        self.weights_hash = weights_hash
        self.engine, self.precision = run.name, run.precision
        self.batch_size = batch_size
        self._run = run

    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        """Encode tiles.

        Args:
            tiles: RGB pixels, uint8 (B, H, W, 3); B may be 0.

        Returns:
            float32 (B, D), in the order of the tiles.

        Raises:
            ValueError: `tiles` is not a batch of RGB images in uint8.
        """
        if tiles.dtype != np.uint8 or tiles.ndim != 4 or tiles.shape[3] != 3:
            raise ValueError(f"tiles must be uint8 (B, H, W, 3), got {tiles.dtype} {tiles.shape}")
        if len(tiles) == 0:
            return np.empty((0, self.dim), np.float32)
        return self._run(_fit(tiles, self.spec.resize, self.input_size))

    def __repr__(self) -> str:
        return f"Encoder({self.name!r}, dim={self.dim}, {self.engine} {self.precision}, {self.weights_hash})"


def load_encoder(
    name: str = "efficientnet_lite0",
    *,
    device: str | torch.device | None = None,
    engine: Literal["auto", "torch", "openvino"] = "auto",
    precision: Literal["auto", "fp32", "bf16", "int8"] = "auto",
    calibration: np.ndarray | None = None,
    compiled: bool = False,
) -> Encoder:
    """Load a frozen encoder (paper, section 3.1: instance features).

    Args:
        name: A key of `ENCODERS`. The default's weights are installed with hdmil; others are downloaded.
        device: Where it runs; the GPU if there is one, else the CPU.
        engine: "auto" takes OpenVINO on the CPU where it is installed.
        precision: "auto" takes bf16 where the hardware is faster in it and the features of probe tiles
            stay within a cosine of 0.999 of fp32. "int8" is for those who ask: the fastest on a CPU, at a
            cosine of about 0.998 on tiles like those of the calibration.
        calibration: For int8, tiles like those to come, uint8 (n, H, W, 3), from which the ranges of 8 bits
            are taken; a hundred from several slides will do. See `extraction.calibration_tiles`.
        compiled: Fuse the network by `torch.compile` for the engine "torch". Loading takes a minute more, and
            features differ from the others by rounding.

    Raises:
        HDMILError: The name or combination is unknown, or the weights cannot be had.
    """
    if name not in ENCODERS:
        raise HDMILError(f"Unknown encoder {name!r}; known are {', '.join(ENCODERS)}.")
    spec = ENCODERS[name]
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    engine = _choose_engine(engine, device)
    if compiled and engine != "torch":
        raise HDMILError("The engine 'openvino' compiles by itself; compiled=True is for engine='torch'.")
    network = build_network(spec)
    digest = weights_hash(network)
    fuse_batch_norms(network)

    if engine == "openvino":
        import openvino as ov

        version = ov.__version__.split("-")[0]
        model_path = cache_dir() / "encoders" / f"{name}-{digest}-{__version__}-openvino{version}.xml"
        if not model_path.is_file():
            convert(network, spec.input_size, model_path)

    if precision == "int8":
        tiles = _checked_calibration(calibration, engine, spec)
        exact_path = model_path
        seen = hashlib.sha256(tiles).hexdigest()[:8]
        model_path = exact_path.with_name(f"{exact_path.stem}-int8-{seen}.xml")
        if not model_path.is_file():
            quantize(exact_path, tiles, model_path)

    def start(precision: Precision) -> Encoder:
        if engine == "openvino":
            return Encoder(spec, digest, OpenVINOEngine(model_path, precision))
        batch_size = 256 if device.type == "cuda" else 32
        return Encoder(spec, digest, TorchEngine(network, device, precision), batch_size)

    encoder = start("fp32" if precision == "auto" else precision)
    if precision == "auto" and has_fast_bf16(device):
        fast = start("bf16")
        if _least_cosine(encoder, fast) >= MIN_COSINE:
            encoder = fast
    if compiled:
        encoder._run.compile(spec.input_size)
    return encoder


def _choose_engine(engine: str, device: torch.device) -> str:
    if engine == "auto":
        return "openvino" if device.type == "cpu" and has_openvino() else "torch"
    if engine == "openvino" and not has_openvino():
        raise HDMILError(
            "The engine 'openvino' is not installed. Run `pip install openvino`, or use 'torch'."
        )
    if engine == "openvino" and device.type != "cpu":
        raise HDMILError(f"The engine 'openvino' runs on the CPU, not on {device}; use engine='torch' there.")
    return engine


def _checked_calibration(tiles: np.ndarray | None, engine: str, spec: EncoderSpec) -> np.ndarray:
    if engine != "openvino" or not has_nncf():
        raise HDMILError("int8 needs OpenVINO and NNCF, on a CPU. Run `pip install openvino nncf`.")
    if tiles is None or len(tiles) == 0:
        raise HDMILError("int8 takes the ranges of its numbers from tiles: pass calibration=.")
    return _fit(tiles, spec.resize, spec.input_size)


def _fit(tiles: np.ndarray, resize: int, input_size: int) -> np.ndarray:
    """Resize square tiles and take the centre, as the encoder's authors do; contiguous."""
    if tiles.shape[1:3] != (resize, resize):
        resized = (Image.fromarray(t).resize((resize, resize), Image.Resampling.BICUBIC) for t in tiles)
        tiles = np.stack([np.asarray(image) for image in resized])
    edge = (resize - input_size) // 2
    return np.ascontiguousarray(tiles[:, edge : edge + input_size, edge : edge + input_size])


def _least_cosine(exact: Encoder, fast: Encoder) -> float:
    """Smallest cosine between two encoders' features of the same probe tiles: coarse colours and noise."""
    rng = np.random.default_rng(0)
    side = exact.input_size
    colours = rng.integers(0, 256, (8, 8, 8, 3)).repeat(-(-side // 8), 1).repeat(-(-side // 8), 2)
    noise = rng.normal(0, 20, (8, side, side, 3))
    tiles = np.clip(colours[:, :side, :side] + noise, 0, 255).astype(np.uint8)
    a, b = exact(tiles), fast(tiles)
    return float(((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())
