"""The nodes of a file as they are written, for those that know single operations."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthonet.certify.graph.marks import ROOT, mark_of
from orthonet.certify.walk.state import State
from orthonet.certify.walk.walker import Walker
from orthonet.linalg.bounds.rounding import add_up, hypot_up, mul_up

__all__ = ["Constant", "Nodes", "counts"]


def counts(value: Tensor) -> bool:
    """Whether the checker takes these numbers: it counts roundings in this range only."""
    size = value.detach().double().abs()
    return bool(((size == 0.0) | ((size > 2.0**-200) & (size < 2.0**200))).all())


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


class Nodes:
    """The nodes and constants of one file.

    Attributes:
        walker: The walk of the graph, with what the prover has found.
        nodes: The nodes, in the order of the graph.
        bounds: A bound of the constant from the inputs to each node, from the gains of the file.
        shapes: The shape of one sample of each node.
        constants: The constants, by their names in the file.
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
        node = {
            "op": "reshape",
            "path": self.nodes[place]["path"],
            "inputs": [place],
            "rule": "definition",
            "gain": (1.0).hex(),
            "into": list(shape),
        }
        return self._append(node, self.bounds[place], tuple(shape))

    def scale(self, place: int, factor: float, state: State) -> int:
        """A node times a number."""
        if factor == 1.0:
            return place
        shape = self.shapes[place]
        return self.add(
            "scale", [place], state, factor=factor.hex(), gain=abs(factor), shape_of=shape
        )

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
        return self.add(
            "slice",
            [place],
            state,
            dim=dim,
            start=start,
            stop=stop,
            step=step,
            gain=1.0,
            shape_of=shape,
        )

    def constant(self, value: Tensor, state: State | None, role: str) -> str:
        """The name in the file of a constant; equal ones are stored once.

        Its names in the model are those of equal tensors of its state, and that of the role, as
        which a plain model has what a constrained one computes.

        Raises:
            ValueError: The checker takes no such numbers.
        """
        if not counts(value):
            raise ValueError("a constant is beyond the range in which the checker counts roundings")
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
