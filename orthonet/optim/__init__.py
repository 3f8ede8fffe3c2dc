"""Optimizers for parameters that are orthogonal matrices themselves.

The forward pass then costs nothing extra; the step moves along the Stiefel manifold and ends with a
certified retraction. Layers are brought into this form and back by
[`on_manifold`][orthonet.convert.on_manifold] and [`trivialize`][orthonet.convert.trivialize];
plain `nn.Linear` layers with orthogonal weights work as they are.
"""

from orthonet.optim._hook import retract_after_step
from orthonet.optim._optimizers import StiefelAdam, StiefelMuon, StiefelSGD

__all__ = ["StiefelAdam", "StiefelMuon", "StiefelSGD", "retract_after_step"]
