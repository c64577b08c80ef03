"""Fast execution of a frozen network on uint8 tiles: OpenVINO on the CPU, PyTorch on any device."""

import copy
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hdmil_lib import devices
from hdmil_lib.config import n_threads, torch_threads
from hdmil_lib.errors import HDMILError
from hdmil_lib.system_errors import read_error, refusal_of_file

CPU_CHUNK, GPU_CHUNK = 32, 64
"""Number of tiles that PyTorch computes at a time; on a GPU the next ones are copied meanwhile."""

Precision = Literal["fp32", "bf16", "int8"]


class TorchEngine:
    """PyTorch with channels last: on a CPU with all cores, on a GPU with copies beside the computation."""

    name = "torch"

    def __init__(self, network: nn.Module, device: torch.device, precision: Precision):
        self._network = network.to(device).to(memory_format=torch.channels_last)
        self._run: Callable[[Tensor], Tensor] = self._network
        self._chunk = GPU_CHUNK if device.type == "cuda" else CPU_CHUNK
        self._halved = False
        self.device = device
        self.compiled = False
        self.precision = precision

    def to(self, device: torch.device) -> "TorchEngine":
        """A copy on another device with a network of its own, which is not compiled."""
        return TorchEngine(copy.deepcopy(self._network), device, self.precision)

    def compile(self, side: int) -> None:
        """Compile the network by `torch.compile`, now, for tiles of one size.

        From then on the last chunk is filled up with empty tiles: every other size would be compiled again.

        Args:
            side: Side of the tiles, in pixels.

        Raises:
            HDMILError: There is no compiler that it can use.
        """
        self._run = torch.compile(self._network, dynamic=False)
        self.compiled = True
        try:
            self(np.zeros((1, side, side, 3), np.uint8))
        except torch._dynamo.exc.TorchDynamoException as error:
            raise HDMILError(
                "torch.compile failed; it needs a C++ compiler and Python's headers (on Debian "
                "`apt-get install g++ python3-dev`). Without compiled=True the encoder needs neither."
            ) from error

    def __call__(self, tiles: np.ndarray | Tensor) -> np.ndarray:
        """Encode tiles, the first time that the memory of the GPU is not enough with half as many at a time.

        Raises:
            HDMILError: The memory is not enough for those either.
        """
        given = torch.from_numpy(tiles) if isinstance(tiles, np.ndarray) else tiles
        while True:
            try:
                return self.features(given).cpu().numpy()
            except torch.OutOfMemoryError as error:
                tried = min(self._chunk, len(given))
                if self._halved or tried == 1:
                    raise HDMILError(
                        f"The memory of {self.device} is not enough for {tried} tiles at a time of a batch "
                        f"of {len(given)}; pass a batch_size of {max(1, tried // 2)} or less, or use another "
                        "device."
                    ) from error
            self._use_less(tried)  # after the error and what it holds are gone

    def features(self, tiles: Tensor) -> Tensor:
        """Features of uint8 tiles (B, H, W, 3), float32 (B, D), on the device; a GPU is not waited for."""
        n, on_gpu = len(tiles), self.device.type == "cuda"
        if self.compiled:
            tiles = nn.functional.pad(tiles, (0, 0) * 3 + (0, -n % self._chunk))
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"),
            torch_threads(n_threads()),
            torch.cuda.device(self.device) if on_gpu else nullcontext(),
        ):
            chunks: Iterable[Tensor] = tiles.split(self._chunk)
            if on_gpu and not tiles.is_cuda:
                chunks = self._copies(chunks)
            return torch.cat([self._run(chunk.to(self.device)) for chunk in chunks])[:n].float()

    def _use_less(self, tried: int) -> None:
        self._chunk, self._halved = tried // 2, True
        warnings.warn(
            f"The memory of {self.device} is not enough for {tried} tiles at a time; from now on "
            f"{self._chunk} are encoded at a time.",
            RuntimeWarning,
            stacklevel=4,
        )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _copies(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks on the GPU: while it computes one, the next is copied from pinned memory."""
        computing, copying = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        for chunk in chunks:
            with torch.cuda.stream(copying):
                on_gpu = devices.pinned(chunk).to(self.device, non_blocking=True)
            computing.wait_stream(copying)
            on_gpu.record_stream(computing)
            yield on_gpu


class OpenVINOEngine:
    """OpenVINO with one tile per request and one request per stream, so that each core has its own tile.

    The activations of one tile stay in a core's cache; larger requests were slower. A batch of any length
    needs no padding and no new compilation.
    """

    name = "openvino"
    device = torch.device("cpu")

    def __init__(self, model_path: Path, precision: Precision):
        """Compile a model for this CPU.

        Args:
            model_path: A file written by `convert` or, for int8, by `quantize`.
            precision: Requested precision; the attribute `precision` says what the CPU took.

        Raises:
            HDMILError: The file is damaged, or cannot be read.
        """
        import openvino as ov

        hints = {
            "PERFORMANCE_HINT": "THROUGHPUT",
            "INFERENCE_PRECISION_HINT": {"bf16": "bf16"}.get(precision, "f32"),
            "INFERENCE_NUM_THREADS": n_threads(),  # it does not look at OMP_NUM_THREADS
        }
        try:
            compiled = ov.Core().compile_model(model_path, "CPU", hints)
        except RuntimeError as error:
            weights = model_path.with_suffix(".bin")  # beside the description, which is the other file
            at_fault = weights if refusal_of_file(weights) else model_path
            damage = "damaged copy of an encoder; delete it and try again."
            raise read_error(HDMILError, at_fault, error, damage) from error
        taken = compiled.get_property("INFERENCE_PRECISION_HINT")
        self.precision: Precision = precision if precision != "bf16" or taken == ov.Type.bf16 else "fp32"
        self._requests = ov.AsyncInferQueue(compiled)
        self._requests.set_callback(_store_row)
        self._dim = compiled.output(0).shape[1]

    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        features = np.empty((len(tiles), self._dim), np.float32)
        for i in range(len(tiles)):
            self._requests.start_async({0: tiles[i : i + 1]}, (features, i), share_inputs=True)
        self._requests.wait_all()
        return features


def _store_row(request: Any, place: tuple[np.ndarray, int]) -> None:
    features, i = place
    features[i] = request.get_output_tensor(0).data[0]


def has_openvino() -> bool:
    """Whether the optional package openvino is installed."""
    return importlib.util.find_spec("openvino") is not None


def has_nncf() -> bool:
    """Whether the optional package nncf is installed."""
    return importlib.util.find_spec("nncf") is not None


def has_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bf16; whether they are faster differs between CPUs."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False  # not measured
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def convert(network: nn.Module, input_size: int, path: Path) -> None:
    """Write a network as an OpenVINO model for one uint8 tile; whole or not at all."""
    import openvino as ov

    tile = torch.zeros(1, input_size, input_size, 3, dtype=torch.uint8)
    with torch.inference_mode(), warnings.catch_warnings():
        # OpenVINO traces the network by torch.jit, which is deprecated, for this one shape, as intended.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        model = ov.convert_model(network, example_input=tile, input=[tuple(tile.shape)])
    _save(model, path)


def quantize(model_path: Path, tiles: np.ndarray, path: Path) -> None:
    """Write an int8 copy of a model, whole or not at all (post-training quantization by NNCF).

    Weights and activations get 8 bits, with ranges taken from the tiles; biases are corrected by the mean
    error of each layer.

    Args:
        model_path: File written by `convert`.
        tiles: Tiles like those to be encoded, uint8 (n, H, W, 3) of the model's input size.
        path: File to write.
    """
    import nncf
    import openvino as ov

    nncf.set_log_level(logging.ERROR)
    model = nncf.quantize(
        ov.Core().read_model(model_path),
        nncf.Dataset([tile[None] for tile in tiles]),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(tiles),
        fast_bias_correction=False,
    )
    _save(model, path)


def _save(model: Any, path: Path) -> None:
    import openvino as ov

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    ov.save_model(model, partial, compress_to_fp16=False)
    for suffix in (".bin", ".xml"):  # the .xml last: its presence says that the model is complete
        partial.with_suffix(suffix).replace(path.with_suffix(suffix))
