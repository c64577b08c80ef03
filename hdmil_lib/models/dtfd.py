"""DTFD-MIL: the first tier pools groups of tiles, the second pools the features that the groups distill."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hdmil_lib.kernels import segment_softmax_pool
from hdmil_lib.kernels.segments import Segments, to_device
from hdmil_lib.models.base import LossTerms, MILModel, MILOutput
from hdmil_lib.models.layers import GatedAttention, Projection
from hdmil_lib.models.ragged import bag_argmax, bag_mean, pad, unpad

Distillation = Literal["afs", "maxs", "maxmins"]


@dataclass(frozen=True, kw_only=True)
class DTFDOutput(MILOutput):
    """Output of DTFD; `attention` is that of tier 1, (N, 1), with a softmax over the tiles of a group.

    Attributes:
        group_logits: Class scores of the G groups of all bags, (G, C).
        groups: The groups of each bag.
    """

    group_logits: Tensor
    groups: Segments


class DTFD(MILModel[DTFDOutput]):
    """Double-tier feature distillation MIL (Zhang et al. 2022; Table 1).

    Tier 1 is attention MIL on each group, with the label of its bag. Tier 2 is attention MIL on the features
    that the groups distill: the group's embedding ("afs"), its tile of highest class activation ("maxs"), or
    its tiles of highest and lowest class activation ("maxmins"). The class activation of a tile is the
    contribution of its embedding, weighted by attention, to the class scores: with two classes the difference
    between class 1 and class 0, with more the largest softmax over classes.

    Each tier learns from its own loss alone: distilled features carry no gradient to tier 1. This is
    equivalent to the published training, in which the optimizer of tier 1 never uses the loss of tier 2.

    In training a bag is split at random. In evaluation its tiles are dealt to the groups in the order of
    their attention, so that a prediction is repeatable, does not depend on the order of tiles, and all groups
    get tiles of high attention. A bag with fewer tiles than groups has one group per tile.

    Args:
        in_dim: Width of the features.
        n_classes: Number of classes.
        distill: Features that a group passes to tier 2: "afs", "maxs" or "maxmins".
        n_groups: Number of groups per bag.
        embed_dim: Width of the projected features.
        attention_dim: Width of the hidden layer of both attentions.

    Raises:
        ValueError: distill is unknown, or n_groups is less than 1.
    """

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        *,
        distill: Distillation = "afs",
        n_groups: int = 4,
        embed_dim: int = 512,
        attention_dim: int = 128,
    ):
        if distill not in get_args(Distillation):
            raise ValueError(f"distill is {distill!r}, expected one of {', '.join(get_args(Distillation))}")
        if n_groups < 1:
            raise ValueError(f"n_groups is {n_groups}, expected 1 or more")
        super().__init__(in_dim, n_classes)
        self.distill, self.n_groups = distill, n_groups
        self.projection = Projection(in_dim, embed_dim, bias=False)
        self.attention = GatedAttention(embed_dim, attention_dim, 1)
        self.classifier = nn.Linear(embed_dim, n_classes)
        self.bag_attention = GatedAttention(embed_dim, attention_dim, 1)
        self.bag_classifier = nn.Linear(embed_dim, n_classes)

    def classify(
        self,
        features: Tensor,
        segments: Segments,
        rows: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> DTFDOutput:
        """Classify bags.

        Args:
            features: (N, in_dim), or (M, in_dim) with `rows`.
            segments: The B bags.
            rows: Rows of the features of the tiles of these bags, (N,).
            generator: CPU generator of the random splits in training; torch's global generator by default. It
                draws one number per tile, so the splits do not depend on how bags are batched.
        """
        embeddings = self.projection(features, *self.scale, rows=rows)
        attention = self.attention(embeddings)
        if self.training:
            drawn = torch.rand(segments.n_tiles, generator=generator, device="cpu")
            order = to_device(drawn, features.device)
        else:
            order = -attention[:, 0]
        tiles, group_tiles = deal(order, segments, self.n_groups)
        groups = Segments([min(length, self.n_groups) for length in segments.lengths], features.device)
        members = embeddings.index_select(0, tiles), attention.index_select(0, tiles)
        pooled = segment_softmax_pool(*members, None, group_tiles)[:, 0]
        distilled, instances = pooled, groups
        if self.distill != "afs":
            distilled = self._extremes(*members, group_tiles)
        if self.distill == "maxmins":
            instances = Segments([2 * n for n in groups.lengths], features.device)
        bag, _ = self.bag_attention.pool(distilled.detach(), instances)
        return DTFDOutput(
            logits=self.bag_classifier(bag[:, 0]),
            segments=segments,
            attention=attention,
            group_logits=self.classifier(pooled),
            groups=groups,
        )

    @torch.no_grad()
    def _extremes(self, embeddings: Tensor, attention: Tensor, group_tiles: Segments) -> Tensor:
        """Embeddings (G, E) of each group's tile of highest activation; with the lowest too, (2 G, E)."""
        weights = unpad(pad(attention, group_tiles, -torch.inf).softmax(1), group_tiles)
        activation = weights * linear(embeddings, self.classifier.weight)
        two_classes = self.n_classes == 2
        score = activation[:, 1] - activation[:, 0] if two_classes else activation.softmax(1).amax(1)
        tiles = bag_argmax(score, group_tiles)
        if self.distill == "maxmins":
            tiles = torch.stack((tiles, bag_argmax(-score, group_tiles)), 1).flatten()
        return embeddings[tiles]

    def loss(self, output: DTFDOutput, labels: Tensor) -> LossTerms:
        """Compute the cross entropies of the groups, averaged within each bag, and of the bags."""
        group_labels = to_device(labels, output.logits.device)[output.groups.bag]
        groups = self.cross_entropy(output.group_logits, group_labels, reduction="none")
        return {
            "tier_1": bag_mean(groups, output.groups).mean(),
            "tier_2": self.cross_entropy(output.logits, labels),
        }

    def param_groups(self) -> list[dict[str, Any]]:
        """One parameter group per tier, whose gradients are clipped separately."""
        tiers = (self.projection, self.attention, self.classifier), (self.bag_attention, self.bag_classifier)
        return [{"params": [p for module in tier for p in module.parameters()]} for tier in tiers]


def deal(order: Tensor, segments: Segments, n_groups: int) -> tuple[Tensor, Segments]:
    """Deal the tiles of each bag to its groups in turn.

    Args:
        order: Values (N,) that rank tiles: each bag's lowest is dealt first, equal ones in their order.
        segments: The B bags.
        n_groups: Number of groups per bag; a bag with fewer tiles has one group per tile.

    Returns:
        tiles: Rows among all N tiles, bag after bag and group after group, int64 (N,).
        group_tiles: The G groups, as segments of `tiles`.
    """
    bag, place = segments.bag, segments.place
    ranked = unpad(pad(order.detach(), segments, torch.inf).argsort(dim=1, stable=True), segments)
    group = bag * n_groups + place % n_groups
    tiles = (ranked + segments.offsets[bag])[group.argsort(stable=True)]
    lengths = [
        (length + n_groups - 1 - group) // n_groups
        for length in segments.lengths
        for group in range(n_groups)
    ]
    return tiles, Segments([length for length in lengths if length > 0], order.device)
