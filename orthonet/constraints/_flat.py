"""Verbs for symmetric and skew-symmetric matrices, spheres, and entries in intervals."""

from __future__ import annotations

from orthonet.constraints._registration import Init, M, constrain
from orthonet.manifolds import Oblique, Skew, Sphere, Symmetric

__all__ = ["oblique", "skew", "sphere", "symmetric", "unit_norm"]


def symmetric(
    module: M, tensor_name: str = "weight", lower: bool = True, *, init: Init = None
) -> M:
    """Constrain a tensor to symmetric matrices (complex: Hermitian ones).

    See [`Symmetric`][orthonet.manifolds.Symmetric]. The other arguments are those of
    [`constrain`][orthonet.constraints.constrain].

    Args:
        lower: Take the coordinates from the lower triangle, otherwise from the upper one.

    Shape:
        (*batch, n, n).

    Examples:
        >>> layer = symmetric(nn.Linear(4, 4))
        >>> torch.equal(layer.weight, layer.weight.T)
        True
    """
    return constrain(module, tensor_name, Symmetric(), init=init, lower=lower)


def skew(module: M, tensor_name: str = "weight", lower: bool = True, *, init: Init = None) -> M:
    """Constrain a tensor to skew-symmetric matrices (complex: skew-Hermitian ones).

    See [`Skew`][orthonet.manifolds.Skew]. The other arguments are those of
    [`constrain`][orthonet.constraints.constrain].

    Args:
        lower: As of [`symmetric`][orthonet.constraints.symmetric].

    Shape:
        (*batch, n, n).

    Examples:
        >>> layer = skew(nn.Linear(4, 4))
        >>> torch.equal(layer.weight, -layer.weight.T)
        True
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
    """Constrain a tensor to vectors of norm `radius` along the last dimension.

    See [`Sphere`][orthonet.manifolds.Sphere]. The other arguments are those of
    [`constrain`][orthonet.constraints.constrain].

    Args:
        radius: Of the sphere, positive.
        embedded: Divide by the norm, instead of following great circles from a base.

    Shape:
        (*batch, n).

    Examples:
        >>> layer = sphere(nn.Linear(4, 3))
        >>> layer.weight.norm(dim=-1).allclose(torch.ones(3))
        True
    """
    return constrain(module, tensor_name, Sphere(radius), init=init, embedded=embedded)


def oblique(module: M, tensor_name: str = "weight", radius: float = 1.0, *, init: Init = None) -> M:
    """Constrain a tensor to matrices whose columns have norm `radius`.

    See [`Oblique`][orthonet.manifolds.Oblique]. The other arguments are those of
    [`constrain`][orthonet.constraints.constrain].

    Args:
        radius: Of each column, positive.

    Shape:
        (*batch, n, k).

    Examples:
        >>> layer = oblique(nn.Linear(4, 3))
        >>> layer.weight.norm(dim=-2).allclose(torch.ones(4))
        True
    """
    return constrain(module, tensor_name, Oblique(radius), init=init)


def unit_norm(module: M, tensor_name: str = "weight", *, init: Init = None) -> M:
    """Constrain all that feeds one output to norm 1: rows of a linear layer, whole filters.

    This is [`sphere`][orthonet.constraints.sphere] over all dimensions but the first. The arguments
    are those of [`constrain`][orthonet.constraints.constrain].

    Shape:
        (outputs, *).

    Examples:
        >>> layer = unit_norm(nn.Conv2d(2, 3, 5))
        >>> layer.weight.flatten(1).norm(dim=1).allclose(torch.ones(3))
        True
    """
    return constrain(module, tensor_name, Sphere(), init=init, flatten=True)
