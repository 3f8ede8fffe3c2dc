"""The graph that a model is certified on: exported with a free batch size, constants folded.

What does not depend on the input is computed once, by the operations and in the dtype of the
model: the weights of a certificate are the deployed ones to the last bit.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from orthonet import _checks
from orthonet._torch import mutates
from orthonet.certify.graph.decompose import decompose, inline_regions, skip_whole_slices
from orthonet.certify.graph.fold import fold, moving
from orthonet.certify.graph.marks import Marker, mark_of, marked_copy
from orthonet.certify.graph.masks import MaskedReads
from orthonet.certify.graph.pairs import write_pairs
from orthonet.certify.graph.program import BATCH, Program
from orthonet.certify.graph.questions import refuse_found
from orthonet.certify.graph.regions import autocast_region
from orthonet.certify.graph.structure import Recorder, compare, recording, variants
from orthonet.errors import UncertifiableError

__all__ = ["FAILURES", "export", "failure_of", "refuse_export", "samples_of"]

_LARGEST_BATCH = 2**40
"""No batch is larger, so that no branch on the batch size hides behind the range."""

FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


def export(
    model: nn.Module, inputs: tuple[Tensor, ...], autocast: torch.dtype | None = None
) -> Program:
    """Export `model` with a free batch size and fold its constants.

    Under autocast it is traced as it runs there; the constants are rounded by `round_constants`.

    Raises:
        UncertifiableError: The model cannot be exported, writes its state, draws random numbers,
            mixes samples, or the graph does not compute what the model does.
    """
    samples = samples_of(inputs)
    twin, marker = marked_copy(model)
    # PyTorch 2.6 slices no dim without a largest size
    batch = torch.export.Dim("batch", min=2, max=_LARGEST_BATCH)
    shapes = _free_batch(twin, samples, batch)
    recorder = Recorder(twin, (BATCH, 1), lambda: marker.visited[-1])
    try:
        with (
            marker.functions(twin),
            torch.no_grad(),
            warnings.catch_warnings(),
            _unlogged(),
            MaskedReads(twin),
            recording(recorder),
            autocast_region(samples[0].device, autocast),
        ):
            warnings.simplefilter("ignore")
            program = torch.export.export(twin, samples, dynamic_shapes=shapes, strict=False)
            graphs = [m for m in program.graph_module.modules() if isinstance(m, fx.GraphModule)]
            if any(_writes(node) for m in graphs for node in m.graph.nodes):
                program = program.run_decompositions({})
    except FAILURES as error:
        guards = _guards(twin, marker, samples, shapes) if "Constraints" in str(error) else []
        with autocast_region(samples[0].device, autocast):
            refuse_export(model, samples, marker.visited[-1], error, guards, inputs)
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
    places = [
        i
        for i, n in enumerate(_outputs(last))
        if n is not None and getattr(n, "name", n) in user_outputs
    ]
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
    skip_whole_slices(graph)
    for node in graph.nodes:  # graphs of their own, in which autocast is on
        if node.op == "get_attr":
            constants[node] = program.graph_module.get_submodule(str(node.target))
    result = Program([], nodes, outputs, constants, marker.calls, samples=samples)
    result.autocast = autocast
    result.stored = {name: state[name] for n, name in stored.items()}
    result.given = inputs
    result.structure = lambda: _compare(twin, marker, samples, autocast, recorder, inputs)
    result.graph = graph
    result.batch = str(nodes[0].meta["val"].shape[0])
    for node in graph.nodes:
        mark = mark_of(node)
        if mark is not None and mark[1] >= 0:
            result.entries.setdefault(mark[0], {})[mark[1]] = node
    moves = moving(graph.nodes, nodes)
    if write_pairs(graph, [n for n in _needed(result, list(graph.nodes)) if n in moves]):
        result.outputs = [_outputs(last)[i] for i in places]
        moves = moving(graph.nodes, nodes)
    decompose(graph, [n for n in _needed(result, list(graph.nodes)) if n in moves])
    result.outputs = [_outputs(last)[i] for i in places]
    result.moving = moving(graph.nodes, nodes)
    result.nodes = result.needed = _needed(result, list(graph.nodes))
    fold(result)
    return result


def _compare(
    twin: nn.Module,
    marker: Marker,
    samples: tuple[Tensor, ...],
    autocast: torch.dtype | None,
    traced: Recorder,
    given: tuple[Tensor, ...],
) -> None:
    """Run the model in every way that it may be called, and compare what it calls."""
    first: Recorder | None = None
    for variant in variants():
        calls, marker.calls = marker.calls, []
        size = 1 if variant.single else BATCH
        recorder = Recorder(twin, (size,), lambda: marker.visited[-1])
        marker.shared = recorder.questions.shared
        recorder.counting = traced if variant.counts else None
        try:
            with (
                marker.functions(twin),
                variant.around(twin),
                warnings.catch_warnings(),
                autocast_region(samples[0].device, autocast),
                recording(recorder),
            ):
                warnings.simplefilter("ignore")
                wanted = torch.is_grad_enabled() and not variant.settings
                twin(*(x[:size].detach().clone().requires_grad_(wanted) for x in samples))
        except FAILURES as error:
            refuse_found(recorder.questions.found)
            if variant.counts:
                refuse_export(twin, samples, marker.visited[-1], error, given=given)
            continue  # called in this way it does not run
        finally:
            marker.calls, marker.shared = calls, None
            del marker.visited[1:]
        refuse_found(recorder.questions.found)
        compare(traced, recorder, variant, traced=True, autocast=autocast is not None)
        if first is not None and not variant.single:
            compare(first, recorder, variant, traced=False)
        first = first or recorder


def _writes(node: fx.Node) -> bool:
    """Whether the operation works in place: the graph must be made functional first."""
    return node.op == "call_function" and mutates(node.target)


def samples_of(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
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


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Keep torch from logging the errors of a trace: they are raised, and told in a sentence."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    if log.isEnabledFor(logging.INFO):  # somebody wants to see all of it
        yield
        return

    def below_error(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR

    log.addFilter(below_error)
    try:
        yield
    finally:
        log.removeFilter(below_error)


class _Guards(logging.Handler):
    """Notes which conditions on the batch size a trace met, and where."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        found = re.match(r"eval (.*) \[guard added\] \((.*?)\),?", record.getMessage())
        if found:
            self.seen.append(re.sub(r"\bs\d+\b", "batch", found[1]) + f" ({found[2]})")


