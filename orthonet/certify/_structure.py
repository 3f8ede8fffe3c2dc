"""Whether a model is one function: its graph must be the same however it is called.

A sample shows a branch only where the branch makes a difference; the graphs show it everywhere.
The model is exported again at batch 1, with gradients, in inference mode, with another default
dtype and number of threads, as it runs and as it is compiled, and the listings of these graphs are
compared node by node. The batch size may enter the shapes of tensors and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import operator
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from orthonet import _checks
from orthonet.certify._program import op_name, path_of, refuse, source_of
from orthonet.errors import UncertifiableError

__all__ = ["Listing", "as_it_runs", "check_batch_in_shapes", "compare", "listing", "variants"]

_PROBE = 131
"""The batch size that stands for all others where two graphs with a free one are compared."""
_INLINED = "wrap_with_set_grad_enabled"
_CHECKS = {"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size"}
_FLAGS = ("_is_compiling_flag", "_is_exporting_flag")


class Line(NamedTuple):
    """One operation of a listing, and the node that it comes from."""

    what: Any
    node: fx.Node


class Listing(NamedTuple):
    """The operations of an exported graph with its shapes at one batch size, and its outputs."""

    lines: list[Line]
    outputs: Any


class Variant(NamedTuple):
    """One more way to call the model."""

    name: str
    single: bool
    """At batch 1, not with a free batch size."""
    mode: Callable[[], contextlib.AbstractContextManager[Any]]
    threads: bool = False
    """With another number of threads."""
    flags: bool = False
    """Compiled, not as it runs."""
    dtype: bool = False
    """With another default dtype, so that the dtypes in the graph may differ."""

    @contextlib.contextmanager
    def around(self, model: torch.nn.Module) -> Iterator[None]:
        """Within it, this thread sees the model called in this way."""
        answers: dict[Any, Any] = {}
        if self.threads:
            answers[torch.get_num_threads] = torch.get_num_threads() + 1
        with contextlib.ExitStack() as stack:
            if self.dtype:
                answers[torch.get_default_dtype] = _other_dtype()
                answers[torch.tensor] = _tensor
                stack.enter_context(_Factories())
            stack.enter_context(_answering(model, answers))
            stack.enter_context(self.mode())
            if not self.flags:
                stack.enter_context(as_it_runs(model))
            yield


def variants() -> list[Variant]:
    """The ways to call a model that may make no difference."""
    return [
        Variant("at batch 1", True, torch.no_grad),
        Variant("at batch 1 with gradients", True, torch.enable_grad, threads=True),
        Variant("at batch 1 in inference mode", True, torch.inference_mode),
        Variant("with gradients", False, torch.enable_grad),
        Variant("in inference mode with other threads", False, torch.inference_mode, threads=True),
        Variant("under torch.compile or torch.export", False, torch.no_grad, flags=True),
        Variant("with another default dtype", False, torch.no_grad, dtype=True),
    ]


_default_dtype = torch.get_default_dtype  # not the one that answers otherwise


def _other_dtype() -> torch.dtype:
    return torch.float32 if _default_dtype() == torch.float64 else torch.float64


@contextlib.contextmanager
def _answering(model: torch.nn.Module, answers: dict[Any, Any]) -> Iterator[None]:
    """Within it, functions of torch give other answers, or are other functions, to this thread.

    Nothing is set: the default dtype and the threads of the process are those of all threads.
    """
    spaces = [vars(torch), *(getattr(type(m).forward, "__globals__", {}) for m in model.modules())]
    me, changed = threading.get_ident(), []

    def answering(function: Callable[..., Any], answer: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != me:
                return function(*args, **kwargs)
            return answer(function, *args, **kwargs) if callable(answer) else answer

        return call

    wrapped = {f: answering(f, answer) for f, answer in answers.items()}
    for space in {id(s): s for s in spaces}.values() if answers else ():
        for name, value in list(space.items()):
            if isinstance(value, types.BuiltinFunctionType) and value in wrapped:
                changed.append((space, name, value))
                space[name] = wrapped[value]
    try:
        yield
    finally:
        for space, name, value in changed:
            space[name] = value


_FACTORIES = {"zeros", "ones", "empty", "rand", "randn", "eye", "linspace", "logspace"}
_OF_DATA = {"full", "arange", "as_tensor", "scalar_tensor", "asarray"}


def _tensor(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """`torch.tensor`, which no mode sees while a model is traced."""
    if kwargs.get("dtype") is None and _has_float(args):
        kwargs["dtype"] = _other_dtype()
    return function(*args, **kwargs)


class _Factories(TorchFunctionMode):
    """In this thread, new tensors without a dtype get another default dtype."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if kwargs.get("dtype") is None and (
            name in _FACTORIES or (name in _OF_DATA and _has_float((args, kwargs)))
        ):
            kwargs["dtype"] = _other_dtype()
        return func(*args, **kwargs)


