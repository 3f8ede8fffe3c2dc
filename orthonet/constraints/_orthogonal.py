"""Verbs for matrices with orthonormal columns, groups of matrices, and products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    """Matrices with orthonormal columns (tall), rows (wide), or both (square).

    A complex tensor becomes unitary, as by [`unitary`][orthonet.constraints.unitary].

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n, k).
        triv: "exponential" (or "expm", "matrix_exp"), "cayley", a map from skew-symmetric matrices
            to orthogonal ones, or "polar" (the polar factor of an unconstrained matrix).
        det: For square matrices: None keeps the component of O(n) in which the present weight lies,
            +1 takes the rotations, -1 the others, "free" lets training cross from one to
            the other, with a straight-through estimate of the gradient of that choice.
        use_trivialization: With False, the map starts at the identity instead of a base that an
            assignment moves. This is for real square matrices of determinant 1; a present weight of
            determinant -1 becomes the nearest rotation.
        flatten: See [`constrain`][orthonet.constraints.constrain].
        init: See [`constrain`][orthonet.constraints.constrain].

    Examples:
        >>> import orthonet
        >>> layer = orthonet.orthogonal(nn.Linear(64, 128), "weight")
        >>> torch.dist(layer.weight.T @ layer.weight, torch.eye(64)).item() < 1e-5
        True
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
    """Orthonormal bases of subspaces, for functions that depend on the subspace only.

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n, k).
        triv: "exponential" (or "expm"), "cayley", or a map from skew-symmetric matrices to
            orthogonal ones.
        flatten: See [`constrain`][orthonet.constraints.constrain].
        init: See [`constrain`][orthonet.constraints.constrain].
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
    """Complex matrices with orthonormal columns (rows).

    Args:
        module: Any module.
        tensor_name: Name of the complex tensor, (*batch, n, k).
        triv: "exponential" (or "expm"), "cayley", or a map from skew-Hermitian matrices to
            unitary ones.
        init: See [`constrain`][orthonet.constraints.constrain].
    """
    return constrain(module, tensor_name, Unitary(), init=init, triv=triv)


def symplectic(
    module: M,
    tensor_name: str = "weight",
    triv: Triv = "exponential",
    *,
    init: Init = "identity",
) -> M:
    """Symplectic matrices of even size.

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, 2m, 2m).
        triv: "exponential" (or "expm"), "cayley" (near the base only), or a map from Hamiltonian
            matrices to symplectic ones.
        init: See [`constrain`][orthonet.constraints.constrain]; the default is the identity, since
            an arbitrary matrix has no projection onto this group.
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
    """One space for each block of a matrix, such as the four kernels in that of an `nn.LSTM`.

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n, k).
        spaces: The spaces.
        dim: Dimension along which the blocks lie, -2 or -1.
        sizes: Their sizes; None for equal ones.
        init: See [`constrain`][orthonet.constraints.constrain].
        **options: Options of all blocks' parametrizations.

    Examples:
        >>> import orthonet
        >>> from orthonet.manifolds import Stiefel
        >>> lstm = nn.LSTM(3, 5)
        >>> _ = orthonet.constraints.product(lstm, "weight_hh_l0", [Stiefel()] * 4)
        >>> block = lstm.weight_hh_l0[:5]
        >>> torch.dist(block.T @ block, torch.eye(5)).item() < 1e-5
        True
    """
    space = ProductManifold(spaces, dim, None if sizes is None else tuple(sizes))
    return constrain(module, tensor_name, space, init=init, **options)
