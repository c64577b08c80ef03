"""The losses of DMIN and LIPN, term by term (paper: objective of DMIN, objective of LIPN)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, mse_loss

from hdmil_lib.kernels import gumbel_mask
from hdmil_lib.models import DMIN, DMINOutput, MILModel, MILOutput
from hdmil_lib.models.clustering import instance_clustering_loss
from hdmil_lib.models.dmin import union
from hdmil_lib.models.ragged import bag_mean, cumulative

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class LossWeights:
    """a1 to a5 of DMIN's loss, with the values of the authors' code."""

    teacher: float = 0.7
    clustering: float = 0.3
    embedding: float = 0.5
    prediction: float = 0.5
    rate: float = 2.0


@dataclass(frozen=True)
class LIPNLossWeights:
    """b1 and b2 of LIPN's loss; the paper does not give them, so the rate weighs as in DMIN's loss."""

    mask: float = 1.0
    rate: float = 2.0


def dmin_loss(
    model: DMIN,
    output: DMINOutput,
    labels: int | Tensor,
    weights: LossWeights = LossWeights(),
    *,
    k: int = 32,
    subtyping: bool = False,
    detach_teacher: bool = False,
) -> tuple[Tensor, Terms]:
    """L = a1 CE(Y_tea, y) + a2 L_clu + a3 MSE(E_stu, E_tea) + a4 KL(Y_stu, Y_tea) + a5 (r~ - r)^2.

    The divergence is that of the student from the teacher, sum_c p_tea log(p_tea / p_stu), the order of
    arguments in which the paper also writes the squared error. A model without self-distillation has
    the first two terms alone.

    Args:
        model: Gives the instance heads and the target keep ratio r.
        output: What the model said about one bag or several.
        labels: Class of each bag, (B,), or of the one bag.
        weights: a1 to a5.
        k: Tiles at each end of the attention in the clustering loss (the paper: 32).
        subtyping: Every class has its own tiles; see `instance_clustering_loss`.
        detach_teacher: Let the distillation terms move the student alone. By default, as in the authors'
            code, they move the teacher too.

    Returns:
        The total, and the unweighted terms without gradients, each a mean over bags.
    """
    logits, teacher_logits, labels = _batch(output.logits, output.teacher_logits, labels=labels)
    terms = {
        "teacher": cross_entropy(teacher_logits, labels),
        "clustering": instance_clustering_loss(
            model.instance_heads,
            output.embeddings,
            output.attention,
            labels,
            output.cu_seqlens,
            k=k,
            subtyping=subtyping,
        ),
    }
    if output.mask is not None:
        bag = output.bag_teacher
        if detach_teacher:
            bag, teacher_logits = bag.detach(), teacher_logits.detach()
        student, teacher = logits.log_softmax(1), teacher_logits.log_softmax(1)
        terms["embedding"] = mse_loss(output.bag_student, bag)
        terms["prediction"] = kl_div(student, teacher, reduction="batchmean", log_target=True)
        terms["rate"] = (output.keep_ratio - model.settings.keep_ratio).square().mean()
    return _weigh(terms, weights)


def lipn_loss(
    logits: Tensor,
    target_mask: Tensor,
    keep_ratio: float | None,
    weights: LIPNLossWeights = LIPNLossWeights(),
    *,
    cu_seqlens: Tensor | None = None,
    threshold: float = 0.5,
) -> tuple[Tensor, Terms]:
    """L = b1 mean_c L1(M_LR,c, M_HR,c) + b2 (r~_LR - r)^2.

    Args:
        logits: P, LIPN's output, (N, C).
        target_mask: M_HR, the selection of a frozen DMIN in evaluation mode, (N, C).
        keep_ratio: r; `None` takes the share that DMIN keeps of each bag.
        weights: b1 and b2.
        cu_seqlens: Where each bag starts and the last one ends, (B + 1,); `None` for one bag.
        threshold: gamma.

    Returns:
        The total, and the unweighted terms without gradients, each a mean over bags.
    """
    if cu_seqlens is None:
        cu_seqlens = cumulative([len(logits)], logits.device)
    target_mask = target_mask.detach().to(logits.dtype)
    mask, _ = gumbel_mask(logits, threshold=threshold)
    kept = bag_mean(union(mask), cu_seqlens)
    wanted = bag_mean(union(target_mask), cu_seqlens) if keep_ratio is None else keep_ratio
    differing = (mask - target_mask).abs().mean(1)
    terms = {"mask": bag_mean(differing, cu_seqlens).mean(), "rate": (kept - wanted).square().mean()}
    return _weigh(terms, weights)


def bag_loss(
    model: MILModel,
    output: MILOutput,
    labels: int | Tensor,
    weights: LossWeights = LossWeights(),
    **options: bool | int,
) -> tuple[Tensor, Terms]:
    """Mean loss of the bags: `dmin_loss` for DMIN (weights and options go to it), else the model's own.

    Args:
        model: What made the output.
        output: Of one bag or several.
        labels: Class of each bag, (B,), or of the one bag.

    Returns:
        The total, and its terms without gradients.
    """
    if isinstance(output, DMINOutput):
        return dmin_loss(model, output, labels, weights, **options)
    if output.logits.ndim == 1:
        output = replace(output, **{name: getattr(output, name)[None] for name in output.PER_BAG})
    logits, labels = _batch(output.logits, labels=labels)
    terms = model.losses(output, labels)
    return sum(terms.values()), {name: term.detach() for name, term in terms.items()}


def _batch(*logits: Tensor, labels: int | Tensor) -> tuple[Tensor, ...]:
    """Logits as (B, C) and labels as (B,), also of one bag without a bag dimension."""
    labels = torch.as_tensor(labels, device=logits[0].device).reshape(-1)
    return *(each.reshape(len(labels), -1) for each in logits), labels


def _weigh(terms: Terms, weights: LossWeights | LIPNLossWeights) -> tuple[Tensor, Terms]:
    total = sum(getattr(weights, name) * term for name, term in terms.items())
    return total, {name: term.detach() for name, term in terms.items()}