def _has_float(data: Any) -> bool:
    if isinstance(data, dict):
        data = tuple(data.values())
    return isinstance(data, float) or (
        isinstance(data, (tuple, list)) and any(map(_has_float, data))
    )


@contextlib.contextmanager
def as_it_runs(model: torch.nn.Module) -> Iterator[None]:
    """Within it, `torch.compiler.is_exporting()` says no while the model is traced."""
    flags = [name for name in _FLAGS if hasattr(torch.compiler, name)]
    before: list[dict[str, Any]] = []

    def enter(*_: Any) -> None:
        before.append({name: getattr(torch.compiler, name) for name in flags})
        for name in flags:
            setattr(torch.compiler, name, False)

    def leave(*_: Any) -> None:
        for name, value in before.pop().items():
            setattr(torch.compiler, name, value)

    handles = [
        model.register_forward_pre_hook(enter, prepend=True),
        model.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# listings ---------------------------------------------------------------------------------------


def listing(program: Any, size: int = _PROBE, dtypes: bool = True) -> Listing:
    """The operations of an exported program, its free batch size being `size`."""
    signature = program.graph_signature
    state = {**program.state_dict, **program.constants}
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    user = list(signature.user_inputs)
    env: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in stored:
            env[node] = ("stored", stored[node.name])
        elif node.name in lifted:
            env[node] = ("constant", _content(state[lifted[node.name]], dtypes))
        else:
            env[node] = ("input", user.index(node.name) if node.name in user else node.name)
    lines: list[Line] = []
    outputs = _list(program.graph_module, env, lines, size, dtypes)
    return Listing(lines, outputs)


def _list(
    module: fx.GraphModule, env: dict[fx.Node, Any], lines: list[Line], size: int, dtypes: bool
) -> Any:
    """Add the operations of a graph to `lines`, and return what it returns."""

    def value(x: Any) -> Any:
        if isinstance(x, fx.Node):
            return env[x]
        if isinstance(x, (tuple, list)):
            return tuple(value(v) for v in x)
        if isinstance(x, dict):
            return tuple(sorted((k, value(v)) for k, v in x.items() if v is not None))
        if isinstance(x, slice):
            return ("slice", value(x.start), value(x.stop), value(x.step))
        if isinstance(x, torch.dtype):
            return str(x) if dtypes else "dtype"
        if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return _at(x, size)
        if isinstance(x, float) and x != x:
            return "nan"
        return (type(x).__name__, x if isinstance(x, (int, float, str, bool)) else str(x))

    for node in module.graph.nodes:
        if node.op == "get_attr":
            env[node] = ("attribute", node.target)
        elif node.op == "output":
            return value(node.args[0])
        if node.op != "call_function" or op_name(node) in _CHECKS:
            continue
        found = node.meta.get("val")
        if isinstance(found, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)):
            env[node] = value(found)
            continue
        if getattr(node.target, "__name__", "") == _INLINED:
            body: Any = module.get_submodule(str(node.args[1].target))  # type: ignore[union-attr]
            formal = [n for n in body.graph.nodes if n.op == "placeholder"]
            inner = {n: env[a] for n, a in zip(formal, node.args[2:], strict=True)}  # type: ignore[index]
            env[node] = ("results", _list(body, inner, lines, size, dtypes))
            continue
        if node.target is operator.getitem and env[node.args[0]][0] == "results":  # type: ignore[index]
            env[node] = env[node.args[0]][1][node.args[1]]  # type: ignore[index]
            continue
        what = (
            str(node.target),
            value(node.args),
            value(node.kwargs),
            _shapes(found, size, dtypes),
        )
        for argument in node.args:  # other graphs inside of this one
            if isinstance(argument, fx.Node) and argument.op == "get_attr":
                inside: list[Line] = []
                body = getattr(module, str(argument.target), None)
                if isinstance(body, fx.GraphModule):
                    holes = {n: ("hole", i) for i, n in enumerate(body.graph.nodes)}
                    result = _list(body, holes, inside, size, dtypes)
                    what = (*what, tuple(line.what for line in inside), result)
        env[node] = ("result", len(lines))
        lines.append(Line(what, node))
    return None


