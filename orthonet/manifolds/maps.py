r"""Parametrizations without a base: by projection, or by a pair of maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from orthonet.manifolds._base import Manifold
from orthonet.manifolds._parametrization import Parametrization

__all__ = ["MappedParametrization", "ProjectedParametrization"]


class ProjectedParametrization(Parametrization):
    """The projection onto the space; the coordinates are any tensor of its shape.

    As many coordinates as entries, with a gradient orthogonal to the directions that the projection
    forgets. This is the form that can follow another parametrization on the same tensor.

    Args:
        space: The space.
        shape: Shape of coordinates and values.

    Examples:
        >>> from orthonet.manifolds import Skew
        >>> ProjectedParametrization(Skew(), (2, 2))(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        tensor([[ 0.,  1.],
                [-1.,  0.]])
    """

    @property
    def coordinate_shape(self) -> tuple[int, ...]:
        """The shape of the values, as they are seen from outside."""
        return self.value_shape

    def _point(self, coordinates: Tensor) -> Tensor:
        return self.space.project(coordinates.reshape(self.shape))

    def _coordinates(self, x: Tensor) -> Tensor:
        return x.reshape(self.value_shape).clone()


class MappedParametrization(Parametrization):
    r"""A map of tensors of the shape of the values, and a right inverse of it.

    Args:
        space: The space.
        shape: Of values.
        function: From coordinates to values.
        inverse: From values to coordinates.
        coordinate_size: Size of the last dimension of the coordinates, if they are packed matrices.
    """

    def __init__(
        self,
        space: Manifold,
        shape: Sequence[int],
        function: Callable[[Tensor], Tensor],
        inverse: Callable[[Tensor], Tensor],
        coordinate_size: int | None = None,
    ) -> None:
        super().__init__(space, shape)
        self.function, self.inverse = function, inverse
        self.coordinate_size = coordinate_size

    @property
    def coordinate_shape(self) -> tuple[int, ...]:
        """The shape of the values, or (*batch, coordinate_size)."""
        if self.coordinate_size is None:
            return self.shape
        return (*self.batch_shape, self.coordinate_size)

    def _point(self, coordinates: Tensor) -> Tensor:
        return self.function(coordinates)

    def _coordinates(self, x: Tensor) -> Tensor:
        return self.inverse(x).clone()
