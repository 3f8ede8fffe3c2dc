"""The graph that a model is certified on: exported with a free batch size, constants folded.

What does not depend on the input is computed once, by the operations and in the dtype of the
model: the weights of a certificate are the deployed ones to the last bit.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from orthonet import _checks
from orthonet.certify._decompose import decompose, inline_regions
from orthonet.certify._marks import ROOT, LeafCall, Marked, mark_of, marked_copy
from orthonet.certify._regions import REGION_OFF, autocast_region
from orthonet.errors import UncertifiableError

__all__ = ["BATCH", "FAILURES", "BatchDependent", "Program", "export", "refuse", "refuse_export"]

BATCH = 3
"""The batch size of the probe; constants are also computed for one less."""
_PACKAGES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
_SHAPE_ONLY = {
    "sym_size", "sym_numel", "sym_stride", "new_zeros", "new_ones", "new_full", "new_empty",
    "zeros_like", "ones_like", "full_like", "empty_like", "_assert_tensor_metadata",
}  # fmt: skip


@dataclass(frozen=True)
class BatchDependent:
    """A constant that is not the same for every batch size; rules must not scale by it."""

    value: Any


@dataclass
class Program:
    """The part of an exported graph that leads to the output.

    Attributes:
        nodes: Its nodes in order, without those inside of a call that has a rule.
        inputs: The nodes of the inputs.
        outputs: The nodes of the outputs.
        constants: The value of every node that does not depend on the input.
        calls: The calls with rules, by the number in their marks.
        entries: The nodes that go into each call.
        batch: The name of the free batch size.
        graph: All of it, also what lies inside of the calls.
        samples: The batch that the model was traced with.
        moving: The nodes of the graph whose values depend on the input.
        autocast: The dtype of autocast, None where it is off.
        dtypes: The dtypes of the floating values that were found under autocast.
    """

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    constants: dict[fx.Node, Any]
    calls: list[LeafCall]
    entries: dict[int, dict[int, fx.Node]] = field(default_factory=dict)
    batch: str = ""
    graph: fx.Graph = field(default_factory=fx.Graph)
    samples: tuple[Tensor, ...] = ()
    moving: set[fx.Node] = field(default_factory=set)
    autocast: torch.dtype | None = None
    dtypes: dict[fx.Node, torch.dtype] = field(default_factory=dict)

    def dtype_of(self, node: fx.Node) -> torch.dtype:
        """The dtype of the value of a node, of the first of several values."""
        value = node.meta.get("val")
        while isinstance(value, (tuple, list)):
            value = value[0]
        found = self.dtypes.get(node)
        return found or (value.dtype if isinstance(value, Tensor) else self.samples[0].dtype)

    def autocast_at(self, node: fx.Node) -> torch.dtype | None:
        """The dtype of autocast where a node is run."""
        return None if node.meta.get(REGION_OFF) else self.autocast

    def region(self, node: fx.Node) -> contextlib.AbstractContextManager[Any]:
        """Autocast as it is where a node is run."""
        return autocast_region(self.samples[0].device, self.autocast_at(node))

    def parents(self, node: fx.Node) -> list[fx.Node]:
        mark = mark_of(node)
        if mark is not None and mark[1] < 0:
            return list(self.entries.get(mark[0], {}).values())
        return list(node.all_input_nodes)


def path_of(node: fx.Node) -> str:
    """The module that a node was traced in."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    name = stack[-1][0] if stack else ""
    return name.split("@")[0] or ROOT


def source_of(node: fx.Node) -> str:
    """The line of the user's code that a node comes from, `file:line: code`."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in \S+\n\s*(.*)', str(node.stack_trace or ""))
    for file, line, code in reversed(frames):
        if not file.startswith(_PACKAGES):
            return f"{Path(file).name}:{line}: {code.strip()}"
    return ""


def op_name(node: fx.Node) -> str:
    """The name of the operation of a node, without its overload."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        space, name = target._schema.name.split("::")
        return name if space == "aten" else f"{space}::{name}"
    return getattr(target, "__name__", str(target))


