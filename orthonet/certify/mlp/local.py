"""Bounds of multilayer perceptrons in a ball around one input."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.certify.mlp.chain import Affine, Chain, Layer, frobenius_up, read_layers, rotated
from orthonet.certify.mlp.lipsdp import closed_form
from orthonet.certify.mlp.multipliers import prove
from orthonet.certify.mlp.perceptron import EFFORTS, MLPBound, chain_bound
from orthonet.certify.mlp.slopes import Activation
from orthonet.linalg.bounds.rounding import (
    UNDERFLOW,
    UNIT_ROUNDOFF,
    add_up,
    gamma,
    mul_up,
    sqrt_up,
    up,
)

__all__ = ["local_bound", "perceptron_radii"]

_NORMS = ("l2", "linf")
_OUTWARD = 1.0 + 2.0**-45  # covers the roundings of a few entrywise operations and a short sum


def local_bound(
    layers: Layer | Iterable[Layer],
    center: Tensor,
    radius: float,
    *,
    norm: str = "l2",
    effort: str = "tight",
) -> MLPBound:
    r"""Prove a bound of the l2 Lipschitz constant of a multilayer perceptron in a ball.

    In the ball a pre-activation stays in an interval, and only the slopes of the activation on this
    interval count. A ReLU that is always on is linear, and one that is always off is zero. The
    intervals come from a zonotope that is propagated forward, and from the Lipschitz bounds of the
    layers before. [`mlp_bound`][orthonet.certify.mlp_bound] then uses these slopes.

    Args:
        layers: See [`mlp_bound`][orthonet.certify.mlp_bound].
        center: The input at the center of the ball, (in,) or (1, *) with as many entries.
        radius: The radius of the ball, in units of the input.
        norm: The shape of the ball, `"l2"` or `"linf"`; the bound itself is from l2 to l2.
        effort: See [`mlp_bound`][orthonet.certify.mlp_bound].

    Guarantee:
        $\|f(a) - f(b)\|_2 \le K \|a - b\|_2$ for all a, b in the closed ball, in exact arithmetic.

    Raises:
        UncertifiableError: See [`mlp_bound`][orthonet.certify.mlp_bound].
        ValueError: `center` does not fit or is not finite, `radius` is negative or not finite.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
        >>> local = local_bound(model, torch.zeros(8), 0.01)
        >>> local.constant.value < local_bound(model, torch.zeros(8), 1e3).constant.value
        True
    """
    start = time.perf_counter()
    _checks.one_of("local_bound", EFFORTS, effort=effort)
    affine, activations = read_layers(layers, "local_bound")
    center = _center("local_bound", affine, center)
    with torch.no_grad():
        slopes = _Ball(affine, activations, center, _size("local_bound", norm, radius), norm).slopes
    chain = Chain.build(affine, activations, slopes)
    found = chain_bound(chain, effort, start)
    units = sum(len(low) for low, _ in slopes)
    fixed = sum(int((low == high).sum()) for low, high in slopes)
    method = f"{found.method}, {fixed} of {units} units linear in the ball"
    return replace(found, method=method)


def perceptron_radii(
    affine: list[Affine], activations: list[Activation], x: Tensor, steps: int, effort: str
) -> tuple[Tensor, Tensor]:
    """Return the predicted classes of samples, and their radii in exact arithmetic."""
    whole = chain_bound(Chain.build(affine, activations), effort)
    found = [_radius(affine, activations, s, whole, steps, effort) for s in x]
    classes, radii = zip(*found, strict=True) if found else ((), ())
    return torch.tensor(classes, dtype=torch.long), torch.tensor(radii, dtype=torch.float64)


def _radius(
    affine: list[Affine],
    activations: list[Activation],
    sample: Tensor,
    whole: MLPBound,
    steps: int,
    effort: str,
) -> tuple[int, float]:
    center = _center("local_radius", affine, sample)
    value, error = _Ball(affine, activations, center, 0.0, "l2").output
    top = int(value.argmax())
    margin = (value[top] - value) - (error[top] + error) * _OUTWARD
    margin = margin - 4 * UNIT_ROUNDOFF * margin.abs()
    margin[top] = torch.inf

    def within(bound: MLPBound) -> float:
        constants = cast(Tensor, bound.pairs)[top]  # of two outputs or more there are some
        quotient = torch.where(margin > 0, margin / constants, 0.0)
        return max(0.0, float(quotient.min()) * (1.0 - 4 * UNIT_ROUNDOFF))

    best = within(whole)
    low, high = best, math.inf  # the quotient is at least `low` there, less than `high` there
    if best == 0.0 or math.isinf(best):
        return top, best
    for _ in range(steps):
        size = 2.0 * low if math.isinf(high) else (low + high) / 2
        slopes = _Ball(affine, activations, center, size, "l2").slopes
        found = within(chain_bound(Chain.build(affine, activations, slopes), effort))
        best = max(best, min(size, found))
        if found >= size:
            low = size
        else:
            low, high = max(low, found), size
    return top, best


def _size(owner: str, norm: str, radius: float) -> float:
    _checks.one_of(owner, _NORMS, norm=norm)
    good = isinstance(radius, (int, float)) and 0.0 <= radius < math.inf
    _checks.require(
        good,
        owner,
        "radius must be finite and non-negative",
        "Use mlp_bound for the whole space",
        radius=radius,
    )
    return float(radius)


def _center(owner: str, affine: Sequence[Affine], center: Tensor) -> Tensor:
    width = affine[0].weight.shape[1]
    _checks.require(
        center.numel() == width and center.is_floating_point() and bool(center.isfinite().all()),
        owner,
        f"the center must be one finite input of {width} entries",
        "Pass one sample",
        center=center,
    )
    return center.detach().to("cpu", torch.float64).reshape(-1)


class _Ball:
    r"""Enclosures of all pre-activations in the ball.

    Deviations from the center are $\delta u = G\,\delta x + E\,\eta$, $\|\eta\|_\infty \le 1$: a
    slope in [a, b] is its mean m and a rest, and the rest becomes an entry of $\eta$. Beside G and
    E the same products of moduli are kept: $\gamma$ times them bounds all rounding.
    """

    def __init__(
        self,
        affine: Sequence[Affine],
        activations: Sequence[Activation],
        center: Tensor,
        radius: float,
        norm: str,
    ) -> None:
        self.radius, self.norm = radius, norm
        self.slopes: list[tuple[Tensor, Tensor]] = []
        value, error = center, torch.zeros_like(center)
        inputs = len(center)
        operations = 0
        linear = torch.eye(inputs, dtype=torch.float64)
        noise = torch.zeros(inputs, 0, dtype=torch.float64)
        linear_size, noise_size, extent = linear, noise, torch.full_like(center, radius)
        for i, layer in enumerate(affine):
            value, error = _moved(layer, value, error)
            if i == len(activations):
                break
            act = activations[i]
            weight, weight_error = _in_bases(layer, activations[i - 1] if i else None, act)
            operations += 2 * weight.shape[1] + 8
            linear, noise = weight @ linear, weight @ noise
            linear_size, noise_size = weight.abs() @ linear_size, weight.abs() @ noise_size
            if weight_error:
                # What the matrix is off moves every unit by at most error times the l2 deviation.
                span = sqrt_up(inputs) * radius if not i and norm == "linf" else radius
                span = mul_up(1.0 + 2.0**-40, span) if not i else frobenius_up(extent)
                off = mul_up(weight_error, span) * torch.eye(len(weight), dtype=torch.float64)
                noise, noise_size = torch.cat([noise, off], 1), torch.cat([noise_size, off], 1)
            extent = self._extent(linear, noise)
            extent = extent + mul_up(2.0, gamma(operations)) * self._extent(linear_size, noise_size)
            extent = (extent * _OUTWARD).nextafter(torch.tensor(torch.inf).double())
            if i:
                extent = torch.minimum(extent, self._by_norms(affine, activations, i))
            center_here, center_error = _turned(value, error, act)
            reach = (extent + center_error) * _OUTWARD + 4 * UNIT_ROUNDOFF * center_here.abs()
            low, high = act.lower, act.upper
            if act.narrow is not None:
                low, high = act.narrow(center_here - reach, center_here + reach)
            self.slopes.append((low, high))
            mean, half = (low + high) / 2, (high - low) / 2 * _OUTWARD
            half = torch.where(low == high, 0.0, half + 2 * UNIT_ROUNDOFF * mean.abs())
            if act.groups is not None:
                extent = _grouped(extent, act.groups)
            rest = torch.diag(half * extent * _OUTWARD)[:, half > 0]
            linear, linear_size = mean[:, None] * linear, mean.abs()[:, None] * linear_size
            noise = torch.cat([mean[:, None] * noise, rest], 1)
            noise_size = torch.cat([mean.abs()[:, None] * noise_size, rest], 1)
            extent = torch.maximum(low.abs(), high.abs()) * extent * _OUTWARD
            value, error = _activated(act, value, error)
        self.output = value, error

    def _extent(self, linear: Tensor, noise: Tensor) -> Tensor:
        """The largest modulus of each entry of the deviation."""
        order = 2 if self.norm == "l2" else 1
        length = torch.linalg.vector_norm(linear, order, dim=1)
        slack = up(1.0 + 2.0 * gamma(linear.shape[1] + noise.shape[1] + 8))
        return (length * self.radius + noise.abs().sum(1)) * slack + UNDERFLOW

    def _by_norms(
        self, affine: Sequence[Affine], activations: Sequence[Activation], i: int
    ) -> Tensor:
        """The same, by the bound of the constant of each unit with the slopes so far."""
        whole = torch.full((affine[i].weight.shape[0],), torch.inf, dtype=torch.float64)
        # In the basis of activation i, whose slopes are not known yet: none of its units is dead.
        one = torch.ones_like(whole)
        chain = Chain.build(affine[: i + 1], activations[: i + 1], [*self.slopes, (one, one)])
        chain = chain.open_ended
        if chain.constant:
            return torch.zeros_like(whole)
        start = closed_form(chain)
        proof = None if start is None else prove(chain, start)
        if proof is None:
            return whole
        lengths = (proof.gram.diagonal().clamp_min(0.0) + proof.error).sqrt() * _OUTWARD
        radius = self.radius * (sqrt_up(affine[0].weight.shape[1]) if self.norm == "linf" else 1.0)
        return lengths * (mul_up(chain.scale, up(radius)) * _OUTWARD) + UNDERFLOW


def _in_bases(layer: Affine, before: Activation | None, after: Activation) -> tuple[Tensor, float]:
    """The weight between the bases of two activations, and what it is off."""
    weight, error = layer.weight, layer.error
    if before is not None:
        weight, error = rotated(weight, error, before, 1)
    return rotated(weight, error, after, 0)


def _moved(layer: Affine, value: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """An enclosure of A v + c, entry by entry."""
    weight, bias = layer.weight, layer.offset()
    size = weight.abs() @ (value.abs() + error) + bias.abs()
    known = add_up(mul_up(layer.error, frobenius_up(value.abs() + error)), layer.bias_error)
    rounding = mul_up(2.0, gamma(len(value) + 4))
    reach = (weight.abs() @ error + rounding * size) * _OUTWARD + (known + UNDERFLOW) * _OUTWARD
    return weight @ value + bias, reach


def _turned(value: Tensor, error: Tensor, act: Activation) -> tuple[Tensor, Tensor]:
    """The enclosure in the basis of the activation."""
    if act.basis is None:
        return value, error
    positive = act.basis.abs()
    length = frobenius_up(value.abs() + error)
    reach = positive @ (error + 2.0 * gamma(len(value) + 4) * value.abs())
    return act.basis @ value, reach * _OUTWARD + mul_up(act.basis_error, length) + UNDERFLOW


def _activated(act: Activation, value: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """The enclosure of the activation's values: its chords have slopes of modulus <= L."""
    if act.basis is None:
        spread = act.largest * error
    else:
        spread = torch.full_like(error, mul_up(float(act.largest.max()), frobenius_up(error)))
    result = act.function(value)
    return result, (spread + act.value_error * (result.abs() + 1.0)) * _OUTWARD


def _grouped(extent: Tensor, groups: Tensor) -> Tensor:
    """For a unit of a group the l2 norm of the extents of all its group."""
    squares = torch.zeros(len(extent), dtype=torch.float64)
    squares.scatter_add_(0, groups.clamp_min(0), torch.where(groups >= 0, extent.square(), 0.0))
    norms = squares.sqrt()[groups.clamp_min(0)] * _OUTWARD
    return torch.where(groups >= 0, norms, extent)
