r"""Parametrizations without a base: by projection, or by a pair of maps."""

from __future__ import annotations

from torch import Tensor

from orthonet.manifolds._parametrization import Parametrization

__all__ = ["ProjectedParametrization"]


class ProjectedParametrization(Parametrization):
    r"""The projection onto the space; the coordinates are any tensor of its shape.

    As many coordinates as entries, with a gradient orthogonal to the directions that the projection
    forgets. This is the form that can follow another parametrization on the same tensor.

    Args:
        space: The space.
        shape: Shape of coordinates and values.
    """

    @property
    def coordinate_shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return self.shape

    def _point(self, coordinates: Tensor) -> Tensor:
        return self.space.project(coordinates)

    def _coordinates(self, x: Tensor) -> Tensor:
        return x.clone()
