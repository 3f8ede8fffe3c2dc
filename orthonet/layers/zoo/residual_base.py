r"""Residual layers with the nonlinearity inside: what CPL and SLL share.

Both are \(y = x - 2 J^\top T^{-1} s(J x + b)\).

With a diagonal \(T \succeq J J^\top\) and an activation s of slopes in [0, 1] this is 1-Lipschitz:
it is a step of gradient descent on a convex function. CPL takes a multiple of the identity, SLL
one number for each row.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from orthonet import _checks
from orthonet.layers._base import add_bias
from orthonet.layers._declared import (
    SAFE,
    Declared,
    Norms,
    at_zero,
    float64,
    image_of,
    length_of,
    of_rows,
)
from orthonet.layers.children import Child
from orthonet.layers.zoo._base import (
    CachedParts,
    InnerWeight,
    SameSizeConv2d,
    delta_orthogonal,
    match_channels,
)
from orthonet.linalg.bounds.rounding import add_up, mul_up
from orthonet.linalg.bounds.sizes import Chained, absolute_convolution, absolute_matrix
from orthonet.linalg.matrix import compute_dtype
from orthonet.linalg.rescaling import convolution_norm_upper, gershgorin_scale
from orthonet.reparametrizers.weight import settled

__all__ = ["ACTIVATIONS", "SLOPED", "ResidualConv2d", "ResidualLinear", "SlopedWeight"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,  # slopes in [0, 1 / 4]
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}
SLOPED = {"activation": Child(tuple(ACTIVATIONS.values()), {"beta": 1.0, "threshold": 20.0})}
"""What a bound that needs slopes in [0, 1] relies on."""


class SlopedWeight(CachedParts):
    r"""The matrix or kernel J of a residual layer, and the diagonal of \(T \succeq J J^\top\).

    Returns J and \(2 / t\), both in float32 at least; rows with t = 0 are zero and get 0.
    """

    log_scale: Tensor | None

    def __init__(
        self,
        shape: tuple[int, ...],
        groups: int,
        free: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.original = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        scale = nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype)) if free else None
        self.register_parameter("log_scale", scale)
        self.reset_parameters()

    def _shapes(self) -> tuple[torch.Size, ...]:
        return self.original.shape, self.original.shape[:1]

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return J and 2 / t."""
        stored = settled(self.original)
        with torch.autocast(stored.device.type, enabled=False):
            weight = stored.to(compute_dtype(stored.dtype))
            largest = weight.abs().amax()  # differentiated, because a bias shows the scale
            weight = weight / torch.where(largest > 0, largest, torch.ones_like(largest))
            if self.log_scale is None:
                bound = convolution_norm_upper(weight, groups=self.groups)
                t = (bound * bound).expand(weight.shape[0])
            else:
                log_q = settled(self.log_scale).to(weight.dtype)
                q = (log_q - log_q.detach().amax()).clamp_min(-30.0).exp()
                t = gershgorin_scale(weight, groups=self.groups, weights=q)
            positive = t > 0
            return weight, torch.where(positive, 2 / torch.where(positive, t, 1.0), 0.0)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw J anew, orthogonal in its central tap; nothing happens on the meta device."""
        if self.original.is_meta:
            return
        kernel = self.original
        dtype = compute_dtype(kernel.dtype)
        kernel.copy_(
            delta_orthogonal(kernel.shape, groups=self.groups, dtype=dtype, device=kernel.device)
        )
        kernel.add_(torch.randn_like(kernel), alpha=0.1 * kernel[0].numel() ** -0.5)
        if self.log_scale is not None:
            self.log_scale.zero_()

    def extra_repr(self) -> str:
        return f"shape={tuple(self.original.shape)}"


class _Residual(InnerWeight):
    """What the four layers share."""

    relies_on = SLOPED
    parametrization: SlopedWeight
    activation: nn.Module

    def _finish(
        self,
        hidden: int,
        activation: str,
        bias: bool,
        lipschitz: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        owner = type(self)
        _checks.one_of(owner, tuple(ACTIVATIONS), activation=activation)
        self._set_constant(lipschitz)
        self.activation = ACTIVATIONS[activation]()
        add_bias(self, bias, hidden, device, dtype)


class _PlainResidual(nn.Module):
    """The residual of stock layers that is traced for export."""

    def __init__(
        self,
        inner: nn.Module,
        activation: nn.Module,
        outer: nn.Module,
        match: tuple[Any, Any, float],
        reduction: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.inner, self.activation, self.outer, self.match = inner, activation, outer, match
        self.reduction = reduction

    def forward(self, x: Tensor) -> Tensor:
        before, after, factor = self.match
        if before:
            x = nn.functional.pad(x, before)
        y = x - self.outer(self.activation(self.inner(x)))
        if self.reduction is not None:
            y = self.reduction(y)
        if factor != 1.0:
            y = y * factor
        return y.narrow(*after) if after else y


def _matching(
    width: int, sizes: tuple[int, int], dim: int, factor: float
) -> tuple[Any, Any, float]:
    before = [0, 0] * (-dim - 1) + [0, width - sizes[0]] if width > sizes[0] else None
    return before, (dim, 0, sizes[1]) if width > sizes[1] else None, factor


class ResidualLinear(_Residual):
    """CPL and SLL on vectors."""

    _free = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        hidden_features: int | None = None,
        activation: str = "relu",
        lipschitz: float = 1.0,
    ) -> None:
        super().__init__()
        owner = type(self)
        _checks.positive_int(owner, in_features=in_features, out_features=out_features)
        self.in_features = in_features
        self.out_features = out_features
        width = max(in_features, out_features)
        hidden = width if hidden_features is None else hidden_features
        _checks.positive_int(owner, hidden_features=hidden)
        _checks.factory(owner, device, dtype)
        self.parametrization = SlopedWeight((hidden, width), 1, self._free, device, dtype)
        self._finish(hidden, activation, bias, lipschitz, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to the last dimension of `input`."""
        _checks.channels(self, input, self.in_features, -1)
        weight, scale = self.parametrization()
        with torch.autocast(input.device.type, enabled=False):
            x = match_channels(input.to(weight.dtype), weight.shape[1], -1)
            bias = None if self.bias is None else self.bias.to(weight.dtype)
            inside = self.activation(nn.functional.linear(x, weight, bias))
            y = x - (inside * scale) @ weight
            y = match_channels(y, self.out_features, -1)
            y = y if self.lipschitz == 1.0 else y * self.lipschitz
        return y.to(input.dtype)

    @torch.no_grad()
    def to_plain(self) -> fx.GraphModule:
        """Return a `torch.fx.GraphModule` of stock layers that does the same.

        Its certificate is the product over its layers, which is loose: certify this layer instead.
        """
        weight, scale = self.parametrization()
        stored = self.parametrization.original
        hidden, width = weight.shape
        inner = nn.Linear(width, hidden, bias=self.bias is not None).to(stored)
        inner.weight.copy_(weight)
        if self.bias is not None:
            inner.bias.copy_(self.bias)
        outer = nn.Linear(hidden, width, bias=False).to(stored)
        outer.weight.copy_((weight * scale[:, None]).T)
        match = _matching(width, (self.in_features, self.out_features), -1, self.lipschitz)
        plain = _PlainResidual(inner, copy.deepcopy(self.activation), outer, match)
        return fx.symbolic_trace(plain).train(self.training)

    def extra_repr(self) -> str:
        return ", ".join(
            filter(None, [f"{self.in_features}, {self.out_features}", super().extra_repr()])
        )

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        weight, scale = deployed_weights(self)
        norm = norms.matrix(weight * (scale / 2).sqrt()[:, None])
        chain = Chained().map(absolute_matrix(weight), weight.shape[1] + 1.0, length_of(self.bias))
        chain = chain.activation(at_zero(self, weight.shape[0]))
        chain = chain.map(absolute_matrix(weight * scale[:, None]), weight.shape[0] + 2.0)
        rounding = Chained().plus(chain).map(self.lipschitz, 1.0).rounding()
        value = step_of_descent(self.lipschitz, norm)
        return Declared(value, f"|T^-1/2 J| = {norm:.6g}", rounding=of_rows(rounding, input_shape))


