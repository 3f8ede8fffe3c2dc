"""Losses and certified radii of orthogonium."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orthonet import _checks, layers, losses
from orthonet.compat._soft_hkr import SoftHKRMulticlassLoss as _SoftHKRMulticlassLoss

__all__ = [
    "CosineLoss",
    "Cosine_VRA_Loss",
    "LossXent",
    "SoftHKRMulticlassLoss",
    "VRA",
    "check_last_linear_layer_type",
]


def check_last_linear_layer_type(model: nn.Module) -> str:
    """Tell "global" of a last `OrthoLinear`, "classwise" of a `UnitNormLinear`, else "unknown"."""
    found = [child for child in model.children() if isinstance(child, nn.Linear)]
    if found and isinstance(found[-1], layers.OrthoLinear):
        return "global"
    return "classwise" if found and isinstance(found[-1], layers.UnitNormLinear) else "unknown"


def _radii(margins: Tensor, last_layer_type: str, constant: float) -> Tensor:
    _checks.one_of("VRA", ("global", "classwise"), last_layer_type=last_layer_type)
    return margins / ((math.sqrt(2) if last_layer_type == "global" else 2.0) * constant)


def VRA(  # noqa: N802 (the name of the peer)
    output: Tensor,
    class_indices: Tensor,
    last_layer_type: str = "classwise",
    L: float = 1.0,
    eps: float = 36 / 255,
    return_certs: bool = False,
) -> Tensor:
    """Tell which samples are right for every perturbation up to `eps`, as numbers 0 and 1.

    Args:
        output: Logits (N, classes).
        class_indices: The right classes (N,).
        last_layer_type: "global" if the network is `L`-Lipschitz, "classwise" if each logit is.
        L: The constant; take `certify(model, x).constant.value` for a proved one.
        eps: The l2 radius.
        return_certs: Whether to return the radii instead; negative for wrong predictions.

    Examples:
        >>> VRA(torch.tensor([[2.0, 0.0], [0.1, 0.0]]), torch.tensor([0, 0]))
        tensor([1., 0.])
    """
    index = class_indices.long()[:, None]
    others = output.scatter(1, index, -math.inf).amax(1)
    radii = _radii(output.gather(1, index).squeeze(1) - others, last_layer_type, L)
    return radii if return_certs else (radii > eps).float()


class LossXent(losses.OffsetCrossEntropyLoss):
    """`orthonet.losses.OffsetCrossEntropyLoss`; the number of classes is that of the logits."""

    def __init__(self, n_classes: int, offset: float = 2.12132, temperature: float = 0.25) -> None:
        super().__init__(offset, temperature)
        self.n_classes = n_classes


class CosineLoss(nn.Module):
    """Minus the cosine of the angle between the logits and the one-hot target."""

    def forward(self, yp: Tensor, yt: Tensor) -> Tensor:
        """Return the mean over the batch."""
        return -F.normalize(yp, dim=1).gather(1, yt.long()[:, None]).mean()


class Cosine_VRA_Loss(nn.Module):  # noqa: N801 (the name of the peer)
    """`CosineLoss` and a hinge of the certified radii, weighted by `gamma`."""

    def __init__(
        self,
        gamma: float = 0.1,
        L: float = 1.0,
        eps: float = 36 / 255,
        last_layer_type: str = "classwise",
    ) -> None:
        super().__init__()
        self.gamma = gamma
        self.L = L
        self.eps = eps
        self.last_layer_type = last_layer_type

    def forward(self, yp: Tensor, yt: Tensor, gamma: float | None = None) -> Tensor:
        """Return the mean over the batch."""
        gamma = self.gamma if gamma is None else gamma
        index = yt.long()[:, None]
        radii = _radii(yp.gather(1, index) - yp, self.last_layer_type, self.L)
        true = F.one_hot(yt.long(), yp.shape[1]).bool()
        missing = F.relu(self.eps - radii)
        weight = torch.softmax(missing.masked_fill(true, -math.inf), 1)
        cosine = F.normalize(yp, dim=1).gather(1, index).squeeze(1)
        return (gamma * (missing * weight).sum(1) - (1 - gamma) * cosine).mean()


class SoftHKRMulticlassLoss(_SoftHKRMulticlassLoss):
    """The loss of `orthonet.compat.torchlip` with class indices as targets.

    `alpha` must be in [0, 1]; the default of orthogonium, 10, is outside and is refused there.
    """

    def __init__(
        self,
        alpha: float = 0.9,
        min_margin: float = 1.0,
        alpha_mean: float = 0.99,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(alpha, min_margin, alpha_mean, temperature)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the mean over the batch."""
        return super().forward(input, F.one_hot(target.long(), input.shape[1]))
