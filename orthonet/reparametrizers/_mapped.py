"""Sub-modules of layers whose weight is a function of one free parameter."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet._torch import without_autocast
from orthonet.errors import NotOnManifoldError
from orthonet.linalg import haar
from orthonet.linalg.kernels.fourier import kernel_symbol
from orthonet.linalg.matrix import compute_dtype
from orthonet.reparametrizers.weight import Weight, relative_distance, settled

__all__ = ["FourierWeight", "MappedWeight"]

_ALLOWED = {torch.float32: 1e-4, torch.float64: 1e-8}


class MappedWeight(Weight):
    r"""A weight \(K \cdot f(\mathrm{original})\) for a map f onto norm at most 1.

    `project_` makes \(K f(w / K)\) the weight; `assign_` asks that this is `w`.

    Args:
        shape: Shape of the parameter and of the weight.
        function: The map f, a function of one tensor that can be pickled (a module-level function
            or a `functools.partial` of one).
        initial: Called with the shape and `dtype`, `device`; returns the first parameter.
        lipschitz: The factor K.
        device: Device of the parameter.
        dtype: Floating-point dtype of the parameter.
        inverse: Returns a parameter whose weight is the given one or near it; the given weight
            itself if None.
        weight_shape: Shape of the weight where it is not that of the parameter.

    Shape:
        Output: `weight_shape`.

    Guarantee:
        That of f, up to the rounding of the storage dtype; computed in float32 at least, also under
        autocast.

    Raises:
        ValueError: `lipschitz` is not a positive finite number.
    """

    def __init__(
        self,
        shape: Sequence[int],
        function: Callable[[Tensor], Tensor],
        initial: Callable[..., Tensor],
        lipschitz: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        inverse: Callable[[Tensor], Tensor] | None = None,
        weight_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        _checks.lipschitz_constant(self, lipschitz)
        self.function = function
        self.initial = initial
        self.inverse = inverse
        self.weight_shape = tuple(shape if weight_shape is None else weight_shape)
        self.lipschitz = float(lipschitz)
        self.original = nn.Parameter(torch.empty(tuple(shape), device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return torch.Size(self.weight_shape)

    def evaluate(self) -> Tensor:
        """Compute the weight, in the dtype of `original`."""
        return self._compute(settled(self.original)).to(self.original.dtype)

    def _compute(self, original: Tensor) -> Tensor:
        with without_autocast(original):
            weight = self.function(original.to(compute_dtype(original.dtype)))
            return weight if self.lipschitz == 1.0 else weight * self.lipschitz

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameter anew; nothing happens on the meta device."""
        if not self.original.is_meta:
            dtype = compute_dtype(self.original.dtype)
            shape = self.original.shape
            self.original.copy_(self.initial(shape, dtype=dtype, device=self.original.device))

    def _fit(self, w: Tensor, owner: object, exactly: bool) -> tuple[Tensor, float]:
        r"""The parameter w / K, or its inverse, and how far \(K f(w / K)\) is from `w`."""
        self._require_shape(w, owner)
        if self.inverse is None and self.weight_shape != tuple(self.original.shape):
            self._refuse(owner)
        value = w.to(self.original.device, compute_dtype(w.dtype)) / self.lipschitz
        value = value if self.inverse is None else self.inverse(value)
        distance, allowed = relative_distance(self._compute(value), w), _ALLOWED.get(w.dtype, 1e-2)
        _checks.require(
            not exactly or distance <= allowed,
            owner,
            f"a weight must be one that the layer can represent (to {allowed:.0e}, relative)",
            "Use project_ to take the weight that the layer makes of it",
            NotOnManifoldError,
            relative_distance=distance,
        )
        return value, distance

    def _set(self, fitted: Tensor) -> None:
        self.original.copy_(fitted)

    def extra_repr(self) -> str:
        scale = "" if self.lipschitz == 1.0 else f", lipschitz={self.lipschitz:g}"
        return f"{_name(self.function)}, shape={tuple(self.original.shape)}{scale}"


class FourierWeight(MappedWeight):
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
        _checks.in_range(type(self), 0.0, 1e3, noise=noise)
        initial = functools.partial(_noisy_kernel, noise=noise, center=center)
        super().__init__(shape, function, initial, device=device, dtype=dtype)
        self.dilation = dilation
        self._size = (1, 1)

    shape, _fit = Weight.shape, Weight._fit  # of the blocks, which cannot be assigned

    def forward(self, size: tuple[int, int]) -> Tensor:
        """Return the blocks on a torus of this height and width."""
        if torch.compiler.is_compiling() or not self.may_be_kept():
            return self._blocks(size)
        with self._slot.lock:  # a thread with another size waits
            if self._size != size:
                self._size = size
            return super().forward()

    def evaluate(self) -> Tensor:
        """Compute the blocks of the last size that was asked for."""
        return self._blocks(self._size)

    def _blocks(self, size: tuple[int, int]) -> Tensor:
        stored = settled(self.original)
        with without_autocast(stored):
            kernel = stored.to(compute_dtype(stored.dtype))
            return self.function(kernel_symbol(kernel, size, dilation=self.dilation))


def _noisy_kernel(shape: Sequence[int], noise: float, center: bool, **factory: Any) -> Tensor:
    """A random kernel, and a semi-orthogonal central tap."""
    value = torch.randn(tuple(shape), **factory) * (noise * math.prod(shape[2:]) ** -0.5)
    if center:
        kh, kw = ((k - 1) // 2 for k in shape[-2:])
        value[..., kh, kw] += haar(shape[:3], device=value.device).to(value.dtype)
    return value


def _name(function: Any) -> str:
    """The name of a function, or of the one that a `functools.partial` calls."""
    function = getattr(function, "func", function)
    return getattr(function, "__name__", str(function))
