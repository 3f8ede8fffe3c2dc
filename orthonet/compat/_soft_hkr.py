"""The soft HKR loss whose temperature follows the size of the scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orthonet import _checks

__all__ = ["SoftHKRMulticlassLoss"]


class SoftHKRMulticlassLoss(nn.Module):
    """Soft multiclass HKR loss of one-hot or signed targets.

    Wrong classes are weighted by a softmax, whose temperature follows a running mean of the modulus
    of the scores. `orthonet.losses.SoftHKRMulticlassLoss` has a fixed temperature, no state, and
    class indices as targets.

    Args:
        alpha: Weight of the hinge, in [0, 1].
        min_margin: Distance between the scores that the hinge asks for.
        alpha_mean: Weight of the past in the running mean.
        temperature: Larger values weigh the largest wrong score more.
        reduction: "none", "mean", "sum" or "auto".
    """

    current_mean: Tensor

    def __init__(
        self,
        alpha: float = 0.9,
        min_margin: float = 1.0,
        alpha_mean: float = 0.99,
        temperature: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _checks.in_range(self, 0.0, 1.0, alpha=alpha, alpha_mean=alpha_mean)
        _checks.one_of(self, ("none", "mean", "sum", "auto"), reduction=reduction)
        self.alpha = alpha
        self.min_margin = min_margin
        self.alpha_mean = alpha_mean
        self.temperature = temperature * min_margin
        self.reduction = reduction
        self.register_buffer("current_mean", torch.tensor([float(min_margin)]))

    def _temperature(self, input: Tensor) -> Tensor:
        with torch.no_grad():
            seen = input.abs().mean().to(self.current_mean.dtype)
            mean = self.alpha_mean * self.current_mean + (1 - self.alpha_mean) * seen
            self.current_mean = mean.clamp(0.005, 1000.0)
            scale = self.temperature / mean.clamp(self.min_margin, 20000.0)
            return scale.clamp(0.005, 250.0).to(input.dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss; the running mean moves with every call, as the peer's does."""
        true = target > 0
        lowest = torch.finfo(input.dtype).min
        weight = torch.softmax((self._temperature(input) * input).masked_fill(true, lowest), -1)
        weight = torch.where(true, torch.ones_like(weight), weight)
        signed = torch.where(true, input, -input)
        hinge = F.relu(self.min_margin / 2 - signed)
        loss = (weight * (self.alpha * hinge - (1 - self.alpha) * signed)).sum(-1)
        if self.reduction == "none":
            return loss
        return loss.sum() if self.reduction == "sum" else loss.mean()
