"""Rules of the layers of the zoo, proved from the weights that their forward computes.

The weights are taken in the dtype of the layer, with the rounding that they have there, and their
norms are bounded in float64: a weight that was recomputed in float64 would be another layer.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import layers
from orthonet.certify._norms import conv_norm
from orthonet.certify._rules import (
    COPY,
    REARRANGEMENT,
    Rounding,
    Step,
    exact,
    register_rule,
    upper,
)
from orthonet.certify._sizes import (
    Chained,
    absolute_convolution,
    absolute_matrix,
    fourier_roundings,
)
from orthonet.certify.ops.modules import Shape
from orthonet.certify.ops.modules import refuse_module as _refuse
from orthonet.linalg._matrix import compute_dtype
from orthonet.linalg._rounding import add_up, mul_up, up
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


def _image(module: nn.Module, input_shape: Shape) -> tuple[int, int]:
    if len(input_shape) != 3:
        _refuse(module, "the input must have a batch dimension", "Use x.unsqueeze(0)")
    return input_shape[1], input_shape[2]


def _length(bias: Tensor | None, repeats: int = 1) -> float:
    """The norm of a bias that is added at so many places."""
    return 0.0 if bias is None else float(bias.detach().double().norm()) * repeats**0.5 * _ROUNDING


def _at_zero(module: Any, entries: int) -> float:
    """The norm of so many values of the activation at zero."""
    at_zero = float(module.activation(torch.zeros(1, dtype=torch.float64)).abs())
    return at_zero * entries**0.5 * _ROUNDING


# --- layers that work at each frequency --------------------------------------------------------


def _blocks(module: Any, input_shape: Shape) -> tuple[Tensor, tuple[int, int], str]:
    """The symbol on the torus that the layer works on, as the transforms of forward apply it.

    The inverse transform takes the Hermitian part of the first and of the last column of
    frequencies; elsewhere each block is applied as it is.
    """
    torus, _ = module._torus(_image(module, input_shape))
    size = (torus[0] // module.stride[0], torus[1] // module.stride[0])
    with torch.no_grad():
        blocks = _float64(module, module.blocks(size))
    grid = blocks.unflatten(1, (size[0], size[1] // 2 + 1)).clone()
    opposite = -torch.arange(size[0]) % size[0]
    for column in {0} | ({size[1] // 2} if size[1] % 2 == 0 else set()):
        own = grid[:, :, column]
        grid[:, :, column] = (own + own[:, opposite].conj()) / 2
    text = "{} Fourier blocks {}x{}".format(blocks.shape[1], *blocks.shape[2:])
    return grid.flatten(1, 2), size, text


def _fourier_chain(chain: Chained, blocks: Tensor, size: tuple[int, int]) -> Chained | None:
    """Behind two transforms and the blocks between them, whose half spectrum counts twice."""
    transform = fourier_roundings(size)
    if transform is None:
        return None
    return chain.map(2.0 * absolute_matrix(blocks), 2.0 * transform + 4.0 * blocks.shape[-1] + 16.0)


def _finished(module: Any, chain: Chained | None, bias: float = 0.0) -> Rounding | None:
    """The factor K and the bias."""
    return None if chain is None else chain.map(module.lipschitz, 1.0, bias).rounding()


@register_rule(layers.CayleyConv2d, layers.LOTConv2d, layers.BROConv2d)
def _fourier(module: Any, input_shape: Shape) -> Step:
    blocks, size, text = _blocks(module, input_shape)
    value = mul_up(spectral_norm_bound(blocks), module.lipschitz, _ROUNDING)
    inside = module.in_channels // module.groups * module.stride[0] ** 2
    same = blocks.shape[-1] == inside and blocks.shape[-2] * module.groups == module.out_channels
    chain = _fourier_chain(Chained(), blocks, size)
    rounding = _finished(module, chain, _length(module.bias, math.prod(size)))
    if module.padding_mode == "circular" and same:
        return exact(value, text, rounding)
    return upper(value, text, rounding)


# For any A and B, s of slopes in [0, 1] and positive D, x -> sqrt2 K A* D s(sqrt2 D^-1 B x + b) has
# the constant K N with N = |[A, B]|^2: u = D ds has |u|^2 <= sqrt2 <u, B dx>, and
# |A* u|^2 <= N |u|^2 - |B* u|^2, so |dy|^2 <= 2 K^2 max_w (sqrt2 N <w, dx> - |w|^2), which is
# K^2 N^2 |dx|^2.


@register_rule(layers.SandwichConv2d)
def _sandwich_conv(module: Any, input_shape: Shape) -> Step:
    blocks, size, text = _blocks(module, input_shape)
    width = module.out_channels // module.groups
    with torch.no_grad():
        like = torch.empty(0, dtype=compute_dtype(module.parametrization.original.dtype))
        inner, outer = (_float64(module, module._scale(sign, like)) for sign in (-1, 1))
    inner, outer = (t.view(module.groups, 1, 1, width) for t in (inner, outer))
    # The product of both scales is 2 up to their rounding, which is counted as one of B.
    a, b = blocks[:, :, :width], blocks[:, :, width:]
    norm = mul_up(spectral_norm_bound(torch.cat([a, b * (inner * outer / 2)], 2)), _ROUNDING)
    pixels = math.prod(size)
    chain = _fourier_chain(Chained(), (b * inner).mH, size)
    if chain is not None:
        hidden = chain.map(1.0, 2.0, _length(module.bias, pixels))
        hidden = hidden.activation(_at_zero(module, module.out_channels * pixels))
        chain = _fourier_chain(hidden, a * outer, size)
    rounding = _finished(module, chain)
    return upper(mul_up(norm, norm, module.lipschitz, _ROUNDING), f"|[A, B]|^2, {text}", rounding)


# --- layers that contain their activation ------------------------------------------------------


@register_rule(layers.SandwichLinear)
def _sandwich(module: Any, input_shape: Shape) -> Step:
    with torch.no_grad():
        outer, inner = (_float64(module, w) for w in module.factors())
        psi = _float64(module, module.log_scale).clamp(-20.0, 20.0).exp()
    root = math.sqrt(2.0)
    a, b = outer.mT / (psi[:, None] * root * module.lipschitz), inner * (psi[:, None] / root)
    norm = mul_up(spectral_norm_bound(torch.cat([a, b], 1)), _ROUNDING)
    chain = Chained().map(absolute_matrix(inner), inner.shape[1] + 1.0, _length(module.bias))
    chain = chain.activation(_at_zero(module, inner.shape[0]))
    chain = chain.map(absolute_matrix(outer), outer.shape[1] + 1.0)
    value = mul_up(norm, norm, module.lipschitz, _ROUNDING)
    return upper(value, "|[A, B]|^2", _rows(chain.rounding(), input_shape))


def _rows(rounding: Rounding, input_shape: Shape) -> Rounding:
    """With the offset of one row for all rows of a sample."""
    return rounding._replace(
        offset=rounding.offset * math.prod(input_shape[:-1]) ** 0.5 * _ROUNDING
    )


def _step_of_descent(factor: float, norm: float) -> float:
    r"""Constant of x - 2 J^T T^{-1} s(J x + b) with s = |T^{-1/2} J|^2: 1, or 2 s - 1 beyond."""
    square = mul_up(norm, norm, _ROUNDING)
    return mul_up(factor, 1.0 if square <= 1.0 else add_up(mul_up(2.0, square), -1.0))


def _weights(module: Any) -> tuple[Tensor, Tensor]:
    """The two tensors of the parametrization as forward computes them, in float64."""
    with torch.no_grad():
        first, second = module.parametrization()
    return _float64(module, first), _float64(module, second)


@register_rule(layers.CPLLinear, layers.SLLLinear)
def _residual_linear(module: Any, input_shape: Shape) -> Step:
    weight, scale = _weights(module)
    norm = spectral_norm_bound(weight * (scale / 2).sqrt()[:, None])
    chain = Chained().map(absolute_matrix(weight), weight.shape[1] + 1.0, _length(module.bias))
    chain = chain.activation(_at_zero(module, weight.shape[0]))
    chain = chain.map(absolute_matrix(weight * scale[:, None]), weight.shape[0] + 2.0)
    rounding = Chained().plus(chain).map(module.lipschitz, 1.0).rounding()
    value = _step_of_descent(module.lipschitz, norm)
    return upper(value, f"|T^-1/2 J| = {norm:.6g}", _rows(rounding, input_shape))


@register_rule(layers.CPLConv2d, layers.SLLConv2d)
def _residual_conv(module: Any, input_shape: Shape) -> Step:
    size = _image(module, input_shape)
    weight, scale = _weights(module)
    scale = scale.view(-1, 1, 1, 1)
    norm = conv_norm(
        weight * (scale / 2).sqrt(),
        size,
        padding=module._pad,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.padding_mode,
    ).value
    pixels, hidden = math.prod(size), weight.shape[0]
    first = absolute_convolution(weight, module.groups)
    second = absolute_convolution(weight * scale, module.groups)
    terms = float(weight[0].numel())
    chain = Chained().map(first, terms + 1.0, _length(module.bias, pixels))
    chain = chain.activation(_at_zero(module, hidden * pixels))
    chain = chain.map(second, terms * hidden / (weight.shape[1] * module.groups) + 2.0)
    rounding = Chained().plus(chain).map(module.lipschitz, 1.0).rounding()
    return upper(_step_of_descent(module.lipschitz, norm), f"|T^-1/2 J| = {norm:.6g}", rounding)


@register_rule(layers.SOCConv2d)
def _soc(module: Any, input_shape: Shape) -> Step:
    """The remainder of the series of a skew operator, from a proved norm of it."""
    size = _image(module, input_shape)
    with torch.no_grad():
        deployed, used = module.parametrization()
        factor = float(_float64(module, module.factor(used)))
    kernel = _float64(module, deployed)
    grouped = kernel.unflatten(0, (module.groups, -1))
    if not torch.equal(grouped, -grouped.transpose(1, 2).flip(-2, -1)):
        _refuse(module, "the kernel must be skew", "Make it by L = M - M^T, as the layer does")
    terms = module._number_of_terms(deployed.dtype)
    norm = conv_norm(
        kernel,
        size,
        padding=module._pad,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.padding_mode,
    ).value
    remainder = mul_up(up(math.pow(up(norm), terms)), 1.0 / math.factorial(terms), _ROUNDING)
    value = mul_up(add_up(1.0, remainder), factor, _ROUNDING)
    series = math.exp(absolute_convolution(kernel, module.groups))
    count = terms * (kernel[0].numel() + 3.0)
    chain = replace(Chained().map(series, count), stages=terms)
    rounding = chain.map(factor, 1.0, _length(module.bias, math.prod(size))).rounding()
    return upper(value, f"series of {terms} terms at |L| <= {norm:.3g}", rounding)


@register_rule(layers.LipNeXtBlock2d)
def _lipnext(module: Any, input_shape: Shape) -> Step:
    size = _image(module, input_shape)
    with torch.no_grad():  # as forward computes them, in its dtype
        rotation, mixing = module.rotation.compute(), module.mixing.compute()
        mixing = _float64(module, mixing @ rotation.mT)
    rotation = _float64(module, rotation)
    norms = spectral_norm_bound(rotation), spectral_norm_bound(mixing)
    chain = Chained().map(absolute_matrix(rotation), float(len(rotation)))
    bias = _length(module.bias, math.prod(size))
    chain = chain.map(absolute_matrix(mixing), len(mixing) + 1.0, bias).map(module.lipschitz, 1.0)
    value = mul_up(*norms, module.lipschitz, _ROUNDING)
    return upper(value, "shift between orthogonal mixings", chain.rounding())


@register_rule(layers.SpatialShift2d)
def _shift(module: layers.SpatialShift2d, input_shape: Shape) -> Step:
    _image(module, input_shape)
    if module.padding_mode == "circular":
        return exact(1.0, REARRANGEMENT, COPY)
    return upper(1.0, "selection of entries", COPY)


@register_rule(layers.FullSort, layers.BetaAbs, layers.NActivation, layers.HouseholderActivation2)
def _isometric(module: Any, input_shape: Shape) -> Step:
    if module.dim % (len(input_shape) + 1) == 0:
        _refuse(module, "the channels must not be the batch", "Choose another dim")
    rounding: float | Rounding | None = COPY
    if isinstance(module, layers.NActivation):
        shifts = module.theta.abs().amax(0)
        repeats = math.prod(input_shape) // max(1, shifts.numel())
        rounding = Rounding(2.0, 1.0, 2.0 * _length(shifts, repeats))
    if isinstance(module, layers.HouseholderActivation2):
        # For exact angles; that sines and cosines and the choice of the sector round is counted
        # with the forward pass, relative to the largest angle.
        angle = float(module.theta.detach().abs().max()) + 2.0 * math.pi
        rounding = Rounding(128.0, 4.0 * (1.0 + angle))
    return upper(1.0, "pieces of isometries", rounding)


@register_rule(layers.ChannelShuffle)
def _shuffle(module: layers.ChannelShuffle, input_shape: Shape) -> Step:
    if module.dim % (len(input_shape) + 1) == 0:
        _refuse(module, "the channels must not be the batch", "Choose another dim")
    return exact(1.0, REARRANGEMENT, COPY)


@register_rule(layers.SoftHuber)
def _soft_huber(module: nn.Module, input_shape: Shape) -> Step:
    rounding = Rounding(64.0, 2.0, 2.0 * math.prod(input_shape) ** 0.5)
    return upper(1.0, "slope in (-1, 1)", rounding)


@register_rule(layers.Scale)
def _scale(module: layers.Scale, input_shape: Shape) -> Step:
    return exact(abs(module.factor), "factor", 1.0)


@register_rule(layers.BatchLipNorm1d, layers.BatchLipNorm2d, layers.BatchLipNorm3d)
def _batch_lip_norm(module: Any, input_shape: Shape) -> Step:
    with torch.no_grad():
        gains = _float64(module, module.gains())  # as forward computes them
        mean = _float64(module, module.running_mean)
    largest, repeats = float(gains.abs().max()), math.prod(input_shape[1:])
    offset = _length(gains * mean, repeats) + _length(module.bias, repeats)
    return exact(largest, "diagonal of running statistics", Rounding(4.0, largest, offset))
