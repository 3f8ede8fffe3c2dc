"""Claims about the ball around one sample: a pass over the graph, with bounds of every rounding.

No witness is believed: ranges, slopes and norms are computed here from the sample and the radius.
What the bounds of nodes prove for the whole space holds in a ball, too, and caps the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from orthonet_checker import norms, ranges
from orthonet_checker.ball import OUT, TIGHT, Ball, Form, up
from orthonet_checker.nonlinear import Activation, Extremum, MaxPool, PReLU, Sort
from orthonet_checker.schema import magnitude, many, need, record, text, whole

CLAIM = {"sample": many(text, 1), "radius": magnitude, "secant": magnitude}
CLASS = {"label": whole(0), "pairs": text}


class Local(NamedTuple):
    """What was verified of one ball.

    Attributes:
        sample: The names of the constants that hold the center, one for each input.
        radius: Of the ball, in l2.
        secant: |f(a) - f(x)| <= secant |a - x| for the center x and all a of the ball.
        label: The class of all points of the ball, in exact arithmetic; None if none was claimed.
        pairs: With a label, bounds of the secants of this output less every other one.
    """

    sample: tuple[str, ...]
    radius: Fraction
    secant: Fraction
    label: int | None
    pairs: np.ndarray | None

    def __str__(self) -> str:
        line = f"|a - x| <= {float(self.radius):.10g} around {', '.join(self.sample)}: "
        line += f"|f(a) - f(x)| <= {float(self.secant):.10g} |a - x|"
        return line if self.label is None else f"{line}, the class is {self.label}"


def names(claims: Sequence[Any]) -> list[str]:
    """The names of constants in claims that may be malformed."""
    entries = [c for c in claims if type(c) is dict]
    samples = [c["sample"] for c in entries if type(c.get("sample")) is list]
    found = [*(n for s in samples for n in s), *(c.get("pairs") for c in entries)]
    return [n for n in found if type(n) is str]


def verify(
    claim: Any,
    nodes: Sequence[Any],
    outputs: Sequence[int],
    look_up: Callable[[str], np.ndarray],
    pairs: np.ndarray | None,
) -> Local:
    """Verify one claim.

    Args:
        claim: The entry of the file.
        nodes: The nodes, each with `op`, `sources`, `shape`, and the square of its constant.
        outputs: The places of the outputs.
        look_up: Gives a constant by its name.
        pairs: Verified constants of all differences of outputs, if the file has them.
    """
    found = record(claim, "the claim", CLAIM, CLASS)
    need(("label" in found) == ("pairs" in found), "label and pairs belong together")
    inputs = [n.shape for n in nodes if n.op is None]
    sample = [look_up(name) for name in found["sample"]]
    need([x.shape for x in sample] == inputs, "the shapes of a sample are those of the inputs")
    radius = float(found["radius"])
    need(2.0**-200 < radius < 2.0**200, "the radius must be between 2^-200 and 2^200")
    ball, forms = _run(nodes, outputs, sample, radius)
    ends = [forms[i] for i in outputs]
    each = [_whole(ball, form) for form in ends]
    total = math.sqrt(sum(n * n for n in each)) * TIGHT if len(each) > 1 else each[0]
    need(
        total <= found["secant"],
        f"the pass proves {total:.10g} only, above the secant {float(found['secant']):.10g}",
    )
    label, claimed = found.get("label"), None
    if label is not None:
        need(len(ends) == 1 and len(ends[0].shape) == 1, "a label is of one output of classes")
        claimed = look_up(found["pairs"])
        _class(ball, ends[0], label, claimed, pairs, Fraction(radius))
    return Local(found["sample"], found["radius"], found["secant"], label, claimed)


def _whole(ball: Ball, form: Form) -> float:
    """A bound of the secants of all entries of a node together."""
    ones = np.ones(math.prod(form.shape))
    rows = ball.reach(form.rows, form.error, form.most)
    length = math.sqrt(float(np.sum(rows * rows))) * TIGHT
    return ball.norm(form.rows, form.error, ones, min(form.most, length))


def _class(
    ball: Ball,
    form: Form,
    label: int,
    claimed: np.ndarray,
    pairs: np.ndarray | None,
    radius: Fraction,
) -> None:
    """The output `label` is the largest one in the whole ball."""
    classes = form.shape[0]
    need(label < classes and classes >= 2, "a label must be one of at least two classes")
    need(claimed.shape == (classes,) and bool(np.all(claimed >= 0)), "one bound for each class")
    sizes = ball.sizes(form)
    error = (form.error[label] + form.error + 2.0**-50 * (sizes[label] + sizes)) * OUT
    most = math.sqrt(2.0) * TIGHT * form.most
    found = ball.reach(form.rows[:, label, None] - form.rows, error, most)
    if pairs is not None:
        found = np.minimum(found, pairs[label])
    for other in range(classes):
        if other == label:
            continue
        bound = Fraction(float(claimed[other]))
        need(
            float(found[other]) <= bound,
            f"pairs: the pass proves {float(found[other]):.10g} only for class {label} less "
            f"{other}, above {float(bound):.10g}",
        )
        margin = Fraction(float(form.center[label])) - Fraction(float(form.center[other]))
        margin -= Fraction(float(form.off[label])) + Fraction(float(form.off[other]))
        need(
            margin > radius * bound,
            f"class {label} is above class {other} by {float(margin):.10g} only, "
            f"which may change by {float(radius * bound):.10g}",
        )


# --- the pass ------------------------------------------------------------------------------------


def _run(
    nodes: Sequence[Any], outputs: Sequence[int], sample: Sequence[np.ndarray], radius: float
) -> tuple[Ball, dict[int, Form]]:
    """The outputs in the ball; nodes that are not read any more are dropped."""
    ball = Ball(sum(x.size for x in sample))
    given, forms = iter(ball.inputs(sample)), {}
    last = {i: place for place, node in enumerate(nodes) for i in node.sources}
    for place, node in enumerate(nodes):
        if node.op is None:
            forms[place] = next(given)
        else:
            whole = up(norms.root_up(node.square))
            forms[place] = _follow(ball, node.op, [forms[i] for i in node.sources], whole, radius)
            need(forms[place].shape == node.shape, "shapes")
        need(forms[place].is_finite(), f"node {place} is not finite in the ball")
        for i in {*node.sources}:
            if last[i] == place and i not in outputs:
                del forms[i]
    return ball, forms


def _follow(ball: Ball, op: Any, forms: list[Form], most: float, radius: float) -> Form:
    """One operation."""
    if op.linear:
        return ball.affine(op, forms, most)
    if isinstance(op, Activation):

        def near(*given: np.ndarray) -> ranges.Near:
            return ranges.activation(op.function, op.parameters, op.gain, *given)

        return _activated(ball, forms[0], near, most, radius)
    if isinstance(op, PReLU):
        column = op.slopes[(slice(None), *[None] * (forms[0].center.ndim - 1))]
        return _activated(ball, forms[0], lambda *g: ranges.bent(column, *g), most, radius)
    if isinstance(op, Sort) and op.size == 2:
        return _sorted(ball, op, forms[0], most, radius)
    if isinstance(op, Extremum) and len(forms) == 2:
        (found,) = _larger(ball, *forms, [op.largest], radius, False)
        found.most = most
        return found
    if isinstance(op, MaxPool):
        return _pooled(ball, op, forms[0], most, radius)
    return need(False, f"{type(op).__name__} is an operation that is not followed in a ball")


def _activated(
    ball: Ball,
    form: Form,
    near: Callable[..., ranges.Near],
    most: float,
    radius: float,
    together: bool = True,
) -> Form:
    """Units that change by an unknown slope in a known range times their change.

    `together`: `form.most` bounds all of them, not only each.
    """
    reach = ball.reach(form.rows, form.error, form.most)
    move = (reach * radius * TIGHT).reshape(form.shape)
    low, high, value, off = near(form.center, form.off, move)
    rows, error = ball.slopes(form, low, high, reach, form.most if together else math.inf)
    return Form(value, off, rows, error, most)


def _larger(
    ball: Ball, a: Form, b: Form, signs: Sequence[bool], radius: float, apart: bool
) -> list[Form]:
    """The larger one b + max(a - b, 0) where a sign is true; else the smaller a - max(a - b, 0).

    `apart`: all entries of both are different ones of one node.
    """
    gap = ball.sum(a, b, -1.0)
    gap.most = (math.sqrt(2.0) * a.most if apart else a.most + b.most) * TIGHT
    kink = np.float64(0.0)
    rise = _activated(ball, gap, lambda *g: ranges.bent(kink, *g), math.inf, radius, apart)
    found = [ball.sum(b, rise, 1.0) if sign else ball.sum(a, rise, -1.0) for sign in signs]
    for form, sign in zip(found, signs, strict=True):
        form.center = (np.maximum if sign else np.minimum)(a.center, b.center)
        form.off = np.maximum(a.off, b.off)
        form.most = a.most + b.most
    return found


def _taken(form: Form, places: np.ndarray) -> Form:
    """Entries at places of the flat node."""

    def at(x: np.ndarray) -> np.ndarray:
        return x.reshape(-1)[places]

    rows = form.rows.reshape(len(form.rows), -1)[:, places.reshape(-1)]
    rows = rows.reshape(len(rows), *places.shape)
    return Form(at(form.center), at(form.off), rows, at(form.error), form.most)


def _sorted(ball: Ball, op: Any, form: Form, most: float, radius: float) -> Form:
    """Sort pairs."""
    places, n = np.arange(math.prod(form.shape)).reshape(form.shape), form.shape[op.dim]
    first = np.arange(n // 2) if op.halves else np.arange(0, n, 2)
    second = first + n // 2 if op.halves else first + 1
    above, below = (np.take(places, i, op.dim) for i in (first, second))
    signs = [op.descending, not op.descending]
    parts = _larger(ball, _taken(form, above), _taken(form, below), signs, radius, True)
    order = np.argsort(np.concatenate([above.reshape(-1), below.reshape(-1)]))

    def joined(x: np.ndarray, y: np.ndarray, lead: int) -> np.ndarray:
        flat = [z.reshape(*z.shape[:lead], -1) for z in (x, y)]
        both = np.concatenate(flat, lead)
        return both[..., order].reshape(*x.shape[:lead], *form.shape)

    return Form(
        joined(parts[0].center, parts[1].center, 0),
        joined(parts[0].off, parts[1].off, 0),
        joined(parts[0].rows, parts[1].rows, 1),
        joined(parts[0].error, parts[1].error, 0),
        most,
    )


def _pooled(ball: Ball, op: Any, form: Form, most: float, radius: float) -> Form:
    """The largest entry of windows, one place after the other; short windows repeat their first."""
    places = np.arange(math.prod(form.shape)).reshape(form.shape)
    sizes = [max(map(len, rows)) for rows in op.rows]
    wide = [
        np.array([row + row[:1] * (k - len(row)) for row in rows])
        for rows, k in zip(op.rows, sizes, strict=True)
    ]
    found: Form | None = None
    for taps in np.ndindex(*sizes):
        at = places
        for axis, (rows, tap) in enumerate(zip(wide, taps, strict=True), -len(wide)):
            at = np.take(at, rows[:, tap], axis)
        here = _taken(form, at)
        if found is not None:  # no entry of a window changes by more than all entries together
            (here,) = _larger(ball, here, found, [True], radius, False)
            here.most = form.most
        found = here
    found.most = most
    return found
