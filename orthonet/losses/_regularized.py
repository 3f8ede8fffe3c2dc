"""Losses beyond cross-entropy: EMMA, logit annealing, certificate regularization, TRADES."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from orthonet import _checks
from orthonet.losses._functional import check_classes, check_options, reduced

__all__ = [
    "certificate_regularization",
    "emma",
    "logit_annealing",
    "multi_margin",
    "trades",
]


def emma(
    logits: Tensor,
    target: Tensor,
    *,
    radius: float,
    lipschitz: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Return the cross-entropy of the worst logits inside a radius, capped by the margin (EMMA).

    Every wrong logit is raised by \(\min(\sqrt 2 K \epsilon, s_y - s_j)\), at least 0 and constant
    for the gradient, so a class is pushed up to a tie with the true one at most.

    Args:
        logits: (batch, classes).
        target: Classes, (batch,).
        radius: The certified l2 radius \(\epsilon\) that is asked for, >= 0.
        lipschitz: Constant \(K\) of the network, > 0.
        reduction: See [`offset_cross_entropy`][orthonet.losses.offset_cross_entropy].

    Shape:
        Output: as there.

    Raises:
        ValueError: As there.

    Examples:
        >>> logits = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> emma(logits, torch.tensor([0, 1]), radius=1.0)
        tensor(0.4397)

    References:
        Hu, Zou, Wang, Leino & Fredrikson, *Unlocking deterministic robustness certification on
        ImageNet*, NeurIPS 2023 (efficient margin maximization).
    """
    check_options("emma", radius=radius, lipschitz=lipschitz, reduction=reduction)
    check_classes("emma", logits, target)
    true = logits.gather(1, target.long()[:, None])
    raised = (true - logits).detach().clamp(0.0, math.sqrt(2) * lipschitz * radius)
    return F.cross_entropy(logits + raised, target.long(), reduction=reduction)


