"""Ascend to an orthogonal kernel near one that is far from all of them, in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from orthonet.linalg.kernels.geometry import KernelFactors, KernelGeometry
from orthonet.linalg.polar import polar, polar_svd

__all__ = ["ascends", "improve_far"]

_GAIN = 1e-3  # a sweep that lowers the distance by a smaller share is the last one
_SWEEPS = 8  # of random kernels, whose distance goes on falling by .1 % a sweep


def ascends(kernel: KernelGeometry) -> bool:
    """Return whether the delays stand next to one end, with nothing behind them."""
    one_end = kernel.contracting or math.prod(kernel.block) == 1
    return kernel.ranks == "half" and bool(kernel.dims) and kernel.rank > 0 and one_end


@torch.no_grad()
def improve_far(kernel: KernelGeometry, target: Tensor, start: KernelFactors) -> KernelFactors:
    r"""Factors nearer to `target` than `start`, orthogonal to the precision of `target`.

    The kernel is \(K = R\,A_1 A_2 \cdots\), one polynomial \(A_d(z) = \prod_f (Q_f + (I - Q_f) z)\)
    a dimension. Each sweep contracts the target once with the polynomials of the other dimensions:
    what is left for the projectors of one dimension is \(\sum_j \langle N_j, A_{d,j} \rangle\) with
    small square matrices \(N_j\). They are improved one by one, each by the leading eigenvectors
    of what multiplies it, then R by a polar factor; between sweeps both are extrapolated, and a
    sweep that loses by that is not kept.

    Args:
        kernel: One that `ascends`.
        target: (g, out, in, *k), in the dtype of the result.
        start: Factors to begin with.
    """
    scale = target.abs().amax().clamp_min(torch.finfo(target.dtype).tiny)
    ascent = _Ascent(kernel, (target / scale).float(), float(scale))
    outer = start.outer if kernel.contracting else start.embedding
    found_outer, found = ascent.run(ascent.matrix(outer), ascent.split(start.bases))
    outer = polar_svd(ascent.flat(found_outer).to(target))
    bases = torch.linalg.qr(ascent.stacked(found).to(target))[0]
    if kernel.contracting:
        return KernelFactors(outer, None, bases)
    return KernelFactors(None, outer.mT.contiguous(), bases)


def _lengthen(a: Tensor, base: Tensor) -> Tensor:
    """(g, t, r, c) taps times one factor from the right: t + 1 taps."""
    now = (a @ base[:, None]) @ base.mT[:, None]
    longer = a.new_zeros(a.shape[0], a.shape[1] + 1, *a.shape[2:])
    longer[:, :-1] = now
    longer[:, 1:] += a - now
    return longer


def _shorten(a: Tensor, base: Tensor) -> Tensor:
    """The adjoint of `_lengthen`: (g, t + 1, r, c) to (g, t, r, c)."""
    first, last = a[:, :-1], a[:, 1:]
    return last + ((first - last) @ base[:, None]) @ base.mT[:, None]


class _Ascent:
    """The target in the layout (g, rows, *taps, c), R the same, and lists of bases by dimension.

    An expanding kernel of stride 1, K = A U, is transposed to U^T A^T, of the same form.
    """

    def __init__(self, kernel: KernelGeometry, target: Tensor, scale: float) -> None:
        self.delays, self.rank = kernel.delays, kernel.rank
        self.live = [d for d, count in enumerate(self.delays) if count]
        self.block = kernel.block if kernel.contracting else (1,) * len(self.delays)
        self.transposed = not kernel.contracting
        target = target.transpose(1, 2) if self.transposed else target
        self.target = target.movedim(2, -1).contiguous()
        self.groups, self.rows, self.channels = *target.shape[:2], target.shape[2]
        self.square = max(float(self.target.double().square().sum()), 1e-30)
        columns = self.channels * math.prod(self.block)
        self.length = math.sqrt(self.groups * min(self.rows, columns)) / scale  # of K, so scaled
        self.scale = scale

    def matrix(self, outer: Tensor | None) -> Tensor:
        """R from the factor before or behind the delays."""
        given = outer.mT if self.transposed else outer  # type: ignore[union-attr]
        blocks = given.to(self.target).unflatten(-1, (self.channels, *self.block))  # type: ignore[union-attr]
        return blocks.movedim(2, -1)

    def flat(self, outer: Tensor) -> Tensor:
        """The inverse of `matrix`, before the transposition."""
        return outer.movedim(-1, 2).flatten(2)

    def split(self, bases: Tensor | None) -> dict[int, list[Tensor]]:
        """The bases of each dimension, in their order."""
        given = iter(bases.to(self.target).unbind(1))  # type: ignore[union-attr]
        return {d: [next(given) for _ in range(self.delays[d])] for d in self.live}

    def stacked(self, bases: dict[int, list[Tensor]]) -> Tensor:
        """The inverse of `split`."""
        return torch.stack([base for d in self.live for base in bases[d]], 1)

    def distance(self, value: float) -> float:
        """Relative distance of the kernel whose inner product with the target is `value`."""
        return math.sqrt(max(0.0, 1.0 + (self.length**2 - 2.0 * value / self.scale) / self.square))

    def run(
        self, outer: Tensor, bases: dict[int, list[Tensor]]
    ) -> tuple[Tensor, dict[int, list[Tensor]]]:
        """Sweep until the distance, which falls with every kept sweep, hardly changes."""
        best, distance, kept = -math.inf, math.inf, (outer, bases)
        before = None
        for _ in range(_SWEEPS):
            start = kept if before is None else self._beyond(kept, before)
            new, value = self._sweep(*start)
            if value <= best:
                if before is None:
                    break
                before = None  # too far: again, without extrapolation
                continue
            previous, distance = distance, self.distance(value)
            before, kept, best = kept, new, value
            if distance > (1.0 - _GAIN) * previous:
                break
        return kept

    def _beyond(self, now: tuple, before: tuple) -> tuple[Tensor, dict[int, list[Tensor]]]:
        """The last move once more; a sweep makes R orthogonal before it counts."""
        (outer, bases), (outer_before, bases_before) = now, before
        moved = {}
        for d, found in bases.items():
            v, old = torch.stack(found, 1), torch.stack(bases_before[d], 1)
            moved[d] = list(torch.linalg.qr(2.0 * v - old @ (old.mT @ v))[0].unbind(1))
        return 2.0 * outer - outer_before, moved

    def _sweep(
        self, outer: Tensor, bases: dict[int, list[Tensor]]
    ) -> tuple[tuple[Tensor, dict[int, list[Tensor]]], float]:
        """Improve all factors once; also returns the inner product with the target."""
        bases = dict(bases)
        polynomials = {d: self._polynomial(bases[d]) for d in self.live}
        behind = {len(self.live): self.target}  # with the dimensions from there on undone
        for i in reversed(range(1, len(self.live))):
            d = self.live[i]
            behind[i] = self._undone(behind[i + 1], polynomials[d], d)
        front = outer
        for i, d in enumerate(self.live):
            seen = behind[i + 1]
            bases[d] = self._improved(self._taps(front, seen, d), bases[d])
            polynomial = self._polynomial(bases[d])
            if i == 0:
                undone = self._undone(seen, polynomial, d)
                outer = front = polar(undone.flatten(2)).view(undone.shape)
            front = self._times(front, polynomial, d)
        return (outer, bases), float((front * self.target).sum())

    def _polynomial(self, bases: list[Tensor]) -> Tensor:
        """(g, taps, c, c)."""
        taps = torch.eye(self.channels, dtype=bases[0].dtype, device=bases[0].device)
        taps = taps.expand(self.groups, 1, -1, -1)
        for base in bases:
            taps = _lengthen(taps, base)
        return taps

    def _times(self, a: Tensor, polynomial: Tensor, dim: int) -> Tensor:
        """`a` times the polynomial of one dimension: longer there."""
        size, more = a.shape[2 + dim], polynomial.shape[1] - 1
        shape = list(a.shape)
        shape[2 + dim] = size + more
        longer, flat = a.new_zeros(shape), a.reshape(self.groups, -1, self.channels)
        for j in range(more + 1):
            longer.narrow(2 + dim, j, size).add_((flat @ polynomial[:, j]).view(a.shape))
        return longer

    def _undone(self, a: Tensor, polynomial: Tensor, dim: int) -> Tensor:
        """The adjoint of `_times`: shorter there."""
        more = polynomial.shape[1] - 1
        size = a.shape[2 + dim] - more
        total: Tensor | None = None
        for j in range(more + 1):
            part = a.narrow(2 + dim, j, size)
            term = part.reshape(self.groups, -1, self.channels) @ polynomial[:, j].mT
            total = term if total is None else total.add_(term)
        return total.view(part.shape)  # type: ignore[union-attr]

    def _taps(self, front: Tensor, seen: Tensor, dim: int) -> Tensor:
        """What multiplies each tap of one polynomial, (g, taps, c, c)."""
        size = front.shape[2 + dim]
        flat = front.reshape(self.groups, -1, self.channels).mT
        count = seen.shape[2 + dim] - size + 1
        parts = [
            seen.narrow(2 + dim, j, size).reshape(self.groups, -1, self.channels)
            for j in range(count)
        ]
        return torch.stack([flat @ part for part in parts], 1)

    def _improved(self, taps: Tensor, bases: list[Tensor]) -> list[Tensor]:
        """Improve the projectors of one dimension in turn, by leading eigenvectors."""
        behind, improved = [taps], []
        for base in reversed(bases[1:]):
            behind.append(_shorten(behind[-1], base))
        eye = torch.eye(self.channels, dtype=taps.dtype, device=taps.device)
        prefix = eye.expand(self.groups, 1, -1, -1)
        for _ in bases:
            seen = behind.pop()
            symmetric = (prefix.mT @ (seen[:, :-1] - seen[:, 1:])).sum(1)
            vectors = torch.linalg.eigh(0.5 * (symmetric + symmetric.mT))[1]
            improved.append(vectors[..., self.channels - self.rank :])
            prefix = _lengthen(prefix, improved[-1])
        return improved
