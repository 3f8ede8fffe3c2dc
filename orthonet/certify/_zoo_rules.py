"""Rules of the layers of the zoo: proved from the weights that they compute, in float64."""

from __future__ import annotations

import copy
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

_ROUNDING = up(1.0 + 2.0**-45)  # a chain of a few dozen roundings in float64


def _float64(module: nn.Module, tensor: Tensor) -> Tensor:
    tensor = tensor.detach().to("cpu", torch.float64)
    if not bool(tensor.isfinite().all()):
        _refuse(module, "weights and statistics must be finite", "Look for a NaN or an infinity")
    return tensor


def _exact_copy(module: nn.Module) -> Any:
    """The module in float64 on the CPU: what it computes from its parameters as they are."""
    twin = copy.deepcopy(module).to("cpu", torch.float64)
    for parameter in twin.parameters():
        _float64(module, parameter)  # refuses NaN and infinity
    return twin


def _image(module: nn.Module, input_shape: Shape) -> tuple[int, int]:
    if len(input_shape) != 3:
        _refuse(module, "the input must have a batch dimension", "Use x.unsqueeze(0)")
    return input_shape[1], input_shape[2]


def _blocks(module: Any, input_shape: Shape) -> tuple[Tensor, str]:
    """The symbol on the torus that the layer works on."""
    torus, _ = module._torus(_image(module, input_shape))
    size = tuple(n // module.stride[0] for n in torus)
    with torch.no_grad():
        blocks = _exact_copy(module).blocks(size)
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


@register_rule(layers.SandwichConv2d)
def _sandwich_conv(module: Any, input_shape: Shape) -> Step:
    blocks, text = _blocks(module, input_shape)
    norm = spectral_norm_bound(blocks)
    return upper(mul_up(norm, norm, module.lipschitz, _ROUNDING), f"|[A, B]|^2, {text}")


@register_rule(layers.SandwichLinear)
def _sandwich(module: Any, input_shape: Shape) -> Step:
    with torch.no_grad():
        a, b = _exact_copy(module).parametrization()
    norm = spectral_norm_bound(torch.cat([a, b], 1))
    return upper(mul_up(norm, norm, module.lipschitz, _ROUNDING), "|[A, B]|^2")


@register_rule(layers.SOCConv2d)
def _soc(module: Any, input_shape: Shape) -> Step:
    """The remainder of the series of a skew operator, from a proved norm of it."""
    size = _image(module, input_shape)
    twin = _exact_copy(module)
    with torch.no_grad():
        kernel, used = twin.parametrization()
    terms = module._number_of_terms(compute_dtype(module.parametrization.original.dtype))
    norm = convolution_norm_bound(
        kernel,
        size,
        padding=module._pad,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.padding_mode,
    ).value
    remainder = mul_up(up(math.pow(up(norm), terms)), 1.0 / math.factorial(terms), _ROUNDING)
    divided = 1.0 + float(used) ** terms / math.factorial(terms)
    value = mul_up(div_up(add_up(1.0, remainder), divided), module.lipschitz, _ROUNDING)
    return upper(value, f"series of {terms} terms at |L| <= {norm:.3g}")


def _step_of_descent(factor: float, norm: float) -> float:
    r"""Constant of x - 2 J^T T^{-1} s(J x + b) with s = |T^{-1/2} J|^2: 1, or 2 s - 1 beyond."""
    square = mul_up(norm, norm, _ROUNDING)
    return mul_up(factor, 1.0 if square <= 1.0 else add_up(mul_up(2.0, square), -1.0))


@register_rule(layers.CPLLinear, layers.SLLLinear)
def _residual_linear(module: Any, input_shape: Shape) -> Step:
    with torch.no_grad():
        weight, scale = _exact_copy(module).parametrization()
    norm = spectral_norm_bound(weight * (scale / 2).sqrt()[:, None])
    return upper(_step_of_descent(module.lipschitz, norm), f"|T^-1/2 J| = {norm:.6g}")


@register_rule(layers.CPLConv2d, layers.SLLConv2d)
def _residual_conv(module: Any, input_shape: Shape) -> Step:
    size = _image(module, input_shape)
    with torch.no_grad():
        weight, scale = _exact_copy(module).parametrization()
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
        gains = module.gains(_float64(module, module.running_var))
    return exact(mul_up(float(gains.abs().max()), _ROUNDING), "diagonal of running statistics")


@register_rule(layers.PrescaledResidual, nested=True)
def _prescaled(module: layers.PrescaledResidual, input_shape: Shape, bound_of: BoundOf) -> Step:
    branch: Bound = bound_of(module.branch, input_shape)
    if branch.value == 1.0:
        return upper(1.0, "branch 1")
    gain = float(_float64(module, module.gain))
    value = div_up(add_up(1.0, mul_up(gain, branch.value)), 1.0 + gain)
    return upper(mul_up(value, _ROUNDING), f"branch {branch.value:.6g}")
