"""The arguments of convolutions: checked, taken over from the twin, and what sizes they allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from orthonet import _checks
from orthonet._torch import conv_paddings
from orthonet.linalg.bounds.axis import count_outputs

__all__ = ["adopt_arguments", "check_circular", "require_coprime", "spans", "spatial_outputs"]


def adopt_arguments(
    layer: Any,
    twin: type[nn.Module],
    in_channels: int,
    out_channels: int,
    *,
    groups: int,
    padding_mode: str,
    modes: Sequence[str],
    **arguments: Any,
) -> None:
    """Check the arguments of a convolution and set the attributes of its twin, without a weight."""
    owner = type(layer)
    _checks.positive_int(owner, in_channels=in_channels, out_channels=out_channels, groups=groups)
    _checks.conv_arguments(owner, int(twin.__name__[-2]), **arguments)
    _checks.one_of(owner, modes, padding_mode=padding_mode)
    _checks.require(
        in_channels % groups == 0 and out_channels % groups == 0,
        owner,
        "groups must divide in_channels and out_channels",
        "Choose a common divisor",
        in_channels=in_channels,
        out_channels=out_channels,
        groups=groups,
    )
    # The twin on the meta device brings every attribute that this version of torch has.
    stock = "output_padding" not in arguments and padding_mode != "symmetric"
    mode = padding_mode if stock else "zeros"
    arguments.update(groups=groups, bias=False, padding_mode=mode, device="meta")
    for name, value in vars(twin(in_channels, out_channels, **arguments)).items():
        if name not in vars(layer):
            setattr(layer, name, value)
    layer.padding_mode = padding_mode


def require_coprime(layer: Any, missed: str) -> None:
    """Refuse a dilation and a stride with a common divisor, by which values are missed."""
    _checks.require(
        all(math.gcd(d, s) == 1 for d, s in zip(layer.dilation, layer.stride, strict=True)),
        type(layer),
        f"dilation and stride must have no common divisor in any dim, otherwise some {missed}",
        "Change one of them",
        dilation=layer.dilation,
        stride=layer.stride,
    )


def spans(layer: Any) -> list[tuple[int, int, int, int, int]]:
    """Return (kernel, stride, dilation, padding before, padding after) of each spatial dim."""
    pads = conv_paddings(layer)
    ends = list(zip(pads[::2], pads[1::2], strict=True))[::-1]
    fields = zip(layer.kernel_size, layer.stride, layer.dilation, ends, strict=True)
    return [(k, s, d, low, high) for k, s, d, (low, high) in fields]


def spatial_outputs(layer: Any, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the spatial sizes of the output; below 1 where the kernel does not fit."""
    return tuple(count_outputs(n, *span) for n, span in zip(sizes, spans(layer), strict=True))


def check_circular(layer: Any, input: Tensor) -> None:
    """Refuse sizes on which wrapping around would repeat or mix outputs."""
    sizes = input.shape[-len(layer.kernel_size) :]
    for size, outputs, (_, s, _, low, high) in zip(
        sizes, spatial_outputs(layer, sizes), spans(layer), strict=True
    ):
        whole = size % s == 0 and outputs * s <= size and max(low, high) <= size
        if not (low == high == 0 or whole):
            _checks.fail(
                layer,
                "with circular padding every input size must be a multiple of the stride, at "
                "least the padding, and give at most size / stride outputs",
                "Resize the input, lower the padding, or use padding_mode='zeros'",
                input_size=tuple(sizes),
                stride=layer.stride,
                padding=layer.padding,
                kernel_size=layer.kernel_size,
            )
