"""The nodes of layers of the zoo that have a rule as a whole: what their forward computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orthonet._torch import conv_paddings
from orthonet.certify.proof.emit import emits
from orthonet.certify.proof.norms import blocks_witness, convolution_witness
from orthonet.layers.zoo.residual_base import ResidualConv2d
from orthonet.linalg.bounds.rounding import mul_up

if TYPE_CHECKING:
    from orthonet.certify.proof.nodes import Nodes
    from orthonet.certify.walk.state import State

__all__: list[str] = []


class _Trail:
    """A chain of nodes that begins at the operand of a state."""

    def __init__(self, writer: Nodes, state: State) -> None:
        self.writer, self.state = writer, state
        self.place = writer.index(state.parents[0])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.writer.shapes[self.place]

    def add(self, op: str, shape: Sequence[int], **entries: Any) -> None:
        entries = {"gain": 1.0, **entries}
        self.place = self.writer.add(op, [self.place], self.state, shape_of=shape, **entries)

    def reshape(self, *shape: int) -> None:
        self.place = self.writer.reshape(self.place, shape)

    def pad(self, *amounts: tuple[int, int]) -> None:
        if any(map(any, amounts)):
            shape = [n + a + b for n, (a, b) in zip(self.shape, amounts, strict=True)]
            self.add(
                "pad", shape, amounts=[list(p) for p in amounts], mode="constant", value=(0.0).hex()
            )

    def cut(self, dim: int, start: int, stop: int) -> None:
        found = self.writer.part(self.state, self.place, dim, start, stop)
        self.place = self.place if found is None else found

    def match(self, channels: int, groups: int = 1) -> None:
        """Zeros behind the channels of each group, or less of them."""
        c, h, w = self.shape
        if c == channels * groups:
            return
        self.reshape(groups, c // groups, h, w)
        self.pad((0, 0), (0, max(0, channels - c // groups)), (0, 0), (0, 0))
        self.cut(1, 0, channels)
        self.reshape(channels * groups, h, w)

    def mix(
        self,
        weight: Tensor,
        role: str,
        bias: Tensor | None = None,
        stride: Sequence[int] = (1, 1),
        groups: int = 1,
    ) -> None:
        """A matrix at each block of stride x stride pixels, as the kernel of a convolution."""
        geometry = (list(stride), [[0, 0], [0, 0]], [1, 1])
        rule, gain, t = self.writer.witness(
            convolution_witness, weight, self.shape[1:], *geometry, groups, False
        )
        extra: dict[str, Any] = {} if t is None else {"t": t.hex()}
        if bias is not None:
            extra["bias"] = self.writer.constant(bias, self.state, "bias")
        self.add(
            "convolution",
            (len(weight), *(n // s for n, s in zip(self.shape[1:], stride, strict=True))),
            rule=rule,
            gain=gain,
            weight=self.writer.constant(weight, self.state, role),
            stride=geometry[0],
            padding=geometry[1],
            dilation=geometry[2],
            groups=groups,
            circular=False,
            **extra,
        )

    def apart(self, *ends: int) -> list[_Trail]:
        """The channels below each end, one trail for each range that holds some."""
        trails, begin = [], 0
        for end in ends:
            if end > begin:
                trail = _Trail.__new__(_Trail)
                trail.writer, trail.state, trail.place = self.writer, self.state, self.place
                trail.cut(0, begin, end)
                trails.append(trail)
            begin = max(begin, end)
        return trails

    def join(self, trails: Sequence[_Trail]) -> None:
        if len(trails) == 1:
            self.place = trails[0].place
            return
        shape = (sum(t.shape[0] for t in trails), *trails[0].shape[1:])
        self.place = self.writer.add(
            "concatenate", [t.place for t in trails], self.state, dim=0, shape_of=shape
        )


@emits("CayleyConv2d", "LOTConv2d", "BROConv2d")
def _fourier(writer: Nodes, state: State) -> int | None:
    layer, trail = writer.leaf(state), _Trail(writer, state)
    if len(trail.shape) != 3:
        return None
    (_, height, width), s = trail.shape, layer.stride[0]
    torus, output = layer._torus((height, width))
    zeros = layer.padding_mode == "zeros"
    if zeros:
        left, _, top, _ = conv_paddings(layer)
        trail.pad((0, 0), (top, torus[0] - height - top), (left, torus[1] - width - left))
    size = (torus[0] // s, torus[1] // s)
    if s > 1:
        c = trail.shape[0]
        trail.reshape(c, size[0], s, size[1], s)
        trail.add("permute", (c, s, s, *size), dims=[0, 2, 4, 1, 3])
        trail.reshape(c * s * s, *size)
    with torch.no_grad():
        blocks = layer.blocks(size).detach()
    trail.match(blocks.shape[-1], layer.groups)
    rule, gain, t = blocks_witness(blocks.to("cpu", torch.complex128))
    parts = {"real": blocks.real, "imag": blocks.imag}
    named = {n: writer.constant(v, state, f"blocks.{n}") for n, v in parts.items()}
    shape = (layer.groups * blocks.shape[-2], *size)
    trail.add("fourier", shape, rule=rule, gain=gain, t=float(t or 0.0).hex(), **named)
    trail.match(layer.out_channels // layer.groups, layer.groups)
    if zeros:
        taps = zip(layer.kernel_size, layer.dilation, strict=True)
        start = [0 if s > 1 else d * ((k - 1) // 2) for k, d in taps]
        trail.cut(1, start[0], start[0] + output[0])
        trail.cut(2, start[1], start[1] + output[1])
    trail.place = writer.scale(trail.place, float(layer.lipschitz), state)
    if layer.bias is not None:
        offset = writer.constant(layer.bias.detach().view(-1, 1, 1), state, "bias")
        trail.add("shift", trail.shape, offset=offset)
    return trail.place


@emits("LipNeXtBlock2d")
def _lipnext(writer: Nodes, state: State) -> int | None:
    block, trail = writer.leaf(state), _Trail(writer, state)
    if len(trail.shape) != 3:
        return None
    with torch.no_grad():
        rotation, mixing = block.rotation.compute(), block.mixing.compute()
        mixing = mixing @ rotation.mT
    width = len(rotation)
    trail.match(width)
    trail.mix(rotation[:, :, None, None], "rotation")
    q = round(block.shift.fraction * width / 4)
    parts = trail.apart(q, 2 * q, 3 * q, 4 * q, width)
    for part, (dim, step) in zip(
        parts if q else [], ((2, 1), (2, -1), (1, 1), (1, -1)), strict=False
    ):
        n = part.shape[dim]
        if block.shift.padding_mode == "circular":
            part.add("roll", part.shape, dim=dim, shift=step % n)
        else:
            part.cut(dim, max(0, -step), n - max(0, step))
            amounts = [(0, 0), (0, 0), (0, 0)]
            amounts[dim] = (max(0, step), max(0, -step))
            part.pad(*amounts)
    trail.join(parts)
    bias = None if block.bias is None else block.bias.detach()
    trail.mix(mixing[:, :, None, None], "mixing", bias)
    moduli = round(block.activation.beta * width)
    parts = trail.apart(moduli, width)
    if moduli:
        parts[0].add("activation", parts[0].shape, function="abs", parameters=[])
    trail.join(parts)
    trail.match(block.out_channels)
    return writer.scale(trail.place, float(block.lipschitz), state)


_SLOPED = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}


@emits("CPLConv2d", "SLLConv2d", "CPLLinear", "SLLLinear")
def _descent(writer: Nodes, state: State) -> int | None:
    layer, trail = writer.leaf(state), _Trail(writer, state)
    function, image = _SLOPED.get(type(layer.activation)), isinstance(layer, ResidualConv2d)
    if function is None or len(trail.shape) != (3 if image else 1):
        return None
    with torch.no_grad():
        weight, scales = (t.detach() for t in layer.parametrization())
    if not image:
        trail.reshape(*trail.shape, 1, 1)
        weight = weight[:, :, None, None]
    pads = layer._pad if image else (0, 0)
    groups = layer.groups if image else 1
    width, outputs = weight.shape[1] * groups, layer.out_channels if image else layer.out_features
    trail.match(width)
    circular = image and layer.padding_mode == "circular"
    geometry = ([1, 1], [[p, p] for p in pads], list(layer.dilation) if image else [1, 1])
    scaled = weight.double() * scales.double().sqrt()[:, None, None, None]
    rule, gain, t = convolution_witness(
        scaled, trail.shape[1:], geometry[0], [(p, p) for p in pads], geometry[2], groups, circular
    )
    norm = mul_up(gain, gain, 1.0 + 2.0**-26)
    extra: dict[str, Any] = {} if t is None else {"t": t.hex()}
    if layer.bias is not None:
        extra["bias"] = writer.constant(layer.bias.detach(), state, "bias")
    trail.add(
        "descent",
        trail.shape,
        rule=rule,
        gain=max(1.0, norm - 1.0),
        weight=writer.constant(weight, state, "weight"),
        scales=writer.constant(scales.flatten(), state, "scales"),
        function=function,
        parameters=[],
        stride=geometry[0],
        padding=geometry[1],
        dilation=geometry[2],
        groups=groups,
        circular=circular,
        **extra,
    )
    if image and layer.reduction is not None:
        with torch.no_grad():
            reduction = layer._reduction().detach()
        trail.mix(reduction, "reduction", None, layer.stride, groups)
    trail.match(outputs)
    if not image:
        trail.reshape(outputs)
    return writer.scale(trail.place, float(layer.lipschitz), state)
