r"""Operations that have a constant in a ball only: products, powers, softmax, normalizations.

With $\Delta a = a(p) - a(q)$ and midpoints $a_m$, $b_m$, a bilinear map changes by
$f(\Delta a, b_m) + f(a_m, \Delta b)$ exactly. What it makes of $\Delta a$ and $\Delta b$ with the
values at the sample is affine, and kept; the rest is at most $2 r f(L_a, L_b)$ entry by entry, for
differences from the sample $r f(L_a, L_b)$, in units of the distance.

The Jacobian of softmax is $\mathrm{diag}(p) - p p^\top$. Its entries at the sample are kept; in the
ball every $p_i$ stays in an interval, and the rest is bounded entry by entry.

A normalization is $g(u) = u / \sqrt{|u|^2 / n + \epsilon}$ of a centered group. With
$\rho^2 = |u|^2 / n + \epsilon$, $\|D^2 g\| \le 2 / (\sqrt{3 n} \rho^2)$: for a unit vector with
the square $\beta$ of its part along u and $t = |u|^2 / (n \rho^2)$, the square of
$\sqrt n \rho^2 D^2 g$ is $t (1 + \beta (8 - 6 t) - 3 t \beta^2 (4 - 3 t)) \le 4/3$. So the Jacobian
at the sample is kept, and the rest is known by how far the group moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from orthonet.certify.local.moves import Moves, Rows
from orthonet.certify.local.unknown import Unknown
from orthonet.certify.mlp.chain import frobenius_up
from orthonet.certify.mlp.slopes import Activation, Turns
from orthonet.certify.ops.normalization import groups_of
from orthonet.certify.ops.registry import interval_of
from orthonet.certify.rounding.forward import Errors
from orthonet.certify.rules import BatchDependent, Operand
from orthonet.certify.walk.state import State
from orthonet.linalg.bounds.rounding import UNIT_ROUNDOFF, gamma

__all__ = ["ALL", "IN_BALLS", "PointErrors", "in_ball"]

_SAFE = 1.0 + 2.0**-40
_NEAR = 1e-12  # relative, of elementary functions and their arguments
_PRODUCTS = ("mul", "matmul", "bmm")
_NORMALIZATIONS = ("layer_norm", "rms_norm", "group_norm", "instance_norm")
_CURVES = ("exp", "reciprocal", "sqrt", "rsqrt", "log", "pow", "square")
IN_BALLS = frozenset({*_PRODUCTS, *_CURVES, "div", "scaled_dot_product_attention"})
"""The operations without a global constant that have one in a ball."""
ALL = IN_BALLS | {"softmax", *_NORMALIZATIONS}
"""These, and others that are better known in a ball."""


class Ball(Protocol):
    """What these rules need of a `Ball`."""

    unknown: Unknown
    space: Rows
    values: dict[fx.Node, Any]
    moves: dict[fx.Node, Moves]
    radius: float
    chords: bool

    def off(self, state: State) -> float:
        """What the value of an entry at the sample may be off."""
        ...

    def split(
        self,
        moves: Moves,
        value: Tensor,
        off: float,
        act: Activation,
        dim: int | None,
        each: float,
        together: float,
    ) -> Moves:
        """Split the slopes of units into what is known of them and an unknown rest."""
        ...


@dataclass(frozen=True)
class _Value:
    """A tensor: its value at the sample, what entries may be off, and its moves."""

    at: Tensor
    off: float
    moves: Moves


def in_ball(ball: Ball, state: State) -> Moves | None:
    """The moves of an operation that these rules know, and whose operands move as known."""
    call = state.call
    operands = call.operands
    sources = [x._state for x in operands]
    if not all(s.node in ball.moves for s in sources):
        return None
    values = [_Value(ball.values[s.node][0], ball.off(s), ball.moves[s.node]) for s in sources]
    if call.op in _PRODUCTS and len(operands) == 2:
        return _product(ball, values[0], values[1], torch.mul if call.op == "mul" else torch.matmul)
    if call.op == "div" and isinstance(call["other"], Operand):
        divisor = values[-1]
        inverse = _curve(ball, divisor, "reciprocal", 1, interval_of(operands[-1]))
        if len(values) == 2:
            return _product(ball, values[0], inverse, torch.mul)
        factor = call.fixed("self").expand(1, *state.shape)[0]
        return _product(ball, _still(ball, factor), inverse, torch.mul)
    if call.op in _CURVES and len(operands) == 1:
        power = call.given("exponent", 2)
        if isinstance(power, (int, float)):
            return _curve(ball, values[0], call.op, power, interval_of(operands[0])).moves
    if call.op == "softmax" and len(operands) == 1:
        (dim,) = call.feature_dims(call["dim"])
        return _softmax(ball, values[0], dim).moves
    if call.op in _NORMALIZATIONS and len(operands) == 1:
        return _normalized(ball, state, values[0])
    if call.op == "scaled_dot_product_attention":
        moving = dict(zip((id(s) for s in sources), values, strict=True))
        parts = [
            moving[id(part._state)] if isinstance(part, Operand) else _still(ball, part)
            for part in _parts(state)
        ]
        return _attention(ball, state, parts)
    return None


def _still(ball: Ball, value: Tensor) -> _Value:
    """A constant among the values."""
    zero = torch.zeros_like(value)
    rows = zero.new_zeros(0, *value.shape, dtype=ball.unknown.dtype)
    return _Value(value, 0.0, Moves(rows, zero, zero))


def _rest(
    ball: Ball, rows: Tensor, error: Tensor, sizes: Tensor, rest: Tensor, whole: float
) -> Moves:
    """Known rows, and a rest of each entry that is a unit of its own."""
    if not bool(rest.isfinite().all()):
        raise OverflowError("a unit moves without a bound")
    rest = rest * _SAFE
    index = (rest > 0).flatten().nonzero()[:, 0]
    ball.space.check(rest.numel(), len(index))
    rows = ball.space.padded(rows)
    ball.unknown.add(rest.flatten()[index], whole * _SAFE)
    ones = torch.ones(len(index), dtype=torch.float64)
    return Moves(rows, error * _SAFE, (sizes + rest) * _SAFE, index=index, own=ones)


# --- products ------------------------------------------------------------------------------------


def _product(
    ball: Ball, a: _Value, b: _Value, f: Callable[[Tensor, Tensor], Tensor]
) -> Moves | None:
    if a.at.ndim != b.at.ndim or (f is torch.matmul and a.at.ndim < 2):
        return None
    return _bilinear(ball, a, b, f).moves


def _bilinear(ball: Ball, a: _Value, b: _Value, f: Callable[[Tensor, Tensor], Tensor]) -> _Value:
    space, dtype = ball.space, ball.unknown.dtype
    (first, reach_a), (second, reach_b) = space.measured(a.moves), space.measured(b.moves)
    at = f(a.at, b.at)
    rows = torch.zeros(space.total, *at.shape, dtype=dtype)
    for moves, other, left in ((first, b.at, True), (second, a.at, False)):
        fixed = other.to(dtype)[None]
        for begin, end, part in space.pieces(moves):
            rows[begin:end] += f(part, fixed) if left else f(fixed, part)
    terms = a.at.shape[-1] if f is torch.matmul else 1
    error = f(first.error, b.at.abs()) + f(a.at.abs(), second.error)
    sizes = f(first.sizes, b.at.abs()) + f(a.at.abs(), second.sizes)
    # A row, its factor, the product, and the sums of both parts are rounded.
    error = error + ball.unknown.gamma(terms + 12) * (sizes + error)
    error = error + ball.unknown.lost * (terms + 4) * (
        1.0 + float(a.at.abs().sum() + b.at.abs().sum())
    )
    times = 1.0 if ball.chords else 2.0
    rest = times * ball.radius * f(reach_a, reach_b)
    rest = (
        rest + f(reach_a, torch.full_like(b.at, b.off)) + f(torch.full_like(a.at, a.off), reach_b)
    )
    moves = _rest(ball, rows, error, sizes, rest * (1.0 + gamma(terms + 8)), math.inf)
    sizes_of = (frobenius_up(a.at), frobenius_up(b.at))
    return _Value(at, _off_product(sizes_of, (a.off, b.off), terms), moves)


def _off_product(sizes: tuple[float, float], offs: tuple[float, float], terms: int) -> float:
    """What the norm of a product may be off, of two that are off."""
    own = gamma(terms + 4) * (sizes[0] + offs[0]) * (sizes[1] + offs[1]) + terms * 1e-300
    return (sizes[0] * offs[1] + sizes[1] * offs[0] + offs[0] * offs[1] + own) * _SAFE


# --- functions of one entry ----------------------------------------------------------------------


def _curve(ball: Ball, x: _Value, name: str, power: float, known: tuple[float, float]) -> _Value:
    def narrow(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return _curve_slopes(name, power, low.clamp_min(known[0]), high.clamp_max(known[1]))

    def chords(a: Tensor, b: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if name == "square" or (name == "pow" and power == 2):  # the slope is the sum of the ends
            ends = a + low, b + high
            slack = [
                4 * UNIT_ROUNDOFF * (a.abs() + low.abs()),
                4 * UNIT_ROUNDOFF * (b.abs() + high.abs()),
            ]
            return ends[0] - slack[0], ends[1] + slack[1]
        low, high = low.clamp_min(known[0]), high.clamp_max(known[1])
        narrow(low, high)  # raises
        return _turns_of(name, power).chords(a.clamp(low, high), b.clamp(low, high), low, high)

    ends = torch.full((), -math.inf).double(), torch.full((), math.inf).double()
    act = Activation(_FUNCTIONS.get(name, lambda v: v**power), *ends, narrow=narrow, chords=chords)
    moves = ball.split(x.moves, x.at, x.off, act, None, math.inf, math.inf)
    at = act.function(x.at)
    return _Value(at, _off_curve(x.at, x.off, name, power, known, at), moves)


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    name: getattr(torch, name) for name in _CURVES if name != "pow"
}


def _off_curve(
    x: Tensor, off: float, name: str, power: float, known: tuple[float, float], at: Tensor
) -> float:
    """What the norm of the values may be off."""
    low, high = (x - off).clamp_min(known[0]), (x + off).clamp_max(known[1])
    least, most = _curve_slopes(name, power, low, high)
    slope = float(torch.maximum(least.abs(), most.abs()).max()) if x.numel() else 0.0
    return (slope * off + 128 * UNIT_ROUNDOFF * frobenius_up(at) + 1e-300 * at.numel()) * _SAFE


def _curve_slopes(name: str, power: float, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest slope on intervals.

    Raises:
        OverflowError: An interval leaves the domain, or holds a pole.
    """
    if name in ("sqrt", "rsqrt", "log") or (name == "pow" and power != int(power)):
        _inside(bool((low > 0).all()), name)
    elif name == "reciprocal" or power < 0:
        _inside(bool(((low > 0) | (high < 0)).all()), name)
    least, most = _turns_of(name, power)(low, high)
    if not bool((least.isfinite() & most.isfinite()).all()):
        raise OverflowError("a slope has no bound")
    return least, most


_DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "reciprocal": lambda x: -x.pow(-2.0),
    "sqrt": lambda x: 0.5 * x.rsqrt(),
    "rsqrt": lambda x: -0.5 * x.pow(-1.5),
    "log": torch.reciprocal,
}


def _turns_of(name: str, power: float) -> Turns:
    """The slopes of a function on intervals inside its domain."""
    if name in _DERIVATIVES:
        return Turns(_DERIVATIVES[name], relative=_NEAR, absolute=1e-300)
    exponent = 2.0 if name == "square" else float(power)
    # The slope of an odd power has its least value, zero, inside.
    turns = ((0.0, 0.0),) if exponent > 1.0 else ()
    return Turns(
        lambda x: exponent * x.pow(exponent - 1.0) if exponent else torch.zeros_like(x),
        turns,
        relative=_NEAR,
        absolute=1e-300,
    )


def _inside(good: bool, name: str) -> None:
    if not good:
        raise OverflowError(f"{name} leaves its domain in the ball")


# --- softmax -------------------------------------------------------------------------------------


def _softmax(ball: Ball, x: _Value, dim: int) -> _Value:
    moves, reach = ball.space.measured(x.moves, copy=True)
    at, reach, error, sizes = (t.movedim(dim, -1) for t in (x.at, reach, moves.error, moves.sizes))
    rows = moves.known.movedim(dim + 1, -1)
    p = at.softmax(-1)
    # An entry that never moves from minus infinity has no share.
    masked = (at == -math.inf) & (error == 0.0) & (rows == 0.0).all(0)
    if bool(masked.all(-1).any()):
        raise OverflowError("every entry is masked")
    far = (ball.radius * reach + x.off) * _SAFE + 4 * UNIT_ROUNDOFF * at.abs()
    far = far.masked_fill(masked, 0.0)
    low, high = at - far, at + far
    # 1 / p_i is the sum of exp(s_j - s_i) over all j, of which that of i itself is 1.
    keep = 1.0 - torch.eye(at.shape[-1], dtype=torch.float64)

    def share(others: Tensor, own: Tensor) -> Tensor:
        above = (others[..., None, :] - own[..., None]).exp().clamp(max=1e300)
        return (1.0 / (1.0 + (keep * above).sum(-1))).masked_fill(masked, 0.0)

    least, most = share(high, low) * (1.0 - _NEAR), share(low, high) * (1.0 + _NEAR)
    most = most.clamp(max=1.0)
    outer = p[..., None] * p[..., None, :]
    apart = torch.maximum(
        most[..., None] * most[..., None, :] - outer, outer - least[..., None] * least[..., None, :]
    )
    ends, middle = torch.stack([least * (1 - least), most * (1 - most)]), p * (1 - p)
    top = torch.where((least <= 0.5) & (most >= 0.5), 0.25, ends.amax(0))
    own = torch.maximum(top - middle, middle - ends.amin(0))
    apart = keep * apart + torch.diag_embed(own)
    apart = apart.clamp_min(0.0) + 1e-14  # roundings of products of shares
    rest = (apart @ reach[..., None])[..., 0] * (1.0 + gamma(at.shape[-1] + 8))

    weight = p.to(rows.dtype)
    mean = (rows * weight).sum(-1, keepdim=True)
    rows.sub_(mean).mul_(weight)
    error = p * (error + (p * error).sum(-1, keepdim=True))
    sizes = p * (sizes + (p * sizes).sum(-1, keepdim=True))
    error = (
        error
        + ball.unknown.gamma(at.shape[-1] + 12) * (sizes + error)
        + ball.unknown.lost * at.numel()
    )
    off = (0.5 * x.off + gamma(at.shape[-1] + 128) * frobenius_up(p)) * _SAFE
    rest, error, sizes, p, rows = (
        t.movedim(-1, dim + (t is rows)) for t in (rest, error, sizes, p, rows)
    )
    return _Value(p, off, _rest(ball, rows, error, sizes, rest, math.inf))


