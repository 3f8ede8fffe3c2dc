"""Factors of an orthogonal kernel from the kernel: peeling, then alternating projections."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from orthonet.linalg import apply_projectors, haar, polar_svd

if TYPE_CHECKING:
    from orthonet.reparametrizers._kernel import OrthoKernel

__all__ = ["KernelFactors", "fit_factors"]


class KernelFactors(NamedTuple):
    """Orthogonal factors of a kernel, each (groups, ...); None where the kernel has none."""

    outer: Tensor | None  # (g, out, channels * stride area)
    embedding: Tensor | None  # (g, channels, in)
    bases: Tensor | None  # (g, factors, channels, rank)


def _split(a: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """All taps but the last, and all but the first, along tap dimension `dim` of (g, c, *k, n)."""
    size = a.shape[2 + dim] - 1
    return a.narrow(2 + dim, 0, size), a.narrow(2 + dim, 1, size)


def _adjoint(base: Tensor, a: Tensor, dim: int) -> Tensor:
    """Adjoint of multiplication by one paraunitary factor: shortens `dim` by one tap."""
    first, last = _split(a, dim)
    difference = (first - last).flatten(2)
    return last + (base @ (base.mT @ difference)).view(last.shape)


def _leading(symmetric: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the `rank` largest eigenvalues."""
    _, vectors = torch.linalg.eigh(0.5 * (symmetric + symmetric.mT))
    return vectors[..., -rank:]


def _gram(a: Tensor, b: Tensor) -> Tensor:
    return a.flatten(2) @ b.flatten(2).mT


