"""Factors of an orthogonal kernel from the kernel: peeling, then alternating projections."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from orthonet.linalg.kernels.ascent import ascends, improve_far
from orthonet.linalg.kernels.geometry import KernelFactors, KernelGeometry
from orthonet.linalg.kernels.paraunitary import apply_projectors
from orthonet.linalg.polar import polar_svd
from orthonet.linalg.sampling import haar
from orthonet.linalg.threads import one_thread

__all__ = ["fit_factors"]

_FAR = 0.3  # a kernel of the family, or nearly one, comes nearer than this, whatever its scale


def _split(a: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """All taps but the last, and all but the first, along tap dimension `dim` of (g, c, *k, n)."""
    size = a.shape[2 + dim] - 1
    return a.narrow(2 + dim, 0, size), a.narrow(2 + dim, 1, size)


def _adjoint(base: Tensor, weights: Tensor | None, a: Tensor, dim: int) -> Tensor:
    """Adjoint of multiplication by one paraunitary factor: shortens `dim` by one tap."""
    scaled = base if weights is None else base * weights[:, None]
    first, last = _split(a, dim)
    difference = (first - last).flatten(2)
    return last + (base @ (scaled.mT @ difference)).view(last.shape)


def _gram(a: Tensor, b: Tensor) -> Tensor:
    return a.flatten(2) @ b.flatten(2).mT


class _Problem:
    """Maximize <target, kernel(factors)> over orthogonal factors, one factor at a time.

    The kernel is linear in each factor (in the projector for a basis) and of constant norm, so the
    best factor given the others is the polar factor, or the leading eigenvectors, of what its
    adjoint sees. In the contracting case everything is transposed, so that the delays act from the
    left.
    """

    def __init__(self, kernel: KernelGeometry, target: Tensor) -> None:
        self.kernel = kernel
        self.taps = len(kernel.kernel_size)
        outer, embedding, _ = kernel.factor_shapes()
        self.has_outer, self.has_embedding = outer is not None, embedding is not None
        self.dims, self.rank = kernel.dims, kernel.rank
        self.free = kernel.ranks == "free"
        self.ties = False  # whether directions that do not matter join a projector of free rank
        self.target = target  # (g, out, in, *k)

    def seen_by_delays(self, outer: Tensor | None) -> Tensor:
        """The target as (g, channels, *taps, columns), with what is left of the delays removed."""
        if self.kernel.contracting:
            return self.target.movedim(1, -1)
        target = self.target.movedim(2, -1)  # (g, out, *k, in)
        if outer is None:
            return target
        blocks = outer.unflatten(-1, (self.kernel.channels, *self.kernel.block))
        sizes = [d + 1 for d in self.kernel.delays]
        result = target.new_zeros(*target.shape[:1], self.kernel.channels, *sizes, target.shape[-1])
        for offset, window in self._windows():
            block = blocks[(..., *offset)]
            result += (block.mT @ window.flatten(2)).view(result.shape)
        return result

    def _windows(self) -> list[tuple[tuple[int, ...], Tensor]]:
        """For every tap of R, the part of the target (g, out, *taps, in) that it contributes to."""
        offsets = torch.cartesian_prod(*(torch.arange(b) for b in self.kernel.block))
        found = []
        for row in offsets.reshape(-1, self.taps).tolist():
            window = self.target.movedim(2, -1)
            for dim, (offset, count) in enumerate(zip(row, self.kernel.delays, strict=True)):
                window = window.narrow(2 + dim, offset, count + 1)
            found.append((tuple(row), window))
        return found

    def projector(self, symmetric: Tensor) -> tuple[Tensor, Tensor | None]:
        """The projector Q that maximizes tr(Q symmetric), as basis and weights.

        That is the one onto the leading eigenvectors: `rank` of them, or, when the rank is free,
        those of positive eigenvalues.
        """
        values, vectors = torch.linalg.eigh(0.5 * (symmetric + symmetric.mT))
        if self.free:
            rounding = 1e-12 * values.abs().amax(-1, keepdim=True)
            return vectors, (values > (-rounding if self.ties else rounding)).to(values.dtype)
        return vectors[..., vectors.shape[-1] - self.rank :], None

    def undelay(self, seen: Tensor, factors: KernelFactors) -> Tensor:
        """Adjoint of all delays."""
        if factors.bases is None:
            for dim, count in enumerate(self.kernel.delays):
                seen = seen.narrow(2 + dim, count // 2, seen.shape[2 + dim] - count)
            return seen
        for index in reversed(range(len(self.dims))):
            seen = _adjoint(*factors.one(index), seen, self.dims[index])
        return seen

    def peel(self, seen: Tensor) -> KernelFactors:
        """Bases read off the outermost taps.

        The range of the first tap lies in that of the projector, the range of the last tap is
        orthogonal to it, and any such projector shortens the kernel by one tap.
        """
        if not (self.dims and self.rank):
            return KernelFactors(None, None, None)
        found = []
        for dim in reversed(self.dims):
            first, last = seen.select(2 + dim, 0), seen.select(2 + dim, -1)
            base, weights = self.projector(_gram(first, first) - _gram(last, last))
            found.append((base, weights))
            seen = _adjoint(base, weights, seen, dim)
        found = found[::-1]
        kept = [weights for _, weights in found if weights is not None]
        chosen = torch.stack(kept, dim=1) if kept else None
        bases = torch.stack([base for base, _ in found], dim=1)
        return KernelFactors(outer=None, embedding=None, bases=bases, weights=chosen)

    def sweep_bases(self, seen: Tensor, start: Tensor, factors: KernelFactors) -> KernelFactors:
        """Improve each basis in turn, the others held."""
        bases = cast(Tensor, factors.bases).clone()
        weights = factors.weights.clone() if factors.weights is not None else None
        behind = [seen]  # behind[-1 - i]: the target with factors i + 1, ... undone
        for index in reversed(range(1, len(self.dims))):
            behind.append(_adjoint(*factors.one(index), behind[-1], self.dims[index]))
        for index, dim in enumerate(self.dims):
            first, last = _split(behind.pop(), dim)
            bases[:, index], chosen = self.projector(_gram(first - last, start))
            if weights is not None and chosen is not None:
                weights[:, index] = chosen
            start = apply_projectors(
                start,
                bases[:, index : index + 1],
                taps=self.taps,
                dim=dim,
                weights=None if weights is None else weights[:, index : index + 1],
            )
        return factors._replace(bases=bases, weights=weights)

    def best_ends(self, factors: KernelFactors) -> KernelFactors:
        """Improve the matrices before and behind the delays."""
        kernel = self.kernel
        if kernel.contracting:
            seen = self.undelay(self.seen_by_delays(None), factors)
            return factors._replace(outer=polar_svd(seen.movedim(-1, 1).flatten(2)))
        if factors.embedding is not None:
            seen = self.undelay(self.seen_by_delays(factors.outer), factors)
            factors = factors._replace(embedding=polar_svd(seen.flatten(2)))
        if factors.outer is not None:
            middle = kernel.delayed(factors).movedim(2, -1)
            factors = factors._replace(outer=self.best_outer(middle))
        return factors

    def best_outer(self, middle: Tensor) -> Tensor:
        """The best R of an expanding kernel for given delays, (g, channels, *taps, in)."""
        columns = [_gram(window, middle) for _, window in self._windows()]
        return polar_svd(torch.stack(columns, -1).flatten(2))

    def middle_from_gram(self) -> Tensor:
        r"""What the delays of an expanding kernel of the family make, (g, channels, *taps, in).

        With blocks \(R_j^\top R_{j'} = \delta_{jj'} I\) and \(K_t = \sum_{j < b} R_j M_{t-j}\), the
        Gram matrix of the taps is \(G_{tt'} = K_t^\top K_{t'} = \sum_{j<b} A_{t-j,t'-j}\) with
        \(A_{tt'} = M_t^\top M_{t'}\), hence \(A_{tt'} = G_{tt'} - G_{t-1,t'-1} + A_{t-b,t'-b}\),
        dimension by dimension. A square root of A is M up to an orthogonal matrix from the left,
        which R and the projectors absorb.
        """
        kernel, g, taps = self.kernel, self.target.shape[0], self.taps
        flat = self.target.movedim(2, -1).flatten(2)
        sizes = (*kernel.kernel_size, kernel.inner)
        a = (flat.mT @ flat).view(g, *sizes, *sizes)
        for dim, (k, b) in enumerate(zip(kernel.kernel_size, kernel.block, strict=True)):
            rows, columns = 1 + dim, 2 + taps + dim
            gram, a = a, a.clone()
            for t in range(1, k):
                now = a.select(rows, t)
                now.narrow(columns - 1, 1, k - 1).sub_(
                    gram.select(rows, t - 1).narrow(columns - 1, 0, k - 1)
                )
                if t >= b:
                    earlier = a.select(rows, t - b).narrow(columns - 1, 0, k - b)
                    now.narrow(columns - 1, b, k - b).add_(earlier)
            keep = kernel.delays[dim] + 1
            a = a.narrow(rows, 0, keep).narrow(columns, 0, keep)
        shape = a.shape[1 : 2 + taps]
        a = a.reshape(g, shape.numel(), shape.numel())
        values, vectors = torch.linalg.eigh(0.5 * (a + a.mT))
        width = min(kernel.channels, values.shape[-1])
        root = (vectors * values.clamp(min=0).sqrt()[:, None])[..., -width:].mT
        root = F.pad(root, (0, 0, 0, kernel.channels - width))
        middle = root.reshape(g, kernel.channels, *shape)
        if not self.has_embedding:  # then its taps sum to the identity
            total = middle.flatten(2, -2).sum(2)
            middle = (polar_svd(total).mT @ middle.flatten(2)).view(middle.shape)
        return middle

    def exact(self) -> KernelFactors | None:
        """Factors of an expanding strided kernel of the family, by algebra alone."""
        kernel = self.kernel
        if kernel.contracting or not self.has_outer:
            return None
        middle = self.middle_from_gram()
        factors = self.peel(middle)._replace(outer=self.best_outer(middle))
        if self.has_embedding:
            embedding = polar_svd(self.undelay(middle, factors).flatten(2))
            factors = factors._replace(embedding=embedding)
        return self.best_ends(factors)

    def initial(self) -> KernelFactors:
        """A first guess for any target, exact where the delays are outermost."""
        kernel = self.kernel
        outer = None
        if not kernel.contracting and self.has_outer:
            # the span of all taps of each sub-kernel: a polar factor of the target's unfolding
            blocks = [self._tall(window.flatten(2)) for _, window in self._windows()]
            outer = polar_svd(torch.stack(blocks, -1).flatten(2))
        seen = self.seen_by_delays(outer)
        factors = self.peel(seen)._replace(outer=outer)
        if self.has_embedding:
            embedding = polar_svd(self.undelay(seen, factors).flatten(2))
            factors = factors._replace(embedding=embedding)
        return self.best_ends(factors)

    def improve(self, factors: KernelFactors, sweeps: int) -> tuple[KernelFactors, float]:
        """Sweep until the distance, which falls with every sweep, hardly changes."""
        kernel, target = self.kernel, self.target
        distance = float("inf")
        for _ in range(sweeps + 1):
            previous, distance = distance, _distance(kernel, factors, target)
            least_gain = 1e-3 if distance > 0.1 else 1e-5
            if distance < 1e-12 or distance > (1.0 - least_gain) * previous:
                break
            if factors.bases is not None:
                seen = self.seen_by_delays(factors.outer)
                start = kernel.start(factors).movedim(1 if kernel.contracting else 2, -1)
                factors = self.sweep_bases(seen, start, factors)
            factors = self.best_ends(factors)
        return factors, distance

    def _tall(self, a: Tensor) -> Tensor:
        """The `channels` leading left singular directions of (g, out, columns), scaled."""
        u, s, _ = torch.linalg.svd(a, full_matrices=False)
        width = self.kernel.channels
        tall = u[..., :width] * s[..., None, :width]
        return F.pad(tall, (0, width - tall.shape[-1]))


def _near(kernel: KernelGeometry, target: Tensor) -> tuple[KernelFactors | None, bool]:
    """Near factors of a far kernel, in float32 but for the last step, and whether they are far.

    None for one that is not far, which deserves float64 from the start.
    """
    scale = target.abs().amax().clamp_min(torch.finfo(target.dtype).tiny)
    single = (target / scale).float()
    start = _Problem(kernel, single).initial()
    if not _is_far(kernel, start, single):
        return None, False
    near = improve_far(kernel, target, start)
    return near, _is_far(kernel, near, target)


def _is_far(kernel: KernelGeometry, factors: KernelFactors, target: Tensor) -> bool:
    """Whether the factors are far from every multiple of the target, by the sine of the angle."""
    composed = kernel.compose(factors).view(target.shape)
    cosine = float(torch.cosine_similarity(composed.flatten(), target.flatten(), dim=0))
    return cosine < (1.0 - _FAR**2) ** 0.5


def _distance(kernel: KernelGeometry, factors: KernelFactors, target: Tensor) -> float:
    """The relative distance of what the factors compose from the target."""
    norm = torch.linalg.vector_norm(target).clamp_min(torch.finfo(target.dtype).tiny)
    composed = kernel.compose(factors).view(target.shape)
    return float(torch.linalg.vector_norm(composed - target) / norm)


def fit_factors(
    kernel: KernelGeometry,
    target: Tensor,
    *,
    sweeps: int = 1000,
    restarts: int = 0,
    enough: float = 0.0,
) -> tuple[KernelFactors, float]:
    """Orthogonal factors whose kernel is near `target` (g, out, in, *k), and their distance.

    A kernel of the family is found by algebra at once, or by some hundred sweeps. Rarely these
    stop at a small distance instead; then up to `restarts` searches begin at random factors, until
    the distance is at most `enough`. The distance to a kernel that is not of the family settles
    above 0.3, usually within a few dozen sweeps, and is taken as it is.

    Returns:
        The factors, in the dtype of `target`, and the distance relative to the norm of `target`.
    """
    with one_thread():
        return _fit(kernel, target, sweeps, restarts, enough)


def _fit(
    kernel: KernelGeometry, target: Tensor, sweeps: int, restarts: int, enough: float
) -> tuple[KernelFactors, float]:
    problem = _Problem(kernel, target)
    near = None
    if ascends(kernel) and sweeps:
        near, far = _near(kernel, target)
        if near is not None and far:
            return near, _distance(kernel, near, target)
    exact = problem.exact()
    best, least = problem.improve(exact or near or problem.initial(), sweeps)

    def search(start: KernelFactors) -> None:
        nonlocal best, least
        factors, distance = problem.improve(start, sweeps)
        if distance < least:
            best, least = factors, distance

    if exact is not None and least > max(enough, 1e-6):
        search(problem.initial())
    if problem.free and restarts and enough < least:
        problem.ties = True
        search(problem.initial())
    generator = torch.Generator().manual_seed(0)
    for _ in range(restarts):
        if least <= enough or least > _FAR:
            break
        drawn = (
            v if v is None else haar(v.shape, dtype=v.dtype, generator=generator).to(v.device)
            for v in best[:3]
        )
        search(KernelFactors(*drawn, weights=best.weights))
    return best, least
