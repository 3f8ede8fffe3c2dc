"""Dense matrices of layers: the ground truth that every promise is tested on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet._checks import positive_int, require

__all__ = [
    "Map",
    "dense_operator",
    "factory_kwargs",
    "jacobian",
    "orthogonality_error",
    "preserved",
    "singular_values",
]

Map = Callable[[Tensor], Tensor]


def check_map(owner: str, fn: Any, input_shape: Any, dtype: Any = None, atol: Any = None) -> None:
    """Refuse what is no map, no shape of a sample, no real dtype or no tolerance."""
    require(
        callable(fn) and not isinstance(fn, type),
        owner,
        "fn must be a module or a function of a batch",
        "Pass the layer itself, e.g. OrthoLinear(4, 4)",
        fn=fn,
    )
    good = isinstance(input_shape, (tuple, list)) and all(
        isinstance(n, int) and n >= 1 for n in input_shape
    )
    require(
        good,
        owner,
        "input_shape must be a tuple of positive sizes, without the batch dimension",
        "Pass e.g. (3, 8, 8)",
        input_shape=input_shape,
    )
    _checks.factory(owner, None, dtype)
    if atol is not None:
        _checks.in_range(owner, 0.0, float("inf"), atol=atol)


def evaluated(owner: str, fn: Map, x: Tensor) -> Tensor:
    """Return `fn(x)`; a shape that it does not take is named in one sentence."""
    try:
        return fn(x)
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        _checks.fail(
            owner,
            f"fn must take a batch of this shape and dtype ({reason})",
            "Pass the shape of one sample, without the batch dimension",
            input=x,
        )


@contextmanager
def preserved(fn: Map, train: bool = False) -> Iterator[None]:
    """Put a module in train or eval mode; afterwards restore modes and buffers, bit for bit."""
    if not isinstance(fn, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in fn.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in fn.buffers()]
    fn.train(train)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def factory_kwargs(fn: Map, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Device and dtype of the first floating tensor of a module, or the defaults of torch."""
    tensors = [*fn.parameters(), *fn.buffers()] if isinstance(fn, nn.Module) else []
    found = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    return {"device": found.device, "dtype": found.dtype if dtype is None else dtype}


@torch.no_grad()
def dense_operator(
    fn: Map,
    input_shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    batch: int = 256,
    train: bool = False,
) -> Tensor:
    r"""Return the matrix of the linear map \(x \mapsto f(x) - f(0)\).

    Column j is the image of the j-th unit vector. An affine map is recognized as such by one
    more evaluation; for another one use `jacobian`.

    Args:
        fn: A module or function of `(N, *input_shape)`, to `(N, ...)`.
        input_shape: Shape of a sample, without the batch dimension.
        dtype: Of the unit vectors; default that of the module. The module itself is not
            converted.
        batch: Unit vectors that are sent through `fn` at once.
        train: Evaluate a module in train mode. Modes and buffers are restored afterwards either
            way.

    Returns:
        The matrix, of shape (output numel, input numel).

    Raises:
        ValueError: `fn` is not affine, or does not keep the batch dimension.

    Examples:
        >>> dense_operator(torch.nn.AvgPool1d(2), (1, 4))
        tensor([[0.5000, 0.5000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.5000, 0.5000]])
    """
    check_map("dense_operator", fn, input_shape, dtype)
    positive_int("dense_operator", batch=batch)
    kwargs = factory_kwargs(fn, dtype)
    numel = torch.Size(input_shape).numel()
    with preserved(fn, train):
        zero = _rows(fn, torch.zeros(1, *input_shape, **kwargs))
        identity = torch.eye(numel, **kwargs).view(numel, *input_shape)
        images = torch.cat([_rows(fn, chunk) - zero for chunk in identity.split(batch)])
        probe = torch.cos(1.7 * torch.arange(numel, **kwargs)).view(1, *input_shape)
        observed = _rows(fn, probe) - zero
    predicted = probe.view(1, -1).to(images.dtype) @ images
    scale = (observed.norm() + zero.norm()).item()
    deviation = (observed - predicted).norm().item()
    eps, tiny = torch.finfo(images.dtype).eps, torch.finfo(images.dtype).tiny
    require(
        not deviation > eps**0.5 * max(scale, tiny),  # a map that is not finite passes
        "dense_operator",
        "the map must be affine",
        "Use orthonet.testing.jacobian at a point for a map that is not",
        deviation=deviation,
    )
    return images.T.contiguous()


def _rows(fn: Map, x: Tensor) -> Tensor:
    y = evaluated("dense_operator", fn, x)
    require(
        y.ndim >= 1 and len(y) == len(x),
        "dense_operator",
        "the map must keep the batch dimension",
        "Wrap it so that it maps (N, *input_shape) to (N, ...)",
        input=tuple(x.shape),
        output=tuple(y.shape),
    )
    return y.reshape(len(x), -1)


def jacobian(
    fn: Map,
    x: Tensor,  # (*input_shape)
    *,
    train: bool = False,
) -> Tensor:
    """Return the Jacobian matrix at one sample `x`, given without its batch dimension.

    Args:
        fn: As of [`dense_operator`][orthonet.testing.dense_operator].
        x: The point.
        train: As there.

    Returns:
        As there.

    Examples:
        >>> jacobian(torch.square, torch.tensor([1.0, 2.0]))
        tensor([[2., 0.],
                [0., 4.]])
    """
    _checks.floating("jacobian", x=x)
    check_map("jacobian", fn, tuple(x.shape))
    with preserved(fn, train), torch.enable_grad():
        matrix = torch.autograd.functional.jacobian(
            lambda row: evaluated("jacobian", fn, row.unsqueeze(0)).reshape(-1), x.detach()
        )
    return cast(Tensor, matrix).reshape(-1, x.numel())


def singular_values(
    fn: Map,
    input_shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    batch: int = 256,
    train: bool = False,
) -> Tensor:
    """Return the singular values of `dense_operator`, in descending order, computed in float64.

    Arguments are those of [`dense_operator`][orthonet.testing.dense_operator].

    Returns:
        The min(output numel, input numel) singular values; NaN if an entry is not finite.

    Examples:
        >>> singular_values(torch.nn.Upsample(scale_factor=4), (1, 2)).tolist()
        [2.0, 2.0]
    """
    matrix = dense_operator(fn, input_shape, dtype=dtype, batch=batch, train=train)
    if not torch.isfinite(matrix).all():
        return matrix.new_full((min(matrix.shape),), float("nan"), dtype=torch.float64)
    return torch.linalg.svdvals(matrix.double())


def orthogonality_error(
    w: Tensor,  # (*batch, m, n)
) -> float:
    r"""Return the largest \(|\sigma - 1|\) of a batch of matrices, in float64.

    It is 0 for semi-orthogonal matrices, and infinite if an entry is not finite.

    Examples:
        >>> orthogonality_error(torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        1.0
    """
    _checks.require(
        isinstance(w, Tensor) and (w.is_floating_point() or w.is_complex()),
        "orthogonality_error",
        "w must be a floating-point tensor",
        "Convert it, e.g. torch.as_tensor(w, dtype=torch.float32)",
        w=w,
    )
    _checks.weight_shape("orthogonality_error", tuple(w.shape), "the shape of w")
    if not torch.isfinite(w).all():
        return float("inf")
    return (torch.linalg.svdvals(w.detach().double()) - 1).abs().max().item()
