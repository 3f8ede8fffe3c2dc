"""Rules of modules that are not looked into: their weights are read as they are deployed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor, nn

from orthonet import _checks, layers
from orthonet.certify._bound import Bound
from orthonet.certify._rules import Step, exact, register_rule, upper
from orthonet.certify._spatial_rules import convolution_step, transposed_step
from orthonet.errors import UncertifiableError
from orthonet.linalg._rounding import add_up, div_up, mul_up, sqrt_up, up
from orthonet.linalg.enclosure import spectral_norm_bound

__all__: list[str] = []

Shape = tuple[int, ...]
BoundOf = Callable[[nn.Module, Shape], Bound]


def _refuse(module: nn.Module, requirement: str, advice: str) -> NoReturn:
    _checks.fail(module, requirement, advice, UncertifiableError)


def _float64(module: nn.Module, tensor: Tensor) -> Tensor:
    tensor = tensor.detach().to("cpu", torch.float64)
    if not bool(tensor.isfinite().all()):
        _refuse(module, "weights and statistics must be finite", "Look for a NaN or an infinity")
    return tensor


@register_rule(nn.Linear)
def _linear(module: nn.Linear, input_shape: Shape) -> Step:
    weight = _float64(module, module.weight)
    rows = weight if len(input_shape) == 1 else None
    method = "matrix {}x{}, verified".format(*weight.shape)
    return Step((Bound(spectral_norm_bound(weight), kind="exact"),), method, rows=rows)


@register_rule(
    nn.Conv1d, nn.Conv2d, nn.Conv3d, layers.OrthoConv1d, layers.OrthoConv2d, layers.OrthoConv3d
)
def _convolution(module: nn.Conv2d, input_shape: Shape) -> Step:
    if len(input_shape) != len(module.kernel_size) + 1:
        _refuse(module, "the input must have a batch dimension", "Use x.unsqueeze(0)")
    return convolution_step(
        _float64(module, module.weight),
        input_shape[1:],
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        module.padding_mode,
    )


@register_rule(
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    layers.OrthoConvTranspose1d,
    layers.OrthoConvTranspose2d,
    layers.OrthoConvTranspose3d,
)
def _transposed(module: nn.ConvTranspose2d, input_shape: Shape) -> Step:
    if len(input_shape) != len(module.kernel_size) + 1:
        _refuse(module, "the input must have a batch dimension", "Use x.unsqueeze(0)")
    axes = zip(
        input_shape[1:], module.kernel_size, module.stride, module.padding, module.dilation,
        module.output_padding, strict=True,
    )  # fmt: skip
    output_size = [
        (n - 1) * s - 2 * int(p) + d * (k - 1) + extra + 1 for n, k, s, p, d, extra in axes
    ]
    return transposed_step(
        _float64(module, module.weight),
        output_size,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        module.padding_mode,
    )


@register_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def _batch_norm(module: nn.BatchNorm2d, input_shape: Shape) -> Step:
    if module.running_var is None:
        _refuse(
            module,
            "normalization must use running statistics, not those of the batch",
            "Use track_running_stats=True and train it again",
        )
    variance = _float64(module, module.running_var) + module.eps
    if not bool((variance > 0).all()):
        _refuse(module, "running_var + eps must be positive", "Use a positive eps")
    scale = variance.rsqrt()
    if module.weight is not None:
        scale = scale * _float64(module, module.weight).abs()
    # Four roundings of a non-negative number.
    return exact(mul_up(float(scale.max()), up(1.0 + 2.0**-49)), "diagonal of running statistics")


@register_rule(layers.Normalize)
def _normalize(module: layers.Normalize, input_shape: Shape) -> Step:
    smallest = float(_float64(module, module.std).abs().min())
    return exact(div_up(1.0, smallest) if smallest else float("inf"), "1 / min(std)")


@register_rule(layers.LayerCentering)
def _layer_centering(module: layers.LayerCentering, input_shape: Shape) -> Step:
    rank = len(input_shape) + 1
    if any(dim % rank == 0 for dim in module.dim):
        _refuse(module, "the mean must not be taken over the batch", "Choose feature dimensions")
    return exact(1.0, "orthogonal projection")


@register_rule(layers.BatchCentering1d, layers.BatchCentering2d, layers.BatchCentering3d)
def _batch_centering(module: nn.Module, input_shape: Shape) -> Step:
    return exact(1.0, "shift in eval mode")


@register_rule(
    layers.AdaptiveL2NormPool1d,
    layers.AdaptiveL2NormPool2d,
    layers.AdaptiveL2NormPool3d,
    layers.AdaptiveScaledAvgPool1d,
    layers.AdaptiveScaledAvgPool2d,
    layers.AdaptiveScaledAvgPool3d,
)
def _adaptive_pool(module: nn.Module, input_shape: Shape) -> Step:
    if len(input_shape) < len(module.output_size):  # type: ignore[arg-type]
        _refuse(module, "the input must have a batch dimension", "Use x.unsqueeze(0)")
    # The scale is a float that was computed in a few roundings.
    return upper(up(1.0 + 2.0**-48), "by construction")


@register_rule(layers.ConvexResidual, nested=True)
def _convex(module: layers.ConvexResidual, input_shape: Shape, bound_of: BoundOf) -> Step:
    branch = bound_of(module.branch, input_shape)
    alpha = module.alpha  # the two factors are rounded apart, in the dtype of the layer
    kept, changed = (float(_float64(module, t).abs().max()) for t in (1 - alpha, alpha))
    return upper(add_up(kept, mul_up(changed, branch.value)), f"branch {branch.value:.6g}")


@register_rule(layers.AdditiveResidual, nested=True)
def _additive(module: layers.AdditiveResidual, input_shape: Shape, bound_of: BoundOf) -> Step:
    branch = bound_of(module.branch, input_shape)
    return upper(mul_up(0.5, add_up(1.0, branch.value)), f"branch {branch.value:.6g}")


@register_rule(layers.L2NormResidual, nested=True)
def _l2_norm(module: layers.L2NormResidual, input_shape: Shape, bound_of: BoundOf) -> Step:
    branch = bound_of(module.branch, input_shape)
    if branch.value == 1.0:
        return upper(1.0, "branch 1")
    square = mul_up(0.5, add_up(1.0, mul_up(branch.value, branch.value)))
    return upper(sqrt_up(square), f"branch {branch.value:.6g}")


@register_rule(layers.ConcatResidual, nested=True)
def _concat(module: layers.ConcatResidual, input_shape: Shape, bound_of: BoundOf) -> Step:
    rank = len(input_shape) + 1
    place = module.dim % rank
    if place == 0:
        _refuse(module, "the halves must not be taken along the batch", "Choose another dim")
    half = list(input_shape)
    half[place - 1] //= 2
    branch = bound_of(module.branch, tuple(half))
    return upper(max(1.0, branch.value), f"branch {branch.value:.6g}")
