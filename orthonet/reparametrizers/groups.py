"""Which matrices of a model are retracted together."""

from __future__ import annotations

import warnings

from torch import nn

from orthonet import _checks
from orthonet.reparametrizers.orthogonal import OrthoWeight

__all__ = ["fuse", "unfuse"]


def fuse(module: nn.Module, *, largest: int | None = None) -> list[tuple[str, ...]]:
    """Return the names of the matrices of a model that are computed together.

    It used to switch that on. Now all matrices of one shape, dtype, device and map are always
    retracted together after an optimizer step, and share one node of the graph; nothing has to be
    called, and nothing is changed here. On the CPU, matrices of side 384 and more are computed one
    by one.

    Args:
        module: The model.
        largest: Not needed any more.

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
    _checks.require(
        largest is None, "fuse", "largest has no meaning any more", "Leave it out", largest=largest
    )
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
