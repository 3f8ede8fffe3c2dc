"""`geotorch.parametrize`: what GeoTorch's users call of `torch.nn.utils.parametrize`."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrize import (
    cached,
    is_parametrized,
    remove_parametrizations,
    type_before_parametrizations,
)

from orthonet import constraints, reparametrizers
from orthonet.constraints import transfer_parametrizations_and_params
from orthonet.manifolds import Parametrization

__all__ = [
    "cached",
    "is_parametrized",
    "register_parametrization",
    "remove_parametrizations",
    "transfer_parametrizations_and_params",
    "type_before_parametrizations",
]


def register_parametrization(
    module: nn.Module, tensor_name: str, parametrization: nn.Module, *, unsafe: bool = False
) -> nn.Module:
    """Register a parametrization; the weight is projected onto the space where it is off it.

    Args:
        module: Holds the tensor.
        tensor_name: Its name.
        parametrization: A space with its size, such as `LowRank(layer.weight.size(), 6)`, or any
            module that `torch.nn.utils.parametrize` takes.
        unsafe: See `torch.nn.utils.parametrize.register_parametrization`.
    """
    if isinstance(parametrization, Parametrization):
        return constraints.constrain(module, tensor_name, parametrization, init="project")
    return reparametrizers.register(module, tensor_name, parametrization, unsafe=unsafe)
