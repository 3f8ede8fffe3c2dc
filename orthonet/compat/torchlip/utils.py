"""Constraints of a tensor, and estimates of the constant from below."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from orthonet import _checks, constraints

__all__ = [
    "bjorck_norm",
    "evaluate_lip_const",
    "frobenius_norm",
    "remove_bjorck_norm",
    "remove_frobenius_norm",
    "sqrt_with_gradeps",
]


def bjorck_norm(module: nn.Module, name: str = "weight", eps: float = 1e-3) -> nn.Module:
    """Constrain a flattened kernel to be its polar factor, by `orthonet.constraints.orthogonal`."""
    _checks.in_range("bjorck_norm", 0.0, 1.0, eps=eps)
    return constraints.orthogonal(module, name, "polar", flatten=True)


class _Unit(nn.Module):
    """Divide a tensor by its norm."""

    def forward(self, w: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(w)
        return w / torch.where(norm > 0, norm, torch.ones_like(norm))


def frobenius_norm(
    module: nn.Module, name: str = "weight", disjoint_neurons: bool = True
) -> nn.Module:
    """Constrain the kernel of each output, or the whole tensor, to norm 1."""
    if disjoint_neurons:
        return constraints.unit_norm(module, name)
    nn.utils.parametrize.register_parametrization(module, name, _Unit())
    return module


def remove_bjorck_norm(module: nn.Module, name: str = "weight") -> nn.Module:
    """Remove a constraint and keep the present value."""
    nn.utils.parametrize.remove_parametrizations(module, name)
    return module


remove_frobenius_norm = remove_bjorck_norm


def sqrt_with_gradeps(input: Tensor, eps: float = 1e-6) -> Tensor:
    r"""Return the square root, with the derivative \(1 / (2 \sqrt{x} + \epsilon)\)."""
    root = input.detach().sqrt()
    slope = 1.0 / (2.0 * root + eps)
    return root + slope * (input - input.detach())


def evaluate_lip_const(
    model: nn.Module,
    x: Tensor | None = None,
    evaluation_type: str | Sequence[str] = "jacobian_norm",
    disjoint_neurons: bool = False,
    input_shape: Sequence[int] | None = None,
    expected_value: float | None = None,
    num_noisy_samples: int = 10,
    epsilon_noise: float = 1.0,
    num_iterations: int = 100,
    step_size: float = 1e-2,
    double_attack: bool = False,
) -> float:
    """Estimate the constant of a model from below, around some inputs.

    It proves nothing; `orthonet.certify(model, x)` proves a bound from above. Nothing is printed.

    Args:
        model: The model.
        x: Inputs (N, ...); drawn with `input_shape` if None.
        evaluation_type: "jacobian_norm", "noise_norm", "attack", "all" or a list of the first
            three, of which the largest estimate counts.
        disjoint_neurons: Whether each output counts on its own.
        input_shape: Shape of the inputs to draw.
        expected_value: Raise a `ValueError` if the estimate is above it.
        num_noisy_samples: Perturbations of "noise_norm".
        epsilon_noise: Their size.
        num_iterations: Steps of "attack".
        step_size: Their length.
        double_attack: Whether "attack" starts twice.

    Examples:
        >>> from orthonet.compat.torchlip import SpectralLinear
        >>> layer = SpectralLinear(4, 4, k_coef_lip=2.0)
        >>> round(evaluate_lip_const(layer, torch.zeros(1, 4)), 4)
        2.0
    """
    kinds = ("jacobian_norm", "noise_norm", "attack")
    if evaluation_type == "all":
        evaluation_type = kinds
    wanted = (evaluation_type,) if isinstance(evaluation_type, str) else tuple(evaluation_type)
    for kind in wanted:
        _checks.one_of("evaluate_lip_const", kinds, evaluation_type=kind)
    _checks.require(
        x is not None or input_shape is not None,
        "evaluate_lip_const",
        "x or input_shape must be given",
        "Pass a batch of inputs",
        x=x,
    )
    like = next(model.parameters(), torch.empty(0))
    points = torch.randn(*(input_shape or ())) if x is None else x
    points = points.detach().to(like.device)
    was_training = model.training
    model.eval()
    found = []
    for kind in wanted:
        if kind == "jacobian_norm":
            found.append(_steepest(model, points, disjoint_neurons))
        elif kind == "noise_norm":
            with torch.no_grad():
                for _ in range(num_noisy_samples):
                    scale = epsilon_noise * torch.rand(1, device=points.device)
                    noise = scale * torch.randn_like(points)
                    found.append(float(_slopes(model, points, noise, disjoint_neurons).max()))
        else:
            for _ in range(1 + double_attack):
                options = (num_iterations, step_size)
                found.append(_attack(model, points, disjoint_neurons, *options))
    model.train(was_training)
    largest = max(found)
    _checks.require(
        expected_value is None or largest <= expected_value,
        "evaluate_lip_const",
        "the estimate must not be above expected_value",
        "The constant is larger than expected: look at certify(model, x).report()",
        estimate=largest,
        expected_value=expected_value,
    )
    return largest


def _lengths(difference: Tensor, disjoint: bool) -> Tensor:
    rows = difference.flatten(1)
    return rows.abs().amax(1) if disjoint else torch.linalg.vector_norm(rows, dim=1)


def _slopes(model: nn.Module, x: Tensor, noise: Tensor, disjoint: bool) -> Tensor:
    """Return the lengths of the changes of outputs over those of inputs, (N,)."""
    change = model(x + noise) - model(x)
    return _lengths(change, disjoint) / torch.linalg.vector_norm(noise.flatten(1), dim=1)


def _steepest(model: nn.Module, x: Tensor, disjoint: bool) -> float:
    found = 0.0
    for row in x:
        matrix = torch.func.jacrev(lambda r: model(r[None]).flatten())(row).flatten(1).detach()
        norms = torch.linalg.vector_norm(matrix, dim=1) if disjoint else None
        norm = torch.linalg.matrix_norm(matrix, 2) if norms is None else norms.max()
        found = max(found, float(norm))
    return found


def _attack(
    model: nn.Module, x: Tensor, disjoint: bool, num_iterations: int, step_size: float
) -> float:
    noise = torch.randn_like(x) * max(1e-3, float(torch.rand(1)))
    found = 0.0
    for _ in range(num_iterations + 1):
        noise.requires_grad_()
        slopes = _slopes(model, x, noise, disjoint)
        found = max(found, float(slopes.detach().max()))
        (grad,) = torch.autograd.grad(slopes.mean(), noise)
        noise = (noise + step_size * grad.sign()).detach()
    return found if math.isfinite(found) else math.inf