def logit_annealing(
    logits: Tensor,
    target: Tensor,
    *,
    offset: float = math.sqrt(2),
    temperature: float = 0.75,
    beta: float = 5.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Return the logit annealing loss \(-T (1 - p_y)^\beta \log p_y\).

    \(p = \mathrm{softmax}((s - \xi e_y)/T)\). The factor fades out samples whose margin is large
    enough, so the capacity of a 1-Lipschitz network goes to the others. `beta = 0` is the offset
    cross-entropy.

    Args:
        logits: (batch, classes).
        target: Classes, (batch,).
        offset: Margin \(\xi\) subtracted from the true logit, >= 0.
        temperature: \(T\), softness of the maximum, > 0.
        beta: Strength of the annealing, >= 0.
        reduction: See [`offset_cross_entropy`][orthonet.losses.offset_cross_entropy].

    Shape:
        Output: as there.

    Raises:
        ValueError: As there.

    Examples:
        >>> logit_annealing(torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
        tensor(0.0778)

    References:
        Lai, Huang, Wang & Zhang, ICML 2025 (logit annealing loss).
    """
    options = {"offset": offset, "temperature": temperature, "beta": beta}
    check_options("logit_annealing", **options, reduction=reduction)
    check_classes("logit_annealing", logits, target)
    wanted = F.one_hot(target.long(), logits.shape[1]).to(logits.dtype)
    log_p = F.log_softmax((logits - offset * wanted) / temperature, 1)
    log_p = log_p.gather(1, target.long()[:, None]).squeeze(1)
    # 1 - p, kept away from 0 where a power below 1 has an infinite slope
    rest = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).eps)
    return reduced(-temperature * rest**beta * log_p, reduction)


def certificate_regularization(
    logits: Tensor, target: Tensor, *, weight: float = 0.5, reduction: str = "mean"
) -> Tensor:
    r"""Return the cross-entropy minus a multiple of the margin of correctly classified samples.

    \(\mathrm{CE}(s, y) - \gamma \max(0, s_y - \max_{j \ne y} s_j)\): the margin over
    \(\sqrt 2\) is the certified radius of a 1-Lipschitz network.

    Args:
        logits: (batch, classes).
        target: Classes, (batch,).
        weight: Factor \(\gamma\) of the margin, >= 0.
        reduction: See [`offset_cross_entropy`][orthonet.losses.offset_cross_entropy].

    Shape:
        Output: as there.

    Raises:
        ValueError: As there.

    Examples:
        >>> certificate_regularization(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), weight=0.5)
        tensor(-0.8731)

    References:
        Singla, Singla & Feizi, ICLR 2022 (certificate regularization).
    """
    check_options("certificate_regularization", weight=weight, reduction=reduction)
    check_classes("certificate_regularization", logits, target)
    loss = F.cross_entropy(logits, target.long(), reduction="none")
    return reduced(loss - weight * F.relu(_margin(logits, target)), reduction)


def trades(
    logits: Tensor,
    perturbed: Tensor,
    target: Tensor,
    *,
    beta: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Return the TRADES loss: cross-entropy plus \(\beta\, \mathrm{KL}(p \,\|\, p')\).

    \(p\) and \(p'\) are the probabilities of clean and perturbed inputs. The perturbed logits come
    from an attack, or from the worst case of a certificate (the true logit lowered and the others
    raised by the constant times the radius).

    Args:
        logits: Of clean inputs, (batch, classes).
        perturbed: Of perturbed inputs, (batch, classes).
        target: Classes, (batch,).
        beta: Weight of the divergence, >= 0.
        reduction: See [`offset_cross_entropy`][orthonet.losses.offset_cross_entropy].

    Shape:
        Output: as there.

    Raises:
        ValueError: As there.

    Examples:
        >>> clean, moved = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> trades(clean, moved, torch.tensor([0]))
        tensor(0.4547)

    References:
        Zhang et al., *Theoretically principled trade-off between robustness and accuracy*, ICML
        2019.
    """
    check_options("trades", beta=beta, reduction=reduction)
    check_classes("trades", logits, target)
    _checks.floating("trades", perturbed=perturbed)
    _checks.require(
        perturbed.shape == logits.shape,
        "trades",
        "logits and perturbed must have one shape",
        "Evaluate the model on both",
        logits=logits,
        perturbed=perturbed,
    )
    clean = F.cross_entropy(logits, target.long(), reduction="none")
    log_p, log_q = F.log_softmax(logits, 1), F.log_softmax(perturbed, 1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(1)
    return reduced(clean + beta * divergence, reduction)


def multi_margin(
    logits: Tensor, target: Tensor, *, margin: float = 1.0, reduction: str = "mean"
) -> Tensor:
    r"""Return the hinge of the margin to the runner-up.

    \(\max(0, m - (s_y - \max_{j \ne y} s_j))\) is zero where a 1-Lipschitz network has the
    certified radius \(m / \sqrt 2\).
    (`nn.MultiMarginLoss` sums over all classes.)

    Args:
        logits: (batch, classes).
        target: Classes, (batch,).
        margin: The margin \(m\) asked for, > 0.
        reduction: See [`offset_cross_entropy`][orthonet.losses.offset_cross_entropy].

    Shape:
        Output: as there.

    Raises:
        ValueError: As there.

    Examples:
        >>> multi_margin(torch.tensor([[1.5, 0.0, 1.0]]), torch.tensor([0]))
        tensor(0.5000)

    References:
        Crammer & Singer, *On the algorithmic implementation of multiclass kernel-based vector
        machines*, JMLR 2001.
    """
    check_options("multi_margin", margin=margin, reduction=reduction)
    check_classes("multi_margin", logits, target)
    return reduced(F.relu(margin - _margin(logits, target)), reduction)


def _margin(logits: Tensor, target: Tensor) -> Tensor:
    index = target.long()[:, None]
    others = logits.scatter(1, index, -math.inf).amax(1)
    return logits.gather(1, index).squeeze(1) - others
