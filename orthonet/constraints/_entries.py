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
    r"""Entries \(\ge 0\).

    Args:
        module: Any module.
        tensor_name: Name of the tensor, of any shape.
        f: None for the absolute value, or a map to the positive numbers: "softplus", "exp", a
            function, or a pair of a function and its inverse.
        init: See [`constrain`][orthonet.constraints.constrain].
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
    """Entries in [low, high].

    Args:
        module: Any module.
        tensor_name: Name of the tensor, of any shape.
        low: Smallest value.
        high: Largest value.
        f: A map to [-1, 1]: "fold" (a triangle wave, whose slope is nowhere 0), "sin", "tanh",
            "scaled_sigmoid", a function, or a pair of a function and its inverse.
        init: See [`constrain`][orthonet.constraints.constrain].
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
    """Vectors along the last dimension of norm at most `radius`.

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n).
        radius: The radius.
        flatten: See [`constrain`][orthonet.constraints.constrain].
        init: See [`constrain`][orthonet.constraints.constrain].
    """
    return constrain(module, tensor_name, NormBall(radius), init=init, flatten=flatten)


def simplex(module: M, tensor_name: str = "weight", f: str = "absolute", *, init: Init = None) -> M:
    r"""Vectors along the last dimension with entries \(\ge 0\) that sum to 1.

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n).
        f: "absolute" or "softmax", see `Simplex.parametrization`.
        init: See [`constrain`][orthonet.constraints.constrain].
    """
    return constrain(module, tensor_name, Simplex(), init=init, f=f)


def stochastic(
    module: M, tensor_name: str = "weight", f: str = "absolute", *, init: Init = None
) -> M:
    r"""Row-stochastic matrices: entries \(\ge 0\), each row sums to 1; as `simplex`.

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n, k).
        f: "absolute" or "softmax", see `Simplex.parametrization`.
        init: See [`constrain`][orthonet.constraints.constrain].
    """
    return constrain(module, tensor_name, Simplex(), init=init, f=f)


def doubly_stochastic(module: M, tensor_name: str = "weight", *, init: Init = None) -> M:
    r"""Matrices with entries \(> 0\), rows and columns of which sum to 1.

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n, n).
        init: See [`constrain`][orthonet.constraints.constrain].
    """
    return constrain(module, tensor_name, DoublyStochastic(), init=init)


def hyperbolic(
    module: M, tensor_name: str = "weight", radius: float = 1.0, *, init: Init = None
) -> M:
    """Vectors along the last dimension on the hyperboloid of curvature -1 / radius².

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n + 1).
        radius: The radius.
        init: See [`constrain`][orthonet.constraints.constrain].
    """
    return constrain(module, tensor_name, Hyperbolic(radius), init=init)


def poincare_ball(
    module: M, tensor_name: str = "weight", radius: float = 1.0, *, init: Init = None
) -> M:
    """Vectors along the last dimension in the Poincaré ball of curvature -1 / radius².

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n).
        radius: The radius.
        init: See [`constrain`][orthonet.constraints.constrain].
    """
    return constrain(module, tensor_name, PoincareBall(radius), init=init)
