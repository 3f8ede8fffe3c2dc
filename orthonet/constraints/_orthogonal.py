"""Verbs for matrices with orthonormal columns, groups of matrices, and products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from orthonet import _checks
from orthonet.constraints._registration import Init, M, constrain
from orthonet.manifolds import (
    SO,
    Grassmannian,
    Manifold,
    ProductManifold,
    Stiefel,
    Symplectic,
    Unitary,
)
from orthonet.manifolds.trivialization import Triv

__all__ = ["grassmannian", "orthogonal", "product", "symplectic", "unitary"]


def orthogonal(
    module: M,
    tensor_name: str = "weight",
    triv: Triv = "exponential",
    *,
    det: int | str | None = None,
    use_trivialization: bool = True,
    flatten: bool = False,
    init: Init = None,
) -> M:
    """Constrain a tensor to orthonormal columns (tall), rows (wide), or both (square).

    A complex tensor becomes unitary, as by [`unitary`][orthonet.constraints.unitary]. See
    [`Stiefel`][orthonet.manifolds.Stiefel] and [`SO`][orthonet.manifolds.SO]. The other arguments
    are those of [`constrain`][orthonet.constraints.constrain].

    Args:
        triv: As of [`constrain`][orthonet.constraints.constrain], or "polar": the polar factor of
            an
            unconstrained matrix.
        det: For square matrices: None keeps the component of O(n) in which the present weight lies,
            +1 takes the rotations, -1 the others, "free" lets training cross from one to
            the other, with a straight-through estimate of the gradient of that choice.
        use_trivialization: With False, the map starts at the identity instead of a base that an
            assignment moves. This is for real square matrices of determinant 1; a present weight of
            determinant -1 becomes the nearest rotation.

    Shape:
        (*batch, n, k).

    Raises:
        ValueError: The tensor has fewer than two dimensions, or `det` is given for one that is not
            square.

    Examples:
        >>> import orthonet
        >>> layer = orthonet.orthogonal(nn.Linear(64, 128), "weight")
        >>> torch.dist(layer.weight.T @ layer.weight, torch.eye(64)).item() < 1e-5
        True

    References:
        Lezcano-Casado, *Trivializations for gradient-based optimization on manifolds*, NeurIPS
        2019.
    """
    _checks.one_of("orthogonal", (None, 1, -1, "+1", "-1", "free"), det=det)
    tensor = getattr(module, tensor_name, None) if isinstance(tensor_name, str) else None
    if isinstance(tensor, Tensor) and tensor.is_complex() and det is None and use_trivialization:
        return constrain(module, tensor_name, Unitary(), init=init, flatten=flatten, triv=triv)
    options: dict[str, Any] = {"cross": True} if det == "free" else {}
    if not use_trivialization:
        _checks.require(
            det in (None, 1, "+1"),
            "orthogonal",
            "without trivialization, the determinant must be 1",
            "Leave use_trivialization at True",
            det=det,
        )
        det, options = 1, {"dynamic": False}
    space = Stiefel() if det in (None, "free") else SO(det=int(det))
    return constrain(module, tensor_name, space, init=init, flatten=flatten, triv=triv, **options)


def grassmannian(
    module: M,
    tensor_name: str = "weight",
    triv: Triv = "exponential",
    *,
    flatten: bool = False,
    init: Init = None,
) -> M:
    """Constrain a tensor to orthonormal bases of subspaces.

    For functions that depend on the subspace alone: no direction rotates the basis within it. The
    columns of a square matrix span the whole space, so it does not train; use
    [`orthogonal`][orthonet.constraints.orthogonal] for it. See
    [`Grassmannian`][orthonet.manifolds.Grassmannian]. The arguments are those of
    [`constrain`][orthonet.constraints.constrain].

    Shape:
        (*batch, n, k).

    Examples:
        >>> layer = grassmannian(nn.Linear(4, 6))
        >>> (layer.weight.T @ layer.weight).allclose(torch.eye(4), atol=1e-5)
        True
    """
    space = Grassmannian()
    return constrain(module, tensor_name, space, init=init, flatten=flatten, triv=triv)


def unitary(
    module: M,
    tensor_name: str = "weight",
    triv: Triv = "exponential",
    *,
    init: Init = None,
) -> M:
    """Constrain a complex tensor to orthonormal columns (tall), rows (wide), or both (square).

    See [`Unitary`][orthonet.manifolds.Unitary]. The other arguments are those of
    [`constrain`][orthonet.constraints.constrain].

    Args:
        triv: "exponential" (or "expm"), "cayley", or a map from skew-Hermitian matrices to unitary
            ones.

    Shape:
        (*batch, n, k), complex.

    Examples:
        >>> layer = unitary(nn.Linear(4, 6, dtype=torch.complex64))
        >>> gram = layer.weight.mH @ layer.weight
        >>> gram.allclose(torch.eye(4, dtype=gram.dtype), atol=1e-5)
        True
    """
    return constrain(module, tensor_name, Unitary(), init=init, triv=triv)


def symplectic(
    module: M,
    tensor_name: str = "weight",
    triv: Triv = "exponential",
    *,
    init: Init = "identity",
) -> M:
    r"""Constrain a tensor to symplectic matrices of even size.

    \(X^\top J X = J\); see [`Symplectic`][orthonet.manifolds.Symplectic]. The other arguments are
    those of [`constrain`][orthonet.constraints.constrain].

    Args:
        triv: "exponential" (or "expm"), "cayley" (near the base only), or a map from Hamiltonian
            matrices to symplectic ones.
        init: As of [`constrain`][orthonet.constraints.constrain], but the
            default is the identity: an arbitrary matrix has no projection onto this group.

    Shape:
        (*batch, 2m, 2m).

    Examples:
        >>> x = symplectic(nn.Linear(4, 4)).weight
        >>> j = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).kron(torch.eye(2))
        >>> (x.T @ j @ x).allclose(j, atol=1e-5)
        True
    """
    return constrain(module, tensor_name, Symplectic(), init=init, triv=triv)


def product(
    module: M,
    tensor_name: str,
    spaces: Sequence[Manifold],
    *,
    dim: int = -2,
    sizes: Sequence[int] | None = None,
    init: Init = None,
    **options: Any,
) -> M:
    """Constrain the blocks of a matrix, each to a space of its own.

    This serves stacked kernels, such as the four of an `nn.LSTM`; see
    [`ProductManifold`][orthonet.manifolds.ProductManifold]. The other arguments are those of
    [`constrain`][orthonet.constraints.constrain].

    Args:
        spaces: One space a block.
        dim: Dimension along which the blocks lie, -2 or -1.
        sizes: Their sizes; None for equal ones.
        **options: Options of the parametrizations of all blocks.

    Shape:
        (*batch, n, k).

    Examples:
        >>> import orthonet
        >>> from orthonet.manifolds import Stiefel
        >>> lstm = nn.LSTM(3, 5)
        >>> _ = orthonet.constraints.product(lstm, "weight_hh_l0", [Stiefel()] * 4)
        >>> block = lstm.weight_hh_l0[:5]
        >>> torch.dist(block.T @ block, torch.eye(5)).item() < 1e-5
        True
    """
    space = ProductManifold(cast(Any, spaces), dim, None if sizes is None else tuple(sizes))
    return constrain(module, tensor_name, space, init=init, **options)
