r"""Flat spaces: all tensors, symmetric and skew-symmetric matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.linalg.packing import pack_skew, pack_symmetric, unpack_skew, unpack_symmetric
from orthonet.manifolds._base import Manifold
from orthonet.manifolds._parametrization import Parametrization

__all__ = [
    "LinearParametrization",
    "Rn",
    "Skew",
    "Sym",
    "Symmetric",
    "VectorSpace",
    "relative",
]


def relative(distance: Tensor, x: Tensor) -> Tensor:
    """Return a Frobenius distance divided by the norm of x (0 / 0 = 0)."""
    norm = torch.linalg.matrix_norm(x)
    return torch.where(distance > 0, distance / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)


@dataclass(frozen=True)
class VectorSpace(Manifold):
    """A linear subspace of the tensors: geodesics are straight lines."""

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the exponential map, x + v."""
        return x + v

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the logarithm, y - x."""
        return y - x

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the length of y - x."""
        return self.norm(x, y - x)

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the part of `v` in the space."""
        return self.project(v)

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Follow the exponential map."""
        return x + v

    def parametrization(self, shape: Sequence[int], *, lower: bool = True) -> Parametrization:
        """Return the parametrization whose coordinates are the entries, each once.

        Args:
            shape: Of values.
            lower: The coordinates are the entries of the lower triangle (else of the upper one).
        """
        return LinearParametrization(self, shape, lower)

    def pack(self, x: Tensor) -> Tensor:
        """Return coordinates of x."""
        return x

    def unpack(self, coordinates: Tensor, n: int) -> Tensor:
        """Return the inverse of `pack`."""
        return coordinates

    def doubled(self, n: int) -> int:
        """Return how many coordinates stand for two entries."""
        return 0


@dataclass(frozen=True)
class Rn(VectorSpace):
    """All tensors: no constraint. Each one counts as a single point whatever its shape.

    Examples:
        >>> Rn().distance(torch.tensor([1.0, 5.0]), torch.zeros(2))
        tensor([1., 5.])
    """

    event_ndim = 0
    has_complex = True

    def dimension(self, shape: Sequence[int]) -> int:
        """Return 1 for each entry, which are all batch dimensions here."""
        return 1

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield "its entries must be finite", torch.zeros_like(x.real)

    def project(self, x: Tensor) -> Tensor:
        """Return the tensor itself."""
        return x

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return the product of the entries; sum it for tensors that are one vector."""
        return (u.conj() * v).real


@dataclass(frozen=True)
class Symmetric(VectorSpace):
    r"""Symmetric (complex: Hermitian) matrices, \(X = X^*\), of dimension n (n + 1) / 2.

    Examples:
        >>> Symmetric().project(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
        tensor([[0., 1.],
                [1., 0.]])
    """

    has_complex = True
    square = True

    def dimension(self, shape: Sequence[int]) -> int:
        """Return n (n + 1) / 2 (real matrices)."""
        return shape[-1] * (shape[-1] + 1) // 2

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield "it must equal its transpose", relative(torch.linalg.matrix_norm(x - x.mH) / 2, x)

    def project(self, x: Tensor) -> Tensor:
        r"""Return \((X + X^*) / 2\)."""
        return 0.5 * (x + x.mH)

    def pack(self, x: Tensor) -> Tensor:
        """Return the lower triangle of x."""
        return pack_symmetric(x)

    def unpack(self, coordinates: Tensor, n: int) -> Tensor:
        """Return the inverse of `pack`."""
        return unpack_symmetric(coordinates, n)

    def doubled(self, n: int) -> int:
        """Return the n (n - 1) / 2 entries off the diagonal."""
        return n * (n - 1) // 2


Sym = Symmetric


@dataclass(frozen=True)
class Skew(VectorSpace):
    """Skew-symmetric (complex: skew-Hermitian) matrices, the Lie algebra of SO(n) (of U(n)).

    Examples:
        >>> Skew().project(torch.tensor([[5.0, 2.0], [0.0, 5.0]]))
        tensor([[ 0.,  1.],
                [-1.,  0.]])
    """

    square = True

    def dimension(self, shape: Sequence[int]) -> int:
        """Return n (n - 1) / 2 (real matrices)."""
        return shape[-1] * (shape[-1] - 1) // 2

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        distance = torch.linalg.matrix_norm(x + x.mH) / 2
        yield "it must be the negative of its transpose", relative(distance, x)

    def project(self, x: Tensor) -> Tensor:
        r"""Return \((X - X^*) / 2\)."""
        return 0.5 * (x - x.mH)

    def pack(self, x: Tensor) -> Tensor:
        """Return the strict lower triangle of x (complex: with the diagonal)."""
        return pack_skew(x)

    def unpack(self, coordinates: Tensor, n: int) -> Tensor:
        """Return the inverse of `pack`."""
        return unpack_skew(coordinates, n)

    def doubled(self, n: int) -> int:
        """Return all n (n - 1) / 2."""
        return n * (n - 1) // 2


class LinearParametrization(Parametrization):
    """The entries of a flat space, each once, as coordinates.

    Args:
        space: The space of the values.
        shape: Of values.
        lower: The coordinates are the entries of the lower triangle (else of the upper one).

    Examples:
        >>> from orthonet.manifolds import Symmetric
        >>> LinearParametrization(Symmetric(), (2, 2))(torch.tensor([1.0, 2.0, 3.0]))
        tensor([[2., 3.],
                [3., 1.]])
    """

    space: VectorSpace

    def __init__(self, space: VectorSpace, shape: Sequence[int], lower: bool = True) -> None:
        super().__init__(space, shape)
        _checks.require(
            isinstance(space, VectorSpace),
            self,
            "space must be a vector space: Rn, Symmetric or Skew",
            "Call space.parametrization(shape)",
            space=space,
        )
        self.lower = lower

    @property
    def coordinate_shape(self) -> tuple[int, ...]:
        """(*batch, dimension); for `Rn` the shape of the values."""
        if isinstance(self.space, Rn):
            return self.shape
        return (*self.batch_shape, self.space.pack(torch.empty(self.shape[-2:])).shape[-1])

    def _point(self, coordinates: Tensor) -> Tensor:
        n = self.shape[-1] if self.shape else 1
        x = self.space.unpack(coordinates, n)
        return x if self.lower or isinstance(self.space, Rn) else x.mT

    def _coordinates(self, x: Tensor) -> Tensor:
        return self.space.pack(x if self.lower or isinstance(self.space, Rn) else x.mT).clone()

    def log_abs_det(self, coordinates: Tensor) -> Tensor:
        """Return half of log 2 for each coordinate that stands for two entries."""
        value = 0.5 * math.log(2.0) * self.space.doubled(self.shape[-1] if self.shape else 1)
        return coordinates.new_full(self.batch_shape, value)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.lower else ", lower=False")
