"""geoopt's names and argument orders: `import orthonet.compat.geoopt as geoopt`.

Manifolds have `projx`, `proju`, `egrad2rgrad`, `expmap`, `retr`, `logmap`, `transp`, `inner`,
`dist` and `random`; parameters know their manifold, and the optimizers read it there.
"""

from orthonet.compat._missing import missing
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

_ABSENT = {
    "BoundedDomain": "the Siegel spaces are not here",
    "ProductManifold": "use one ManifoldParameter for each factor",
    "Scaled": "scale distances yourself; a factor of the metric is a factor of the learning rate",
    "SphereProjection": "use Sphere, which is the same space without a pole",
    "SphereProjectionExact": "use SphereExact, which is the same space without a pole",
    "Stereographic": "use PoincareBall, Euclidean or Sphere, by the sign of the curvature",
    "StereographicExact": "use PoincareBallExact, Euclidean or SphereExact",
    "StereographicProductManifold": "use one ManifoldParameter for each factor",
    "UpperHalf": "the Siegel spaces are not here",
    "linalg": "use orthonet.linalg",
    "samplers": "samplers are not here",
    "utils": "use ismanifold from the top",
}
__getattr__ = missing(__name__, "geoopt", _ABSENT)
