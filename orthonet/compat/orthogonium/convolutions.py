"""Convolutions and residual blocks of orthogonium, and their singular values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orthonet import _checks, init, layers
from orthonet.linalg import convolution_norm_upper
from orthonet.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams

__all__ = [
    "AOCLipschitzResBlock",
    "AOLConv2D",
    "AOLConvTranspose2D",
    "AdaptiveOrthoConv2d",
    "AdaptiveOrthoConvTranspose2d",
    "AdaptiveSOCConv2d",
    "AdaptiveSOCConvTranspose2d",
    "BcopRkoConv2d",
    "BcopRkoConvTranspose2d",
    "FastBlockConv2d",
    "FastBlockConvTranspose2D",
    "RKOConv2d",
    "RkoConvTranspose2d",
    "SDPBasedLipschitzDense",
    "SDPBasedLipschitzResBlock",
    "SLLxAOCLipschitzResBlock",
    "conv_orthogonal_",
    "get_conv_sv",
]

Size = int | tuple[int, int]


def _pair(value: Size) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _same(kernel_size: Size, stride: Size, dilation: Size) -> tuple[int, int]:
    """Return the padding with which a strided convolution has size / stride outputs."""
    sizes = zip(_pair(kernel_size), _pair(stride), _pair(dilation), strict=True)
    height, width = (max(0, d * (k - 1) + 2 - s) // 2 for k, s, d in sizes)
    return height, width


class AdaptiveOrthoConv2d(layers.OrthoConv2d):
    """`orthonet.layers.OrthoConv2d` with circular "same" padding by default.

    With a stride, "same" means size / stride outputs.
    """

    _made_by = "aoc"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = "same",
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "circular",
        ortho_params: OrthoParams = DEFAULT_ORTHO_PARAMS,
    ) -> None:
        if padding == "same" and _pair(stride) != (1, 1):
            padding = _same(kernel_size, stride, dilation)
        window: Any = (kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        made: Any = {"ortho_params": ortho_params, "method": self._made_by}
        super().__init__(in_channels, out_channels, *window, **made)


class RKOConv2d(AdaptiveOrthoConv2d):
    """`AdaptiveOrthoConv2d` with a reshaped kernel."""

    _made_by = "rko"


FastBlockConv2d = BcopRkoConv2d = AdaptiveOrthoConv2d


class AdaptiveOrthoConvTranspose2d(layers.OrthoConvTranspose2d):
    """`orthonet.layers.OrthoConvTranspose2d` with `ortho_params` as the last argument."""

    _made_by = "aoc"

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
        ortho_params: OrthoParams = DEFAULT_ORTHO_PARAMS,
    ) -> None:
        window = (kernel_size, stride, padding, output_padding, groups, bias, dilation)
        made: Any = {"ortho_params": ortho_params, "method": self._made_by}
        super().__init__(in_channels, out_channels, *window, padding_mode, **made)


class RkoConvTranspose2d(AdaptiveOrthoConvTranspose2d):
    """`AdaptiveOrthoConvTranspose2d` with a reshaped kernel."""

    _made_by = "rko"


FastBlockConvTranspose2D = BcopRkoConvTranspose2d = AdaptiveOrthoConvTranspose2d


def _one_step(owner: object, niter: int) -> None:
    _checks.require(
        niter == 1,
        owner,
        "the almost-orthogonal rescaling has one step",
        "Leave niter out, or use orthonet.layers.SpectralConv2d for an iterated norm",
        niter=niter,
    )


class AOLConv2D(layers.AOLConv2d):
    """`orthonet.layers.AOLConv2d`; `niter` must be 1."""

    def __init__(self, *args: Any, niter: int = 1, **kwargs: Any) -> None:
        _one_step(type(self), niter)
        super().__init__(*args, **kwargs)


class AOLConvTranspose2D(layers.AOLConvTranspose2d):
    """`orthonet.layers.AOLConvTranspose2d`; `niter` must be 1."""

    def __init__(self, *args: Any, niter: int = 1, **kwargs: Any) -> None:
        _one_step(type(self), niter)
        super().__init__(*args, **kwargs)


def _skew_taps(kernel_size: int, stride: int) -> int:
    """Return the taps of a skew kernel that has about `kernel_size` with the stride."""
    taps = kernel_size - (stride - 1)
    return taps if taps % 2 else taps + 1 if taps <= 2 else taps - 1


def _default_params(owner: object, ortho_params: OrthoParams | None) -> None:
    _checks.require(
        ortho_params is None,
        owner,
        "this layer has no orthogonalizer to choose",
        "Leave ortho_params out",
        ortho_params=ortho_params,
    )


class AdaptiveSOCConv2d(layers.SOCConv2d):
    """`orthonet.layers.SOCConv2d` with circular padding by default.

    The output has size / stride pixels whatever `padding` is, because the kernel of the exponential
    is larger than the one that is asked for.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: str | Size = "same",
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "circular",
        ortho_params: OrthoParams | None = None,
    ) -> None:
        _default_params(type(self), ortho_params)
        _same_size(type(self), padding, kernel_size)
        taps = _skew_taps(kernel_size, stride)
        super().__init__(
            in_channels, out_channels, taps, stride, "same", dilation, groups, bias, padding_mode
        )


