"""The whole certificate: its nodes in order, its composition, its margins and its samples.

Composition: L_i^2 is a rational bound of the squared constant from all inputs together, as one
vector, to node i. A gain g makes g^2 L^2 of it, sums add the constants, and what lies side by side
adds the squares. A `joint` bound of a node holds for all affine operations since an earlier node.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from orthonet_checker import local, maps, nonlinear, norms, slopes  # noqa: F401 (two register)
from orthonet_checker.operations import OPERATIONS, Operation, Shape
from orthonet_checker.schema import (
    SIZE,
    Rejected,
    anything,
    magnitude,
    many,
    need,
    one_of,
    parse,
    record,
    sha256,
    text,
    whole,
)
from orthonet_checker.store import DTYPES, Key, Store, digest, unread

FORMAT = "orthonet certificate 1"
CLOSE = 2.0**-10
"""How far the samples of the model may be from the graph, relative to their largest entry."""

_CLAIMS = ("gain", "gains", "rule", "t", "joint", "chain", "path")
_NODE = {"op": one_of(*OPERATIONS, "input"), "path": text}
_CONSTANT = {
    "names": many(text),
    "dtype": one_of(*DTYPES),
    "shape": many(whole(0)),
    "sha256": sha256,
}
_JOINT = {"since": whole(0), "gain": magnitude, "t": magnitude}
_CHAIN = {"since": whole(0), "gain": magnitude, "multipliers": many(text, 1)}
_HEAD = {
    "format": one_of(FORMAT),
    "weights": text,
    "inputs": many(many(whole(1)), 1),
    "constants": anything,
    "nodes": anything,
    "outputs": many(whole(0), 1),
    "bound": magnitude,
    "each": many(magnitude),
    "prover": anything,
}
_REST = {"pairs": text, "samples": anything, "local": many(anything, 1)}


@dataclass
class Verdict:
    """What was verified, and on which assumptions.

    Attributes:
        bound: The squared constant that was claimed and follows from the nodes.
        assumed: One line for each gain, or tensor of the model, that is taken on trust.
        notes: What else was checked, or could not be.
        graph: SHA-256 of the operations, their arguments and their constants.
        weights: SHA-256 of all constants of nodes together.
        nodes: A line for each node.
        local: What was verified of the balls around single samples.
    """

    bound: Fraction
    graph: str
    weights: str
    assumed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    local: list[local.Local] = field(default_factory=list)

    def __str__(self) -> str:
        claim = f"constant <= {float(self.bound):.10g} ({float(self.bound).hex()}, l2)"
        names = f"for the weights {self.weights}, in the graph {self.graph}"
        lines = [f"local claim {i}: {found}" for i, found in enumerate(self.local)]
        if not self.assumed:
            return "\n".join([*lines, f"verified: {claim} {names}"])
        lines = [*(f"assumed: {line}" for line in self.assumed), *lines]
        return "\n".join([*lines, f"verified, but for what is assumed: {claim} {names}"])


@dataclass
class _Node:
    op: Operation | None  # None for an input
    sources: tuple[int, ...]
    shape: Shape
    square: Fraction


def check(
    path: str | Path,
    weights: Sequence[str | Path] = (),
    say: Callable[[str], Any] = lambda line: None,
) -> Verdict:
    """Verify a certificate.

    Args:
        path: The JSON file.
        weights: The safetensors files of the model, to be compared with the constants of the
            nodes. The file next to the certificate that it names must be there, too.
        say: Is called with a line for each node that was verified.

    Raises:
        Rejected: A claim does not follow. The message names the node.
        OSError: A file cannot be read.
    """
    path = Path(path)
    content = parse(path.read_bytes())
    need(type(content) is dict and type(content.get("weights")) is str, "no certificate")
    need(content["weights"].isprintable(), "weights must be the name of a file")
    try:
        own = Store(path.parent / Path(content["weights"]).name)
        model = Store(*map(Path, weights)) if weights else None
        return verify(content, own, model, say)
    except (ArithmeticError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as e:
        raise Rejected(f"what it describes cannot be computed: {type(e).__name__}, {e}") from None


@np.errstate(all="ignore")  # what is not finite is rejected
def verify(
    content: Any,
    own: Store,
    model: Store | None = None,
    say: Callable[[str], Any] = lambda line: None,
) -> Verdict:
    """Verify a parsed certificate with the file of its constants and, if given, the model's."""
    head = record(content, "certificate", _HEAD, _REST)
    need(type(head["nodes"]) is list, "nodes must be a list")
    entries, arrays = _constants(head["constants"], own)
    verdict = Verdict(head["bound"], "", "")
    nodes, used = _nodes(head, arrays, verdict, say)
    keys = {name: own.keys[name] for name in sorted(used)}
    bare = [{k: v for k, v in node.items() if k not in _CLAIMS} for node in head["nodes"]]
    whole_graph = {
        "inputs": head["inputs"],
        "nodes": bare,
        "outputs": head["outputs"],
        "constants": {name: list(key) for name, key in keys.items()},
    }
    canonical = json.dumps(whole_graph, sort_keys=True, separators=(",", ":"))
    verdict.graph = hashlib.sha256(canonical.encode()).hexdigest()
    verdict.weights = digest(keys.values())
    outputs = [nodes[_inside(i, nodes)] for i in head["outputs"]]
    total = sum((n.square for n in outputs), Fraction(0))
    need(total <= verdict.bound**2, f"the nodes prove {_root(total)} only, above the claimed bound")
    need(len(head["each"]) == len(outputs), "a bound for each output")
    for place, (claim, node) in enumerate(zip(head["each"], outputs, strict=True)):
        need(node.square <= claim**2, f"output {place}: the nodes prove {_root(node.square)} only")
    pairs = None
    if "pairs" in head:
        need(len(outputs) == 1, "margins are of one output")
        pairs = _look_up(arrays, head["pairs"], "pairs")
        _check_pairs(pairs, nodes, head["outputs"][0])
        verdict.notes.append("the constants of the differences of outputs are verified")
    if "samples" in head:
        _check_samples(head, arrays, nodes, verdict)
    else:
        verdict.notes.append("no samples: that the graph is the model is the prover's word")
    for place, claim in enumerate(head.get("local", ())):
        _check_local(place, claim, nodes, head["outputs"], arrays, pairs, verdict)
    if model is not None:
        for name, key in keys.items():
            known = f"constant {name!r} ({', '.join(map(repr, entries[name]['names']))})"
            need(key in model, f"{known}: no tensor of the weights is {key}")
        names = [(n, key) for name, key in keys.items() for n in entries[name]["names"]]
        verdict.assumed += [
            f"tensor {name!r} of the weights is not used: no node reads it by that name"
            for name in unread(model, names)
        ]
    return verdict


