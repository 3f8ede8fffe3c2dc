"""Spaces with their geometry, and the parametrizations that constrain tensors to them."""

from orthonet.manifolds._base import Manifold, Membership
from orthonet.manifolds._curved.hyperbolic import Hyperbolic
from orthonet.manifolds._curved.poincare import PoincareBall
from orthonet.manifolds._curved.sphere import Oblique, Sphere
from orthonet.manifolds._grassmannian import Gr, Grassmannian
from orthonet.manifolds._intervals import Bounded, Nonnegative, NormBall, SpectralBall
from orthonet.manifolds._linear import LinearParametrization, Rn, Skew, Sym, Symmetric
from orthonet.manifolds._low_rank import AlmostOrthogonal, FixedRank, LowRank
from orthonet.manifolds._mean import frechet_mean
from orthonet.manifolds._parametrization import Parametrization
from orthonet.manifolds._product import ProductManifold
from orthonet.manifolds._semidefinite import PSD, PSSD, PSSDFixedRank, PSSDLowRank
from orthonet.manifolds._simplex import DoublyStochastic, FisherRaoSimplex, Simplex
from orthonet.manifolds._square.correlation import Correlation
from orthonet.manifolds._square.general_linear import SL, GLp
from orthonet.manifolds._square.groups import Symplectic, Unitary
from orthonet.manifolds._square.hurwitz import Hurwitz
from orthonet.manifolds._stiefel import SO, EuclideanStiefel, St, Stiefel
from orthonet.manifolds.maps import ProjectedParametrization
from orthonet.manifolds.trivialization import FrameTrivialization, Trivialization

__all__ = [
    "PSD",
    "PSSD",
    "SL",
    "SO",
    "AlmostOrthogonal",
    "Bounded",
    "Correlation",
    "DoublyStochastic",
    "EuclideanStiefel",
    "FisherRaoSimplex",
    "FixedRank",
    "FrameTrivialization",
    "GLp",
    "Gr",
    "Grassmannian",
    "Hurwitz",
    "Hyperbolic",
    "LinearParametrization",
    "LowRank",
    "Manifold",
    "Membership",
    "Nonnegative",
    "NormBall",
    "Oblique",
    "PSSDFixedRank",
    "PSSDLowRank",
    "Parametrization",
    "PoincareBall",
    "ProductManifold",
    "ProjectedParametrization",
    "Rn",
    "Simplex",
    "Skew",
    "SpectralBall",
    "Sphere",
    "St",
    "Stiefel",
    "Sym",
    "Symmetric",
    "Symplectic",
    "Trivialization",
    "Unitary",
    "frechet_mean",
]
