"""Verbs for entries in an interval, vectors in a ball, probabilities, hyperbolic space."""

from __future__ import annotations

from orthonet.constraints._registration import Init, M, constrain
from orthonet.manifolds import (
    Bounded,
    DoublyStochastic,
    Hyperbolic,
    Nonnegative,
    NormBall,
    PoincareBall,
    Simplex,
)
from orthonet.manifolds.scalar import Scalar

__all__ = [
    "bounded",
    "doubly_stochastic",
    "hyperbolic",
    "nonnegative",
    "norm_ball",
    "poincare_ball",
    "simplex",
    "stochastic",
]


def nonnegative(
    module: M, tensor_name: str = "weight", f: Scalar | None = None, *, init: Init = None
) -> M:
    r"""Constrain a tensor to entries \(\ge 0\).

    See [`Nonnegative`][orthonet.manifolds.Nonnegative]. The other arguments are those of
    [`constrain`][orthonet.constraints.constrain].

    Args:
        f: None for the absolute value, which reaches 0; otherwise a map to the positive numbers,
            see
            [`constrain`][orthonet.constraints.constrain].

    Shape:
        Any.

    Examples:
        >>> layer = nonnegative(nn.Linear(4, 3))
        >>> bool((layer.weight >= 0).all())
        True
    """
    return constrain(module, tensor_name, Nonnegative(), init=init, f=f)


def bounded(
    module: M,
    tensor_name: str = "weight",
    low: float = -1.0,
    high: float = 1.0,
    f: Scalar = "fold",
    *,
    init: Init = None,
) -> M:
    """Constrain a tensor to entries in [low, high].

    See [`Bounded`][orthonet.manifolds.Bounded]. The other arguments are those of
    [`constrain`][orthonet.constraints.constrain].

    Args:
        low: Smallest value.
        high: Largest value.

    Shape:
        Any.

    Examples:
        >>> layer = bounded(nn.Linear(4, 3), low=0.0, high=0.1)
        >>> bool((layer.weight >= 0).all() and (layer.weight <= 0.1).all())
        True
    """
    return constrain(module, tensor_name, Bounded(low, high), init=init, f=f)


def norm_ball(
    module: M,
    tensor_name: str = "weight",
    radius: float = 1.0,
    *,
    flatten: bool = False,
    init: Init = None,
) -> M:
    """Constrain a tensor to vectors of norm at most `radius` along the last dimension.

    See [`NormBall`][orthonet.manifolds.NormBall]. The other arguments are those of
    [`constrain`][orthonet.constraints.constrain].

    Args:
        radius: Largest norm, positive.

    Shape:
        (*batch, n).

    Examples:
        >>> layer = norm_ball(nn.Linear(4, 3), radius=0.5)
        >>> bool((layer.weight.norm(dim=-1) <= 0.5 * (1 + 1e-6)).all())
        True
    """
    return constrain(module, tensor_name, NormBall(radius), init=init, flatten=flatten)


def simplex(module: M, tensor_name: str = "weight", f: str = "absolute", *, init: Init = None) -> M:
    r"""Constrain a tensor to probability vectors along the last dimension.

    Their entries are \(\ge 0\) and sum to 1; see [`Simplex`][orthonet.manifolds.Simplex]. The other
    arguments are those of [`constrain`][orthonet.constraints.constrain].

    Args:
        f: "absolute", which reaches 0, or "softmax".

    Shape:
        (*batch, n).

    Examples:
        >>> layer = simplex(nn.Linear(4, 3))
        >>> layer.weight.sum(-1).allclose(torch.ones(3))
        True
    """
    return constrain(module, tensor_name, Simplex(), init=init, f=f)


def stochastic(
    module: M, tensor_name: str = "weight", f: str = "absolute", *, init: Init = None
) -> M:
    """Constrain a tensor to row-stochastic matrices: each row is a probability vector.

    This is [`simplex`][orthonet.constraints.simplex] by the name that it has for matrices. The
    other arguments are those of [`constrain`][orthonet.constraints.constrain].

    Args:
        f: "absolute" or "softmax", as there.

    Shape:
        (*batch, n, k).

    Examples:
        >>> layer = stochastic(nn.Linear(4, 3), f="softmax")
        >>> bool((layer.weight > 0).all())
        True
    """
    return constrain(module, tensor_name, Simplex(), init=init, f=f)


def doubly_stochastic(module: M, tensor_name: str = "weight", *, init: Init = None) -> M:
    r"""Constrain a tensor to doubly stochastic matrices: rows and columns sum to 1.

    Their entries are \(> 0\); see [`DoublyStochastic`][orthonet.manifolds.DoublyStochastic]. The
    arguments are those of [`constrain`][orthonet.constraints.constrain].

    Shape:
        (*batch, n, n).

    Examples:
        >>> layer = doubly_stochastic(nn.Linear(4, 4))
        >>> layer.weight.sum(0).allclose(torch.ones(4), atol=1e-5)
        True
    """
    return constrain(module, tensor_name, DoublyStochastic(), init=init)


def hyperbolic(
    module: M, tensor_name: str = "weight", radius: float = 1.0, *, init: Init = None
) -> M:
    """Constrain a tensor to points of the hyperboloid along the last dimension.

    Its curvature is -1 / radius²; see [`Hyperbolic`][orthonet.manifolds.Hyperbolic]. The other
    arguments are those of [`constrain`][orthonet.constraints.constrain].

    Args:
        radius: Of the hyperboloid, positive.

    Shape:
        (*batch, n + 1), the time-like coordinate first.

    Examples:
        >>> x = hyperbolic(nn.Embedding(5, 3)).weight
        >>> (x[:, 0] ** 2 - x[:, 1:].square().sum(-1)).allclose(torch.ones(5), atol=1e-4)
        True
    """
    return constrain(module, tensor_name, Hyperbolic(radius), init=init)


def poincare_ball(
    module: M, tensor_name: str = "weight", radius: float = 1.0, *, init: Init = None
) -> M:
    """Constrain a tensor to points of the Poincaré ball along the last dimension.

    Its curvature is -1 / radius²; see [`PoincareBall`][orthonet.manifolds.PoincareBall]. The other
    arguments are those of [`constrain`][orthonet.constraints.constrain].

    Args:
        radius: Of the ball, positive.

    Shape:
        (*batch, n).

    Examples:
        >>> x = poincare_ball(nn.Embedding(5, 3)).weight
        >>> bool((x.norm(dim=-1) < 1).all())
        True
    """
    return constrain(module, tensor_name, PoincareBall(radius), init=init)
