"""Convex potential layers (CPL) and SDP-based Lipschitz layers (SLL)."""

from __future__ import annotations

from orthonet.layers.zoo.residual_base import ResidualConv2d, ResidualLinear

__all__ = ["CPLConv2d", "CPLLinear", "SLLConv2d", "SLLLinear"]


class CPLLinear(ResidualLinear):
    r"""Convex potential layer: \(y = x - \frac{2}{\beta} J^\top s(J x + b)\).

    A step of gradient descent on a convex potential. \(\beta \ge \|J\|^2\) is bounded by Gram
    iteration, and the gradient passes through it; the reference implementation takes power
    iteration, which bounds from below. Features of zeros are appended before the layer, or
    dropped after it, where the sizes differ. The layer contains its activation, and `bias` stands
    inside of it.

    The other arguments are those of [`AOLLinear`][orthonet.layers.AOLLinear].

    Args:
        hidden_features: Rows of J; the larger of both sizes by default.
        activation: "relu", "softplus", "tanh" or "sigmoid": slopes in [0, 1].

    Shape:
        As `nn.Linear`.

    Guarantee:
        As of `AOLLinear`.

    Raises:
        ValueError: An argument is out of range.

    Examples:
        >>> CPLLinear(3, 8)(torch.zeros(2, 3)).shape
        torch.Size([2, 8])

    References:
        Meunier, Delattre, Araujo & Allauzen, *A dynamical system perspective for Lipschitz neural
        networks*, ICML 2022, arXiv:2110.12690.
    """


class CPLConv2d(ResidualConv2d):
    r"""Convex potential layer with a convolution J, see [`CPLLinear`][orthonet.layers.CPLLinear].

    \(\beta\) bounds the squared norm of the whole convolution from above, see
    [`convolution_norm_upper`][orthonet.linalg.convolution_norm_upper]. The other arguments are
    those
    of [`AOLConv2d`][orthonet.layers.AOLConv2d].

    Args:
        kernel_size: Odd.
        stride: Above 1 a semi-orthogonal matrix on blocks of stride x stride pixels stands
            behind the residual, and the residual works on `in_channels`.
        padding: "same", or the number that keeps the size at stride 1.
        hidden_channels: Channels of J x; the larger of both numbers by default.
        activation: As of `CPLLinear`.

    Shape:
        (N, in_channels, H, W) or (in_channels, H, W) to the same with out_channels and H and W
        divided by the stride.

    Guarantee:
        As of `AOLLinear`, for every image size.

    Raises:
        ValueError: The kernel is even, the padding another, or an argument out of range; when
            called:
            the stride does not divide a size.

    Examples:
        >>> CPLConv2d(3, 8, 3, stride=2)(torch.zeros(1, 3, 6, 6)).shape
        torch.Size([1, 8, 3, 3])

    References:
        Meunier et al., ICML 2022; Boissin et al., ICML 2025 (the strided residual).
    """


class SLLLinear(ResidualLinear):
    r"""SDP-based Lipschitz layer: \(y = x - 2 J^\top T^{-1} s(J x + b)\), T diagonal.

    \(t_i = \sum_j |J J^\top|_{ij}\, q_j / q_i\) with learnable \(q > 0\), see
    [`gershgorin_scale`][orthonet.linalg.gershgorin_scale]. Arguments, shapes, guarantee and errors
    are those of [`CPLLinear`][orthonet.layers.CPLLinear].

    Examples:
        >>> SLLLinear(3, 8)(torch.zeros(3)).shape
        torch.Size([8])

    References:
        Araujo, Havens, Delattre, Allauzen & Hu, *A unified algebraic perspective on Lipschitz
        neural networks*, ICLR 2023 (SDP-based Lipschitz layers), arXiv:2303.03169.
    """

    _free = True


class SLLConv2d(ResidualConv2d):
    r"""SDP-based Lipschitz layer with a convolution J.

    The convolution of [`SLLLinear`][orthonet.layers.SLLLinear]: the modulus of \(J J^\top\) is
    summed over all lags of the kernel's autocorrelation, with q inside the sum. Arguments, shapes,
    guarantee and errors are those of [`CPLConv2d`][orthonet.layers.CPLConv2d].

    Examples:
        >>> SLLConv2d(3, 8, 3)(torch.zeros(3, 6, 5)).shape
        torch.Size([8, 6, 5])

    References:
        Araujo et al., ICLR 2023.
    """

    _free = True
