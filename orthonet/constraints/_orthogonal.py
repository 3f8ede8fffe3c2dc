"""Verbs for matrices with orthonormal columns."""

from __future__ import annotations

from orthonet import _checks
from orthonet.constraints._registration import Init, M, constrain
from orthonet.manifolds import SO, Stiefel
from orthonet.manifolds._trivialization import Triv

__all__ = ["orthogonal"]


def orthogonal(
    module: M,
    tensor_name: str = "weight",
    triv: Triv = "exponential",
    *,
    det: int | str | None = None,
    flatten: bool = False,
    init: Init = None,
) -> M:
    """Matrices with orthonormal columns (tall), rows (wide), or both (square).

    Args:
        module: Any module.
        tensor_name: Name of the tensor, (*batch, n, k).
        triv: "exponential" (or "expm"), "cayley", a map from skew-symmetric matrices to
            orthogonal ones, or "polar" (the polar factor of an unconstrained matrix).
        det: For square matrices: None keeps the component of O(n) in which the present weight lies,
            +1 takes the rotations, -1 the others, "free" lets training cross from one to
            the other, with a straight-through estimate of the gradient of that choice.
        flatten: See [`constrain`][orthonet.constraints.constrain].
        init: See [`constrain`][orthonet.constraints.constrain].

    Examples:
        >>> layer = orthonet.orthogonal(nn.Linear(64, 128), "weight")
        >>> torch.dist(layer.weight.T @ layer.weight, torch.eye(64)).item() < 1e-5
        True
    """
    _checks.one_of("orthogonal", (None, 1, -1, "+1", "-1", "free"), det=det)
    space = Stiefel() if det in (None, "free") else SO(det=int(det))
    options = {"cross": True} if det == "free" else {}
    return constrain(module, tensor_name, space, init=init, flatten=flatten, triv=triv, **options)
