"""The steepest secant of a function that a search finds."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["lengths_in", "steepest", "steepest_mixed", "steepest_secant"]

_TINY = 1e-30
_LENGTHS = 4  # of moves


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _lengths(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1) if x.ndim > 1 else x[:, None], dim=1)


def _unit(x: Tensor) -> Tensor:
    return x / _rows(_lengths(x).clamp_min(_TINY), x)


def _noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else torch.device("cpu")
    return torch.randn(x.shape, generator=generator, device=device).to(x.device, x.dtype)


def steepest_secant(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    steps: int,
    step_size: float,
    generator: torch.Generator | None,
    goal: float = math.inf,
) -> tuple[float, Tensor, Tensor] | None:
    """The largest ratio |f(b) - f(a)| / |b - a| that was found, less rounding, and a and b - a.

    The direction b - a turns as in a power iteration on the Jacobian, and the pair moves uphill,
    with some noise, where that helps: by `step_size` times the root mean square length of the
    points for the first one, by half, a quarter and an eighth of it for the next ones, in turn.
    It ends early where a ratio reaches `goal`; None for a function that is constant.

    Shape:
        x: (N, *), the points to start from; a and b - a are single samples (1, *)
    """
    eps = torch.finfo(x.dtype).eps
    point, direction = x.detach(), _unit(_noise(x, generator))
    scale = max(1.0, float(_lengths(point).square().mean().sqrt()))
    length = scale * eps**0.33
    reached = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    best = (point, direction)
    uphill = torch.zeros_like(x)
    far = step_size * scale * 0.5 ** (torch.arange(len(x), device=x.device) % _LENGTHS)
    for step in range(steps):
        moved = step % 3 == 2  # two turns of the direction, then a move that is kept if it helps
        trial = point
        if moved:
            move = _unit(uphill + _unit(_noise(x, generator)))
            trial = point + _rows(far.to(x.dtype), x) * move
        a = trial.clone().requires_grad_()
        b = (trial + length * direction).detach().requires_grad_()
        with torch.enable_grad():
            fa, fb = function(a), function(b)
            change = _lengths(fb - fa).sum()
            if not change.requires_grad:  # the output does not depend on the input
                return None
            to_a, to_b = torch.autograd.grad(
                change, (a, b), allow_unused=True, materialize_grads=True
            )
        a, b, fa, fb = (t.detach().double() for t in (a, b, fa, fb))
        distance = _lengths(b - a).clamp_min(_TINY)
        slope = _lengths(fb - fa) / distance
        inner = slope * (_lengths(a) + _lengths(b))  # what lengths inside the model may be
        rounding = 8 * eps * (_lengths(fa) + _lengths(fb) + inner)
        ratio = slope - rounding / distance
        better = _rows(ratio > reached, x)
        best = tuple(
            torch.where(better, n, o) for n, o in zip((trial, direction), best, strict=True)
        )
        keep = _rows(
            (ratio >= 0.999 * reached) | torch.full_like(ratio, not moved, dtype=torch.bool), x
        )
        point = torch.where(keep, trial, point)
        direction = torch.where(keep, _unit(to_b - to_a), direction)
        uphill = torch.where(keep, _unit(to_a + to_b), uphill)
        reached = torch.maximum(reached, ratio.nan_to_num(0.0, 0.0, 0.0))
        if float(reached.max()) >= goal:
            break
    i = int(reached.argmax())
    return max(0.0, float(reached[i])), best[0][i : i + 1], best[1][i : i + 1] * length


# --- other norms ---------------------------------------------------------------------------------


def lengths_in(x: Tensor, norm: str) -> Tensor:
    """The norm of each row."""
    order = {"l1": 1.0, "l2": 2.0, "linf": torch.inf}[norm]
    return torch.linalg.vector_norm(x.flatten(1) if x.ndim > 1 else x[:, None], order, dim=1)


def steepest(gradient: Tensor, norm: str) -> Tensor:
    """The vectors of norm 1 along which a function of this gradient rises fastest, row by row."""
    if norm == "l2":
        return _unit(gradient)
    if norm == "linf":
        return gradient.sign()
    flat = gradient.flatten(1)
    place = flat.abs().argmax(1, keepdim=True)
    rises = flat.gather(1, place).sign()
    return torch.zeros_like(flat).scatter_(1, place, rises).reshape(gradient.shape)


def steepest_mixed(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    norm: str,
    to: str,
    steps: int,
    generator: torch.Generator | None,
    goal: float,
) -> tuple[Tensor, Tensor] | None:
    """Points a and differences b - a of the steepest secant between two norms that was found.

    Directions turn as in the power method of Boyd; every third step moves the points, too.
    """
    point, direction = x.detach(), steepest(_noise(x, generator), norm)
    scale = max(1.0, float(_lengths(point).square().mean().sqrt()))
    length = scale * torch.finfo(x.dtype).eps ** 0.33
    reached = torch.full((len(x),), -1.0, dtype=torch.float64)
    best = (point, direction)
    for step in range(steps):
        moved = step % 3 == 2
        trial = point + 0.3 * scale * _unit(_noise(x, generator)) if moved else point
        b = (trial + length * direction).detach().requires_grad_()
        with torch.no_grad():
            fa = function(trial)
        with torch.enable_grad():
            rise = lengths_in(function(b) - fa, to)
            if not rise.requires_grad:
                return None
            (gradient,) = torch.autograd.grad(
                rise.sum(), b, allow_unused=True, materialize_grads=True
            )
        run = lengths_in(b.detach() - trial, norm).clamp_min(_TINY)
        ratio = (rise.detach() / run).nan_to_num(0.0, 0.0, 0.0)
        better = ratio > reached
        best = tuple(
            torch.where(_rows(better, x), n, o)
            for n, o in zip((trial, direction), best, strict=True)
        )
        keep = _rows(better | torch.full_like(better, not moved), x)
        point = torch.where(keep, trial, point)
        turned = steepest(gradient, norm)
        lost = (lengths_in(turned, norm) == 0) | torch.full_like(better, step % 7 == 6)
        turned = torch.where(_rows(lost, x), steepest(_noise(x, generator), norm), turned)
        direction = torch.where(keep, turned, direction)
        reached = torch.maximum(reached, ratio)
        if float(reached.max()) >= goal * (1.0 - 1e-6):
            break
    i = int(reached.argmax())
    return best[0][i : i + 1], best[1][i : i + 1] * length
