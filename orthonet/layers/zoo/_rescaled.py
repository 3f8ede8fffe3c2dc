"""Layers whose weight is a rescaled free weight: AOL, spectral, Frobenius, LiResNet, Cholesky.

Each is a stock `nn.Linear` or `nn.Conv2d` with the weight that it computes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.layers.zoo._base import MappedConv2d, MappedLinear
from orthonet.linalg.rescaling import (
    almost_orthogonal,
    normalized_frobenius,
    normalized_spectral,
    overlap,
)
from orthonet.linalg.unitary import cholesky_contraction

__all__ = [
    "AOLConv2d",
    "AOLLinear",
    "CholeskyConv2d",
    "CholeskyLinear",
    "FrobeniusConv2d",
    "FrobeniusLinear",
    "LiResConv2d",
    "LiResLinear",
    "SpectralConv2d",
    "SpectralLinear",
]


class AOLLinear(MappedLinear):
    r"""`nn.Linear` with an almost-orthogonal weight: \(W = P D\), D diagonal.

    See [`almost_orthogonal`][orthonet.linalg.almost_orthogonal] for D. The weight starts
    orthogonal, where the rescaling does nothing for a tall or square matrix.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether to add a learnable bias, zero at first.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters; the weight is computed in float32 at least.
        lipschitz: The constant K of the layer: the weight is multiplied by it.

    Shape:
        Input `(*, in_features)`, output `(*, out_features)`.

    Guarantee:
        l2 -> l2 constant at most `lipschitz`, to \(10^{-5}\) (float32) or \(10^{-12}\) (float64)
        relative, in train and eval mode, for every finite parameter.

    Raises:
        ValueError: a size is not a positive integer, or `lipschitz` not a positive number.

    References:
        Prach & Lampert, ECCV 2022, theorem 1, arXiv:2208.03160.
    """

    def _map(self) -> Callable[[Tensor], Tensor]:
        return almost_orthogonal


class AOLConv2d(MappedConv2d):
    r"""`nn.Conv2d` with an almost-orthogonal kernel.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Taps.
        stride: Stride, without a common divisor with the dilation.
        padding: As in torch.
        dilation: Spacing of the taps.
        groups: Number of groups.
        bias: Whether to add a learnable bias, zero at first.
        padding_mode: "zeros" or "circular".
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters; the kernel is computed in float32 at least.
        lipschitz: The constant K of the layer: the kernel is multiplied by it.

    Shape:
        As `nn.Conv2d`, unbatched input included.

    Guarantee:
        l2 -> l2 constant at most `lipschitz`, to \(10^{-5}\) (float32) or \(10^{-12}\) (float64)
        relative, for every image size, zero or circular padding, stride and dilation.

    Raises:
        ValueError: an argument that `nn.Conv2d` refuses, another padding mode (reflected or
            repeated borders raise the norm above 1), or `lipschitz` not a positive number.

    References:
        Prach & Lampert, ECCV 2022, theorem 2, arXiv:2208.03160.
    """

    def _map(self) -> Callable[[Tensor], Tensor]:
        return partial(almost_orthogonal, groups=self.groups)


class SpectralLinear(MappedLinear):
    r"""`nn.Linear` with a weight divided by an upper bound of its spectral norm.

    Arguments and errors are those of [`AOLLinear`][orthonet.layers.AOLLinear]. Six Gram
    products bound the norm from above, to a factor of at most \(r^{1/128}\) for rank r (1.04 at
    r = 64), and the gradient passes through the bound; power iteration, as
    `torch.nn.utils.parametrizations.spectral_norm` has it, bounds it from below.

    Guarantee:
        l2 -> l2 constant at most `lipschitz`, to \(10^{-5}\) (float32) or \(10^{-12}\) (float64).
        Zero weights stay zero.

    References:
        Miyato et al., *Spectral normalization for GANs*, ICLR 2018; Delattre et al., ICML 2023.
    """

    def _map(self) -> Callable[[Tensor], Tensor]:
        return normalized_spectral


class SpectralConv2d(MappedConv2d):
    r"""`nn.Conv2d` with a kernel divided by an upper bound of the norm of the convolution.

    Arguments and errors are those of [`AOLConv2d`][orthonet.layers.AOLConv2d]. The bound is that of
    the whole operator on every image size (see
    [`convolution_norm_upper`][orthonet.linalg.convolution_norm_upper]), not the norm of the
    reshaped kernel, which may be smaller by the square root of the number of taps.

    Guarantee:
        l2 -> l2 constant at most `lipschitz`, to \(10^{-5}\) (float32) or \(10^{-12}\) (float64),
        for zero or circular padding, any stride and dilation. Zero kernels stay zero.

    References:
        Miyato et al., ICLR 2018; Delattre et al., ICML 2023; Ehlich & Zeller, Math. Z. 1964.
    """

    def _map(self) -> Callable[[Tensor], Tensor]:
        return partial(normalized_spectral, groups=self.groups)


class FrobeniusLinear(MappedLinear):
    r"""`nn.Linear` with a weight of Frobenius norm 1.

    Arguments and errors are those of [`AOLLinear`][orthonet.layers.AOLLinear]. Exact for a single
    output (a unit row), and loose by \(\sqrt r\) for r equal singular values.

    Guarantee:
        l2 -> l2 constant at most `lipschitz`, to \(10^{-5}\) (float32) or \(10^{-12}\) (float64).
        Zero weights stay zero.

    References:
        Serrurier et al., CVPR 2021 (the layer of deel-torchlip for single outputs).
    """

    def _map(self) -> Callable[[Tensor], Tensor]:
        return normalized_frobenius


class FrobeniusConv2d(MappedConv2d):
    r"""`nn.Conv2d` with a kernel divided by a bound of the Frobenius norm of its symbol.

    The bound is \(\big(\sum_{lag} |\sum_t \langle K_t, K_{t + lag} \rangle|\big)^{1/2}\), or
    \(\sqrt r\,\|K\|_F\) where that is less, r the number of windows that read one pixel.
    Arguments and errors are those of [`AOLConv2d`][orthonet.layers.AOLConv2d].

    Guarantee:
        l2 -> l2 constant at most `lipschitz`, to \(10^{-5}\) (float32) or \(10^{-12}\) (float64),
        for zero or circular padding. Zero kernels stay zero.

    References:
        Serrurier et al., CVPR 2021.
    """

    def _map(self) -> Callable[[Tensor], Tensor]:
        reads = overlap(self.kernel_size, self.stride)
        return partial(normalized_frobenius, groups=self.groups, reads=reads)


def _residual_kernel(kernel: Tensor, *, groups: int = 1) -> Tensor:
    """The identity plus the kernel, divided by a bound of its norm."""
    rows, columns, *taps = kernel.shape
    eye = torch.eye(rows // groups, columns, dtype=kernel.dtype, device=kernel.device)
    center = [amount for k in reversed(taps) for amount in ((k - 1) // 2, k - 1 - (k - 1) // 2)]
    delta = eye.repeat(groups, 1).view(rows, columns, *(1,) * len(taps))
    if center:
        delta = nn.functional.pad(delta, center)
    return normalized_spectral(delta + kernel, groups=groups)


def _small(shape, *, dtype=None, device=None, groups: int = 1) -> Tensor:
    """A random kernel of norm about 0.1, so that the residual layer starts near the identity."""
    return 0.1 * normalized_spectral(
        torch.randn(tuple(shape), dtype=dtype, device=device), groups=groups
    )


class LiResLinear(MappedLinear):
    r"""Linear residual layer: \(W = (I + V) / \beta\) with \(\beta \ge \|I + V\|_2\).

    Arguments and errors are those of [`AOLLinear`][orthonet.layers.AOLLinear]. I is the
    rectangular identity; the skip connection is part of the linear map, so that the constant is
    that of the sum and not the sum of the constants. Assigning a weight assigns \(I + V\).

    Guarantee:
        l2 -> l2 constant at most `lipschitz`, to \(10^{-5}\) (float32) or \(10^{-12}\) (float64).

    References:
        Hu, Zou, Wang, Leino & Fredrikson, *Unlocking deterministic robustness certification on
        ImageNet*, NeurIPS 2023 (LiResNet), where power iteration bounds the norm from below.
    """

    _initial = staticmethod(_small)

    def _map(self) -> Callable[[Tensor], Tensor]:
        return _residual_kernel


class LiResConv2d(MappedConv2d):
    r"""The LiResNet block: identity plus convolution, as one linear map of norm at most 1.

    \(W = (\delta + V) / \beta\) with a bound \(\beta\) of the norm of the sum. Arguments and
    errors are those of [`AOLConv2d`][orthonet.layers.AOLConv2d]; with different numbers of
    channels the identity is the rectangular one.

    Guarantee:
        l2 -> l2 constant at most `lipschitz`, to \(10^{-5}\) (float32) or \(10^{-12}\) (float64),
        for zero or circular padding, any stride and dilation.

    References:
        Hu et al., NeurIPS 2023 (LiResNet).
    """

    _initial = staticmethod(_small)

    def _map(self) -> Callable[[Tensor], Tensor]:
        return partial(_residual_kernel, groups=self.groups)


class CholeskyLinear(MappedLinear):
    r"""`nn.Linear` orthogonalized by a Cholesky factor with a ridge: \(W W^\top \preceq I\) always.

    Arguments and errors are those of [`AOLLinear`][orthonet.layers.AOLLinear]; see
    [`cholesky_contraction`][orthonet.linalg.cholesky_contraction].

    Guarantee:
        l2 -> l2 constant at most `lipschitz`, to \(10^{-5}\) (float32) or \(10^{-12}\) (float64),
        for every finite parameter; semi-orthogonal for well-conditioned ones.

    References:
        Hu, Leino, Wang & Fredrikson, ICLR 2024.
    """

    def _map(self) -> Callable[[Tensor], Tensor]:
        return cholesky_contraction


def _grouped(kernel: Tensor, function: Callable[[Tensor], Tensor], groups: int) -> Tensor:
    """A function of matrices, applied to the flattened kernel of each group."""
    matrices = kernel.unflatten(0, (groups, -1)).flatten(2)
    return function(matrices).reshape(kernel.shape)


class CholeskyConv2d(MappedConv2d):
    r"""1x1 convolution orthogonalized by a Cholesky factor with a ridge (CHORD).

    Arguments and errors are those of [`AOLConv2d`][orthonet.layers.AOLConv2d], with
    `kernel_size=1` only: the method is one of matrices.

    Guarantee:
        l2 -> l2 constant at most `lipschitz`, to \(10^{-5}\) (float32) or \(10^{-12}\) (float64).

    References:
        Hu, Leino, Wang & Fredrikson, ICLR 2024.
    """

    def _map(self) -> Callable[[Tensor], Tensor]:
        _checks.require(
            self.kernel_size == (1, 1),
            type(self),
            "the method orthogonalizes matrices: kernel_size must be 1",
            "Use SpaceToDepth2d before the layer to mix neighbors, or OrthoConv2d(method='rko')",
            kernel_size=self.kernel_size,
        )
        return partial(_grouped, function=cholesky_contraction, groups=self.groups)