def _same_size(owner: object, padding: str | Size, kernel_size: int) -> None:
    _checks.require(
        padding in ("same", kernel_size // 2, (kernel_size // 2,) * 2),
        owner,
        "padding must be 'same' or kernel_size // 2",
        "Use padding='same', and crop the output",
        padding=padding,
    )


class AdaptiveSOCConvTranspose2d(layers.SOCConvTranspose2d):
    """`orthonet.layers.SOCConvTranspose2d`: the output has size * stride pixels."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: str | Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        ortho_params: OrthoParams | None = None,
    ) -> None:
        _default_params(type(self), ortho_params)
        wanted = ((stride - 1,) * 2, stride - 1)
        _checks.require(
            padding in ("same", 0, kernel_size // 2, (kernel_size // 2,) * 2)
            and output_padding in (0, *wanted),
            type(self),
            "the output size is stride times the input size",
            "Leave padding and output_padding out, and pad or crop the output",
            padding=padding,
            output_padding=output_padding,
        )
        taps = _skew_taps(kernel_size, stride)
        window: Any = (taps, stride, "same", None, groups, bias, dilation, padding_mode)
        super().__init__(in_channels, out_channels, *window)


class SDPBasedLipschitzResBlock(layers.SLLConv2d):
    """`orthonet.layers.SLLConv2d` with as many channels out as in."""

    def __init__(
        self, cin: int, inner_dim_factor: float, kernel_size: int = 3, groups: int = 1, **_: Any
    ) -> None:
        super().__init__(
            cin, cin, kernel_size, groups=groups, hidden_channels=int(cin * inner_dim_factor)
        )


class SLLxAOCLipschitzResBlock(layers.SLLConv2d):
    """`orthonet.layers.SLLConv2d` with a stride.

    The strided matrix stands behind the residual alone, and the residual has `kernel_size` taps.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        inner_dim_factor: float,
        kernel_size: int = 3,
        stride: int = 2,
        groups: int = 1,
        **_: Any,
    ) -> None:
        hidden = int(cout * inner_dim_factor)
        super().__init__(cin, cout, kernel_size, stride, groups=groups, hidden_channels=hidden)


class SDPBasedLipschitzDense(layers.SLLLinear):
    """`orthonet.layers.SLLLinear` with `inner_dim` for `hidden_features`."""

    def __init__(self, in_features: int, out_features: int, inner_dim: int, **_: Any) -> None:
        hidden = in_features if inner_dim == -1 else inner_dim
        super().__init__(in_features, out_features, hidden_features=hidden)


