r"""One line constrains any parameter of any module: `orthonet.orthogonal(layer, "weight")`.

Every verb keeps the present weight where it satisfies the constraint and projects it where it does
not. The rest of the program stays as it is: any optimizer, any training loop. Assigning
(`layer.weight = X`) sets the weight, and refuses what is off the space with the reason and
the distance.
"""

from orthonet.constraints._base import rebase_every, update_base
from orthonet.constraints._definite import (
    correlation,
    positive_definite,
    positive_semidefinite,
    positive_semidefinite_fixed_rank,
    positive_semidefinite_low_rank,
)
from orthonet.constraints._entries import (
    bounded,
    doubly_stochastic,
    hyperbolic,
    nonnegative,
    norm_ball,
    poincare_ball,
    simplex,
    stochastic,
)
from orthonet.constraints._flat import oblique, skew, sphere, symmetric, unit_norm
from orthonet.constraints._orthogonal import (
    grassmannian,
    orthogonal,
    product,
    symplectic,
    unitary,
)
from orthonet.constraints._rank import (
    almost_orthogonal,
    alpha_stable,
    fixed_rank,
    invertible,
    low_rank,
    sln,
    spectral_ball,
)
from orthonet.constraints._registration import assign, constrain
from orthonet.constraints._transfer import transfer_parametrizations_and_params
from orthonet.reparametrizers import remove

__all__ = [
    "almost_orthogonal",
    "alpha_stable",
    "assign",
    "bounded",
    "constrain",
    "correlation",
    "doubly_stochastic",
    "fixed_rank",
    "grassmannian",
    "hyperbolic",
    "invertible",
    "low_rank",
    "nonnegative",
    "norm_ball",
    "oblique",
    "orthogonal",
    "poincare_ball",
    "positive_definite",
    "positive_semidefinite",
    "positive_semidefinite_fixed_rank",
    "positive_semidefinite_low_rank",
    "product",
    "rebase_every",
    "remove",
    "simplex",
    "skew",
    "sln",
    "spectral_ball",
    "sphere",
    "stochastic",
    "symmetric",
    "symplectic",
    "transfer_parametrizations_and_params",
    "unit_norm",
    "unitary",
    "update_base",
]
