r"""Claims about balls around samples, that the checker will reach.

The checker repeats a pass over the graph of the file with bounds of every rounding. This module
does the same pass in float64 without them, and writes what it finds with some room. It proves
nothing: the checker does, or rejects the file. The pass is that of `certify.local`, with the
bounds of the nodes of the file in place of those of the prover, and fewer refinements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.certify._rows import batch_of, check_inputs
from orthonet.certify.proof.follow import AFFINE, FUNCTIONS, affine
from orthonet.certify.proof.graph import Writer
from orthonet.errors import UncertifiableError

__all__ = ["Claims", "local_claims"]

_ROOM = 1.0 + 2.0**-18
"""Of what the pass finds, for the roundings that the checker counts."""
_FLOOR = 2.0**-400
"""The least secant: the checker adds less against underflow where a model is constant in a ball."""
_LEAST = 2.0**-199
"""A positive number that a constant of the file may hold."""
_LARGE = (1024, 1.0 + 2.0**-7)
"""Side of Gram matrices above which the checker finds norms less exactly, and the room for it."""
_SIDE = 4096
_ENTRIES = 2**25
_SMALL = 2**27
_PIECES = 8
_FEW = 2.0**-40
_STEPS = 5
_SHORT = 2.0**-30
_SHARES = (1.0, 1.0 - 2.0**-10, 0.9, 0.5)
_NEAR = 1.02
_CURVED = {
    "sin": 1.0,
    "cos": 1.0,
    "silu": 0.5078125,
    "gelu": 0.8,
    "gelu_tanh": 0.8125,
    "mish": 0.75,
}
_EVEN = ("tanh", "sigmoid", "atan", "asinh", "softsign", "tanhshrink")
_KINKS: dict[str, tuple[tuple[float, ...], tuple[tuple[float, float], ...]]] = {
    "hardsigmoid": ((-3.0, 3.0), ((0.0, 0.0), (1 / 6, 1 / 6), (0.0, 0.0))),
    "hardswish": ((-3.0, 3.0), ((0.0, 0.0), (-0.5, 1.5), (1.0, 1.0))),
}
_BENDS = {"relu": 0.0, "abs": -1.0}


class _NotFollowedError(Exception):
    """The checker does not follow an operation, or has no room for it."""


@dataclass
class _Block:
    """Units with unknown slopes: their first row, bounds of each, scales with bounds of all."""

    first: int
    reach: Tensor
    scales: list[tuple[Tensor, float]]


@dataclass
class _Form:
    """The value of a node at the sample, its rows (unknowns, *shape), and a bound of them."""

    center: Tensor
    rows: Tensor
    most: float


class _Pass:
    """The graph of a file in the ball around one sample."""

    def __init__(
        self, writer: Writer, constants: dict[str, Tensor], sample: Sequence[Tensor], radius: float
    ) -> None:
        self.radius, self.blocks = radius, []
        self.size = self.count = sum(x.numel() for x in sample)
        forms: dict[int, _Form] = {}
        left, first = list(sample), 0
        last = {i: p for p, n in enumerate(writer.nodes) for i in n.get("inputs", ())}
        for place, node in enumerate(writer.nodes):
            if node["op"] == "input":
                x = left.pop(0)
                self._check(self.size * x.numel())
                rows = torch.zeros(self.size, x.numel(), dtype=torch.float64)
                rows[first : first + x.numel()] = torch.eye(x.numel(), dtype=torch.float64)
                forms[place] = _Form(x, rows.reshape(self.size, *x.shape), 1.0)
                first += x.numel()
                continue
            operands = [forms[i] for i in node["inputs"]]
            forms[place] = self._follow(node, operands, writer.bounds[place], constants)
            for i in {*node["inputs"]}:
                if last[i] == place and i not in writer.outputs:
                    del forms[i]
        self.outputs = [forms[i] for i in writer.outputs]

    def secant(self) -> float:
        """A bound of the change of all outputs over the distance from the sample."""
        found = 0.0
        for form in self.outputs:
            length = float(self.reach(form.rows, form.most).norm())
            ones = torch.ones(form.center.numel(), dtype=torch.float64)
            found = math.hypot(found, min(form.most, length, self.norm(form.rows, ones)))
        return found

    def differences(self, label: int, most: Tensor) -> Tensor:
        """Bounds of the changes of one output less the others, each at most `most`."""
        (form,) = self.outputs
        rows = form.rows[:, label, None] - form.rows
        return torch.minimum(self.reach(rows, math.sqrt(2.0) * form.most), most)

    def reach(self, rows: Tensor, most: float) -> Tensor:
        """Bounds of the changes of entries, each at most `most`."""
        flat = rows.flatten(1)
        total = flat[: self.size].norm(dim=0)
        for block, part in self._parts(flat):
            best = block.reach @ part.abs()
            for scale, kappa in block.scales:
                best = torch.minimum(best, (scale.square() @ part.square()).sqrt() * kappa)
            total = total + best
        return total.clamp(max=most)

    def norm(self, rows: Tensor, inverse: Tensor) -> float:
        """A bound of the length of the change of all entries times `inverse`."""
        flat = rows.flatten(1) * inverse
        parts = [flat[: self.size]]
        for block, part in self._parts(flat):
            given = [part * (scale * kappa)[:, None] for scale, kappa in block.scales]
            sizes = [float(g.square().sum()) for g in given]
            parts.append(given[sizes.index(min(sizes))])
        lengths = [_estimate(p) for p in parts]
        largest, total = max(lengths), 0.0
        for part, length in zip(parts, lengths, strict=True):
            share = max(length / largest, 1e-12) if largest else 1.0
            part *= share**-0.5
            total += share
        return _norm(torch.cat(parts)) * math.sqrt(total)

    def _parts(self, flat: Tensor) -> Iterator[tuple[_Block, Tensor]]:
        for block in self.blocks:
            if block.first < len(flat):
                yield block, flat[block.first : block.first + len(block.reach)]

    def _check(self, entries: int) -> None:
        if entries > _ENTRIES or self.count > 2**20:
            raise _NotFollowedError(f"there are {entries} numbers in the rows of a node")

    def _follow(
        self, node: dict[str, Any], forms: list[_Form], most: float, constants: dict[str, Tensor]
    ) -> _Form:
        op = node["op"]
        if op in AFFINE:
            total = max(len(f.rows) for f in forms)
            rows = [_padded(f.rows, total) for f in forms]
            centers = affine(node, [f.center[None] for f in forms], constants)
            self._check(total * centers.numel())
            step = max(1, 2**22 // max(1, centers.numel()))
            found = [
                affine(node, [r[i : i + step] for r in rows], constants, linear=True)
                for i in range(0, total, step)
            ]
            return _Form(centers[0], torch.cat(found), most)
        (form, *others) = forms
        if op == "activation":
            name, numbers = node["function"], [float.fromhex(p) for p in node["parameters"]]
            return self._activated(form, name, numbers, most, float.fromhex(node["gain"]))
        if op == "prelu":
            slopes = constants[node["slopes"]]
            below = slopes[(slice(None), *[None] * (form.center.ndim - 1))]
            return self._activated(form, "leaky_relu", [below], most, math.inf)
        if op == "sort" and node["size"] == 2:
            return self._sorted(node, form, most)
        if op == "extremum" and len(others) == 1:
            (found,) = self._larger(form, others[0], [node["largest"]], False)
            return _Form(found.center, found.rows, most)
        if op == "max_pool":
            return self._pooled(node, form, most)
        raise _NotFollowedError(f"{node['path']!r} is an operation {op!r}")

    def _activated(
        self,
        form: _Form,
        name: str,
        numbers: Sequence[Any],
        most: float,
        gain: float,
        together: bool = True,
    ) -> _Form:
        reach = self.reach(form.rows, form.most)
        move = (reach * self.radius).reshape(form.center.shape)
        if name in ("relu", "abs", "leaky_relu"):
            (below,) = numbers or (_BENDS[name],)
            low, high, value = _bent(below, form.center, move)
        else:
            low, high = _slopes(name, numbers, gain, form.center, move)
            value = FUNCTIONS[name](form.center, *numbers)
        middle, half = ((low + high) / 2).flatten(), ((high - low) / 2).flatten()
        flat, at = form.rows.flatten(1), (half > _FEW).nonzero()[:, 0]
        rows = flat * middle
        if len(at):
            whole = form.most if together else math.inf
            first = self._open(flat[:, at], reach[at], half[at], whole)
            self._check(self.count * flat.shape[1])
            rows = _padded(rows, self.count)
            rows[first + torch.arange(len(at)), at] = half[at]
        return _Form(value, rows.reshape(len(rows), *form.center.shape), most)

    def _open(self, rows: Tensor, reach: Tensor, half: Tensor, whole: float) -> int:
        top = max(float(reach.max()), 2.0**-500)
        shares = (reach / top).clamp_min(2.0**-14)
        part = (half / half.max()).clamp_min(2.0**-10)
        reach = reach.clamp_min(top * 2.0**-14)
        small = rows.numel() * min(rows.shape) < _SMALL
        scales = []
        options = (torch.ones_like(reach), (shares / part).sqrt(), shares)
        for place, scale in enumerate(options):
            kappa = float((reach / scale).norm())
            if place == 0:
                kappa = min(kappa, whole)
            if small or place == 1:
                kappa = min(kappa, self.norm(rows, 1.0 / scale))
            scales.append((scale, kappa))
        first, self.count = self.count, self.count + len(reach)
        self.blocks.append(_Block(first, reach, scales))
        return first

    def _larger(self, a: _Form, b: _Form, signs: Sequence[bool], apart: bool) -> list[_Form]:
        total = max(len(a.rows), len(b.rows))
        gap = _padded(a.rows, total) - _padded(b.rows, total)
        most = math.sqrt(2.0) * a.most if apart else a.most + b.most
        form = _Form(a.center - b.center, gap, most)
        rise = self._activated(form, "relu", (), math.inf, 1.0, apart).rows
        found = []
        for sign in signs:
            rows = _padded((b if sign else a).rows, len(rise))
            center = (torch.maximum if sign else torch.minimum)(a.center, b.center)
            found.append(_Form(center, rows + rise if sign else rows - rise, a.most + b.most))
        return found

    def _sorted(self, node: dict[str, Any], form: _Form, most: float) -> _Form:
        shape, dim = form.center.shape, node["dim"]
        places, n = torch.arange(math.prod(shape)).reshape(shape), shape[dim]
        first = torch.arange(n // 2) if node["halves"] else torch.arange(0, n, 2)
        second = first + n // 2 if node["halves"] else first + 1
        above, below = (places.index_select(dim, i) for i in (first, second))
        signs = [node["descending"], not node["descending"]]
        parts = self._larger(_taken(form, above), _taken(form, below), signs, True)
        order = torch.cat([above.flatten(), below.flatten()]).argsort()
        center = torch.cat([p.center.flatten() for p in parts])[order].reshape(shape)
        rows = torch.cat([p.rows.flatten(1) for p in parts], 1)[:, order]
        return _Form(center, rows.reshape(len(rows), *shape), most)

    def _pooled(self, node: dict[str, Any], form: _Form, most: float) -> _Form:
        shape, dims = form.center.shape, len(node["window"])
        taps: list[list[Tensor]] = []
        for n, k, s, (a, b), d in zip(
            shape[-dims:],
            *(node[key] for key in ("window", "stride", "padding", "dilation")),
            strict=True,
        ):
            count = (n + a + b - d * (k - 1) - 1) // s + 1
            rows = [
                [p for t in range(k) if 0 <= (p := s * i - a + d * t) < n] for i in range(count)
            ]
            size = max(map(len, rows))
            table = torch.tensor([row + row[:1] * (size - len(row)) for row in rows])
            taps.append(list(table.mT))
        places = torch.arange(math.prod(shape)).reshape(shape)

        def at(choice: Tensor) -> _Form:
            place = places
            for axis, (table, tap) in enumerate(zip(taps, choice, strict=True), len(shape) - dims):
                place = place.index_select(axis, table[int(tap)])
            return _taken(form, place)

        choices = torch.cartesian_prod(*(torch.arange(len(t)) for t in taps)).reshape(-1, dims)
        found = at(choices[0])
        for choice in choices[1:]:
            (found,) = self._larger(at(choice), found, [True], False)
            found.most = form.most
        return _Form(found.center, found.rows, most)


def _padded(rows: Tensor, total: int) -> Tensor:
    if len(rows) == total:
        return rows
    return torch.cat([rows, rows.new_zeros(total - len(rows), *rows.shape[1:])])


def _taken(form: _Form, places: Tensor) -> _Form:
    rows = form.rows.flatten(1)[:, places.flatten()].reshape(len(form.rows), *places.shape)
    return _Form(form.center.flatten()[places], rows, form.most)


def _estimate(part: Tensor) -> float:
    v = torch.ones(part.shape[1], dtype=torch.float64)
    for _ in range(3):
        v = (part @ v) @ part
        length = float(v.norm())
        if not 0 < length < math.inf:
            return float(part.norm())
        v = v / length
    return float((part @ v).norm())


def _norm(matrix: Tensor) -> float:
    """The norm that the checker will prove, about."""
    a = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    if len(a) > _SIDE:
        raise _NotFollowedError(f"there are {len(a)} units with unknown slopes")
    if len(a) > _LARGE[0]:
        return math.sqrt(max(0.0, _krylov(a)) * _LARGE[1])
    return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(a @ a.mT)[-1])))


def _krylov(a: Tensor) -> float:
    """About the largest eigenvalue of A A^T, as the checker finds it."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(len(a), generator=generator, dtype=torch.float64)
    basis = torch.zeros(0, len(a), dtype=torch.float64)
    for _ in range(40):
        for _ in range(2):
            v = v - (basis @ v) @ basis
        length = float(v.norm())
        if not 0 < length < math.inf:
            break
        basis = torch.cat([basis, v[None] / length])
        v = a @ (basis[-1] @ a)
    return float(torch.linalg.eigvalsh((basis @ a) @ (basis @ a).mT)[-1]) if len(basis) else 0.0


