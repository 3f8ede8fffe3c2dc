"""The multipliers of a chain of affine maps and activations, for the checker's LipSDP."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from orthonet.certify.mlp.chain import Affine, Chain
from orthonet.certify.mlp.lipsdp import closed_form, descend
from orthonet.certify.mlp.multipliers import prove
from orthonet.certify.mlp.slopes import Activation
from orthonet.linalg.bounds.rounding import mul_up, power_of_two_scale

if TYPE_CHECKING:
    from orthonet.certify.proof.nodes import Nodes
    from orthonet.certify.walk.state import State

__all__ = ["ChainWitness", "chain_witness"]

_RISING = (
    "relu",
    "tanh",
    "sigmoid",
    "atan",
    "asinh",
    "log_sigmoid",
    "softsign",
    "tanhshrink",
    "softshrink",
    "clamp",
    "clamp_min",
    "clamp_max",
    "hardsigmoid",
    "selu",
)
_BOTH_SIGNS = ("abs", "sin", "cos", "hardswish")
_ROOM = (2.0**-18, 2.0**-14, 2.0**-10)
"""How much the squared gain lies above the proved one, so that the matrix is positive definite."""
_SHIFT = 2.0**-27
"""Its smallest eigenvalue at least: twice what the checker needs."""


class ChainWitness(NamedTuple):
    """The gain of a chain, the node that it starts from, and a multiplier for each unit."""

    gain: float
    start: State
    multipliers: list[Tensor]


def chain_witness(writer: Nodes, end: State) -> ChainWitness | None:
    """The witness of the chain that ends in a node, if the checker can prove it."""
    walker = writer.walker
    chain = walker.chains[end]
    if chain is None or chain.bound.method.startswith("product"):
        return None
    affine: list[Affine] = []
    slopes: list[Activation] = []
    current = end
    while True:
        source = current.source
        island = None if source is None else walker.matrix_of(current)
        if source is None or island is None:
            return None
        affine.insert(0, Affine(island.matrix, None, island.error))
        if source is chain.start:
            break
        activation = _slopes_of(writer, source)
        if activation is None or not source.parents:
            return None
        slopes.insert(0, activation)
        current = source.parents[0]
    normal = Chain.build(affine, slopes)
    if normal.constant or not slopes:
        return None
    found = closed_form(normal)
    if found is not None and chain.bound.method.startswith("LipSDP"):
        found = descend(normal, found)
    proof = None if found is None else prove(normal, found)
    if found is None or proof is None:
        return None
    return _with_room(affine, slopes, found, mul_up(proof.constant, normal.scale), chain.start)


def _slopes_of(writer: Nodes, state: State) -> Activation | None:
    """The slopes of a node of the file, as the checker knows them."""
    node = writer.nodes[writer.index(state)]
    if node["op"] != "activation":
        return None
    name, largest = node["function"], float.fromhex(node["gain"])
    numbers = [float.fromhex(p) for p in node["parameters"]]
    if name == "leaky_relu":
        low, high = min(1.0, *numbers), max(1.0, *numbers)
    elif name in _RISING or (name == "elu" and numbers[0] >= 0):
        low, high = 0.0, largest
    elif name in _BOTH_SIGNS or name == "elu":
        low, high = -largest, largest
    else:
        return None
    if not low < high:
        return None
    size = (torch.Size(state.shape).numel(),)
    below, above = (torch.full(size, v, dtype=torch.float64) for v in (low, high))
    return Activation(torch.relu, below, above)  # the function is not read, only its slopes are


def _with_room(
    affine: list[Affine], slopes: list[Activation], found: list[Tensor], gain: float, start: State
) -> ChainWitness | None:
    """In the units of the layers as they are, with the least room that the checker will need."""
    scale, units = 1.0, []
    for layer, mu in zip(affine, found, strict=False):
        scale *= power_of_two_scale(layer.weight) or 1.0
        units.append(mu * scale**2)
    for room in _ROOM:
        square = gain**2 * (1.0 + room)
        multipliers = [square / unit for unit in units]
        if _is_positive(affine, slopes, multipliers, square):
            return ChainWitness(square**0.5 * (1.0 + 2.0**-50), start, multipliers)
    return None


def _is_positive(
    affine: list[Affine], slopes: list[Activation], multipliers: list[Tensor], square: float
) -> bool:
    """Whether the matrix of the checker, scaled to a diagonal of about 1, is positive definite."""
    weights = [torch.full((affine[0].weight.shape[1],), square, dtype=torch.float64), *multipliers]
    scales = [torch.exp2(-(w.log2() / 2).round()) for w in weights]
    q = [[torch.zeros(len(a), len(b), dtype=torch.float64) for b in weights] for a in weights]
    for i, (w, s) in enumerate(zip(weights, scales, strict=True)):
        q[i][i] += torch.diag(w * s * s)
    for i, (layer, s) in enumerate(zip(affine, scales, strict=True)):
        b = layer.weight * s
        if i == len(slopes):
            q[i][i] -= b.mT @ b
            break
        low, high = slopes[i].lower[0], slopes[i].upper[0]
        cross = (low + high) / 2 * (multipliers[i] * scales[i + 1])[:, None] * b
        q[i + 1][i] -= cross
        q[i][i + 1] -= cross.mT
        q[i][i] += low * high * b.mT @ (multipliers[i][:, None] * b)
    whole = torch.cat([torch.cat(row, 1) for row in q])
    return int(torch.linalg.cholesky_ex(whole - _SHIFT * torch.eye(len(whole)).double())[1]) == 0
