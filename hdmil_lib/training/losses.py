"""The losses of DMIN and LIPN, term by term (paper: objective of DMIN, objective of LIPN)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, l1_loss, mse_loss, softplus

from hdmil_lib.kernels import gumbel_mask
from hdmil_lib.models import DMIN, DMINOutput, MILModel, MILOutput

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


def smooth_top1_svm(logits: Tensor, labels: Tensor) -> Tensor:
    """Smooth top-1 SVM loss of two classes, temperature 1, margin 1.

    With z = other - true logit: log(1 + e^(1 + z)), and the hinge max(0, 1 + z) where |z| > ln 1000.

    Args:
        logits: (B, 2).
        labels: (B,), 0 or 1.

    Returns:
        Mean over the batch, a scalar.
    """
    difference = logits[:, 1] - logits[:, 0]
    z = torch.where(labels == 0, difference, -difference)
    return torch.where(z.abs() > math.log(1000), (1 + z).relu(), softplus(1 + z)).mean()


def instance_clustering_loss(
    model: DMIN, output: DMINOutput, label: int, *, k: int = 32, subtyping: bool = False
) -> Tensor:
    """L_clu: the tiles of highest attention stand for the class, those of lowest do not.

    On the branch of the true class the k tiles of highest attention are labelled 1 and the k lowest 0.
    With `subtyping`, the k highest of every other branch are labelled 0 as well. k is at most half the
    bag and at least 1; in a bag of one tile that tile is both the highest and the lowest.

    Returns:
        Mean over the branches that take part, a scalar.
    """
    k = max(1, min(k, len(output.embeddings) // 2))
    losses = []
    for branch, head in enumerate(model.instance_heads):
        if branch != label and not subtyping:
            continue
        attention = output.attention[:, branch]
        chosen = attention.topk(k).indices
        labels = torch.full((k,), int(branch == label), device=attention.device)
        if branch == label:
            chosen = torch.cat((chosen, attention.topk(k, largest=False).indices))
            labels = torch.cat((labels, torch.zeros_like(labels)))
        losses.append(smooth_top1_svm(head(output.embeddings[chosen]), labels))
    return torch.stack(losses).mean()


def dmin_loss(
    model: DMIN,
    output: DMINOutput,
    label: int,
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
        output: What the model said about the bag.
        label: Class of the bag.
        weights: a1 to a5.
        k: Tiles at each end of the attention in the clustering loss (the paper: 32).
        subtyping: Every class has its own tiles; see `instance_clustering_loss`.
        detach_teacher: Let the distillation terms move the student alone. By default, as in the authors'
            code, they move the teacher too.

    Returns:
        The total, and the unweighted terms without gradients.
    """
    target = torch.tensor(label, device=output.logits.device)
    terms = {
        "teacher": cross_entropy(output.teacher_logits, target),
        "clustering": instance_clustering_loss(model, output, label, k=k, subtyping=subtyping),
    }
    if output.mask is not None:
        bag, logits = output.bag_teacher, output.teacher_logits
        if detach_teacher:
            bag, logits = bag.detach(), logits.detach()
        student, teacher = output.logits.log_softmax(0), logits.log_softmax(0)
        terms["embedding"] = mse_loss(output.bag_student, bag)
        terms["prediction"] = kl_div(student, teacher, reduction="sum", log_target=True)
        terms["rate"] = (output.keep_ratio - model.settings.keep_ratio).square()
    return _weigh(terms, weights)


def lipn_loss(
    logits: Tensor,
    target_mask: Tensor,
    keep_ratio: float | None,
    weights: LIPNLossWeights = LIPNLossWeights(),
    *,
    threshold: float = 0.5,
) -> tuple[Tensor, Terms]:
    """L = b1 mean_c L1(M_LR,c, M_HR,c) + b2 (r~_LR - r)^2.

    Args:
        logits: P, LIPN's output, (N, C).
        target_mask: M_HR, the selection of a frozen DMIN in evaluation mode, (N, C).
        keep_ratio: r; `None` takes the share that DMIN keeps of this very bag.
        weights: b1 and b2.
        threshold: gamma.

    Returns:
        The total, and the unweighted terms without gradients.
    """
    target_mask = target_mask.detach().to(logits.dtype)
    if keep_ratio is None:
        keep_ratio = target_mask.amax(1).mean()
    mask, kept = gumbel_mask(logits, threshold=threshold)
    return _weigh({"mask": l1_loss(mask, target_mask), "rate": (kept - keep_ratio).square()}, weights)


def bag_loss(
    model: MILModel,
    output: MILOutput,
    label: int,
    weights: LossWeights = LossWeights(),
    **options: bool | int,
) -> tuple[Tensor, Terms]:
    """The loss of one bag: `dmin_loss` for DMIN (weights and options go to it), else cross entropy."""
    if isinstance(output, DMINOutput):
        return dmin_loss(model, output, label, weights, **options)
    loss = cross_entropy(output.logits, torch.tensor(label, device=output.logits.device))
    return loss, {"bag": loss.detach()}


def _weigh(terms: Terms, weights: LossWeights | LIPNLossWeights) -> tuple[Tensor, Terms]:
    total = sum(getattr(weights, name) * term for name, term in terms.items())
    return total, {name: term.detach() for name, term in terms.items()}