# --- normalizations ------------------------------------------------------------------------------


def _normalized(ball: Ball, state: State, x: _Value) -> Moves | None:
    call = state.call
    groups = groups_of(call, x.at[None])
    if groups is None or not isinstance(call["eps"], (int, float)):
        return None
    shape, (count, n) = x.at.shape, groups.shape[1:]
    centered = call.op != "rms_norm"
    moves, reach = ball.space.measured(x.moves, copy=True)
    u = groups[0] - groups[0].mean(-1, keepdim=True) if centered else groups[0]
    near = 16 * n * UNIT_ROUNDOFF * groups[0].abs().sum(-1)  # the mean
    length = torch.linalg.vector_norm(u, dim=-1)
    rho = (length.square() / n + float(call["eps"])).sqrt()
    # How far the group moves, as a vector.
    far = torch.linalg.vector_norm(reach.reshape(count, n), dim=-1) * _SAFE
    if count <= 32:
        parts = moves.known.reshape(-1, count, n)
        errors = moves.error.reshape(count, n)
        one = torch.ones(n, dtype=torch.float64)
        norms = [ball.unknown.norm(parts[:, i].contiguous(), one, errors[i]) for i in range(count)]
        far = torch.minimum(far, torch.tensor(norms, dtype=torch.float64))
    off = x.off + near
    least = (length * (1 - _NEAR) - ball.radius * far - off).clamp_min(0.0)
    floor = (least.square() / n + float(call["eps"])).sqrt() / _SAFE
    bend = 2.0 / (math.sqrt(3.0 * n) * floor.square())
    times = 0.5 if ball.chords else 1.0
    rest = bend * (times * ball.radius * far + off) * far
    rest = torch.minimum(rest, 2.0 * far / floor) * (1.0 + 64 * n * UNIT_ROUNDOFF)

    weight = torch.ones(shape, dtype=torch.float64)
    if call.given("weight") is not None:
        given = call.fixed("weight")
        if call.op in ("group_norm", "instance_norm"):
            given = given.reshape(-1, *[1] * (len(shape) - 1))
        weight = given.abs().expand(shape)
        signed = given.expand(shape)
    else:
        signed = weight

    def turned(v: Tensor, absolute: bool = False) -> Tensor:
        """The Jacobian at the sample, for (rows, groups, n)."""
        direction = (u / (rho[:, None] * math.sqrt(n))).to(v.dtype)
        direction, sign = (direction.abs(), 1.0) if absolute else (direction, -1.0)
        if centered:
            v = v + sign * v.mean(-1, keepdim=True)
        v = v + sign * direction * (direction * v).sum(-1, keepdim=True)
        return v / rho[:, None].to(v.dtype)

    dtype = ball.unknown.dtype
    rows = turned(moves.known.reshape(-1, count, n)).reshape(-1, *shape) * signed.to(dtype)
    both = torch.stack([moves.error, moves.sizes]).reshape(2, count, n)
    error, sizes = turned(both, True).reshape(2, *shape) * weight
    error = error + ball.unknown.gamma(2 * n + 32) * (sizes + error)
    error = error + ball.unknown.lost * n * (1.0 + float(weight.max())) * (
        1.0 + float(1.0 / rho.min())
    )
    largest = float(weight.max()) if weight.numel() else 0.0
    whole = frobenius_up(rest) * largest
    rest = rest[:, None].expand(count, n).reshape(shape) * weight
    return _rest(ball, rows, error, sizes, rest, whole)


