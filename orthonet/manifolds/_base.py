r"""What every space is: a stateless, frozen description of a set of tensors and its geometry.

A space knows neither shape nor dtype: both come with the tensors. It holds the mathematics that
constraints (parametrizations) and Riemannian optimizers share.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.errors import NotOnManifoldError
from orthonet.linalg.matrix import compute_dtype
from orthonet.manifolds._parametrization import Membership, Parametrization

__all__ = ["Manifold", "Membership", "check_radius", "root"]


def root(square: Tensor) -> Tensor:
    """Return the square root for lengths: at 0 and below, it and its derivative are 0."""
    zero = square <= 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def check_radius(owner: object, radius: Any) -> None:
    """Refuse a radius that is not a positive number."""
    good = isinstance(radius, (int, float)) and radius > 0.0
    _checks.require(good, owner, "radius must be positive", "Use 1.0", radius=radius)


# The tensors that each method of the geometry begins with.
_TENSORS = {
    "project": 1,
    **dict.fromkeys(("tangent", "gradient", "norm", "exp", "log", "distance", "retract"), 2),
    "transport": 3,
}


def _checked(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Put a method behind the check of its tensors."""

    @functools.wraps(method)
    def call(self: Manifold, *arguments: Any, **options: Any) -> Any:
        if not torch.compiler.is_compiling():
            self._check_tensors(name, arguments[: _TENSORS[name]])
        return method(self, *arguments, **options)

    return call


