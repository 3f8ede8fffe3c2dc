"""Verbs for the rank, the singular values, the determinant and the eigenvalues."""

from __future__ import annotations

from orthonet.constraints._registration import Init, M, constrain
from orthonet.manifolds import SL, AlmostOrthogonal, FixedRank, GLp, Hurwitz, LowRank, SpectralBall
from orthonet.manifolds.scalar import Scalar
from orthonet.manifolds.trivialization import Triv

__all__ = [
    "almost_orthogonal",
    "alpha_stable",
    "fixed_rank",
    "invertible",
    "low_rank",
    "sln",
    "spectral_ball",
]


def almost_orthogonal(
    module: M,
    tensor_name: str = "weight",
    lam: float = 0.1,
    f: Scalar = "fold",
    triv: Triv = "exponential",
    *,
    flatten: bool = False,
    init: Init = None,
) -> M:
    r"""Constrain a tensor to matrices with singular values in \([1 - \lambda, 1 + \lambda]\).

    \(X = U \operatorname{diag}(1 + \lambda f(s)) V^\top\) with \(f\) into [-1, 1]; see
    [`AlmostOrthogonal`][orthonet.manifolds.AlmostOrthogonal]. The other arguments are those of
    [`constrain`][orthonet.constraints.constrain].

    Args:
        lam: Half of the width of the interval, in [0, 1].

    Shape:
        (*batch, n, k).

    Examples:
        >>> layer = almost_orthogonal(nn.Linear(6, 4), lam=0.2)
        >>> s = torch.linalg.svdvals(layer.weight)
        >>> bool((s > 0.799).all() and (s < 1.201).all())
        True
    """
    return constrain(
        module, tensor_name, AlmostOrthogonal(lam), init=init, f=f, triv=triv, flatten=flatten
    )


def alpha_stable(
    module: M,
    tensor_name: str = "weight",
    alpha: float = 1e-3,
    f: Scalar = "softplus",
    *,
    init: Init = None,
) -> M:
    r"""Constrain a tensor to Hurwitz matrices: real parts of eigenvalues below \(-\alpha\).

    Solutions of the linear system decay at least as fast as that. See
    [`Hurwitz`][orthonet.manifolds.Hurwitz]. The other arguments are those of
    [`constrain`][orthonet.constraints.constrain].

    Args:
        alpha: Rate of decay, at least 0.

    Shape:
        (*batch, n, n).

    Examples:
        >>> layer = alpha_stable(torch.nn.Linear(4, 4), alpha=2.0)
        >>> bool((torch.linalg.eigvals(layer.weight).real < -2.0).all())
        True
    """
    return constrain(module, tensor_name, Hurwitz(alpha), init=init, f=f)


def low_rank(
    module: M,
    tensor_name: str,
    rank: int,
    triv: Triv = "exponential",
    *,
    flatten: bool = False,
    init: Init = None,
) -> M:
    """Constrain a tensor to matrices of rank at most `rank`.

    See [`LowRank`][orthonet.manifolds.LowRank]. The other arguments are those of
    [`constrain`][orthonet.constraints.constrain].

    Args:
        rank: From 1 to min(n, k).

    Shape:
        (*batch, n, k).

    Examples:
        >>> layer = low_rank(nn.Linear(6, 4), "weight", rank=2)
        >>> int(torch.linalg.matrix_rank(layer.weight)) <= 2
        True
    """
    return constrain(module, tensor_name, LowRank(rank), init=init, triv=triv, flatten=flatten)


def fixed_rank(
    module: M,
    tensor_name: str,
    rank: int,
    f: Scalar = "softplus",
    triv: Triv = "exponential",
    *,
    flatten: bool = False,
    init: Init = None,
) -> M:
    """Constrain a tensor to matrices of rank `rank`, no less.

    See [`FixedRank`][orthonet.manifolds.FixedRank]. The other arguments are those of
    [`constrain`][orthonet.constraints.constrain].

    Args:
        rank: From 1 to min(n, k).

    Shape:
        (*batch, n, k).

    Examples:
        >>> layer = fixed_rank(nn.Linear(6, 4), "weight", rank=2)
        >>> int(torch.linalg.matrix_rank(layer.weight))
        2
    """
    return constrain(
        module, tensor_name, FixedRank(rank), init=init, f=f, triv=triv, flatten=flatten
    )


def invertible(
    module: M,
    tensor_name: str = "weight",
    f: Scalar = "softplus",
    triv: Triv = "exponential",
    *,
    init: Init = None,
) -> M:
    """Constrain a tensor to invertible matrices of positive determinant.

    See [`GLp`][orthonet.manifolds.GLp]. The arguments are those of
    [`constrain`][orthonet.constraints.constrain].

    Shape:
        (*batch, n, n).

    Examples:
        >>> layer = invertible(nn.Linear(4, 4))
        >>> bool(torch.det(layer.weight) > 0)
        True
    """
    return constrain(module, tensor_name, GLp(), init=init, f=f, triv=triv)


def sln(
    module: M,
    tensor_name: str = "weight",
    f: Scalar = "softplus",
    triv: Triv = "exponential",
    *,
    init: Init = None,
) -> M:
    """Constrain a tensor to matrices of determinant 1.

    See [`SL`][orthonet.manifolds.SL]. The arguments are those of
    [`constrain`][orthonet.constraints.constrain].

    Shape:
        (*batch, n, n).

    Examples:
        >>> layer = sln(nn.Linear(4, 4).double())
        >>> abs(torch.det(layer.weight).item() - 1) < 1e-9
        True
    """
    return constrain(module, tensor_name, SL(), init=init, f=f, triv=triv)


def spectral_ball(
    module: M,
    tensor_name: str = "weight",
    radius: float = 1.0,
    f: Scalar = "fold",
    triv: Triv = "exponential",
    *,
    flatten: bool = False,
    init: Init = None,
) -> M:
    """Constrain a tensor to matrices of spectral norm at most `radius`.

    As a linear map, each of them has this Lipschitz constant. See
    [`SpectralBall`][orthonet.manifolds.SpectralBall]. The other arguments are those of
    [`constrain`][orthonet.constraints.constrain].

    Args:
        radius: Largest norm, positive.

    Shape:
        (*batch, n, k).

    Examples:
        >>> layer = spectral_ball(nn.Linear(6, 4), radius=0.5)
        >>> bool(torch.linalg.matrix_norm(layer.weight, 2) <= 0.5 * (1 + 1e-5))
        True
    """
    return constrain(
        module, tensor_name, SpectralBall(radius), init=init, f=f, triv=triv, flatten=flatten
    )
