"""Recognize a model that nobody has trained, by the distribution of its weights."""

from __future__ import annotations

from torch import Tensor, nn

from orthonet.convert._replace import CONVERTIBLE

__all__ = ["is_untrained"]

_ENOUGH = 1000  # entries of a weight that is judged
_STDS = (0.01, 0.02)  # fixed ones that models draw by
# Kurtosis, and the standard errors of kurtosis and relative variance, times the root of the number
_UNIFORM = (1.8, 1.15, 0.9)
_NORMAL = (3.0, 4.9, 1.42)


def is_untrained(model: nn.Module) -> bool:
    """Return whether all larger weights that can be converted are as `torch.nn.init` draws them.

    That is the default of the layer, or Kaiming's or Xavier's, uniform or normal: mean, variance
    and kurtosis are those of the distribution, to six standard errors. False if no weight is large
    enough to be judged.
    """
    found = False
    for module in model.modules():
        if type(module) not in CONVERTIBLE:
            continue
        for weight in module.parameters(recurse=False):
            if weight.is_meta or weight.ndim < 2 or weight.numel() < _ENOUGH:
                continue
            value = weight.detach().double()
            drawn = _is_drawn(value, getattr(module, "hidden_size", None))
            if not drawn or _has_orthogonal_rows(value):
                return False
            found = True
    return found


def _has_orthogonal_rows(weight: Tensor) -> bool:
    """Whether channels out, or in, are orthogonal: an exported model of ours keeps its weights."""
    for rows in (weight[:8].flatten(1), weight.transpose(0, 1)[:8].flatten(1)):
        gram = rows @ rows.mT
        off = gram - gram.diag().diag()
        if len(gram) > 1 and bool((off.abs() <= 1e-3 * gram[0, 0]).all()):
            return True
    return False


def _is_drawn(w: Tensor, hidden: int | None) -> bool:
    rows, columns, n = len(w), w[0].numel(), w.numel()
    fan_in, fan_out = columns, rows * columns // w.shape[1]
    square = w.square()
    variance, kurtosis = float(square.mean()), float(square.square().mean())
    if variance == 0.0 or abs(float(w.mean())) > 6 * (variance / n) ** 0.5:
        return False
    kurtosis /= variance**2
    common = [2 / fan_in, 2 / fan_out, 2 / (fan_in + fan_out), 1 / fan_in, 1 / fan_out]
    uniform = [*common, 1 / (3 * fan_in), *([1 / (3 * hidden)] if hidden else [])]
    normal = [*common, *(std**2 for std in _STDS)]
    largest = float(w.abs().max())
    if abs(kurtosis - _UNIFORM[0]) <= 6 * _UNIFORM[1] / n**0.5:
        near = [v for v in uniform if abs(variance / v - 1) <= 6 * _UNIFORM[2] / n**0.5]
        return any(largest <= (3 * v) ** 0.5 * (1 + 1e-3) for v in near)  # a step leads beyond
    if abs(kurtosis - _NORMAL[0]) <= 6 * _NORMAL[1] / n**0.5:
        return any(abs(variance / v - 1) <= 6 * _NORMAL[2] / n**0.5 for v in normal)
    return False
