"""The losses as modules; each calls the function of the same mathematics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from orthonet.losses import _functional, _regularized


class _Loss(nn.Module):
    """A loss function with its options as attributes."""

    _function: ClassVar[Callable[..., Tensor]]
    _check: ClassVar[Callable[..., None]]
    _options: tuple[str, ...]

    def _keep(self, **options: Any) -> None:
        nn.Module.__init__(self)
        type(self)._check(self, **options)
        self._options = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of scores and targets."""
        options = {name: getattr(self, name) for name in self._options}
        return type(self)._function(input, target, **options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._options)


class OffsetCrossEntropyLoss(_Loss):
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

    _function = staticmethod(_functional.offset_cross_entropy)
    _check = staticmethod(_functional.check_offset)

    def __init__(self, offset: float, temperature: float = 1.0, reduction: str = "mean"):
        self._keep(offset=offset, temperature=temperature, reduction=reduction)


class TauBCEWithLogitsLoss(_Loss):
    """Binary cross-entropy of scores at a temperature 1 / tau.

    See [`tau_bce_with_logits`][orthonet.losses.tau_bce_with_logits].

    Args:
        tau: Factor of the scores, > 0.
        reduction: "none", "mean" or "sum".

    Raises:
        ValueError: An argument out of range.
    """

    _function = staticmethod(_functional.tau_bce_with_logits)
    _check = staticmethod(_functional.check_tau)

    def __init__(self, tau: float = 1.0, reduction: str = "mean"):
        self._keep(tau=tau, reduction=reduction)


class KRLoss(_Loss):
    """Kantorovich-Rubinstein loss of a binary classifier.

    See [`kr`][orthonet.losses.kr].

    Args:
        reduction: "none", "mean" or "sum".

    Raises:
        ValueError: An unknown reduction.
    """

    _function = staticmethod(_functional.kr)
    _check = staticmethod(_functional.check_hinge_kr)

    def __init__(self, reduction: str = "mean"):
        self._keep(reduction=reduction)


class HKRLoss(_Loss):
    """Hinge-Kantorovich-Rubinstein loss of a binary classifier.

    See [`hinge_kr`][orthonet.losses.hinge_kr].

    Args:
        alpha: Weight of the hinge, in [0, 1]; the Kantorovich-Rubinstein term has the rest.
        margin: Certified radius that the hinge asks of a 1-Lipschitz classifier, > 0.
        reduction: "none", "mean" or "sum".

    Raises:
        ValueError: An argument out of range.
    """

    _function = staticmethod(_functional.hinge_kr)
    _check = staticmethod(_functional.check_hinge_kr)

    def __init__(self, alpha: float = 0.9, margin: float = 1.0, reduction: str = "mean"):
        self._keep(alpha=alpha, margin=margin, reduction=reduction)


class HKRMulticlassLoss(HKRLoss):
    """Hinge-Kantorovich-Rubinstein loss, one class against the rest for every class.

    See [`hinge_kr_multiclass`][orthonet.losses.hinge_kr_multiclass]. Arguments and errors are those
    of [`HKRLoss`][orthonet.losses.HKRLoss]; where the hinge is 0, a 1-Lipschitz network has the
    certified radius `math.sqrt(2) * margin`.
    """

    _function = staticmethod(_functional.hinge_kr_multiclass)


class _SoftLoss(HKRLoss):
    def __init__(
        self,
        alpha: float = 0.9,
        margin: float = 1.0,
        temperature: float = 1.0,
        reduction: str = "mean",
    ):
        self._keep(alpha=alpha, margin=margin, temperature=temperature, reduction=reduction)


class SoftHKRMulticlassLoss(_SoftLoss):
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

    _function = staticmethod(_functional.soft_hinge_kr_multiclass)


class LseHKRMulticlassLoss(_SoftLoss):
    """Hinge-Kantorovich-Rubinstein loss against a smooth maximum of the wrong scores.

    See [`lse_hinge_kr_multiclass`][orthonet.losses.lse_hinge_kr_multiclass].

    Args:
        alpha: Weight of the hinge, in [0, 1].
        margin: Distance from 0 that the hinge asks of the right score and of the maximum, > 0.
        temperature: Softness of the maximum, > 0.
        reduction: "none", "mean" or "sum".

    Raises:
        ValueError: An argument out of range.
    """

    _function = staticmethod(_functional.lse_hinge_kr_multiclass)


class EMMALoss(_Loss):
    """Cross-entropy of the worst logits inside a radius, capped by the margin.

    See [`emma`][orthonet.losses.emma].

    Args:
        radius: The certified l2 radius that is asked for, >= 0.
        lipschitz: Constant K of the network.
        reduction: "none", "mean" or "sum".

    Raises:
        ValueError: An argument out of range.
    """

    _function = staticmethod(_regularized.emma)
    _check = staticmethod(_regularized.check_emma)

    def __init__(self, radius: float, lipschitz: float = 1.0, reduction: str = "mean"):
        self._keep(radius=radius, lipschitz=lipschitz, reduction=reduction)


class LogitAnnealingLoss(_Loss):
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

    _function = staticmethod(_regularized.logit_annealing)
    _check = staticmethod(_regularized.check_logit_annealing)

    def __init__(
        self,
        offset: float = math.sqrt(2),
        temperature: float = 0.75,
        beta: float = 5.0,
        reduction: str = "mean",
    ):
        self._keep(offset=offset, temperature=temperature, beta=beta, reduction=reduction)


class CertificateRegularizationLoss(_Loss):
    """Cross-entropy minus a multiple of the margin of rightly classified samples.

    See [`certificate_regularization`][orthonet.losses.certificate_regularization].

    Args:
        weight: What the margin is multiplied by, >= 0.
        reduction: "none", "mean" or "sum".

    Raises:
        ValueError: An argument out of range.
    """

    _function = staticmethod(_regularized.certificate_regularization)
    _check = staticmethod(_regularized.check_weight)

    def __init__(self, weight: float = 0.5, reduction: str = "mean"):
        self._keep(weight=weight, reduction=reduction)


class TRADESLoss(_Loss):
    """Cross-entropy plus a multiple of the divergence to the scores of perturbed inputs.

    See [`trades`][orthonet.losses.trades].

    Args:
        beta: Weight of the divergence, >= 0.
        reduction: "none", "mean" or "sum".

    Raises:
        ValueError: An argument out of range.
    """

    _check = staticmethod(_regularized.check_weight)
    beta: float
    reduction: str

    def __init__(self, beta: float = 1.0, reduction: str = "mean"):
        self._keep(beta=beta, reduction=reduction)

    def forward(self, logits: Tensor, perturbed: Tensor, target: Tensor) -> Tensor:
        """Return the loss of clean and perturbed scores and of targets."""
        return _regularized.trades(
            logits, perturbed, target, beta=self.beta, reduction=self.reduction
        )


class MultiMarginLoss(_Loss):
    """Hinge of the margin to the runner-up alone (`nn.MultiMarginLoss` sums over all classes).

    See [`multi_margin`][orthonet.losses.multi_margin].

    Args:
        margin: The margin asked for, > 0.
        reduction: "none", "mean" or "sum".

    Raises:
        ValueError: An argument out of range.
    """

    _function = staticmethod(_regularized.multi_margin)
    _check = staticmethod(_regularized.check_margin)

    def __init__(self, margin: float = 1.0, reduction: str = "mean"):
        self._keep(margin=margin, reduction=reduction)
