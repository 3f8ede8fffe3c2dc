r"""Convolutions on a torus as a matrix at each frequency.

A real circular convolution is block diagonal after the Fourier transform. Here the spatial sizes
are (h, w), the frequencies those of `torch.fft.rfft2`, flattened; the others are conjugates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["apply_symbol", "kernel_symbol"]


def kernel_symbol(
    kernel: Tensor,
    size: tuple[int, int],
    *,
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    r"""Return the symbol of a kernel, one matrix a frequency.

    \(S(f) = \sum_t K_t\, e^{2 \pi i \langle f, (t - c) d / N \rangle}\), where c is the center
    of the kernel, as for "same" padding. Taps beyond the torus wrap around.

    Args:
        kernel: Real kernels.
        size: Height and width of the torus.
        dilation: Spacing of the taps.

    Shape:
        `kernel`: `(*batch, c_out, c_in, kh, kw)`. Output: complex,
        `(*batch, frequencies, c_out, c_in)` with h (w // 2 + 1) frequencies.
    """
    waves = []
    for axis, (n, k, d) in enumerate(zip(size, kernel.shape[-2:], dilation, strict=True)):
        frequencies = torch.arange(n if axis == 0 else n // 2 + 1, device=kernel.device)
        taps = (torch.arange(k, device=kernel.device) - (k - 1) // 2) * d
        turns = (frequencies[None] * taps[:, None]).remainder(n)
        waves.append(turns.to(kernel.dtype) * (2 * math.pi / n))
    angles = waves[0][:, None, :, None] + waves[1][None, :, None, :]
    angles = angles.flatten(2).flatten(0, 1)  # (taps, frequencies)
    flat = kernel.flatten(-2)
    symbol = torch.complex(flat @ angles.cos(), flat @ angles.sin())
    return symbol.movedim(-1, -3)


def apply_symbol(
    x: Tensor,
    blocks: Tensor,
) -> Tensor:
    r"""Multiply a real image by a matrix at each frequency.

    Args:
        x: Images.
        blocks: One complex matrix for each group and frequency of `torch.fft.rfft2`.

    Shape:
        `x`: (n, groups c_in, h, w), `blocks`: (groups, h (w // 2 + 1), c_out, c_in). Output:
        (n, groups c_out, h, w), real.
    """
    groups, _, rows, columns = blocks.shape
    size = x.shape[-2:]
    if x.shape[0] == 0:  # which the transforms of some libraries refuse; gradients are zero
        empty = x.new_zeros(0, groups * rows, *size)
        return empty * (x.sum() + blocks.real.sum())
    spectrum = torch.fft.rfft2(x).flatten(2).unflatten(1, (groups, columns))
    product = blocks @ spectrum.permute(1, 3, 2, 0)  # (groups, frequencies, c_out, n)
    y = product.permute(3, 0, 2, 1).flatten(1, 2)
    return torch.fft.irfft2(y.unflatten(-1, (size[0], size[1] // 2 + 1)), s=size)
