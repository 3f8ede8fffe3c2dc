"""Export of a model to stock `nn` layers."""

from __future__ import annotations

import copy

from torch import nn

from orthonet import _checks
from orthonet.reparametrizers.registration import bake

__all__ = ["to_plain"]


def to_plain(model: nn.Module) -> nn.Module:
    """Return a new model in which every layer with a constrained weight is its stock `nn` twin.

    Weights are read once, with the present parameters, and stored as ordinary parameters, those
    that `orthonet.constraints` or `torch.nn.utils.parametrize` compute as well; a layer that is
    used in several places stays one layer. Everything else is copied. The given model is not
    changed and shares no tensor with the result.

    Args:
        model: Any module; layers of this library are found wherever they are nested.

    Returns:
        A model with the same outputs, in the same mode.

    Raises:
        ValueError: `model` is not a module.

    Examples:
        >>> from orthonet.layers import OrthoLinear
        >>> to_plain(nn.Sequential(OrthoLinear(3, 2), nn.Flatten()))
        Sequential(
          (0): Linear(in_features=3, out_features=2, bias=True)
          (1): Flatten(start_dim=1, end_dim=-1)
        )
    """
    _checks.require(
        isinstance(model, nn.Module),
        "to_plain",
        "model must be a torch.nn.Module",
        "Pass a module",
        model=type(model),
    )
    # deepcopy's own memo puts the twin wherever the layer is referenced, shared uses included
    memo: dict[int, object] = {}
    for module in model.modules():
        export = getattr(module, "to_plain", None)
        if export is not None:
            memo[id(module)] = export()
    plain = copy.deepcopy(model, memo)
    for module in plain.modules():
        bake(module)
    return plain
