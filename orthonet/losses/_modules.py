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
    _options: tuple[str, ...]

    def _keep(self, **options: Any) -> None:
        nn.Module.__init__(self)
        _functional.check_options(self, **options)
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
    """Compute the cross-entropy after a margin is subtracted from the logit of the true class.

    See [`offset_cross_entropy`][orthonet.losses.offset_cross_entropy] for the options.

    Examples:
        >>> OffsetCrossEntropyLoss(offset=1.5, temperature=0.25)
        OffsetCrossEntropyLoss(offset=1.5, temperature=0.25, reduction='mean')
    """

    _function = staticmethod(_functional.offset_cross_entropy)

    def __init__(self, offset: float, temperature: float = 1.0, reduction: str = "mean"):
        self._keep(offset=offset, temperature=temperature, reduction=reduction)


class TauBCEWithLogitsLoss(_Loss):
    """Compute the binary cross-entropy of scores at a temperature 1 / tau.

    See [`tau_bce_with_logits`][orthonet.losses.tau_bce_with_logits] for the options.

    Examples:
        >>> TauBCEWithLogitsLoss(tau=2.0)(torch.zeros(2), torch.tensor([1, 0]))
        tensor(0.3466)
    """

    _function = staticmethod(_functional.tau_bce_with_logits)

    def __init__(self, tau: float = 1.0, reduction: str = "mean"):
        self._keep(tau=tau, reduction=reduction)


class KRLoss(_Loss):
    """Compute the Kantorovich-Rubinstein loss of a binary classifier.

    See [`kr`][orthonet.losses.kr] for the options.

    Examples:
        >>> KRLoss()(torch.tensor([2.0, 4.0, 1.0]), torch.tensor([1, 1, 0]))
        tensor(-2.)
    """

    _function = staticmethod(_functional.kr)

    def __init__(self, reduction: str = "mean"):
        self._keep(reduction=reduction)


class HKRLoss(_Loss):
    """Compute the hinge-Kantorovich-Rubinstein loss of a binary classifier.

    See [`hinge_kr`][orthonet.losses.hinge_kr] for the options.

    Examples:
        >>> HKRLoss(alpha=0.5)(torch.tensor([2.0, -0.5]), torch.tensor([1, 0]))
        tensor(-1.1250)
    """

    _function = staticmethod(_functional.hinge_kr)

    def __init__(self, alpha: float = 0.9, margin: float = 1.0, reduction: str = "mean"):
        self._keep(alpha=alpha, margin=margin, reduction=reduction)


class HKRMulticlassLoss(HKRLoss):
    """Compute the HKR loss, one class against the rest for every class.

    See [`hinge_kr_multiclass`][orthonet.losses.hinge_kr_multiclass] for the options.

    Examples:
        >>> HKRMulticlassLoss(alpha=1.0)(torch.tensor([[2.0, -1.0]]), torch.tensor([0]))
        tensor(0.)
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
    """Compute the HKR loss in which the likeliest wrong classes weigh most.

    See [`soft_hinge_kr_multiclass`][orthonet.losses.soft_hinge_kr_multiclass] for the options.

    Examples:
        >>> SoftHKRMulticlassLoss(alpha=1.0)(torch.tensor([[2.0, -1.0]]), torch.tensor([0]))
        tensor(0.)
    """

    _function = staticmethod(_functional.soft_hinge_kr_multiclass)


class LseHKRMulticlassLoss(_SoftLoss):
    """Compute the HKR loss against a smooth maximum of the wrong scores.

    See [`lse_hinge_kr_multiclass`][orthonet.losses.lse_hinge_kr_multiclass] for the options.

    Examples:
        >>> LseHKRMulticlassLoss(alpha=1.0)(torch.tensor([[2.0, -1.0]]), torch.tensor([0]))
        tensor(0.)
    """

    _function = staticmethod(_functional.lse_hinge_kr_multiclass)


class EMMALoss(_Loss):
    """Compute the cross-entropy of the worst logits inside a radius, capped by the margin.

    See [`emma`][orthonet.losses.emma] for the options.

    Examples:
        >>> EMMALoss(radius=1.0)(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
        tensor(0.4397)
    """

    _function = staticmethod(_regularized.emma)

    def __init__(self, radius: float, lipschitz: float = 1.0, reduction: str = "mean"):
        self._keep(radius=radius, lipschitz=lipschitz, reduction=reduction)


class LogitAnnealingLoss(_Loss):
    """Compute an offset cross-entropy that fades out samples with a large margin.

    See [`logit_annealing`][orthonet.losses.logit_annealing] for the options.

    Examples:
        >>> LogitAnnealingLoss()(torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
        tensor(0.0778)
    """

    _function = staticmethod(_regularized.logit_annealing)

    def __init__(
        self,
        offset: float = math.sqrt(2),
        temperature: float = 0.75,
        beta: float = 5.0,
        reduction: str = "mean",
    ):
        self._keep(offset=offset, temperature=temperature, beta=beta, reduction=reduction)


class CertificateRegularizationLoss(_Loss):
    """Compute the cross-entropy minus a multiple of the margin of correct samples.

    See [`certificate_regularization`][orthonet.losses.certificate_regularization] for the options.

    Examples:
        >>> CertificateRegularizationLoss(0.5)(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(-0.8731)
    """

    _function = staticmethod(_regularized.certificate_regularization)

    def __init__(self, weight: float = 0.5, reduction: str = "mean"):
        self._keep(weight=weight, reduction=reduction)


class TRADESLoss(_Loss):
    """Compute the cross-entropy plus the divergence to the scores of perturbed inputs.

    See [`trades`][orthonet.losses.trades] for the options.

    Examples:
        >>> clean, moved = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> TRADESLoss(beta=1.0)(clean, moved, torch.tensor([0]))
        tensor(0.4547)
    """

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
    """Compute the hinge of the margin to the runner-up.

    See [`multi_margin`][orthonet.losses.multi_margin] for the options.

    Examples:
        >>> MultiMarginLoss()(torch.tensor([[1.5, 0.0, 1.0]]), torch.tensor([0]))
        tensor(0.5000)
    """

    _function = staticmethod(_regularized.multi_margin)

    def __init__(self, margin: float = 1.0, reduction: str = "mean"):
        self._keep(margin=margin, reduction=reduction)
