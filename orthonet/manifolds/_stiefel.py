r"""Matrices with orthonormal columns (or rows): the Stiefel manifold and the rotations SO(n)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.linalg import haar, polar
from orthonet.linalg.logarithm import rotation_logarithm
from orthonet.linalg.matrix import compute_dtype
from orthonet.linalg.rotation import frame_cayley, frame_exponential, polished
from orthonet.linalg.unitary import complex_polar
from orthonet.manifolds._base import Manifold
from orthonet.manifolds._parametrization import Parametrization
from orthonet.manifolds._square.rotations import (
    AroundIdentity,
    Distribution,
    block_rotation,
    rotation_angles,
)
from orthonet.manifolds.maps import MappedParametrization, ProjectedParametrization
from orthonet.manifolds.trivialization import (
    FrameTrivialization,
    SignedTrivialization,
    Triv,
    check_triv,
)

__all__ = ["SO", "EuclideanStiefel", "St", "Stiefel"]


def nearest_rotation(x: Tensor, det: int) -> Tensor:
    r"""Return the nearest matrix of a determinant, \(U \mathrm{diag}(1, ..., 1, \pm 1) V^\top\)."""
    q = polar(x)
    if 0 in x.shape:
        return q
    work = compute_dtype(x.dtype)
    negative = torch.linalg.det(q.detach().to(work)) * det < 0
    if x.is_meta or not bool(negative.any()):
        return q
    u, _, vh = torch.linalg.svd(x.to(work))
    # Without full rank, U V^T is another polar factor than q, and can have either determinant.
    last = torch.ones_like(u[..., :1, :])
    last[..., 0, -1] = det * torch.linalg.det((u @ vh).detach()).sign()
    return torch.where(negative[..., None, None], ((u * last) @ vh).to(x.dtype), q)


def _complex_polar(x: Tensor) -> Tensor:
    """Return the polar factor of complex matrices of any rank."""
    q = complex_polar(x)
    if x.is_meta or not x.numel():
        return q
    # Without full rank the real polar factor is not unique and need not be that of a complex one.
    if bool((torch.linalg.svdvals(q.detach()) - 1.0).abs().amax() < 1e-3):
        return q
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    return left @ right


@dataclass(frozen=True)
class Stiefel(Manifold):
    r"""Matrices with orthonormal columns, \(X^* X = I\); orthonormal rows where they are wide.

    Square ones may have either determinant; complex ones are unitary frames. The metric of `exp`
    and `inner` is the canonical one,
    \(\langle u, v\rangle = \operatorname{tr} u^\top (I - \tfrac12 X X^\top) v\), in which the
    coordinates of the parametrization are orthonormal; on square matrices it is half of the
    Frobenius metric.

    Examples:
        >>> x = Stiefel().sample((5, 2), dtype=torch.float64)
        >>> bool(Stiefel().contains(x)), bool(Stiefel().contains(2 * x))
        (True, False)
    """

    def dimension(self, shape: Sequence[int]) -> int:
        """Return n k - k (k + 1) / 2, with k the smaller side."""
        n, k = max(shape[-2:]), min(shape[-2:])
        return n * k - k * (k + 1) // 2

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        sigma = torch.linalg.svdvals(x)
        yield "all singular values must be 1", (sigma - 1.0).abs()

    def project(self, x: Tensor) -> Tensor:
        """Return the polar factor."""
        return _complex_polar(x) if x.is_complex() else polar(x)

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        r"""Return \(v - x\,\mathrm{sym}(x^\top v)\)."""
        x, v, wide = _tall(x, v)
        inner = x.mH @ v
        result = v - x @ (0.5 * (inner + inner.mH))
        return result.mT if wide else result

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return the canonical inner product."""
        x, u, _ = _tall(x, u)
        v = v.mT if v.shape[-2] < v.shape[-1] else v
        return super().inner(x, u, v) - 0.5 * super().inner(x, x.mH @ u, x.mH @ v)

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        r"""Return the gradient for the canonical metric, \(G - X G^\top X\)."""
        x, grad, wide = _tall(x, grad)
        result = grad - x @ (grad.mH @ x)
        return result.mT if wide else result

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the geodesic of the canonical metric from `x` in direction `v`, at time 1."""
        return self._along(x, v, frame_exponential)

    def retract(self, x: Tensor, v: Tensor, method: str = "cayley") -> Tensor:
        """Return a point near `x` in direction `v`.

        Args:
            x: Point.
            v: Tangent vector there.
            method: "cayley" (second order), "polar" (the projection of x + v) or "exponential".
        """
        _checks.one_of(self, ("cayley", "polar", "exponential"), method=method)
        if method == "polar":
            return self.project(x + v)
        return self._along(x, v, frame_cayley if method == "cayley" else frame_exponential)

    def _along(
        self, x: Tensor, v: Tensor, frame: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> Tensor:
        x, v, wide = _tall(x, v)
        inner = x.mH @ v
        a = 0.5 * (inner - inner.mH)
        top, rest = frame(a, v - x @ inner)
        result = polished(x @ top + rest)
        return result.mT if wide else result

    def sample(
        self,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        distribution: Distribution = "haar",
        init_: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        r"""Return a random matrix.

        Args:
            shape: (*batch, n, k).
            dtype: Dtype.
            device: Device.
            generator: Of randomness.
            distribution: "haar" (or "uniform"): the uniform one. "torus": rotations of the planes
                (0, 1), (2, 3), ... by angles uniform in \((-\pi, \pi)\). "henaff": the same name as
                in recurrent networks, equal to "torus". "cayley": angles uniform in
                \((0, \pi / 2)\). "identity". Rectangular matrices take the leading columns.
            init_: Fills the tensor of angles in place, instead of the uniform distribution.

        References:
            Henaff, Szlam & LeCun, *Recurrent orthogonal networks and long-memory tasks*, ICML 2016;
            Helfrich, Willmott & Ye, *Orthogonal recurrent neural networks with scaled Cayley
            transform*, ICML 2018.
        """
        made = {"dtype": dtype, "device": device, "generator": generator}
        return super().sample(shape, **made, distribution=distribution, init_=init_)

    def _draw(
        self,
        shape: tuple[int, ...],
        made: dict[str, Any],
        distribution: str = "haar",
        init_: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        if distribution in ("haar", "uniform"):
            return self._haar(shape, made)
        n, k = max(shape[-2:]), min(shape[-2:])
        angles = rotation_angles(self, (*shape[:-2], n // 2), distribution, init_, **made)
        x = self._from_rotation(block_rotation(angles, n)[..., :k])
        return x.mT.contiguous() if shape[-2] < shape[-1] else x

    def _from_rotation(self, x: Tensor) -> Tensor:
        return x

    def _haar(self, shape: tuple[int, ...], made: dict[str, Any]) -> Tensor:
        if not made["dtype"].is_complex:
            return haar(shape, **made)
        x = torch.randn(shape, **made)
        q, r = torch.linalg.qr(x if shape[-2] >= shape[-1] else x.mT)
        diagonal = r.diagonal(dim1=-2, dim2=-1)
        q = q * (diagonal / diagonal.abs().clamp_min(torch.finfo(x.dtype).tiny))[..., None, :]
        return q if shape[-2] >= shape[-1] else q.mT.contiguous()

    def parametrization(
        self,
        shape: Sequence[int],
        *,
        triv: Triv = "exponential",
        cross: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Parametrization:
        """Return a dynamic trivialization by the exponential, the Cayley or an own map.

        Args:
            shape: Of values.
            triv: "exponential" (or "expm"), "cayley", a map from skew-symmetric matrices to
                orthogonal ones; or "polar": the polar factor of an unconstrained matrix, which has
                n k coordinates.
            dtype: Dtype of the base, if the values are complex.
            cross: Let square matrices cross between the two components of O(n) in training.
        """
        if check_triv(self, triv, "polar") == "polar":
            return ProjectedParametrization(self, shape)
        if cross:
            _checks.require(
                type(self) is Stiefel and len(shape) > 1 and shape[-1] == shape[-2] > 0,
                self,
                "only square matrices of either determinant have two components to cross",
                "Use Stiefel() and a square shape, or cross=False",
                shape=tuple(shape),
            )
            return SignedTrivialization(self, shape, triv)
        return FrameTrivialization(self, shape, triv, dtype=dtype)


St = Stiefel


@dataclass(frozen=True)
class EuclideanStiefel(Stiefel):
    r"""`Stiefel` with the metric of the embedding, \(\operatorname{tr} u^* v\).

    Examples:
        >>> x = torch.eye(3)[:, :1]
        >>> v = torch.tensor([[0.0], [3.0], [4.0]])
        >>> EuclideanStiefel().norm(x, v)
        tensor(5.)

    References:
        Edelman, Arias & Smith, *The geometry of algorithms with orthogonality constraints*, SIAM J.
        Matrix Anal. Appl. 20 (1998), section 2.2.
    """

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return the inner product of the entries."""
        return Manifold.inner(self, x, u, v)

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return the tangent part of the gradient."""
        return self.tangent(x, grad)

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        r"""Return \([x, v] \exp\begin{pmatrix} A & -v^* v \\ I & A \end{pmatrix}_{:, 1:k} e^{-A}\).

        Here \(A = x^* v\).
        """
        x, v, wide = _tall(x, v)
        a, k = x.mH @ v, x.shape[-1]
        identity = torch.eye(k, dtype=x.dtype, device=x.device).expand_as(a)
        block = torch.cat([torch.cat([a, -v.mH @ v], -1), torch.cat([identity, a], -1)], -2)
        column = torch.linalg.matrix_exp(block)[..., :k] @ torch.linalg.matrix_exp(-a)
        result = polished(torch.cat([x, v], -1) @ column)
        return result.mT if wide else result

    def retract(self, x: Tensor, v: Tensor, method: str = "polar") -> Tensor:
        """Return a point near `x` in direction `v`.

        Args:
            x: Point.
            v: Tangent vector there.
            method: "polar" (second order), "cayley" or "exponential".
        """
        if method == "exponential":
            return self.exp(x, v)
        return super().retract(x, v, method)


@dataclass(frozen=True)
class SO(Stiefel):
    r"""Rotations: orthogonal n x n matrices of determinant 1 (or those of determinant -1).

    The metric is half of the Frobenius metric, which is bi-invariant: geodesics are
    \(X e^{tA}\) with A skew-symmetric.

    Attributes:
        det: The determinant. With -1 it is the other component of O(n), no group.

    Examples:
        >>> x = SO().sample((3, 3), dtype=torch.float64)
        >>> round(torch.det(x).item(), 9), SO().dimension((3, 3))
        (1.0, 3)
    """

    det: int = 1

    def __post_init__(self) -> None:
        _checks.one_of(self, (1, -1), det=self.det)

    square = True

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield from super()._violations(x)
        determinant = torch.linalg.det(x)
        reason = f"the determinant must be {self.det}, not {-self.det} (Stiefel() takes either)"
        yield reason, (determinant * self.det < 0).to(x.dtype) * 2.0

    def project(self, x: Tensor) -> Tensor:
        """Return the nearest orthogonal matrix of that determinant."""
        _checks.floating(self, x=x)
        self.check_shape(x.shape)
        return nearest_rotation(x, self.det)

    def parametrization(
        self,
        shape: Sequence[int],
        *,
        triv: Triv = "exponential",
        cross: bool = False,
        dtype: torch.dtype | None = None,
        dynamic: bool = True,
    ) -> Parametrization:
        """Return the parametrization of `Stiefel`, or one around the identity.

        Args:
            shape: Of values.
            triv: See `Stiefel.parametrization`.
            cross: Must be False.
            dtype: Dtype of the base.
            dynamic: With False there is no base: the value is the map of the coordinates, and an
                assignment takes its inverse.
        """
        if dynamic:
            return super().parametrization(shape, triv=triv, cross=cross, dtype=dtype)
        n = self.check_shape(shape)[-1]
        _checks.require(
            self.det == 1,
            self,
            "without a base, the determinant must be 1",
            "Use dynamic=True",
            det=self.det,
        )
        maps = AroundIdentity(n, check_triv(self, triv))
        size = n * (n - 1) // 2
        return MappedParametrization(self, shape, maps.value, maps.coordinates, size)

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Return the shortest tangent vector at `x` with exp(x, v) = y: \(x \log(x^\top y)\)."""
        return x @ rotation_logarithm(x.mT @ y)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the root of the sum of the squared rotation angles: the shortest geodesic."""
        return self.norm(x, self.log(x, y))

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        r"""Transport `v` along the shortest geodesic, \(x\,e^{A/2} (x^\top v)\,e^{A/2}\)."""
        half = torch.linalg.matrix_exp(0.5 * rotation_logarithm(x.mT @ y))
        return x @ half @ (x.mT @ v) @ half

    def _from_rotation(self, x: Tensor) -> Tensor:
        if self.det < 0 and x.numel():
            x[..., -1] *= -1.0
        return x

    def _haar(self, shape: tuple[int, ...], made: dict[str, Any]) -> Tensor:
        x = haar(shape, **made)
        if 0 in shape or x.is_meta:
            return x
        # Flipping one column keeps the distribution.
        x[..., 0] *= self.det * torch.linalg.det(x).sign()[..., None]
        return x


def _tall(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Return both as tall matrices, and whether they were wide."""
    if x.shape[-2] < x.shape[-1]:
        return x.mT, v.mT, True
    return x, v, False