def export(
    model: nn.Module, inputs: tuple[Tensor, ...], autocast: torch.dtype | None = None
) -> Program:
    """Export `model` with a free batch size and fold its constants.

    Under autocast it is traced as it runs there; the constants are rounded by `round_constants`.

    Raises:
        UncertifiableError: The model cannot be exported, writes its state, draws random numbers,
            mixes samples, or the graph does not compute what the model does.
    """
    samples = _samples(inputs)
    twin, marker = marked_copy(model)
    batch = torch.export.Dim("batch", min=2, max=64)
    try:
        with (
            marker.functions(twin), torch.no_grad(), warnings.catch_warnings(),
            autocast_region(samples[0].device, autocast),
        ):  # fmt: skip
            warnings.simplefilter("ignore")
            program = torch.export.export(
                twin, samples, dynamic_shapes=_free_batch(twin, samples, batch), strict=False
            )
            graphs = [m for m in program.graph_module.modules() if isinstance(m, fx.GraphModule)]
            if any(_writes(node) for m in graphs for node in m.graph.nodes):
                program = program.run_decompositions({})
    except FAILURES as error:
        with autocast_region(samples[0].device, autocast):
            refuse_export(model, samples, marker.visited[-1], error)
    signature = program.graph_signature
    if signature.buffers_to_mutate:
        _checks.fail(
            "certify",
            "forward must not write buffers",
            "Its output would depend on earlier calls: keep state out of forward in eval mode",
            UncertifiableError,
            buffers=tuple(sorted(signature.buffers_to_mutate.values())),
        )
    graph = program.graph
    user = set(signature.user_inputs)
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    nodes = [n for n in placeholders if n.name in user and isinstance(n.meta.get("val"), Tensor)]
    user_outputs = set(signature.user_outputs)
    last = list(graph.nodes)[-1]
    places = [i for i, n in enumerate(_outputs(last)) if getattr(n, "name", n) in user_outputs]
    outputs = [_outputs(last)[i] for i in places]
    _check_outputs(outputs)
    state = {**program.state_dict, **program.constants}
    stored = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    constants: dict[fx.Node, Any] = {
        n: state[stored[n.name]].detach() for n in placeholders if n.name in stored
    }
    inline_regions(program.graph_module, autocast)
    for node in graph.nodes:  # graphs of their own, in which autocast is on
        if node.op == "get_attr":
            constants[node] = program.graph_module.get_submodule(str(node.target))
    result = Program([], nodes, outputs, constants, marker.calls, samples=samples)
    result.autocast = autocast
    result.graph = graph
    result.batch = str(nodes[0].meta["val"].shape[0])
    for node in graph.nodes:
        mark = mark_of(node)
        if mark is not None and mark[1] >= 0:
            result.entries.setdefault(mark[0], {})[mark[1]] = node
    moving = _moving(graph.nodes, nodes)
    decompose(graph, [n for n in _needed(result, list(graph.nodes)) if n in moving])
    result.outputs = [_outputs(last)[i] for i in places]
    result.moving = _moving(graph.nodes, nodes)
    result.nodes = _needed(result, list(graph.nodes))
    _fold(result)
    return result


def _writes(node: fx.Node) -> bool:
    """Whether the operation works in place: the graph must be made functional first."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _samples(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A batch of points near the first of each example."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for example in inputs:
        noise = torch.randn(BATCH, *example.shape[1:], generator=generator)
        first = example[:1] if len(example) else torch.zeros_like(noise[:1])
        samples.append((first + 0.1 * noise.to(example.device, example.dtype)).detach())
    return tuple(samples)


def _free_batch(model: nn.Module, samples: Sequence[Tensor], batch: Any) -> tuple[Any, ...]:
    """The free dim of every argument, nested as forward takes them."""
    shapes: list[Any] = [{0: batch} for _ in samples]
    names = list(inspect.signature(model.forward).parameters.values())
    for place, name in enumerate(names):
        if name.kind is inspect.Parameter.VAR_POSITIONAL:
            return (*shapes[:place], tuple(shapes[place:]))
    return tuple(shapes)


def refuse_export(model: nn.Module, samples: Any, path: str, error: Exception) -> None:
    """Say whether the model runs at all, and if so where its export failed."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
    try:
        with torch.no_grad():
            model(*(x.clone() for x in samples))
    except FAILURES as failure:
        first = (str(failure).strip().splitlines() or [""])[0]
        _checks.fail(
            "certify",
            "the model must run on batches of any size of inputs like example_input",
            "Check the shape and dtype of example_input (its first dim is the batch), and that "
            "no batch size is written into the model",
            UncertifiableError,
            input_shape=tuple(samples[0].shape),
            error=f"{type(failure).__name__}: {first}",
        )
    _checks.fail(
        "certify",
        "torch.export must be able to trace the forward pass with a free batch size: without "
        "branches on the values of tensors or on the batch size, and without mixing samples",
        "Write x.shape[0] for len(x), move branches out of forward, or give the class of the "
        "module at this path a rule with @register_rule",
        UncertifiableError,
        path=path,
        error=text,
    )


