"""Whether a model computes what its graph does, sample by sample."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.overrides import TorchFunctionMode

from orthonet import _checks
from orthonet._torch import tensors_in
from orthonet.certify.graph.export import FAILURES, refuse_export, samples_of
from orthonet.certify.graph.identity import fingerprint
from orthonet.certify.graph.marks import ROOT
from orthonet.certify.graph.program import Program
from orthonet.certify.graph.regions import autocast_region
from orthonet.certify.graph.replay import replay
from orthonet.errors import UncertifiableError

__all__ = ["check_samples_apart", "check_same_function", "run_once"]

_TOLERANCE = 1e-4  # of an entry: kernels may differ by batch size, branches differ more
_HALF_TOLERANCE = 2.0**-5  # in half precision, after several roundings
_CANCELED = 1e-11  # of the largest output, in float64, where float32 may have canceled


def _outputs(
    model: nn.Module, program: Program, size: int, gradients: bool = False
) -> list[Tensor]:
    leaves = [x[:size].detach().requires_grad_(gradients) for x in program.samples]
    with torch.set_grad_enabled(gradients):
        inputs = [leaf.clone() for leaf in leaves]  # which may be written to
        try:
            return [t.detach() for t in tensors_in(model(*inputs))]
        except FAILURES as error:
            refuse_export(model, inputs, ROOT, error, given=program.given)
            return []


def _close(
    a: list[Tensor], b: list[Tensor], tolerance: float = _TOLERANCE, floor: float = 0.0
) -> bool:
    """Whether outputs agree entry by entry, relative to the entry's largest of all samples."""
    if len(a) != len(b):
        return False
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape or x.dtype != y.dtype:
            return False
        size = torch.maximum(_finite(x), _finite(y))
        if size.ndim and len(size):
            size = size.amax(0, keepdim=True)
        least = floor * float(size.max()) if size.numel() else 0.0
        equal = (x == y) | ((x != x) & (y != y))
        if not bool((equal | (_finite(x - y) <= tolerance * size + least) & x.isfinite()).all()):
            return False
    return True


def _finite(x: Tensor) -> Tensor:
    return x.abs().double().nan_to_num(torch.inf, torch.inf, torch.inf)


def run_once(model: nn.Module, examples: tuple[Tensor, ...], autocast: torch.dtype | None) -> None:
    """Run the model, so that what it computes at the first call and keeps is in its graph."""
    inputs = samples_of(examples)
    region = autocast_region(inputs[0].device, autocast)
    with region, torch.no_grad(), contextlib.suppress(*FAILURES):  # the export says it better
        model(*inputs)


def check_same_function(model: nn.Module, program: Program) -> None:
    """Run the model with gradients and without, and its graph: all three must agree.

    Raises:
        UncertifiableError: They do not, or running the model changes something in it.
    """
    size = len(program.samples[0])
    before = fingerprint(model)  # it has run before: what is kept once is kept
    with autocast_region(program.samples[0].device, program.autocast):
        first, again = (_outputs(model, program, size, gradients) for gradients in (False, True))
    with torch.no_grad():
        traced = _run(program)
    tolerance = _TOLERANCE if program.autocast is None else _HALF_TOLERANCE
    _checks.require(
        (_close(first, again, tolerance) and _close(first, traced, tolerance))
        or _close_in_float64(model, program),
        "certify",
        "the model must be a function of its input alone",
        "Remove random numbers and state that forward reads or writes (gradient mode is one), and "
        "writing in place into the input of a module that has a rule",
        UncertifiableError,
    )
    after = fingerprint(model)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    _checks.require(
        not changed,
        "certify",
        "forward must change no attribute, buffer, counter or global, and read no clock, "
        "environment or random numbers",
        "Its output could depend on earlier calls: keep state out of forward in eval mode",
        UncertifiableError,
        changed=changed[:5],
    )


_WIDE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def _doubled(model: nn.Module) -> nn.Module:
    """A copy with parameters and buffers of twice the bits, complex ones included."""
    return copy.deepcopy(model)._apply(lambda t: t.to(_WIDE.get(t.dtype, t.dtype)))


class _Doubled(TorchFunctionMode):
    """New tensors get twice the bits, too: `torch.zeros(..., dtype=torch.cfloat)`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in _WIDE:
            kwargs["dtype"] = _WIDE[kwargs["dtype"]]
        return func(*args, **kwargs)


def _close_in_float64(model: nn.Module, program: Program) -> bool:
    """The same comparison where roundings are too small to hide or to make a difference."""
    if program.autocast is not None or program.samples[0].dtype != torch.float32:
        return False
    twin, inputs = _doubled(model), [x.double() for x in program.samples]
    found = []
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), _Doubled():
            try:
                leaves = [x.clone().requires_grad_(gradients).clone() for x in inputs]
                found.append([t.detach() for t in tensors_in(twin(*leaves))])
            except FAILURES:
                return False
    return _close(*found, floor=_CANCELED) and _close(
        found[0], [t.double() for t in _run(program, replay(program, inputs))], floor=_CANCELED
    )


def check_samples_apart(model: nn.Module, program: Program) -> None:
    """Run the model on one sample and on two: they must not see the others of their batch.

    Without autocast, whose roundings would hide a little of the others.

    Raises:
        UncertifiableError: They do, or the map depends on the batch size.
    """
    twin: nn.Module | None = None
    whole = _outputs(model, program, len(program.samples[0]))
    for size, gradients in ((1, False), (1, True), (2, False)):
        close = _close([t[:size] for t in whole], _outputs(model, program, size, gradients))
        if not close and program.samples[0].dtype == torch.float32:
            twin = twin or _doubled(model)
            samples, given = ([x.double() for x in xs] for xs in (program.samples, program.given))
            wide = replace(program, samples=tuple(samples), given=tuple(given))
            with _Doubled():
                large = _outputs(twin, wide, len(program.samples[0]))
                few = _outputs(twin, wide, size, gradients)
            close = _close([t[:size] for t in large], few, floor=_CANCELED)
        _checks.require(
            close,
            "certify",
            "the samples of a batch must not depend on each other or on their number",
            "A certificate is about single samples: keep forward without branches on "
            "the batch size, and without squeeze() of all dims",
            UncertifiableError,
            batch_size=size,
        )


def _run(program: Program, found: dict[fx.Node, Any] | None = None) -> list[Tensor]:
    """The outputs of the graph at the samples; `found` are values of its nodes."""
    env = dict(zip(program.inputs, program.samples, strict=True)) if found is None else found

    def value(node: fx.Node) -> Any:
        return env[node] if node in env else program.constants[node]

    for node in program.graph.nodes if found is None else ():
        if node.op == "call_function" and node not in env:
            args, kwargs = map_arg((node.args, node.kwargs), value)
            with program.region(node):
                env[node] = node.target(*args, **kwargs)
    return [value(node) for node in program.outputs]