def _checked_sample(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Put `sample` behind the check of its dtype and device."""

    @functools.wraps(method)
    def call(
        self: Manifold,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Tensor:
        complex_ = isinstance(dtype, torch.dtype) and dtype.is_complex
        _checks.factory(self, device, None if complex_ and self.has_complex else dtype)
        return method(self, shape, dtype=dtype, device=device, **options)

    return call


@dataclass(frozen=True)
class Manifold(abc.ABC):
    """Base class of the spaces.

    Every method works on the last `event_ndim` dimensions and treats the others as a batch.
    Metric, exponential, logarithm and distance are those of the embedding in the space of all
    tensors, unless a class says otherwise. `exp`, `log` and `distance` exist where a
    closed form does.

    Examples:
        >>> from orthonet.manifolds import SO
        >>> x, y = SO().sample((2, 3, 3), dtype=torch.float64)
        >>> SO().exp(x, SO().log(x, y)).allclose(y)
        True
    """

    event_ndim: ClassVar[int] = 2
    has_complex: ClassVar[bool] = False  # whether a complex tensor can be a point
    square: ClassVar[bool] = False  # whether the matrices have as many rows as columns

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        for name in _TENSORS.keys() & vars(cls).keys():
            setattr(cls, name, _checked(vars(cls)[name], name))
        if "sample" in vars(cls):
            cls.sample = _checked_sample(vars(cls)["sample"])

    # --- what a space must say -----------------------------------------------------------------

    @abc.abstractmethod
    def dimension(self, shape: Sequence[int]) -> int:
        """Return the dimension of the space of one matrix (vector) in a tensor of this shape."""

    @abc.abstractmethod
    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Return pairs of a property in words and how far each matrix violates it (NaN: fully)."""

    @abc.abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """Return the nearest point, in the Frobenius norm unless the class says otherwise."""

    @abc.abstractmethod
    def parametrization(self, shape: Sequence[int], **options: Any) -> Parametrization:
        """Return a module that maps free coordinates onto the space, for tensors of a shape.

        Args:
            shape: Of the values.
            **options: Of the space; `triv` and `f` as of
                [`constrain`][orthonet.constraints.constrain].
        """

    def _shape_problem(self, shape: Sequence[int]) -> str | None:
        """Return what is wrong with a shape, or None."""
        if not self.square or shape[-1] == shape[-2]:
            return None
        return "the matrix must be square, (*batch, n, n)"

    # --- random points -------------------------------------------------------------------------

    def sample(
        self,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """Return a random point in every matrix of a tensor of this shape.

        The distribution is that of a projected tensor of standard normal entries, unless the class
        names another one.

        Args:
            shape: Of the tensor.
            dtype: Dtype, by default that of torch.
            device: Device.
            generator: Of randomness.
            **options: Of the space: `distribution`, a name, of frames and groups; `init_`, of
                spaces of singular values or eigenvalues, which fills a tensor in place instead of
                normal entries, such as `torch.nn.init.xavier_uniform_`.
        """
        sizes = self.check_shape(shape)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        made = {"dtype": compute_dtype(dtype), "device": device, "generator": generator}
        return self._draw(sizes, made, **options).to(dtype)

    def _draw(self, shape: tuple[int, ...], made: dict[str, Any]) -> Tensor:
        """Return random points for `sample`, from random numbers such as `randn(shape, **made)`."""
        return self.project(torch.randn(shape, **made))

    def _check_tensors(self, method: str, tensors: Sequence[Any]) -> None:
        """Refuse what is no tensor, and tensors whose matrices (vectors) have no or two shapes."""
        for x in tensors:
            good = isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
            _checks.require(
                good,
                self,
                f"{method} must be given floating-point tensors",
                "Convert it, e.g. torch.as_tensor(x, dtype=torch.float32)",
                x=x,
            )
        shapes = [tuple(x.shape) for x in tensors]
        problem = None
        if not shapes:  # they were passed by name
            return
        if min(map(len, shapes)) < self.event_ndim:
            problem = f"the tensors of {method} must be {self._event_in_words()}"
        elif len({shape[len(shape) - self.event_ndim :] for shape in shapes}) > 1:
            problem = f"the tensors of {method} must have the same last sizes"
        problem = problem or self._shape_problem(shapes[0])
        if problem is not None:
            _checks.fail(self, problem, "Reshape it, or choose another space", shape=shapes)

    def _event_in_words(self) -> str:
        return "a matrix (*batch, n, k)" if self.event_ndim == 2 else "a vector (*batch, n)"

    # --- membership ----------------------------------------------------------------------------

    def check_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape as a tuple.

        Raises:
            ValueError: No tensor of this shape lies on the space.
        """
        good = isinstance(shape, (tuple, list)) and all(
            isinstance(n, (int, torch.SymInt)) and n >= 0 for n in shape
        )
        if not good and not torch.compiler.is_compiling():
            _checks.fail(self, "shape must be a tuple of sizes", "Pass e.g. (4, 4)", shape=shape)
        sizes = tuple(int(size) for size in shape)
        enough = len(sizes) >= self.event_ndim
        words = f"the tensor must be {self._event_in_words()}"
        problem = self._shape_problem(sizes) if enough else words
        if problem is not None:
            _checks.fail(self, problem, "Reshape it, or choose another space", shape=sizes)
        return sizes

    def tolerance(self, x: Tensor) -> float:
        r"""Return what `contains` allows: \(32\,\mathrm{eps}\,\sqrt{\max(n, k)}\)."""
        size = max(x.shape[-self.event_ndim :], default=1)
        return 32.0 * torch.finfo(x.dtype).eps * math.sqrt(max(size, 1))

    def contains(self, x: Tensor, atol: float | None = None) -> Membership:
        """Return whether all matrices of `x` lie on the space, to `atol` (default: `tolerance(x)`).

        The result is true or false in a condition and tells the reason and the distance. Tensors
        on the meta device are judged by shape and dtype.
        """
        _checks.tensor(self, x=x)
        if not (x.is_floating_point() or x.is_complex()):
            return Membership(math.inf, atol or 0.0, f"its dtype must be floating, not {x.dtype}")
        allowed = self.tolerance(x) if atol is None else float(atol)
        sizes = tuple(x.shape)
        if len(sizes) < self.event_ndim:
            return Membership(math.inf, allowed, f"it has only {len(sizes)} dimensions")
        problem = self._shape_problem(sizes)
        if problem is not None:
            return Membership(math.inf, allowed, problem)
        if x.is_meta or not x.numel():
            return Membership(0.0, allowed, "it has no values")
        if not bool(torch.isfinite(x).all()):
            return Membership(math.inf, allowed, "its entries must be finite")
        high = x.detach().to(torch.promote_types(x.dtype, torch.float64))
        worst = Membership(0.0, allowed, "it has no condition to violate")
        for reason, violation in self._violations(high):
            largest = float(violation.nan_to_num(nan=math.inf).amax()) if violation.numel() else 0.0
            if largest >= worst.distance:
                worst = Membership(largest, allowed, reason)
        return worst

    def require(self, x: Tensor, owner: object = None, atol: float | None = None) -> None:
        """Raise unless `contains(x, atol)`.

        Raises:
            NotOnManifoldError: The message has the reason and the distance, never the tensor.
        """
        found = self.contains(x, atol)
        _checks.require(
            bool(found),
            owner or self,
            f"the tensor must lie on {self!r}: {found.reason} (to {found.allowed:.1e})",
            "Assign the nearest point, its .space.project(x), or pass project=True",
            NotOnManifoldError,
            distance=found.distance,
            shape=tuple(x.shape),
        )

    # --- geometry ------------------------------------------------------------------------------

    @property
    def _event(self) -> tuple[int, ...]:
        return tuple(range(-self.event_ndim, 0))

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        """Project `v` onto the tangent space at `x`; for an open set, return `v`."""
        return v

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return the inner product of tangent vectors `u`, `v` at `x`, one number a matrix."""
        product = (u.conj() * v).real if u.is_complex() else u * v
        return product.sum(self._event) if self.event_ndim else product

    def norm(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the length of the tangent vector `v` at `x`."""
        return root(self.inner(x, v, v))

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return the Riemannian gradient at `x` from the gradient with respect to all entries."""
        return self.tangent(x, grad)

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Return a point near `x` in direction `v`, the exponential to at least first order."""
        return self.project(x + v)

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Carry the tangent vector `v` from `x` to `y`: by projection, unless the class differs."""
        return self.tangent(y, v)


Manifold.sample = _checked_sample(Manifold.sample)
for _name in _TENSORS.keys() & vars(Manifold).keys() - Manifold.__abstractmethods__:
    setattr(Manifold, _name, _checked(vars(Manifold)[_name], _name))