def _outputs(last: fx.Node) -> list[Any]:
    return list(last.args[0])  # type: ignore[arg-type]


def _check_outputs(outputs: list[Any]) -> None:
    values = [n.meta.get("val") if isinstance(n, fx.Node) else n for n in outputs]
    if not values or not all(isinstance(v, Tensor) for v in values):
        _checks.fail(
            "certify",
            "the output must be a tensor or several tensors",
            "Wrap the model in a module that returns the tensors to certify",
            UncertifiableError,
            output=[type(v).__name__ for v in values],
        )


def _moving(nodes: Any, inputs: list[fx.Node]) -> set[fx.Node]:
    """The nodes whose values depend on the input, not only on its shape."""
    moving = set(inputs)
    for node in nodes:
        if any(n in moving for n in node.all_input_nodes) and op_name(node) not in _SHAPE_ONLY:
            moving.add(node)
    return moving


def _needed(program: Program, nodes: list[fx.Node]) -> list[fx.Node]:
    seen: set[fx.Node] = set()
    stack = list(program.outputs)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += program.parents(node)
    return [node for node in nodes if node in seen]


def _fold(program: Program) -> None:
    """Compute every needed node that does not depend on the input."""
    moving = set(program.inputs)
    constants = program.constants
    for node in program.nodes:
        if node.op in ("placeholder", "get_attr"):  # a graph of its own is no value
            continue
        parents = program.parents(node)
        shape_only = op_name(node) in _SHAPE_ONLY
        if any(p in moving for p in parents) and not shape_only:
            moving.add(node)
            continue
        if node.op == "call_function" and not shape_only and _is_random(node):
            refuse(node, "the model must be a function of its input alone",
                   "Remove the random numbers, or draw them once into a buffer")  # fmt: skip
        values = [_evaluate(node, program, size) for size in (BATCH, BATCH - 1)]
        constants[node] = values[0] if _same(*values) else BatchDependent(values[0])
    program.nodes = [n for n in program.nodes if n in moving]


def _is_random(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags and not (
        op_name(node) == "dropout" and not node.args[2]
    )


def _evaluate(node: fx.Node, program: Program, size: int) -> Any:
    """The value of a node at one batch size."""
    if mark_of(node) is not None and mark_of(node)[1] < 0:  # type: ignore[index]
        return _evaluate_call(node, program)

    def value(n: fx.Node) -> Any:
        if n not in program.constants:  # only its shape will be read
            fake = n.meta["val"]
            shape = [size if str(s) == program.batch else int(s) for s in fake.shape]
            return torch.empty(shape, dtype=fake.dtype, device=fake.device)
        found = program.constants[n]
        if isinstance(found, BatchDependent):
            return _evaluate(n, program, size)
        return found

    args, kwargs = map_arg((node.args, node.kwargs), value)
    with torch.no_grad(), program.region(node):
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _evaluate_call(node: fx.Node, program: Program) -> Any:
    number, place = mark_of(node)  # type: ignore[misc]
    call = program.calls[number]
    values = {k: program.constants[n] for k, n in program.entries.get(number, {}).items()}
    target = call.target
    args, kwargs = fill(call.args, values), {k: fill(v, values) for k, v in call.kwargs.items()}
    with torch.no_grad(), program.region(node):
        result = target(*args, **kwargs)
    tensors: list[Tensor] = []

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (tuple, list)):
            for v in value:
                visit(v)

    visit(result)
    return tensors[-place - 1]


def fill(value: Any, values: dict[int, Any]) -> Any:
    """The arguments of a call with values in place of the marks."""
    if isinstance(value, Marked):
        return values[value.place]
    if isinstance(value, (tuple, list)):
        return tuple(fill(v, values) for v in value)
    return value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        equal = a.shape == b.shape and a.dtype == b.dtype
        return equal and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and not isinstance(a, Tensor) and a == b


def refuse(node: fx.Node, requirement: str, advice: str) -> None:
    details = {"operation": op_name(node), "path": path_of(node)}
    if source_of(node):
        details["source"] = source_of(node)
    _checks.fail("certify", requirement, advice, UncertifiableError, **details)