# --- attention -----------------------------------------------------------------------------------


def _attention(ball: Ball, state: State, values: list[_Value]) -> Moves | None:
    plain = _plain_attention(state)
    if plain is None:
        return None
    query, key, value = values
    turned = key.moves
    turned = ball.space.dense(turned).each(lambda t, lead: t.mT)
    scores = _bilinear(ball, query, _Value(key.at.mT, key.off, turned), torch.matmul)
    scale, bias = plain
    scores = _scaled(ball, scores, scale)
    if bias is not None:
        masked, shift = bias.isinf(), bias.nan_to_num(neginf=0.0)
        kept = ball.space.dense(scores.moves).each(lambda t, lead: t * ~masked)
        off = scores.off + _SAFE * 2 * UNIT_ROUNDOFF * frobenius_up(scores.at + shift)
        at = (scores.at + shift).masked_fill(masked.expand(scores.at.shape), -math.inf)
        scores = _Value(at, off, kept)
    weights = _softmax(ball, scores, scores.at.ndim - 1)
    return _bilinear(ball, weights, value, torch.matmul).moves


def _parts(state: State) -> list[Any]:
    """Queries, keys and values: operands, or constants of one sample."""
    call = state.call
    found = []
    for name in ("query", "key", "value"):
        part = call[name]
        if not isinstance(part, Operand):
            part = call.fixed(name)
            part = part[0] if part.ndim > len(state.shape) else part
        found.append(part)
    return found


