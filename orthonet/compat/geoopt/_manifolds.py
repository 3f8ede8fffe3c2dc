"""geoopt's manifolds and the tensors that know theirs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from orthonet import _checks, manifolds

__all__ = [
    "BirkhoffPolytope",
    "CanonicalStiefel",
    "Euclidean",
    "EuclideanStiefel",
    "EuclideanStiefelExact",
    "Manifold",
    "ManifoldParameter",
    "ManifoldTensor",
    "Sphere",
    "SphereExact",
    "Stiefel",
    "SymmetricPositiveDefinite",
    "ismanifold",
    "located",
    "sizes_of",
]


class Manifold(nn.Module):
    """A space of the library under geoopt's names.

    Args:
        space: The space.

    Attributes:
        space: The space, which does the work.
        ndim: How many trailing dimensions one point has.
    """

    name: ClassVar[str] = ""
    ndim: int

    def __init__(self, space: manifolds.Manifold) -> None:
        super().__init__()
        _checks.require(
            isinstance(space, manifolds.Manifold),
            self,
            "space must be a space of orthonet.manifolds",
            "Pass e.g. orthonet.manifolds.Sphere()",
            space=space,
        )
        self.space = space
        self.ndim = space.event_ndim

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifold) and (self.space, self.ndim) == (other.space, other.ndim)

    def __hash__(self) -> int:
        return hash((self.space, self.ndim))

    def extra_repr(self) -> str:
        """Return the space."""
        return repr(self.space)

    # --- maps ----------------------------------------------------------------------------------

    def projx(self, x: Tensor) -> Tensor:
        """Project a tensor onto the manifold."""
        return self.space.project(x)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Project a tensor onto the tangent space at `x`."""
        return self.space.tangent(x, u)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Make a Euclidean gradient Riemannian."""
        return self.space.gradient(x, u)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Follow the geodesic from `x` in direction `u`."""
        return self._geodesic("exp")(x, u)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Retract `u` at `x`."""
        return self.space.retract(x, u)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the tangent vector at `x` that leads to `y`."""
        return self._geodesic("log")(x, y)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Carry the tangent vector `v` from `x` to `y`."""
        return self.space.transport(x, y, v)

    def retr_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Retract `u`, and carry `v` along."""
        y = self.retr(x, u)
        return y, self.transp(x, y, v)

    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Follow the geodesic along `u`, and carry `v` along."""
        y = self.expmap(x, u)
        return y, self.transp(x, y, v)

    def transp_follow_retr(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Carry `v` along the retraction of `u`."""
        return self.retr_transp(x, u, v)[1]

    def transp_follow_expmap(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Carry `v` along the geodesic of `u`."""
        return self.expmap_transp(x, u, v)[1]

    # --- numbers -------------------------------------------------------------------------------

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Return the inner product of tangent vectors at `x`; of `u` with itself without `v`."""
        return self._kept(self.space.inner(x, u, u if v is None else v), keepdim)

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Return the inner product for each point, shaped to be multiplied with it."""
        return self.inner(x, u, v, keepdim=True)

    def norm(self, x: Tensor, u: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the length of the tangent vector `u` at `x`."""
        return self._kept(self.space.norm(x, u), keepdim)

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the length of the shortest geodesic."""
        return self._kept(self._geodesic("distance")(x, y), keepdim)

    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the squared distance."""
        return self.dist(x, y, keepdim=keepdim).square()

    def _kept(self, value: Tensor, keepdim: bool) -> Tensor:
        return value.reshape(*value.shape, *[1] * self.ndim) if keepdim else value

    def _geodesic(self, method: str) -> Any:
        found = getattr(self.space, method, None)
        return self._refuse(method) if found is None else found

    def _refuse(self, method: str) -> NoReturn:
        _checks.fail(
            self,
            f"{self.space!r} has no {method} in closed form",
            "Use retr and inner, or another manifold",
        )

    # --- points --------------------------------------------------------------------------------

    def random(self, *size: Any, dtype: Any = None, device: Any = None) -> ManifoldTensor:
        """Return a random point, as `space.sample`."""
        x = self.space.sample(sizes_of(size), dtype=dtype, device=device)
        return located(x, self)

    def origin(
        self, *size: Any, dtype: Any = None, device: Any = None, seed: int | None = 42
    ) -> ManifoldTensor:
        """Return the point nearest to zero; `seed` is not needed."""
        shape = self.space.check_shape(sizes_of(size))
        return located(self.projx(self._origin(shape, dtype, device)), self)

    def _origin(self, shape: tuple[int, ...], dtype: Any, device: Any) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def check_point(self, x: Tensor, *, explain: bool = False) -> Any:
        """Return whether a point can have this shape."""
        reason = None
        try:
            self.space.check_shape(x.shape)
        except ValueError as error:
            reason = str(error)
        return (reason is None, reason) if explain else reason is None

    def check_point_on_manifold(
        self, x: Tensor, *, explain: bool = False, atol: float = 1e-5, rtol: float = 1e-5
    ) -> Any:
        """Return whether `x` is on the manifold to `atol + rtol`."""
        found = self.space.contains(x, atol + rtol)
        reason = None if found else f"{found.reason}, got distance={found.distance:.3g}"
        return (bool(found), reason) if explain else bool(found)

    def check_vector_on_tangent(
        self,
        x: Tensor,
        u: Tensor,
        *,
        ok_point: bool = False,
        explain: bool = False,
        atol: float = 1e-5,
        rtol: float = 1e-5,
    ) -> Any:
        """Return whether `u` is tangent at `x`."""
        ok = ok_point or self.check_point_on_manifold(x, atol=atol, rtol=rtol)
        ok = bool(ok and torch.allclose(self.proju(x, u), u, atol=atol, rtol=rtol))
        reason = None if ok else "the vector must be tangent at a point of the manifold"
        return (ok, reason) if explain else ok

    def assert_check_point(self, x: Tensor) -> None:
        """Raise unless a point can have this shape."""
        self.space.check_shape(x.shape)

    def assert_check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> None:
        """Raise unless `x` is on the manifold."""
        self.space.require(x, self, atol + rtol)

    def assert_check_vector_on_tangent(self, x: Tensor, u: Tensor, **options: Any) -> None:
        """Raise unless `u` is tangent at `x`."""
        ok, reason = self.check_vector_on_tangent(x, u, explain=True, **options)
        _checks.require(ok, self, str(reason), "Project it by proju", shape=tuple(u.shape))


def sizes_of(size: tuple[Any, ...]) -> tuple[int, ...]:
    """Read `random(2, 3)` and `random((2, 3))` alike."""
    return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)


