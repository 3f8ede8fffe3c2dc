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
    r"""Constrain a tensor to positive definite matrices.

    \(X = Q \operatorname{diag}(f(s)) Q^\top\) with an orthogonal frame Q; see
    [`PSD`][orthonet.manifolds.PSD]. The arguments are those of
    [`constrain`][orthonet.constraints.constrain].

    Shape:
        (*batch, n, n).

    Examples:
        >>> layer = positive_definite(nn.Linear(4, 4))
        >>> bool((torch.linalg.eigvalsh(layer.weight) > 0).all())
        True
    """
    return constrain(module, tensor_name, PSD(), init=init, f=f, triv=triv)


def positive_semidefinite(
    module: M, tensor_name: str = "weight", triv: Triv = "exponential", *, init: Init = None
) -> M:
    """Constrain a tensor to positive semidefinite matrices.

    The eigenvalues are absolute values: 0 is reached. See [`PSSD`][orthonet.manifolds.PSSD]. The
    arguments are those of [`constrain`][orthonet.constraints.constrain].

    Shape:
        (*batch, n, n).

    Examples:
        >>> layer = positive_semidefinite(nn.Linear(4, 4))
        >>> bool((torch.linalg.eigvalsh(layer.weight) > -1e-6).all())
        True
    """
    return constrain(module, tensor_name, PSSD(), init=init, triv=triv)


def positive_semidefinite_low_rank(
    module: M, tensor_name: str, rank: int, triv: Triv = "exponential", *, init: Init = None
) -> M:
    """Constrain a tensor to positive semidefinite matrices of rank at most `rank`.

    See [`PSSDLowRank`][orthonet.manifolds.PSSDLowRank]. The other arguments are those of
    [`constrain`][orthonet.constraints.constrain].

    Args:
        rank: From 1 to n.

    Shape:
        (*batch, n, n).

    Examples:
        >>> layer = positive_semidefinite_low_rank(nn.Linear(4, 4), "weight", rank=2)
        >>> int(torch.linalg.matrix_rank(layer.weight)) <= 2
        True
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
    """Constrain a tensor to positive semidefinite matrices of rank `rank`, no less.

    See [`PSSDFixedRank`][orthonet.manifolds.PSSDFixedRank]. The other arguments are those of
    [`constrain`][orthonet.constraints.constrain].

    Args:
        rank: From 1 to n.

    Shape:
        (*batch, n, n).

    Examples:
        >>> layer = positive_semidefinite_fixed_rank(nn.Linear(4, 4), "weight", rank=2)
        >>> int(torch.linalg.matrix_rank(layer.weight))
        2
    """
    return constrain(module, tensor_name, PSSDFixedRank(rank), init=init, f=f, triv=triv)


def correlation(module: M, tensor_name: str = "weight", *, init: Init = None) -> M:
    """Constrain a tensor to correlation matrices: positive semidefinite, with a unit diagonal.

    See [`Correlation`][orthonet.manifolds.Correlation]. The arguments are those of
    [`constrain`][orthonet.constraints.constrain].

    Shape:
        (*batch, n, n).

    Examples:
        >>> layer = correlation(nn.Linear(4, 4))
        >>> layer.weight.diagonal().allclose(torch.ones(4))
        True
    """
    return constrain(module, tensor_name, Correlation(), init=init)
