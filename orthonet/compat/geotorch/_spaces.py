"""GeoTorch's spaces: modules that take a size."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from orthonet import _checks, manifolds
from orthonet.compat.geotorch.so import cayley_map, torus_init_, uniform_init_
from orthonet.manifolds import Manifold, Parametrization
from orthonet.manifolds.scalar import Scalar
from orthonet.manifolds.trivialization import Triv

__all__ = [
    "PSD",
    "PSSD",
    "SL",
    "SO",
    "AlmostOrthogonal",
    "FixedRank",
    "GLp",
    "Gr",
    "Grassmannian",
    "Hurwitz",
    "LowRank",
    "PSSDFixedRank",
    "PSSDLowRank",
    "ProductManifold",
    "Rn",
    "Skew",
    "Sphere",
    "SphereEmbedded",
    "St",
    "Stiefel",
    "Sym",
    "Symmetric",
]

Size = Sequence[int] | int
Init = Callable[[Tensor], object]
_xavier: Init = nn.init.xavier_normal_


def _letters(names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let `LowRank(n, k, r)` be `LowRank((n, k), r)`, as GeoTorch's README writes."""
    count, square = len(set(names)), names == "nn"

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def wrapper(self: Any, *args: Any, **options: Any) -> None:
            if args and isinstance(args[0], int):
                sizes, rest = args[:count], args[count:]
                args = (sizes * 2 if square else sizes, *rest)
            init(self, *args, **options)

        return wrapper

    return decorate


class _Sized(Parametrization):
    """A space of the library and a size, with GeoTorch's methods.

    Args:
        space: The space.
        size: Shape of the values.
        **options: Those of `space.parametrization`.
    """

    eps: ClassVar[float] = 1e-5  # of `in_manifold`
    either_way: ClassVar[bool] = False  # whether `in_manifold` takes the transpose, too

    def __init__(self, space: Manifold, size: Size, **options: Any) -> None:
        super().__init__(space, (size,) if isinstance(size, int) else size)
        self.inner = space.parametrization(self.shape, **options)

    @property
    def coordinate_shape(self) -> tuple[int, ...]:
        """Shape of the coordinates."""
        return self.inner.coordinate_shape

    def _point(self, coordinates: Tensor) -> Tensor:
        return self.inner._point(coordinates)

    def _coordinates(self, x: Tensor) -> Tensor:
        return self.inner._coordinates(x)

    def update_base(self, coordinates: Tensor, *vectors: Tensor) -> list[Tensor]:
        """Move the base to the present point; see `Parametrization.update_base`."""
        return self.inner.update_base(coordinates, *vectors)

    def log_abs_det(self, coordinates: Tensor) -> Tensor:
        """Return the log-volume of the map; see `Parametrization.log_abs_det`."""
        return self.inner.log_abs_det(coordinates)

    def right_inverse(self, X: Tensor, check_in_manifold: bool = True) -> Tensor:
        """Return coordinates of `X`, projected first without `check_in_manifold`."""
        inside = not X.is_meta and tuple(X.shape) == self.value_shape and self.in_manifold(X)
        return super().right_inverse(X, project=inside or not check_in_manifold)

    def in_manifold(self, X: Tensor, eps: float | None = None) -> bool:
        """Return whether `X` lies on the space to `eps`, and has its shape."""
        shapes = [self.value_shape]
        if self.either_way:
            shapes.append((*self.value_shape[:-2], *self.value_shape[:-3:-1]))
        if tuple(X.shape) not in shapes:
            return False
        return bool(self.space.contains(X, self.eps if eps is None else eps))

    def _empty(self, shape: Sequence[int]) -> Tensor:
        return torch.empty(*shape, dtype=self.dtype, device=self.device)


class Rn(_Sized):
    """All tensors of a size."""

    @_letters("n")
    def __init__(self, size: Size) -> None:
        super().__init__(manifolds.Rn(), size)


class Symmetric(nn.Module):
    """Symmetric matrices of any size, from the lower (upper) triangle of a square one."""

    def __init__(self, lower: bool = True) -> None:
        super().__init__()
        self.lower = lower

    def forward(self, X: Tensor) -> Tensor:
        """Return the triangle and its reflection."""
        manifolds.Symmetric().check_shape(X.shape)
        return X.tril() + X.tril(-1).mT if self.lower else X.triu() + X.triu(1).mT

    @staticmethod
    def in_manifold(X: Tensor, eps: float = 1e-6) -> bool:
        """Return whether `X` is symmetric to `eps`."""
        return bool(manifolds.Symmetric().contains(X, eps))


class Sym(_Sized):
    """Symmetric matrices of a size: `Sym(n)` of the README."""

    @_letters("nn")
    def __init__(self, size: Size, lower: bool = True) -> None:
        super().__init__(manifolds.Symmetric(), size, lower=lower)


