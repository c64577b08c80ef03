"""DTFD-MIL: groups of tiles are bags themselves, and what they distill is the bag of a second tier."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from hdmil_lib.kernels import segment_softmax_pool
from hdmil_lib.models.base import MILModel, MILOutput
from hdmil_lib.models.layers import GatedAttention
from hdmil_lib.models.ragged import bag_argmax, bag_mean, bag_of_tile, cumulative, pad, unpad

Distillation = Literal["afs", "maxs", "maxmins"]


@dataclass(frozen=True, kw_only=True)
class DTFDOutput(MILOutput):
    """What DTFD says about bags; `attention` is tier 1's (N, 1), whose softmax is over a group's tiles.

    Attributes:
        group_logits: Class scores of the G groups of all bags, (G, C).
        cu_groups: Where the groups of each bag start and those of the last one end, int64 (B + 1,).
    """

    group_logits: Tensor
    cu_groups: Tensor


class DTFD(MILModel):
    """Double-tier feature distillation MIL (Zhang et al. 2022; Table 1).

    Tier 1 is attention MIL on each group, which has the label of its bag. What it distills of each group is
    the bag of tier 2, also attention MIL: the group's embedding ("afs"), its tile of highest class
    activation ("maxs"), or those of highest and lowest ("maxmins"). The activation of a tile is what its
    embedding, weighed by attention, adds to the class scores: with two classes the tile likeliest to be
    class 1 is the highest, with more the surest of any class.

    Each tier learns from its own loss alone: distilled features carry no gradient to tier 1. That is what
    training with one optimizer a tier amounts to, as published: tier 1's never steps by the loss of tier 2.

    In training a bag is split at random. In evaluation its tiles are dealt to the groups in the order of
    their attention, so that a prediction is repeatable, does not depend on the order of tiles, and all groups
    get tiles of high attention. A bag of fewer tiles than groups has one group a tile.

    Args:
        in_dim: Width of the features.
        n_classes: Number of classes.
        distill: What tier 2 gets of a group.
        n_groups: Groups of a bag.
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
        self.projection = nn.Sequential(nn.Linear(in_dim, embed_dim, bias=False), nn.ReLU())
        self.attention = GatedAttention(embed_dim, attention_dim, 1)
        self.classifier = nn.Linear(embed_dim, n_classes)
        self.bag_attention = GatedAttention(embed_dim, attention_dim, 1)
        self.bag_classifier = nn.Linear(embed_dim, n_classes)

    def classify(
        self, features: Tensor, cu_seqlens: Tensor, *, generator: torch.Generator | None = None
    ) -> DTFDOutput:
        """Classify bags.

        Args:
            features: (N, in_dim).
            cu_seqlens: (B + 1,).
            generator: Of the CPU, source of the split in training: one number a tile, so that bags together
                are split as they would be one by one; torch's global one by default.
        """
        embeddings = self.projection(features)
        attention = self.attention(embeddings)
        if self.training:
            order = torch.rand(len(features), generator=generator).to(features.device)
        else:
            order = -attention[:, 0]
        tiles, cu_tiles = deal(order, cu_seqlens, self.n_groups)
        cu_groups = cumulative(cu_seqlens.diff().clamp(max=self.n_groups))
        members = embeddings.index_select(0, tiles), attention.index_select(0, tiles)
        groups = segment_softmax_pool(*members, None, cu_tiles)[:, 0]
        distilled = groups if self.distill == "afs" else self._extremes(*members, cu_tiles)
        per_group = 2 if self.distill == "maxmins" else 1
        bag, _ = self.bag_attention.pool(distilled.detach(), cu_groups * per_group)
        return DTFDOutput(
            logits=self.bag_classifier(bag[:, 0]),
            cu_seqlens=cu_seqlens,
            attention=attention,
            group_logits=self.classifier(groups),
            cu_groups=cu_groups,
        )

    @torch.no_grad()
    def _extremes(self, embeddings: Tensor, attention: Tensor, cu_tiles: Tensor) -> Tensor:
        """Embeddings (G, E) or (2 G, E) of each group's tile of highest, and lowest, class activation."""
        weights = unpad(pad(attention, cu_tiles, -torch.inf).softmax(1), cu_tiles)
        activation = weights * linear(embeddings, self.classifier.weight)
        two_classes = self.n_classes == 2
        score = activation[:, 1] - activation[:, 0] if two_classes else activation.softmax(1).amax(1)
        tiles = bag_argmax(score, cu_tiles)
        if self.distill == "maxmins":
            tiles = torch.stack((tiles, bag_argmax(-score, cu_tiles)), 1).flatten()
        return embeddings[tiles]

    def losses(self, output: DTFDOutput, labels: Tensor) -> dict[str, Tensor]:
        """Cross entropy of the groups, a mean over each bag's, and that of the bags."""
        group_labels = labels[bag_of_tile(output.cu_groups)]
        groups = cross_entropy(output.group_logits, group_labels, reduction="none")
        return {
            "tier_1": bag_mean(groups, output.cu_groups).mean(),
            "tier_2": cross_entropy(output.logits, labels),
        }

    def tiers(self) -> list[list[nn.Parameter]]:
        tiers = (self.projection, self.attention, self.classifier), (self.bag_attention, self.bag_classifier)
        return [[weight for module in tier for weight in module.parameters()] for tier in tiers]


def deal(order: Tensor, cu_seqlens: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """Deal the tiles of each bag to groups like cards: the first to the first group, and so on around.

    Args:
        order: Tiles are dealt from the lowest value of their bag to the highest, equals in their order, (N,).
        cu_seqlens: (B + 1,).
        n_groups: Groups of a bag; one of fewer tiles has a group for each.

    Returns:
        tiles: Numbers among all N tiles, bag by bag and group by group, int64 (N,).
        cu_tiles: Where each group starts in them and the last one ends, int64 (G + 1,).
    """
    bag = bag_of_tile(cu_seqlens)
    place = torch.arange(len(order), device=order.device) - cu_seqlens[bag]
    ranked = unpad(pad(order.detach(), cu_seqlens, torch.inf).argsort(dim=1, stable=True), cu_seqlens)
    group = bag * n_groups + place % n_groups
    tiles = (ranked + cu_seqlens[bag])[group.argsort(stable=True)]
    lengths = (cu_seqlens.diff().unsqueeze(1) + torch.arange(n_groups, device=order.device)) // n_groups
    lengths = lengths.flip(1).flatten()
    return tiles, cumulative(lengths[lengths > 0])
