"""Groups of parameters for optimizers, and of matrices that are retracted together."""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from orthonet import _checks
from orthonet.reparametrizers.orthogonal import OrthoWeight
from orthonet.reparametrizers.weight import Weight

__all__ = ["fuse", "parameter_groups", "unfuse"]


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    constrained_lr: float | None = None,
    constrained_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    r"""Return parameter groups for any optimizer of torch: constrained weights are not decayed.

    The raw parameter V of a constrained weight W = f(V) is no weight. Where f does not depend on
    the scale of V, as for the polar factor, decay does not change W but shrinks V, and the gradient
    grows by \(1 / \|V\|\): a hidden schedule of the learning rate. Where V are coordinates
    around a base, as for the exponential and the Cayley map, decay pulls W to the base. Neither is
    the regularization that weight decay is meant for, so raw parameters have a group of their own,
    with decay 0. Biases and other vectors and scalars are not decayed either.

    Args:
        model: Any module.
        lr: Learning rate.
        weight_decay: Of plain parameters with two or more dimensions.
        constrained_lr: Learning rate of the raw parameters, `lr` if None.
        constrained_weight_decay: Decay of the raw parameters, for those who want it.

    Returns:
        Up to three groups, with the names "plain", "constrained" and "vectors" under the key
        `"name"`. Each parameter that requires a gradient is in one of them, once.

    Raises:
        ValueError: a rate or decay that is negative, or no parameter to train.

    Examples:
        >>> from orthonet.layers import OrthoLinear
        >>> net = nn.Sequential(OrthoLinear(4, 4), nn.Linear(4, 2))
        >>> groups = parameter_groups(net, lr=1e-3, weight_decay=0.1)
        >>> [(g["name"], len(g["params"]), g["weight_decay"]) for g in groups]
        [('plain', 1, 0.1), ('constrained', 1, 0.0), ('vectors', 2, 0.0)]
        >>> optimizer = torch.optim.AdamW(groups)

    References:
        van Laarhoven, *L2 regularization versus batch and weight normalization*, arXiv:1706.05350.
    """
    _checks.module("parameter_groups", model=model)
    constrained_lr = lr if constrained_lr is None else constrained_lr
    given = {"constrained_lr": constrained_lr, "constrained_weight_decay": constrained_weight_decay}
    _checks.in_range("parameter_groups", 0, math.inf, lr=lr, weight_decay=weight_decay, **given)
    raw = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (Weight, ParametrizationList))
        for parameter in module.parameters()
    }
    rates = {
        "plain": (lr, weight_decay),
        "constrained": (constrained_lr, constrained_weight_decay),
        "vectors": (lr, 0.0),
    }
    found: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "plain" if parameter.ndim >= 2 else "vectors"
            found["constrained" if id(parameter) in raw else kind].append(parameter)
    groups = [
        {"name": kind, "params": found[kind], "lr": rate, "weight_decay": decay}
        for kind, (rate, decay) in rates.items()
        if found[kind]
    ]
    _checks.require(
        bool(groups),
        "parameter_groups",
        "some parameter must require a gradient",
        "Call model.requires_grad_()",
        parameters=len(list(model.parameters())),
    )
    return groups


def fuse(module: nn.Module) -> list[tuple[str, ...]]:
    """Return the names of the matrices of a model that are computed together.

    It used to switch that on. Now all matrices of one shape, dtype, device and map are always
    retracted together after an optimizer step, and share one node of the graph; nothing has to be
    called, and nothing is changed here. On the CPU, matrices of side 384 and more are computed one
    by one.

    Args:
        module: The model.

    Returns:
        The names of the matrices in each group of at least two.

    Examples:
        >>> from orthonet.layers import OrthoLinear
        >>> model = nn.Sequential(*(OrthoLinear(8, 8) for _ in range(3)))
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     fuse(model)
        [('0.parametrization', '1.parametrization', '2.parametrization')]
    """
    _checks.module("fuse", module=module)
    warnings.warn(
        "orthonet.fuse is not needed any more: matrices of one shape are always computed together.",
        DeprecationWarning,
        stacklevel=2,
    )
    groups: dict[object, list[str]] = {}
    for name, weight in module.named_modules():
        if isinstance(weight, OrthoWeight) and weight.map is not None:
            p = weight.original
            groups.setdefault((p.shape[-2:], p.dtype, p.device, weight.map), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def unfuse(module: nn.Module) -> None:
    """Do nothing: there is nothing to undo, see [`fuse`][orthonet.fuse]."""
    _checks.module("unfuse", module=module)
    warnings.warn(
        "orthonet.unfuse is not needed any more: see orthonet.fuse.",
        DeprecationWarning,
        stacklevel=2,
    )
