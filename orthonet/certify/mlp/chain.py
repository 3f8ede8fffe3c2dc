"""Chains of affine maps and activations, in the normal form that the semidefinite bounds need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from orthonet import _checks, layers
from orthonet._torch import has_global_forward_hooks, is_hooked
from orthonet.certify.mlp.slopes import Activation
from orthonet.certify.ops.activations import activation_of, jumps_in_float64
from orthonet.errors import UncertifiableError
from orthonet.linalg.bounds.rounding import (
    UNDERFLOW,
    add_up,
    gamma,
    mul_up,
    power_of_two_scale,
    sqrt_up,
    squared_norm_up,
)

__all__ = ["Affine", "Chain", "Layer", "frobenius_up", "read_layers", "rotated"]


@dataclass(frozen=True, eq=False)
class Affine:
    r"""The map $x \mapsto A x + c$ of vectors, A known up to $\|A - W\|_2 \le$ `error`.

    Attributes:
        weight: W, (out, in).
        bias: b, (out,), or None for 0.
        error: Bound of the spectral norm of A - W, for matrices that were computed.
        bias_error: Bound of the l2 norm of c - b.
    """

    weight: Tensor
    bias: Tensor | None = None
    error: float = 0.0
    bias_error: float = 0.0

    def then(self, after: Affine) -> Affine:
        """The composition, this map first; what the product rounds is in the errors."""
        first, second = frobenius_up(self.weight), frobenius_up(after.weight)
        count = self.weight.shape[0]
        underflow = mul_up(sqrt_up(after.weight.shape[0] * self.weight.shape[1]), count * UNDERFLOW)
        error = add_up(
            mul_up(gamma(count + 2), first, second),
            mul_up(second, self.error),
            mul_up(after.error, add_up(first, self.error)),
            underflow,
        )
        bias = after.weight @ self.offset() + after.offset()
        start = frobenius_up(self.offset())
        bias_error = add_up(
            mul_up(gamma(count + 3), add_up(mul_up(second, start), frobenius_up(after.offset()))),
            mul_up(add_up(second, after.error), self.bias_error),
            mul_up(after.error, start),
            after.bias_error,
            count * UNDERFLOW,
        )
        return Affine(after.weight @ self.weight, bias, error, bias_error)

    def offset(self) -> Tensor:
        """The bias as a vector."""
        if self.bias is None:
            return torch.zeros(self.weight.shape[0], dtype=torch.float64)
        return self.bias


def frobenius_up(tensor: Tensor) -> float:
    """Not less than the Frobenius norm of a float64 tensor, whatever its scale."""
    scale = power_of_two_scale(tensor)
    return mul_up(sqrt_up(squared_norm_up(tensor / scale)), scale) if scale else 0.0


@dataclass(frozen=True, eq=False)
class Chain:
    r"""$x \mapsto A_k \phi_{k-1}(\dots \phi_1(A_1 x))$ in differences, normalized.

    The Jacobian between any two points is $s\,A_k \Theta_{k-1} \cdots \Theta_1 A_1$ with diagonal
    (or, for groups, block) matrices $\Theta$ of slopes: bases are multiplied into the matrices,
    powers of two are taken out, and units of slope 0 are removed.

    Attributes:
        weights: The matrices, entries of modulus below 2.
        errors: Bounds of the spectral norm of what `weights` are off.
        lower: Smallest slopes of each layer but the last.
        upper: Largest slopes.
        groups: Group ids of each layer but the last, or None.
        scale: s, rounded upward.
    """

    weights: Sequence[Tensor]
    errors: tuple[float, ...]
    lower: tuple[Tensor, ...]
    upper: tuple[Tensor, ...]
    groups: tuple[Tensor | None, ...]
    scale: float

    @classmethod
    def build(
        cls,
        affine: Sequence[Affine],
        activations: Sequence[Activation],
        slopes: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> Chain:
        """The normal form; `slopes` replace those of the activations (in their bases)."""
        if slopes is None:
            slopes = [(act.lower, act.upper) for act in activations]
        alive: list[Tensor] = [(low != 0) | (high != 0) for low, high in slopes]
        weights, errors, scale = [], [], 1.0
        for i, layer in enumerate(affine):
            weight, error = layer.weight, layer.error
            size = power_of_two_scale(weight)
            if size:
                scale = mul_up(scale, size)
                weight = weight / size
                error = mul_up(error, 1.0 / size)
                error = add_up(error, sqrt_up(weight.numel()) * UNDERFLOW)
            for act, side in ((activations[i - 1] if i else None, 1), (_at(activations, i), 0)):
                if act is not None:
                    weight, error = rotated(weight, error, act, side)
            if i:
                weight = weight[:, alive[i - 1]]
            if i < len(alive):
                weight = weight[alive[i]]
            weights.append(weight.contiguous())
            errors.append(error)
        groups = [
            None if act.groups is None else act.groups[keep]
            for act, keep in zip(activations, alive, strict=True)
        ]
        low = tuple(s[0][keep] for s, keep in zip(slopes, alive, strict=True))
        high = tuple(s[1][keep] for s, keep in zip(slopes, alive, strict=True))
        return cls(tuple(weights), tuple(errors), low, high, tuple(groups), scale)

    @property
    def constant(self) -> bool:
        """Whether no difference reaches the output."""
        return any(0 in weight.shape for weight in self.weights)

    @property
    def open_ended(self) -> Chain:
        """The same without the last slopes, where there are as many as matrices."""
        count = len(self.weights) - 1
        return replace(
            self, lower=self.lower[:count], upper=self.upper[:count], groups=self.groups[:count]
        )


def _at(activations: Sequence[Activation], i: int) -> Activation | None:
    return activations[i] if i < len(activations) else None


def rotated(weight: Tensor, error: float, act: Activation, side: int) -> tuple[Tensor, float]:
    """Q W (side 0) or W Q^T (side 1), with the error of the result; W if there is no basis Q."""
    basis = act.basis
    if basis is None:
        return weight, error
    terms = int((basis != 0).sum(1).max())
    norm = frobenius_up(weight)
    error = add_up(
        error,
        mul_up(add_up(norm, error), act.basis_error),
        # | |Q| |W| |_F <= sqrt(terms) |W|_F, for Q is made of blocks with `terms` unit rows
        mul_up(gamma(terms + 3), sqrt_up(2 * terms), norm),
        sqrt_up(weight.numel()) * weight.shape[side] * UNDERFLOW,
    )
    return (basis @ weight if side == 0 else weight @ basis.mT), error


Layer = nn.Module | Affine | Activation


def read_layers(
    model: Layer | Iterable[Layer], owner: str, *, whole: bool = False
) -> tuple[list[Affine], list[Activation]]:
    """Alternating affine maps and activations, beginning and ending with an affine map.

    Neighboring affine maps are composed; identities are put between neighboring activations. An
    activation at the end is bounded by its largest slopes; with `whole` an identity follows it.
    """
    affine: list[Affine] = []
    activations: list[Activation] = []
    for layer in _flat(model, owner):
        if isinstance(layer, nn.Module):
            layer = _read_module(layer, affine, activations, owner)
            if layer is None:
                continue
        if isinstance(layer, Affine):
            layer = _float64(layer, owner)
            if len(affine) > len(activations):
                _fits(owner, affine[-1], layer)
                affine[-1] = affine[-1].then(layer)
            else:
                if affine:
                    _fits(owner, affine[-1], layer)
                affine.append(layer)
        else:
            if len(affine) == len(activations):
                affine.append(_diagonal(torch.ones_like(layer.lower)))
            activations.append(layer)
    _checks.require(
        bool(affine),
        owner,
        "there must be at least one linear layer",
        "Pass the layers of a multilayer perceptron",
        layers=model,
    )
    if len(affine) == len(activations) and whole:
        affine.append(_diagonal(torch.ones_like(activations[-1].lower)))
    elif len(affine) == len(activations):
        # |phi(u) - phi(v)| <= max slope |u - v| entry by entry, in the basis; Q keeps norms.
        last = activations.pop()
        size = last.largest
        plain = last.basis is None and last.groups is None
        size = size if plain else size.max().expand_as(size)
        affine[-1] = affine[-1].then(_diagonal(size))
    return affine, activations


def _diagonal(entries: Tensor) -> Affine:
    return Affine(torch.diag(entries))


def _fits(owner: str, before: Affine, after: Affine) -> None:
    _checks.require(
        before.weight.shape[0] == after.weight.shape[1],
        owner,
        f"a layer must take the {before.weight.shape[0]} outputs of the one before it",
        "Pass the layers in the order of their calls",
        weight=after.weight,
    )


_CALLED = ("forward", "__call__", "__iter__", "__getitem__")


def _hooked(module: nn.Module) -> bool:
    """Whether calling the module is more than its class says."""
    if is_hooked(module) or has_global_forward_hooks() or "forward" in vars(module):
        return True
    return type(module).__call__ is not nn.Module.__call__


def _flat(model: Layer | Iterable[Layer], owner: str) -> Iterable[Layer]:
    """The layers in the order of their calls: of a Sequential that calls one after the other."""
    _checks.require(
        isinstance(model, (nn.Module, Affine, Activation))
        or (isinstance(model, Iterable) and not isinstance(model, (str, bytes, Tensor, dict))),
        owner,
        "layers must be an nn.Sequential, or an iterable of modules, Affine and Activation",
        "Pass the chain, e.g. nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))",
        layers=model,
    )
    if isinstance(model, nn.Sequential):
        own = [n for n in _CALLED if getattr(type(model), n) is not getattr(nn.Sequential, n)]
        _checks.require(
            not own and not _hooked(model),
            owner,
            "a chain must call its layers in turn, without a forward or hooks of its own",
            "Pass the layers in the order of their calls, or certify the model",
            UncertifiableError,
            model=type(model).__name__,
        )
    if isinstance(model, nn.Sequential) or not isinstance(model, (nn.Module, Affine, Activation)):
        for layer in model:
            yield from _flat(layer, owner)
    else:
        yield model


def _read_module(
    module: nn.Module, affine: list[Affine], activations: list[Activation], owner: str
) -> Affine | Activation | None:
    _checks.require(
        not module.training,
        owner,
        "every module must be in eval mode",
        "Call model.eval() first",
        UncertifiableError,
        module=type(module).__name__,
    )
    hooked = _hooked(module)
    known = (nn.Linear.forward, layers.OrthoLinear.forward)
    if isinstance(module, nn.Linear) and type(module).forward in known and not hooked:
        bias = None if module.bias is None else module.bias.detach()
        return Affine(module.weight.detach(), bias)
    if type(module) in (nn.Dropout, nn.AlphaDropout, nn.Flatten, nn.Identity) and not hooked:
        return None  # on vectors the identity, in eval
    if type(module) is nn.BatchNorm1d and not hooked:
        mean, variance = module.running_mean, module.running_var
        if mean is not None and variance is not None:
            return _batch_norm(module, mean, variance)
    width = affine[-1].weight.shape[0] if affine else 0
    if isinstance(module, layers.HouseholderActivation) and not affine:
        width = module.channels
    found = None if hooked or not width else activation_of(module, width)
    if type(module) is nn.Softplus and affine and affine[-1].weight.dtype == torch.float64:
        _checks.require(
            not jumps_in_float64(module.threshold),
            owner,
            "softplus of float64 must have threshold >= 34, for it jumps at the threshold",
            "Use threshold=40, or a model in float32",
            UncertifiableError,
            threshold=module.threshold,
        )
    if found is None:
        _checks.fail(
            owner,
            "every layer must be linear or an activation whose slopes are known, the first one "
            "linear",
            "Use certify, which bounds any module, or pass Affine and Activation objects",
            UncertifiableError,
            layer=module,
        )
    return found


def _batch_norm(module: nn.BatchNorm1d, mean: Tensor, variance: Tensor) -> Affine:
    variance = variance.detach().to("cpu", torch.float64)
    mean = mean.detach().to("cpu", torch.float64)
    scale = (variance + module.eps).rsqrt()
    shift = torch.zeros_like(mean)
    if module.weight is not None:
        scale = scale * module.weight.detach().to("cpu", torch.float64)
    if module.bias is not None:
        shift = module.bias.detach().to("cpu", torch.float64)
    rounding = gamma(8)  # two roundings and those of rsqrt
    largest = float(scale.abs().max())
    moved = mul_up(rounding, add_up(frobenius_up(shift), mul_up(largest, frobenius_up(mean))))
    return Affine(
        torch.diag(scale), shift - mean * scale, mul_up(rounding, largest), mul_up(2.0, moved)
    )


def _float64(layer: Affine, owner: str) -> Affine:
    weight, bias = layer.weight, layer.bias
    _checks.require(
        weight.ndim == 2 and weight.is_floating_point() and 0 not in weight.shape,
        owner,
        "a weight must be a real matrix (out, in)",
        "Flatten the input first",
        weight=weight,
    )
    weight = weight.detach().to("cpu", torch.float64)
    bias = None if bias is None else bias.detach().to("cpu", torch.float64)
    finite = bool(weight.isfinite().all()) and (bias is None or bool(bias.isfinite().all()))
    _checks.require(
        finite and math.isfinite(layer.error),
        owner,
        "weights must be finite",
        "Look for the step of the training that made a NaN or an infinity",
        UncertifiableError,
        weight=weight,
    )
    return Affine(weight, bias, layer.error, layer.bias_error)
