"""Optimizers for parameters that are points of a space themselves, such as orthogonal matrices.

The forward pass then costs nothing extra; the step moves along the space. Those on the Stiefel
manifold end with a certified retraction, and move all matrices of one shape at once. Layers are
brought into this form and back by [`on_manifold`][orthonet.convert.on_manifold] and
[`trivialize`][orthonet.convert.trivialize]; plain `nn.Linear` layers with orthogonal weights work
as they are.
"""

from orthonet.optim._hook import retract_after_step
from orthonet.optim._lbfgs import RiemannianLBFGS
from orthonet.optim._optimizers import StiefelAdam, StiefelMuon, StiefelSGD
from orthonet.optim._riemannian import RiemannianAdam, RiemannianSGD

__all__ = [
    "RiemannianAdam",
    "RiemannianLBFGS",
    "RiemannianSGD",
    "StiefelAdam",
    "StiefelMuon",
    "StiefelSGD",
    "retract_after_step",
]
