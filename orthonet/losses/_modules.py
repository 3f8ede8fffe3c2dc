"""The losses as modules; each calls the function of the same mathematics."""

from __future__ import annotations

import math

from torch import Tensor, nn

from orthonet.losses import _functional, _regularized


class OffsetCrossEntropyLoss(nn.Module):
    r"""Cross-entropy after taking `offset` away from the logit of the true class.

    See [`offset_cross_entropy`][orthonet.losses.offset_cross_entropy].

    Args:
        offset: The margin of the logits asked for; `math.sqrt(2) * radius` for a 1-Lipschitz
            network and a certified l2 radius.
        temperature: Softness of the maximum, > 0.
        reduction: "none", "mean" or "sum".

    Raises:
        ValueError: An argument out of range.

    Examples:
        >>> OffsetCrossEntropyLoss(offset=1.5, temperature=0.25)
        OffsetCrossEntropyLoss(offset=1.5, temperature=0.25, reduction='mean')
    """

    def __init__(self, offset: float, temperature: float = 1.0, reduction: str = "mean"):
        super().__init__()
        _functional.check_offset(self, offset, temperature, reduction)
        self.offset = offset
        self.temperature = temperature
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return _functional.offset_cross_entropy(
            logits,
            target,
            offset=self.offset,
            temperature=self.temperature,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"offset={self.offset}, temperature={self.temperature}, reduction={self.reduction!r}"


class KRLoss(nn.Module):
    """Kantorovich-Rubinstein loss of a binary classifier.

    See [`kr`][orthonet.losses.kr].

    Args:
        reduction: "none", "mean" or "sum".

    Raises:
        ValueError: An unknown reduction.
    """

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        _functional.check_hinge_kr(self, 0.0, 1.0, reduction)
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return _functional.kr(input, target, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class HKRLoss(nn.Module):
    """Hinge-Kantorovich-Rubinstein loss of a binary classifier.

    See [`hinge_kr`][orthonet.losses.hinge_kr].

    Args:
        alpha: Weight of the hinge, in [0, 1]; the Kantorovich-Rubinstein term has the rest.
        margin: Certified radius that the hinge asks of a 1-Lipschitz classifier, > 0.
        reduction: "none", "mean" or "sum".

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, alpha: float = 0.9, margin: float = 1.0, reduction: str = "mean"):
        super().__init__()
        _functional.check_hinge_kr(self, alpha, margin, reduction)
        self.alpha = alpha
        self.margin = margin
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return _functional.hinge_kr(
            input, target, alpha=self.alpha, margin=self.margin, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, margin={self.margin}, reduction={self.reduction!r}"


class HKRMulticlassLoss(HKRLoss):
    """Hinge-Kantorovich-Rubinstein loss, one class against the rest for every class.

    See [`hinge_kr_multiclass`][orthonet.losses.hinge_kr_multiclass]. Arguments and errors are those
    of [`HKRLoss`][orthonet.losses.HKRLoss]; where the hinge is 0, a 1-Lipschitz network has the
    certified radius `math.sqrt(2) * margin`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return _functional.hinge_kr_multiclass(
            input, target, alpha=self.alpha, margin=self.margin, reduction=self.reduction
        )


class SoftHKRMulticlassLoss(HKRLoss):
    """Hinge-Kantorovich-Rubinstein loss in which the likeliest wrong classes weigh most.

    See [`soft_hinge_kr_multiclass`][orthonet.losses.soft_hinge_kr_multiclass].

    Args:
        alpha: Weight of the hinge, in [0, 1].
        margin: Distance from 0 that the hinge asks of every score, > 0.
        temperature: Softness of the choice of wrong classes, > 0.
        reduction: "none", "mean" or "sum".

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(
        self,
        alpha: float = 0.9,
        margin: float = 1.0,
        temperature: float = 1.0,
        reduction: str = "mean",
    ):
        super().__init__(alpha, margin, reduction)
        _functional.check_hinge_kr(self, alpha, margin, reduction, temperature)
        self.temperature = temperature

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return _functional.soft_hinge_kr_multiclass(
            input,
            target,
            alpha=self.alpha,
            margin=self.margin,
            temperature=self.temperature,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature}"


class EMMALoss(nn.Module):
    """Cross-entropy of the worst logits inside a radius, capped by the margin.

    See [`emma`][orthonet.losses.emma].

    Args:
        radius: The certified l2 radius that is asked for, >= 0.
        lipschitz: Constant K of the network.
        reduction: "none", "mean" or "sum".

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, radius: float, lipschitz: float = 1.0, reduction: str = "mean"):
        super().__init__()
        _regularized.check_emma(self, radius, lipschitz, reduction)
        self.radius = radius
        self.lipschitz = lipschitz
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return _regularized.emma(
            logits, target, radius=self.radius, lipschitz=self.lipschitz, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        return f"radius={self.radius}, lipschitz={self.lipschitz}, reduction={self.reduction!r}"


class LogitAnnealingLoss(nn.Module):
    """Offset cross-entropy that fades out samples whose margin is large enough.

    See [`logit_annealing`][orthonet.losses.logit_annealing].

    Args:
        offset: Margin of the logits asked for, >= 0.
        temperature: Softness of the maximum, > 0.
        beta: Strength of the annealing, >= 0.
        reduction: "none", "mean" or "sum".

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(
        self,
        offset: float = math.sqrt(2),
        temperature: float = 0.75,
        beta: float = 5.0,
        reduction: str = "mean",
    ):
        super().__init__()
        _regularized.check_logit_annealing(self, offset, temperature, beta, reduction)
        self.offset = offset
        self.temperature = temperature
        self.beta = beta
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return _regularized.logit_annealing(
            logits,
            target,
            offset=self.offset,
            temperature=self.temperature,
            beta=self.beta,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"offset={self.offset}, temperature={self.temperature}, beta={self.beta}, "
            f"reduction={self.reduction!r}"
        )


class CertificateRegularizationLoss(nn.Module):
    """Cross-entropy minus a multiple of the margin of rightly classified samples.

    See [`certificate_regularization`][orthonet.losses.certificate_regularization].

    Args:
        weight: What the margin is multiplied by, >= 0.
        reduction: "none", "mean" or "sum".

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, weight: float = 0.5, reduction: str = "mean"):
        super().__init__()
        _regularized.check_weight(self, reduction, weight=weight)
        self.weight = weight
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return _regularized.certificate_regularization(
            logits, target, weight=self.weight, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        return f"weight={self.weight}, reduction={self.reduction!r}"


class TRADESLoss(nn.Module):
    """Cross-entropy plus a multiple of the divergence to the scores of perturbed inputs.

    See [`trades`][orthonet.losses.trades].

    Args:
        beta: Weight of the divergence, >= 0.
        reduction: "none", "mean" or "sum".

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, beta: float = 1.0, reduction: str = "mean"):
        super().__init__()
        _regularized.check_weight(self, reduction, beta=beta)
        self.beta = beta
        self.reduction = reduction

    def forward(self, logits: Tensor, perturbed: Tensor, target: Tensor) -> Tensor:
        return _regularized.trades(
            logits, perturbed, target, beta=self.beta, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        return f"beta={self.beta}, reduction={self.reduction!r}"


class MultiMarginLoss(nn.Module):
    """Hinge of the margin to the runner-up alone (`nn.MultiMarginLoss` sums over all classes).

    See [`multi_margin`][orthonet.losses.multi_margin].

    Args:
        margin: The margin asked for, > 0.
        reduction: "none", "mean" or "sum".

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, margin: float = 1.0, reduction: str = "mean"):
        super().__init__()
        _regularized.check_margin(self, margin, reduction)
        self.margin = margin
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return _regularized.multi_margin(
            logits, target, margin=self.margin, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        return f"margin={self.margin}, reduction={self.reduction!r}"
