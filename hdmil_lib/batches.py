"""Bags of a cohort in memory, and batches of them on a device."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, chain, pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hdmil_lib import devices
from hdmil_lib.bag_files import LOOK
from hdmil_lib.bags import Bag, EncoderIdentity, check_same_features
from hdmil_lib.errors import BagError, CohortError
from hdmil_lib.kernels.segments import Segments, to_device

HOST_FIELDS = ("rowcol",)
"""Fields of a batch that stay on the host."""

MAX_TILES = 65_536
"""Largest number of tiles per batch of a prediction, unless a single bag has more."""


class TakesBags(Protocol):
    """A network that names the fields of a `BagBatch` that it takes."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the fields."""


@dataclass(frozen=True, eq=False)
class BagBatch:
    """B bags with N tiles in total; row i is the same tile in every tensor.

    Features and patches are on the device of the data set, labels and positions on the host. A field is
    copied when it is first used: most models take features alone, and read those that lie on a GPU there.

    Attributes:
        slide_ids: Names of the B slides.
        segments: The bags.
        labels: Class indices, int64 (B,), on the host; `None` unless all are known.
        rows_of: Copies the rows of these bags of one of the data set's matrices.
        starts: Where each bag starts in `cohort`, int64 (B,), on the host.
        cohort: Features of the whole data set, (M, D), if they lie on a GPU.
    """

    slide_ids: tuple[str, ...]
    segments: Segments
    labels: Tensor | None
    rows_of: Callable[[str], Tensor | None]
    starts: Tensor | None = None
    cohort: Tensor | None = None

    @cached_property
    def features(self) -> Tensor:
        """Features (N, D): float32, but on a GPU as stored, since its first kernel reads half precision."""
        features = self.rows_of("features")
        assert features is not None
        return features if features.is_cuda else features.float()

    @cached_property
    def rows(self) -> Tensor | None:
        """Rows of these tiles in `cohort`, int64 (N,), if there is one."""
        if self.cohort is None:
            return None
        assert self.starts is not None
        device = self.cohort.device
        ahead = to_device(self.starts, device) - self.segments.offsets[:-1]
        return torch.arange(self.segments.n_tiles, device=device) + ahead[self.segments.bag]

    @cached_property
    def patches(self) -> Tensor | None:
        """Patches, uint8 (N, 16, 16, 3); `None` unless all bags have them."""
        return self.rows_of("patches")

    def look(self, side: int) -> Tensor:
        """Features (N, D) of the tiles at `side` pixels along each side.

        Raises:
            BagError: A bag of the data set has none.
        """
        name = f"{LOOK}{side}"
        if name not in self.__dict__:
            rows = self.rows_of(name)
            if rows is None:
                raise BagError(
                    f"bag {self.slide_ids[0]} has no look of {side} pixels; extract its slide with "
                    f"`--look {side}`"
                )
            self.__dict__[name] = rows if rows.is_cuda else rows.float()
        return self.__dict__[name]

    @cached_property
    def rowcol(self) -> Tensor:
        """Position of the tiles on their slide's grid, int64 (N, 2), on the host, where regions are made."""
        rowcol = self.rows_of("rowcol")
        assert rowcol is not None
        return rowcol

    @property
    def known_labels(self) -> Tensor:
        """The labels, for a loss.

        Raises:
            CohortError: A bag has no label.
        """
        if self.labels is None:
            raise CohortError(
                f"a slide of {', '.join(self.slide_ids)} has no label; give BagDataset all labels"
            )
        return self.labels

    def sample(self, share: float) -> "BagBatch":
        """The batch with random tiles of each bag, the nearest number to this share and at least one.

        Tiles stay in their order. They are drawn with torch's generator, on the host.
        """
        lengths, starts = self.segments.lengths, accumulate(self.segments.lengths, initial=0)
        parts = [
            start + torch.randperm(n)[: max(1, round(share * n))].sort().values
            for n, start in zip(lengths, starts, strict=False)
        ]
        device = self.segments.offsets.device
        chosen = torch.cat(parts)
        here = to_device(chosen, device)

        def rows_of(field: str) -> Tensor | None:
            rows = self.__dict__.get(field)
            rows = self.rows_of(field) if rows is None else rows
            return None if rows is None else rows[chosen if field in HOST_FIELDS else here]

        sampled = replace(self, segments=Segments(map(len, parts), device), rows_of=rows_of, starts=None)
        if self.rows is not None:
            sampled.__dict__["rows"] = self.rows[here]
        return sampled

    def inputs_for(self, model: TakesBags) -> dict[str, Any]:
        """Keyword arguments of `model.forward`: `model(**batch.inputs_for(model))`.

        A model that takes `rows` gets the features of the cohort if they lie on a GPU.

        Raises:
            BagError: The model needs patches, which the bags do not have.
        """
        reads = "rows" in model.inputs and self.cohort is not None
        inputs: dict[str, Any] = {}
        for name in model.inputs:
            if name.startswith(LOOK):
                inputs["looks"] = self.look(int(name.removeprefix(LOOK)))
            else:
                inputs[name] = self.cohort if name == "features" and reads else getattr(self, name)
        if "patches" in inputs and self.patches is None:
            raise BagError(
                f"bag {self.slide_ids[0]} has no patches, which this model needs; fill them in from "
                "the slides with `hdmil add-patches`"
            )
        return inputs | {"segments": self.segments}


