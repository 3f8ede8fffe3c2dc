r"""One line constrains any parameter of any module: `orthonet.orthogonal(layer, "weight")`.

Every verb keeps the present weight where it satisfies the constraint and projects it where it does
not. The rest of the program stays as it is: any optimizer, any training loop. Assigning
(`layer.weight = X`) sets the weight, and refuses what is off the space with the reason and
the distance.
"""

from orthonet.constraints._base import rebase_every, update_base
from orthonet.constraints._flat import oblique, skew, sphere, symmetric, unit_norm
from orthonet.constraints._orthogonal import orthogonal
from orthonet.constraints._registration import assign, constrain, register, remove

__all__ = [
    "assign",
    "constrain",
    "oblique",
    "orthogonal",
    "rebase_every",
    "register",
    "remove",
    "skew",
    "sphere",
    "symmetric",
    "unit_norm",
    "update_base",
]
