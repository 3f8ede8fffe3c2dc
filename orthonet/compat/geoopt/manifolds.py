"""`geoopt.manifolds`: the manifolds."""

from orthonet.compat.geoopt._hyperbolic import Lorentz, PoincareBall, PoincareBallExact
from orthonet.compat.geoopt._manifolds import (
    BirkhoffPolytope,
    CanonicalStiefel,
    Euclidean,
    EuclideanStiefel,
    EuclideanStiefelExact,
    Manifold,
    Sphere,
    SphereExact,
    Stiefel,
    SymmetricPositiveDefinite,
)

__all__ = [
    "BirkhoffPolytope",
    "CanonicalStiefel",
    "Euclidean",
    "EuclideanStiefel",
    "EuclideanStiefelExact",
    "Lorentz",
    "Manifold",
    "PoincareBall",
    "PoincareBallExact",
    "Sphere",
    "SphereExact",
    "Stiefel",
    "SymmetricPositiveDefinite",
]
