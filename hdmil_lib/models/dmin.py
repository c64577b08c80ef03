"""DMIN: attention MIL that learns which tiles it needs by distilling itself (paper: DMIN)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from hdmil_lib.errors import BagError
from hdmil_lib.kernels import gumbel_mask, segment_softmax_pool
from hdmil_lib.kernels.random import draw_seed
from hdmil_lib.models.base import MILModel, MILOutput
from hdmil_lib.models.kan import ChebyshevKAN
from hdmil_lib.models.layers import GatedAttention, projection
from hdmil_lib.models.ragged import bag_mean


@dataclass(frozen=True)
class DMINSettings:
    """Shape and behavior of a DMIN; the defaults are the paper's for Camelyon16.

    Attributes:
        in_dim: Width of the features, D.
        n_classes: Number of classes and of branches, C.
        embed_dim: Width of the embeddings, E.
        attention_dim: Width of the attention's hidden layer.
        dropout: On the embeddings and on both factors of the attention.
        degree: K of the Chebyshev heads.
        temperature: tau of the Gumbel-sigmoid, used in training alone.
        threshold: gamma; a tile is kept where its sigmoid exceeds it.
        keep_ratio: r, the target of the rate loss.
        head: Chebyshev-KAN ("cka") or linear classifiers (Table 3 without CKA).
        linear_start: Chebyshev heads begin as linear ones.
        self_distillation: Without it there is no mask and no student (Table 3 without SelfDist).
    """

    in_dim: int = 1024
    n_classes: int = 2
    embed_dim: int = 512
    attention_dim: int = 256
    dropout: float = 0.25
    degree: int = 12
    temperature: float = 0.7
    threshold: float = 0.5
    keep_ratio: float = 0.6
    head: Literal["cka", "linear"] = "cka"
    linear_start: bool = False
    self_distillation: bool = True

    def __post_init__(self):
        if self.n_classes < 2:
            raise ValueError(f"n_classes is {self.n_classes}: DMIN needs two classes or more")
        if self.head not in ("cka", "linear"):
            raise ValueError(f"head is {self.head!r}, expected 'cka' or 'linear'")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}, expected more than 0")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold is {self.threshold}, expected a number between 0 and 1")
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio is {self.keep_ratio}, expected more than 0 and at most 1")


@dataclass(frozen=True)
class PaperPreset:
    """What the paper uses on one data set, beyond the defaults.

    Attributes:
        settings: Of the network.
        learning_rate: Of Adam.
        subtyping: Each class is a subtype with tiles of its own, so the clustering loss also labels the
            top tiles of the other branches.
    """

    settings: DMINSettings
    learning_rate: float
    subtyping: bool


PAPER_PRESETS = {
    "camelyon16": PaperPreset(DMINSettings(degree=12, keep_ratio=0.6), 3e-4, subtyping=False),
    "nsclc": PaperPreset(DMINSettings(degree=16, keep_ratio=0.7), 3e-5, subtyping=True),
    "brca": PaperPreset(DMINSettings(degree=12, keep_ratio=0.7), 3e-4, subtyping=True),
}


@dataclass(frozen=True, kw_only=True)
class DMINOutput(MILOutput):
    """What DMIN says about bags; `logits` are the student's, `attention` is (N, C).

    Attributes:
        mask: Selection of each branch, (N, C), straight-through in training; `None` without a student.
        keep_ratio: r~, share of each bag's tiles that a branch or more select, (B,); `None` likewise.
        teacher_logits: Class scores over all tiles, (B, C).
        bag_student: Embedding of the selected tiles of each branch, (B, C, E).
        bag_teacher: Embedding of all tiles of each branch, (B, C, E).
        embeddings: F, (N, E).
    """

    PER_BAG: ClassVar[tuple[str, ...]] = ("logits", "teacher_logits", "bag_student", "bag_teacher")

    mask: Tensor | None
    keep_ratio: Tensor | None
    teacher_logits: Tensor
    bag_student: Tensor
    bag_teacher: Tensor
    embeddings: Tensor

    def single(self) -> "DMINOutput":
        output = super().single()
        return output if self.keep_ratio is None else replace(output, keep_ratio=self.keep_ratio[0])


class DMIN(MILModel):
    """Dynamic multi-instance network: a teacher over all tiles, a student over those it selects.

    One attention column, mask, bag embedding and classifier for each class; teacher and student share
    all weights. In training the selection is drawn with Gumbel noise; in evaluation it is
    M_c = [sigmoid(A_c) > gamma], without noise or temperature. A branch that selects nothing pools its
    tile of highest attention. In a model without self-distillation the teacher is also the answer.
    """

    def __init__(self, settings: DMINSettings):
        super().__init__(settings.in_dim, settings.n_classes)
        self.settings = settings
        self.projection = projection(settings.in_dim, settings.embed_dim, settings.dropout)
        self.attention = GatedAttention(
            settings.embed_dim, settings.attention_dim, settings.n_classes, settings.dropout
        )
        self.heads = nn.ModuleList(self._head(1) for _ in range(settings.n_classes))
        self.instance_heads = nn.ModuleList(self._head(2) for _ in range(settings.n_classes))

    def _head(self, out_features: int) -> nn.Module:
        s = self.settings
        if s.head == "linear":
            return nn.Linear(s.embed_dim, out_features)
        return ChebyshevKAN(s.embed_dim, out_features, s.degree, linear_start=s.linear_start)

    def classify(
        self,
        features: Tensor,
        cu_seqlens: Tensor,
        *,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> DMINOutput:
        """Classify bags.

        Args:
            features: I, (N, in_dim).
            cu_seqlens: (B + 1,).
            mask: (N, C), the tiles of each branch chosen beforehand by LIPN; takes the place of DMIN's own.
            generator: Source of the seed of the Gumbel noise in training; torch's global one by default.

        Raises:
            BagError: If features or mask have another shape than the model or the bag.
        """
        embeddings = self.projection(features)
        attention = self.attention(embeddings)
        if mask is not None:
            mask = self._given(mask, attention)
        elif self.settings.self_distillation:
            mask = self._select(attention, generator)
        keep_ratio = None if mask is None else bag_mean(union(mask), cu_seqlens)
        student, teacher = self._pool(embeddings, attention, mask, cu_seqlens)
        logits, teacher_logits = self.score(torch.cat((student, teacher))).chunk(2)
        return DMINOutput(
            logits=logits,
            cu_seqlens=cu_seqlens,
            attention=attention,
            mask=mask,
            keep_ratio=keep_ratio,
            teacher_logits=teacher_logits,
            bag_student=student,
            bag_teacher=teacher,
            embeddings=embeddings,
        )

    def _select(self, attention: Tensor, generator: torch.Generator | None) -> Tensor:
        threshold = self.settings.threshold
        if not self.training:
            return gumbel_mask(attention, threshold=threshold)[0]
        temperature, seed = self.settings.temperature, draw_seed(generator)
        return gumbel_mask(attention, seed=seed, temperature=temperature, threshold=threshold)[0]

    @staticmethod
    def _pool(
        embeddings: Tensor, attention: Tensor, mask: Tensor | None, cu_seqlens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Student and teacher (B, C, E), each tile read once: the teacher is a second set of branches."""
        if mask is None:
            teacher = segment_softmax_pool(embeddings, attention, None, cu_seqlens)
            return teacher, teacher
        masks = torch.cat((mask, torch.ones_like(mask)), 1)
        return segment_softmax_pool(embeddings, attention.repeat(1, 2), masks, cu_seqlens).chunk(2, dim=1)

    @staticmethod
    def _given(mask: Tensor, attention: Tensor) -> Tensor:
        if mask.shape != attention.shape:
            raise BagError(
                f"mask has shape {tuple(mask.shape)}, expected {tuple(attention.shape)}: one row for each "
                "tile whose features are given and one column for each class"
            )
        return mask.to(attention.dtype)

    def score(self, bags: Tensor) -> Tensor:
        """Logits (B, C) of bag embeddings (B, C, E), branch c by head c."""
        return torch.cat([head(bags[:, c]) for c, head in enumerate(self.heads)], dim=1)


def union(mask: Tensor) -> Tensor:
    """Whether any branch keeps a tile, with the gradient of a straight-through mask: (N, C) to (N,)."""
    dropped = 1 - mask[:, 0]
    for branch in mask[:, 1:].unbind(1):
        dropped = dropped * (1 - branch)
    return 1 - dropped
