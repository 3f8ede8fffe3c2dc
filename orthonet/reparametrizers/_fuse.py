"""`fuse`: one batched call for all small weights of a shape."""

from __future__ import annotations

import copy

import torch
from torch import nn

from orthonet import _checks
from orthonet.linalg import haar
from orthonet.linalg._matrix import compute_dtype
from orthonet.reparametrizers._cache import GROUP, invalidate
from orthonet.reparametrizers._group import Batch, Group, kind
from orthonet.reparametrizers._weight import OrthoWeight

__all__ = ["fuse", "unfuse"]


def fuse(module: nn.Module, *, largest: int = 256) -> list[tuple[str, ...]]:
    """Compute the orthogonal matrices of a model together: one batched call for each shape.

    When one of them is read for the first time after an optimizer step, all matrices of its shape
    are computed, from layers ([`OrthoWeight`][orthonet.reparametrizers.OrthoWeight]) and from the
    factors of kernels ([`OrthoKernel`][orthonet.reparametrizers.OrthoKernel]) alike, and so are
    their gradients in backward. Small matrices cost little more in a batch than one of them alone.
    Parameters, `state_dict` and results stay, up to rounding; copies and pickles stay fused.
    Batched are matrices of one shape, dtype, device, normalizer and orthogonalizer, in one mode
    (train or eval). It rests on the cache: where that is off or bypassed (torch.compile,
    torch.func), each layer computes for itself as before. A layer whose weight does not take part
    in the loss gets no gradient, as before; all the gradients of a batch arrive together, at the
    end of backward.

    Args:
        module: The model.
        largest: Matrices whose smaller side exceeds this stay alone: they fill the device as it is.

    Returns:
        The names of the matrices in each batch.

    Raises:
        ValueError: the normalizer or the orthogonalizer of some weights cannot be batched; nothing
            has been changed.

    Examples:
        >>> from orthonet.layers import OrthoLinear
        >>> fuse(torch.nn.Sequential(*(OrthoLinear(8, 8) for _ in range(3))))
        [('0.parametrization', '1.parametrization', '2.parametrization')]
    """
    _checks.positive_int("fuse", largest=largest)
    buckets: list[list[tuple[str, OrthoWeight]]] = []
    for name, weight in module.named_modules():
        if not isinstance(weight, OrthoWeight) or min(weight.shape[-2:]) > largest:
            continue
        _require_batchable(name, weight)
        common = kind(weight)
        for bucket in buckets:
            if kind(bucket[0][1]) == common:
                bucket.append((name, weight))
                break
        else:
            buckets.append([(name, weight)])
    buckets = [bucket for bucket in buckets if len(bucket) > 1]
    for bucket in buckets:
        _require_equal(*bucket[:2])
    unfuse(module)
    for bucket in buckets:
        group = Group()
        for _, weight in bucket:
            setattr(weight, GROUP, group)
            group.join(weight)
    invalidate(module)
    return [tuple(name for name, _ in bucket) for bucket in buckets]


def unfuse(module: nn.Module) -> None:
    """Undo [`fuse`][orthonet.fuse]: every matrix of `module` is computed by itself again."""
    for part in module.modules():
        if vars(part).pop(GROUP, None) is not None:
            invalidate(part)
    invalidate(module)


def _require_batchable(name: str, weight: OrthoWeight) -> None:
    """Parameters of the modules themselves, or buffers that are not per matrix, cannot be."""
    batch = weight.shape[:-2]
    for part in (*weight.normalizer.modules(), *weight.orthogonalizer.modules()):
        _checks.require(
            not part._parameters,
            "fuse",
            f"the modules that make the weight '{name}' must have no parameters of their own",
            "Fuse the other parts of the model",
            module=part,
        )
        for buffer, value in part._buffers.items():
            _checks.require(
                value is None or (value.ndim > len(batch) and value.shape[: len(batch)] == batch),
                "fuse",
                f"the buffer '{buffer}' of '{name}' must have one entry per matrix",
                "Give it the shape (*batch, ...), or fuse the other parts of the model",
                shape=None if value is None else tuple(value.shape),
            )


def _require_equal(*pair: tuple[str, OrthoWeight]) -> None:
    """Two copies, with random weights, must give the same alone and together."""
    weights = [copy.deepcopy(weight).eval() for _, weight in pair]
    if weights[0].original.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    for scale, weight in enumerate(weights, 1):
        shape, dtype = weight.shape, compute_dtype(weight.original.dtype)
        noise = torch.randn(shape, dtype=dtype, generator=generator) * 0.3 * shape[-1] ** -0.5
        start = haar(shape, dtype=dtype, generator=generator) + noise
        with torch.no_grad():
            weight.original.copy_(start * scale)
    with torch.no_grad():
        alone = [weight.compute() for weight in weights]
        together = Batch(weights).compute(weights, recorded=False).outputs
    errors = [float((a - b).abs().amax()) for a, b in zip(alone, together, strict=True)]
    _checks.require(
        max(errors) < 1e-3,
        "fuse",
        f"the modules that make '{pair[0][0]}' and '{pair[1][0]}' must treat each matrix of a "
        "batch alone",
        "Let them act on the last two dimensions",
        difference=max(errors),
    )
