"""From the input to the output of a model, one bound after the other."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from orthonet import _checks
from orthonet.certify._bound import Bound
from orthonet.certify._rules import (
    REARRANGEMENT,
    Call,
    Operand,
    Step,
    as_step,
    canonical,
    function_rule,
    module_rule,
)
from orthonet.certify._trace import BATCHES, ROOT, Probe, readable, reads_shape, trace
from orthonet.errors import UncertifiableError

__all__ = ["BatchDependent", "Row", "Walk", "propagate"]


@dataclass(frozen=True)
class Row:
    """One operation of the model in the certificate.

    Attributes:
        path: The module it belongs to.
        op: The class of the module or the name of the function.
        input_shape: The shape of one sample that it reads.
        constant: Its own Lipschitz constant; of several operands the one of the first.
        cumulative: The constant from the input of the model to its output.
        method: How the constant was obtained.
        kind: How far it can be trusted, see `Bound`.
        seconds: What it took.
    """

    path: str
    op: str
    input_shape: tuple[int, ...]
    constant: float
    cumulative: float
    method: str
    kind: str
    seconds: float


@dataclass(frozen=True)
class BatchDependent:
    """A constant that is not the same for every batch size; rules must not scale by it."""

    value: Any


@dataclass(frozen=True)
class Walk:
    """The result of a walk: the bound, its table, and the matrix of an affine last operation."""

    bound: Bound
    rows: tuple[Row, ...]
    output_shape: tuple[int, ...]
    head: Tensor | None
    features: Bound | None


_IDENTITY = Bound(1.0, kind="exact")
_ADVICE = {
    "scaled_dot_product_attention": "Dot-product attention has no Lipschitz constant: use "
    "attention by distances, or certify on a bounded domain",
    "pow": "Powers have no global Lipschitz constant",
    "where": "A choice by value may jump: write it with relu, abs, maximum or minimum",
    "batch_norm": "Use torch.nn.BatchNorm1d, 2d or 3d in eval mode",
    "normalize": "Normalization jumps at zero: use LayerNorm with an eps, or a fixed scale",
    "einsum": "Use torch.nn.Linear or torch.matmul with a constant matrix",
    "setitem": "Build the tensor with torch.cat instead of writing into it",
}


def propagate(model: nn.Module, example: Tensor, prefix: str = "") -> Walk:
    """Bound the l2 -> l2 constant of `model`, sample by sample, in the shapes of `example`."""
    module, probes = trace(model, example)
    return _Walker(module, probes, prefix).walk()


class _Walker:
    def __init__(self, module: fx.GraphModule, probes: tuple[Probe, Probe], prefix: str) -> None:
        self.module, self.probes, self.prefix = module, probes, prefix
        self.nodes = list(module.graph.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.values: dict[fx.Node, Any] = {}  # an Operand, a tuple of them, or a constant
        self.steps: dict[fx.Node, tuple[Step, Call]] = {}
        self.rows: list[Row] = []
        self.finished: dict[tuple[int, tuple[int, ...]], Step] = {}  # shared modules

    def walk(self) -> Walk:
        output = self.nodes[-1]
        for node in self.nodes[:-1]:
            if node.op == "placeholder":
                shape = self._shapes(node, self._probed(node))
                self.values[node] = Operand(shape, _IDENTITY)
            elif not self._depends(node):
                self.values[node] = self._constant(node)
            else:
                self._visit(node)
        source = output.args[0]
        result = self.values[source] if isinstance(source, fx.Node) else None
        if not isinstance(result, Operand):  # constant: nothing of the input reaches the output
            shape = tuple(self.probes[0].output.shape[1:])
            return Walk(Bound(0.0, kind="exact"), tuple(self.rows), shape, None, None)
        head = features = None
        if source in self.steps:
            step, call = self.steps[source]
            if step.rows is not None and len(call.operands) == 1:
                head, features = step.rows, call.operands[0].bound
        return Walk(result.bound, tuple(self.rows), result.shape, head, features)

    # what a node is ---------------------------------------------------------------------------

    def _probed(self, node: fx.Node) -> tuple[Any, Any]:
        return self.probes[0].values[node], self.probes[1].values[node]

    def _depends(self, node: fx.Node) -> bool:
        """Whether its value depends on the input, and not only on the shape of the input."""
        inputs = any(_has_operand(self.values[n]) for n in node.all_input_nodes)
        return inputs and not reads_shape(node)

    def _constant(self, node: fx.Node) -> Any:
        first, second = self._probed(node)
        if isinstance(first, Tensor):
            same = isinstance(second, Tensor) and first.shape == second.shape
            same = same and torch.equal(first, second)
        else:
            same = type(first) is type(second) and first == second
        return first if same else BatchDependent(first)

    def _path(self, node: fx.Node) -> str:
        if node.op == "call_module":
            name = str(node.target)
        else:
            stack = node.meta.get("nn_module_stack") or {"model": None}
            name = list(stack)[-1]
        return ".".join(p for p in (self.prefix, readable(name)) if p not in (ROOT, "")) or ROOT

    def _refuse(self, node: fx.Node, requirement: str, advice: str) -> NoReturn:
        _checks.fail(
            "certify", requirement, advice, UncertifiableError,
            operation=_name(node), path=self._path(node),
        )  # fmt: skip

    def _shapes(self, node: fx.Node, probed: tuple[Any, Any]) -> tuple[int, ...]:
        """The shape of one sample, if the tensor holds one sample per row, each on its own."""
        shapes = [tuple(t.shape) for t in probed]
        whole = all(shape[:1] == (batch,) for shape, batch in zip(shapes, BATCHES, strict=True))
        if not whole or shapes[0][1:] != shapes[1][1:]:
            self._refuse(
                node,
                "dim 0 must stay the batch, neither moved, merged, nor mixed into other dims",
                "A certificate is given for each sample on its own; reshape with "
                "x.flatten(1) or x.reshape(len(x), ...)",
            )
        if probed[0].dtype not in (torch.float32, torch.float64):
            self._refuse(
                node,
                "a value that depends on the input must be float32 or float64",
                "Comparisons, indices and casts to fewer bits jump, so they have no constant",
            )
        return shapes[0][1:]

    # visiting ---------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        start = time.perf_counter()
        probed = self._probed(node)
        parts = isinstance(probed[0], (tuple, list))
        if not parts and not isinstance(probed[0], Tensor):
            self._refuse(
                node,
                "a number that depends on the input cannot be followed",
                "Keep the computation in tensors",
            )
        if "out" in node.kwargs:
            self._refuse(node, "the argument `out` is not supported", "Use the returned tensor")
        shape = () if parts else self._shapes(node, probed)
        args, kwargs = self._argument(node.args), self._argument(node.kwargs)
        if node.target in (operator.getitem, getattr) and isinstance(args[0], tuple):
            part = Operand(shape, args[0][0].bound)  # of a split: all have the same bound
            self.values[node] = (part,) * len(probed[0]) if parts else part
            return
        call = Call(_name(node), self._path(node), args, kwargs, shape)
        step = self._step(node, call)
        self._check_written(node, step)
        bound = self._combine(step, call.operands)
        self.steps[node] = (step, call)
        if parts:  # whether a part is a batch is checked where it is read
            self.values[node] = tuple(Operand(tuple(t.shape[1:]), bound) for t in probed[0])
        else:
            self.values[node] = Operand(shape, bound)
        row = Row(
            call.path,
            call.op,
            call.operands[0].shape,
            step.gains[0].value,
            bound.value,
            step.method,
            step.gains[0].kind if len(step.gains) == 1 else "upper",
            time.perf_counter() - start,
        )
        self.rows.append(row)

    def _argument(self, argument: Any) -> Any:
        """The argument with an `Operand` or a constant in place of every node."""
        if isinstance(argument, fx.Node):
            return self.values[argument]
        if isinstance(argument, (tuple, list)):
            return tuple(self._argument(a) for a in argument)
        if isinstance(argument, dict):
            return {key: self._argument(a) for key, a in argument.items()}
        if isinstance(argument, slice):
            return slice(*map(self._argument, (argument.start, argument.stop, argument.step)))
        return argument

    def _combine(self, step: Step, operands: tuple[Operand, ...]) -> Bound:
        if len(operands) == 1:
            before, gain = operands[0].bound, step.gains[0]
            if before is _IDENTITY:
                return _IDENTITY if step.method == REARRANGEMENT else gain
            return before * gain
        terms = [gain * x.bound for gain, x in zip(step.gains, operands, strict=True)]
        if step.combine == "hypot":
            return Bound.hypot(*terms)
        return sum(terms[1:], terms[0])

    def _step(self, node: fx.Node, call: Call) -> Step:
        if node.op == "call_module":
            return self._module_step(node, call)
        rule = function_rule(node.target)
        if rule is None:
            advice = _ADVICE.get(call.op, f"There is none for {call.op!r}")
            self._refuse(
                node,
                "every operation on the input must have a Lipschitz rule",
                f"{advice}; or register a rule for this operation, or for the class of the module "
                "at this path, with @register_rule",
            )
        return as_step(rule(call), call)

    def _module_step(self, node: fx.Node, call: Call) -> Step:
        module = self.module.get_submodule(str(node.target))
        if len(call.args) + len(call.kwargs) != 1 or len(call.operands) != 1:
            self._refuse(
                node,
                "a module with a rule must be called with one tensor",
                "Wrap it in a module of its own and give that a rule",
            )
        shape = call.operand.shape if call.args else call.operands[0].shape
        key = (id(module), shape)
        if key not in self.finished:
            entry = module_rule(module)
            if entry is None:
                self._refuse(node, "a leaf must have a rule", "Do not change rules meanwhile")
            try:
                result = (
                    entry.rule(module, shape, self._child(node, module))
                    if entry.nested
                    else entry.rule(module, shape)
                )
            except UncertifiableError:
                raise
            except ValueError as error:
                self._refuse(node, f"its bound could not be computed ({error})", "Correct it")
            self.finished[key] = as_step(result, call)
        return self.finished[key]

    def _child(self, node: fx.Node, module: nn.Module) -> Callable[..., Bound]:
        """The function that certifies a child of `module`, and adds its rows to the table."""
        probe = self.probes[0].values[node.all_input_nodes[0]]

        def bound_of(child: nn.Module, input_shape: tuple[int, ...]) -> Bound:
            name = next((n for n, m in module.named_modules() if m is child), "")
            example = torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(0))
            walk = propagate(
                child,
                example.to(probe.device, probe.dtype),
                ".".join(part for part in (self._path(node), name) if part not in (ROOT, "")),
            )
            self.rows.extend(walk.rows)
            return walk.bound

        return bound_of

    def _check_written(self, node: fx.Node, step: Step) -> None:
        """Refuse an operation in place if something else reads what it wrote over."""
        for target in self.probes[0].written.get(node, []):
            storage = self.probes[0].storages[target]
            aliases = [n for n in self.nodes[: self.place[node]]
                       if self.probes[0].storages.get(n, frozenset()) & storage]  # fmt: skip
            constant = any(not _has_operand(self.values[n]) for n in aliases)
            shrinks = len(step.gains) == 1 and step.gains[0].value <= 1.0
            late = any(
                self.place[user] > self.place[node] for alias in aliases for user in alias.users
            )
            if constant or (late and not shrinks):
                self._refuse(
                    node,
                    "a tensor that is overwritten in place must not be read afterwards",
                    "Use the operation that returns a new tensor",
                )


def _has_operand(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_has_operand(v) for v in value)
    return isinstance(value, Operand)


def _name(node: fx.Node) -> str:
    if node.op == "call_module":
        owner = node.graph.owning_module
        return type(owner.get_submodule(str(node.target))).__name__ if owner else str(node.target)
    name = canonical(node.target)
    return name if isinstance(name, str) else getattr(name, "__name__", str(name))
