"""Singular values of the layers of a network, as linear operators on their real inputs."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet._torch import conv_forward

__all__ = ["Spectrum", "layer_spectra"]

_LARGEST = 3200  # entries of an input whose dense operator is decomposed: a few seconds


class Spectrum(NamedTuple):
    """The singular values of one layer, largest first, and of which operator they are."""

    layer: str
    operator: str
    values: list[float]


@torch.no_grad()
def layer_spectra(model: nn.Module, example: Tensor) -> list[Spectrum]:
    """Singular values of the dense operator of every linear and 2-d convolutional layer.

    The operator is taken on the input that the layer sees when `example` is put through the model.
    Where that has more than 3200 entries, a linear layer is decomposed through its weight and a
    convolution on a smaller image, which `operator` says.

    Args:
        model: A model of stock layers, as [`to_plain`][orthonet.convert.to_plain] returns it.
        example: A batch that the model accepts.

    Returns:
        One spectrum for each layer, in the order of their calls.
    """
    _checks.module("layer_spectra", model=model)
    _checks.floating("layer_spectra", example=example)
    seen: dict[str, tuple[nn.Linear | nn.Conv2d, tuple[int, ...]]] = {}

    def look(name: str, module: nn.Linear | nn.Conv2d, args: tuple[Tensor]) -> None:
        seen.setdefault(name, (module, tuple(args[0].shape[1:])))

    handles = [
        module.register_forward_pre_hook(functools.partial(look, name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
    return [_spectrum(name, module, shape) for name, (module, shape) in seen.items()]


def _spectrum(name: str, module: nn.Linear | nn.Conv2d, shape: tuple[int, ...]) -> Spectrum:
    weight = module.weight.double()
    if isinstance(module, nn.Linear):
        matrix, operator = weight, f"{module.in_features} → {module.out_features}"
    else:
        channels, *sides = shape
        while channels * math.prod(sides) > _LARGEST:
            sides = [side - 1 for side in sides]
        number = channels * math.prod(sides)
        eye = torch.eye(number, dtype=weight.dtype, device=weight.device)
        columns = conv_forward(module, eye.view(number, channels, *sides), weight)
        matrix = columns.flatten(1).mT
        cut = "" if sides == list(shape[1:]) else " (a part of the image)"
        operator = f"{_times((channels, *sides))} → {_times(columns.shape[1:])}{cut}"
    return Spectrum(name, operator, torch.linalg.svdvals(matrix).tolist())


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
