"""The exported graph of a model, run in float64 with its deployed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from orthonet.certify.graph.marks import mark_of
from orthonet.certify.graph.program import BATCH, Program, op_name
from orthonet.certify.graph.regions import CASTS
from orthonet.certify.rules import BatchDependent

__all__ = ["Replay", "replay"]

_CHECKS = {"_assert_tensor_metadata"}  # of the dtype that the model was exported in


def replay(program: Program, inputs: Sequence[Tensor]) -> dict[fx.Node, Any]:
    """The value of every node of the graph at a batch of inputs, in float64 on the CPU."""
    env: dict[fx.Node, Any] = dict(zip(program.inputs, inputs, strict=True))
    size = len(inputs[0])

    def value(node: fx.Node) -> Any:
        if node in env:
            return env[node]
        found = program.constants[node]
        if isinstance(found, BatchDependent):
            if isinstance(found.value, int):
                return found.value * size // BATCH
            rows = found.value[:1] if found.rows else None
            found = found.value if rows is None else rows.expand(size, *rows.shape[1:])
        if isinstance(found, Tensor):
            found = found.detach().cpu()
            if found.is_complex():
                return found.to(torch.complex128)
            return found.double() if found.is_floating_point() else found
        return found

    for node in program.graph.nodes:
        if node.op != "call_function" or node in program.constants or op_name(node) in _CHECKS:
            continue
        args, kwargs = map_arg((node.args, node.kwargs), value)
        if "dtype" in kwargs and getattr(kwargs["dtype"], "is_floating_point", False):
            kwargs = {**kwargs, "dtype": torch.float64}
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        casts = op_name(node) in CASTS and isinstance(node.meta.get("val"), Tensor)
        if mark_of(node) is not None:
            env[node] = args[0]
        elif casts and node.meta["val"].is_floating_point():
            env[node] = args[0].double()
        else:
            env[node] = node.target(*args, **kwargs)
    return env


class Replay(nn.Module):
    """The model as a function from one flat vector a sample to one, in float64."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.shapes = [tuple(n.meta["val"].shape[1:]) for n in program.inputs]

    def split(self, x: Tensor) -> list[Tensor]:
        """The inputs of the model, from one row for each sample."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        parts = x.split(sizes, 1)
        return [p.reshape(len(x), *s) for p, s in zip(parts, self.shapes, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        """All outputs in one row for each sample, (N, n) -> (N, m)."""
        env = replay(self.program, self.split(x))
        outputs = []
        for node in self.program.outputs:
            if node in env:
                outputs.append(env[node].reshape(len(x), -1))
        return torch.cat(outputs, 1) if outputs else x.new_zeros(len(x), 1)
