"""geoopt's names and argument orders: `import orthonet.compat.geoopt as geoopt`.

Manifolds have `projx`, `proju`, `egrad2rgrad`, `expmap`, `retr`, `logmap`, `transp`, `inner`,
`dist` and `random`; parameters know their manifold, and the optimizers read it there.
"""

from typing import NoReturn

from orthonet.compat.geoopt import manifolds, optim, tensor
from orthonet.compat.geoopt._hyperbolic import Lorentz, PoincareBall, PoincareBallExact
from orthonet.compat.geoopt._manifolds import (
    BirkhoffPolytope,
    CanonicalStiefel,
    Euclidean,
    EuclideanStiefel,
    EuclideanStiefelExact,
    Manifold,
    ManifoldParameter,
    ManifoldTensor,
    Sphere,
    SphereExact,
    Stiefel,
    SymmetricPositiveDefinite,
    ismanifold,
)

__all__ = [
    "BirkhoffPolytope",
    "CanonicalStiefel",
    "Euclidean",
    "EuclideanStiefel",
    "EuclideanStiefelExact",
    "Lorentz",
    "Manifold",
    "ManifoldParameter",
    "ManifoldTensor",
    "PoincareBall",
    "PoincareBallExact",
    "Sphere",
    "SphereExact",
    "Stiefel",
    "SymmetricPositiveDefinite",
    "ismanifold",
    "manifolds",
    "optim",
    "tensor",
]

_MISSING = {
    "BoundedDomain": "The Siegel spaces are not here",
    "ProductManifold": "Use one ManifoldParameter for each factor",
    "Scaled": "Scale distances yourself; a factor of the metric is a factor of the learning rate",
    "SphereProjection": "Use Sphere, which is the same space without a pole",
    "SphereProjectionExact": "Use SphereExact, which is the same space without a pole",
    "Stereographic": "Use PoincareBall, Euclidean or Sphere, by the sign of the curvature",
    "StereographicExact": "Use PoincareBallExact, Euclidean or SphereExact",
    "StereographicProductManifold": "Use one ManifoldParameter for each factor",
    "UpperHalf": "The Siegel spaces are not here",
    "linalg": "Use orthonet.linalg",
    "samplers": "Samplers are not here",
    "utils": "Use ismanifold from the top",
}


def __getattr__(name: str) -> NoReturn:
    """Say what to use instead of a name that has no counterpart."""
    if name in _MISSING:
        raise AttributeError(f"orthonet.compat.geoopt has no {name}. {_MISSING[name]}.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
