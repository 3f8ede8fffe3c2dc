r"""Scalar functions that singular values and eigenvalues go through, with their inverses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from orthonet import _checks

__all__ = [
    "ScalarMap",
    "Scalar",
    "absolute",
    "at_least",
    "bounded_map",
    "fold",
    "log_derivative",
    "positive_map",
]

Scalar = str | Callable[[Tensor], Tensor] | tuple[Callable[[Tensor], Tensor], ...]


def absolute(s: Tensor) -> Tensor:
    """Return |s|, with the derivative +1 at 0: a value at the boundary is not stuck there."""
    return torch.where(s < 0, -s, s)


def at_least(floor: float, y: Tensor) -> Tensor:
    """Return `y` >= 0, raised by `floor` where it is less; every slope is kept."""
    return torch.where(y < floor, y + floor, y)


def _positive(y: Tensor) -> Tensor:
    return at_least(torch.finfo(y.dtype).tiny, y)


def _softplus(s: Tensor) -> Tensor:
    return _positive(F.softplus(s, threshold=40.0))  # e^-40 rounds to nothing, e^-20 does not


def _softplus_inverse(y: Tensor) -> Tensor:
    y = y.clamp_min(torch.finfo(y.dtype).tiny)
    return y + (-torch.expm1(-y)).log()


def _exp(s: Tensor) -> Tensor:
    return _positive(s.exp())


def _exp_inverse(y: Tensor) -> Tensor:
    return y.clamp_min(torch.finfo(y.dtype).tiny).log()


def _absolute(s: Tensor) -> Tensor:
    return _positive(absolute(s))


def _absolute_inverse(y: Tensor) -> Tensor:
    return y.clamp_min(0.0)


def fold(s: Tensor) -> Tensor:
    """Return the triangle wave of slope 1 through 0 between -1 and 1: slope +-1 everywhere."""
    t = torch.remainder(s + 1.0, 4.0)
    return torch.where(t <= 2.0, t - 1.0, 3.0 - t)


@dataclass(frozen=True)
class _Within:
    """A function of the open interval (-1, 1), kept off its ends."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, y: Tensor) -> Tensor:
        inside = 1.0 - torch.finfo(y.dtype).eps
        return self.function(y.clamp(-inside, inside))


def _half_tanh(s: Tensor) -> Tensor:
    return torch.tanh(0.5 * s)


def _half_tanh_inverse(y: Tensor) -> Tensor:
    return 2.0 * torch.atanh(y)


def _clamp(y: Tensor) -> Tensor:
    return y.clamp(-1.0, 1.0)


_POSITIVE = {
    "softplus": (_softplus, _softplus_inverse),
    "exp": (_exp, _exp_inverse),
    "absolute": (_absolute, _absolute_inverse),
}
_BOUNDED = {
    "fold": (fold, _clamp),
    "sin": (torch.sin, _Within(torch.asin)),
    "tanh": (torch.tanh, _Within(torch.atanh)),
    "scaled_sigmoid": (_half_tanh, _Within(_half_tanh_inverse)),
}


class ScalarMap:
    """A function of one variable and its inverse, by formula or by bisection.

    Args:
        owner: Whose errors these are.
        f: A name, a function, or a pair of a function and its inverse.
        named: The functions that have a name.
    """

    def __init__(self, owner: object, f: Scalar, named: dict[str, tuple]) -> None:
        self.owner = type(owner).__name__
        self.name = f if isinstance(f, str) else getattr(f, "__name__", "own")
        self._inverse: Callable[[Tensor], Tensor] | None = None
        if isinstance(f, str):
            _checks.one_of(owner, tuple(named), f=f)
            self._f, self._inverse = named[f]
        elif callable(f):
            self._f = f
        else:
            good = isinstance(f, tuple) and len(f) == 2 and all(callable(part) for part in f)
            _checks.require(
                good,
                owner,
                "f must be a name, a function, or a pair (f, inverse)",
                f"The names are {', '.join(named)}",
                f=f,
            )
            self._f, self._inverse = f
            self.name = getattr(self._f, "__name__", "own")

    def __call__(self, s: Tensor) -> Tensor:
        """f(s)."""
        return self._f(s)

    def inverse(self, y: Tensor) -> Tensor:
        """Return a solution s of f(s) = y.

        Raises:
            ValueError: No inverse was given and f is not increasing onto the values.
        """
        if self._inverse is not None:
            return self._inverse(y)
        low, high = torch.full_like(y, -1e4), torch.full_like(y, 1e4)
        for _ in range(200):
            middle = 0.5 * (low + high)
            below = self._f(middle) < y
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        s = 0.5 * (low + high)
        error = (self._f(s) - y).abs().amax() if y.numel() else y.new_zeros(())
        allowed = torch.finfo(y.dtype).eps ** 0.5 * float(y.abs().amax() if y.numel() else 0.0)
        _checks.require(
            bool(error <= allowed + torch.finfo(y.dtype).eps),
            self.owner,
            "f has no inverse that could be found by bisection",
            "Pass a pair (f, inverse)",
            f=self._f,
        )
        return s


def positive_map(owner: object, f: Scalar) -> ScalarMap:
    """Return a map from the reals to the positive reals."""
    return ScalarMap(owner, f, _POSITIVE)


def bounded_map(owner: object, f: Scalar) -> ScalarMap:
    """Return a map from the reals onto [-1, 1]."""
    return ScalarMap(owner, f, _BOUNDED)


def log_derivative(f: Callable[[Tensor], Tensor], s: Tensor) -> Tensor:
    """Return log |f'(s)|, entry by entry."""
    with torch.enable_grad():
        x = s if s.requires_grad else s.detach().requires_grad_()
        (slope,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    return (slope if s.requires_grad else slope.detach()).abs().log()
