"""The registry: one Lipschitz rule for each operation, open to users.

A rule is written against a `Call` (what is called, its constants, the shapes), not against the
graph that the call was found in.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orthonet import _checks, _torch
from orthonet._torch import NN_FUNCTIONS, REQUIRED, operation_name
from orthonet.certify._bound import Bound
from orthonet.certify.norms import conv_norm
from orthonet.errors import UncertifiableError
from orthonet.layers.children import as_defined
from orthonet.linalg.bounds.enclosure import spectral_norm_bound
from orthonet.linalg.bounds.sizes import Rounding

__all__ = [
    "BatchDependent",
    "COPY",
    "Call",
    "Operand",
    "REARRANGEMENT",
    "RECORDS",
    "Rounding",
    "Roundings",
    "Step",
    "as_step",
    "bind",
    "canonical",
    "exact",
    "function_leaves",
    "function_rule",
    "is_default",
    "module_rule",
    "of_squares",
    "overload_name",
    "parameters",
    "record_of",
    "register_rule",
    "scalar_rounding",
    "upper",
]

Rule = TypeVar("Rule", bound=Callable[..., Any])


class Operand:
    """A tensor that depends on the input of the model.

    Attributes:
        shape: The shape of one sample.
        bound: The bound of the constant from the input of the model to it.
    """

    def __init__(
        self, shape: tuple[int, ...], bound: Bound | Callable[[], Bound], state: Any = None
    ) -> None:
        self.shape = shape
        self._bound = bound
        self._state = state  # what the walk knows of it

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that the tensor is traced in."""
        value = None if self._state is None else self._state.node.meta.get("val")
        return value.dtype if isinstance(value, Tensor) else torch.float32

    @property
    def bound(self) -> Bound:
        """The bound, found when it is first asked for."""
        if not isinstance(self._bound, Bound):
            self._bound = self._bound()
        return self._bound


Roundings = float | Rounding | Callable[[Callable[..., float]], Rounding] | None


def of_squares(count: float, outputs: int, terms: int) -> Rounding:
    """The rounding of `outputs` roots of sums of squares, each of `terms` at most.

    Squares below 2^-126 are lost in float32, so that a root may lose the root of `terms` times
    2^-63: that much in units of the roundings, of which there are 16 at least.
    """
    return Rounding(count + 16.0, 1.0 + 2.0**-40, math.sqrt(float(outputs) * terms) * 2.0**-42)


def scalar_rounding(call: Call, *values: Any) -> float | Rounding:
    """The rounding of a map that only compares and copies, among its entries constant scalars.

    They are rounded to the dtype of the operation; those that bfloat16 holds are everywhere.
    """
    scalars = [float(v) for v in values if isinstance(v, (int, float)) or _is_scalar(v)]
    held = torch.tensor(scalars, dtype=torch.float64).to(torch.bfloat16).double().tolist()
    lost = [abs(v) for v, w in zip(scalars, held, strict=True) if v != w]
    if not lost:
        return COPY
    return Rounding(1.0, 0.0, max(lost) * math.sqrt(math.prod(call.output_shape)) * (1 + 2.0**-40))


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point()


class Step(NamedTuple):
    """The result of a rule: one gain for each operand, and how the gains combine.

    With operands of constants L_i, the output has the constant sum_i gain_i L_i
    (`combine="sum"`), or the root of the sum of the squares of these terms (`"hypot"`), for outputs
    that are concatenated.
    """

    gains: tuple[Bound, ...]
    method: str
    combine: Literal["sum", "hypot"] = "sum"
    roundings: Roundings = None
    """How many roundings an entry of the output sees in a forward pass: its error is at most
    gamma of that number times (the gains on the absolute operands + the absolute output), in the
    l2 norm. 0 for maps that only compare and copy; a `Rounding` for compound maps, or what makes
    one of the function that gives gamma; None where nothing is known."""


REARRANGEMENT = "rearrangement"
"""The method of a step that only moves entries: it leaves the bound as it is."""
COPY = 0.0
"""The roundings of a map whose outputs are copies of inputs."""


def exact(value: float, method: str, roundings: Roundings = None) -> Step:
    """The constant of a map of one operand, attained up to rounding."""
    return Step((Bound(value, kind="exact"),), method, roundings=roundings)


def upper(value: float, method: str, roundings: Roundings = None) -> Step:
    """A proved bound of the constant of a map of one operand."""
    return Step((Bound(value),), method, roundings=roundings)


