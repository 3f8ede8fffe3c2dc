"""Activations and losses of deel-torchlip as functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from orthonet import _checks, layers, losses

__all__ = [
    "apply_reduction",
    "full_sort",
    "group_sort",
    "group_sort_2",
    "hinge_margin_loss",
    "hinge_multiclass_loss",
    "hkr_loss",
    "hkr_multiclass_loss",
    "kr_loss",
    "kr_loss_multi_gpu",
    "kr_loss_standard",
    "lipschitz_prelu",
    "max_min",
    "neg_kr_loss",
    "process_labels_for_multi_gpu",
]


def max_min(input: Tensor, dim: int | None = None) -> Tensor:
    """Join the positive parts of `input` and of `-input`: twice the channels, norms are kept."""
    dim = dim if dim is not None else min(1, input.ndim - 1)
    return torch.cat((F.relu(input), F.relu(-input)), dim)


def group_sort(input: Tensor, group_size: int | None = None, dim: int = 1) -> Tensor:
    """Sort groups of channels in ascending order; all of them without `group_size`."""
    size = input.shape[dim]
    return layers.GroupSort(size if group_size is None else min(group_size, size), dim)(input)


def group_sort_2(input: Tensor) -> Tensor:
    """Sort pairs of channels."""
    return group_sort(input, 2)


def full_sort(input: Tensor) -> Tensor:
    """Sort all channels."""
    return group_sort(input)


def lipschitz_prelu(input: Tensor, weight: Tensor, k_coef_lip: float = 1.0) -> Tensor:
    """Return `F.prelu` with slopes clamped to [-k, k]."""
    return F.prelu(input, weight.clamp(-k_coef_lip, k_coef_lip))


def apply_reduction(val: Tensor, reduction: str) -> Tensor:
    """Return the mean for "mean" and "auto", the sum for "sum", else `val`."""
    if reduction in ("mean", "auto"):
        return val.mean()
    return val.sum() if reduction == "sum" else val


def process_labels_for_multi_gpu(labels: Tensor) -> Tensor:
    """Return `orthonet.losses.kr_labels(labels)`."""
    return losses.kr_labels(labels)


def kr_loss_multi_gpu(input: Tensor, target: Tensor) -> Tensor:
    """Return the terms (N,) of the distance, for targets of `process_labels_for_multi_gpu`."""
    return (input * target.view(input.shape).to(input.dtype)).mean(-1)


def kr_loss_standard(input: Tensor, target: Tensor) -> Tensor:
    """Return terms (N,) whose mean is the distance of the mean scores of both classes."""
    signs = torch.where(target > 0, 1.0, 0.0).to(input.dtype).view(input.shape)
    return kr_loss_multi_gpu(input, losses.kr_labels(signs))


def kr_loss(input: Tensor, target: Tensor, multi_gpu: bool = False) -> Tensor:
    """Return terms (N,) whose mean is the Kantorovich-Rubinstein distance, to be maximized.

    `orthonet.losses.kr` has the opposite sign.
    """
    return (kr_loss_multi_gpu if multi_gpu else kr_loss_standard)(input, target)


def neg_kr_loss(input: Tensor, target: Tensor, multi_gpu: bool = False) -> Tensor:
    """Return minus `kr_loss`, to be minimized."""
    return -kr_loss(input, target, multi_gpu)


def _signed(input: Tensor, target: Tensor) -> Tensor:
    return torch.where(target.view(input.shape) > 0, input, -input)


def hinge_margin_loss(input: Tensor, target: Tensor, min_margin: float = 1.0) -> Tensor:
    r"""Return \(\max(0, m / 2 - y f)\), averaged over the outputs."""
    return F.relu(min_margin / 2 - _signed(input, target)).mean(-1)


def hinge_multiclass_loss(input: Tensor, target: Tensor, min_margin: float = 1.0) -> Tensor:
    """Return the hinges of all classes, that of the right one times the number of wrong ones."""
    hinge = F.relu(min_margin / 2 - _signed(input, target))
    return torch.where(target > 0, hinge * (target.shape[-1] - 1.0), hinge).mean(-1)


def _mixed(hinge: Tensor, kr: Tensor, alpha: float) -> Tensor:
    return alpha * hinge - (1 - alpha) * kr


def hkr_loss(
    input: Tensor,
    target: Tensor,
    alpha: float,
    min_margin: float = 1.0,
    multi_gpu: bool = False,
) -> Tensor:
    """Return `alpha` times the hinge minus `1 - alpha` times `kr_loss`."""
    _checks.in_range("hkr_loss", 0.0, 1.0, alpha=alpha)
    hinge = hinge_margin_loss(input, target, min_margin)
    return _mixed(hinge, kr_loss(input, target, multi_gpu), alpha)


def hkr_multiclass_loss(
    input: Tensor,
    target: Tensor,
    alpha: float = 0.0,
    min_margin: float = 1.0,
    multi_gpu: bool = False,
) -> Tensor:
    """Return `hkr_loss` with the hinge of `hinge_multiclass_loss`."""
    _checks.in_range("hkr_multiclass_loss", 0.0, 1.0, alpha=alpha)
    hinge = hinge_multiclass_loss(input, target, min_margin)
    return _mixed(hinge, kr_loss(input, target, multi_gpu), alpha)
