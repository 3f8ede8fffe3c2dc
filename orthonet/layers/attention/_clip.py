"""Clipping of norms: the projection of each token onto a ball."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from orthonet import _checks
from orthonet.layers._declared import Declared, Norms, refuse
from orthonet.layers.attention._base import traced
from orthonet.linalg.bounds.sizes import Rounding
from orthonet.linalg.matrix import compute_dtype

__all__ = ["RMSClip", "clip_norm", "clip_roundings"]


def clip_norm(
    x: Tensor,  # (*shape, features)
    radius: float,
) -> Tensor:
    """Project vectors onto the ball of this radius; entries may be as large as the dtype holds."""
    largest = x.detach().abs().amax(-1, keepdim=True).clamp_min(radius)
    unit = x / largest
    norm = unit.square().sum(-1, keepdim=True).clamp_min(1e-12).sqrt()
    return torch.where(norm * (largest / radius) <= 1.0, x, unit * (radius / norm))


def clip_roundings(features: int) -> float:
    """The roundings of an entry in `clip_norm`."""
    return features / 2.0 + 12.0


def _clip_tokens(x: Tensor, max_rms: float) -> Tensor:
    return clip_norm(x, max_rms * x.shape[-1] ** 0.5)


class _PlainClip(nn.Module):
    """The layer without its checks, which is traced for export."""

    def __init__(self, max_rms: float) -> None:
        super().__init__()
        self.max_rms = max_rms

    def forward(self, x: Tensor) -> Tensor:
        return _clip_tokens(x, self.max_rms)


class RMSClip(nn.Module):
    r"""Scale tokens down to a largest root mean square: \(x \min(1, r / \mathrm{rms}(x))\).

    What RMSNorm does to large tokens, without what makes it unbounded near zero: the projection
    onto the ball of radius \(r \sqrt D\).

    Args:
        max_rms: The limit r.

    Shape:
        (N, *, D), features last; the output has the same.

    Guarantee:
        Constant at most 1, exactly 1 at small inputs, on the whole space, in train and eval: a
        projection onto a convex set. Proof. For the projections a, b of x, y,
        \((x - a) \cdot (b - a) \le 0\) and \((y - b) \cdot (a - b) \le 0\), whose sum is
        \(|a - b|^2 \le (x - y) \cdot (a - b)\).

    Raises:
        ValueError: `max_rms` is not a positive number, or the input has no features.

    Examples:
        >>> RMSClip()(torch.tensor([[3.0, 4.0], [0.6, 0.8]])).norm(dim=1)
        tensor([1.4142, 1.0000])
    """

    def __init__(self, max_rms: float = 1.0) -> None:
        super().__init__()
        _checks.in_range(self, 1e-6, 1e6, max_rms=max_rms)
        self.max_rms = float(max_rms)

    def forward(self, x: Tensor) -> Tensor:
        _checks.real_input(self, x)
        _checks.require(x.ndim >= 1, self, "the input must have features", "Use unsqueeze", x=x)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(compute_dtype(x.dtype))
            return _clip_tokens(wide, self.max_rms).to(x.dtype)

    def to_plain(self) -> fx.GraphModule:
        """Return a `torch.fx.GraphModule` of torch alone that does the same."""
        return traced(_PlainClip(self.max_rms), self.training)

    def extra_repr(self) -> str:
        return f"max_rms={self.max_rms:g}"

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        if not input_shape:
            refuse(self, "the input must have a batch dimension", "Use x.unsqueeze(0)")
        count = clip_roundings(input_shape[-1])
        return Declared(1.0, "projection onto a ball", rounding=Rounding(count, 1.0))