@dataclass(frozen=True)
class BatchDependent:
    """A constant that is not the same for every batch size.

    Attributes:
        value: It, at one batch size.
        rows: It is a tensor of equal rows, one for each sample.
    """

    value: Any
    rows: bool = False


@dataclass(frozen=True, eq=False)
class Call:
    """One operation of the model on its way from input to output.

    Attributes:
        op: The name of the operation.
        path: The module that called it.
        args: The positional arguments; an `Operand` stands for each tensor that depends on the
            input, everything else is a constant.
        kwargs: The keyword arguments, likewise.
        output_shape: The shape of one sample of the output.
        source: The line of code that it comes from, if known.
        target: The function that is called; its schema or signature names the arguments.
    """

    op: str
    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output_shape: tuple[int, ...]
    source: str = ""
    target: Any = None

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """Every argument by its name in the schema of `target`, defaults filled in."""
        return bind(self.target, self.args, self.kwargs)

    def __getitem__(self, name: str) -> Any:
        """The argument of this name; also of the overloads that have it only."""
        return self.arguments[name]

    def given(self, name: str, default: Any = None) -> Any:
        """Return the argument of this name, or `default` if the overload has none."""
        return self.arguments.get(name, default)

    def number(self, name: str) -> float:
        """Return the argument of this name as a float; anything else is refused."""
        value = self.arguments[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse(f"argument {name!r} must be a number", "Use a constant of the model")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """Return the argument of this name as a bool; anything else is refused."""
        value = self.arguments.get(name, default)
        if not isinstance(value, (bool, int)):
            self.refuse(f"argument {name!r} must be True or False", "Use a constant of the model")
        return bool(value)

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Return all operands in the order of the arguments; a repeated one counts twice."""
        found: list[Operand] = []

        def visit(value: Any) -> None:
            if isinstance(value, Operand):
                found.append(value)
            elif isinstance(value, (tuple, list)):
                for item in value:
                    visit(item)

        visit((*self.args, *self.kwargs.values()))
        return tuple(found)

    @property
    def operand(self) -> Operand:
        """Return the only operand, the first argument; more are refused."""
        first = self.args[0] if self.args else next(iter(self.kwargs.values()), None)
        if len(self.operands) != 1 or not isinstance(first, Operand):
            self.refuse(
                "this operation is certified for one tensor that depends on the input, in the "
                "first place, and constants",
                "A product or quotient of two such tensors has no global Lipschitz constant; "
                "certify(model, x, radius=r) bounds it in balls around samples; or register your "
                "own rule for the module around it with @register_rule",
            )
        return first

    def get(self, position: int, name: str, default: Any) -> Any:
        """Return the argument at a position or of a name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def fixed(self, name: str) -> Tensor:
        """Return the argument of this name as a finite float64 tensor on the CPU, or refuse it."""
        return self.as_constant(self.arguments[name], name)

    def constant(self, position: int, name: str) -> Tensor:
        """Return a constant argument as a finite float64 tensor on the CPU, or refuse it."""
        return self.as_constant(self.get(position, name, None), name)

    def as_constant(self, value: Any, name: str) -> Tensor:
        """Return `value` as a finite float64 tensor on the CPU, or refuse it by this name."""
        if isinstance(value, BatchDependent) and value.rows:
            value = value.value[:1]  # one for each sample, all the same
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = torch.tensor(float(value), dtype=torch.float64)
        if not isinstance(value, Tensor) or value.is_complex():
            self.refuse(
                f"argument {name!r} must be a constant of the model",
                "Values that depend on the input or on the batch size cannot scale it",
            )
        if value.layout is not torch.strided:
            value = value.to_dense()
        value = value.detach().to("cpu", torch.float64)
        if not bool(value.isfinite().all()):
            self.refuse(f"argument {name!r} must be finite", "Look for a NaN or an infinity")
        return value

    def feature_dims(self, dims: Any) -> tuple[int, ...]:
        """Return `dims` of the operand, counted without the batch: 0 is the first feature."""
        rank = len(self.operands[0].shape) + 1
        dims = (dims,) if isinstance(dims, int) else tuple(dims or range(rank))
        places = tuple(dim % rank for dim in dims)
        if 0 in places:
            self.refuse(
                "an operation must not act along the batch dimension",
                "A certificate is about single samples; use another dim",
            )
        return tuple(place - 1 for place in places)

    def refuse(self, requirement: str, advice: str) -> NoReturn:
        """Raise an `UncertifiableError` that names this operation, its path and its line."""
        where = {"operation": self.op, "path": self.path}
        where |= {"source": self.source} if self.source else {}
        _checks.fail("certify", requirement, advice, UncertifiableError, **where)


@functools.cache
def parameters(target: Any) -> dict[str, Any]:
    """The names of the arguments of a function, in order, with their defaults."""
    known = _torch.operation_arguments(target)
    if known is not None:
        return known
    empty = inspect.Parameter.empty
    return {
        name: REQUIRED if parameter.default is empty else parameter.default
        for name, parameter in inspect.signature(target).parameters.items()
    }


def bind(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; defaults stand for those that are not given."""
    names = parameters(target)
    found = {name: value for name, value in names.items() if value is not REQUIRED}
    found.update(zip(names, args, strict=False))
    found.update(kwargs)
    return found


def is_default(target: Any, name: str, value: Any) -> bool:
    """Whether this value of an argument is what leaving it out means."""
    default = parameters(target).get(name, REQUIRED)
    if default is REQUIRED or isinstance(value, (Tensor, Operand, BatchDependent)):
        return False
    if isinstance(value, (list, tuple)) or isinstance(default, (list, tuple)):
        both = (value, default)
        listed = [list(v) if isinstance(v, (list, tuple)) else [v] for v in both]
        return listed[0] == listed[1]
    return (type(value) is type(default) and value == default) or (
        isinstance(value, (int, float)) and isinstance(default, (int, float)) and value == default
    )


class _Entry(NamedTuple):
    rule: Callable[..., Any]
    nested: bool


_MODULES: dict[type[nn.Module], _Entry] = {}
_FUNCTIONS: dict[Any, Callable[[Call], Any]] = {}
RECORDS: dict[Any, Any] = {}
"""The records of `ops`, by the name of an overload ("topk.default") or by a Python function."""


def overload_name(target: Any) -> Any:
    """What a record is known by: the overload of an operation, or a function itself."""
    if target is operator.getitem:  # a part of several outputs
        return "getitem"
    return _torch.overload_name(target) or target


def record_of(target: Any) -> Any:
    """The record of an operation in `ops`, if there is one."""
    try:
        return RECORDS.get(overload_name(target))
    except TypeError:  # a target that cannot be hashed
        return None


_NAMESPACES = (torch, F, NN_FUNCTIONS, operator, torch.special, torch.linalg)
_SPELLINGS = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "truediv": "div",
    "concat": "cat",
    "concatenate": "cat",
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "negative": "neg",
    "absolute": "abs",
    "arctan": "atan",
    "clip": "clamp",
    "expit": "sigmoid",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "clamp_min": "clamp",
    "clamp_max": "clamp",
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "_prelu_kernel": "prelu",
    "_unsafe_view": "view",
    "_to_copy": "to",
    "logsigmoid": "log_sigmoid",
    "log_sigmoid_forward": "log_sigmoid",
}
# What a subclass may change without changing the map.
_HARMLESS = {
    "__init__",
    "__repr__",
    "__setattr__",
    "__setstate__",
    "__getstate__",
    "__deepcopy__",
    "__reduce_ex__",
    "_load_from_state_dict",
    "_save_to_state_dict",
    "extra_repr",
    "reset_parameters",
    "to_plain",
    "inverse",
    "adjoint",
}


def register_rule(*targets: Any, nested: bool = False) -> Callable[[Rule], Rule]:
    """Register a Lipschitz rule for modules or functions; a later one replaces an earlier one.

    The rule returns a `Bound`, a pair (`Bound`, method text), or a `Step`. The certificate relies
    on it: you must prove that your rule is correct.

    Args:
        *targets: Classes of modules: the rule is called as `rule(module, input_shape)`, with the
            shape of one sample, and its children are not examined, unless hooks or a `forward` set
            on an instance change what it computes. Or functions, and names of tensor methods: the
            rule is called as `rule(call)` with a `Call`. A name stands for the function, the method
            and the in-place variant of torch alike.
        nested: For classes: the rule is called as `rule(module, input_shape, bound_of)`, and
            `bound_of(child, shape)` certifies a child of the module.

    Examples:
        >>> class Shrink(nn.Module):
        ...     def forward(self, x):
        ...         return x / (1 + x.square().sum(1, keepdim=True).sqrt())
        >>> @register_rule(Shrink)
        ... def shrink(module, input_shape):
        ...     return Bound(1.0), "the gradient of a convex function with Hessian at most 1"
    """
    _checks.require(
        bool(targets),
        "register_rule",
        "there must be a target that the rule is for",
        "Write @register_rule(MyLayer)",
        targets=targets,
    )
    for target in targets:
        _checks.require(
            isinstance(target, str) or (callable(target) and not isinstance(target, nn.Module)),
            "register_rule",
            "a target must be a subclass of torch.nn.Module, a function or a name",
            "Pass the class, not an instance",
            target=target,
        )

    def decorate(rule: Rule) -> Rule:
        for target in targets:
            if isinstance(target, type) and issubclass(target, nn.Module):
                _MODULES[target] = _Entry(rule, nested)
            else:
                _FUNCTIONS[canonical(target)] = rule
        return rule

    return decorate


def canonical(target: Any) -> Any:
    """One name for all spellings of an operation of torch; any other function is its own name."""
    if not isinstance(target, str):
        name = getattr(target, "__name__", "")
        operation = operation_name(target)
        if operation is not None:
            name = operation.removeprefix("aten::")
            return canonical(name.removeprefix("linalg_").removeprefix("special_"))
        name = name.removeprefix("linalg_").removeprefix("special_")
        if not any(getattr(space, name, None) is target for space in _NAMESPACES):
            return _DISPATCHED.get(target, target)
        if inspect.isfunction(target) and not hasattr(torch.ops.aten, name):
            return target  # written in Python: traced as a whole
        target = name
    name = target.rstrip("_") if not target.endswith("__") else target.strip("_")
    return _SPELLINGS.get(name, name)


# Functions that torch builds at import time have no name of their own.
_DISPATCHED = {
    getattr(F, name): name
    for name in (f"{kind}max_pool{d}d" for kind in ("", "adaptive_") for d in (1, 2, 3))
}


def function_rule(target: Any) -> Callable[[Call], Any] | None:
    """The rule of a function, method or operation of ATen: a registered one, or its record's."""
    try:
        found = _FUNCTIONS.get(canonical(target))
    except TypeError:  # a target that cannot be hashed
        return None
    if found is not None:
        return found
    record = record_of(target)
    return None if record is None else record.step


def function_leaves() -> list[Any]:
    """The Python functions that have a rule: they are not looked into."""
    named = (*_FUNCTIONS, *RECORDS)
    return list(dict.fromkeys(target for target in named if not isinstance(target, str)))


def module_rule(module: nn.Module) -> _Entry | None:
    """The rule of the class of a module, or of a base whose map the class does not change.

    A module that does not compute `as_defined` has no rule and is looked into instead.
    """
    for base in type(module).__mro__:
        if base in _MODULES:
            entry = _MODULES[base]
            inside = not entry.nested  # a nested rule asks for the bounds of its children
            known = as_defined(module, inside) and _same_map(type(module), base)
            return entry if known else None
        if base.__module__.startswith("orthonet.layers.") and hasattr(base, "declared_bound"):
            known = as_defined(module) and _same_map(type(module), base)
            return _Entry(_declared, False) if known else None
    return None


def _declared(module: Any, input_shape: tuple[int, ...]) -> Step:
    """What a layer of ours declares of itself."""
    found = module.declared_bound(input_shape, _NORMS)
    kind = "exact" if found.exact else "upper"
    return Step((Bound(found.value, kind=kind),), found.method, roundings=found.rounding)


class _Norms:
    """Proved norms for layers, with the effort in force."""

    def matrix(self, matrix: Tensor) -> float:
        return spectral_norm_bound(matrix)

    def convolution(self, kernel: Tensor, input_size: tuple[int, ...], **geometry: Any) -> float:
        return conv_norm(kernel, input_size, **geometry).value


_NORMS = _Norms()


def _same_map(cls: type, base: type) -> bool:
    names = {
        name
        for ancestor in base.__mro__
        if ancestor is not object
        for name, value in vars(ancestor).items()
        if callable(value) and name not in _HARMLESS
    }
    return all(getattr(cls, name) is getattr(base, name) for name in names)


def as_step(result: Any, call: Call) -> Step:
    """What a rule returned, as a `Step` with one gain for each operand."""
    if isinstance(result, Bound):
        result = Step((result,), "registered rule")
    elif isinstance(result, tuple) and not isinstance(result, Step) and len(result) == 2:
        result = Step((result[0],), str(result[1]))
    proved = isinstance(result, Step) and all(
        isinstance(gain, Bound) and gain.kind != "estimate" for gain in result.gains
    )
    if not isinstance(result, Step) or not proved or len(result.gains) != len(call.operands):
        call.refuse(
            "its rule must return a proved Bound, (Bound, text), or a Step of one for each operand",
            "Correct the function that was given to register_rule; an estimate proves nothing",
        )
    return result