class Skew(_Sized):
    """Skew-symmetric matrices."""

    @_letters("nn")
    def __init__(self, size: Size, lower: bool = True) -> None:
        super().__init__(manifolds.Skew(), size, lower=lower)

    def sample(self, init_: Init = _xavier, lower: bool = True) -> Tensor:
        """Return W - W^T of a triangle W that `init_` fills."""
        with torch.no_grad():
            x = self._empty(self.shape)
            init_(x)
            x = x.tril(-1) if lower else x.triu(1)
            return x - x.mT


class Sphere(_Sized):
    """Vectors of norm `radius`, by great circles from a base."""

    @_letters("n")
    def __init__(self, size: Size, radius: float = 1.0) -> None:
        super().__init__(manifolds.Sphere(radius), size)


class SphereEmbedded(_Sized):
    """Vectors of norm `radius`, as r x / |x|."""

    @_letters("n")
    def __init__(self, size: Size, radius: float = 1.0) -> None:
        super().__init__(manifolds.Sphere(radius), size, embedded=True)


class _Frames(_Sized):
    """What spaces with an orthogonal sample share."""

    either_way = True
    triv: Triv

    def sample(self, distribution: str = "uniform", init_: Init | None = None) -> Tensor:
        """Return a random orthogonal matrix, uniform or "torus" with angles that `init_` fills."""
        _checks.one_of(self, ("uniform", "torus"), distribution=distribution)
        if distribution == "uniform":
            return uniform_init_(self._empty(self.value_shape))
        n, k = max(self.shape[-2:]), min(self.shape[-2:])
        named = cayley_map if self.triv == "cayley" else torch.linalg.matrix_exp
        triv = self.triv if callable(self.triv) else named
        x = torus_init_(self._empty((*self.batch_shape, n, n)), init_, triv)
        return x[..., :k] if self.shape[-2] >= self.shape[-1] else x[..., :k, :]


class Stiefel(_Frames):
    """Matrices with orthonormal columns (rows where they are wide)."""

    eps = 1e-4

    @_letters("nk")
    def __init__(self, size: Size, triv: Triv = "expm") -> None:
        super().__init__(manifolds.Stiefel(), size, triv=triv)
        self.triv = triv


class SO(_Frames):
    """Square orthogonal matrices; samples have determinant 1, assigned ones may have -1."""

    eps = 1e-4

    @_letters("nn")
    def __init__(self, size: Size, triv: Triv = "expm", lower: bool = True) -> None:
        manifolds.SO().check_shape((size,) if isinstance(size, int) else size)
        super().__init__(manifolds.Stiefel(), size, triv=triv)
        self.triv, self.lower = triv, lower

    def in_manifold(self, X: Tensor, in_so: bool = False, eps: float = 1e-4) -> bool:
        """Return whether `X` is orthogonal to `eps`, with `in_so` of determinant 1."""
        return super().in_manifold(X, eps) and (not in_so or bool((torch.linalg.det(X) > 0).all()))


class Grassmannian(_Frames):
    """Orthonormal bases of subspaces."""

    eps = 1e-4

    @_letters("nk")
    def __init__(self, size: Size, triv: Triv = "expm") -> None:
        super().__init__(manifolds.Grassmannian(), size, triv=triv)
        self.triv = triv


class AlmostOrthogonal(_Frames):
    """Matrices with singular values in [1 - lam, 1 + lam]."""

    @_letters("nk")
    def __init__(self, size: Size, lam: float, f: Scalar = "sin", triv: Triv = "expm") -> None:
        super().__init__(manifolds.AlmostOrthogonal(lam), size, f=f, triv=triv)
        self.triv, self.lam = triv, lam


class _Ranked(_Sized):
    """What spaces of singular values share."""

    either_way = True

    def sample(self, init_: Init = _xavier, eps: float = 5e-6, factorized: bool = False) -> Any:
        """Return the projection of what `init_` fills; `factorized` gives U, S and V."""
        with torch.no_grad():
            x = self._empty(self.shape)
            init_(x)
            x = self.space.project(x)
            if not factorized:
                return x
            u, s, vh = torch.linalg.svd(x, full_matrices=False)
            rank = getattr(self.space, "rank", min(self.shape[-2:]))
            return u[..., :rank], s[..., :rank].clamp_min(eps), vh.mT[..., :rank]


class LowRank(_Ranked):
    """Matrices of rank at most `rank`."""

    @_letters("nk")
    def __init__(self, size: Size, rank: int, triv: Triv = "expm") -> None:
        super().__init__(manifolds.LowRank(rank), size, triv=triv)
        self.rank = rank

    def sample(self, init_: Init = _xavier, factorized: bool = False) -> Any:
        """Return the projection of what `init_` fills; `factorized` gives U, S and V."""
        return super().sample(init_, 0.0, factorized)