class ResidualConv2d(_Residual, SameSizeConv2d):
    """CPL and SLL on images."""

    _free = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = "same",
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        hidden_channels: int | None = None,
        activation: str = "relu",
        lipschitz: float = 1.0,
    ) -> None:
        super().__init__()
        window = (kernel_size, stride, padding, dilation, groups, padding_mode)
        self._adopt((in_channels, out_channels), *window)
        strided = self.stride != (1, 1)
        width = in_channels if strided else max(in_channels, out_channels)
        hidden = width if hidden_channels is None else hidden_channels
        _checks.positive_int(type(self), hidden_channels=hidden)
        _checks.factory(type(self), device, dtype)
        _checks.require(
            groups == 1 or in_channels == out_channels or strided,
            type(self),
            "with groups and stride 1, in_channels and out_channels must be equal",
            "Use groups=1, or change the number of channels in another layer",
            in_channels=in_channels,
            out_channels=out_channels,
            groups=groups,
        )
        _checks.require(
            hidden % groups == 0,
            type(self),
            "groups must divide hidden_channels",
            "Choose a multiple of groups",
            hidden_channels=hidden,
            groups=groups,
        )
        shape = (hidden, width // groups, *self.kernel_size)
        self.parametrization = SlopedWeight(shape, groups, self._free, device, dtype)
        self._reduce(in_channels, out_channels, device, dtype)
        self._finish(hidden, activation, bias, lipschitz, device, dtype)

    def _adjoint_kernel(self, kernel: Tensor) -> Tensor:
        split = kernel.unflatten(0, (self.groups, -1)).transpose(1, 2)
        return split.flip(-2, -1).flatten(0, 1)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to `input`, batched or not."""
        self._check_input(input)
        weight, scale = self.parametrization()
        with torch.autocast(input.device.type, enabled=False):
            x = match_channels(input.to(weight.dtype), weight.shape[1] * self.groups)
            bias = None if self.bias is None else self.bias.to(weight.dtype)
            inside = self.activation(self._convolve(x, weight, bias)) * scale.view(-1, 1, 1)
            y = x - self._convolve(inside, self._adjoint_kernel(weight))
            if self.reduction is None:
                y = match_channels(y, self.out_channels)
            else:
                y = self._reduced(y)
            y = y if self.lipschitz == 1.0 else y * self.lipschitz
        return y.to(input.dtype)

    @torch.no_grad()
    def to_plain(self) -> fx.GraphModule:
        """Return a `torch.fx.GraphModule` of stock convolutions, as `ResidualLinear.to_plain`."""
        weight, scale = self.parametrization()
        stored = self.parametrization.original
        hidden, width = weight.shape[0], weight.shape[1] * self.groups
        mode: Any = self.padding_mode
        convolution: Any = partial(
            nn.Conv2d,
            kernel_size=self.kernel_size,
            padding=self._pad,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=mode,
        )
        inner = convolution(width, hidden, bias=self.bias is not None).to(stored)
        inner.weight.copy_(weight)
        if self.bias is not None:
            inner.bias.copy_(self.bias)
        outer = convolution(hidden, width, bias=False).to(stored)
        outer.weight.copy_(self._adjoint_kernel(weight * scale.view(-1, 1, 1, 1)))
        reduction = self._plain_reduction(stored)
        outside = width if reduction is not None else self.out_channels
        match = _matching(width, (self.in_channels, outside), -3, self.lipschitz)
        plain = _PlainResidual(inner, copy.deepcopy(self.activation), outer, match, reduction)
        return fx.symbolic_trace(plain).train(self.training)

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        size = image_of(self, input_shape)
        weight, scale = deployed_weights(self)
        scale = scale.view(-1, 1, 1, 1)
        norm = norms.convolution(
            weight * (scale / 2).sqrt(),
            size,
            padding=self._pad,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
        )
        pixels, hidden = math.prod(size), weight.shape[0]
        first = absolute_convolution(weight, self.groups)
        second = absolute_convolution(weight * scale, self.groups)
        terms = float(weight[0].numel())
        chain = Chained().map(first, terms + 1.0, length_of(self.bias, pixels))
        chain = chain.activation(at_zero(self, hidden * pixels))
        chain = chain.map(second, terms * hidden / (weight.shape[1] * self.groups) + 2.0)
        chain = Chained().plus(chain)
        gain, size_of, count = self._reduction_norm(norms)
        if count:
            chain = chain.map(size_of, count)
        rounding = chain.map(self.lipschitz, 1.0).rounding()
        value = mul_up(step_of_descent(self.lipschitz, norm), gain)
        return Declared(value, f"|T^-1/2 J| = {norm:.6g}", rounding=rounding)


def step_of_descent(factor: float, norm: float) -> float:
    r"""Constant of x - 2 J^T T^{-1} s(J x + b) with s = |T^{-1/2} J|^2: 1, or 2 s - 1 beyond."""
    square = mul_up(norm, norm, SAFE)
    return mul_up(factor, 1.0 if square <= 1.0 else add_up(mul_up(2.0, square), -1.0))


def deployed_weights(module: Any) -> tuple[Tensor, Tensor]:
    """Return the two tensors of the parametrization as forward computes them, in float64."""
    with torch.no_grad():
        first, second = module.parametrization()
    return float64(module, first), float64(module, second)
