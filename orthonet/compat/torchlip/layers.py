"""Linear layers and convolutions of deel-torchlip."""

from __future__ import annotations

from typing import Any

import torch

from orthonet import _checks, layers
from orthonet.compat.torchlip.module import LipschitzModule, WithWeight

__all__ = [
    "FrobeniusConv2d",
    "FrobeniusLinear",
    "SpectralConv1d",
    "SpectralConv2d",
    "SpectralConvTranspose2d",
    "SpectralLinear",
]

Size = int | tuple[int, int]


def _orthogonal(owner: object, eps_spectral: float, eps_bjorck: float | None) -> bool:
    """Return whether the layer is orthogonalized; the tolerances are better than asked for."""
    _checks.in_range(owner, 0.0, 1.0, eps_spectral=eps_spectral)
    if eps_bjorck is not None:
        _checks.in_range(owner, 0.0, 1.0, eps_bjorck=eps_bjorck)
    return eps_bjorck is not None


def _orthogonal_only(owner: object, eps_spectral: float, eps_bjorck: float | None) -> None:
    _checks.require(
        _orthogonal(owner, eps_spectral, eps_bjorck),
        owner,
        "the weight is orthogonal: eps_bjorck must be a number",
        "For a weight that is only divided by its norm, use the layer of orthonet.layers with the "
        "same name",
        eps_bjorck=eps_bjorck,
    )


class SpectralLinear(WithWeight, layers.OrthoLinear):
    """`orthonet.layers.OrthoLinear`: all singular values are `k_coef_lip`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        k_coef_lip: float = 1.0,
        eps_spectral: float = 1e-3,
        eps_bjorck: float | None = 1e-3,
    ) -> None:
        _orthogonal_only(type(self), eps_spectral, eps_bjorck)
        layers.OrthoLinear.__init__(self, in_features, out_features, bias, lipschitz=k_coef_lip)


class _UnitFrobenius(WithWeight, layers.FrobeniusLinear):
    """The whole weight has Frobenius norm `k_coef_lip`."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, k_coef_lip: float = 1.0
    ) -> None:
        layers.FrobeniusLinear.__init__(self, in_features, out_features, bias, lipschitz=k_coef_lip)


class FrobeniusLinear(WithWeight, layers.UnitNormLinear):
    """`orthonet.layers.UnitNormLinear`; without `disjoint_neurons`, `FrobeniusLinear` of there."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make the layer of the kind that `disjoint_neurons` asks for."""
        names = ("in_features", "out_features", "bias", "disjoint_neurons", "k_coef_lip")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.pop("disjoint_neurons", True):
            return super().__new__(cls)
        return _UnitFrobenius(**given)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        disjoint_neurons: bool = True,
        k_coef_lip: float = 1.0,
    ) -> None:
        layers.UnitNormLinear.__init__(self, in_features, out_features, bias, lipschitz=k_coef_lip)


class _SpectralConv(WithWeight):
    """The constructor of both convolutions, in front of a layer of the library."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        k_coef_lip: float = 1.0,
        eps_spectral: float = 1e-3,
        eps_bjorck: float | None = 1e-3,
    ) -> None:
        _orthogonal_only(type(self), eps_spectral, eps_bjorck)
        window: Any = (kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        made: Any = {"method": "rko", "lipschitz": k_coef_lip}
        # that of the layer, which stands behind LipschitzModule in the order of the base classes
        super(LipschitzModule, self).__init__(in_channels, out_channels, *window, **made)


class SpectralConv2d(_SpectralConv, layers.OrthoConv2d):
    """`orthonet.layers.OrthoConv2d` with `method="rko"`: an orthogonal reshaped kernel, divided.

    `orthonet.layers.OrthoConv2d` without it is orthogonal as a convolution and far tighter.
    """


class SpectralConv1d(_SpectralConv, layers.OrthoConv1d):
    """`orthonet.layers.OrthoConv1d` with `method="rko"`, as `SpectralConv2d`."""


class SpectralConvTranspose2d(WithWeight, layers.OrthoConvTranspose2d):
    """`orthonet.layers.OrthoConvTranspose2d` with `method="rko"`, as `SpectralConv2d`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        k_coef_lip: float = 1.0,
        eps_spectral: float = 1e-3,
        eps_bjorck: float | None = 1e-3,
    ) -> None:
        _orthogonal_only(type(self), eps_spectral, eps_bjorck)
        window = (kernel_size, stride, padding, output_padding or 0, groups, bias, dilation)
        options: Any = {"method": "rko", "lipschitz": k_coef_lip}
        layers.OrthoConvTranspose2d.__init__(
            self, in_channels, out_channels, *window, padding_mode, device, dtype, **options
        )


class FrobeniusConv2d(WithWeight, layers.FrobeniusConv2d):
    """`orthonet.layers.FrobeniusConv2d`, with zero or circular padding."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        k_coef_lip: float = 1.0,
    ) -> None:
        window: Any = (kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        layers.FrobeniusConv2d.__init__(
            self, in_channels, out_channels, *window, lipschitz=k_coef_lip
        )