def _root(square: Fraction) -> str:
    root = norms.root_up(square)
    return f"{float(root):.10g}" if root < 2**1023 else "more than 2^1023"


def _inside(i: int, nodes: Sequence[Any]) -> int:
    need(i < len(nodes), f"there is no node {i}")
    return i


def _look_up(arrays: dict[str, np.ndarray], name: Any, where: str) -> np.ndarray:
    need(type(name) is str and name in arrays, f"{where}: there is no constant {name!r}")
    return arrays[name]


def _constants(entries: Any, own: Store) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What is said of every constant, by its name, and the tensor of that name."""
    need(type(entries) is dict, "constants must be an object")
    found, arrays = {}, {}
    for name, entry in entries.items():
        found[name] = record(entry, f"constant {name!r}", _CONSTANT)
        key = Key(*(found[name][k] for k in Key._fields))
        need(
            own.keys.get(name) == key,
            f"constant {name!r} ({found[name]['names']}): the tensor of that name is not {key}",
        )
        arrays[name] = own.array(key)
    return found, arrays


def _nodes(
    head: dict[str, Any], arrays: dict[str, np.ndarray], verdict: Verdict, say: Callable[[str], Any]
) -> tuple[list[_Node], set[str]]:
    """The nodes, and the names of the constants that they read."""
    nodes: list[_Node] = []
    inputs = list(head["inputs"])
    used: set[str] = set()
    aside = {head.get("pairs"), *_sample_names(head), *local.names(head.get("local", ()))}
    for place, entries in enumerate(head["nodes"]):
        need(type(entries) is dict, f"node {place} must be an object")
        op = _NODE["op"](entries.get("op"), f"node {place}: op")
        where = f"node {place} ({op} at {entries.get('path')!r})"
        try:
            if op == "input":
                record(entries, where, _NODE)
                need(inputs, "there are more input nodes than inputs")
                need(math.prod(inputs[0]) <= SIZE, "too large an input")
                nodes.append(_Node(None, (), inputs.pop(0), Fraction(1)))
                continue
            node = _node(OPERATIONS[op], entries, where, arrays, nodes, used, aside)
        except (ArithmeticError, ValueError, IndexError) as error:  # of NumPy: shapes do not fit
            raise Rejected(f"{where}: {error}") from None
        except Rejected as error:
            message = str(error)
            raise Rejected(message if where in message else f"{where}: {message}") from None
        if node.op is not None and node.op.rule == "assumed":
            gains = ", ".join(f"{float(g):.10g}" for g in node.op.gains)
            verdict.assumed.append(f"{where}: gain {gains}, {node.op.reason!r}")
        nodes.append(node)
        line = f"{where}: {node.op.rule if node.op else ''}, L <= {_root(node.square)}"
        verdict.nodes.append(line)
        say(line)
    need(not inputs, "there are more inputs than input nodes")
    reached = set(head["outputs"])
    for place in reversed(range(len(nodes))):
        need(place in reached or nodes[place].op is None, f"node {place} leads to no output")
        reached.update(nodes[place].sources)
    need(
        not used & aside,
        "a constant of a node must not be one of the samples, margins or multipliers",
    )
    lost = sorted(set(arrays) - used - aside)
    need(not lost, f"constants that no node reads: {lost}")
    return nodes, used


def _node(
    kind: type[Operation],
    entries: dict[str, Any],
    where: str,
    arrays: dict[str, np.ndarray],
    nodes: list[_Node],
    used: set[str],
    aside: set[Any],
) -> _Node:
    required = {**_NODE, **kind.keys, "inputs": many(whole(0), 1), "rule": one_of(*kind.rules)}
    if kind.operands == 1:
        required["gain"] = magnitude
    optional = {**kind.optional, "t": magnitude, "joint": anything, "chain": anything}
    found = record(entries, where, required, optional)
    need(("t" in found) == (found["rule"] in ("cholesky", "torus")), "t belongs to its rules")
    need(not kind.operands or len(found["inputs"]) == kind.operands, "the number of operands")
    for name in kind.constants:
        if name in found:
            used.add(found[name])
            found[name] = _look_up(arrays, found[name], name)
    sources = found.pop("inputs")
    operands = [nodes[_inside(i, nodes)] for i in sources]
    joint, chain = found.pop("joint", None), found.pop("chain", None)
    op = kind(found)
    shapes = [n.shape for n in operands]
    shape = op.shape(*shapes)
    need(math.prod(shape) <= SIZE, "too large a value")
    if kind.operands == 1:
        proved = op.square(*shapes)
        need(
            proved <= op.gain**2,
            f"rule {op.rule} proves {_root(proved)} only, above the gain {float(op.gain):.10g}",
        )
    node = _Node(op, sources, shape, op.combine([n.square for n in operands]))
    if type(op).__name__ == "Concatenate":
        node.square = min(node.square, _pieces(sources, nodes))
    if joint is not None:
        claim = record(joint, "joint", _JOINT)
        since = _inside(claim["since"], nodes)
        proved = _joint(node, since, nodes, claim["t"])
        need(
            proved <= claim["gain"] ** 2,
            f"the affine operations since node {since} prove {_root(proved)} only, above the "
            f"joint gain {float(claim['gain']):.10g}",
        )
        node.square = min(node.square, claim["gain"] ** 2 * nodes[since].square)
    if chain is not None:
        claim = record(chain, "chain", _CHAIN)
        since = _inside(claim["since"], nodes)
        aside.update(claim["multipliers"])
        found = [_look_up(arrays, name, "multipliers") for name in claim["multipliers"]]
        _chain(node, since, nodes, found, claim["gain"])
        node.square = min(node.square, claim["gain"] ** 2 * nodes[since].square)
    node.square = norms.shorten(node.square)
    return node


def _pieces(sources: tuple[int, ...], nodes: list[_Node]) -> Fraction:
    """The square of what lies side by side, if it comes from disjoint slices of one value.

    With gains g_i since the slices x_i of x, sum g_i^2 |dx_i|^2 is at most max g_i^2 |dx|^2.
    """
    found: list[dict[tuple[int, int], tuple[range, Fraction]]] = []
    for i in sources:
        slices, gain = {}, Fraction(1)
        while nodes[i].op is not None and len(nodes[i].sources) == 1 and nodes[i].op.gain:
            op, i = nodes[i].op, nodes[i].sources[0]
            gain = norms.shorten(gain * op.gain**2)
            if type(op).__name__ == "Slice":
                slices.setdefault((i, op.dim), (range(op.start, op.stop, op.step), gain))
        found.append(slices)
    best = sum((nodes[i].square for i in sources), Fraction(0))
    for key in set(found[0]).intersection(*found[1:]):
        parts = [slices[key] for slices in found]
        count = sum(len(p) for p, _ in parts)
        if count <= nodes[key[0]].shape[key[1]] and count == len(
            np.unique(np.concatenate([np.arange(p.start, p.stop, p.step) for p, _ in parts]))
        ):
            best = min(best, max(g for _, g in parts) * nodes[key[0]].square)
    return best


def _affine_part(
    node: _Node, since: int, nodes: list[_Node]
) -> tuple[np.ndarray, np.ndarray, Fraction]:
    """(A, M, e) of all affine operations from node `since`: the exact map is within e M of A.

    They are run on unit vectors. With K roundings on the way |fl(A) - A| <= gamma_K |A|_1 entry by
    entry, where |A|_1 is the same run with absolute values, itself rounded: with its computed value
    M and e = gamma_2K both are covered. What leaves the range of floats would be lost in A and in
    M: after each operation all entries of the run that gives M must be 0 or in [2^-400, 2^300].
    No product in the next one then does (`is_moderate`), and what is lost of smaller numbers in A
    is below 2^-300 of what M counts there.
    """
    need(node.op is not None and node.op.linear, "the node itself is not affine")
    terms, seen, stack = node.op.terms, set(), list(node.sources)
    while stack:
        i = stack.pop()
        if i == since or i in seen:
            continue
        seen.add(i)
        inner = nodes[i]
        need(
            inner.op is not None and inner.op.linear and i > since,
            f"node {i} is not affine since node {since}",
        )
        terms += inner.op.terms
        stack += inner.sources
    lost = "numbers too large or too small to be multiplied in floats"
    index, start = sorted(seen), nodes[since].shape
    width, inside = math.prod(start), [node, *(nodes[i] for i in seen)]
    work = sum(math.prod(n.shape) * (n.op.terms + 1) for n in inside)
    need(
        width * math.prod(node.shape) <= norms.TERMS * 2 and width * work <= 2**38,
        "too large to be written out",
    )
    step = max(1, min(64, SIZE // work))

    need(all(n.op.is_moderate() for n in inside), lost)

    def run(size: bool) -> np.ndarray:
        rows = []
        for first in range(0, width, step):
            unit = np.eye(min(step, width - first), width, first)
            env = {since: unit.reshape(-1, *start)}
            for i, inner in [*((i, nodes[i]) for i in index), (-1, node)]:
                xs = [env[j] for j in inner.sources]
                env[i] = inner.op.apply(*xs, linear=True, size=size)
                need(not size or norms.moderate(env[i], -400, 300), lost)
            rows.append(env[-1].reshape(len(unit), -1))
        return np.concatenate(rows).T

    found, majorant = run(False), run(True)
    need(bool(np.isfinite(found).all()), lost)
    return found, majorant, norms.gamma(2 * terms + 2) if terms else Fraction(0)


def _joint(node: _Node, since: int, nodes: list[_Node], t: Fraction) -> Fraction:
    """|A|^2 of all affine operations from node `since`, by `norms.matrix`."""
    found, majorant, relative = _affine_part(node, since, nodes)
    s = norms.scale_of(majorant)
    error = relative * norms.root_up(norms.square_up(majorant / s)) * Fraction(s)
    error += Fraction(norms.ETA) * Fraction(s) if relative else 0
    return norms.matrix(found, t, error)


def _chain(
    node: _Node, since: int, nodes: list[_Node], multipliers: list[np.ndarray], gain: Fraction
) -> None:
    """Affine maps A_1, ..., A_k with activations between them, from node `since`: LipSDP.

    With slopes in [a, b], m = (a + b) / 2 and h = (b - a) / 2, the changes v = A_i u_(i-1) before
    and u_i behind an activation satisfy (u_ij - m v_ij)^2 <= h^2 v_ij^2. If for some l_ij >= 0
        g^2 |u_0|^2 - |A_k u_(k-1)|^2 - sum_ij l_ij (h^2 v_ij^2 - (u_ij - m v_ij)^2)
    is no negative number for any u_0, ..., u_(k-1), then g is a bound. The matrix of this form is
    scaled to a diagonal of about 1, and every rounding in it is counted by absolute values.
    """
    parts, acts = [], []
    while True:
        frontier = _nonlinear_before(node, since, nodes)
        parts.insert(0, _affine_part(node, frontier, nodes))
        if frontier == since:
            break
        op = nodes[frontier].op
        need(type(op).__name__ == "Activation", f"node {frontier} is no activation")
        acts.insert(0, slopes.interval(op.function, op.parameters))
        node = nodes[nodes[frontier].sources[0]]
    need(len(multipliers) == len(acts) >= 1, "multipliers for each activation")
    need(
        all(
            m.shape == (len(p[0]),) and bool(np.all(m > 0))
            for m, p in zip(multipliers, parts, strict=False)
        ),
        "one positive multiplier for each unit",
    )
    square = float(gain**2)
    need(2.0**-200 < square < 2.0**200, "gain of a chain")
    square = np.nextafter(square, 0)  # g^2 rounded down
    weights = [np.full(parts[0][0].shape[1], square), *multipliers]
    scales = [np.exp2(-np.rint(np.log2(w) / 2)) for w in weights]
    ends = np.cumsum([0, *map(len, weights)])
    q = np.diag(np.concatenate([w * s * s for w, s in zip(weights, scales, strict=True)]))
    error = norms.gamma(8) * Fraction(4 * len(q))  # of sums: those of products are in `count`
    for i, (a, majorant, relative) in enumerate(parts):
        near = slice(ends[i], ends[i + 1])
        b, c = a * scales[i], majorant * scales[i]
        count = norms.gamma(len(b) + 16) + 2 * relative + relative**2
        if i == len(acts):
            q[near, near] -= b.T @ b
            error += count * _frobenius(c) ** 2
            break
        low, high = acts[i]
        weight = multipliers[i] * scales[i + 1]
        cross = float((low + high) / 2) * weight[:, None] * b
        far = slice(ends[i + 1], ends[i + 2])
        q[far, near] -= cross
        q[near, far] -= cross.T
        error += 2 * count * _frobenius(float(abs(low + high) / 2) * weight[:, None] * c)
        if low * high:
            root = np.sqrt(multipliers[i] * float(abs(low * high)))[:, None]
            q[near, near] += (1 if low * high > 0 else -1) * ((root * b).T @ (root * b))
            error += 2 * count * _frobenius(root * c) ** 2
    need(
        norms.positive(q, error * (1 + Fraction(1, 2**20))),
        f"the multipliers do not prove the gain {float(gain):.10g} of the chain",
    )


def _frobenius(a: np.ndarray) -> Fraction:
    s = norms.scale_of(a)
    return norms.root_up(norms.square_up(a / s)) * Fraction(s)


def _nonlinear_before(node: _Node, since: int, nodes: list[_Node]) -> int:
    """The only node, not affine or `since`, from which affine operations lead to a node."""
    found, stack, seen = set(), list(node.sources), set()
    while stack:
        i = stack.pop()
        if i in seen:
            continue
        seen.add(i)
        op = nodes[i].op
        if i == since or op is None or not op.linear:
            found.add(i)
        else:
            stack += nodes[i].sources
    need(len(found) == 1, "a chain must not branch but in affine operations")
    return found.pop()


# --- what hangs on the constants ---------------------------------------------------------------


def _check_pairs(pairs: np.ndarray, nodes: list[_Node], last: int) -> None:
    """pairs[i, j] bounds the constant of output i minus output j.

    By root 2 times the constant of all outputs, or behind a last matrix by |w_i - w_j| times the
    constant of its operand.
    """
    node = nodes[last]
    count = node.shape[0]
    need(len(node.shape) == 1 and pairs.shape == (count, count), "a table of pairs of outputs")
    whole, factor = 2 * node.square, Fraction(1)
    rows = np.arange(count)
    while node.op is not None and type(node.op).__name__ in ("Slice", "Scale"):
        if type(node.op).__name__ == "Scale":
            factor = norms.shorten(factor * node.op.factor**2)
        else:
            rows = rows * node.op.step + node.op.start
        node = nodes[node.sources[0]]
    weight = node.op.weight if type(node.op).__name__ == "Affine" else None
    features = nodes[node.sources[0]].square * factor if weight is not None else Fraction(0)
    s = 1.0 if weight is None else norms.scale_of(weight)
    for i in range(count):
        near = [None] * count
        if weight is not None:  # each difference is rounded once: SLACK covers it
            gap = (weight[rows] - weight[rows[i]]) / (2 * s)
            near = (np.sum(gap * gap, axis=1) * norms.SLACK + norms.ETA).tolist()
        for j, claim in enumerate(pairs[i].tolist()):
            best = whole if i != j else Fraction(0)
            if near[j] is not None and i != j:
                best = min(best, Fraction(near[j]) * (2 * Fraction(s)) ** 2 * features)
            need(
                claim >= 0 and best <= Fraction(claim) ** 2,
                f"pairs: {i} and {j} prove {_root(best)} only",
            )


def _check_local(
    place: int,
    claim: Any,
    nodes: list[_Node],
    outputs: Sequence[int],
    arrays: dict[str, np.ndarray],
    pairs: np.ndarray | None,
    verdict: Verdict,
) -> None:
    try:
        found = local.verify(claim, nodes, outputs, lambda n: _look_up(arrays, n, "local"), pairs)
    except (ArithmeticError, ValueError, IndexError) as error:
        raise Rejected(f"local claim {place}: {error}") from None
    except Rejected as error:
        raise Rejected(f"local claim {place}: {error}") from None
    verdict.local.append(found)


def _sample_names(head: dict[str, Any]) -> list[str]:
    samples = head.get("samples")
    if type(samples) is not dict:
        return []
    lists = [v for v in samples.values() if type(v) is list]
    return [name for names in lists for name in names if type(name) is str]


def _check_samples(
    head: dict[str, Any], arrays: dict[str, np.ndarray], nodes: list[_Node], verdict: Verdict
) -> None:
    """No proof: for a few inputs the graph gives what the model gave, not too far apart."""
    names = record(head["samples"], "samples", {"inputs": many(text, 1), "outputs": many(text, 1)})
    inputs = [_look_up(arrays, n, "samples") for n in names["inputs"]]
    wanted = [_look_up(arrays, n, "samples") for n in names["outputs"]]
    need(all(x.ndim for x in (*inputs, *wanted)), "samples: rows")
    need([x.shape[1:] for x in inputs] == list(head["inputs"]), "samples: shapes of the inputs")
    need(len(wanted) == len(head["outputs"]), "samples: number of outputs")
    need(len({len(x) for x in (*inputs, *wanted)}) == 1 and len(inputs[0]) >= 1, "samples: rows")
    if verdict.assumed:
        verdict.notes.append("the samples cannot be checked: not all operations are known")
        return
    entries = sum(math.prod(n.shape) for n in nodes) * len(wanted[0])
    need(entries <= 16 * SIZE, "samples: too large to be computed")
    values: list[np.ndarray] = []
    left = list(inputs)
    for node in nodes:
        if node.op is None:
            values.append(left.pop(0))
        else:
            values.append(node.op.apply(*(values[i] for i in node.sources)))
        need(bool(np.isfinite(values[-1]).all()), f"samples: node {len(values) - 1} is not finite")
    found = [values[i] for i in head["outputs"]]
    off = 0.0
    for y, z in zip(wanted, found, strict=True):
        need(z.shape == y.shape, "samples: shape of an output")
        size = max(float(np.abs(y).max(initial=0.0)), float(np.abs(z).max(initial=0.0)))
        off = max(off, float(np.abs(z - y).max(initial=0.0)) / (size or 1.0))
    moved = _distance(inputs)
    for claim, outputs in (
        (verdict.bound, found),
        *((c, [y]) for c, y in zip(head["each"], found, strict=True)),
    ):
        room = CLOSE * max(float(np.abs(y).max(initial=0.0)) for y in outputs)
        need(
            _distance(outputs) <= float(claim) * moved * (1 + CLOSE) + room,
            f"two samples refute the claimed bound {float(claim):.10g}",
        )
    need(off <= CLOSE, f"the graph is not the model: on its samples it is off by {off:.2g}")
    count = len(wanted[0])
    verdict.notes.append(f"on {count} samples the graph gives the model's outputs within {off:.1g}")


def _distance(values: Sequence[np.ndarray]) -> float:
    """Between the first two rows of several values as one long vector."""
    return math.hypot(*(np.linalg.norm(x[:2][-1] - x[0]) for x in values))