class _Problem:
    """Maximize <target, kernel(factors)> over orthogonal factors, one factor at a time.

    The kernel is linear in each factor (in V V^T for a basis) and of constant norm, so the best
    factor given the others is the polar factor, or the leading eigenvectors, of what its adjoint
    sees. In the contracting case everything is transposed, so that the delays act from the left.
    """

    def __init__(self, kernel: OrthoKernel, target: Tensor) -> None:
        self.kernel = kernel
        self.taps = len(kernel.kernel_size)
        self.dims = [d for d, count in enumerate(kernel.delays) for _ in range(count)]
        self.rank = kernel.channels // 2
        self.target = target  # (g, out, in, *k)

    def seen_by_delays(self, outer: Tensor | None) -> Tensor:
        """The target as (g, channels, *taps, columns), with what is left of the delays removed."""
        if self.kernel.contracting:
            return self.target.movedim(1, -1)
        target = self.target.movedim(2, -1)  # (g, out, *k, in)
        if outer is None:
            return target
        blocks = outer.unflatten(-1, (self.kernel.channels, *self.kernel.stride))
        sizes = [d + 1 for d in self.kernel.delays]
        result = target.new_zeros(*target.shape[:1], self.kernel.channels, *sizes, target.shape[-1])
        for offset, window in self._windows(target, sizes):
            block = blocks[(..., *offset)]
            result += (block.mT @ window.flatten(2)).view(result.shape)
        return result

    def _windows(self, target: Tensor, sizes: list[int]) -> list[tuple[tuple[int, ...], Tensor]]:
        offsets = torch.cartesian_prod(*(torch.arange(s) for s in self.kernel.stride))
        found = []
        for row in offsets.reshape(-1, self.taps).tolist():
            window = target
            for dim, (offset, size) in enumerate(zip(row, sizes, strict=True)):
                window = window.narrow(2 + dim, offset, size)
            found.append((tuple(row), window))
        return found

    def undelay(self, seen: Tensor, bases: Tensor | None) -> Tensor:
        """Adjoint of all delays."""
        if bases is None:
            for dim, count in enumerate(self.kernel.delays):
                seen = seen.narrow(2 + dim, count // 2, seen.shape[2 + dim] - count)
            return seen
        for index in reversed(range(len(self.dims))):
            seen = _adjoint(bases[:, index], seen, self.dims[index])
        return seen

    def peel(self, seen: Tensor) -> Tensor | None:
        """Bases read off the outermost taps: exact for generic kernels of the family."""
        if not (self.dims and self.rank):
            return None
        bases = []
        for dim in reversed(self.dims):
            first, last = seen.select(2 + dim, 0), seen.select(2 + dim, -1)
            bases.append(_leading(_gram(first, first) - _gram(last, last), self.rank))
            seen = _adjoint(bases[-1], seen, dim)
        return torch.stack(bases[::-1], dim=1)

    def sweep_bases(self, seen: Tensor, start: Tensor, bases: Tensor) -> Tensor:
        """Improve each basis in turn, the others held."""
        bases = bases.clone()
        behind = [seen]  # behind[-1 - i]: the target with factors i + 1, ... undone
        for index in reversed(range(1, len(self.dims))):
            behind.append(_adjoint(bases[:, index], behind[-1], self.dims[index]))
        for index, dim in enumerate(self.dims):
            first, last = _split(behind.pop(), dim)
            bases[:, index] = _leading(_gram(first - last, start), self.rank)
            start = apply_projectors(start, bases[:, index : index + 1], taps=self.taps, dim=dim)
        return bases

    def best_ends(self, factors: KernelFactors) -> KernelFactors:
        """Improve the matrices before and behind the delays."""
        kernel = self.kernel
        if kernel.contracting:
            seen = self.undelay(self.seen_by_delays(None), factors.bases)
            matrix = seen.movedim(-1, 1).flatten(2)
            return factors._replace(outer=polar_svd(matrix))
        if factors.embedding is not None:
            seen = self.undelay(self.seen_by_delays(factors.outer), factors.bases)
            factors = factors._replace(embedding=polar_svd(seen.flatten(2)))
        if factors.outer is not None:
            middle = kernel.delay(kernel.start(factors), factors.bases)
            target = self.target.movedim(2, -1)
            columns = [
                _gram(window, middle)
                for _, window in self._windows(target, [d + 1 for d in kernel.delays])
            ]
            factors = factors._replace(outer=polar_svd(torch.stack(columns, -1).flatten(2)))
        return factors

    def initial(self) -> KernelFactors:
        """A first guess, by peeling where the delays are outermost."""
        kernel, target = self.kernel, self.target
        outer = embedding = None
        if not kernel.contracting and kernel.outer is not None:
            # the span of all taps of each sub-kernel: a polar factor of the target's unfolding
            windows = self._windows(target.movedim(2, -1), [d + 1 for d in kernel.delays])
            blocks = [self._tall(window.flatten(2)) for _, window in windows]
            outer = polar_svd(torch.stack(blocks, -1).flatten(2))
        seen = self.seen_by_delays(outer)
        bases = self.peel(seen)
        if kernel.embedding is not None:
            embedding = polar_svd(self.undelay(seen, bases).flatten(2))
        return self.best_ends(KernelFactors(outer, embedding, bases))

    def improve(self, factors: KernelFactors, sweeps: int) -> tuple[KernelFactors, float]:
        """Sweep until the distance, which falls with every sweep, hardly changes."""
        kernel, target = self.kernel, self.target
        norm = torch.linalg.vector_norm(target).clamp_min(torch.finfo(target.dtype).tiny)
        distance = float("inf")
        for _ in range(sweeps + 1):
            composed = kernel.compose(factors).view(target.shape)
            previous, distance = distance, float(torch.linalg.vector_norm(composed - target) / norm)
            least_gain = 1e-3 if distance > 0.1 else 1e-5
            if distance < 1e-12 or distance > (1.0 - least_gain) * previous:
                break
            if factors.bases is not None:
                seen = self.seen_by_delays(factors.outer)
                bases = self.sweep_bases(seen, kernel.start(factors), factors.bases)
                factors = factors._replace(bases=bases)
            factors = self.best_ends(factors)
        return factors, distance

    def _tall(self, a: Tensor) -> Tensor:
        """The `channels` leading left singular directions of (g, out, columns), scaled."""
        u, s, _ = torch.linalg.svd(a, full_matrices=False)
        width = self.kernel.channels
        tall = u[..., :width] * s[..., None, :width]
        return torch.nn.functional.pad(tall, (0, width - tall.shape[-1]))


def fit_factors(
    kernel: OrthoKernel,
    target: Tensor,
    *,
    sweeps: int = 1000,
    restarts: int = 0,
    enough: float = 0.0,
) -> tuple[KernelFactors, float]:
    """Orthogonal factors whose kernel is near `target` (g, out, in, *k), and their distance.

    A kernel of the family is found by peeling at once, or by some hundred sweeps. Rarely these
    stop at a small distance instead; then up to `restarts` searches begin at random factors, until
    the distance is at most `enough`. The distance to a kernel that is not of the family settles
    above 0.3, usually within a few dozen sweeps, and is taken as it is.

    Returns:
        The factors, in the dtype of `target`, and the distance relative to the norm of `target`.
    """
    problem = _Problem(kernel, target)
    best, least = problem.improve(problem.initial(), sweeps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(restarts):
        if least <= enough or least > 0.3:
            break
        start = KernelFactors(
            *(
                None if value is None
                else haar(value.shape, dtype=value.dtype, generator=generator).to(value.device)
                for value in best
            )
        )  # fmt: skip
        factors, distance = problem.improve(start, sweeps)
        if distance < least:
            best, least = factors, distance
    return best, least
