"""Rules of the layers of the zoo, proved from the weights that their forward computes.

The weights are taken in the dtype of the layer, with the rounding that they have there, and their
norms are bounded in float64: a weight that was recomputed in float64 would be another layer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import layers
from orthonet.certify._bound import Bound
from orthonet.certify._module_rules import BoundOf, Shape, _refuse
from orthonet.certify._rules import REARRANGEMENT, Step, exact, register_rule, upper
from orthonet.linalg._matrix import compute_dtype
from orthonet.linalg._rounding import add_up, div_up, mul_up, up
from orthonet.linalg.convolution_bounds import convolution_norm_bound
from orthonet.linalg.enclosure import spectral_norm_bound

__all__: list[str] = []

# A chain of roundings in float64; entry by entry they change the norm of a matrix of rank r by at
# most sqrt(r) times as much, so that this covers 2^9 of them up to r = 10^6.
_ROUNDING = up(1.0 + 2.0**-33)


def _float64(module: nn.Module, tensor: Tensor) -> Tensor:
    high = torch.complex128 if tensor.is_complex() else torch.float64
    tensor = tensor.detach().to("cpu", high)
    if not bool(tensor.isfinite().all()):
        _refuse(module, "weights and statistics must be finite", "Look for a NaN or an infinity")
    return tensor


@torch.no_grad()
def _deployed(module: Any, *size: Any) -> list[Tensor]:
    """What the parametrization of the module computes, as forward takes it."""
    found = module.parametrization(*size)
    return [_float64(module, t) for t in (found if isinstance(found, tuple) else (found,))]


def _image(module: nn.Module, input_shape: Shape) -> tuple[int, int]:
    if len(input_shape) != 3:
        _refuse(module, "the input must have a batch dimension", "Use x.unsqueeze(0)")
    return input_shape[1], input_shape[2]


def _blocks(module: Any, input_shape: Shape) -> tuple[Tensor, str]:
    """The symbol on the torus that the layer works on."""
    torus, _ = module._torus(_image(module, input_shape))
    (blocks,) = _deployed(module, tuple(n // module.stride[0] for n in torus))
    return blocks, "{} Fourier blocks {}x{}".format(blocks.shape[1], *blocks.shape[2:])


@register_rule(layers.CayleyConv2d, layers.LOTConv2d, layers.BROConv2d)
def _fourier(module: Any, input_shape: Shape) -> Step:
    blocks, text = _blocks(module, input_shape)
    value = mul_up(spectral_norm_bound(blocks), module.lipschitz, _ROUNDING)
    inside = module.in_channels // module.groups * module.stride[0] ** 2
    same = blocks.shape[-1] == inside and blocks.shape[-2] * module.groups == module.out_channels
    if module.padding_mode == "circular" and same:
        return exact(value, text)
    return upper(value, text)


# For any A and B, s of slopes in [0, 1] and positive D, x -> sqrt2 K A* D s(sqrt2 D^-1 B x + b) has
# the constant K N with N = |[A, B]|^2: u = D ds has |u|^2 <= sqrt2 <u, B dx>, and
# |A* u|^2 <= N |u|^2 - |B* u|^2, so |dy|^2 <= 2 K^2 max_w (sqrt2 N <w, dx> - |w|^2), which is
# K^2 N^2 |dx|^2.


@register_rule(layers.SandwichConv2d)
def _sandwich_conv(module: Any, input_shape: Shape) -> Step:
    blocks, text = _blocks(module, input_shape)
    split = module.out_channels // module.groups
    with torch.no_grad():  # as forward multiplies by them: their product is 2 up to rounding
        like = torch.empty((), dtype=compute_dtype(module.parametrization.original.dtype))
        up_, down = (_float64(module, module._scale(sign, like)) for sign in (1, -1))
    product = (up_ * down / 2).view(module.groups, 1, 1, split)
    blocks = torch.cat([blocks[:, :, :split], blocks[:, :, split:] * product], 2)
    norm = spectral_norm_bound(blocks)
    return upper(mul_up(norm, norm, module.lipschitz, _ROUNDING), f"|[A, B]|^2, {text}")


@register_rule(layers.SandwichLinear)
def _sandwich(module: Any, input_shape: Shape) -> Step:
    with torch.no_grad():
        outer, inner = (_float64(module, factor) for factor in module.factors())
        scale = _float64(module, module.log_scale).clamp(-20.0, 20.0).exp()
    a = outer.mT / (math.sqrt(2) * module.lipschitz) / scale[:, None]
    b = inner * (scale / math.sqrt(2))[:, None]
    norm = spectral_norm_bound(torch.cat([a, b], 1))
    return upper(mul_up(norm, norm, module.lipschitz, _ROUNDING), "|[A, B]|^2")


@register_rule(layers.SOCConv2d)
def _soc(module: Any, input_shape: Shape) -> Step:
    """The remainder of the series of a skew operator, from a proved norm of it."""
    size = _image(module, input_shape)
    with torch.no_grad():
        kernel, used = module.parametrization()
        terms = module._number_of_terms(kernel.dtype)
        divided = module.lipschitz / (1.0 + used**terms / math.factorial(terms))
    factor = float(_float64(module, divided))
    kernel = _float64(module, kernel)
    grouped = kernel.unflatten(0, (module.groups, -1))
    if not torch.equal(grouped, -grouped.transpose(1, 2).flip(-2, -1)):
        _refuse(module, "the kernel must be skew", "Make it by L = M - M^T, as the layer does")
    norm = convolution_norm_bound(
        kernel,
        size,
        padding=module._pad,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.padding_mode,
    ).value
    remainder = mul_up(up(math.pow(up(norm), terms)), 1.0 / math.factorial(terms), _ROUNDING)
    value = mul_up(add_up(1.0, remainder), factor)
    return upper(value, f"series of {terms} terms at |L| <= {norm:.3g}")


def _step_of_descent(factor: float, norm: float) -> float:
    r"""Constant of x - 2 J^T T^{-1} s(J x + b) with s = |T^{-1/2} J|^2: 1, or 2 s - 1 beyond."""
    square = mul_up(norm, norm, _ROUNDING)
    return mul_up(factor, 1.0 if square <= 1.0 else add_up(mul_up(2.0, square), -1.0))


@register_rule(layers.CPLLinear, layers.SLLLinear)
def _residual_linear(module: Any, input_shape: Shape) -> Step:
    weight, scale = _deployed(module)
    norm = spectral_norm_bound(weight * (scale / 2).sqrt()[:, None])
    return upper(_step_of_descent(module.lipschitz, norm), f"|T^-1/2 J| = {norm:.6g}")


@register_rule(layers.CPLConv2d, layers.SLLConv2d)
def _residual_conv(module: Any, input_shape: Shape) -> Step:
    size = _image(module, input_shape)
    weight, scale = _deployed(module)
    norm = convolution_norm_bound(
        weight * (scale / 2).sqrt().view(-1, 1, 1, 1),
        size,
        padding=module._pad,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.padding_mode,
    ).value
    return upper(_step_of_descent(module.lipschitz, norm), f"|T^-1/2 J| = {norm:.6g}")


@register_rule(layers.LipNeXtBlock2d)
def _lipnext(module: Any, input_shape: Shape) -> Step:
    _image(module, input_shape)
    with torch.no_grad():  # as forward computes them, in its dtype
        rotation, mixing = module.rotation.compute(), module.mixing.compute()
        mixing = _float64(module, mixing @ rotation.mT)
    rotation = _float64(module, rotation)
    norms = spectral_norm_bound(rotation), spectral_norm_bound(mixing)
    return upper(mul_up(*norms, module.lipschitz, _ROUNDING), "shift between orthogonal mixings")


@register_rule(layers.SpatialShift2d)
def _shift(module: layers.SpatialShift2d, input_shape: Shape) -> Step:
    _image(module, input_shape)
    if module.padding_mode == "circular":
        return exact(1.0, REARRANGEMENT)
    return upper(1.0, "selection of entries")


@register_rule(layers.FullSort, layers.BetaAbs, layers.NActivation, layers.HouseholderActivation2)
def _isometric(module: Any, input_shape: Shape) -> Step:
    if module.dim % (len(input_shape) + 1) == 0:
        _refuse(module, "the channels must not be the batch", "Choose another dim")
    turned = isinstance(module, layers.HouseholderActivation2)
    return upper(up(1.0 + 2.0**-48) if turned else 1.0, "pieces of isometries")


@register_rule(layers.ChannelShuffle)
def _shuffle(module: layers.ChannelShuffle, input_shape: Shape) -> Step:
    if module.dim % (len(input_shape) + 1) == 0:
        _refuse(module, "the channels must not be the batch", "Choose another dim")
    return exact(1.0, REARRANGEMENT)


@register_rule(layers.SoftHuber)
def _soft_huber(module: nn.Module, input_shape: Shape) -> Step:
    return upper(1.0, "slope in (-1, 1)")


@register_rule(layers.Scale)
def _scale(module: layers.Scale, input_shape: Shape) -> Step:
    return exact(abs(module.factor), "factor")


@register_rule(layers.BatchLipNorm1d, layers.BatchLipNorm2d, layers.BatchLipNorm3d)
def _batch_lip_norm(module: Any, input_shape: Shape) -> Step:
    with torch.no_grad():
        gains = _float64(module, module.gains())
    return exact(float(gains.abs().max()), "diagonal of running statistics")


@register_rule(layers.PrescaledResidual, nested=True)
def _prescaled(module: layers.PrescaledResidual, input_shape: Shape, bound_of: BoundOf) -> Step:
    branch: Bound = bound_of(module.branch, input_shape)
    if branch.value == 1.0:
        return upper(1.0, "branch 1")
    gain = float(_float64(module, module.gain))
    value = div_up(add_up(1.0, mul_up(gain, branch.value)), 1.0 + gain)
    return upper(mul_up(value, _ROUNDING), f"branch {branch.value:.6g}")
