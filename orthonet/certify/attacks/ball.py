"""What every attack works on: samples, the balls around them, and the box of valid inputs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify._radius import NORMS
from orthonet.certify.attacks.secants import _TINY, _noise, _rows, _unit, lengths_in

__all__ = ["Ball", "ball_of", "check_attack", "check_bounds", "check_model"]

_SPARSE = 20  # of so many entries one is moved by a step in l1


def check_model(owner: str, model: Any) -> None:
    """Refuse what is no module, and one in train mode."""
    _checks.module(owner, model=model)
    _checks.require(
        not model.training,
        owner,
        "the model must be in eval mode",
        "Call model.eval() first",
        training=model.training,
    )


def check_attack(owner: str, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """The model must be in eval mode, and the samples must have one label each."""
    check_model(owner, model)
    _checks.floating(owner, x=x)
    _checks.tensor(owner, y=y)
    _checks.require(
        len(x) == len(y.reshape(-1)),
        owner,
        "there must be one label for each sample",
        "Pass class indices",
        x=x,
        y=y,
    )
    if y.is_floating_point() and len(x):
        with torch.no_grad():
            logits = model(x[:1])
        _checks.require(
            logits.ndim == 1 or logits.shape[1] == 1,
            owner,
            "labels must be integers",
            "Pass class indices, e.g. labels.long()",
            y=y,
        )


def check_bounds(owner: str, bounds: Any) -> None:
    """The box of valid inputs must be a pair, or None."""
    good = bounds is None or (
        isinstance(bounds, (tuple, list))
        and len(bounds) == 2
        and all(isinstance(end, (int, float)) for end in bounds)
        and bounds[0] < bounds[1]
    )
    _checks.require(
        good,
        owner,
        "bounds must be a pair (low, high), or None",
        "Pass e.g. bounds=(0.0, 1.0) for images in [0, 1]",
        bounds=bounds,
    )


class Ball(NamedTuple):
    """The samples, their labels, the balls around them, and the box of valid inputs."""

    x: Tensor
    y: Tensor
    radius: Tensor  # in float64
    low: float
    high: float
    norm: str = "l2"

    @property
    def rows(self) -> Tensor:
        """The radii, as they multiply perturbations."""
        return _rows(self.radius.to(self.x.dtype), self.x)

    def point(self, delta: Tensor) -> Tensor:
        """The valid input at a perturbation."""
        return (self.x + delta).clamp(self.low, self.high)

    def project(self, delta: Tensor) -> Tensor:
        """The perturbation, cut off at the box and brought into the ball."""
        delta = self.point(delta) - self.x
        if self.norm == "linf":
            return torch.maximum(torch.minimum(delta, self.rows), -self.rows)
        if self.norm == "l1":
            return _onto_l1(delta, self.radius.to(self.x.dtype))
        shrink = self.rows / _rows(lengths_in(delta, "l2").clamp_min(_TINY), self.x)
        return delta * shrink.clamp(max=1.0)

    def ascent(self, gradient: Tensor, delta: Tensor) -> Tensor:
        """A direction of norm 1 along which the objective rises fast, and the box leaves room.

        In l1 it moves the few entries of the largest derivatives, as much each.
        """
        if self.norm == "l2":
            return _unit(gradient)
        if self.norm == "linf":
            return gradient.sign()
        point = self.point(delta)
        stuck = ((gradient > 0) & (point >= self.high)) | ((gradient < 0) & (point <= self.low))
        flat = gradient.masked_fill(stuck, 0.0).flatten(1)
        count = max(1, flat.shape[1] // _SPARSE)
        place = flat.abs().topk(count, 1).indices
        moved = flat.gather(1, place).sign() / count
        return torch.zeros_like(flat).scatter_(1, place, moved).reshape(gradient.shape)

    def start(self, generator: torch.Generator | None) -> Tensor:
        """A random perturbation on the sphere, as far as the box allows."""
        noise = _noise(self.x, generator)
        if self.norm == "linf":
            return self.project(noise.clamp(-1.0, 1.0) * self.rows)
        length = _rows(lengths_in(noise, self.norm).clamp_min(_TINY), self.x)
        return self.project(noise / length * self.rows)

    def inside(self, delta: Tensor) -> Tensor:
        """The point, shortened until the rounded one lies within the radius in float64."""
        x = self.x
        result, done = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for factor in (1.0, 1.0 - 1e-7, 1.0 - 1e-6, 1.0 - 1e-5, 1.0 - 1e-4, 0.99, 0.9, 0.5):
            point = self.point(factor * delta)
            good = (lengths_in(point.double() - x.double(), self.norm) <= self.radius) & ~done
            result = torch.where(_rows(good, x), point, result)
            done |= good
        return result


def _onto_l1(delta: Tensor, radius: Tensor) -> Tensor:
    """The nearest point of the l1 ball: every entry is shrunk by one amount, down to zero."""
    flat = delta.flatten(1) if delta.ndim > 1 else delta[:, None]
    sizes = flat.abs().sort(1, descending=True).values
    excess = sizes.cumsum(1) - radius[:, None]
    counts = torch.arange(1, flat.shape[1] + 1, device=flat.device)
    kept = (sizes * counts > excess).sum(1, keepdim=True).clamp_min(1)
    amount = (excess.gather(1, kept - 1) / kept).clamp_min(0.0)
    return (flat.sign() * (flat.abs() - amount).clamp_min(0.0)).reshape(delta.shape)


def ball_of(
    owner: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    radius: float | Tensor,
    bounds: tuple[float, float] | None,
    steps: int,
    restarts: int,
    norm: str = "l2",
) -> Ball:
    """What an attack works on, checked."""
    check_attack(owner, model, x, y)
    _checks.positive_int(owner, steps=steps, restarts=restarts)
    _checks.one_of(owner, NORMS, norm=norm)
    _checks.require(
        isinstance(radius, (int, float, Tensor)),
        owner,
        "radius must be a number, or a tensor with one for each sample",
        "Pass e.g. radius=0.1",
        radius=radius,
    )
    check_bounds(owner, bounds)
    x, y = x.detach(), y.detach().reshape(-1).to(x.device)
    size = torch.as_tensor(radius, dtype=torch.float64, device=x.device).expand(len(x))
    _checks.require(
        bool((size.isfinite() & (size >= 0)).all()),
        owner,
        "every radius must be finite and non-negative",
        "Leave out the samples that need no attack",
        radius=radius,
    )
    low, high = bounds if bounds is not None else (-torch.inf, torch.inf)
    _checks.require(
        bool(((x >= low) & (x <= high)).all()),
        owner,
        "x must lie inside the box of valid inputs",
        "Pass raw pixels and normalize inside the model, or use bounds=None",
        bounds=bounds,
    )
    return Ball(x, y, size, low, high, norm)
