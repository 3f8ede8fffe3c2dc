"""Marks around what a rule covers as a whole, so that it is found in the exported graph.

Every tensor that goes into or comes out of a module or Python function with a rule passes through
an operation `orthonet::certify_mark` that carries the number of the call: what lies between needs
no rule of its own.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orthonet import _checks, functional
from orthonet._torch import patched, tensors_in, version_of
from orthonet.certify.graph.questions import storages_of
from orthonet.certify.rules import function_leaves, module_rule
from orthonet.errors import UncertifiableError
from orthonet.layers.children import as_defined
from orthonet.reparametrizers.registration import bake

__all__ = ["ROOT", "LeafCall", "Marked", "Marker", "mark_of", "marked_copy"]

ROOT = "<root>"
"""The path of the model itself."""

_LIBRARY = torch.library.Library("orthonet", "FRAGMENT")
_LIBRARY.define("certify_mark(Tensor x, int call, int place) -> Tensor")
_LIBRARY.impl("certify_mark", lambda x, call, place: x.clone(), "CompositeExplicitAutograd")
_MARK = torch.ops.orthonet.certify_mark.default


@dataclass(frozen=True)
class Marked:
    """Stands for the tensor with this place among the tensors of a call."""

    place: int


@dataclass(frozen=True)
class LeafCall:
    """One call of a module or function that has a rule of its own."""

    target: Any
    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Marker:
    """Collects the calls while the model is traced, and knows where the trace is."""

    calls: list[LeafCall] = field(default_factory=list)
    visited: list[str] = field(default_factory=lambda: [ROOT])
    thread: int = field(default_factory=threading.get_ident)
    shared: set[int] | None = None
    """While the model runs: the memory that goes into a call and comes out of it again."""

    def around(self, target: Any, path: str | None, function: Callable[..., Any]) -> Any:
        """`function` with marks on its tensors."""

        @functools.wraps(function)
        def marked(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self.thread:  # names of functions are seen by all threads
                return function(*args, **kwargs)
            number = len(self.calls)
            places = 0

            def enter(value: Any) -> tuple[Any, Any]:
                nonlocal places
                if isinstance(value, Tensor):
                    places += 1
                    return _MARK(value, number, places - 1), Marked(places - 1)
                if isinstance(value, (tuple, list)):
                    pairs = [enter(v) for v in value]
                    return tuple(a for a, _ in pairs), tuple(b for _, b in pairs)
                return value, value

            inside = [enter(a) for a in args]
            named = {key: enter(value) for key, value in kwargs.items()}
            call = LeafCall(
                target,
                path or self.visited[-1],
                tuple(b for _, b in inside),
                {key: b for key, (_, b) in named.items()},
            )
            self.calls.append(call)
            given = [a for a, _ in inside], {k: a for k, (a, _) in named.items()}
            tensors = [] if self.shared is None else tensors_in(given)
            before = [version_of(t) for t in tensors]
            result = function(*given[0], **given[1])
            written = [version_of(t) for t in tensors] != before
            places = 0

            def leave(value: Any) -> Any:
                nonlocal places
                if isinstance(value, Tensor):
                    places += 1
                    return _MARK(value, number, -places)
                if isinstance(value, (tuple, list)):
                    return tuple(leave(v) for v in value)
                return value

            marked_result = leave(result)
            alike = storages_of(tensors) & storages_of(tensors_in(result))
            if self.shared is not None and (written or alike):
                self.shared |= storages_of(tensors_in((args, kwargs, marked_result)))
            return marked_result

        return marked

    @contextmanager
    def functions(self, model: nn.Module) -> Iterator[None]:
        """Wherever a function with a rule is named or held, put marks around its calls."""
        spaces: list[Any] = [vars(functional), vars(F)]
        for module in model.modules():
            forward = type(module).forward
            spaces += [getattr(forward, "__globals__", {}), vars(module)]
        with patched(spaces, {f: self.around(f, None, f) for f in function_leaves()}):
            yield


def mark_of(node: torch.fx.Node) -> tuple[int, int] | None:
    """(call, place) of a mark: places count from 0 inward, from -1 downward outward."""
    if node.op == "call_function" and node.target is _MARK:
        _, call, place, *_ = cast(tuple[Any, int, int], node.args)
        return call, place
    return None


def marked_copy(model: nn.Module) -> tuple[nn.Module, Marker]:
    """A copy of `model` to be traced: leaves are marked, constrained weights are constants."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():  # a tensor computed by a hook cannot be copied
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        if _is_plain(module) and id(module) not in memo:
            memo[id(module)] = module.to_plain()
    try:
        twin = copy.deepcopy(model, memo)
    except TypeError as error:
        _checks.fail(
            "certify",
            "copy.deepcopy must be able to copy the model",
            "Keep generators, files, locks and the like out of its modules",
            UncertifiableError,
            error=str(error),
        )
    for module in twin.modules():
        bake(module)
    marker = Marker()
    originals = dict(model.named_modules())
    for path, module in twin.named_modules():
        original = originals.get(path)
        readable = path or ROOT
        if original is not None and module_rule(original) is not None:
            _freeze(module)
            module.forward = marker.around(original, readable, module.forward)
        module.register_forward_pre_hook(lambda m, args, p=readable: marker.visited.append(p))
        module.register_forward_hook(lambda m, args, out: marker.visited.pop() and None)
    return twin, marker


@torch.no_grad()
def _freeze(module: nn.Module) -> None:
    """Compute the weights of a layer of ours once, so that their computation is not traced."""
    weights = getattr(module, "parametrization", None)
    if not isinstance(weights, nn.Module) or not type(module).__module__.startswith("orthonet."):
        return
    if not inspect.signature(weights.forward).parameters:
        value = weights()
        weights.forward = lambda: value


class _HasPlain(Protocol):
    def to_plain(self) -> nn.Module: ...


def _is_plain(module: nn.Module) -> TypeGuard[_HasPlain]:
    """Whether the layer is ours, computes its weight, and is used as it was defined."""
    cls = type(module)
    library = cls.__module__.startswith("orthonet.") and hasattr(cls, "to_plain")
    return library and module_rule(module) is None and as_defined(module)
