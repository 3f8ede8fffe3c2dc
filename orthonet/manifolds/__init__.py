"""Spaces with their geometry, and the parametrizations that constrain tensors to them."""

from orthonet.manifolds._base import Manifold, Membership
from orthonet.manifolds._linear import LinearParametrization, Rn, Skew, Sym, Symmetric
from orthonet.manifolds._maps import ProjectedParametrization
from orthonet.manifolds._parametrization import Parametrization
from orthonet.manifolds._sphere import Oblique, Sphere, SphereTrivialization
from orthonet.manifolds._stiefel import SO, St, Stiefel
from orthonet.manifolds._trivialization import (
    FrameTrivialization,
    SignedTrivialization,
    Trivialization,
)

__all__ = [
    "SO",
    "FrameTrivialization",
    "LinearParametrization",
    "Manifold",
    "Membership",
    "Oblique",
    "Parametrization",
    "ProjectedParametrization",
    "Rn",
    "SignedTrivialization",
    "Skew",
    "Sphere",
    "SphereTrivialization",
    "St",
    "Stiefel",
    "Sym",
    "Symmetric",
    "Trivialization",
]
