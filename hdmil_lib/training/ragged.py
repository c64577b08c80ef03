"""Bags of a cohort in memory, one after the other, from which a step takes as many as it wants."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hdmil_lib.errors import BagError
from hdmil_lib.features.bagstore import Bag
from hdmil_lib.models import MILModel, MILOutput
from hdmil_lib.models.ragged import cumulative

CHUNK = 65_536  # tiles that a prediction holds at once


class RaggedBags:
    """Features, and what else models take, of many bags: one matrix each, in the type of the bags.

    Args:
        bags: Bags by slide_id.
        slide_ids: Those to hold.
        fields: Attributes of a `Bag`, each with one row a tile.

    Raises:
        BagError: A slide has no bag, or a bag has no tiles, features that are not finite, or another width
            than the first.
    """

    def __init__(
        self, bags: Mapping[str, Bag], slide_ids: Sequence[str], fields: Sequence[str] = ("features",)
    ):
        slide_ids = list(dict.fromkeys(slide_ids))
        chosen = [bag_of(bags, slide_id) for slide_id in slide_ids]
        for bag in chosen:
            _check(bag, chosen[0].features.shape[1])
        bounds = cumulative([len(bag.features) for bag in chosen]).tolist()
        self._span = dict(zip(slide_ids, pairwise(bounds), strict=True))
        self._rows = {
            field: torch.from_numpy(np.concatenate([getattr(bag, field) for bag in chosen]))
            for field in fields
        }

    def length(self, slide_id: str) -> int:
        """Number of tiles of a slide."""
        first, end = self._span[slide_id]
        return end - first

    def cu_seqlens(self, slide_ids: Sequence[str]) -> Tensor:
        """Where each of these bags starts in what `take` gives, and the last one ends: (B + 1,)."""
        return cumulative([self.length(slide_id) for slide_id in slide_ids])

    def take(self, field: str, slide_ids: Sequence[str]) -> Tensor:
        """Rows of these bags, one bag after the other; features come as float32."""
        rows = [self._rows[field][slice(*self._span[slide_id])] for slide_id in slide_ids]
        rows = rows[0] if len(rows) == 1 else torch.cat(rows)
        return rows.float() if field == "features" else rows

    def tensors(self, field: str) -> dict[str, Tensor]:
        """Rows of each slide by its slide_id."""
        return {slide_id: self.take(field, [slide_id]) for slide_id in self._span}

    def forward(self, model: MILModel, slide_ids: Sequence[str]) -> MILOutput:
        """What a model says of these bags together."""
        features, *others = (self.take(field, slide_ids) for field in model.inputs)
        extra = dict(zip(model.inputs[1:], others, strict=True))
        return model(features, self.cu_seqlens(slide_ids), **extra)

    def chunks(self, slide_ids: Sequence[str], n_tiles: int = CHUNK) -> Iterator[list[str]]:
        """The slides in their order, as many at a time as have `n_tiles` tiles together, or one."""
        chunk, total = [], 0
        for slide_id in slide_ids:
            if chunk and total + self.length(slide_id) > n_tiles:
                yield chunk
                chunk, total = [], 0
            chunk.append(slide_id)
            total += self.length(slide_id)
        if chunk:
            yield chunk

    @torch.inference_mode()
    def predict(self, model: MILModel, slide_ids: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Logits (S, C) of these slides, and the share of tiles that each rests on (S,): 1 without a mask."""
        logits, kept = [], []
        for chunk in self.chunks(slide_ids):
            output = self.forward(model, chunk)
            share = getattr(output, "keep_ratio", None)
            logits.append(output.logits)
            kept.append(torch.ones(len(chunk)) if share is None else share)
        return torch.cat(logits), torch.cat(kept)


def bag_of(bags: Mapping[str, Bag], slide_id: str) -> Bag:
    """The bag of a slide of a split.

    Raises:
        BagError: It has none.
    """
    if slide_id not in bags:
        raise BagError(f"slide '{slide_id}' of the split has no bag; extract its features, or split again")
    return bags[slide_id]


def _check(bag: Bag, width: int) -> None:
    if len(bag.features) == 0:
        raise BagError(f"bag '{bag.slide_id}': no tiles; check its tissue mask, or leave the slide out")
    if bag.features.shape[1] != width:
        raise BagError(
            f"bag '{bag.slide_id}': {bag.features.shape[1]} features a tile, others have {width}; "
            "extract all with one encoder"
        )
    if not np.isfinite(bag.features).all():
        raise BagError(f"bag '{bag.slide_id}': features with nan or infinite values; extract them again")
