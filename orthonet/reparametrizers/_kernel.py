"""Orthogonal convolution kernels by the AOC construction (paraunitary factors and a reshape)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthonet import _checks, _torch
from orthonet.errors import NotOnManifoldError
from orthonet.linalg.kernels.filtering import filter_signal
from orthonet.linalg.kernels.fit import fit_factors
from orthonet.linalg.kernels.geometry import KernelFactors, KernelGeometry
from orthonet.linalg.matrix import compute_dtype
from orthonet.reparametrizers.orthogonal import OrthoWeight
from orthonet.reparametrizers.params import DEFAULT_ORTHO_PARAMS, OrthoParams
from orthonet.reparametrizers.weight import Composition, Weight

__all__ = ["OrthoKernel"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class OrthoKernel(Weight):
    r"""Kernel of an orthogonal convolution with stride, composed from orthogonal matrices.

    For each group with \(c_i\) input and \(c_o\) output channels, stride s and kernel size k, with
    \(b_d = \min(k_d, s_d)\) and \(S = \prod_d b_d\):

    - \(c_o \le c_i S\) (contracting): \(K(z) = R(z) \prod_f P_f(z)\) with a reshaped matrix R,
      \(c_o \times c_i S\) with orthonormal rows (a kernel of b taps at stride s), and
      \(k_d - b_d\) paraunitary factors \(P_f(z) = Q_f + (I - Q_f) z_d\) in each dimension d.
    - \(c_o > c_i S\) (expanding): \(K(z) = R(z) \prod_f P_f(z)\, U\) through
      \(c = \lfloor c_o / S \rfloor\) channels, U being \(c \times c_i\) and R \(c_o \times c S\)
      with orthonormal columns.

    The projectors are \(Q_f = V_f V_f^\top\) with \(\lfloor c / 2 \rfloor\) columns
    (`ranks="half"`), or \(Q_f = V_f\,\mathrm{diag}(w_f)\,V_f^\top\) with a square \(V_f\) and
    learned \(w_f \in \{0, 1\}^c\) (`ranks="free"`). All factors of a kind are orthogonalized as one
    batch. With one channel a paraunitary factor can only be a delay; half of them are taken as
    delays (`"half"`), which centers the kernel, or each is learned (`"free"`).

    **What `ranks="free"` adds.** At stride 1 the factors then make *every* separable orthogonal
    kernel \(\prod_d K_d(z_d)\): if \(M(z) = \sum_{t=0}^{L} M_t z^t\) has
    \(M(z^{-1})^\top M(z) = I\), then \(M_0^\top M_L = 0\), so with the projector Q onto the range
    of \(M_0\) the product \((Q + (I - Q) z^{-1}) M(z)\) has taps 0 to L - 1 only, and L such steps
    leave a matrix (wide kernels: transpose). With half ranks the determinant of a square kernel has
    the fixed degree \(\sum_f \lfloor c/2 \rfloor\), so a shift of all channels by one pixel is
    out of reach; no path of orthogonal kernels leads there either, which is why the ranks must
    jump. Outside remain kernels that are not products of one-dimensional ones, and, for stride
    above 1, kernels whose taps overlap across the stride (k >= 2 s) in ways that no factor before
    the stride makes.

    The kernel is affine in each \(w_{f,j}\), so \(\partial K / \partial w_{f,j}\) is exactly the
    change of K when that column joins the projector. The parameter behind w is a score; w is 1
    where it is positive, and the gradient passes to the score unchanged (straight-through). The
    kernel is orthogonal at every step. Train the scores more slowly than the rest (a parameter
    group with a thirtieth of the learning rate), so that projectors turn before their ranks jump.

    **Assigning a kernel.** `assign_` reads the factors off: those of an expanding strided kernel
    through the Gram matrix of its taps, the projectors from the ranges of the outermost taps (exact
    for `ranks="free"`, see above). Alternating projections polish them, until they compose the
    kernel to relative accuracy \(\sqrt{\mathrm{eps}}\). `project_` only alternates: factor by
    factor, the best one with the others held is a polar factor or a set of leading eigenvectors.
    This ascends to a local, not always the global, optimum.

    Args:
        out_channels: Channels out, of all groups.
        in_channels: Channels in, of all groups.
        kernel_size: Taps per dimension.
        stride: Stride per dimension, in taps: for a convolution with dilation d,
            \(s / \gcd(s, d)\).
        groups: Number of groups.
        ortho_params: Which normalizer and orthogonalizer make the factors.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.
        ranks: "half" or "free".
        gain: A constant by which the kernel is multiplied.

    Shape:
        Output: (out_channels, in_channels / groups, *kernel_size).

    Guarantee:
        For gain 1, the convolution is orthogonal on every torus whose sizes the stride divides:
        co-isometric when contracting, isometric when expanding with k >= s. Where a kernel is
        smaller than the stride, some inputs are never read: an expanding one then has the singular
        values 1 and 0.

    Raises:
        ValueError: `ranks` is neither "half" nor "free".

    References:
        Boissin, Mamalet, Fel, Picard, Massena & Serrurier, *An adaptive orthogonal convolution
        scheme for efficient and flexible CNN architectures*, ICML 2025; Li et al., NeurIPS 2019;
        Su, Byeon & Huang, *Scaling-up diverse orthogonal convolutional networks by a paraunitary
        framework*, ICML 2022 (arXiv 2106.09121), for the complete separable family.
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
        ranks: str = "half",
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        _checks.one_of(self, ("half", "free"), ranks=ranks)
        self.geometry = KernelGeometry(
            out_channels, in_channels, tuple(kernel_size), tuple(stride), groups, ranks, float(gain)
        )
        self._composing = self.geometry.composing  # counted here: torch.compile cannot
        outer, embedding, bases = (
            None if shape is None else OrthoWeight(shape, ortho_params, device, dtype)
            for shape in self.geometry.factor_shapes()
        )
        self.outer, self.embedding, self.bases = outer, embedding, bases
        for part in self._parts():
            part.composed = True
        self.scores: nn.Parameter | None = None
        if ranks == "free" and self.bases is not None:
            sizes = (groups, len(self.geometry.dims), self.geometry.channels)
            empty = torch.empty(sizes, device=device, dtype=dtype)
            self.scores = nn.Parameter(empty)
            self._reset_scores()

    @property
    def shape(self) -> torch.Size:
        """Shape of the kernel, (out, in / groups, *taps)."""
        return self.geometry.shape

    @property
    def orthogonal(self) -> bool:
        """Whether all non-trivial singular values on a torus are 1."""
        return self.geometry.orthogonal

    def _parts(self) -> list[OrthoWeight]:
        return [p for p in (self.outer, self.embedding, self.bases) if p is not None]

    def composition(self) -> Composition | None:
        """From the values of the factors; None for a subclass that computes something else."""
        if type(self).evaluate is not OrthoKernel.evaluate:
            return None
        scores = () if self.scores is None else (self.scores,)
        geometry = self.geometry
        return Composition(tuple(self._parts()), scores, geometry, geometry.compose_all)

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype of the parameters."""
        return self._parts()[0].original.dtype

    def factors(self) -> KernelFactors:
        """The present orthogonal factors, each computed once per optimizer step by its part.

        Those that are stored in half precision are computed at every call, since a part keeps its
        value in the dtype of its storage.
        """
        kept = self.caching and self.dtype == compute_dtype(self.dtype)
        values = [part() if kept else part.as_part() for part in self._parts()]
        return self.geometry.factors_of(values, self._scores())

    def _scores(self) -> list[Tensor]:
        """The scores in the dtype of the computation, if there are any."""
        return [] if self.scores is None else [self.scores.to(compute_dtype(self.dtype))]

    def evaluate(self) -> Tensor:
        """Compute the kernel, in the dtype of the parameters."""
        with _torch.without_autocast(self._parts()[0].original):
            values = [part.as_part() for part in self._parts()]
            (kernel,) = self.geometry.compose_all(values, self._scores(), 1)
            return kernel.to(self.dtype)

    def convolve(self, x: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
        """Convolve (N, C_in, *sizes) without padding, factor by factor: no kernel is formed."""
        with _torch.without_autocast(self._parts()[0].original):
            factors = self.factors()
        geometry, gain = self.geometry, self.geometry.gain
        signal = x.unflatten(1, (geometry.groups, geometry.inner))
        signal = signal.movedim(0, 2)  # (g, c, n, *sizes)
        if factors.embedding is not None:
            embedding = factors.embedding.to(x.dtype)
            rest = signal.shape[2:]
            signal = (embedding @ signal.flatten(2)).unflatten(2, rest)
        if factors.bases is not None:
            dims, bases, weights = geometry.dims, factors.bases.to(x.dtype), factors.weights
            weights = None if weights is None else weights.to(x.dtype)
            if not geometry.contracting:  # the first factor stands next to the input
                dims, bases = dims[::-1], bases.flip(1)
                weights = None if weights is None else weights.flip(1)
            axes, steps = tuple(3 + d for d in dims), tuple(dilation[d] for d in dims)
            signal = filter_signal(signal, bases, axes, steps, weights)
        signal = signal.movedim(2, 0).flatten(1, 2)
        if factors.outer is None:
            return signal if gain == 1.0 else gain * signal
        outer = factors.outer.unflatten(-1, (geometry.channels, *geometry.block)).flatten(0, 1)
        outer = outer.to(x.dtype) if gain == 1.0 else gain * outer.to(x.dtype)
        convolve = _CONV[len(geometry.stride)]
        return convolve(signal, outer, None, tuple(stride), 0, tuple(dilation), geometry.groups)

    def prefers_factors(self, pixels: int) -> bool:
        r"""Whether a training step on `pixels` output pixels is faster by `convolve`.

        With c channels inside, multiplications per group are counted for composing the kernel and
        convolving with it, and for applying the factors to the signal. The products of the second
        way are narrow, c / 2 wide, and reach about \(c^2 / (c^2 + 166^2)\) of the speed of a
        convolution; those of the first are small, and reach half of it (fitted with two CPU threads
        for c = 32 to 256, kernels of 3 and 5, strides 1 and 2, 4 to 16 pixels on a side). An
        estimated gain of 1.35 is asked for: what is left is the cost of more and smaller calls.
        """
        if self.bases is None:
            return False
        g = self.geometry
        c, area, read = g.channels, math.prod(g.block), pixels * math.prod(g.stride)
        convolve = pixels * g.out * g.inner * math.prod(g.kernel_size)
        ends = pixels * g.out * c * area + (0 if self.embedding is None else read * c * g.inner)
        factored = ends + len(g.dims) * 2 * c * g.rank * read
        return (2 * self._composing + convolve) * c * c >= 1.35 * factored * (c * c + 166**2)

    def reset_parameters(self) -> None:
        """Draw every factor from the Haar distribution; nothing happens on the meta device."""
        for part in self._parts():
            part.reset_parameters()
        self._reset_scores()

    @torch.no_grad()
    def _reset_scores(self) -> None:
        """Half of the columns of every basis belong to its projector, none by a wide margin."""
        if self.scores is None or self.scores.is_meta:
            return
        self.scores.uniform_(0.05, 0.15)
        self.scores[..., self.geometry.channels // 2 :].neg_()

    def _fit(self, w: Tensor, owner: object, exactly: bool) -> tuple[KernelFactors, float]:
        self._require_shape(w, owner)
        g, allowed = self.geometry, torch.finfo(w.dtype).eps ** 0.5
        target = w.detach().double().reshape(g.groups, -1, *g.shape[1:]) / g.gain
        restarts = 4 if exactly else 0
        fitted, distance = fit_factors(g, target, restarts=restarts, enough=allowed)
        _checks.require(
            not exactly or distance <= allowed,
            owner,
            f"the kernel must be one that the factors can compose (to {allowed:.1e})",
            "Call layer.project_(weight) to take the nearest kernel that is found"
            + ", or use ranks='free', which composes more kernels" * (g.ranks == "half"),
            NotOnManifoldError,
            relative_distance=distance,
            shape=tuple(w.shape),
        )
        return fitted, distance

    def _set(self, fitted: KernelFactors) -> None:
        values = (v for v in (fitted.outer, fitted.embedding, fitted.bases) if v is not None)
        for part, value in zip(self._parts(), values, strict=True):
            part._set(value)
        if self.scores is not None and fitted.weights is not None:
            self.scores.copy_(0.2 * fitted.weights - 0.1)

    def extra_repr(self) -> str:
        g = self.geometry
        text = f"shape={tuple(g.shape)}, stride={g.stride}, groups={g.groups}"
        text += "" if g.ranks == "half" else f", ranks={g.ranks!r}"
        return text if g.gain == 1.0 else f"{text}, gain={g.gain:.6g}"
