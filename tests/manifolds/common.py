"""The table of spaces that the laws are tested on."""

from __future__ import annotations

import inspect

import torch

from orthonet import manifolds
from orthonet.manifolds import (
    PSD,
    PSSD,
    SL,
    SO,
    AlmostOrthogonal,
    Bounded,
    Correlation,
    DoublyStochastic,
    EuclideanStiefel,
    FisherRaoSimplex,
    FixedRank,
    GLp,
    Grassmannian,
    Hurwitz,
    Hyperbolic,
    LowRank,
    Manifold,
    Nonnegative,
    NormBall,
    Oblique,
    PoincareBall,
    ProductManifold,
    PSSDFixedRank,
    PSSDLowRank,
    Rn,
    Simplex,
    Skew,
    SpectralBall,
    Sphere,
    Stiefel,
    Symmetric,
    Symplectic,
)
from orthonet.testing import tolerances

SHAPES = {
    "1x1": (1, 1),
    "1xn": (1, 5),
    "nx1": (5, 1),
    "square": (4, 4),
    "tall": (6, 3),
    "wide": (3, 6),
    "batched": (2, 3, 5, 4),
    "batch of squares": (2, 3, 3),
}
TRIVS = ({"triv": "exponential"}, {"triv": "cayley"}, {"triv": torch.linalg.matrix_exp})
POSITIVE = tuple({"f": f} for f in ("softplus", "exp", "absolute", torch.exp))
BOUNDED = tuple({"f": f} for f in ("fold", "sin", "tanh", "scaled_sigmoid"))
# A space, and the options of its parametrization beside the default ones.
SPACES: list[tuple[Manifold, tuple[dict, ...]]] = [
    (Rn(), ()),
    (Symmetric(), ({"lower": False},)),
    (Skew(), ({"lower": False},)),
    (Sphere(), ({"embedded": True},)),
    (Sphere(2.5), ()),
    (Oblique(), ()),
    (SO(), TRIVS[1:]),
    (SO(det=-1), ()),
    (Stiefel(), (*TRIVS[1:], {"triv": "polar"})),
    (Grassmannian(), TRIVS[1:]),
    (AlmostOrthogonal(0.2), (*BOUNDED, TRIVS[1])),
    (AlmostOrthogonal(0.0), ()),
    (GLp(), (*POSITIVE, TRIVS[1])),
    (SL(), (*POSITIVE, {"f": (torch.exp, torch.log)}, TRIVS[1])),
    (LowRank(1), TRIVS[1:]),
    (LowRank(2), ()),
    (FixedRank(1), POSITIVE),
    (FixedRank(3), ()),
    (PSD(), (*POSITIVE, TRIVS[1])),
    (PSSD(), TRIVS[1:]),
    (PSSDLowRank(2), ()),
    (PSSDFixedRank(2), POSITIVE),
    (Correlation(), ()),
    (Nonnegative(), POSITIVE),
    (Bounded(-0.5, 2.0), BOUNDED),
    (NormBall(1.5), ()),
    (SpectralBall(), BOUNDED),
    (Simplex(), ({"f": "softmax"},)),
    (DoublyStochastic(), ()),
    (Symplectic(), ()),
    (Hyperbolic(2.0), ()),
    (PoincareBall(2.0), ()),
    (FisherRaoSimplex(), ()),
    (Hurwitz(0.5), ()),
    (ProductManifold((Stiefel(), Sphere()), dim=-2, sizes=(3, 1)), ()),
    (ProductManifold((Stiefel(), Stiefel()), dim=-1), ({"triv": "cayley"},)),
]

# Parametrized as `Stiefel`, with another geometry.
ALSO: list[tuple[Manifold, tuple[dict, ...]]] = [(EuclideanStiefel(), ())]
# Of spaces of vectors that came later, only these shapes.
VECTORS, LAST = (PoincareBall, FisherRaoSimplex), ("1xn", "nx1", "batched")

# A point has up to two orthogonal factors, and is made by some 20 sums of 6 terms. Observed over
# all cases and 12 seeds: 6.1e-15 and 3.1e-6.
EXACT = {
    dtype: 2 * tolerances.PROMISE[dtype] + tolerances.rounding(dtype, 20 * 6)
    for dtype in (torch.float64, torch.float32)
}


def fits(space: Manifold, shape: tuple[int, ...]) -> bool:
    return space._shape_problem(shape) is None


# A space that is published and not in the table is tested with its default arguments.
ELSEWHERE = {"EuclideanStiefel", "Unitary"}  # tested with a table of their own
PUBLISHED = {value for value in vars(manifolds).values() if inspect.isclass(value)}
SPACES += [
    (space(), ())
    for space in sorted(PUBLISHED - {type(space) for space, _ in SPACES}, key=lambda c: c.__name__)
    if issubclass(space, Manifold) and not inspect.isabstract(space)
    if space.__name__ not in ELSEWHERE
]

CASES = [
    (space, shape, options)
    for space, extra in SPACES
    for options in ({}, *extra)
    for word, shape in SHAPES.items()
    if fits(space, shape) and (word in LAST or not isinstance(space, VECTORS))
]


def name(case: tuple) -> str:
    space, shape, options = case
    parts = (v if isinstance(v, tuple) else (v,) for v in options.values())
    words = "-".join(str(getattr(p, "__name__", p)) for part in parts for p in part)
    return f"{space!r}-{'x'.join(map(str, shape))}-{words}"


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference of entries, relative to the largest entry or 1."""
    if not a.numel():
        return 0.0
    return ((a - b).abs().max() / b.abs().max().clamp(min=1.0)).item()
