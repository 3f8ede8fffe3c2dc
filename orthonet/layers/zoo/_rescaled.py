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
        in_features: As of `nn.Linear`.
        out_features: As there.
        bias: Whether to add a learnable bias, initialized to zero.
        device: As there.
        dtype: Dtype of the parameters; the layer computes the weight in at least float32.
        lipschitz: The constant K of the layer, positive: a factor of the weight.

    Shape:
        Input `(*, in_features)`, output `(*, out_features)`.

    Guarantee:
        l2 -> l2 constant at most `lipschitz`, to \(10^{-5}\) (float32) or \(10^{-12}\) (float64)
        relative, in train and eval mode, for every finite parameter.

    Raises:
        ValueError: A size is not a positive integer, or `lipschitz` not a positive number.

    Examples:
        >>> layer = AOLLinear(3, 8, lipschitz=2.0)
        >>> bool(torch.linalg.matrix_norm(layer.weight, 2) <= 2.0 * (1 + 1e-5))
        True

    References:
        Prach & Lampert, ECCV 2022, theorem 1, arXiv:2208.03160.
    """

    def _map(self) -> Callable[[Tensor], Tensor]:
        return almost_orthogonal


class AOLConv2d(MappedConv2d):
    """`nn.Conv2d` with an almost-orthogonal kernel.

    Args:
        in_channels: As of `nn.Conv2d`.
        out_channels: As there.
        kernel_size: As there.
        stride: Without a common divisor with the dilation.
        padding: As there.
        dilation: As there.
        groups: As there.
        bias: As of [`AOLLinear`][orthonet.layers.AOLLinear].
        padding_mode: "zeros" or "circular".
        device: As there.
        dtype: As there.
        lipschitz: As there.

    Shape:
        As `nn.Conv2d`, unbatched input included.

    Guarantee:
        As of `AOLLinear`, for every image size, zero or circular padding, stride and dilation.

    Raises:
        ValueError: `nn.Conv2d` refuses an argument, the padding mode is another (reflected or
            repeated borders raise the norm above 1), or `lipschitz` not a positive number.

    Examples:
        >>> AOLConv2d(3, 8, 3, padding=1)(torch.zeros(1, 3, 6, 6)).shape
        torch.Size([1, 8, 6, 6])

    References:
        Prach & Lampert, ECCV 2022, theorem 2, arXiv:2208.03160.
    """

    def _map(self) -> Callable[[Tensor], Tensor]:
        return partial(almost_orthogonal, groups=self.groups)


class SpectralLinear(MappedLinear):
    r"""`nn.Linear` with a weight divided by an upper bound of its spectral norm.

    Six Gram products bound the norm from above, to a factor of at most \(r^{1/128}\) for rank r
    (1.04 at r = 64), and the gradient passes through the bound; power iteration, as
    `torch.nn.utils.parametrizations.spectral_norm` has it, bounds it from below. Arguments,
    guarantee and errors are those of [`AOLLinear`][orthonet.layers.AOLLinear]; zero stays zero.

    Examples:
        >>> layer = SpectralLinear(3, 8)
        >>> bool(torch.linalg.matrix_norm(layer.weight, 2) <= 1 + 1e-5)
        True

    References:
        Miyato et al., *Spectral normalization for GANs*, ICLR 2018; Delattre et al., ICML 2023.
    """

    def _map(self) -> Callable[[Tensor], Tensor]:
        return normalized_spectral


class SpectralConv2d(MappedConv2d):
    """`nn.Conv2d` with a kernel divided by an upper bound of the norm of the convolution.

    The bound is that of the whole operator on every image size (see
    [`convolution_norm_upper`][orthonet.linalg.convolution_norm_upper]), not the norm of the
    reshaped kernel, which may be smaller by the square root of the number of taps. Arguments,
    guarantee and errors are those of [`AOLConv2d`][orthonet.layers.AOLConv2d]; zero stays zero.

    Examples:
        >>> SpectralConv2d(3, 8, 3)(torch.zeros(1, 3, 6, 7)).shape
        torch.Size([1, 8, 4, 5])

    References:
        Miyato et al., ICLR 2018; Delattre et al., ICML 2023; Ehlich & Zeller, Math. Z. 1964.
    """

    def _map(self) -> Callable[[Tensor], Tensor]:
        return partial(normalized_spectral, groups=self.groups)


class FrobeniusLinear(MappedLinear):
    r"""`nn.Linear` with a weight of Frobenius norm 1.

    It is exact for a single output (a unit row), and loose by \(\sqrt r\) for r equal singular
    values. Arguments, guarantee and errors are those of [`AOLLinear`][orthonet.layers.AOLLinear];
    zero stays zero.

    Examples:
        >>> layer = FrobeniusLinear(3, 8)
        >>> layer.weight.norm().allclose(torch.ones(()))
        True

    References:
        Serrurier et al., CVPR 2021 (the layer of deel-torchlip for single outputs).
    """

    def _map(self) -> Callable[[Tensor], Tensor]:
        return normalized_frobenius


class FrobeniusConv2d(MappedConv2d):
    r"""`nn.Conv2d` with a kernel divided by a bound of the Frobenius norm of its symbol.

    The bound is \(\big(\sum_{lag} |\sum_t \langle K_t, K_{t + lag} \rangle|\big)^{1/2}\), or
    \(\sqrt r\,\|K\|_F\) where that is less, r the number of windows that read one pixel. Arguments,
    guarantee and errors are those of [`AOLConv2d`][orthonet.layers.AOLConv2d]; zero stays zero.

    Examples:
        >>> FrobeniusConv2d(3, 1, 3)(torch.zeros(1, 3, 6, 6)).shape
        torch.Size([1, 1, 4, 4])

    References:
        Serrurier et al., CVPR 2021.
    """

    def _map(self) -> Callable[[Tensor], Tensor]:
        reads = overlap(self.kernel_size, self.stride)
        return partial(normalized_frobenius, groups=self.groups, reads=reads)


def _residual_kernel(kernel: Tensor, *, groups: int = 1) -> Tensor:
    """Return the identity plus the kernel, divided by a bound of its norm."""
    rows, columns, *taps = kernel.shape
    eye = torch.eye(rows // groups, columns, dtype=kernel.dtype, device=kernel.device)
    center = [amount for k in reversed(taps) for amount in ((k - 1) // 2, k - 1 - (k - 1) // 2)]
    delta = eye.repeat(groups, 1).view(rows, columns, *(1,) * len(taps))
    if center:
        delta = nn.functional.pad(delta, center)
    return normalized_spectral(delta + kernel, groups=groups)


def _small(shape, *, dtype=None, device=None, groups: int = 1) -> Tensor:
    """Return a random kernel of norm about 0.1: the layer starts near the identity."""
    return 0.1 * normalized_spectral(
        torch.randn(tuple(shape), dtype=dtype, device=device), groups=groups
    )


class LiResLinear(MappedLinear):
    r"""Linear residual layer: \(W = (I + V) / \beta\) with \(\beta \ge \|I + V\|_2\).

    I is the rectangular identity. The skip connection is part of the linear map, so the constant is
    that of the sum and not the sum of the constants. Assigning a weight assigns \(I + V\).
    Arguments, guarantee and errors are those of [`AOLLinear`][orthonet.layers.AOLLinear].

    Examples:
        >>> layer = LiResLinear(3, 8)
        >>> bool(torch.linalg.matrix_norm(layer.weight, 2) <= 1 + 1e-5)
        True

    References:
        Hu, Zou, Wang, Leino & Fredrikson, *Unlocking deterministic robustness certification on
        ImageNet*, NeurIPS 2023 (LiResNet), where power iteration bounds the norm from below.
    """

    _initial = staticmethod(_small)

    def _map(self) -> Callable[[Tensor], Tensor]:
        return _residual_kernel


class LiResConv2d(MappedConv2d):
    r"""The LiResNet block: identity plus convolution, as one linear map of norm at most 1.

    \(W = (\delta + V) / \beta\) with a bound \(\beta\) of the norm of the sum; with different
    numbers of channels the identity is the rectangular one. Arguments, guarantee and errors are
    those of [`AOLConv2d`][orthonet.layers.AOLConv2d].

    Examples:
        >>> LiResConv2d(4, 4, 3, padding=1)(torch.zeros(4, 5, 7)).shape
        torch.Size([4, 5, 7])

    References:
        Hu et al., NeurIPS 2023 (LiResNet).
    """

    _initial = staticmethod(_small)

    def _map(self) -> Callable[[Tensor], Tensor]:
        return partial(_residual_kernel, groups=self.groups)


class CholeskyLinear(MappedLinear):
    r"""`nn.Linear` orthogonalized by a Cholesky factor with a ridge: \(W W^\top \preceq I\) always.

    See [`cholesky_contraction`][orthonet.linalg.cholesky_contraction]. The weight is
    semi-orthogonal
    for well-conditioned parameters. Arguments, guarantee and errors are those of
    [`AOLLinear`][orthonet.layers.AOLLinear].

    Examples:
        >>> layer = CholeskyLinear(8, 3)
        >>> (layer.weight @ layer.weight.T).allclose(torch.eye(3), atol=1e-4)
        True

    References:
        Hu, Leino, Wang & Fredrikson, *A recipe for improved certifiable robustness*, ICLR 2024.
    """

    def _map(self) -> Callable[[Tensor], Tensor]:
        return cholesky_contraction


def _grouped(kernel: Tensor, function: Callable[[Tensor], Tensor], groups: int) -> Tensor:
    """Return a function of matrices, applied to the flattened kernel of each group."""
    matrices = kernel.unflatten(0, (groups, -1)).flatten(2)
    return function(matrices).reshape(kernel.shape)


class CholeskyConv2d(MappedConv2d):
    """1x1 convolution orthogonalized by a Cholesky factor with a ridge (CHORD).

    The method is one of matrices, so `kernel_size` must be 1. The other arguments, guarantee and
    errors are those of [`AOLConv2d`][orthonet.layers.AOLConv2d].

    Examples:
        >>> CholeskyConv2d(3, 8, 1)(torch.zeros(5, 3, 2, 2)).shape
        torch.Size([5, 8, 2, 2])

    References:
        See [`CholeskyLinear`][orthonet.layers.CholeskyLinear].
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
