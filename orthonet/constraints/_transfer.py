"""Giving the constraints of one module to another."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from orthonet import _checks, reparametrizers
from orthonet.constraints._list import ConstrainedList
from orthonet.constraints._registration import register

__all__ = ["transfer_parametrizations_and_params"]


@torch.no_grad()
def transfer_parametrizations_and_params(
    from_module: nn.Module, to_module: nn.Module, tensor_name: str | None = None
) -> nn.Module:
    """Constrain `to_module` as `from_module` is, with the same values, and return it.

    `torch.nn.utils.parametrize.transfer_parametrizations_and_params` lets both modules share the
    parametrization, base included, and hands it the weight of `to_module`, which is off the space.
    Here `to_module` gets copies, and the values of `from_module` with them, bit for bit.

    Args:
        from_module: A module with constrained tensors.
        to_module: The other module. A tensor of the same name is replaced, a missing one created.
        tensor_name: Name of the constrained tensor; None for all.

    Raises:
        ValueError: the tensor is not constrained in `from_module`, or already is in `to_module`.

    Examples:
        >>> import orthonet
        >>> a, b = orthonet.orthogonal(nn.Linear(4, 4)), nn.Linear(4, 4)
        >>> _ = orthonet.constraints.transfer_parametrizations_and_params(a, b)
        >>> bool(torch.equal(a.weight, b.weight))
        True
    """
    _checks.module(
        "transfer_parametrizations_and_params", from_module=from_module, to_module=to_module
    )
    lists: Any = from_module.parametrizations if parametrize.is_parametrized(from_module) else {}
    names = list(lists) if tensor_name is None else [tensor_name]
    for name in names:
        _checks.require(
            parametrize.is_parametrized(from_module, name),
            "transfer_parametrizations_and_params",
            f"{type(from_module).__name__} must have a constrained tensor of that name",
            "See from_module.parametrizations",
            tensor_name=name,
        )
        _checks.require(
            not parametrize.is_parametrized(to_module, name),
            "transfer_parametrizations_and_params",
            f"the tensor of {type(to_module).__name__} must not be constrained yet",
            "Remove its constraint by orthonet.constraints.remove first",
            tensor_name=name,
        )
    for name in names:
        _transfer(from_module, to_module, name)
    return to_module


def _transfer(from_module: nn.Module, to_module: nn.Module, name: str) -> None:
    lists: Any = from_module.parametrizations
    source = lists[name]
    value = getattr(from_module, name).detach().clone()
    learns = any(p.requires_grad for p in source.parameters())
    if name in to_module._buffers:
        to_module._buffers[name] = value
    else:
        to_module._parameters.pop(name, None)
        to_module.register_parameter(name, nn.Parameter(value, learns))
    put = register if isinstance(source, ConstrainedList) else reparametrizers.register
    for stage in source:
        put(to_module, name, copy.deepcopy(stage))
    lists = to_module.parametrizations
    lists[name].load_state_dict(source.state_dict())