def _plain_attention(state: State) -> tuple[float, Tensor | None] | None:
    """The scale of the scores, and what is added to them; None for what is not followed.

    Scores to which -inf is added are masked: at least one in each row is not.
    """
    call = state.call
    if call.given("dropout_p", 0.0) or call.given("enable_gqa", False):
        return None
    scale = call.given("scale")
    query, key, _ = _parts(state)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    shape = (*query.shape[:-1], key.shape[-2])
    bias, mask = None, call.given("attn_mask")
    if isinstance(mask, BatchDependent) and mask.rows:
        mask = mask.value[:1]
    if call.given("is_causal", False):
        bias = torch.zeros(shape[-2:], dtype=torch.float64)
        bias.masked_fill_(torch.ones_like(bias).triu(1) > 0, -math.inf)
    if isinstance(mask, Tensor):
        if mask.ndim > len(shape):  # of all samples alike
            if len(mask) != 1:
                return None
            mask = mask[0]
        mask = mask.detach().cpu()
        if mask.dtype == torch.bool:
            added = torch.zeros(mask.shape, dtype=torch.float64).masked_fill_(~mask, -math.inf)
        else:
            added = mask.double()
        bias = added if bias is None else bias + added
    elif mask is not None:
        return None
    if bias is None:
        return scale, None
    bias = bias.expand(shape)
    usual = ((bias.isfinite() | (bias == -math.inf)).all()) & bias.isfinite().any(-1).all()
    return (scale, bias) if bool(usual) else None


