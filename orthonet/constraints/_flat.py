"""Verbs for symmetric and skew-symmetric matrices, spheres, and entries in intervals."""

from __future__ import annotations

from orthonet.constraints._registration import Init, M, constrain
from orthonet.manifolds import Oblique, Skew, Sphere, Symmetric

__all__ = ["oblique", "skew", "sphere", "symmetric", "unit_norm"]


def symmetric(
    module: M, tensor_name: str = "weight", lower: bool = True, *, init: Init = None
) -> M:
    """Symmetric matrices.

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n, n).
        lower: The coordinates are the lower triangle (else the upper one).
        init: See [`constrain`][orthonet.constraints.constrain].
    """
    return constrain(module, tensor_name, Symmetric(), init=init, lower=lower)


def skew(module: M, tensor_name: str = "weight", lower: bool = True, *, init: Init = None) -> M:
    """Skew-symmetric matrices.

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n, n).
        lower: The coordinates are the lower triangle (else the upper one).
        init: See [`constrain`][orthonet.constraints.constrain].
    """
    return constrain(module, tensor_name, Skew(), init=init, lower=lower)


def sphere(
    module: M,
    tensor_name: str = "weight",
    radius: float = 1.0,
    embedded: bool = False,
    *,
    init: Init = None,
) -> M:
    """Vectors of norm `radius` along the last dimension.

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n).
        radius: The radius.
        embedded: Divide by the norm, instead of following great circles from a base.
        init: See [`constrain`][orthonet.constraints.constrain].
    """
    return constrain(module, tensor_name, Sphere(radius), init=init, embedded=embedded)


def oblique(module: M, tensor_name: str = "weight", radius: float = 1.0, *, init: Init = None) -> M:
    """Matrices with columns of norm `radius`.

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n, k).
        radius: The radius.
        init: See [`constrain`][orthonet.constraints.constrain].
    """
    return constrain(module, tensor_name, Oblique(radius), init=init)


def unit_norm(module: M, tensor_name: str = "weight", *, init: Init = None) -> M:
    """All that feeds one output has norm 1: the rows of a linear layer, the kernels of a filter.

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (outputs, ...).
        init: See [`constrain`][orthonet.constraints.constrain].
    """
    return constrain(module, tensor_name, Sphere(), init=init, flatten=True)
