"""Convex potential layers (CPL) and SDP-based Lipschitz layers (SLL)."""

from __future__ import annotations

from orthonet.layers.zoo.residual_base import ResidualConv2d, ResidualLinear

__all__ = ["CPLConv2d", "CPLLinear", "SLLConv2d", "SLLLinear"]


class CPLLinear(ResidualLinear):
    r"""Convex potential layer: \(y = x - \frac{2}{\beta} J^\top s(J x + b)\).

    A step of gradient descent on a convex potential. \(\beta \ge \|J\|^2\) is bounded by Gram
    iteration, and the gradient passes through it; the reference implementation takes power
    iteration, which bounds from below. Features of zeros are appended before the layer, or
    dropped after it, where the sizes differ. The layer contains its activation.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether to add a learnable bias inside the activation, zero at first.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters; computed in float32 at least.
        hidden_features: Rows of J; the larger of both sizes by default.
        activation: "relu", "softplus", "tanh" or "sigmoid": slopes in [0, 1].
        lipschitz: The constant K of the layer.

    Shape:
        Input `(*, in_features)`, output `(*, out_features)`.

    Guarantee:
        l2 -> l2 constant at most `lipschitz`, to \(10^{-5}\) (float32) or \(10^{-12}\) (float64)
        relative, in train and eval mode, for every finite parameter.

    Raises:
        ValueError: a size is not a positive integer, or another argument out of range.

    References:
        Meunier, Delattre, Araujo & Allauzen, *A dynamical system perspective for Lipschitz neural
        networks*, ICML 2022, arXiv:2110.12690.
    """


class CPLConv2d(ResidualConv2d):
    r"""Convex potential layer with a convolution J, see [`CPLLinear`][orthonet.layers.CPLLinear].

    \(\beta\) bounds the squared norm of the whole convolution from above, see
    [`convolution_norm_upper`][orthonet.linalg.convolution_norm_upper].

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Taps, odd.
        stride: Stride. Above 1 a semi-orthogonal matrix on blocks of stride x stride pixels stands
            behind the residual, and the residual works on `in_channels`.
        padding: "same", or the number that keeps the size at stride 1.
        dilation: Spacing of the taps.
        groups: Number of groups.
        bias: Whether to add a learnable bias inside the activation, zero at first.
        padding_mode: "zeros" or "circular".
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters; computed in float32 at least.
        hidden_channels: Channels of J x; the larger of both numbers by default.
        activation: "relu", "softplus", "tanh" or "sigmoid": slopes in [0, 1].
        lipschitz: The constant K of the layer.

    Shape:
        (N, in_channels, H, W) or (in_channels, H, W) to the same with out_channels and H and W
        divided by the stride.

    Guarantee:
        l2 -> l2 constant at most `lipschitz`, to \(10^{-5}\) (float32) or \(10^{-12}\) (float64)
        relative, for every image size and finite parameter.

    Raises:
        ValueError: Even kernels, other paddings, or an argument out of range; when called: a size
            that the stride does not divide.

    References:
        Meunier et al., ICML 2022; Boissin et al., ICML 2025 (the strided residual).
    """


class SLLLinear(ResidualLinear):
    r"""SDP-based Lipschitz layer: \(y = x - 2 J^\top T^{-1} s(J x + b)\), T diagonal.

    \(t_i = \sum_j |J J^\top|_{ij}\, q_j / q_i\) with learnable \(q > 0\), see
    [`gershgorin_scale`][orthonet.linalg.gershgorin_scale]. Arguments, shapes and errors are those
    of [`CPLLinear`][orthonet.layers.CPLLinear].

    Guarantee:
        l2 -> l2 constant at most `lipschitz`, to \(10^{-5}\) (float32) or \(10^{-12}\) (float64)
        relative, for every finite parameter.

    References:
        Araujo, Havens, Delattre, Allauzen & Hu, *A unified algebraic perspective on Lipschitz
        neural networks*, ICLR 2023 (SDP-based Lipschitz layers), arXiv:2303.03169.
    """

    _free = True


class SLLConv2d(ResidualConv2d):
    r"""SDP-based Lipschitz layer with a convolution J.

    See [`SLLLinear`][orthonet.layers.SLLLinear].

    The modulus of \(J J^\top\) is summed over all lags of the kernel's autocorrelation, with q
    inside the sum. Arguments, shapes and errors are those of
    [`CPLConv2d`][orthonet.layers.CPLConv2d].

    Guarantee:
        l2 -> l2 constant at most `lipschitz`, to \(10^{-5}\) (float32) or \(10^{-12}\) (float64)
        relative, for every image size and finite parameter.

    References:
        Araujo et al., ICLR 2023.
    """

    _free = True
