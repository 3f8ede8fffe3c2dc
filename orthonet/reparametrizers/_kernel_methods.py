"""Constructions of convolution kernels by name; the simplest one beside `OrthoKernel`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from orthonet.reparametrizers._kernel import OrthoKernel
from orthonet.reparametrizers.orthogonal import OrthoWeight
from orthonet.reparametrizers.params import DEFAULT_ORTHO_PARAMS, OrthoParams
from orthonet.reparametrizers.weight import Weight

__all__ = ["KERNEL_METHODS", "ReshapedKernel"]


class ReshapedKernel(Weight):
    r"""A semi-orthogonal matrix reshaped into a kernel and divided by the overlap of its taps.

    \(K = \mathrm{reshape}(W) / \sqrt{\prod_d \lceil k_d / s_d \rceil}\) with W of shape
    \(c_o \times c_i \prod_d k_d\) (RKO). Every input value is read by at most
    \(m = \prod_d \lceil k_d / s_d \rceil\) windows, so stacking the windows has norm
    \(\sqrt m\) at most, and the convolution norm 1 at most.

    The arguments are those of [`OrthoKernel`][orthonet.reparametrizers.OrthoKernel], but for
    `ranks`.

    Shape:
        Output: (out_channels, in_channels / groups, *kernel_size).

    Guarantee:
        For gain 1, norm at most 1 with zero or no padding, and on every torus whose sizes the
        stride divides; no singular value is bounded from below, except that the convolution is
        co-isometric where k <= s and \(c_o \le c_i \prod_d k_d\), isometric where k = s and
        \(c_o \ge c_i \prod_d k_d\).

    References:
        Serrurier, Mamalet, González-Sanz, Boissin, Loubes & del Barrio, *Achieving robustness in
        classification using optimal transport with hinge regularization*, CVPR 2021, appendix;
        Tsuzuku, Sato & Sugiyama, NeurIPS 2018, for the bound by overlap.
    """

    opaque = True

    def __init__(
        self,
        out_channels: int,
        in_channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        groups: int = 1,
        ortho_params: OrthoParams | str = DEFAULT_ORTHO_PARAMS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.groups, self.gain = groups, float(gain)
        self.kernel_size, self.stride = tuple(kernel_size), tuple(stride)
        self._shape = torch.Size((out_channels, in_channels // groups, *kernel_size))
        pairs = list(zip(self.kernel_size, self.stride, strict=True))
        self.overlap = math.prod(-(-k // s) for k, s in pairs)
        self._rows, self._columns = out_channels // groups, self._shape[1:].numel()
        self.outer = OrthoWeight((groups, self._rows, self._columns), ortho_params, device, dtype)

    @property
    def shape(self) -> torch.Size:
        """Shape of the kernel, (out, in / groups, *taps)."""
        return self._shape

    @property
    def orthogonal(self) -> bool:
        """Whether all non-trivial singular values on a torus are 1."""
        same = self.kernel_size == self.stride
        return self.gain == 1.0 and self.overlap == 1 and (same or self._rows <= self._columns)

    @property
    def _scale(self) -> float:
        return self.gain * self.overlap**-0.5

    def evaluate(self) -> Tensor:
        """Compute the kernel, in the dtype of the parameters."""
        matrix = self.outer.as_part()
        return (self._scale * matrix).reshape(self.shape).to(self.outer.original.dtype)

    def reset_parameters(self) -> None:
        """Draw the matrix from the Haar distribution; nothing happens on the meta device."""
        self.outer.reset_parameters()

    def _fit(self, w: Tensor, owner: object, exactly: bool) -> tuple[Tensor, float]:
        self._require_shape(w, owner)
        return self.outer._fit(w.reshape(self.outer.shape) / self._scale, owner, exactly)

    def _set(self, fitted: Tensor) -> None:
        self.outer._set(fitted)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shape)}, stride={self.stride}, groups={self.groups}"


KERNEL_METHODS: dict[str, Callable[..., Any]] = {"aoc": OrthoKernel, "rko": ReshapedKernel}
"""Constructions that `OrthoConv2d(..., method=...)` and its like know.

Each is called with (out_channels, in_channels, kernel_size, stride, groups, ortho_params, device,
dtype, gain=...) and returns a module with `forward`, `assign_`, `project_`, `reset_parameters` and
`orthogonal`. A transposed convolution swaps the channels and takes the same kernel.
"""
