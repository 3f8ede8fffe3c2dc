"""Losses of deel-torchlip: one-hot or signed targets, `min_margin` twice our `margin`."""

from __future__ import annotations

import math
from typing import Any

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


def _no_true_values(owner: object, true_values: Any) -> None:
    _checks.require(
        true_values is None,
        owner,
        "targets are told apart by target > 0",
        "Leave true_values out",
        true_values=true_values,
    )


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


class KRLoss(nn.Module):
    """The Kantorovich-Rubinstein distance itself, to be maximized; `NegKRLoss` is minimized."""

    def __init__(
        self, multi_gpu: bool = False, reduction: str = "mean", true_values: Any = None
    ) -> None:
        super().__init__()
        _no_true_values(self, true_values)
        self.multi_gpu = multi_gpu
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        return apply_reduction(kr_loss(input, target, self.multi_gpu), self.reduction)


class KRMulticlassLoss(KRLoss):
    """`KRLoss` of one-hot targets: the mean distance of each class to the rest."""

    def __init__(self, multi_gpu: bool = False, reduction: str = "mean") -> None:
        super().__init__(multi_gpu, reduction)


class NegKRLoss(KRLoss):
    """Minus `KRLoss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        return apply_reduction(neg_kr_loss(input, target, self.multi_gpu), self.reduction)


class HingeMarginLoss(nn.Module):
    """The hinge of a binary classifier at half of `min_margin`."""

    def __init__(self, min_margin: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.min_margin = min_margin
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        hinge = hinge_margin_loss(input, target, self.min_margin)
        return apply_reduction(hinge, self.reduction)


class HingeMulticlassLoss(HingeMarginLoss):
    """The hinges of all classes, that of the right one times the number of wrong ones."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        hinge = hinge_multiclass_loss(input, target, self.min_margin)
        return apply_reduction(hinge, self.reduction)


class HKRLoss(nn.Module):
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
        super().__init__()
        _no_true_values(self, true_values)
        self.alpha = _share(self, alpha)
        self.min_margin = min_margin
        self.multi_gpu = multi_gpu
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        terms = self._function(input, target, self.alpha, self.min_margin, self.multi_gpu)
        return apply_reduction(terms, self.reduction)


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


class LseHKRMulticlassLoss(nn.Module):
    """`orthonet.losses.LseHKRMulticlassLoss` of one-hot targets and scores times `temperature`.

    The smooth maximum lies at most `penalty * min_margin / 2` above the largest wrong score.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        temperature: float = 1.0,
        penalty: float = 1.0,
        min_margin: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.alpha = _share(self, alpha)
        self.temperature = temperature
        self.penalty = penalty
        self.min_margin = min_margin
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        softness = self.min_margin * self.penalty / 2 / math.log(max(input.shape[1] - 1, 2))
        terms = losses.lse_hinge_kr_multiclass(
            input * self.temperature,
            target.argmax(1),
            alpha=self.alpha,
            margin=self.min_margin / 2,
            temperature=softness,
            reduction="none",
        )
        return apply_reduction(terms, self.reduction)


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


class CategoricalHingeLoss(nn.Module):
    """`orthonet.losses.MultiMarginLoss` of one-hot targets: the hinge of the runner-up."""

    def __init__(self, min_margin: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.min_margin = min_margin
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        terms = losses.multi_margin(
            input, target.argmax(1), margin=self.min_margin, reduction="none"
        )
        return apply_reduction(terms, self.reduction)
