"""From the walk of a graph to the nodes of the file."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orthonet.certify.graph.marks import ROOT, mark_of
from orthonet.certify.norms import matrix_norm
from orthonet.certify.proof import emit_layers, emit_maps, emit_nonlinear  # noqa: F401 (they register)
from orthonet.certify.proof.chains import chain_witness
from orthonet.certify.proof.emit import EMITTERS
from orthonet.certify.proof.norms import joint_witness
from orthonet.certify.walk.islands import moves
from orthonet.linalg.bounds.rounding import add_up, hypot_up, mul_up

if TYPE_CHECKING:
    from orthonet.certify.walk.state import State
    from orthonet.certify.walk.walker import Walker

__all__ = ["Constant", "Writer"]

_WORTH = 1.0 + 2.0**-17
"""A joint bound of affine operations is written where it is so much below their product."""
_FAILURES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)
_LARGEST_SPAN = 290.0
"""How many powers of two apart constants in a row may be for the checker to multiply them: it takes
products from 2^-400 to 2^300, and pools and wide sums need some room."""


class Constant:
    """A tensor of the file: its values as they are stored, its names in the model, its hash."""

    def __init__(self, value: Tensor, *names: str) -> None:
        value = value.detach().to("cpu")
        if value.dtype not in (torch.float32, torch.float64):
            value = value.to(torch.float32)  # exact for half precision
        self.value, self.names = value.contiguous(), list(names)
        self.dtype = "F32" if value.dtype == torch.float32 else "F64"
        self.data = self.value.numpy().astype(f"<f{value.element_size()}", copy=False).tobytes()
        self.sha256 = hashlib.sha256(self.data).hexdigest()

    @property
    def key(self) -> tuple[str, tuple[int, ...], str]:
        """What tells it from others."""
        return self.dtype, tuple(self.value.shape), self.sha256

    def entry(self) -> dict[str, Any]:
        """What the file says of it."""
        shape = list(self.value.shape)
        return {"names": self.names, "dtype": self.dtype, "shape": shape, "sha256": self.sha256}


class Writer:
    """The nodes and constants of one file.

    Attributes:
        nodes: The nodes, in the order of the graph, without those that lead to no output.
        constants: The constants, by their names in the file.
        outputs: The nodes of the outputs.
        bounds: A bound of the constant from the inputs to each node, from the gains of the file.
    """

    def __init__(self, walker: Walker) -> None:
        self.walker = walker
        self.nodes: list[dict[str, Any]] = []
        self.bounds: list[float] = []
        self.shapes: list[tuple[int, ...]] = []
        self.constants: dict[str, Constant] = {}
        self._places: dict[State, int] = {}
        self._keys: dict[Any, str] = {}
        self._state: dict[str, Any] = {
            name: Constant(value).key
            for name, value in walker.model.state_dict().items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        self._witnesses: dict[Any, Any] = {}
        self._users: dict[State, list[State]] = {}
        for state in walker.states.values():
            for parent in state.parents:
                self._users.setdefault(parent, []).append(state)
        for node in walker.program.nodes:
            state = walker.states[node]
            if node in walker.program.inputs:
                self._places[state] = self._append({"op": "input", "path": ""}, 1.0, state.shape)
            elif isinstance(node.meta.get("val"), Tensor) or mark_of(node) is not None:
                self._places[state] = self._emit(state)
        self.outputs = [self._places[s] for s in walker.outputs if s is not None]
        self._prune()

    # what emitters use ----------------------------------------------------------------------

    def index(self, state: State) -> int:
        """The node of the file that stands for a state."""
        return self._places[state]

    def add(self, op: str, inputs: Sequence[int], state: State, **entries: Any) -> int:
        """A new node; `gain` is a float."""
        node: dict[str, Any] = {"op": op, "path": state.call.path, "inputs": list(inputs)}
        node["rule"] = entries.pop("rule", "definition")
        bounds = [self.bounds[i] for i in inputs]
        if "gain" in entries:
            bound = mul_up(entries["gain"], *bounds)
            node["gain"] = float(entries.pop("gain")).hex()
        elif op == "add":
            factors = [abs(float.fromhex(f)) for f in entries["factors"]]
            bound = add_up(*(mul_up(f, b) for f, b in zip(factors, bounds, strict=True)))
        elif op == "opaque":
            gains = [float.fromhex(g) for g in entries["gains"]]
            terms = [mul_up(g, b) for g, b in zip(gains, bounds, strict=True)]
            bound = hypot_up(*terms) if entries["hypot"] else add_up(*terms)
        else:
            bound = hypot_up(*bounds)
            if op == "concatenate":
                bound = min(bound, self._pieces(inputs))
        shape = entries.pop("shape_of", state.shape)
        return self._append({**node, **entries}, bound, tuple(shape))

    def node(self, op: str, state: State, **entries: Any) -> int:
        """A new node of one operand, the parent of the state."""
        return self.add(op, [self.index(state.parents[0])], state, **entries)

    def reshape(self, place: int, shape: Sequence[int]) -> int:
        """A node in another shape, or the same if it has it."""
        if self.shapes[place] == tuple(shape):
            return place
        node = {"op": "reshape", "path": self.nodes[place]["path"], "inputs": [place],
                "rule": "definition", "gain": 1.0.hex(), "into": list(shape)}  # fmt: skip
        return self._append(node, self.bounds[place], tuple(shape))

    def scale(self, place: int, factor: float, state: State) -> int:
        """A node times a number."""
        if factor == 1.0:
            return place
        shape = self.shapes[place]
        return self.add("scale", [place], state, factor=factor.hex(), gain=abs(factor),
                        shape_of=shape)  # fmt: skip

    def part(
        self, state: State, place: int, dim: int, start: int, stop: int, step: int = 1
    ) -> int | None:
        """A slice of a node along a dim of its samples."""
        shape = list(self.shapes[place])
        if not 0 <= start < stop <= shape[dim] or step < 1:
            return None
        if (start, stop, step) == (0, shape[dim], 1):
            return place
        shape[dim] = len(range(start, stop, step))
        return self.add("slice", [place], state, dim=dim, start=start, stop=stop, step=step,
                        gain=1.0, shape_of=shape)  # fmt: skip

    def constant(self, value: Tensor, state: State | None, role: str) -> str:
        """The name in the file of a constant; equal ones are stored once.

        Its names in the model are those of equal tensors of its state, and that of the role, as
        which a plain model has what a constrained one computes.
        """
        path = "" if state is None else state.call.path
        found = Constant(value)
        if found.key not in self._keys:
            found.names = [name for name, key in self._state.items() if key == found.key]
            self._keys[found.key] = f"c{len(self._keys)}"
            self.constants[self._keys[found.key]] = found
        known = self.constants[self._keys[found.key]].names
        name = role if path in ("", ROOT) else f"{path}.{role}"
        if name not in known and name not in self._state:
            known.append(name)
        return self._keys[found.key]

    def aside(self, value: Tensor, name: str) -> str:
        """The name of a tensor that no node reads, even if it equals one of those."""
        key = f"{name}{sum(k.startswith(name) for k in self.constants) or ''}"
        self.constants[key] = Constant(value, name)
        return key

    def gain(self, state: State) -> float:
        """The gain that the prover gives an operation of one operand."""
        return self.walker.step_of(state).gains[0].value

    def witness(self, find: Callable[..., Any], weight: Tensor, *geometry: Any) -> Any:
        """The witness of a linear map, found once for equal ones."""
        key = (find, *Constant(weight).key, str(geometry))
        if key not in self._witnesses:
            self._witnesses[key] = find(weight.detach().to("cpu", torch.float64), *geometry)
        return self._witnesses[key]

    def leaf(self, state: State) -> Any:
        """The module or function of a call that has a rule as a whole."""
        mark = mark_of(state.node)
        return None if mark is None else self.walker.program.calls[mark[0]].target

    def setting(self, state: State, position: int, name: str, default: Any) -> Any:
        """An argument of a function, or the attribute of a module."""
        target = self.leaf(state)
        if isinstance(target, nn.Module):
            return getattr(target, name)
        return state.call.get(position, name, default)

    # ------------------------------------------------------------------------------------------

    def _pieces(self, inputs: Sequence[int]) -> float:
        """A bound of a concatenation of what became of disjoint slices of one node."""
        found: list[dict[tuple[int, int], tuple[set[int], float]]] = []
        for i in inputs:
            slices, gain = {}, 1.0
            while len(self.nodes[i].get("inputs", ())) == 1 and "gain" in self.nodes[i]:
                node = self.nodes[i]
                i = node["inputs"][0]
                gain = mul_up(gain, float.fromhex(node["gain"]))
                if node["op"] == "slice":
                    entries = set(range(node["start"], node["stop"], node["step"]))
                    slices.setdefault((i, node["dim"]), (entries, gain))
            found.append(slices)
        best = math.inf
        for key in set(found[0]).intersection(*found[1:]):
            parts = [slices[key] for slices in found]
            if len(set().union(*(p for p, _ in parts))) == sum(len(p) for p, _ in parts):
                best = min(best, mul_up(max(g for _, g in parts), self.bounds[key[0]]))
        return best

    def _append(self, node: dict[str, Any], bound: float, shape: tuple[int, ...]) -> int:
        self.nodes.append(node)
        self.bounds.append(bound)
        self.shapes.append(shape)
        return len(self.nodes) - 1

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
        return self.add(
            "opaque", [self.index(x._state) for x, _ in keep], state, rule="assumed",
            into=list(state.shape), gains=[g.value.hex() for _, g in keep],
            hypot=step.combine == "hypot", reason=f"{source.call.op}: {step.method}",
        )  # fmt: skip

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
        gain = add_up(matrix_norm(island.matrix), island.error)
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
            "since": since, "gain": found.gain.hex(), "multipliers": names,
        }  # fmt: skip
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