def _scaled(ball: Ball, x: _Value, scale: float) -> _Value:
    moves = ball.space.dense(x.moves)
    error = (moves.error + 4 * ball.unknown.unit * moves.sizes) * abs(
        scale
    ) * _SAFE + ball.unknown.lost
    found = Moves(moves.known * scale, error, moves.sizes * (abs(scale) * _SAFE))
    off = (x.off + 4 * UNIT_ROUNDOFF * frobenius_up(x.at)) * abs(scale) * _SAFE
    return _Value(x.at * scale, off, found)


# --- what values may be off ----------------------------------------------------------------------


class PointErrors(Errors):
    """What the values of nodes at one sample may be off, where gains do not tell."""

    def _find(self, state: State) -> Tensor:
        if not state.parents or state.call.op not in IN_BALLS:
            return super()._find(state)
        step = self.walker.step_of(state)
        if all(math.isfinite(gain.value) for gain in step.gains) and step.roundings is not None:
            return super()._find(state)
        found = self._of_values(state)
        return super()._find(state) if found is None else torch.full_like(self.ball, found)

    def _of_values(self, state: State) -> float | None:
        call, operands = state.call, state.call.operands
        ats = [self.values[x._state.node][0] for x in operands]
        offs = [float(self.of(x._state)) * _SAFE for x in operands]
        sizes = [frobenius_up(a) for a in ats]
        if call.op in _PRODUCTS and len(operands) == 2:
            terms = 1 if call.op == "mul" else ats[0].shape[-1]
            return _off_product((sizes[0], sizes[1]), (offs[0], offs[1]), terms + 4)
        at = self.values[state.node][0]
        if call.op in _CURVES and len(operands) == 1:
            known, power = interval_of(operands[0]), call.given("exponent", 2)
            if not isinstance(power, (int, float)):
                return None
            return _off_curve(ats[0], offs[0], call.op, power, known, at)
        if call.op == "div" and isinstance(call["other"], Operand):
            inverse = ats[-1].reciprocal()
            off = _off_curve(ats[-1], offs[-1], "reciprocal", 1, interval_of(operands[-1]), inverse)
            first = (
                (sizes[0], offs[0])
                if len(ats) == 2
                else (frobenius_up(call.fixed("self").expand(at[None].shape)), 0.0)
            )
            return _off_product((first[0], frobenius_up(inverse)), (first[1], off), 4)
        if call.op == "scaled_dot_product_attention":
            plain = _plain_attention(state)
            if plain is None:
                return None
            parts = [p if isinstance(p, Tensor) else None for p in _parts(state)]
            moving = iter(zip(ats, offs, strict=True))
            pairs = [next(moving) if p is None else (p, 0.0) for p in parts]
            ats, offs = [a for a, _ in pairs], [o for _, o in pairs]
            sizes = [frobenius_up(a) for a in ats]
            keys = ats[1].shape[-2]
            scores = abs(plain[0]) * _off_product(
                (sizes[0], sizes[1]), (offs[0], offs[1]), ats[0].shape[-1] + 16
            )
            if plain[1] is not None:  # the sum with the mask is rounded
                added = frobenius_up(plain[1].nan_to_num(neginf=0.0))
                largest = abs(plain[0]) * sizes[0] * sizes[1] + added + scores
                scores = scores + 2 * UNIT_ROUNDOFF * largest * _SAFE
            rows = math.sqrt(math.prod(ats[0].shape[:-1]))  # each of a norm of 1 at most
            shares = 0.5 * scores + gamma(4 * keys + 256) * rows
            return _off_product((rows, sizes[2]), (shares, offs[2]), keys + 16)
        return None
