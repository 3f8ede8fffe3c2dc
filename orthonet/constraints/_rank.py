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
    r"""Matrices with singular values in \([1 - \lambda, 1 + \lambda]\).

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n, k).
        lam: Half the width of the interval, in [0, 1].
        f: A map to [-1, 1]: "fold" (a triangle wave, whose slope is nowhere 0), "sin", "tanh",
            "scaled_sigmoid", a function, or a pair of a function and its inverse.
        triv: "exponential" (or "expm"), "cayley", or a map from skew-symmetric matrices to
            orthogonal ones, for the frames.
        flatten: See [`constrain`][orthonet.constraints.constrain].
        init: See [`constrain`][orthonet.constraints.constrain].
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
    r"""Hurwitz matrices: every eigenvalue has a real part below \(-\alpha\).

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n, n).
        alpha: The rate of decay, at least 0.
        f: A map to the positive numbers: "softplus", "exp", "absolute", a function, or a pair of a
            function and its inverse.
        init: See [`constrain`][orthonet.constraints.constrain].

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
    """Matrices of rank at most `rank`.

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n, k).
        rank: The largest rank.
        triv: "exponential" (or "expm"), "cayley", or a map from skew-symmetric matrices to
            orthogonal ones, for the frames.
        flatten: See [`constrain`][orthonet.constraints.constrain].
        init: See [`constrain`][orthonet.constraints.constrain].
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
    """Matrices of rank exactly `rank`.

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n, k).
        rank: The rank.
        f: A map to the positive numbers: "softplus", "exp", "absolute", a function, or a pair of a
            function and its inverse.
        triv: "exponential" (or "expm"), "cayley", or a map from skew-symmetric matrices to
            orthogonal ones, for the frames.
        flatten: See [`constrain`][orthonet.constraints.constrain].
        init: See [`constrain`][orthonet.constraints.constrain].
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
    """Invertible matrices of positive determinant.

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n, n).
        f: A map to the positive numbers: "softplus", "exp", "absolute", a function, or a pair of a
            function and its inverse.
        triv: "exponential" (or "expm"), "cayley", or a map from skew-symmetric matrices to
            orthogonal ones, for the frames.
        init: See [`constrain`][orthonet.constraints.constrain].
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
    """Matrices of determinant 1.

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n, n).
        f: A map to the positive numbers: "softplus", "exp", "absolute", a function, or a pair of a
            function and its inverse.
        triv: "exponential" (or "expm"), "cayley", or a map from skew-symmetric matrices to
            orthogonal ones, for the frames.
        init: See [`constrain`][orthonet.constraints.constrain].
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
    """Matrices of spectral norm at most `radius`: linear maps with that Lipschitz constant.

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n, k).
        radius: The radius.
        f: A map to [-1, 1]: "fold" (a triangle wave, whose slope is nowhere 0), "sin", "tanh",
            "scaled_sigmoid", a function, or a pair of a function and its inverse.
        triv: "exponential" (or "expm"), "cayley", or a map from skew-symmetric matrices to
            orthogonal ones, for the frames.
        flatten: See [`constrain`][orthonet.constraints.constrain].
        init: See [`constrain`][orthonet.constraints.constrain].
    """
    return constrain(
        module, tensor_name, SpectralBall(radius), init=init, f=f, triv=triv, flatten=flatten
    )
