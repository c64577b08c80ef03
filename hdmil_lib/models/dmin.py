"""DMIN: attention MIL that learns by self-distillation which tiles it needs (paper: DMIN)."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn
from torch.nn.functional import kl_div, mse_loss

from hdmil_lib.errors import BagError
from hdmil_lib.kernels import segment_softmax_pool
from hdmil_lib.kernels.random import draw_seed
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models.base import LossTerms, MILModel, MILOutput
from hdmil_lib.models.clustering import instance_clustering_loss
from hdmil_lib.models.kan import ChebyshevKAN
from hdmil_lib.models.layers import GatedAttention, Projected, Projection
from hdmil_lib.models.ragged import bag_mean
from hdmil_lib.schema import Schema, first_problem

Weight = Annotated[float, Field(ge=0, le=1e6)]
Width = Annotated[int, Field(ge=1, le=65_536)]


class LossWeights(Schema):
    """Weights a1 to a5 of DMIN's loss, in this order; the defaults are those of the authors' code."""

    teacher: Weight = 0.7
    clustering: Weight = 0.3
    embedding: Weight = 0.5
    prediction: Weight = 0.5
    rate: Weight = 2.0


class DMINSettings(Schema):
    """Arguments of a DMIN with their bounds, as stored in a model folder."""

    in_dim: Width
    n_classes: Annotated[int, Field(ge=2, le=1000)]
    embed_dim: Width
    attention_dim: Width
    dropout: Annotated[float, Field(ge=0, lt=1)]
    degree: Annotated[int, Field(ge=1, le=64)]
    temperature: Annotated[float, Field(gt=0, le=1000)]
    threshold: Annotated[float, Field(gt=0, lt=1)]
    keep_ratio: Annotated[float, Field(gt=0, le=1)]
    head: Literal["cka", "linear"]
    linear_start: bool
    self_distillation: bool
    k: Annotated[int, Field(ge=1, le=100_000)]
    subtyping: bool
    detach_teacher: bool
    loss_weights: LossWeights


@dataclass(frozen=True, kw_only=True)
class DMINOutput(MILOutput):
    """Output of DMIN; `logits` are those of the student, `attention` is (N, C).

    Attributes:
        mask: Selection M of each branch, (N, C), straight-through in training; `None` without
            self-distillation.
        keep_ratio: r~, share of each bag's tiles that at least one branch selects, (B,); `None` likewise.
        teacher_logits: Class scores of the teacher, (B, C).
        bag_student: Embedding of the selected tiles of each branch, (B, C, E).
        bag_teacher: Embedding of all tiles of each branch, (B, C, E).
        projected: Embeddings F, (N, E), and what they were computed from.
    """

    attention: Tensor
    mask: Tensor | None
    keep_ratio: Tensor | None
    teacher_logits: Tensor
    bag_student: Tensor
    bag_teacher: Tensor
    projected: Projected

    @property
    def embeddings(self) -> Tensor:
        """F, (N, E)."""
        return self.projected.embeddings


class DMIN(MILModel[DMINOutput]):
    """Dynamic multi-instance network: a teacher over all tiles, a student over the tiles that it selects.

    Each class has a branch: an attention column, a mask, a bag embedding and a classifier. Teacher and
    student share all weights. In training the selection is drawn with Gumbel noise; in evaluation it is
    M_c = [sigmoid(A_c) > gamma], without noise or temperature. A branch that selects nothing pools its
    tile of highest attention. Without self-distillation there is no mask, and student and teacher are equal.

    Args:
        in_dim: Width of the features, D.
        n_classes: Number of classes and of branches, C.
        embed_dim: Width of the embeddings, E.
        attention_dim: Width of the attention's hidden layer.
        dropout: Dropout rate of the embeddings and of both factors of the attention.
        degree: K, degree of the Chebyshev heads.
        temperature: tau of the Gumbel-sigmoid, used in training only.
        threshold: gamma; a tile is kept where its sigmoid exceeds it.
        keep_ratio: r, the target of the rate loss.
        head: Chebyshev-KAN ("cka") or linear classifiers ("linear": Table 3 without CKA).
        linear_start: Whether Chebyshev heads start as linear ones; see `ChebyshevKAN`.
        self_distillation: Whether there is a mask (False: Table 3 without SelfDist).
        k: Number of tiles at each end of the attention in the clustering loss.
        subtyping: Whether every class has tiles of its own; see `instance_clustering_loss`.
        detach_teacher: Whether the distillation terms have no gradient to the teacher. By default they have,
            as in the authors' code.
        loss_weights: Weights of the loss; those of the authors' code by default.

    Attributes:
        settings: The arguments.

    Raises:
        ValueError: An argument is out of bounds.
    """

    def __init__(
        self,
        in_dim: int = 1024,
        n_classes: int = 2,
        *,
        embed_dim: int = 512,
        attention_dim: int = 256,
        dropout: float = 0.25,
        degree: int = 12,
        temperature: float = 0.7,
        threshold: float = 0.5,
        keep_ratio: float = 0.6,
        head: Literal["cka", "linear"] = "cka",
        linear_start: bool = False,
        self_distillation: bool = True,
        k: int = 32,
        subtyping: bool = False,
        detach_teacher: bool = False,
        loss_weights: LossWeights | None = None,
    ):
        try:
            settings = DMINSettings(
                in_dim=in_dim,
                n_classes=n_classes,
                embed_dim=embed_dim,
                attention_dim=attention_dim,
                dropout=dropout,
                degree=degree,
                temperature=temperature,
                threshold=threshold,
                keep_ratio=keep_ratio,
                head=head,
                linear_start=linear_start,
                self_distillation=self_distillation,
                k=k,
                subtyping=subtyping,
                detach_teacher=detach_teacher,
                loss_weights=loss_weights or LossWeights(),
            )
        except ValidationError as error:
            raise ValueError(first_problem(error)) from error
        super().__init__(in_dim, n_classes)
        self.settings = settings
        self.projection = Projection(in_dim, embed_dim, dropout)
        self.attention = GatedAttention(embed_dim, attention_dim, n_classes, dropout)
        self.heads = nn.ModuleList(self._head(1) for _ in range(n_classes))
        self.instance_heads = nn.ModuleList(self._head(2) for _ in range(n_classes))

    def _head(self, out_features: int) -> nn.Module:
        s = self.settings
        if s.head == "linear":
            return nn.Linear(s.embed_dim, out_features)
        return ChebyshevKAN(s.embed_dim, out_features, s.degree, linear_start=s.linear_start)

    def classify(
        self,
        features: Tensor,
        segments: Segments,
        rows: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> DMINOutput:
        """Classify bags.

        Args:
            features: I, (N, in_dim), or (M, in_dim) with `rows`.
            segments: The B bags.
            rows: Rows of the features of the tiles of these bags, (N,).
            mask: Tiles that LIPN selected for each branch, (N, C), in place of DMIN's own selection.
            generator: Generator of the Gumbel noise in training; torch's global generator by default.

        Raises:
            BagError: The mask has another shape.
        """
        projected = self.projection.project(features, *self.scale, rows=rows)
        embeddings = projected.embeddings
        if mask is not None:
            attention = self.attention(embeddings)
            mask = self._given(mask, attention)
            # Student and teacher are pooled in one pass: the teacher is a second set of branches.
            masks = torch.cat((mask, torch.ones_like(mask)), 1)
            pooled = segment_softmax_pool(embeddings, attention.repeat(1, 2), masks, segments)
            student, teacher = pooled.chunk(2, 1)
        elif self.settings.self_distillation:
            student, teacher, attention, mask = self.attention.distill(
                embeddings,
                segments,
                noise_seed=lambda: draw_seed(generator) if self.training else None,
                temperature=self.settings.temperature if self.training else 1.0,
                threshold=self.settings.threshold,
            )
        else:
            student, attention = self.attention.pool(embeddings, segments)
            teacher = student
        keep_ratio = None if mask is None else bag_mean(union(mask), segments)
        logits, teacher_logits = self.score(torch.cat((student, teacher))).chunk(2)
        return DMINOutput(
            logits=logits,
            segments=segments,
            attention=attention,
            mask=mask,
            keep_ratio=keep_ratio,
            teacher_logits=teacher_logits,
            bag_student=student,
            bag_teacher=teacher,
            projected=projected,
        )

    def loss(self, output: DMINOutput, labels: Tensor) -> LossTerms:
        """L = a1 CE(Y_tea, y) + a2 L_clu + a3 MSE(E_stu, E_tea) + a4 KL(Y_tea || Y_stu) + a5 (r~ - r)^2.

        Here KL(Y_tea || Y_stu) = sum_c p_tea log(p_tea / p_stu) (paper: objective of DMIN).

        Args:
            output: Output of `forward`.
            labels: Class indices, int64 (B,).

        Returns:
            The weighted terms "teacher", "clustering", "embedding", "prediction" and "rate", each a mean
            over bags; without self-distillation the first two only.
        """
        terms = {
            "teacher": self.cross_entropy(output.teacher_logits, labels),
            "clustering": instance_clustering_loss(
                self.instance_heads,
                partial(self.projection.pick, output.projected),
                output.attention,
                labels,
                output.segments,
                k=self.settings.k,
                subtyping=self.settings.subtyping,
            ),
        }
        if output.keep_ratio is not None:
            bag, teacher_logits = output.bag_teacher, output.teacher_logits
            if self.settings.detach_teacher:
                bag, teacher_logits = bag.detach(), teacher_logits.detach()
            student, teacher = output.logits.log_softmax(1), teacher_logits.log_softmax(1)
            terms["embedding"] = mse_loss(output.bag_student, bag)
            terms["prediction"] = kl_div(student, teacher, reduction="batchmean", log_target=True)
            terms["rate"] = (output.keep_ratio - self.settings.keep_ratio).square().mean()
        weights = self.settings.loss_weights
        return {name: getattr(weights, name) * term for name, term in terms.items()}

    @staticmethod
    def _given(mask: Tensor, attention: Tensor) -> Tensor:
        if mask.shape != attention.shape:
            raise BagError(
                f"mask has shape {tuple(mask.shape)}, expected {tuple(attention.shape)}: one row per "
                "tile and one column per class"
            )
        return mask.to(attention.dtype)

    def score(self, bags: Tensor) -> Tensor:
        """Logits (B, C) of bag embeddings (B, C, E); head c classifies branch c."""
        return torch.cat([head(bags[:, c]) for c, head in enumerate(self.heads)], dim=1)


def union(mask: Tensor) -> Tensor:
    """Union over branches of a mask (N, C) of 0 and 1: (N,), differentiable for a straight-through mask."""
    dropped = 1 - mask[:, 0]
    for branch in mask[:, 1:].unbind(1):
        dropped = dropped * (1 - branch)
    return 1 - dropped