def _guards(model: nn.Module, marker: Marker, samples: Any, shapes: Any) -> list[str]:
    """Trace again, to find the lines that read more of the batch size than that it is one."""
    log, handler = logging.getLogger("torch.fx.experimental.symbolic_shapes"), _Guards()
    level, propagate, others = log.level, log.propagate, log.handlers
    log.handlers = [handler]  # torch's own would print all of it
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        with (
            contextlib.suppress(*FAILURES),
            torch.no_grad(),
            warnings.catch_warnings(),
            marker.functions(model),
            _unlogged(),
        ):
            warnings.simplefilter("ignore")
            torch.export.export(model, samples, dynamic_shapes=shapes, strict=False)
    finally:
        log.handlers = others
        log.setLevel(level)
        log.propagate = propagate
    return handler.seen[:3]


def refuse_export(
    model: nn.Module,
    samples: Any,
    path: str,
    error: Exception,
    guards: Sequence[str] = (),
    given: Sequence[Tensor] = (),
) -> None:
    """Say whether the model runs at all, also on the `given` batch, or where its export failed."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
    failure = failure_of(model, given)
    if failure:
        _checks.fail(
            "certify",
            "the model must run on example_input",
            "Pass a batch of the shape and dtype that the model takes, samples in the first dim",
            UncertifiableError,
            example_input=given[0] if len(given) == 1 else given,
            path=path,
            error=failure,
        )
    failure = failure_of(model, samples)
    if failure:
        _checks.fail(
            "certify",
            "the model must run on batches of any size of inputs like example_input",
            "Check the shape and dtype of example_input (its first dim is the batch), and that "
            "no batch size is written into the model",
            UncertifiableError,
            example_input=(given or samples)[0],
            batch_size=len(samples[0]),
            error=failure,
        )
    _checks.fail(
        "certify",
        "torch.export must be able to trace the forward pass with a free batch size: without "
        "branches on the values of tensors or on the batch size, and without mixing samples",
        "Write x.shape[0] for len(x), move branches out of forward, or give the class of the "
        "module at this path a rule with @register_rule",
        UncertifiableError,
        path=path,
        **({"conditions": list(guards)} if guards else {"error": text}),
    )


def failure_of(model: nn.Module, inputs: Sequence[Tensor]) -> str:
    """The error of a call in one line; empty if there is none."""
    if not inputs:
        return ""
    try:
        with torch.no_grad():
            model(*(x.clone() for x in inputs))
    except FAILURES as error:
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]
    return ""


def _outputs(last: fx.Node) -> list[Any]:
    (found,) = last.args
    return list(cast(Sequence[Any], found))


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


def _needed(program: Program, nodes: list[fx.Node]) -> list[fx.Node]:
    seen: set[fx.Node] = set()
    stack = list(program.outputs)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += program.parents(node)
    return [node for node in nodes if node in seen]
