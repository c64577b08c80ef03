"""HDMIL: LIPN selects tiles on the thumbnail, DMIN classifies the slide from them (paper: inference)."""

import math
from collections.abc import Generator, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from hdmil_lib import devices
from hdmil_lib.bag_files import LOOK
from hdmil_lib.errors import BagError, CheckpointError
from hdmil_lib.kernels import lipn_forward
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models import pretrained
from hdmil_lib.models.base import MILOutput, bags_of
from hdmil_lib.models.dmin import DMIN
from hdmil_lib.models.info import ModelInfo
from hdmil_lib.models.lipn import LIPN, keep_mask, one_per_branch
from hdmil_lib.models.look import SecondLook
from hdmil_lib.models.ragged import highest, random_tiles
from hdmil_lib.models.settling import Expected, expected, neutral

if TYPE_CHECKING:  # modules of higher layers; the methods that use them import them
    import pandas as pd

    from hdmil_lib.bags import Bag
    from hdmil_lib.encoders.loading import Encoder
    from hdmil_lib.inference.anytime import AnytimeStep, Trajectory
    from hdmil_lib.inference.prediction import Prediction
    from hdmil_lib.slides.listing import Source

Pooling = Literal["dmin", "lipn"]
Screening = Literal["networks", "random"]
PATCHES_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class HDMILOutput(MILOutput):
    """Output of HDMIL; `attention` is that of DMIN, (N, C), nan for tiles that were not read.

    Attributes:
        mask: Tiles kept for each branch, bool (N, C): LIPN's selection of tiles to read or, if all tiles were
            read, DMIN's selection of tiles to pool.
        read: Tiles whose features DMIN took, bool (N,).
        keep_ratio: Share of each bag's tiles that were read, (B,).
    """

    attention: Tensor
    mask: Tensor
    read: Tensor
    keep_ratio: Tensor


Self = TypeVar("Self", bound="HDMIL")


