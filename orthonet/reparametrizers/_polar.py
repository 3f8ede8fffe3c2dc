"""The nearest semi-orthogonal matrix as an orthogonalizer."""

from __future__ import annotations

from torch import Tensor

from orthonet.linalg import polar
from orthonet.linalg.retraction import POLAR
from orthonet.reparametrizers.orthogonalizers import Orthogonalizer

__all__ = ["BatchedPolarOrthogonalization"]


class BatchedPolarOrthogonalization(Orthogonalizer):
    r"""Nearest semi-orthogonal matrix, by the cheapest way the parameter allows.

    See [`polar`][orthonet.linalg.polar]: a few matrix products near the manifold, an
    eigendecomposition of the Gram matrix farther away, always ended by a measured residual. The
    result is the same as that of
    [`BatchedBjorckOrthogonalization`][orthonet.reparametrizers.BatchedBjorckOrthogonalization].

    Args:
        weight_shape: Shape (*batch, m, n) of the weights.

    Shape:
        Input and output: `weight_shape`.

    Guarantee:
        \(\max|\sigma - 1| \le 2\cdot 10^{-6}\) (float32), \(10^{-12}\) (float64) for every finite
        input, in train and eval mode; finite gradients; no state.

    Raises:
        ValueError: `weight_shape` is not a matrix shape, or the weight is not finite.

    Examples:
        >>> BatchedPolarOrthogonalization((3, 3))
        BatchedPolarOrthogonalization(weight_shape=(3, 3))

    References:
        Higham, *Functions of Matrices*, 2008, chapter 8; Absil & Malick, *Projection-like
        retractions on matrix manifolds*, SIAM J. Optim. 22 (2012).
    """

    centered = POLAR

    def _orthogonalize(self, w: Tensor) -> Tensor:
        return polar(w)