class BagDataset:
    """Bags in memory with their labels: one array per field, features in half precision.

    Args:
        bags: Bags by slide_id, all from one encoder.
        labels: Class index by slide_id, where known.
        device: Device of the batches, as `devices.resolve` takes it; see `to`.

    Attributes:
        slide_ids: Names of the slides, in the order of `bags`.
        labels: Class index by slide_id.
        encoder: Encoder of the features.
        dim: Width of the features, D.
        device: Device of the batches.
        resident: Fields that lie on the device as a whole.

    Raises:
        BagError: There is no bag, a bag has no tiles or features that are not finite, or the encoders or
            widths of the bags differ.
        HDMILError: The device is not there.
    """

    def __init__(
        self,
        bags: Mapping[str, Bag],
        labels: Mapping[str, int] | None = None,
        device: torch.device | str = "cpu",
    ):
        for slide_id, bag in bags.items():
            _check(slide_id, bag)
        self.encoder: EncoderIdentity = check_same_features(bags.values())
        self.slide_ids = tuple(bags)
        self.labels = dict(labels or {})
        bounds = [0, *accumulate(len(bag) for bag in bags.values())]
        self._span = dict(zip(bags, pairwise(bounds), strict=True))
        chosen = list(bags.values())
        self.dim = chosen[0].features.shape[1]
        patches = [bag.patches for bag in chosen if bag.patches is not None]
        self._matrices = {
            "features": torch.from_numpy(np.concatenate([bag.features for bag in chosen])),
            "rowcol": torch.from_numpy(np.concatenate([bag.rowcol for bag in chosen])),
        }
        for side in set.intersection(*(set(bag.looks) for bag in chosen)):
            self._matrices[f"{LOOK}{side}"] = torch.from_numpy(
                np.concatenate([b.looks[side] for b in chosen])
            )
        if len(patches) == len(chosen):
            self._matrices["patches"] = torch.from_numpy(np.concatenate(patches))
        self._place(devices.resolve(device))

    def to(self, device: torch.device | str) -> "BagDataset":
        """The same bags for batches on another device.

        On a GPU a field lies there as a whole if that takes less than half of its free memory. Otherwise it
        lies in pinned memory of the host, from which batches are copied without waiting for the GPU.

        Raises:
            HDMILError: The device is not there.
        """
        device = devices.resolve(device)
        if device == self.device:
            return self
        other = copy(self)
        other._place(device)
        return other

    def _place(self, device: torch.device) -> None:
        self.device, self.resident = device, dict[str, Tensor]()
        self._host = self._matrices
        if device.type != "cuda":
            return
        self._host = dict(self._matrices)
        for field, rows in self._matrices.items():
            if field in HOST_FIELDS:
                continue
            if rows.nbytes < devices.free_memory(device) / 2:
                self.resident[field] = rows.to(device)
            else:
                self._host[field] = devices.pinned(rows)

    @property
    def placement(self) -> str:
        """Where the fields lie and how much memory they take, for a log."""
        parts = []
        for field, rows in self._matrices.items():
            place = str(self.device) if field in self.resident else "the host"
            parts.append(f"{field} {rows.nbytes / 1e9:.2f} GB on {place}")
        return ", ".join(parts)

    def __len__(self) -> int:
        return len(self.slide_ids)

    def length(self, slide_id: str) -> int:
        """Number of tiles of a slide.

        Raises:
            BagError: The slide has no bag.
        """
        first, end = self._rows(slide_id)
        return end - first

    def batch(self, slide_ids: Sequence[str]) -> BagBatch:
        """Put the bags of these slides on the device.

        Raises:
            BagError: A slide has no bag.
        """
        spans = [self._rows(slide_id) for slide_id in slide_ids]
        labels = [self.labels[s] for s in slide_ids if s in self.labels]
        return BagBatch(
            slide_ids=tuple(slide_ids),
            segments=Segments([end - first for first, end in spans], self.device),
            labels=torch.tensor(labels) if len(labels) == len(spans) else None,
            rows_of=partial(self._take, spans),
            starts=torch.tensor([first for first, _ in spans]),
            cohort=self.resident.get("features"),
        )

    def batches_of(
        self, groups: Iterable[Sequence[str]], fields: Sequence[str] = ("features",)
    ) -> Iterator[BagBatch]:
        """Batches of groups of slides; on a GPU the fields of the next batch are copied meanwhile.

        Args:
            groups: The slides of each batch.
            fields: Fields of a `BagBatch` that will be used.
        """
        moved = [field for field in fields if field in self._matrices and field not in HOST_FIELDS]
        if self.device.type != "cuda" or not torch.cuda.is_available() or set(moved) <= set(self.resident):
            yield from map(self.batch, groups)
            return
        copying = torch.cuda.Stream(self.device)
        following: BagBatch | None = None
        for group in chain(groups, [None]):
            computing, current = torch.cuda.current_stream(self.device), following
            following = None if group is None else self.batch(group)
            if current is not None:
                computing.wait_stream(copying)  # its own copies; those of the next batch start below
                for field in moved:
                    _field(current, field).record_stream(computing)
            if following is not None:
                with torch.cuda.stream(copying):
                    for field in moved:
                        _field(following, field)
            if current is not None:
                yield current

    def batches(self, slide_ids: Sequence[str], max_tiles: int = MAX_TILES) -> Iterator[BagBatch]:
        """Batches of the slides in their order, each with one slide or up to `max_tiles` tiles in total."""
        chunks: list[list[str]] = []
        total = 0
        for slide_id in slide_ids:
            if not chunks or total + self.length(slide_id) > max_tiles:
                chunks.append([])
                total = 0
            chunks[-1].append(slide_id)
            total += self.length(slide_id)
        return map(self.batch, chunks)

    def digest(self, slide_ids: Sequence[str]) -> str:
        """Short hash of the features of these slides."""
        digest = hashlib.sha256()
        for slide_id in slide_ids:
            digest.update(self._matrices["features"][slice(*self._rows(slide_id))].numpy().data)
        return digest.hexdigest()[:16]

    def _rows(self, slide_id: str) -> tuple[int, int]:
        if slide_id not in self._span:
            raise BagError(
                f"slide '{slide_id}' of the split has no bag; extract its features, or split again"
            )
        return self._span[slide_id]

    def _take(self, spans: Sequence[tuple[int, int]], field: str) -> Tensor | None:
        rows = self.resident.get(field, self._host.get(field))
        if rows is None:
            return None
        parts = [rows[first:end] for first, end in spans]
        device = torch.device("cpu") if field in HOST_FIELDS else self.device
        if len(parts) == 1 and rows.device == device:
            return parts[0]
        taken = rows.new_empty(sum(map(len, parts)), *rows.shape[1:], device=device)
        for here, part in zip(taken.split([len(part) for part in parts]), parts, strict=True):
            here.copy_(part, non_blocking=True)
        return taken


def _field(batch: BagBatch, name: str) -> Tensor:
    """A field of a batch by its name among the matrices of a data set."""
    return batch.look(int(name.removeprefix(LOOK))) if name.startswith(LOOK) else getattr(batch, name)


def _check(slide_id: str, bag: Bag) -> None:
    if len(bag.features) == 0:
        raise BagError(f"bag '{slide_id}': no tiles; check its tissue mask, or leave the slide out")
    if not np.isfinite(bag.features).all():
        raise BagError(f"bag '{slide_id}': features with nan or infinite values; extract them again")
