"""Orthogonal convolution kernels by the AOC construction (paraunitary factors and a reshape)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from orthonet import _checks
from orthonet.errors import NotOnManifoldError
from orthonet.linalg import apply_projectors, block_convolution
from orthonet.linalg._matrix import compute_dtype
from orthonet.reparametrizers._cache import CachedWeight
from orthonet.reparametrizers._kernel_fit import KernelFactors, fit_factors
from orthonet.reparametrizers._params import DEFAULT_ORTHO_PARAMS, OrthoParams
from orthonet.reparametrizers._weight import OrthoWeight

__all__ = ["OrthoKernel"]


class OrthoKernel(CachedWeight):
    r"""Kernel of an orthogonal convolution with stride, composed from orthogonal matrices.

    For each group with \(c_i\) input and \(c_o\) output channels, stride s and kernel size k >= s,
    with \(S = \prod_d s_d\):

    - \(c_o \le c_i S\) (contracting): \(K(z) = R(z) \prod_f P_f(z)\) with a reshaped matrix R,
      \(c_o \times c_i S\) with orthonormal rows (an s x s kernel at stride s), and
      \(k_d - s_d\) paraunitary factors \(P_f(z) = V_f V_f^\top + (I - V_f V_f^\top) z_d\) in each
      dimension d.
    - \(c_o > c_i S\) (expanding): \(K(z) = R(z) \prod_f P_f(z)\, U\) through
      \(c = \lfloor c_o / S \rfloor\) channels, U being \(c \times c_i\) and R \(c_o \times c S\)
      with orthonormal columns.

    The bases \(V_f\) have \(\lfloor c / 2 \rfloor\) columns. All factors of a kind are
    orthogonalized as one batch. With one channel a paraunitary factor can only be a delay; half of
    them are taken as delays, which centres the kernel.

    Args:
        out_channels: Channels out, of all groups.
        in_channels: Channels in, of all groups.
        kernel_size: Taps per dimension.
        stride: Stride per dimension.
        groups: Number of groups.
        ortho_params: Which normalizer and orthogonalizer make the factors.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.

    Shape:
        Output: (out_channels, in_channels / groups, *kernel_size).

    Guarantee:
        The convolution is orthogonal on every torus whose sizes the stride divides: isometric when
        expanding, co-isometric when contracting.

    References:
        Boissin, Mamalet, Fel, Picard, Massena & Serrurier, *An adaptive orthogonal convolution
        scheme for efficient and flexible CNN architectures*, ICML 2025; Li et al., NeurIPS 2019.
    """

    def __init__(
        self,
        out_channels: int,
        in_channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        groups: int = 1,
        ortho_params: OrthoParams = DEFAULT_ORTHO_PARAMS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.kernel_size, self.stride = tuple(kernel_size), tuple(stride)
        self.shape = torch.Size((out_channels, in_channels // groups, *kernel_size))
        out, self.inner = out_channels // groups, in_channels // groups
        area = math.prod(stride)
        self.contracting = out <= self.inner * area
        self.channels = self.inner if self.contracting else out // area
        self.delays = tuple(k - s for k, s in zip(kernel_size, stride, strict=True))
        factors, rank = sum(self.delays), self.channels // 2

        def build(*shape: int) -> OrthoWeight:
            return OrthoWeight((groups, *shape), ortho_params, device, dtype)

        self.outer = build(out, self.channels * area) if self.contracting or area > 1 else None
        self.embedding = build(self.channels, self.inner) if self.channels > self.inner else None
        self.bases = build(factors, self.channels, rank) if factors and rank else None

    def _parts(self) -> list[OrthoWeight]:
        parts = (self.outer, self.embedding, self.bases)
        return [part for part in parts if part is not None]

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype of the parameters."""
        return self._parts()[0].original.dtype

    def factors(self) -> KernelFactors:
        """The present orthogonal factors, in the dtype of the computation."""
        values = (
            None if part is None else part.compute()
            for part in (self.outer, self.embedding, self.bases)
        )
        return KernelFactors(*values)

    def evaluate(self) -> Tensor:
        """Compute the kernel, in the dtype of the parameters."""
        first = self._parts()[0].original
        with torch.autocast(first.device.type, enabled=False):
            return self.compose(self.factors()).to(first.dtype)

    def compose(self, factors: KernelFactors) -> Tensor:
        """The kernel that a set of orthogonal factors makes."""
        kernel = self.delay(self.start(factors), factors.bases)
        kernel = kernel.movedim(-1, 1 if self.contracting else 2)
        if not self.contracting and factors.outer is not None:
            outer = factors.outer.unflatten(-1, (self.channels, *self.stride))
            kernel = block_convolution(outer, kernel, spatial_dims=len(self.stride))
        return kernel.reshape(self.shape)

    def start(self, factors: KernelFactors) -> Tensor:
        """What the paraunitary factors act on, (groups, channels, *taps, columns).

        The transpose of R when contracting, U (or I) with a single tap when expanding.
        """
        outer, embedding = factors.outer, factors.embedding
        if embedding is not None:
            return embedding.unflatten(-1, (*(1,) * len(self.stride), self.inner))
        if outer is None:
            _checks.fail(self, "a kernel has an outer factor or an embedding", "Pass factors()")
        if self.contracting:
            return outer.unflatten(-1, (self.channels, *self.stride)).movedim(1, -1)
        eye = torch.eye(self.channels, dtype=outer.dtype, device=outer.device)
        eye = eye.expand(self.groups, -1, -1)
        return eye.unflatten(-1, (*(1,) * len(self.stride), self.inner))

    def delay(self, kernel: Tensor, bases: Tensor | None) -> Tensor:
        """Multiply by all paraunitary factors, dimension by dimension."""
        if bases is None:
            pad = [n for d in reversed(self.delays) for n in (d // 2, d - d // 2)]
            return F.pad(kernel, [0, 0, *pad])
        for dim, some in enumerate(bases.split(self.delays, dim=1)):
            kernel = apply_projectors(kernel, some, taps=len(self.stride), dim=dim)
        return kernel

    def reset_parameters(self) -> None:
        """Draw every factor from the Haar distribution; nothing happens on the meta device."""
        for part in self._parts():
            part.reset_parameters()

    @torch.no_grad()
    def assign_(self, w: Tensor, owner: object = None) -> None:
        r"""Make `w` the value of the kernel, by finding factors; errors name `owner`.

        Kernels that this construction composed are found, except now and then when it is expanding
        and strided at once, where the search is local.

        Raises:
            ValueError: `w` has another shape or is not finite.
            NotOnManifoldError: no factors were found that compose `w` to relative accuracy
                \(\sqrt{\mathrm{eps}}\); nothing has been changed.
        """
        fitted, distance = self._fit(w, owner or self, restarts=4)
        allowed = torch.finfo(w.dtype).eps ** 0.5
        _checks.require(
            distance <= allowed,
            owner or self,
            f"the kernel must be one that the factors can compose (to {allowed:.1e})",
            "Call layer.project_(weight) to take the nearest kernel that is found",
            NotOnManifoldError,
            relative_distance=distance,
            shape=tuple(w.shape),
        )
        self._set(fitted)

    @torch.no_grad()
    def project_(self, w: Tensor, owner: object = None) -> float:
        r"""Set the nearest kernel that alternating projections find; return its distance.

        Factor by factor, the best orthogonal one with the others held is a polar factor or a set of
        leading eigenvectors. This ascends to a local, not always the global, optimum.

        Returns:
            \(\|K - W\|_F / \|W\|_F\).

        Raises:
            ValueError: `w` has another shape or is not finite; nothing has been changed.
        """
        fitted, distance = self._fit(w, owner or self, restarts=0)
        self._set(fitted)
        return distance

    def _fit(self, w: Tensor, owner: object, restarts: int) -> tuple[KernelFactors, float]:
        good = isinstance(w, Tensor) and w.shape == self.shape
        _checks.require(
            good and bool(torch.isfinite(w).all()),
            owner,
            f"the kernel must be finite and have shape {tuple(self.shape)}",
            "Transpose or clean it",
            weight=w,
        )
        target = w.detach().double().reshape(self.groups, -1, *self.shape[1:])
        enough = torch.finfo(w.dtype).eps ** 0.5
        return fit_factors(self, target, restarts=restarts, enough=enough)

    def _set(self, factors: KernelFactors) -> None:
        parts = (self.outer, self.embedding, self.bases)
        for part, value in zip(parts, factors, strict=True):
            if part is not None and value is not None:
                part.assign_(value.to(compute_dtype(part.original.dtype)))

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shape)}, stride={self.stride}, groups={self.groups}"