def _at(number: Any, size: int) -> Any:
    """The value of a symbolic number where every free size is `size`."""
    expression = number.node.expr
    found = expression.subs(dict.fromkeys(expression.free_symbols, size))
    kind = {torch.SymInt: int, torch.SymFloat: float}.get(type(number), bool)
    try:
        return (kind.__name__, kind(found))
    except TypeError:
        return ("symbolic", str(found))


def _shapes(found: Any, size: int, dtypes: bool) -> Any:
    if isinstance(found, Tensor):
        shape = tuple(
            _at(n, size) if isinstance(n, torch.SymInt) else ("int", int(n)) for n in found.shape
        )
        return (shape, str(found.dtype) if dtypes else found.dtype.is_floating_point)
    if isinstance(found, (tuple, list)):
        return tuple(_shapes(v, size, dtypes) for v in found)
    return type(found).__name__


def _content(value: Any, dtypes: bool) -> Any:
    """The bytes of a constant that the forward pass writes out."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    value = value.detach().cpu().resolve_conj().contiguous()
    if not dtypes:
        value = value.to(torch.float64) if value.is_floating_point() else value
        return (tuple(value.shape),)
    code = hashlib.sha256(value.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    return (tuple(value.shape), str(value.dtype), code)


def compare(base: Listing, other: Listing, name: str) -> None:
    """Refuse a model whose graph is another one when it is called in another way.

    Raises:
        UncertifiableError: The listings differ; the message names the first operation.
    """
    pairs = list(zip(base.lines, other.lines, strict=False))
    place = next((i for i, (a, b) in enumerate(pairs) if a.what != b.what), None)
    if place is None and len(base.lines) == len(other.lines) and base.outputs == other.outputs:
        return
    longer = base if len(base.lines) >= len(other.lines) else other
    place = len(pairs) if place is None else place
    details: dict[str, Any] = {"called": name}
    if place < len(longer.lines):
        lines = (base if place < len(base.lines) else other).lines
        node = lines[place].node
        details |= {"operation": op_name(node), "path": path_of(node)}
        details |= {"source": source_of(node)} if source_of(node) else {}
    _checks.fail(
        "certify",
        "the model must be the same function of its input however it is called",
        "Take branches on gradient mode, inference mode, torch.compiler, the default dtype, the "
        "number of threads and the batch size out of forward: this one computes something else "
        "there",
        UncertifiableError,
        **details,
    )


# the batch size ---------------------------------------------------------------------------------

_COUNTS = {"sym_size", "sym_numel", "mul", "floordiv", "getitem"}
_SHAPES = {
    "view", "reshape", "_unsafe_view", "expand", "repeat", "broadcast_to", "unflatten", "zeros",
    "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "slice", "split",
    "split_with_sizes", "view_copy", "expand_copy",
}  # fmt: skip
"""Operations that read integers as sizes; the walk looks at the batch dim of what they return."""
_FILL = {"full": 1, "new_full": 2}  # the argument that is a value
_ROWWISE = {
    *_SHAPES, "zeros_like", "ones_like", "full_like", "empty_like", "expand_as", "view_as",
    "reshape_as", "type_as", "to", "_to_copy", "clone", "contiguous", "detach", "detach_", "alias",
    "lift_fresh_copy", "unsqueeze", "squeeze", "flatten", "transpose", "permute", "select", "cat",
    "stack", "chunk", "unbind", "getitem", "certify_mark", "linear", "matmul", "mm", "addmm", "bmm",
    "baddbmm", "add", "sub", "rsub", "mul", "div", "neg", "abs", "relu", "tanh", "sigmoid", "exp",
    "fill_", "zero_", "copy_", "add_", "mul_", "masked_fill", "where", "index_select",
    "wrap_with_autocast", "_assert_tensor_metadata",
}  # fmt: skip
"""What makes, of equal rows, a tensor of equal rows for every batch size, where dim 0 stays."""


def check_batch_in_shapes(nodes: list[fx.Node], moving: set[fx.Node], batch: str) -> None:
    """Refuse graphs in which the batch size is more than the size of dim 0.

    Raises:
        UncertifiableError: It is divided, compared, or used as a value; or a constant that is
            shaped like the batch goes through an operation that may tell one row from another.
    """
    sized: set[fx.Node] = set()
    for node in nodes:
        found, name = node.meta.get("val"), _name(node)
        if node.op != "call_function":
            continue
        if isinstance(found, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            if name not in _COUNTS or not _is_count(found):
                _refuse_size(node)
            continue
        places = [*enumerate(node.args), *((-1, v) for v in node.kwargs.values())]
        for place, argument in places:
            if _symbolic(argument) and (name not in _SHAPES or place == _FILL.get(name)):
                _refuse_size(node)
        if node in moving:
            continue
        if any(n in sized for n in node.all_input_nodes) or _has_batch(found, batch):
            sized.add(node)
            if name not in _ROWWISE or not _leads(found, batch):
                _refuse_size(node)


def _name(node: fx.Node) -> str:
    return op_name(node).removeprefix("orthonet::").split(".")[0]


def _refuse_size(node: fx.Node) -> None:
    refuse(
        node,
        "the batch size may be the size of dim 0 and nothing else",
        "A certificate is given for each sample on its own: a value that depends on how many there "
        "are, or on which of them it is, mixes them",
    )


def _symbolic(argument: Any) -> bool:
    if isinstance(argument, fx.Node):
        argument = argument.meta.get("val")
        if isinstance(argument, (tuple, list)):
            return False  # of several results
    if isinstance(argument, (tuple, list)):
        return any(map(_symbolic, argument))
    return isinstance(argument, (torch.SymInt, torch.SymFloat, torch.SymBool)) and bool(
        argument.node.expr.free_symbols
    )


def _has_batch(found: Any, batch: str) -> bool:
    if isinstance(found, Tensor):
        return any(isinstance(n, torch.SymInt) for n in found.shape)
    return isinstance(found, (tuple, list)) and any(_has_batch(v, batch) for v in found)


def _leads(found: Any, batch: str) -> bool:
    """Whether dim 0 is the batch size, and no other dim depends on it."""
    if isinstance(found, (tuple, list)):
        return all(_leads(v, batch) for v in found)
    return (
        isinstance(found, Tensor)
        and found.ndim > 0
        and str(found.shape[0]) == batch
        and not any(isinstance(n, torch.SymInt) for n in found.shape[1:])
    )


def _is_count(number: Any) -> bool:
    """Whether it is a constant, or a positive multiple of a power of the batch size."""
    if not isinstance(number, torch.SymInt):
        return False
    expression = number.node.expr
    if not expression.free_symbols:
        return True
    coefficient, rest = expression.as_coeff_Mul()
    base, power = rest.as_base_exp()
    return bool(coefficient.is_Integer and coefficient > 0 and base.is_Symbol and power.is_Integer)