def ismanifold(instance: object, cls: type) -> bool:
    """Return whether `instance` is a manifold of class `cls`."""
    return isinstance(instance, Manifold) and isinstance(instance, cls)


class Euclidean(Manifold):
    """All tensors; `ndim` trailing dimensions make one point."""

    name = "Euclidean"

    def __init__(self, ndim: int = 0) -> None:
        super().__init__(manifolds.Rn())
        self.ndim = ndim

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Sum of products over the trailing dimensions."""
        product = u * (u if v is None else v)
        dims = tuple(range(-self.ndim, 0))
        return product.sum(dims, keepdim=keepdim) if self.ndim else product

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Return the products of the entries."""
        return u * (u if v is None else v)

    def norm(self, x: Tensor, u: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the length over the trailing dimensions."""
        dims = tuple(range(-self.ndim, 0))
        return torch.linalg.vector_norm(u, dim=dims, keepdim=keepdim) if self.ndim else u.abs()

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the length of the difference."""
        return self.norm(x, x - y, keepdim=keepdim)

    def random_normal(
        self, *size: Any, mean: Any = 0.0, std: Any = 1.0, dtype: Any = None, device: Any = None
    ) -> ManifoldTensor:
        """Return Gaussian entries."""
        x = torch.randn(sizes_of(size), dtype=dtype, device=device) * std + mean
        return located(x, self)


@dataclass(frozen=True)
class ExactEuclideanStiefel(manifolds.EuclideanStiefel):
    def retract(self, x: Tensor, v: Tensor, method: str = "exponential") -> Tensor:
        return super().retract(x, v, method)


@dataclass(frozen=True)
class ExactSphere(manifolds.Sphere):
    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        return self.exp(x, v)


class Stiefel(Manifold):
    """Matrices with orthonormal columns: `Stiefel(canonical)` makes one of the two below."""

    def __new__(cls, canonical: bool = True) -> Stiefel:
        chosen: Any = CanonicalStiefel if canonical else EuclideanStiefel
        return super().__new__(chosen if cls is Stiefel else cls)

    def __init__(self, canonical: bool = True) -> None:
        super().__init__(self._space())

    def _space(self) -> manifolds.Manifold:
        return manifolds.Stiefel()

    def _origin(self, shape: tuple[int, ...], dtype: Any, device: Any) -> Tensor:
        return torch.eye(*shape[-2:], dtype=dtype, device=device).expand(shape).clone()


class CanonicalStiefel(Stiefel):
    """With the canonical inner product."""

    name = "Stiefel(canonical)"


class EuclideanStiefel(Stiefel):
    """With the inner product of the entries."""

    name = "Stiefel(euclidean)"

    def _space(self) -> manifolds.Manifold:
        return manifolds.EuclideanStiefel()


class EuclideanStiefelExact(EuclideanStiefel):
    """The retraction is the exponential."""

    def _space(self) -> manifolds.Manifold:
        return ExactEuclideanStiefel()


class Sphere(Manifold):
    """Vectors of norm 1."""

    name = "Sphere"

    def __init__(
        self, intersection: Tensor | None = None, complement: Tensor | None = None
    ) -> None:
        _checks.require(
            intersection is None and complement is None,
            self,
            "a sphere within a subspace is not here",
            "Multiply a smaller sphere by an orthonormal basis of the subspace",
        )
        super().__init__(self._space())

    def _space(self) -> manifolds.Manifold:
        return manifolds.Sphere()

    def random_uniform(self, *size: Any, dtype: Any = None, device: Any = None) -> ManifoldTensor:
        """Return a uniform point."""
        return self.random(*size, dtype=dtype, device=device)


class SphereExact(Sphere):
    """The retraction is the exponential."""

    def _space(self) -> manifolds.Manifold:
        return ExactSphere()


class SymmetricPositiveDefinite(Manifold):
    """Positive definite matrices with the affine-invariant metric."""

    name = "SymmetricPositiveDefinite"

    def __init__(self, default_metric: str = "AIM") -> None:
        _checks.require(
            default_metric == "AIM",
            self,
            "the metric must be the affine-invariant one, 'AIM'",
            "For the log-Euclidean one, optimize the logarithm, a symmetric matrix",
            default_metric=default_metric,
        )
        super().__init__(manifolds.PSD())

    def _origin(self, shape: tuple[int, ...], dtype: Any, device: Any) -> Tensor:
        return torch.eye(shape[-1], dtype=dtype, device=device).expand(shape).clone()


class BirkhoffPolytope(Manifold):
    """Doubly stochastic matrices, with the inner product of the entries."""

    name = "BirkhoffPolytope"

    def __init__(self) -> None:
        super().__init__(manifolds.DoublyStochastic())

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Retract, as geoopt does."""
        return self.retr(x, u)


def _at_the_point(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method of a manifold as one of its points, which is the first argument."""

    @functools.wraps(method)
    def bound(self: ManifoldTensor, *args: Any, **options: Any) -> Any:
        return getattr(self.manifold, method.__name__)(self, *args, **options)

    return bound


class ManifoldTensor(Tensor):
    """A tensor that knows its manifold.

    Args:
        *args: A tensor, or what `torch.Tensor` takes.
        manifold: The manifold, by default `Euclidean()`.
        requires_grad: Whether to record operations.
        **kwargs: Options of `torch.Tensor`.
    """

    # results of operations are plain tensors
    __torch_function__: Any = nn.Parameter.__torch_function__
    manifold: Manifold

    def __new__(
        cls,
        *args: Any,
        manifold: Manifold | None = None,
        requires_grad: bool = False,
        **kwargs: Any,
    ) -> ManifoldTensor:
        one = len(args) == 1 and isinstance(args[0], Tensor)
        data = args[0].detach() if one else torch.Tensor(*args, **kwargs)
        known: Any = getattr(args[0] if one else None, "manifold", None)
        chosen: Manifold = manifold or known or Euclidean()
        chosen.assert_check_point(data)
        instance: Any = data.as_subclass(Tensor).as_subclass(ManifoldTensor)
        instance.manifold = chosen
        return instance.requires_grad_(requires_grad)

    def proj_(self) -> Tensor:
        """Project in place."""
        with torch.no_grad():
            return self.copy_(self.manifold.projx(self))

    retr = _at_the_point(Manifold.retr)
    expmap = _at_the_point(Manifold.expmap)
    inner = _at_the_point(Manifold.inner)
    proju = _at_the_point(Manifold.proju)
    egrad2rgrad = _at_the_point(Manifold.egrad2rgrad)
    transp = _at_the_point(Manifold.transp)
    retr_transp = _at_the_point(Manifold.retr_transp)
    expmap_transp = _at_the_point(Manifold.expmap_transp)
    transp_follow_retr = _at_the_point(Manifold.transp_follow_retr)
    transp_follow_expmap = _at_the_point(Manifold.transp_follow_expmap)
    logmap = _at_the_point(Manifold.logmap)

    def dist(self, other: Tensor, p: float | str = 2, **options: Any) -> Tensor:
        """Return the Euclidean distance, or with p = "g" that of the manifold."""
        if p == "g":
            return self.manifold.dist(self, other, **options)
        return super().dist(other, p)  # type: ignore[arg-type]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        kind = "Parameter" if isinstance(self, nn.Parameter) else "Tensor"
        return f"{kind} on {self.manifold} containing:\n{self.detach()!r}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.detach(), self.manifold, self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            value = self.detach().clone(memory_format=torch.preserve_format)
            manifold = copy.deepcopy(self.manifold, memo)
            memo[id(self)] = _rebuild(type(self), value, manifold, self.requires_grad)
        return memo[id(self)]


class ManifoldParameter(ManifoldTensor, nn.Parameter):
    """A parameter that knows its manifold.

    Args:
        data: The value; with a `ManifoldTensor`, its manifold is the default.
        manifold: The manifold, otherwise `Euclidean()`.
        requires_grad: Whether to learn it.
    """

    def __new__(
        cls,
        data: Tensor | None = None,
        manifold: Manifold | None = None,
        requires_grad: bool = True,
    ) -> ManifoldParameter:
        data = torch.empty(0) if data is None else data
        known: Any = getattr(data, "manifold", None)
        _checks.require(
            manifold is None or known is None or manifold == known,
            cls,
            "the manifold must be that of the tensor",
            "Leave it out, or pass tensor.detach()",
            manifold=manifold,
        )
        chosen: Manifold = manifold or known or Euclidean()
        chosen.assert_check_point(data)
        instance: Any = nn.Parameter.__new__(cls, data.detach().as_subclass(Tensor), requires_grad)
        instance.manifold = chosen
        return instance


def located(x: Tensor, manifold: Manifold) -> ManifoldTensor:
    """Return a tensor as one that knows its manifold."""
    return _rebuild(ManifoldTensor, x, manifold, False)


def _rebuild(cls: Any, value: Tensor, manifold: Manifold, requires_grad: bool) -> Any:
    return cls(value, manifold=manifold, requires_grad=requires_grad)
