"""Layers whose parameter is the orthogonal matrix itself, and the way back."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from orthonet import _checks
from orthonet.linalg.matrix import compute_dtype
from orthonet.manifolds import Stiefel
from orthonet.reparametrizers import BatchedIdentity, OrthoParams, OrthoWeight
from orthonet.reparametrizers.orthogonal import IDENTITY
from orthonet.reparametrizers.params import read_params

__all__ = ["manifold_groups", "on_manifold", "trivialize"]


class _OnManifold(nn.Module):
    """Stands where the orthogonalizer was, which it keeps for the way back."""

    function = IDENTITY

    def __init__(self, weight: OrthoWeight) -> None:
        super().__init__()
        self.train(weight.training)
        # hidden in a tuple: no sub-module, no buffers in state_dict
        self.kept = (weight.normalizer, weight.orthogonalizer)

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w

    def right_inverse(self, w: torch.Tensor) -> torch.Tensor:
        return w


def _require_loaded(weight: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Refuse the raw parameter of a trivialized layer, which has the same name."""
    loaded = state.get(f"{prefix}original")
    if not _is_on_manifold(weight) or not isinstance(loaded, torch.Tensor) or loaded.is_meta:
        return
    reason = Stiefel().contains(loaded.double(), 1e-3)
    if not reason:
        problem = _checks.message(
            "on_manifold",
            f"the loaded matrix '{prefix}original' must be semi-orthogonal, since it is the weight "
            "itself here",
            "Load the checkpoint of a trivialized model first, then call on_manifold(model)",
            reason=str(reason),
        )
        rest[-1].append(problem)


def _is_on_manifold(weight: nn.Module) -> bool:
    return isinstance(weight, OrthoWeight) and isinstance(weight.orthogonalizer, _OnManifold)


def _require_module(owner: str, model: object) -> None:
    _checks.require(
        isinstance(model, nn.Module),
        owner,
        "model must be a torch.nn.Module",
        "Pass a module",
        model=type(model),
    )


@torch.no_grad()
def on_manifold(model: nn.Module) -> nn.Module:
    r"""Return a new model whose orthogonal matrices are parameters themselves.

    In every layer the raw parameter of each orthogonal matrix (the weight of an `OrthoLinear`, the
    recurrent kernels, the factors of orthogonal convolutions) is replaced by the matrix that it
    stands for, and the orthogonalization goes away: a forward pass costs what that of a plain layer
    costs. The matrices must then be moved by an optimizer that keeps them orthogonal, one of
    `orthonet.optim`; see [`manifold_groups`][orthonet.convert.manifold_groups]. Layers keep their
    class, their interface and the names in `state_dict` (buffers of the orthogonalizer apart).

    Args:
        model: Any module; it is not changed and shares no tensor with the result.

    Returns:
        A model with the same weights, up to the rounding of storage, in the same mode.

    Raises:
        ValueError: `model` is not a module; a matrix is stored in half precision; or it holds no
            orthogonal matrix that could be a parameter.

    Examples:
        >>> from orthonet.layers import OrthoLinear
        >>> from orthonet.optim import StiefelAdam
        >>> model = on_manifold(nn.Sequential(OrthoLinear(4, 4), nn.ReLU(), OrthoLinear(4, 2)))
        >>> optimizer = StiefelAdam(manifold_groups(model), lr=1e-2)
    """
    _require_module("on_manifold", model)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, OrthoWeight)]
    _checks.require(
        bool(found),
        "on_manifold",
        "the model must hold orthogonal matrices made from a raw parameter",
        "Orthogonalize it first, or give plain layers with orthogonal weights to StiefelAdam as "
        "they are",
        model=type(model).__name__,
    )
    for name, weight in found:
        _checks.require(
            weight.original.dtype == compute_dtype(weight.original.dtype),
            "on_manifold",
            f"the matrix '{name}' must be stored in float32 or float64, because rounding to half "
            "precision takes it off the manifold",
            "Call model.float() and use torch.autocast",
            dtype=weight.original.dtype,
        )
    copied = copy.deepcopy(model)
    for source, weight in zip(model.modules(), copied.modules(), strict=True):
        if isinstance(weight, OrthoWeight) and not _is_on_manifold(weight):
            value = source().detach()
            kept = _OnManifold(weight)
            weight.normalizer = BatchedIdentity(weight.shape)
            weight.orthogonalizer = kept
            weight.original.copy_(value)
            weight.register_load_state_dict_pre_hook(_require_loaded)
    return copied


@torch.no_grad()
def trivialize(model: nn.Module, ortho_params: OrthoParams | str | None = None) -> nn.Module:
    """Return a new model whose orthogonal matrices are computed from free parameters again.

    The inverse of [`on_manifold`][orthonet.convert.on_manifold]: the weights are the same, and any
    optimizer may move the parameters.

    Args:
        model: Any module; it is not changed and shares no tensor with the result.
        ortho_params: Which normalizer and orthogonalizer; those that each matrix had before
            `on_manifold` if None.

    Returns:
        A model with the same weights, up to rounding, in the same mode.

    Raises:
        ValueError: `model` is not a module.
        NotOnManifoldError: A matrix has left the manifold.
    """
    _require_module("trivialize", model)
    params = None if ortho_params is None else read_params("trivialize", ortho_params)
    model = copy.deepcopy(model)
    for weight in model.modules():
        if not isinstance(weight, OrthoWeight) or not _is_on_manifold(weight):
            continue
        value = weight.original.detach().clone()
        steps = weight.orthogonalizer.kept if params is None else ()
        steps = steps or params.build(tuple(weight.shape))  # type: ignore[union-attr]
        weight.normalizer, weight.orthogonalizer = (step.to(value) for step in steps)  # type: ignore[union-attr]
        weight.train(weight.training)
        weight.assign_(value)
    return model


def manifold_groups(model: nn.Module, **options: object) -> list[dict[str, object]]:
    """Parameter groups of a model of `on_manifold`, for the optimizers of `orthonet.optim`.

    Args:
        model: The model.
        options: Options of the group of plain parameters, e.g. `lr` or `weight_decay`.

    Returns:
        The matrices on the manifold, and a group with `stiefel=False` of all other parameters (if
        there are any).

    Raises:
        ValueError: No matrix of the model is a parameter itself.
    """
    _require_module("manifold_groups", model)
    matrices = {
        id(m.original): m.original
        for m in model.modules()
        if isinstance(m, OrthoWeight) and _is_on_manifold(m)
    }
    _checks.require(
        bool(matrices),
        "manifold_groups",
        "the model must hold orthogonal matrices that are parameters",
        "Make it by on_manifold(model)",
        model=type(model).__name__,
    )
    others = [p for p in model.parameters() if id(p) not in matrices]
    groups: list[dict[str, object]] = [{"params": list(matrices.values())}]
    if others:
        groups.append({"params": others, "stiefel": False, **options})
    return groups
