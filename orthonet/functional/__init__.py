"""Stateless maps: sorting activations, reflections, pooling, down-sampling, the recurrence.

Every function here is 1-Lipschitz in the l2 norm, except for `circular_pad` and
`symmetric_pad`, which repeat values, for `recurrence`, whose constant is that of its weights, and
for `mod_relu` with a positive bias.
Those called *gradient-norm preserving* have a Jacobian whose singular values are all 1 at every
point: autograd is made to return one consistent piece of the map at a tie, where `torch.maximum`
or `torch.abs` would return an average of two pieces (singular values 1 and 0) or 0.

`dim` is the channel dimension and may be negative; nothing else is assumed of the shape.
"""

from orthonet.functional._activations import (
    absolute,
    beta_abs,
    channel_shuffle,
    group_sort,
    householder,
    householder_order2,
    max_min,
    n_activation,
    soft_huber,
    spatial_shift,
)
from orthonet.functional._padding import circular_pad, symmetric_pad
from orthonet.functional._pooling import (
    depth_to_space,
    global_l2_norm_pool,
    global_scaled_avg_pool,
    l2_norm_pool,
    safe_sqrt,
    scaled_avg_pool,
    space_to_depth,
)
from orthonet.functional.recurrence import mod_relu, recurrence

__all__ = [
    "absolute",
    "beta_abs",
    "channel_shuffle",
    "circular_pad",
    "depth_to_space",
    "global_l2_norm_pool",
    "global_scaled_avg_pool",
    "group_sort",
    "householder",
    "householder_order2",
    "l2_norm_pool",
    "max_min",
    "mod_relu",
    "recurrence",
    "n_activation",
    "safe_sqrt",
    "scaled_avg_pool",
    "soft_huber",
    "space_to_depth",
    "spatial_shift",
    "symmetric_pad",
]