class AOCLipschitzResBlock(layers.CPLConv2d):
    r"""`orthonet.layers.CPLConv2d`: \(x - 2 K^\top s(K x + b)\) with \(\|K\| \le 1\).

    K is divided by a bound of its norm instead of being orthogonal.
    """

    def __init__(
        self,
        in_channels: int,
        inner_dim_factor: float,
        kernel_size: int,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "circular",
        ortho_params: OrthoParams | None = None,
    ) -> None:
        _default_params(type(self), ortho_params)
        window: Any = (kernel_size, 1, "same", dilation, groups, bias, padding_mode)
        hidden = int(in_channels * inner_dim_factor)
        super().__init__(in_channels, in_channels, *window, hidden_channels=hidden)


def conv_orthogonal_(
    tensor: Tensor,
    *,
    stride: Size = 1,
    groups: int = 1,
    gain: float = 1.0,
    ortho_params: OrthoParams | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill `tensor` by `orthonet.init.conv_orthogonal_` with `method="aoc"`."""
    _default_params("conv_orthogonal_", ortho_params)
    return init.conv_orthogonal_(
        tensor, stride=stride, groups=groups, method="aoc", gain=gain, generator=generator
    )


def get_conv_sv(
    layer: Any,
    n_iter: int,
    agg_groups: bool = True,
    return_stab_rank: bool = True,
    device: torch.device | str | None = None,
    detach: bool = True,
    imsize: int | None = None,
) -> Any:
    r"""Bound the norm of a convolution, and return it with the stable rank over the rank.

    The bound is [`convolution_norm_upper`][orthonet.linalg.convolution_norm_upper] of the kernel
    with its stride, for every image size; with circular padding and `imsize` it is the norm itself
    on images of that size. Groups are combined by the largest norm and the mean stable rank.

    Args:
        layer: A convolution with `weight`, `stride` and `groups`.
        n_iter: Gram products.
        agg_groups: Whether to combine the groups; else a list of one result for each.
        return_stab_rank: Whether to return pairs of norm and stable rank.
        device: Where to compute.
        detach: Whether to detach the results.
        imsize: Size of the images, for circular padding.

    Returns:
        A pair of tensors, a tensor, or a list of them.

    Examples:
        >>> sigma, rank = get_conv_sv(AdaptiveOrthoConv2d(4, 4, 3), 6, imsize=8)
        >>> round(float(rank), 1)
        1.0
    """
    stride = _pair(layer.stride)
    weight = layer.weight.detach() if detach else layer.weight
    results = []
    for kernel in weight.to(device).chunk(layer.groups):
        spread = _with_stride(kernel, stride)
        if imsize is not None and layer.padding_mode == "circular":
            sigma = _circular_norm(spread, [max(1, imsize // s) for s in stride])
        else:
            sigma = convolution_norm_upper(spread, niters=n_iter)
        rank = kernel.square().sum() / (sigma.square() * min(spread.shape[0], spread.shape[1]))
        results.append((sigma, rank) if return_stab_rank else sigma)
    if not agg_groups:
        return results
    if not return_stab_rank:
        return torch.stack(results).amax()
    norms, ranks = zip(*results, strict=True)
    return torch.stack(norms).amax(), torch.stack(ranks).mean()


def _circular_norm(kernel: Tensor, size: list[int]) -> Tensor:
    """Return the norm of the convolution on a torus, of which taps beyond its size wrap around."""
    pads = [a for k, n in zip(kernel.shape[:1:-1], size[::-1], strict=True) for a in (0, -k % n)]
    wrapped = F.pad(kernel, pads)
    wrapped = wrapped.unflatten(3, (-1, size[1])).unflatten(2, (-1, size[0])).sum((2, 4))
    symbol = torch.fft.fft2(wrapped).flatten(2).movedim(-1, 0)
    return torch.linalg.matrix_norm(symbol, 2).amax()


def _with_stride(kernel: Tensor, stride: tuple[int, int]) -> Tensor:
    """Return the kernel as it acts, without a stride, on blocks of stride x stride pixels."""
    high, wide = (-k % s for k, s in zip(kernel.shape[2:], stride, strict=True))
    blocks = F.pad(kernel, (0, wide, 0, high))
    blocks = blocks.unflatten(3, (-1, stride[1])).unflatten(2, (-1, stride[0]))
    return blocks.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