def _bent(below: Any, center: Tensor, move: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    below = torch.as_tensor(below, dtype=torch.float64).expand(center.shape)
    one, side = torch.ones_like(center), center.abs()
    share = torch.where(side < move, (1.0 - side / move).clamp(0.0, 1.0), 0.0)
    here, there = torch.where(center > 0, one, below), torch.where(center > 0, below, one)
    end = here + share * (there - here)
    low, high = torch.minimum(here, end), torch.maximum(here, end)
    exact = center == 0
    low = torch.where(exact, torch.minimum(here, there), low)
    high = torch.where(exact, torch.maximum(here, there), high)
    return low, high, here * center


def _slopes(
    name: str, numbers: Sequence[float], gain: float, center: Tensor, move: Tensor
) -> tuple[Tensor, Tensor]:
    """The extreme slopes on ranges, as the checker finds them."""
    first, last = center - move, center + move
    kinks = _KINKS.get(name)
    if name in ("clamp", "clamp_min", "clamp_max"):
        flat, rising = (0.0, 0.0), (1.0, 1.0)
        middle = {"clamp": (flat, rising, flat), "clamp_min": (flat, rising)}
        kinks = tuple(numbers), middle.get(name, (rising, flat))
    if name == "softshrink":
        kinks = (-numbers[0], numbers[0]), ((1.0, 1.0), (0.0, 0.0), (1.0, 1.0))
    if kinks is not None:
        edges = (-math.inf, *kinks[0], math.inf)
        low, high = torch.full_like(center, math.inf), torch.full_like(center, -math.inf)
        for a, b, (least, most) in zip(edges, edges[1:], kinks[1], strict=False):
            inside = (last >= a) & (first <= b)
            low = torch.where(inside, low.clamp(max=least), low)
            high = torch.where(inside, high.clamp(min=most), high)
        return low, high

    def slope(x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = x.detach().clone().requires_grad_()
            return torch.autograd.grad(FUNCTIONS[name](y, *numbers).sum(), y)[0]

    if name in _CURVED:
        spread = _CURVED[name] * (last - first) * 0.5 / _PIECES
        middles = [first + (last - first) * (2 * i + 1) / (2 * _PIECES) for i in range(_PIECES)]
        ends = [slope(m) + sign * spread for m in middles for sign in (-1.0, 1.0)]
    elif name in _EVEN:
        sizes = torch.stack([first.abs(), last.abs()])
        near = torch.where((first <= 0) & (last >= 0), 0.0, sizes.amin(0))
        ends = [slope(near), slope(sizes.amax(0))]
    else:  # monotone on both sides of 0
        below, above = slope(last.clamp(max=-1e-300)), slope(first.clamp(min=1e-300))
        ends = [slope(first), slope(last)]
        ends += [torch.where(first <= 0, below, ends[0]), torch.where(last >= 0, above, ends[1])]
    found = torch.stack(ends).clamp(-gain, gain)
    return found.amin(0), found.amax(0)


# --- claims --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claims:
    """What is to be claimed.

    Attributes:
        batch: The samples, one batch for each input.
        radii: Of the balls; None for the largest ones in which a class is the checker's, too.
        labels: The true classes; a sample of another class gets no claim about its class.
    """

    batch: tuple[Tensor, ...]
    radii: tuple[float, ...] | None = None
    labels: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls,
        samples: Tensor | Sequence[Tensor] | None,
        radius: Any,
        labels: Any,
        shape: tuple[Any, ...],
    ) -> Claims | None:
        """Check what a user asks for; `radius` is one number, one for each sample, or None."""
        if samples is None:
            _checks.require(
                radius is None and labels is None,
                "LipschitzCertificate",
                "radius and labels belong to samples",
                "Pass the samples, too: save(path, local=x, radius=0.1)",
                radius=radius,
                labels=labels,
            )
            return None
        batch = batch_of(samples)
        check_inputs(shape, batch, 0.0)
        count = len(batch[0])
        for x in batch:
            size = x.detach().abs()
            size = size[size != 0]  # NaN stays
            _checks.require(
                bool(((size > 2.0**-200) & (size < 2.0**200)).all()),
                "LipschitzCertificate",
                "entries of samples must be 0, or between 2^-200 and 2^200 in absolute value",
                "Pass samples of the data",
                local=x,
            )
        if isinstance(radius, (int, float)) and not isinstance(radius, bool):
            radius = torch.full((count,), float(radius), dtype=torch.float64)
        _checks.require(
            radius is None
            or (
                isinstance(radius, Tensor)
                and radius.shape == (count,)
                and bool(torch.all((radius > 2.0**-200) & (radius < 2.0**200)))
            ),
            "LipschitzCertificate",
            "radius must be a number from 2^-200 to 2^200, or a tensor of one for each sample",
            "Leave it out for the largest radii that the checker can verify",
            radius=radius,
        )
        whole = isinstance(labels, Tensor) and not labels.is_floating_point()
        _checks.require(
            labels is None or (whole and labels.shape == (count,)),
            "LipschitzCertificate",
            "there must be one class index for each sample",
            "Pass integers (N,), not one-hot vectors",
            labels=labels,
        )
        radii = tuple(radius.detach().double().tolist()) if isinstance(radius, Tensor) else None
        return cls(tuple(batch), radii, None if labels is None else tuple(labels.tolist()))


def local_claims(writer: Writer, claims: Claims, pairs: str | None) -> list[dict[str, Any]]:
    """The entries of the file for some balls; `pairs` names the table of the file, if it has one.

    Raises:
        UncertifiableError: The checker does not follow an operation of the graph in a ball.
    """
    constants = {name: c.value.double() for name, c in writer.constants.items()}
    table = None if pairs is None else constants[pairs]
    count = range(len(claims.batch[0]))
    found = (_claim(writer, claims, i, constants, table) for i in count)
    return [entry for entry in found if entry is not None]


def _claim(
    writer: Writer, claims: Claims, place: int, constants: dict[str, Tensor], table: Tensor | None
) -> dict[str, Any] | None:
    """The entry for one sample; None if a class was asked for, and there is no radius."""
    given = [t[place].detach().cpu() for t in claims.batch]
    sample = [t.double() for t in given]
    wanted = None if claims.labels is None else claims.labels[place]

    def run(radius: float) -> _Ball:
        try:
            return _Ball(_Pass(writer, constants, sample, radius), table, wanted)
        except _NotFollowedError as error:
            return _checks.fail(
                "LipschitzCertificate",
                f"the checker must follow every operation in a ball, and {error}",
                "Save without local=: the constant of the whole space is then the only claim",
                UncertifiableError,
                sample=place,
            )

    if claims.radii is None:
        best = _largest(run)
        if best is None:
            return None
        radius, found = best
    else:
        radius, found = claims.radii[place], run(claims.radii[place])
    names = [writer.aside(t, "local.sample") for t in given]
    entry: dict[str, Any] = {"sample": names, "radius": radius.hex()}
    entry["secant"] = max(found.secant() * _ROOM, _FLOOR).hex()
    if found.label is not None and found.quotient >= radius * _ROOM:
        entry["label"] = found.label
        pairs = torch.where(found.slopes > 0, found.slopes * _ROOM, _LEAST)
        pairs[found.label] = 0.0
        entry["pairs"] = writer.aside(pairs, "local.pairs")
    return entry


class _Ball:
    """What was found in the ball around one sample.

    Attributes:
        label: The class of the sample; None if there are no classes or it is not the wanted one.
        slopes: Bounds of the secants of its output less every other.
        quotient: The distance that its margins allow with these.
        least: The same with bounds of the whole space.
    """

    def __init__(self, found: _Pass, table: Tensor | None, wanted: int | None) -> None:
        self._found, self.label, self.quotient, self.least = found, None, 0.0, 0.0
        (form, *others) = found.outputs
        if others or form.center.ndim != 1 or len(form.center) < 2:
            return
        label = int(form.center.argmax())
        if wanted is not None and wanted != label:
            return
        most = torch.full_like(form.center, math.sqrt(2.0) * form.most)
        most = most if table is None else torch.minimum(most, table[label])
        self.label, self.slopes = label, found.differences(label, most)
        margins = form.center[label] - form.center
        others_ = torch.arange(len(margins)) != label
        self.quotient = float((margins / (self.slopes * _ROOM))[others_].min())
        self.least = float((margins / (most * _ROOM))[others_].min())

    def secant(self) -> float:
        return self._found.secant()


def _largest(run: Callable[[float], _Ball]) -> tuple[float, _Ball] | None:
    """About the largest radius that the quotient of its ball is not below; None if it is 0."""
    found = run(_SHORT)
    if found.label is None or not 0.0 < found.quotient < math.inf or found.least <= 0.0:
        return None
    low, best = found.least / _ROOM, None
    high = max(low, found.quotient)  # about what the slope at the sample allows
    radius = math.sqrt(low * high)
    for _ in range(_STEPS):
        found = run(radius)
        if found.quotient >= radius * _ROOM:
            low, best = radius, (radius, found)
        else:
            high = min(high, radius)
            low = max(low, found.quotient / _ROOM)  # the ball of the quotient is no worse
        if high <= low * _NEAR:
            break
        # The quotient falls about as its ball grows.
        radius = math.sqrt(radius * found.quotient)
        radius = radius if low < radius < high else math.sqrt(low * high)
    for share in _SHARES:
        if best is not None and best[0] >= low * share:
            return best
        found = run(low * share)
        if found.quotient >= low * share * _ROOM:
            return low * share, found
    return best
