"""Whether a model computes what its graph does, sample by sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from orthonet import _checks
from orthonet.certify._export import FAILURES, refuse_export
from orthonet.certify._marks import ROOT
from orthonet.certify._program import Program
from orthonet.certify._regions import autocast_region
from orthonet.errors import UncertifiableError

__all__ = ["check_samples_apart", "check_same_function"]

_TOLERANCE = 1e-4  # of the largest output: kernels may differ by batch size, branches differ more
_HALF_TOLERANCE = 2.0**-5  # of outputs in half precision, after several roundings


def _outputs(
    model: nn.Module, program: Program, size: int, gradients: bool = False
) -> list[Tensor]:
    leaves = [x[:size].detach().requires_grad_(gradients) for x in program.samples]
    with torch.set_grad_enabled(gradients):
        inputs = [leaf.clone() for leaf in leaves]  # which may be written to
        try:
            return [t.detach() for t in _flat(model(*inputs))]
        except FAILURES as error:
            refuse_export(model, inputs, ROOT, error)
            return []


def _close(a: list[Tensor], b: list[Tensor], tolerance: float = _TOLERANCE) -> bool:
    finite = [t[t.isfinite()] for t in a]
    scale = max([float(t.abs().max()) for t in finite if t.numel()], default=0.0)
    return len(a) == len(b) and all(
        x.shape == y.shape
        and x.dtype == y.dtype
        and torch.allclose(x, y, rtol=0, atol=tolerance * scale, equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


def check_same_function(model: nn.Module, program: Program) -> None:
    """Run the model with gradients and without, and its graph: all three must agree.

    Raises:
        UncertifiableError: They do not.
    """
    size = len(program.samples[0])
    with autocast_region(program.samples[0].device, program.autocast):
        first, again = (_outputs(model, program, size, gradients) for gradients in (False, True))
    with torch.no_grad():
        traced = _run(program)
    tolerance = _TOLERANCE if program.autocast is None else _HALF_TOLERANCE
    _checks.require(
        _close(first, again, tolerance) and _close(first, traced, tolerance),
        "certify",
        "the model must be a function of its input alone",
        "Remove random numbers and state that forward reads or writes (gradient mode is one), and "
        "writing in place into the input of a module that has a rule",
        UncertifiableError,
    )


def check_samples_apart(model: nn.Module, program: Program) -> None:
    """Run the model on one sample and on two: they must not see the others of their batch.

    Without autocast, whose roundings would hide a little of the others.

    Raises:
        UncertifiableError: They do, or the map depends on the batch size.
    """
    whole = _outputs(model, program, len(program.samples[0]))
    for size, gradients in ((1, False), (1, True), (2, False)):
        _checks.require(
            _close([t[:size] for t in whole], _outputs(model, program, size, gradients)),
            "certify",
            "the samples of a batch must not depend on each other or on their number",
            "A certificate is given for each sample on its own: keep forward without branches on "
            "the batch size, and without squeeze() of all dims",
            UncertifiableError,
            batch_size=size,
        )


def _run(program: Program) -> list[Tensor]:
    env: dict[fx.Node, Any] = dict(zip(program.inputs, program.samples, strict=True))

    def value(node: fx.Node) -> Any:
        return env[node] if node in env else program.constants[node]

    for node in program.graph.nodes:
        if node.op == "call_function" and node not in env:
            args, kwargs = map_arg((node.args, node.kwargs), value)
            with program.region(node):
                env[node] = node.target(*args, **kwargs)
    return [value(node) for node in program.outputs]


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [t for v in value for t in _flat(v)] if isinstance(value, (tuple, list)) else []
