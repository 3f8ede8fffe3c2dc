"""Verbs for positive definite and semidefinite matrices."""

from __future__ import annotations

from orthonet.constraints._registration import Init, M, constrain
from orthonet.manifolds import PSD, PSSD, Correlation, PSSDFixedRank, PSSDLowRank
from orthonet.manifolds.scalar import Scalar
from orthonet.manifolds.trivialization import Triv

__all__ = [
    "correlation",
    "positive_definite",
    "positive_semidefinite",
    "positive_semidefinite_fixed_rank",
    "positive_semidefinite_low_rank",
]


def positive_definite(
    module: M,
    tensor_name: str = "weight",
    f: Scalar = "softplus",
    triv: Triv = "exponential",
    *,
    init: Init = None,
) -> M:
    """Positive definite matrices.

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n, n).
        f: A map to the positive numbers: "softplus", "exp", "absolute", a function, or a pair of a
            function and its inverse.
        triv: "exponential" (or "expm"), "cayley", or a map from skew-symmetric matrices to
            orthogonal ones, for the frames.
        init: See [`constrain`][orthonet.constraints.constrain].
    """
    return constrain(module, tensor_name, PSD(), init=init, f=f, triv=triv)


def positive_semidefinite(
    module: M, tensor_name: str = "weight", triv: Triv = "exponential", *, init: Init = None
) -> M:
    """Positive semidefinite matrices.

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n, n).
        triv: "exponential" (or "expm"), "cayley", or a map from skew-symmetric matrices to
            orthogonal ones, for the frames.
        init: See [`constrain`][orthonet.constraints.constrain].
    """
    return constrain(module, tensor_name, PSSD(), init=init, triv=triv)


def positive_semidefinite_low_rank(
    module: M, tensor_name: str, rank: int, triv: Triv = "exponential", *, init: Init = None
) -> M:
    """Positive semidefinite matrices of rank at most `rank`.

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n, n).
        rank: The largest rank.
        triv: "exponential" (or "expm"), "cayley", or a map from skew-symmetric matrices to
            orthogonal ones, for the frames.
        init: See [`constrain`][orthonet.constraints.constrain].
    """
    return constrain(module, tensor_name, PSSDLowRank(rank), init=init, triv=triv)


def positive_semidefinite_fixed_rank(
    module: M,
    tensor_name: str,
    rank: int,
    f: Scalar = "softplus",
    triv: Triv = "exponential",
    *,
    init: Init = None,
) -> M:
    """Positive semidefinite matrices of rank exactly `rank`.

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n, n).
        rank: The rank.
        f: A map to the positive numbers: "softplus", "exp", "absolute", a function, or a pair of a
            function and its inverse.
        triv: "exponential" (or "expm"), "cayley", or a map from skew-symmetric matrices to
            orthogonal ones, for the frames.
        init: See [`constrain`][orthonet.constraints.constrain].
    """
    return constrain(module, tensor_name, PSSDFixedRank(rank), init=init, f=f, triv=triv)


def correlation(module: M, tensor_name: str = "weight", *, init: Init = None) -> M:
    """Correlation matrices: positive semidefinite, with ones on the diagonal.

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n, n).
        init: See [`constrain`][orthonet.constraints.constrain].
    """
    return constrain(module, tensor_name, Correlation(), init=init)
