"""Bounds of multilayer perceptrons that beat the product of the norms."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.certify._bound import Bound
from orthonet.certify._radius import pairwise_constants
from orthonet.certify.mlp.chain import Chain, Layer, read_layers
from orthonet.certify.mlp.lipsdp import closed_form, descend
from orthonet.certify.mlp.multipliers import Proof, prove
from orthonet.linalg.bounds.enclosure import spectral_norm_bound
from orthonet.linalg.bounds.rounding import UNIT_ROUNDOFF, add_up, mul_up, up

__all__ = ["EFFORTS", "MLPBound", "chain_bound", "mlp_bound"]

EFFORTS = ("fast", "default", "tight")
_BLENDS = (1e-9, 1e-6, 1e-4, 1e-2, 0.1, 0.5)
_MOST_PAIRS = 4096


@dataclass(frozen=True, eq=False)
class MLPBound:
    """A proved bound of a multilayer perceptron.

    Attributes:
        constant: The bound.
        pairs: Bounds of the constants of all differences of two outputs, (outputs, outputs), or
            None for one output and for more than 4096.
        method: How the bound was obtained.
        product: The proved product of the norms, to compare with.
        seconds: The time that the proof took.
    """

    constant: Bound
    pairs: Tensor | None = field(repr=False)
    method: str
    product: float
    seconds: float


def mlp_bound(layers: Layer | Iterable[Layer], *, effort: str = "tight") -> MLPBound:
    r"""Prove a bound of the l2 Lipschitz constant of a chain of linear maps and activations.

    LipSDP couples all layers through the slopes of the activations: if diagonal multipliers make a
        certain matrix positive semidefinite, a number is a bound. The multipliers come from a
        closed form (ECLipsE-Fast, extended to any slopes) or from a descent that starts there.
        Outward-rounded float64 arithmetic then *proves* the inequality for them, whatever the
        search did. If the proof fails, they are blended with the multipliers of the closed form.
        The result is never larger than the product of the norms.

    Activations may have any known interval of slopes, of either sign, one for each unit. MaxMin,
    GroupSort and Householder activations enter as an orthogonal change of the basis: directions
    that they leave alone have slope 1, and directions that they reflect have slopes in [-1, 1].

    Args:
        layers: An `nn.Sequential` in eval mode or an iterable of modules, of
            [`Affine`][orthonet.certify.Affine] maps and of
            [`Activation`][orthonet.certify.Activation] objects: linear layers, `BatchNorm1d`,
            and entrywise activations, in the order of their calls.
        effort: `"fast"`: the product of norms; `"default"`: the closed form, one pass;
            `"tight"`: the descent (about a second for five layers of 64 units; wide networks share
                a limit of work).

    Guarantee:
        Upper bound in exact arithmetic with the given floats, on all inputs.

    Raises:
        UncertifiableError: A layer is neither linear nor a known activation, is in train mode, or
            its weights are not finite.
        ValueError: There is no layer, or `effort` is unknown.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
        >>> found = mlp_bound(model)
        >>> found.constant.value <= found.product
        True

    References:
        M. Fazlyab et al., Efficient and accurate estimation of Lipschitz constants for deep neural
        networks, NeurIPS 2019. Y. Xu, S. Sivaranjani, ECLipsE, NeurIPS 2024. P. Pauli et al.,
        Novel quadratic constraints for extending LipSDP beyond slope-restricted activations,
        ICLR 2024.
    """
    _checks.one_of("mlp_bound", EFFORTS, effort=effort)
    start = time.perf_counter()
    affine, activations = read_layers(layers, "mlp_bound")
    chain = Chain.build(affine, activations)
    return chain_bound(chain, effort, start)


@torch.no_grad()
def chain_bound(chain: Chain, effort: str, start: float | None = None) -> MLPBound:
    """The bound of a chain in normal form."""
    start = time.perf_counter() if start is None else start
    outputs = chain.weights[-1].shape[0]
    if chain.constant:
        pairs = torch.zeros(outputs, outputs, dtype=torch.float64) if outputs > 1 else None
        done = time.perf_counter() - start
        return MLPBound(Bound(0.0, kind="exact"), pairs, "constant", 0.0, done)
    product, features = _product(chain)
    method, proof = "product of norms", None
    if len(chain.weights) > 1 and effort != "fast":
        method, proof = _best(chain, effort)
    value = product
    pairs = None
    if outputs > 1:
        pairs = pairwise_constants(chain.weights[-1], features, value)
        if pairs is not None:
            slack = mul_up(2.0, chain.errors[-1], features)
            pairs = ((pairs + slack) * (1.0 + 2.0**-51)) if slack else pairs
    if proof is not None and proof.constant < product:
        value = proof.constant
    else:
        method = "product of norms"
    if proof is not None and pairs is not None:
        pairs = torch.minimum(pairs, _pairs(proof))
    value = mul_up(value, chain.scale)
    if pairs is not None:
        pairs = (pairs * chain.scale) * (1.0 + 2.0**-51)
        pairs = pairs.clamp(max=mul_up(up(2.0**0.5), value))
        pairs.fill_diagonal_(0.0)
    kind = "exact" if len(chain.weights) == 1 else "upper"
    return MLPBound(
        Bound(value, kind=kind),
        pairs,
        "matrix, verified" if kind == "exact" else method,
        mul_up(product, chain.scale),
        time.perf_counter() - start,
    )


def _pairs(proof: Proof) -> Tensor:
    """The bounds of all differences of two outputs, without the scale of the chain."""
    diagonal = proof.gram.diagonal()
    squares = diagonal[:, None] + diagonal - 2.0 * proof.gram
    # |e_y - e_j|^2 = 2; then the roundings of three sums, of the root, and of this.
    slack = 2.0 * proof.error + 8 * UNIT_ROUNDOFF * (diagonal[:, None] + diagonal)
    return (squares.clamp_min(0.0) + slack).sqrt() * (1.0 + 2.0**-50)


def _product(chain: Chain) -> tuple[float, float]:
    """The product of the norms: of the whole, and of all but the last map."""
    features, whole = 1.0, 1.0
    for i, (weight, error) in enumerate(zip(chain.weights, chain.errors, strict=True)):
        features = whole
        if i:
            low, high = chain.lower[i - 1], chain.upper[i - 1]
            features = mul_up(features, float(torch.maximum(low.abs(), high.abs()).max()))
        whole = mul_up(features, add_up(spectral_norm_bound(weight), error))
    return whole, features


def _best(chain: Chain, effort: str) -> tuple[str, Proof | None]:
    """The best proof that is found, and how."""
    start = closed_form(chain)
    if start is None:
        return "product of norms", None
    closed = prove(chain, start)
    method = "ECLipsE-Fast, proved"
    if effort != "tight":
        return method, closed
    found = descend(chain, start)
    proof = prove(chain, found)
    for share in _BLENDS:
        # The 1 / mu that prove some bound are a convex set, jointly with 1 / the squared bound.
        if proof is not None or closed is None:
            break
        proof = prove(chain, [_blend(x, y, share) for x, y in zip(found, start, strict=True)])
    if proof is None or (closed is not None and closed.constant <= proof.constant):
        return method, closed
    return "LipSDP-neuron, proved", proof


def _blend(first: Tensor, second: Tensor, share: float) -> Tensor:
    return first.reciprocal().lerp(second.reciprocal(), share).reciprocal()
