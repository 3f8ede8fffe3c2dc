"""Export of a model to stock `nn` layers."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import fx, nn

from orthonet import _checks
from orthonet.convert._residual import RewrittenForward
from orthonet.convert._stock import as_graph, stock_twin
from orthonet.convert._traced import FX_ERRORS, trace_own
from orthonet.reparametrizers.registration import bake

__all__ = ["to_plain"]


def to_plain(model: nn.Module) -> nn.Module:
    """Return a new model that is made of stock modules only.

    Every layer with a constrained weight becomes its `nn` twin: the weight is read once, with the
    present parameters, and stored as an ordinary parameter; so are those that
    `orthonet.constraints` or `torch.nn.utils.parametrize` compute. Activations, pooling, norms and
    sums of this library become modules of `torch.nn` or `torch.fx.GraphModule`s whose code calls
    torch alone, with parameters of the same names, in the mode (train or eval) that they are in:
    call `model.eval()` first to deploy. What `orthogonalize(residual=...)` rewrote becomes a
    `GraphModule`. So the result can be pickled for a machine without this library, traced by
    `torch.fx`, scripted, and exported to ONNX, if what is not of this library can. A layer that is
    used in several places stays one layer. Everything else is copied. The given model is not
    changed and shares no tensor with the result.

    Certificates of the result are those of the model, but for activations with learned places or
    angles, layers that contain their activation, and smooth ones: certify the model itself there.

    Args:
        model: Any module; layers of this library are found wherever they are nested.

    Returns:
        A model with the same outputs, in the same mode.

    Raises:
        ValueError: `model` is not a module.

    Examples:
        >>> from orthonet.layers import MaxMin, OrthoLinear
        >>> to_plain(nn.Sequential(OrthoLinear(3, 2), nn.Flatten(), MaxMin()))
        Sequential(
          (0): Linear(in_features=3, out_features=2, bias=True)
          (1): Flatten(start_dim=1, end_dim=-1)
          (2): MaxMin()
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
    return _stock(plain, {})


def _stock(module: nn.Module, known: dict[int, tuple[nn.Module, nn.Module]]) -> nn.Module:
    """`module` with everything of this library inside of it exchanged."""
    if id(module) in known:
        return known[id(module)][1]
    twin = stock_twin(module) or module
    known[id(module)] = module, twin  # kept alive, so that no other module has its id
    for name, child in twin.named_children():
        _set(twin, name, _stock(child, known))
    if isinstance(twin, fx.GraphModule):
        for node in twin.graph.nodes:
            node.type = None  # TorchScript does not know the names of types in a traced code
        twin.recompile()
    if isinstance(twin, RewrittenForward) or type(twin).__module__.startswith("orthonet."):
        twin = _as_graph(twin)
    known[id(module)] = module, twin
    return twin


def _set(module: nn.Module, name: str, child: nn.Module) -> None:
    module._modules[name] = child


def _as_graph(module: Any) -> nn.Module:
    """One of ours whose code calls modules and torch alone; itself if it cannot be traced."""
    if type(module).forward in (nn.Sequential.forward, nn.Identity.forward):
        return (
            nn.Sequential(OrderedDict(module._modules)) if len(module._modules) else nn.Identity()
        )
    mode = "_in_train" if module.training else "_in_eval"
    method = "forward" + mode * isinstance(module, RewrittenForward)
    try:
        return as_graph(module, trace_own(module, method), type(module).__name__)
    except FX_ERRORS:
        return module
