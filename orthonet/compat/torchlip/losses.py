"""Losses of deel-torchlip: one-hot or signed targets, `min_margin` twice our `margin`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from orthonet import _checks, losses
from orthonet.compat.torchlip.functional import (
    apply_reduction,
    hinge_margin_loss,
    hinge_multiclass_loss,
    hkr_loss,
    hkr_multiclass_loss,
    kr_loss,
    neg_kr_loss,
)

__all__ = [
    "CategoricalHingeLoss",
    "HKRLoss",
    "HKRMulticlassLoss",
    "HingeMarginLoss",
    "HingeMulticlassLoss",
    "KRLoss",
    "KRMulticlassLoss",
    "LseHKRMulticlassLoss",
    "NegKRLoss",
    "TauBCEWithLogitsLoss",
    "TauCrossEntropyLoss",
]


def _share(owner: object, alpha: float) -> float:
    """Return the weight of the hinge; one above 1 is the old ratio of hinge and distance."""
    _checks.require(
        isinstance(alpha, (int, float)) and 0 <= alpha < math.inf,
        owner,
        "alpha must be a number in [0, 1], or the ratio alpha / (1 - alpha) above 1",
        "Use alpha=0.9",
        alpha=alpha,
    )
    return alpha if alpha <= 1 else alpha / (1 + alpha)


class _Loss(nn.Module):
    """A function of scores and targets, with its options as attributes, and a reduction."""

    _function: ClassVar[Callable[..., Tensor]]

    def _keep(self, reduction: str, true_values: Any = None, **options: Any) -> None:
        nn.Module.__init__(self)
        _checks.require(
            true_values is None,
            self,
            "targets are told apart by target > 0",
            "Leave true_values out",
            true_values=true_values,
        )
        self.reduction, self._options = reduction, tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        options = {name: getattr(self, name) for name in self._options}
        return apply_reduction(type(self)._function(input, target, **options), self.reduction)


class KRLoss(_Loss):
    """The Kantorovich-Rubinstein distance itself, to be maximized; `NegKRLoss` is minimized."""

    _function = staticmethod(kr_loss)

    def __init__(
        self, multi_gpu: bool = False, reduction: str = "mean", true_values: Any = None
    ) -> None:
        self._keep(reduction, true_values, multi_gpu=multi_gpu)


class KRMulticlassLoss(KRLoss):
    """`KRLoss` of one-hot targets: the mean distance of each class to the rest."""

    def __init__(self, multi_gpu: bool = False, reduction: str = "mean") -> None:
        super().__init__(multi_gpu, reduction)


class NegKRLoss(KRLoss):
    """Minus `KRLoss`."""

    _function = staticmethod(neg_kr_loss)


class HingeMarginLoss(_Loss):
    """The hinge of a binary classifier at half of `min_margin`."""

    _function = staticmethod(hinge_margin_loss)

    def __init__(self, min_margin: float = 1.0, reduction: str = "mean") -> None:
        self._keep(reduction, min_margin=min_margin)


class HingeMulticlassLoss(HingeMarginLoss):
    """The hinges of all classes, that of the right one times the number of wrong ones."""

    _function = staticmethod(hinge_multiclass_loss)


class HKRLoss(_Loss):
    """`alpha` times the hinge minus `1 - alpha` times the distance, of a binary classifier."""

    _function = staticmethod(hkr_loss)

    def __init__(
        self,
        alpha: float,
        min_margin: float = 1.0,
        multi_gpu: bool = False,
        reduction: str = "mean",
        true_values: Any = None,
    ) -> None:
        options = {"alpha": _share(self, alpha), "min_margin": min_margin, "multi_gpu": multi_gpu}
        self._keep(reduction, true_values, **options)


class HKRMulticlassLoss(HKRLoss):
    """`HKRLoss` of one-hot targets, with the hinges of `HingeMulticlassLoss`."""

    _function = staticmethod(hkr_multiclass_loss)

    def __init__(
        self,
        alpha: float,
        min_margin: float = 1.0,
        multi_gpu: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(alpha, min_margin, multi_gpu, reduction)


def _lse_hkr(
    input: Tensor,
    target: Tensor,
    alpha: float,
    temperature: float,
    penalty: float,
    min_margin: float,
) -> Tensor:
    softness = min_margin * penalty / 2 / math.log(max(input.shape[1] - 1, 2))
    return losses.lse_hinge_kr_multiclass(
        input * temperature,
        target.argmax(1),
        alpha=alpha,
        margin=min_margin / 2,
        temperature=softness,
        reduction="none",
    )


class LseHKRMulticlassLoss(_Loss):
    """`orthonet.losses.LseHKRMulticlassLoss` of one-hot targets and scores times `temperature`.

    The smooth maximum lies at most `penalty * min_margin / 2` above the largest wrong score.
    """

    _function = staticmethod(_lse_hkr)

    def __init__(
        self,
        alpha: float = 1.0,
        temperature: float = 1.0,
        penalty: float = 1.0,
        min_margin: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        options = {"temperature": temperature, "penalty": penalty, "min_margin": min_margin}
        self._keep(reduction, alpha=_share(self, alpha), **options)


class TauCrossEntropyLoss(nn.CrossEntropyLoss):
    """`nn.CrossEntropyLoss` of `tau` times the scores, divided by `tau`."""

    def __init__(self, tau: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tau = tau

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of class indices or of probabilities."""
        shares = input.shape == target.shape
        target = target.to(input.dtype) if shares else target.long()
        return super().forward(input * self.tau, target) / self.tau


class TauBCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """`nn.BCEWithLogitsLoss` of `tau` times the scores, divided by `tau`, of signed targets."""

    def __init__(self, tau: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tau = tau

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        return super().forward(input * self.tau, (target > 0).to(input.dtype)) / self.tau


def _runner_up(input: Tensor, target: Tensor, min_margin: float) -> Tensor:
    return losses.multi_margin(input, target.argmax(1), margin=min_margin, reduction="none")


class CategoricalHingeLoss(HingeMarginLoss):
    """`orthonet.losses.MultiMarginLoss` of one-hot targets: the hinge of the runner-up."""

    _function = staticmethod(_runner_up)
