r"""Dynamic trivialization: a base on the manifold, and coordinates in the tangent space there."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from orthonet import _checks
from orthonet._torch import without_autocast
from orthonet.linalg.packing import pack_skew, unpack_skew
from orthonet.linalg.rotation import (
    complement_reflector,
    frame_cayley_inverse,
    frame_exponential,
    polished,
    rotated_cayley,
    skew_exponential,
    times_complement,
    times_complement_adjoint,
)
from orthonet.manifolds._base import Manifold
from orthonet.manifolds._log_volume import frame_log_volume
from orthonet.manifolds._parametrization import Parametrization

__all__ = ["FrameTrivialization", "SignedTrivialization", "Trivialization", "Triv", "check_triv"]

Triv = str | Callable[[Tensor], Tensor]
_EXPONENTIAL = ("exponential", "expm", "exp", "matrix_exp")
_CAYLEY = ("cayley",)


def check_triv(owner: object, triv: Triv, *others: str) -> Triv:
    """Return "exponential", "cayley", one of the `others`, or the given map."""
    if callable(triv) or triv in others:
        return triv
    _checks.one_of(owner, (*_EXPONENTIAL, *_CAYLEY, *others), triv=triv)
    return "cayley" if triv in _CAYLEY else "exponential"


class Trivialization(Parametrization):
    r"""Base of the parametrizations \(X = \varphi_B(c)\) with \(\varphi_B(0) = B\).

    Assignment moves the base: the coordinates become zero, so the round trip is exact, every
    tangent direction is reached, and the gradient there is the Riemannian one. Descent in the
    coordinates with `update_base` after every step is Riemannian gradient descent by the
    retraction \(\varphi\); with `update_base` now and then, coordinates stay where \(\varphi\) is
    close to an isometry.
    """

    base: Tensor

    @torch.no_grad()
    def _move(self, x: Tensor) -> None:
        """Put the base at the nearest point to `x`, in place (so that DDP and graphs keep it)."""
        self.base.copy_(self.space.project(x))

    def _coordinates(self, x: Tensor) -> Tensor:
        self._move(x)
        return torch.zeros(self.coordinate_shape, dtype=x.dtype, device=x.device)

    @abc.abstractmethod
    def tangent_coordinates(self, v: Tensor) -> Tensor:
        """Return coordinates of a tangent vector at the base, by the inverse differential."""

    @torch.no_grad()
    def update_base(self, coordinates: Tensor, *vectors: Tensor) -> list[Tensor]:
        """Move the base to the present point, whose coordinates become zero.

        The new base is projected onto the space, so it never drifts off, however often. Vectors are
        pushed forward by the differential of the map and expressed in the new coordinates.
        """
        work, dtype = coordinates.detach().to(self.base.dtype), coordinates.dtype
        pushed = [self._push(work, v.detach().to(self.base.dtype)) for v in vectors]
        with without_autocast(work):
            start = self._coordinates(self._point(work))
        return [start.to(dtype), *(self.tangent_coordinates(v).to(dtype) for v in pushed)]

    def _push(self, coordinates: Tensor, vector: Tensor) -> Tensor:
        """Return the differential of the map at the coordinates, applied to a vector."""
        if not vector.numel():
            return self._point(coordinates)
        with torch.enable_grad(), without_autocast(coordinates):
            _, pushed = torch.autograd.functional.jvp(self._point, coordinates, vector)
        return pushed  # type: ignore[return-value]


class FrameTrivialization(Trivialization):
    r"""Orthonormal n x k frames as \(Q = [B, B_\perp]\,\varphi(\Omega)_{:, :k}\).

    \[ \Omega = \begin{pmatrix} A & -C^* \\ C & 0 \end{pmatrix}, \qquad A = -A^*. \]

    The coordinates are those of A and C: as many as the manifold has dimensions, orthonormal for
    the canonical metric. The complement \(B_\perp\) is held by a block reflector in n k numbers,
    so memory is O(n k) and work O(n k^2), and nothing of size n x n appears unless
    \(\varphi\) is the caller's own map or n < 2 k. Wide matrices are treated as transposed.

    Args:
        space: `SO`, `Stiefel`, `Grassmannian` or `Unitary`.
        shape: (*batch, n, k).
        triv: "exponential", "cayley", or a map of (*batch, n, n) skew-symmetric matrices to
            orthogonal ones.
        rotate: Whether A is free; without it, as on the Grassmannian, A = 0.
        device: Device of the base.
        dtype: Dtype of the base; a complex one makes the frames complex.

    Guarantee:
        \(\max|\sigma - 1| \le 2\cdot 10^{-6}\) (float32), \(10^{-12}\) (float64), for own
        maps too as long as they are orthogonal to 1e-3, for their rounding is removed.

    Examples:
        >>> from orthonet.manifolds import Stiefel
        >>> frame = FrameTrivialization(Stiefel(), (4, 2))
        >>> frame.coordinate_shape, frame(torch.randn(5)).shape
        ((5,), torch.Size([4, 2]))

    References:
        Lezcano-Casado, *Trivializations for gradient-based optimization on manifolds*, NeurIPS
        2019; Edelman, Arias & Smith (1998); Wen & Yin, *A feasible method for optimization with
        orthogonality constraints*, Math. Program. 142 (2013), for the low-rank Cayley map.
    """

    reflector: Tensor

    def __init__(
        self,
        space: Manifold,
        shape: Sequence[int],
        triv: Triv = "exponential",
        *,
        rotate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(space, shape)
        self.triv = check_triv(self, triv)
        self.rotate = rotate
        self.transposed = self.shape[-2] < self.shape[-1]
        n, k = self._sizes
        base = torch.eye(n, k, device=device, dtype=dtype).expand(*self.batch_shape, n, k).clone()
        self._stand_beside(base)
        self.register_buffer("base", base.mT.contiguous() if self.transposed else base)
        reflector = None  # not an empty one: writers of checkpoints take two such for one
        if k < n:
            reflector = torch.empty_like(base) if base.is_meta else complement_reflector(base)
        self.register_buffer("reflector", reflector)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any, **options: Any
    ) -> None:
        # Earlier versions kept an empty one beside a square base.
        name = f"{prefix}reflector"
        if self.reflector is None and name in state_dict and state_dict[name].numel() == 0:
            del state_dict[name]  # of the copy that `load_state_dict` has made
        super()._load_from_state_dict(state_dict, prefix, *arguments, **options)

    @property
    def _sizes(self) -> tuple[int, int]:
        """Larger and smaller side."""
        return max(self.shape[-2:]), min(self.shape[-2:])

    @property
    def _rotations(self) -> int:
        """How many coordinates A has."""
        _, k = self._sizes
        if not self.rotate:
            return 0
        return k * (k + 1) // 2 if self.base.is_complex() else k * (k - 1) // 2

    @property
    def coordinate_shape(self) -> tuple[int, ...]:
        """(*batch, dimension)."""
        n, k = self._sizes
        return (*self.batch_shape, self._rotations + (n - k) * k)

    def split(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Return A, k x k, and C, (n - k) x k."""
        n, k = self._sizes
        if n == k and self.rotate:
            return unpack_skew(coordinates, k), coordinates.new_empty(*self.batch_shape, 0, k)
        a, c = coordinates.split([self._rotations, (n - k) * k], -1)
        c = c.unflatten(-1, (n - k, k)) if k else c.new_zeros(*c.shape[:-1], n, 0)
        skew = unpack_skew(a, k) if self.rotate else c.new_zeros(*c.shape[:-2], k, k)
        return skew, c

    def _point(self, coordinates: Tensor) -> Tensor:
        n, k = self._sizes
        base = self.base.to(coordinates.dtype)
        base = base.mT if self.transposed else base
        if self.triv == "cayley" and n == k and self.rotate:
            return rotated_cayley(base, coordinates)  # square, so never transposed
        a, c = self.split(coordinates)
        if self.triv == "cayley":
            q = self._cayley(base, a, c)
        elif n == k:
            q = base @ (polished(self.triv(a)) if callable(self.triv) else skew_exponential(a))
        else:
            if callable(self.triv):
                zeros = c.new_zeros(*c.shape[:-2], n - k, n - k)
                full = torch.cat([torch.cat([a, -c.mH], -1), torch.cat([c, zeros], -1)], -2)
                column = self.triv(full)[..., :k]
                top, rest = column[..., :k, :], column[..., k:, :]
            else:
                top, rest = frame_exponential(a, c)
            q = base @ top + times_complement(self.reflector.to(coordinates.dtype), rest)
            q = polished(q)
        return q.mT if self.transposed else q

    def _cayley(self, base: Tensor, a: Tensor, c: Tensor) -> Tensor:
        if not c.shape[-2]:  # no coordinate
            return base.clone()
        # B (2 N - I) + B_perp C N, with one product with N
        both = torch.add(times_complement(self.reflector.to(c.dtype), c), base, alpha=2.0)
        return polished(both @ frame_cayley_inverse(a, c) - base)

    @torch.no_grad()
    def _move(self, x: Tensor) -> None:
        base = self.space.project(x.mT if self.transposed else x)
        n, k = self._sizes
        if callable(self.triv):
            start = self.triv(base.new_zeros(*base.shape[:-2], n, n))
            identity = torch.eye(n, dtype=base.dtype, device=base.device)
            _checks.require(
                n == k or bool(torch.equal(start, identity.expand_as(start))),
                self,
                "an own map of rectangular matrices must take zero to the identity",
                "Multiply it by the inverse of its value at zero",
                triv=self.triv,
            )
            base = base @ start.mH if n == k else base
        self.base.copy_(base.mT if self.transposed else base)
        if k < n:
            self.reflector.copy_(complement_reflector(base))

    def tangent_coordinates(self, v: Tensor) -> Tensor:
        """Return coordinates of a tangent vector at the base, by the inverse differential."""
        base = self.base.to(v.dtype)
        v, base = (v.mT, base.mT) if self.transposed else (v, base)
        parts = []
        if self.rotate:
            a = base.mH @ v
            parts.append(pack_skew(0.5 * (a - a.mH)))
        n, k = self._sizes
        if k < n:
            parts.append(times_complement_adjoint(self.reflector.to(v.dtype), v).flatten(-2))
        return torch.cat(parts, -1) if parts else v.new_zeros(*v.shape[:-2], 0)

    def log_abs_det(self, coordinates: Tensor) -> Tensor:
        """Return the log-volume, in closed form for square real matrices and the two named maps."""
        if self.base.is_complex() or type(self) is not FrameTrivialization:
            return super().log_abs_det(coordinates)
        # An entry of A moves two entries of the matrix, one of C moves one.
        volume = frame_log_volume(self, coordinates)
        return volume + 0.5 * math.log(2.0) * self._rotations

    def extra_repr(self) -> str:
        name = self.triv if isinstance(self.triv, str) else getattr(self.triv, "__name__", "own")
        return f"{super().extra_repr()}, triv={name}"


