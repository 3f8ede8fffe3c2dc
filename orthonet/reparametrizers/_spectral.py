"""Sub-modules that make one matrix for each frequency of a torus from a free kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet._torch import without_autocast
from orthonet.linalg import haar
from orthonet.linalg.kernels.fourier import kernel_symbol
from orthonet.linalg.matrix import compute_dtype
from orthonet.reparametrizers.providers.cold_cache import slot_of
from orthonet.reparametrizers.weight import Weight

__all__ = ["FourierWeight"]


class FourierWeight(Weight):
    r"""Blocks \(g(S(f))\) for the symbol S of a free kernel and a function g of matrices.

    Those of the last size that was asked for are kept, as a weight is.

    Args:
        shape: Shape (groups, rows, columns, kh, kw) of the kernel.
        function: The map g on batches of complex matrices; it can be pickled.
        dilation: Spacing of the taps.
        noise: Size of the random part of the first kernel, beside a semi-orthogonal central tap.
        center: Whether the first kernel has this central tap.
        device: Device of the kernel.
        dtype: Floating-point dtype of the kernel.

    Shape:
        Called with the (h, w) of the torus; output: complex (groups, frequencies, *g's sides).
    """

    def __init__(
        self,
        shape: Sequence[int],
        function: Callable[[Tensor], Tensor],
        dilation: tuple[int, int] = (1, 1),
        noise: float = 0.1,
        center: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.in_range(self, 0.0, 1e3, noise=noise)
        self.function = function
        self.dilation = dilation
        self.noise = noise
        self.center = center
        self._size = (1, 1)
        self.original = nn.Parameter(torch.empty(tuple(shape), device=device, dtype=dtype))
        self.reset_parameters()

    def forward(self, size: tuple[int, int]) -> Tensor:
        """Return the blocks on a torus of this height and width."""
        if torch.compiler.is_compiling() or not self.may_be_kept():
            return self._blocks(size)
        slot = slot_of(self)
        with slot.lock:  # a thread with another size waits
            if self._size != size:
                self._size, slot.current = size, None
            return super().forward()

    def evaluate(self) -> Tensor:
        """Compute the blocks of the last size that was asked for."""
        return self._blocks(self._size)

    def _blocks(self, size: tuple[int, int]) -> Tensor:
        stored = self.original
        with without_autocast(stored):
            kernel = stored.to(compute_dtype(stored.dtype))
            return self.function(kernel_symbol(kernel, size, dilation=self.dilation))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the kernel anew; nothing happens on the meta device."""
        if self.original.is_meta:
            return
        kernel = self.original
        fan = kernel.shape[2] * kernel[0, 0, 0].numel()
        value = torch.randn_like(kernel) * (self.noise * fan**-0.5)
        if self.center:
            kh, kw = ((k - 1) // 2 for k in kernel.shape[-2:])
            value[..., kh, kw] += haar(kernel.shape[:3], device=kernel.device).to(kernel.dtype)
        kernel.copy_(value)

    def extra_repr(self) -> str:
        name = getattr(self.function, "func", self.function)
        return f"{getattr(name, '__name__', name)}, shape={tuple(self.original.shape)}"
