"""The graph of a model, probed at two batch sizes.

A module with a rule is a leaf, every other one is traced through. The probes tell shapes,
constants, what depends on the batch size, and which operations write in place.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.fx.proxy import TraceError

from orthonet import _checks, functional
from orthonet.certify._rules import module_rule
from orthonet.errors import UncertifiableError

__all__ = ["BATCHES", "ROOT", "Probe", "readable", "reads_shape", "trace"]

BATCHES = (2, 3)
ROOT = "<root>"
"""The path of the model itself."""
_FAILURES = (TraceError, TypeError, RuntimeError, ValueError, AttributeError, LookupError)


class _Root(nn.Module):
    """Holds the model, so that tensors found while tracing are not written into it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad", "layout"}
_SHAPE_METHODS = {
    "size", "dim", "ndimension", "numel", "nelement", "stride", "get_device", "is_contiguous",
    "is_floating_point", "new_zeros", "new_ones", "new_full",
}  # fmt: skip
_SHAPE_FUNCTIONS = {len, torch.numel, torch.zeros_like, torch.ones_like, torch.full_like}


def reads_shape(node: fx.Node) -> bool:
    """Whether the node asks a tensor for something else than its values."""
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    return node.op == "call_function" and (
        (node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES)
        or node.target in _SHAPE_FUNCTIONS
    )


class _Tracer(fx.Tracer):
    """Leaves are the modules with a rule and the functions of `orthonet.functional`.

    A condition on shapes alone, the same for every batch size, is decided on the way by running
    the graph so far. Any other condition is an error.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__(autowrap_modules=(functional,))
        self.visited = ["model"]
        self.runs: list[dict[fx.Node, Any]] = [{} for _ in inputs]
        self.inputs = inputs
        self.moving: dict[fx.Node, bool] = {}

    def _evaluate(self, obj: fx.Proxy) -> list[Any]:
        """The values of a proxy in every run."""
        for node in self.graph.nodes:
            if node in self.moving:
                continue
            depends = any(self.moving[i] for i in node.all_input_nodes) and not reads_shape(node)
            self.moving[node] = depends or node.op == "placeholder"
            for x, run in zip(self.inputs, self.runs, strict=True):
                run[node] = self._run(node, x, run)
        return [run[obj.node] for run in self.runs]

    def _run(self, node: fx.Node, x: Tensor, run: dict[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            return x.clone()
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.root)
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: run[n])
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def to_bool(self, obj: fx.Proxy) -> bool:
        values = self._evaluate(obj)
        answers = {bool(value) for value in values if not isinstance(value, Tensor)}
        if self.moving[obj.node] or len(answers) != 1:
            return super().to_bool(obj)
        return answers.pop()

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        values = self._evaluate(obj)
        lengths = {len(value) for value in values if isinstance(value, (tuple, list))}
        if len(lengths) != 1:
            return super().iter(obj)
        return iter([obj[i] for i in range(lengths.pop())])  # type: ignore[index]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_rule(m) is not None

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val  # weights stay tensors: what is computed from them alone is a constant

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.visited.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.visited.pop()  # not on an error: the last entry is where it happened
        return result


@dataclass
class Probe:
    """What one run of the graph showed."""

    output: Any
    values: dict[fx.Node, Any]
    written: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    storages: dict[fx.Node, frozenset[int]] = field(default_factory=dict)


class _Interpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False
        self.written: dict[fx.Node, list[fx.Node]] = {}

    def run_node(self, n: fx.Node) -> Any:
        before = {a: _versions(self.env[a]) for a in n.all_input_nodes}
        result = super().run_node(n)
        changed = [a for a, version in before.items() if version != _versions(self.env[a])]
        if changed:
            self.written[n] = changed
        return result


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, (tuple, list)) else []


def _versions(value: Any) -> list[int]:
    return [t._version for t in _tensors(value)]


def readable(qualified: str) -> str:
    """The path of a module below the model."""
    return qualified.removeprefix("model").removeprefix(".").split("@")[0] or ROOT


def trace(model: nn.Module, example: Tensor) -> tuple[fx.GraphModule, tuple[Probe, Probe]]:
    """Trace `model` and run its graph on batches of two and of three samples like `example`.

    Raises:
        UncertifiableError: The model cannot be traced, or the graph does not compute what the
            model does.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for batch in BATCHES:
        noise = torch.randn(batch, *example.shape[1:], generator=generator)
        sample = example[:1] if len(example) else torch.zeros_like(noise[:1])
        inputs.append(sample + 0.1 * noise.to(example.device, example.dtype))
    root = _Root(model)
    tracer = _Tracer([inputs[0][:1], *inputs])
    try:
        graph = tracer.trace(root)
        module = fx.GraphModule(root, graph)
    except _FAILURES as error:
        _checks.fail(
            "certify",
            "torch.fx must be able to trace the forward pass: without branches on the values of "
            "tensors or on the batch size",
            "Move the branch out of forward, or give the class of the module at this path a rule "
            "with @register_rule",
            UncertifiableError,
            path=readable(tracer.visited[-1]),
            error=_first_line(error),
        )
    probes = [_probe(model, module, x) for x in inputs]
    return module, (probes[0], probes[1])


def _probe(model: nn.Module, module: fx.GraphModule, x: Tensor) -> Probe:
    interpreter = _Interpreter(module)
    try:
        expected = model(x.clone())
        output = interpreter.run(x.clone())
    except _FAILURES as error:
        _checks.fail(
            "certify",
            "the model must run on batches of any size of inputs like example_input",
            "Check the shape and dtype of example_input (its first dim is the batch), and that "
            "no batch size is written into the model",
            UncertifiableError,
            input_shape=tuple(x.shape),
            error=_first_line(error),
        )
    if not isinstance(expected, Tensor) or not isinstance(output, Tensor):
        _checks.fail(
            "certify",
            "the output must be one tensor",
            "Wrap the model in a module that returns the tensor to certify",
            UncertifiableError,
            output=type(expected),
        )
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    same = expected.shape == output.shape and torch.allclose(
        expected, output, rtol=0.0, atol=1e-4 * scale, equal_nan=True
    )
    _checks.require(
        same,
        "certify",
        "the model must be a function of its input alone",
        "Remove random numbers and state that forward reads or writes",
        UncertifiableError,
    )
    storages = {
        node: frozenset(t.untyped_storage().data_ptr() for t in _tensors(value))
        for node, value in interpreter.env.items()
    }
    return Probe(output, dict(interpreter.env), interpreter.written, storages)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