class HDMIL(nn.Module):
    """DMIN, LIPN, and the rules that connect them.

    LIPN selects the tiles to read: the union over branches. Among these DMIN makes its own selection for each
    branch. In the paper each branch pools the tiles that LIPN kept for it instead (`pooling="lipn"`); on
    synthetic slides that is less accurate (notebook 06). With `all_tiles=True` LIPN is not used and DMIN
    reads every tile, which is the paper's HDMIL†. With a second look, which is not in the paper, LIPN's tiles
    are first seen coarsely by the encoder, and only those that `look` scores highest are read in full.

    Args:
        dmin: Trained classifier.
        lipn: Pre-screening network trained for it.
        thresholds: Thresholds on LIPN's sigmoid, one number or one per branch; DMIN's gamma by default.
        screening: What chooses the tiles to read: "networks", or "random" where these chose no better than
            chance on validation slides; see `training.cascade`.
        random_share: Share of the tiles of a slide that are read at random.
        look: Second look trained for `dmin`; `None` for none, as in the paper.
        look_share: Share of the tiles of a slide that are read after the second look, the nearest number, at
            least one: those of highest score among those of LIPN.
        slope: Factor of the class scores where a second look chose the tiles; `calibrated` describes it.
        bias: Summands of these class scores, (C,); 0 by default.
        settling: How an answer settles as more tiles are read, (G, 2 + C); see `models.settling`.
        margin: Lead in log odds at which `stream` stops; infinite to read everything.
        pooling: Network whose selection a branch pools: "dmin" or, as published, "lipn".
        trained_thresholds: Thresholds chosen in training, if they differ from `thresholds`.
        info: What the model was trained for; needed for slides and for saving.

    Attributes:
        inputs: Fields of a `BagBatch` that it takes.
        decoder: What decodes the tiles of slides for an encoder that is loaded on a GPU; see `load_encoder`.

    Raises:
        ValueError: The networks have different numbers of classes, or a threshold, the margin, `pooling` or
            `info` does not fit.
    """

    inputs: tuple[str, ...] = ("features", "rows", "patches")
    thresholds: Tensor
    trained_thresholds: Tensor
    margin: Tensor
    look_share: Tensor
    slope: Tensor
    bias: Tensor
    settling: Tensor

    def __init__(
        self,
        dmin: DMIN,
        lipn: LIPN,
        *,
        thresholds: float | Sequence[float] | Tensor | None = None,
        screening: Screening = "networks",
        random_share: float = 1.0,
        look: SecondLook | None = None,
        look_share: float = 0.1,
        slope: float = 1.0,
        bias: Sequence[float] | Tensor | None = None,
        settling: Sequence[Sequence[float]] | Tensor | None = None,
        margin: float = math.inf,
        pooling: Pooling = "dmin",
        trained_thresholds: float | Sequence[float] | Tensor | None = None,
        info: ModelInfo | None = None,
    ):
        super().__init__()
        if dmin.n_classes != lipn.n_classes:
            raise ValueError(f"dmin has {dmin.n_classes} classes, lipn has {lipn.n_classes}")
        if info is not None and len(info.classes) != dmin.n_classes:
            raise ValueError(f"info names {len(info.classes)} classes, the networks have {dmin.n_classes}")
        if pooling not in ("dmin", "lipn"):
            raise ValueError(f"pooling is {pooling!r}, expected 'dmin' or 'lipn'")
        if not margin > 0:
            raise ValueError(f"margin is {margin}, expected more than 0")
        if screening not in ("networks", "random"):
            raise ValueError(f"screening is {screening!r}, expected 'networks' or 'random'")
        if not 0 < random_share <= 1:
            raise ValueError(f"random_share is {random_share}, expected more than 0 and at most 1")
        if not 0 < look_share <= 1:
            raise ValueError(f"look_share is {look_share}, expected more than 0 and at most 1")
        if look is not None and look.settings.in_dim != dmin.in_dim:
            raise ValueError(
                f"look takes {look.settings.in_dim} features, dmin {dmin.in_dim}: both read one encoder"
            )
        chosen = dmin.settings.threshold if thresholds is None else thresholds
        self.dmin, self.lipn, self.look, self.pooling, self.info = dmin, lipn, look, pooling, info
        self.screening, self.random_share = screening, random_share
        if look is not None:
            self.inputs = (*self.inputs, f"{LOOK}{look.side}")
            self.register_buffer("look_share", torch.tensor(float(look_share)))
            self.register_buffer("slope", torch.tensor(float(slope)))
            zeros = torch.zeros(dmin.n_classes)
            self.register_buffer("bias", zeros if bias is None else torch.as_tensor(bias).float().clone())
            table = neutral(dmin.n_classes) if settling is None else torch.as_tensor(settling).float().clone()
            self.register_buffer("settling", table)
        self.register_buffer("thresholds", one_per_branch(chosen, dmin.n_classes))
        trained = chosen if trained_thresholds is None else trained_thresholds
        self.register_buffer("trained_thresholds", one_per_branch(trained, dmin.n_classes))
        self.register_buffer("margin", torch.tensor(float(margin)))
        self._packed: tuple[list[tuple[int, int]], list[Tensor]] | None = None
        self.decoder = "cpu"
        self._encoder: Encoder | None = None
        self._loaded: dict[torch.device, Encoder] = {}
        self.eval()

    def forward(
        self,
        features: Tensor,
        patches: Tensor | None,
        segments: Segments | None = None,
        *,
        rows: Tensor | None = None,
        looks: Tensor | None = None,
        all_tiles: bool = False,
    ) -> HDMILOutput:
        """Run two-stage inference on bags.

        Args:
            features: Features of the tiles, bag after bag, (N, D), or (M, D) with `rows`.
            patches: The same tiles at 8 um/px, uint8 (N, 16, 16, 3); `None` only with `all_tiles`.
            segments: The B bags; `None` for one bag.
            rows: Rows of the features of these tiles, int64 (N,); `None` for all in their order.
            looks: Features of the tiles at the side of the second look, (N, D), for a model that has one.
            all_tiles: Whether DMIN reads every tile and LIPN is not used (HDMIL†).

        Raises:
            BagError: The features or patches have another shape or type, or a bag has no tiles.
            ValueError: `segments` does not fit the features.
        """
        n_tiles = len(features if rows is None else rows)
        segments = bags_of(features if rows is None else rows, segments)
        if all_tiles:
            output = self.dmin(features, segments, rows=rows)
            mask = torch.ones_like(output.attention) if output.mask is None else output.mask
            read = torch.ones(n_tiles, dtype=torch.bool, device=features.device)
            return HDMILOutput(
                logits=output.logits,
                segments=segments,
                attention=output.attention,
                mask=mask > 0.5,
                read=read,
                keep_ratio=torch.ones(segments.n_bags, device=features.device),
            )
        if patches is None or len(patches) != n_tiles:
            n_patches = 0 if patches is None else len(patches)
            raise BagError(f"there are {n_patches} patches and {n_tiles} rows of features: a tile needs both")
        lipn_logits = None if self.screening == "random" else self.lipn_logits(patches)
        mask = self.screen(patches, segments, lipn_logits)
        if self.looks_again:
            assert self.look is not None
            assert lipn_logits is not None
            if looks is None or len(looks) != n_tiles:
                raise BagError(
                    f"there are {0 if looks is None else len(looks)} looks of {self.look.side} pixels for "
                    f"{n_tiles} tiles; extract the slide with `--look {self.look.side}`"
                )
            mask = self.look_again(self.look(looks, lipn_logits.amax(1)), mask, segments)
        read = mask.any(1)
        chosen, kept = segments.select(read)
        output = self.dmin(
            features,
            kept,
            rows=chosen if rows is None else rows[chosen],
            mask=mask[chosen] if self.pooling == "lipn" else None,
        )
        attention = output.attention.new_full(mask.shape, torch.nan).index_put((chosen,), output.attention)
        return HDMILOutput(
            logits=self.calibrated(output.logits),
            segments=segments,
            attention=attention.masked_fill(~read[:, None], torch.nan),
            mask=mask,
            read=read,
            keep_ratio=kept.sizes / segments.sizes,
        )

    def screen(self, patches: Tensor, segments: Segments, logits: Tensor | None = None) -> Tensor:
        """Tiles that LIPN keeps for each branch, bool (N, C), given their patches, uint8 (N, 16, 16, 3).

        With `screening="random"` they are random tiles, always the same ones. LIPN's logits (N, C) are
        computed unless they are given.
        """
        if self.screening == "random":
            chosen = random_tiles(segments, self.random_share)
            return chosen[:, None].expand(-1, self.n_classes)
        logits = self.lipn_logits(patches) if logits is None else logits
        return keep_mask(logits, self.thresholds, segments)

    def calibrated(self, logits: Tensor) -> Tensor:
        """Class scores (B, C) of slides whose tiles a second look chose.

        Tiles chosen for their evidence make DMIN too certain. The scores are therefore multiplied by `slope`,
        and `bias` is added; both were fitted on validation slides. Without a second look the scores stay.
        """
        return logits * self.slope + self.bias if self.looks_again else logits

    def expected(self, probabilities: np.ndarray, share: float) -> Expected:
        """Answer of all tiles that is expected from the most suspicious ones, and its spread.

        Without a second look the answer stays, and its spread is the share of tiles that are not read.

        Args:
            probabilities: Class probabilities from the tiles read so far, (C,).
            share: Share of the tiles that are read.
        """
        if self.looks_again:
            return expected(self.settling, probabilities, share)
        return Expected(probabilities, 1 - share)

    @property
    def looks_again(self) -> bool:
        """Whether a second look chooses among the tiles that LIPN keeps."""
        return self.look is not None and self.screening == "networks"

    def look_again(self, scores: Tensor, mask: Tensor, segments: Segments) -> Tensor:
        """Tiles that LIPN and the second look keep for each branch, bool (N, C).

        Args:
            scores: Scores of the second look, (N,); those of tiles that LIPN does not keep are ignored.
            mask: LIPN's selection, bool (N, C).
            segments: The B bags.
        """
        shown = mask.any(1)
        passed = highest(scores.masked_fill(~shown, -torch.inf), segments, self.look_share)
        return mask & passed[:, None]

    def lipn_logits(self, patches: Tensor) -> Tensor:
        """LIPN's logits P, float32 (N, C), of patches uint8 (N, 16, 16, 3) on the model's device.

        On a GPU `kernels.lipn_forward` computes them in 16 bits.
        """
        if not patches.is_cuda:
            return torch.cat([self.lipn(chunk) for chunk in patches.split(PATCHES_AT_ONCE)])
        return lipn_forward(patches, self.packed_lipn()).float()

    def packed_lipn(self) -> list[Tensor]:
        """LIPN's weights as the kernel takes them; packed again only after they changed, since it is slow."""
        tensors = (*self.lipn.parameters(), *self.lipn.buffers())
        versions = [(id(t), 0 if t.is_inference() else t._version) for t in tensors]
        if self._packed is None or self._packed[0] != versions:
            self._packed = versions, self.lipn.packed(torch.float16)
        return self._packed[1]

    def with_rules(
        self,
        *,
        thresholds: float | Sequence[float] | Tensor | None = None,
        look_share: float | None = None,
        margin: float | None = None,
        pooling: Pooling | None = None,
    ) -> "HDMIL":
        """The same networks with other rules; a rule that is `None` stays as it is.

        Args:
            thresholds: Thresholds on LIPN's sigmoid, one number or one per branch.
            look_share: Share of the tiles of a slide that are read after the second look.
            margin: Lead in log odds at which `stream` stops; infinite to read everything.
            pooling: Network whose selection a branch pools.
        """
        other = HDMIL(
            self.dmin,
            self.lipn,
            thresholds=self.thresholds if thresholds is None else thresholds,
            screening=self.screening,
            random_share=self.random_share,
            look=self.look,
            **({} if self.look is None else self._look_rules(look_share)),
            margin=float(self.margin) if margin is None else margin,
            pooling=pooling or self.pooling,
            trained_thresholds=self.trained_thresholds,
            info=self.info,
        )
        other.decoder, other._encoder, other._loaded = self.decoder, self._encoder, self._loaded
        return other.to(self.device)

    def _look_rules(self, look_share: float | None) -> dict[str, Any]:
        share = float(self.look_share) if look_share is None else look_share
        rules = {"slope": float(self.slope), "bias": self.bias, "settling": self.settling}
        return {"look_share": share, **rules}

    def replica(self) -> "HDMIL":
        """A copy with networks of its own, for another device; the encoder is shared if it was set."""
        other = copy(self)
        other._modules = {name: deepcopy(module) for name, module in self._modules.items()}
        other._buffers = {name: deepcopy(buffer) for name, buffer in self._buffers.items()}
        other._loaded, other._packed = {}, None
        return other

    def predict(
        self,
        slide: "str | Path | Bag",
        *,
        all_tiles: bool = False,
        device: str | torch.device = "auto",
        **options: Any,
    ) -> "Prediction":
        """Classify one slide; tiles that LIPN does not keep are never read at full resolution.

        Args:
            slide: A slide file, or a bag of the model's encoder.
            all_tiles: Whether every tile is read and LIPN is not used (HDMIL†).
            device: Device on which networks and encoder run, as `devices.resolve` takes it; "auto" is that of
                the model if it is a GPU. Afterwards the model is where it was before.
            **options: For a slide file, `mpp`, `n_readers`, `strict` and `progress` of
                `inference.slides.predict_slide`.

        Raises:
            SlideError: The slide cannot be read, has no scale or no tissue, or its tiles are damaged.
            BagError: The bag was made by another encoder, or has no patches.
            CheckpointError: The model does not know its encoder, or the encoder has changed.
            HDMILError: There is no such device.
        """
        from hdmil_lib.inference.slides import predict

        return predict(self, slide, all_tiles=all_tiles, device=device, **options)

    def predict_many(
        self, slides: "Source | Sequence[Source]", *, out: str | Path, **options: Any
    ) -> "pd.DataFrame":
        """Classify many slides into a CSV file, one row per slide; see `inference.slides.predict_many`.

        Slides that are in the file are skipped, and a slide that fails does not end the run.
        """
        from hdmil_lib.inference.slides import predict_many

        return predict_many(self, slides, out=out, **options)

    def stream(self, slide: str | Path, **options: Any) -> "Generator[AnytimeStep, None, None]":
        """Classify a slide tile by tile, with an answer after each block; see `inference.anytime.stream`."""
        from hdmil_lib.inference.anytime import stream

        return stream(self, slide, **options)

    def trajectory(self, bag: "Bag", **options: Any) -> "Trajectory":
        """The answers that `stream` would give on the slide of a bag; see `inference.anytime.trajectory`."""
        from hdmil_lib.inference.anytime import trajectory

        return trajectory(self, bag, **options)

    @property
    def encoder(self) -> "Encoder":
        """The encoder of the features that the model was trained on.

        It is loaded on the model's device when needed. One that was set is always used.

        Raises:
            CheckpointError: The model does not know its encoder, or the encoder has other weights.
        """
        if self._encoder is not None:
            return self._encoder
        if self.device not in self._loaded:
            from hdmil_lib.encoders.loading import load_recorded

            options: dict[str, Any] = {} if self.decoder == "cpu" else {"decoder": self.decoder}
            encoder = load_recorded(self.known_info.encoder, device=self.device, **options)
            self._check_encoder(encoder)
            self._loaded[self.device] = encoder
        return self._loaded[self.device]

    @encoder.setter
    def encoder(self, encoder: "Encoder") -> None:
        self._check_encoder(encoder)
        self._encoder = encoder

    def _check_encoder(self, encoder: "Encoder") -> None:
        info = self.known_info
        if (encoder.name, encoder.weights_hash) != (info.encoder, info.encoder_weights):
            raise CheckpointError(
                f"the model was trained on features of {info.encoder} (weights {info.encoder_weights}), not "
                f"of {encoder.name} (weights {encoder.weights_hash}); use that encoder, or train a model on "
                "bags of this one"
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a model folder: `model.safetensors`, `config.json` and a card, `README.md`.

        If saving is interrupted, the folder holds the previous model or the new one, never a mixture.

        Raises:
            CheckpointError: The model has no `info`.
        """
        pretrained.save(self, Path(folder))

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None) -> "HDMIL":
        """Read a model folder, or fetch one from the Hugging Face hub.

        Args:
            name: Folder that `save_pretrained` wrote, or `owner/name` on the hub.
            revision: Branch, tag or commit on the hub.

        Returns:
            The model on the CPU, in evaluation mode.

        Raises:
            CheckpointError: Files are missing, damaged, from hdmil 0.1, hold values out of bounds or do not
                fit together; or the hub cannot be reached.
        """
        return pretrained.load(cls, name, revision)

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return self.thresholds.device

    @property
    def n_classes(self) -> int:
        """Number of classes, C."""
        return self.dmin.n_classes

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; class indices for a model without `info`."""
        return self.info.classes if self.info else tuple(str(c) for c in range(self.n_classes))

    @property
    def known_info(self) -> ModelInfo:
        """What the model was trained for.

        Raises:
            CheckpointError: The model has no `info`.
        """
        if self.info is None:
            raise CheckpointError(
                "the model does not know its encoder and classes; make it with info=ModelInfo(...), or load "
                "one that cross_validate or save_pretrained wrote"
            )
        return self.info

    def to(self: Self, *arguments: Any, **named: Any) -> Self:
        """Move the model, as `torch.nn.Module.to`; a device is named as for `devices.resolve`.

        Raises:
            HDMILError: There is no such device.
        """
        if arguments and isinstance(arguments[0], str):
            arguments = (devices.resolve(arguments[0]), *arguments[1:])
        return super().to(*arguments, **named)

    def _apply(self: Self, fn: Any, recurse: bool = True) -> Self:
        self._packed = None
        return super()._apply(fn, recurse)
