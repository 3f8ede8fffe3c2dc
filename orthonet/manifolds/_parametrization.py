"""Parametrizations: the modules that turn free coordinates into a point of a space.

They obey the protocol of `torch.nn.utils.parametrize` (`forward`, `right_inverse`) and keep one
tensor of coordinates, packed to the dimension of the space where that is natural, so that no weight
decay, optimizer state or communication is spent on entries that nothing reads.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet._torch import without_autocast
from orthonet.linalg.matrix import compute_dtype

__all__ = ["Membership", "Parametrization"]


@dataclass(frozen=True)
class Membership:
    """Whether a tensor lies on a space; true or false in a condition.

    Attributes:
        distance: The largest violation, relative to the scale of the tensor where the space has
            none of its own.
        allowed: The largest violation that counts as rounding.
        reason: Which property is violated most (or holds least exactly), in words.

    Examples:
        >>> from orthonet.manifolds import Sphere
        >>> found = Sphere().contains(torch.tensor([2.0, 0.0]))
        >>> bool(found), found.reason, found.distance
        (False, 'the norm must be 1', 1.0)
    """

    distance: float
    allowed: float
    reason: str

    def __bool__(self) -> bool:
        return self.distance <= self.allowed


class Parametrization(nn.Module, abc.ABC):
    r"""A smooth map from coordinates in \(\mathbb{R}^d\) onto a space.

    The value is computed in float32 at least, with autocast off, and returned in the dtype of the
    coordinates. Buffers (bases) keep float32 where the module is converted to half precision.

    Args:
        space: The space of the values, a `Manifold`.
        shape: Shape of the values, `(*batch, n, k)` or `(*batch, n)`.

    Attributes:
        dtype: Dtype of the values, as `.to()` was last told; that of `sample`.
        device: Their device.

    Shape:
        Coordinates: (*batch, d), see `coordinate_shape`. Values: `shape`.
    """

    def __init__(self, space: Any, shape: Sequence[int]) -> None:
        super().__init__()
        _checks.require(
            hasattr(space, "check_shape") and not isinstance(space, type),
            self,
            "space must be a space of orthonet.manifolds",
            "Pass an instance, e.g. Stiefel()",
            space=space,
        )
        self.space = space
        self.shape = space.check_shape(shape)
        self.value_shape = self.shape
        self._stand_beside(torch.empty(0))

    def _stand_beside(self, values: Tensor) -> None:
        """Take over the dtype and the device of `values`."""
        self.dtype, self.device = values.dtype, values.device

    def viewed_as(self, shape: Sequence[int]) -> Parametrization:
        """Let the values have another shape of as many entries, and return the module.

        A convolution kernel is thus constrained as the one matrix `kernel.flatten(1)`.
        """
        sizes = tuple(int(size) for size in shape)
        _checks.require(
            math.prod(sizes) == math.prod(self.shape),
            self,
            f"the shape must have as many entries as {self.shape}",
            "Pass a reshape of it",
            shape=sizes,
        )
        self.value_shape = sizes
        return self

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The dimensions in front of one matrix (vector)."""
        return self.shape[: len(self.shape) - self.space.event_ndim]

    @property
    def dimension(self) -> int:
        """Dimension of the space of one matrix."""
        return self.space.dimension(self.shape)

    @property
    @abc.abstractmethod
    def coordinate_shape(self) -> tuple[int, ...]:
        """Shape of the coordinates."""

    @abc.abstractmethod
    def _point(self, coordinates: Tensor) -> Tensor:
        """Return the value, for coordinates of the dtype of computation."""

    @abc.abstractmethod
    def _coordinates(self, x: Tensor) -> Tensor:
        """Return coordinates of a point on the space; may move a base there."""

    def forward(self, coordinates: Tensor) -> Tensor:
        """Return the point with these coordinates."""
        if coordinates.shape != self.coordinate_shape:
            _checks.fail(
                self,
                f"the coordinates must have shape {self.coordinate_shape}",
                "Build the parametrization with tuple(weight.shape)",
                shape=tuple(coordinates.shape),
            )
        with without_autocast(coordinates):
            if coordinates.dtype is torch.float32:  # the same in fewer calls: 5 % of a 64x64 map
                point = self._point(coordinates)
            else:
                point = self._point(coordinates.to(compute_dtype(coordinates.dtype)))
                point = point.to(coordinates.dtype)
        return point if point.shape == self.value_shape else point.reshape(self.value_shape)

    @torch.no_grad()
    def right_inverse(self, x: Tensor, *, project: bool = False) -> Tensor:
        r"""Return coordinates that `forward` maps to `x`.

        Args:
            x: A tensor of shape `value_shape`, on the space to about \(\sqrt{\mathrm{eps}}\).
            project: Take the nearest point of the space instead of refusing what is off it.

        Raises:
            ValueError: `x` has another shape.
            NotOnManifoldError: `x` is off the space; nothing has been changed.
        """
        if x.is_meta:
            return x.new_empty(self.coordinate_shape)
        point = self.nearest(x, project=project).reshape(self.shape)
        with without_autocast(x):
            return self._coordinates(point.to(compute_dtype(x.dtype))).to(x.dtype)

    @torch.no_grad()
    def nearest(self, x: Tensor, *, project: bool = True) -> Tensor:
        """Return `x` where it lies on the space, otherwise its projection; changes no state.

        Args:
            x: A tensor of shape `value_shape`.
            project: Whether to project. If not, the function only checks.

        Raises:
            ValueError: `x` has another shape.
            NotOnManifoldError: `x` is off the space, and `project` is false.
        """
        _checks.require(
            tuple(x.shape) == self.value_shape,
            self,
            f"the tensor must have shape {self.value_shape}",
            "Transpose or reshape it",
            shape=tuple(x.shape),
        )
        x = x.detach()
        matrix = x.reshape(self.shape)
        allowed = max(torch.finfo(x.dtype).eps ** 0.5, self.space.tolerance(matrix))
        if not project:
            self.space.require(matrix, self, allowed)
        elif not self.space.contains(matrix, allowed):
            with without_autocast(x):
                nearest = self.space.project(matrix.to(compute_dtype(x.dtype)))
            return nearest.to(x.dtype).reshape(self.value_shape)
        return x

    def sample(self, **options: Any) -> Tensor:
        """Return a random point; the options are those of `space.sample`."""
        options = {"dtype": self.dtype, "device": self.device, **options}
        return self.space.sample(self.shape, **options).reshape(self.value_shape)

    def contains(self, x: Tensor, atol: float | None = None) -> Membership:
        """Return whether `x` lies on the space, and how far off; see `Manifold.contains`."""
        return self.space.contains(x.reshape(self.shape), atol)

    @torch.no_grad()
    def update_base(self, coordinates: Tensor, *vectors: Tensor) -> list[Tensor]:
        """Move the base, where there is one, to the point with these coordinates.

        Args:
            coordinates: Coordinates of the present point.
            *vectors: Tangent vectors in coordinates, such as the momentum of an optimizer.

        Returns:
            The coordinates of the same point, and of the same tangent vectors, from now on.
        """
        return [tensor.detach().clone() for tensor in (coordinates, *vectors)]

    def log_abs_det(self, coordinates: Tensor) -> Tensor:
        r"""Return the log-volume of the map, \(\tfrac12 \log\det(J^\top J)\), one number a matrix.

        J is the Jacobian of the value (its entries, Frobenius metric) with respect to the
        coordinates. This is the term that a normalizing flow adds. Where a class has no closed
        form, J is formed by automatic differentiation, which takes d backward passes.
        """
        flat = coordinates.reshape(-1, *coordinates.shape[len(self.batch_shape) :])

        def single(c: Tensor, i: int) -> Tensor:
            full = torch.cat([flat[:i], c[None], flat[i + 1 :]])
            return self._point(full.reshape(coordinates.shape)).reshape(flat.shape[0], -1)[i]

        volumes = []
        for i in range(flat.shape[0]):
            jacobian = torch.autograd.functional.jacobian(
                lambda c, i=i: single(c, i), flat[i], create_graph=coordinates.requires_grad
            )
            j = jacobian.reshape(-1, math.prod(flat.shape[1:]))
            volumes.append(0.5 * torch.linalg.slogdet(j.mT @ j).logabsdet)
        return torch.stack(volumes).reshape(self.batch_shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Convert as any module, but keep buffers in float32 where half precision is asked for."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        self._stand_beside(fn(torch.empty(0, dtype=self.dtype, device=self.device)))
        for name, old in before.items():
            new = self._buffers[name]
            if old is None or new is None or not old.is_floating_point():
                continue
            if new.dtype != compute_dtype(new.dtype):
                exact = old.to(device=new.device, dtype=compute_dtype(new.dtype))
                self._buffers[name] = exact if not new.is_meta else new.to(exact.dtype)
        return self

    def extra_repr(self) -> str:
        return f"{self.space!r}, shape={self.value_shape}"