class SignedTrivialization(FrameTrivialization):
    r"""All of O(n): a rotation of the base, and a coordinate whose sign flips the last column.

    The two components of O(n) are not connected, so no smooth map of coordinates covers both.
    The extra coordinate s enters as sign(s); its gradient is a straight-through estimate, that of
    the last column being scaled by s (none where |s| > 1 and the step would lead further out).
    A minimum within the wrong component, where every other coordinate is at rest, lets s
    cross zero.

    Args:
        space: `Stiefel`.
        shape: (*batch, n, n).
        triv: See [`FrameTrivialization`][orthonet.manifolds.FrameTrivialization].
    """

    start = 0.1  # |s| after an assignment: some steps of a usual size away from a flip

    @property
    def coordinate_shape(self) -> tuple[int, ...]:
        """(*batch, n (n - 1) / 2 + 1)."""
        n, k = self._sizes  # torch.compile cannot read a property through super()
        return (*self.batch_shape, self._rotations + (n - k) * k + 1)

    def _point(self, coordinates: Tensor) -> Tensor:
        q = super()._point(coordinates[..., :-1])
        s = coordinates[..., -1:, None]
        sign = torch.where(s.detach() < 0, -1.0, 1.0).to(s.dtype)
        inside = s.clamp(-1.0, 1.0)
        last = q[..., -1:] * (sign + inside - inside.detach())
        return torch.cat([q[..., :-1], last], -1)

    def _coordinates(self, x: Tensor) -> Tensor:
        self._move(x)
        coordinates = x.new_zeros(self.coordinate_shape)
        coordinates[..., -1] = self.start
        return coordinates

    def tangent_coordinates(self, v: Tensor) -> Tensor:
        """Return coordinates of a tangent vector at the base."""
        inner = super().tangent_coordinates(v)
        return torch.cat([inner, torch.zeros_like(v[..., 0, :1])], -1)

    @torch.no_grad()
    def update_base(self, coordinates: Tensor, *vectors: Tensor) -> list[Tensor]:
        """Move the base, which takes the sign of s; s keeps its size."""
        moved = super().update_base(coordinates, *vectors)
        sign = torch.where(coordinates[..., -1] < 0, -1.0, 1.0).to(coordinates.dtype)
        for new, old in zip(moved, (coordinates, *vectors), strict=True):
            new[..., -1] = sign * old[..., -1]
        return moved
