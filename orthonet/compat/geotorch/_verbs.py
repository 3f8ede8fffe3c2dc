"""GeoTorch's verbs: the weight is replaced by a random point of the space."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

from orthonet import _checks, constraints
from orthonet.compat.geotorch import _spaces as spaces
from orthonet.manifolds.scalar import Scalar
from orthonet.manifolds.trivialization import Triv

__all__ = [
    "almost_orthogonal",
    "alpha_stable",
    "fixed_rank",
    "grassmannian",
    "invertible",
    "low_rank",
    "orthogonal",
    "positive_definite",
    "positive_semidefinite",
    "positive_semidefinite_fixed_rank",
    "positive_semidefinite_low_rank",
    "skew",
    "sln",
    "sphere",
    "symmetric",
    "update_base",
]

M = TypeVar("M", bound=nn.Module)


def _tensor_of(module: nn.Module, tensor_name: str, cls: type) -> Tensor:
    _checks.module(cls, module=module)
    found = getattr(module, tensor_name, None) if isinstance(tensor_name, str) else None
    names = [name for name, _ in module.named_parameters(recurse=False)]
    _checks.require(
        isinstance(found, Tensor),
        cls,
        "tensor_name must name a tensor of the module",
        f"Choose one of {', '.join(names)}" if names else "This module holds none of its own",
        tensor_name=tensor_name,
        module=module,
    )
    return found  # type: ignore[return-value]


def _register(module: M, tensor_name: str, cls: type, *args: Any) -> M:
    tensor = _tensor_of(module, tensor_name, cls)
    space = cls(tuple(tensor.shape), *args).to(tensor.device, tensor.dtype)
    init = None if tensor.is_meta else space.sample()
    return constraints.constrain(module, tensor_name, space, init=init)


def symmetric(module: M, tensor_name: str = "weight", lower: bool = True) -> M:
    """Constrain to symmetric matrices: a triangle of the present weight is reflected."""
    tensor = _tensor_of(module, tensor_name, spaces.Symmetric)
    value = spaces.Symmetric(lower)(tensor.detach())
    return constraints.symmetric(module, tensor_name, lower, init=value)


def skew(module: M, tensor_name: str = "weight", lower: bool = True) -> M:
    """Constrain to skew-symmetric matrices."""
    return _register(module, tensor_name, spaces.Skew, lower)


def sphere(
    module: M, tensor_name: str = "weight", radius: float = 1.0, embedded: bool = False
) -> M:
    """Constrain to vectors of norm `radius` along the last dimension."""
    cls = spaces.SphereEmbedded if embedded else spaces.Sphere
    return _register(module, tensor_name, cls, radius)


def orthogonal(module: M, tensor_name: str = "weight", triv: Triv = "expm") -> M:
    """Constrain to matrices with orthonormal columns (rows where they are wide)."""
    return _register(module, tensor_name, spaces.Stiefel, triv)


def almost_orthogonal(
    module: M,
    tensor_name: str = "weight",
    lam: float = 0.1,
    f: Scalar = "sin",
    triv: Triv = "expm",
) -> M:
    """Constrain to matrices with singular values in [1 - lam, 1 + lam]."""
    return _register(module, tensor_name, spaces.AlmostOrthogonal, lam, f, triv)


def grassmannian(module: M, tensor_name: str = "weight", triv: Triv = "expm") -> M:
    """Constrain to orthonormal bases of subspaces."""
    return _register(module, tensor_name, spaces.Grassmannian, triv)


def low_rank(module: M, tensor_name: str, rank: int, triv: Triv = "expm") -> M:
    """Constrain to matrices of rank at most `rank`."""
    return _register(module, tensor_name, spaces.LowRank, rank, triv)


def fixed_rank(
    module: M, tensor_name: str, rank: int, f: Scalar = "softplus", triv: Triv = "expm"
) -> M:
    """Constrain to matrices of rank `rank`."""
    return _register(module, tensor_name, spaces.FixedRank, rank, f, triv)


def invertible(
    module: M, tensor_name: str = "weight", f: Scalar = "softplus", triv: Triv = "expm"
) -> M:
    """Constrain to matrices of positive determinant."""
    return _register(module, tensor_name, spaces.GLp, f, triv)


def sln(module: M, tensor_name: str = "weight", f: Scalar = "softplus", triv: Triv = "expm") -> M:
    """Constrain to matrices of determinant 1."""
    return _register(module, tensor_name, spaces.SL, f, triv)


def positive_definite(
    module: M, tensor_name: str = "weight", f: Scalar = "softplus", triv: Triv = "expm"
) -> M:
    """Constrain to positive definite matrices."""
    return _register(module, tensor_name, spaces.PSD, f, triv)


def positive_semidefinite(module: M, tensor_name: str = "weight", triv: Triv = "expm") -> M:
    """Constrain to positive semidefinite matrices."""
    return _register(module, tensor_name, spaces.PSSD, triv)


def positive_semidefinite_low_rank(
    module: M, tensor_name: str, rank: int, triv: Triv = "expm"
) -> M:
    """Constrain to positive semidefinite matrices of rank at most `rank`."""
    return _register(module, tensor_name, spaces.PSSDLowRank, rank, triv)


def positive_semidefinite_fixed_rank(
    module: M, tensor_name: str, rank: int, f: Scalar = "softplus", triv: Triv = "expm"
) -> M:
    """Constrain to positive semidefinite matrices of rank `rank`."""
    return _register(module, tensor_name, spaces.PSSDFixedRank, rank, f, triv)


def alpha_stable(module: M, tensor_name: str = "weight", alpha: float = 1e-3) -> M:
    """Constrain to matrices whose eigenvalues have real parts below -alpha."""
    return _register(module, tensor_name, spaces.Hurwitz, alpha)


def update_base(layer: nn.Module, tensor_name: str) -> None:
    """Move the base of a constrained tensor to its present value, which stays the same."""
    constraints.update_base(layer, tensor_name)