class FixedRank(_Ranked):
    """Matrices of rank `rank`."""

    @_letters("nk")
    def __init__(self, size: Size, rank: int, f: Scalar = "softplus", triv: Triv = "expm") -> None:
        super().__init__(manifolds.FixedRank(rank), size, f=f, triv=triv)
        self.rank = rank

    def in_manifold(self, X: Tensor, eps: float | None = None) -> bool:
        """Return whether `X` has the size, and `rank` singular values above `eps`."""
        least = self.eps if eps is None else eps
        inside = super().in_manifold(X, eps)
        return inside and bool((torch.linalg.svdvals(X)[..., self.rank - 1] > least).all())


class GLp(_Ranked):
    """Matrices of positive determinant."""

    @_letters("nn")
    def __init__(self, size: Size, f: Scalar = "softplus", triv: Triv = "expm") -> None:
        super().__init__(manifolds.GLp(), size, f=f, triv=triv)


class SL(_Ranked):
    """Matrices of determinant 1."""

    eps = 5e-3

    @_letters("nn")
    def __init__(self, size: Size, f: Scalar = "softplus", triv: Triv = "expm") -> None:
        super().__init__(manifolds.SL(), size, f=f, triv=triv)


class _Semidefinite(_Sized):
    """What the cones share."""

    eps = 1e-6

    def sample(self, init_: Init = _xavier, factorized: bool = False) -> Any:
        """Return W W^T of a matrix that `init_` fills; `factorized`: eigenvectors and -values."""
        with torch.no_grad():
            w = self._empty(self.shape)
            init_(w)
            x = self.space.project(w @ w.mT)
            if not factorized:
                return x
            rank = getattr(self.space, "rank", self.shape[-1])
            values, vectors = torch.linalg.eigh(x)
            return values[..., -rank:], vectors[..., -rank:]


class PSD(_Semidefinite):
    """Positive definite matrices."""

    @_letters("nn")
    def __init__(self, size: Size, f: Scalar = "softplus", triv: Triv = "expm") -> None:
        super().__init__(manifolds.PSD(), size, f=f, triv=triv)


class PSSD(_Semidefinite):
    """Positive semidefinite matrices."""

    @_letters("nn")
    def __init__(self, size: Size, triv: Triv = "expm") -> None:
        super().__init__(manifolds.PSSD(), size, triv=triv)


class PSSDLowRank(_Semidefinite):
    """Positive semidefinite matrices of rank at most `rank`."""

    @_letters("nn")
    def __init__(self, size: Size, rank: int, triv: Triv = "expm") -> None:
        super().__init__(manifolds.PSSDLowRank(rank), size, triv=triv)
        self.rank = rank


class PSSDFixedRank(_Semidefinite):
    """Positive semidefinite matrices of rank `rank`."""

    @_letters("nn")
    def __init__(self, size: Size, rank: int, f: Scalar = "softplus", triv: Triv = "expm") -> None:
        super().__init__(manifolds.PSSDFixedRank(rank), size, f=f, triv=triv)
        self.rank = rank


class Hurwitz(_Sized):
    """Matrices whose eigenvalues have real parts below -alpha; `triv` is not needed here."""

    eps = 1e-6

    @_letters("nn")
    def __init__(self, size: Size, alpha: float = 0.0, triv: Triv = "expm") -> None:
        _checks.require(
            triv == "expm",
            self,
            "triv must be left at its default, because no orthogonal matrix is a coordinate here",
            "Leave it out",
            triv=triv,
        )
        super().__init__(manifolds.Hurwitz(alpha), size)
        self.alpha = alpha

    def sample(self, init_: Init = _xavier) -> Tensor:
        """Return a random stable matrix, from matrices that `init_` fills."""
        return super().sample(init_=init_)


class ProductManifold(nn.ModuleList):
    """Spaces side by side, each with a tensor of its own."""

    def __init__(self, manifolds: Iterable[nn.Module]) -> None:
        super().__init__(manifolds)

    def forward(self, Xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the value of each."""
        return tuple(part(x) for part, x in zip(self, Xs, strict=True))

    def right_inverse(
        self, Xs: Sequence[Tensor], check_in_manifold: bool = True
    ) -> tuple[Tensor, ...]:
        """Return the coordinates of each."""
        return tuple(
            part.right_inverse(x, check_in_manifold)  # type: ignore[operator]
            for part, x in zip(self, Xs, strict=True)
        )


St, Gr = Stiefel, Grassmannian
