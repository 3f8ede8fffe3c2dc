"""From the walk of a graph to the nodes of the file."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.certify.graph.marks import mark_of
from orthonet.certify.norms import matrix_norm
from orthonet.certify.proof import emit_layers, emit_maps, emit_nonlinear  # noqa: F401 (they register)
from orthonet.certify.proof.chains import chain_witness
from orthonet.certify.proof.emit import EMITTERS
from orthonet.certify.proof.nodes import Nodes
from orthonet.certify.proof.norms import joint_witness
from orthonet.certify.walk.islands import moves
from orthonet.errors import UncertifiableError
from orthonet.linalg.bounds.rounding import add_up, mul_up

if TYPE_CHECKING:
    from orthonet.certify.walk.state import State
    from orthonet.certify.walk.walker import Walker

__all__ = ["Writer"]

_WORTH = 1.0 + 2.0**-17
"""A joint bound of affine operations is written where it is so much below their product."""
_FAILURES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)
_NOISE = 2.0**10
_LARGEST_SPAN = 290.0
"""How many powers of two apart constants in a row may be for the checker to multiply them: it takes
products from 2^-400 to 2^300, and pools and wide sums need some room."""


class Writer(Nodes):
    """The nodes and constants of one file.

    Attributes:
        outputs: The nodes of the outputs; those that lead to none are left out.
    """

    def __init__(self, walker: Walker) -> None:
        super().__init__(walker)
        self._users: dict[State, list[State]] = {}
        for state in walker.states.values():
            for parent in state.parents:
                self._users.setdefault(parent, []).append(state)
        for node in walker.program.inputs:  # also those that nothing reads
            shape = tuple(node.meta["val"].shape[1:])
            place = self._append({"op": "input", "path": ""}, 1.0, shape)
            if node in walker.states:
                self._places[walker.states[node]] = place
        for node in walker.program.nodes:
            state = walker.states[node]
            if node in walker.program.inputs:
                continue
            if isinstance(node.meta.get("val"), Tensor) or mark_of(node) is not None:
                self._places[state] = self._emit(state)
        self.outputs = [self._places[s] for s in walker.outputs if s is not None]
        self._prune()

    def _emit(self, state: State) -> int:
        mark = mark_of(state.node)
        if mark is not None and mark[1] >= 0:
            return self.index(state.parents[0])
        op = state.call.op
        if op == "getitem":
            op = state.parents[0].call.op
        emitter = EMITTERS.get(op)
        whole = state.call.op == "getitem" or isinstance(state.node.meta.get("val"), Tensor)
        try:
            found = emitter(self, state) if emitter is not None and whole else None
        except _FAILURES:  # arguments of a kind that the emitter does not expect
            found = None
        if found is None or self.shapes[found] != state.shape:
            return self._opaque(state)
        self._join(state, found)
        self._link(state, found)
        return found

    def _opaque(self, state: State) -> int:
        """An operation that the checker does not know, with the gains of the prover."""
        source = state.parents[0] if state.call.op == "getitem" else state
        step = self.walker.step_of(source)
        operands = source.call.operands
        keep = [(x, g) for x, g in zip(operands, step.gains, strict=True) if g.value > 0.0]
        keep = keep or [(operands[0], step.gains[0])]
        _checks.require(
            0 not in state.shape,
            "LipschitzCertificate",
            "every tensor on the way must have entries to be saved",
            "Leave empty slices out of forward",
            UncertifiableError,
            operation=source.call.op,
            path=source.call.path,
        )
        return self.add(
            "opaque",
            [self.index(x._state) for x, _ in keep],
            state,
            rule="assumed",
            into=list(state.shape),
            gains=[g.value.hex() for _, g in keep],
            hypot=step.combine == "hypot",
            reason=f"{source.call.op}: {step.method}",
        )

    def _join(self, state: State, place: int) -> None:
        """A bound of all affine operations since the last other one, if it is worth it."""
        source, node = state.source, self.nodes[place]
        inner = [s for s in self._users.get(state, ()) if s.source is source]
        if source is None or "joint" in node or (inner and len(inner) == len(self._users[state])):
            return
        since = self._places[source]
        if sum(not moves(s) for s in state.island) < 2 and not self._loose(state, source, place):
            return
        inside = [self._places.get(s) for s in state.island if s is not state]
        if any(i is None or self.nodes[i]["op"] == "opaque" for i in inside):
            return
        if math.prod(source.shape) * math.prod(state.shape) > 2**22:
            return
        if sum(self._span(i) for i in (place, *inside) if i is not None) >= _LARGEST_SPAN:
            return
        island = self.walker.matrix_of(state)
        if island is None:
            return
        size = matrix_norm(island.matrix)
        if size < _NOISE * island.error:  # the terms cancel
            return
        gain = add_up(size, island.error)
        if mul_up(gain, self.bounds[since]) * _WORTH >= self.bounds[place]:
            return
        gain, t = joint_witness(island.matrix, island.error)
        node["joint"] = {"since": since, "gain": gain.hex(), "t": t.hex()}
        self.bounds[place] = mul_up(gain, self.bounds[since])

    def _span(self, place: int) -> float:
        """The largest |log2| of the constants of a node other than 0."""
        node = self.nodes[place]
        names = [v for k, v in node.items() if k not in ("op", "path", "rule")]
        values = [
            self.constants[v].value.double().flatten()
            for v in names
            if isinstance(v, str) and v in self.constants
        ]
        numbers = [float.fromhex(f) for f in node.get("factors", ()) if node["op"] == "add"]
        numbers += [float.fromhex(node[k]) for k in ("factor", "eps") if k in node]
        sizes = torch.cat([*values, torch.tensor(numbers, dtype=torch.float64)]).abs()
        sizes = sizes[sizes > 0]
        return float(sizes.log2().abs().max()) if sizes.numel() else 0.0

    def _link(self, state: State, place: int) -> None:
        """A bound of a chain of affine maps and activations that ends here, by multipliers."""
        if self.walker.chains.get(state) is None:
            return
        found = chain_witness(self, state)
        if found is None:
            return
        since = self.index(found.start)
        if sum(map(self._span, range(since, place + 1))) >= _LARGEST_SPAN:
            return
        bound = mul_up(found.gain, self.bounds[since])
        if bound * _WORTH >= self.bounds[place]:
            return
        names = [self.aside(m, "multipliers") for m in found.multipliers]
        self.nodes[place]["chain"] = {
            "since": since,
            "gain": found.gain.hex(),
            "multipliers": names,
        }
        self.bounds[place] = bound

    def _loose(self, state: State, source: State, place: int) -> bool:
        """Whether the prover has found less for a map of one operation, by writing it out."""
        known = math.inf
        if state.step is not None:
            known = state.step.gains[0].value
        if state.bound is not None and source in state.used:
            known = min(known, state.bound.value / (self.walker.bound_of(source).value or 1.0))
        return known * self.bounds[self._places[source]] * _WORTH < self.bounds[place]

    def _prune(self) -> None:
        """Leave out what leads to no output, and number the rest again."""
        needed = set(self.outputs)
        for i in reversed(range(len(self.nodes))):
            if i in needed or self.nodes[i]["op"] == "input":
                needed |= {i, *self.nodes[i].get("inputs", ())}
        order = {old: new for new, old in enumerate(sorted(needed))}
        self.nodes = [self.nodes[i] for i in sorted(needed)]
        self.bounds = [self.bounds[i] for i in sorted(needed)]
        self.shapes = [self.shapes[i] for i in sorted(needed)]
        for node in self.nodes:
            if "inputs" in node:
                node["inputs"] = [order[i] for i in node["inputs"]]
            for claim in (node[key] for key in ("joint", "chain") if key in node):
                claim["since"] = order[claim["since"]]
        self.outputs = [order[i] for i in self.outputs]
        used = {v for n in self.nodes for v in n.values() if isinstance(v, str)}
        used |= {m for n in self.nodes if "chain" in n for m in n["chain"]["multipliers"]}
        self.constants = {k: c for k, c in self.constants.items() if k in used}
