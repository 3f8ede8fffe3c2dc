"""One stock layer in, its orthogonal twin out."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import nn

from orthonet import _checks, layers
from orthonet.constraints import orthogonal, product
from orthonet.errors import NotOnManifoldError
from orthonet.manifolds import Stiefel

__all__ = [
    "CONVERTIBLE",
    "Twin",
    "UnconvertibleError",
    "as_linear",
    "attention_twin",
    "layer_twin",
]


class UnconvertibleError(Exception):
    """A layer has no twin; the message is the reason that the report shows."""


class Twin(NamedTuple):
    """What takes the place of a layer."""

    module: nn.Module
    remark: str = ""
    moved: float | None = None


_LAYERS: dict[type[nn.Module], Any] = {
    nn.Linear: layers.OrthoLinear,
    nn.Conv1d: layers.OrthoConv1d,
    nn.Conv2d: layers.OrthoConv2d,
    nn.Conv3d: layers.OrthoConv3d,
    nn.ConvTranspose1d: layers.OrthoConvTranspose1d,
    nn.ConvTranspose2d: layers.OrthoConvTranspose2d,
    nn.ConvTranspose3d: layers.OrthoConvTranspose3d,
    nn.RNN: layers.OrthoRNN,
    nn.GRU: layers.OrthoGRU,
    nn.LSTM: layers.OrthoLSTM,
    nn.RNNCell: layers.OrthoRNNCell,
    nn.GRUCell: layers.OrthoGRUCell,
    nn.LSTMCell: layers.OrthoLSTMCell,
}
CONVERTIBLE: tuple[type[nn.Module], ...] = tuple(_LAYERS)
_SPACE_TO_DEPTH: dict[int, Any] = {
    1: layers.SpaceToDepth1d,
    2: layers.SpaceToDepth2d,
    3: layers.SpaceToDepth3d,
}
_CONV: dict[int, Any] = {1: layers.OrthoConv1d, 2: layers.OrthoConv2d, 3: layers.OrthoConv3d}


@torch.no_grad()
def as_linear(module: Any) -> nn.Linear | None:
    """Return the `nn.Linear` that computes what a `Conv1D` of Hugging Face's transformers does.

    It is told by its name and its tensors: a weight (in, out), and as many biases as `nf` outputs.
    None for any other module.
    """
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    if type(module).__name__ != "Conv1D" or weight is None or bias is None or weight.ndim != 2:
        return None
    if set(module._parameters) != {"weight", "bias"} or module._modules:
        return None
    if not getattr(module, "nf", None) == weight.shape[1] == len(bias):
        return None
    twin = nn.Linear(*weight.shape, device="meta")
    twin.weight = nn.Parameter(weight.detach().mT.clone(), weight.requires_grad)
    twin.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return twin.train(module.training)


def layer_twin(
    layer: Any,
    weights: str,
    downsample: str | None,
    method: str = "ortho",
    options: dict[str, Any] | None = None,
) -> Twin:
    """The twin of a stock layer: made by `method`, with its weight projected or drawn anew.

    Raises:
        UnconvertibleError: There is none.
    """
    kind, options = type(layer), options or {}
    parameter = next(layer.parameters())
    factory = {"device": parameter.device, "dtype": parameter.dtype}
    if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
        return _recurrent_twin(layer, weights, {**factory, **options})
    try:
        if kind is nn.Linear:
            twin = layers.make_linear(
                method,
                layer.in_features,
                layer.out_features,
                layer.bias is not None,
                **factory,
                **options,
            )
        else:
            arguments = _conv_arguments(layer)
            dims = len(layer.kernel_size)
            pairs = zip(layer.kernel_size, layer.stride, strict=True)
            if downsample and not layer.transposed and any(k < s for k, s in pairs):
                return _downsampled(layer, weights, downsample, method, {**factory, **options})
            if method == "ortho":
                twin = _LAYERS[kind](**arguments, **factory, **options)
            elif kind is nn.Conv2d:
                twin = layers.make_conv(method, **arguments, **factory, **options)
            else:
                raise UnconvertibleError(
                    f"method {method!r} has no convolution of {dims} dimensions"
                )
    except TypeError as error:
        if not options:
            raise UnconvertibleError(_short(error)) from None
        _checks.fail(
            "orthogonalize",
            f"the keywords of a rule must be those of the layer in the place of nn.{kind.__name__}",
            str(error),
            keywords=sorted(options),
        )
    except ValueError as error:
        raise UnconvertibleError(_short(error)) from None
    return Twin(twin, *_filled(twin, layer, weights))


def _conv_arguments(layer: Any) -> dict[str, Any]:
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"]
    names += ["groups", "padding_mode", *(["output_padding"] if layer.transposed else [])]
    return {**{n: getattr(layer, n) for n in names}, "bias": layer.bias is not None}


def _short(error: Exception) -> str:
    """What an error of ours requires, without the name of the class, the values and the advice."""
    text = str(error).split(": ", 1)[-1].split(". ")[0]
    return text.split(", got ")[0]


@torch.no_grad()
def _filled(
    twin: Any, layer: Any, weights: str, weight: torch.Tensor | None = None
) -> tuple[str, float | None]:
    """Give `twin` the projected weight and the bias of `layer`; return remark and distance."""
    twin.train(layer.training)
    learns = layer.weight.requires_grad
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(layer.bias.requires_grad if name == "bias" else learns)
    if weights == "reset" or layer.weight.is_meta:
        return "", None
    bias = getattr(twin, "bias", None)
    if layer.bias is not None and bias is not None and bias.shape == layer.bias.shape:
        bias.copy_(layer.bias)
    if not hasattr(twin, "project_"):  # no single linear map, or one made at every frequency
        twin.reset_parameters()
        return "drawn anew, for a plain weight has no projection onto it", None
    try:
        moved = twin.project_(layer.weight if weight is None else weight)
    except (NotOnManifoldError, ValueError) as error:
        twin.reset_parameters()
        return f"drawn anew, for the weight has no projection: {_short(error)}", None
    return "", moved


def _downsampled(
    layer: Any, weights: str, downsample: str, method: str, options: dict[str, Any]
) -> Twin:
    """A convolution whose kernel is smaller than its stride: reorder or average, then mix."""
    dims, stride, kernel = len(layer.kernel_size), layer.stride, layer.kernel_size
    padded = layer.padding != "valid" and any(layer.padding)
    if padded or len(set(stride)) > 1 or len(set(kernel)) > 1:
        raise UnconvertibleError(
            f"kernel_size={kernel} < stride={stride} with padding, or unequal in the dims"
        )
    if max(layer.dilation) > 1:
        raise UnconvertibleError(f"kernel_size={kernel} < stride={stride} with dilation")
    step, groups, block = stride[0], layer.groups, stride[0] ** dims
    weight = layer.weight
    if downsample == "space_to_depth":
        first: nn.Module = _SPACE_TO_DEPTH[dims](step)
        grown = torch.nn.functional.pad(
            weight, [a for k in reversed(kernel) for a in (0, step - k)]
        )
        weight = grown.flatten(1)  # channel c of a group has its block of pixels side by side
        channels = layer.in_channels * block
    else:
        first = layers.ScaledAvgPool(step, dims=dims)
        weight = weight.flatten(2).sum(2) / math.sqrt(block)
        channels = layer.in_channels
    arguments = {
        "in_channels": channels,
        "out_channels": layer.out_channels,
        "kernel_size": 1,
        "groups": groups,
        "bias": layer.bias is not None,
    }
    if method == "ortho":
        mix = _CONV[dims](**arguments, **options)
    elif dims == 2:
        mix = layers.make_conv(method, **arguments, **options)
    else:
        raise UnconvertibleError(f"method {method!r} has none of {dims} dimensions")
    remark, moved = _filled(mix, layer, weights, weight.unflatten(1, (-1, *(1,) * dims)))
    remark = remark or "kernel_size < stride: " + (
        "every pixel is read now" if downsample == "space_to_depth" else "averages first"
    )
    fit = layers.PadToStride(step, kernel[0], dims)
    return Twin(nn.Sequential(fit, first, mix).train(layer.training), remark, moved)


@torch.no_grad()
def _recurrent_twin(layer: Any, weights: str, options: dict[str, Any]) -> Twin:
    """An orthogonal recurrent layer or cell: the recurrent kernels are projected, gate by gate."""
    cell = isinstance(layer, nn.RNNCellBase)
    names = ["input_size", "hidden_size"]
    if not cell:
        names += ["num_layers", "batch_first", "dropout", "bidirectional"]
        names += ["proj_size"] if isinstance(layer, nn.LSTM) else []
    names += ["nonlinearity"] if isinstance(layer, (nn.RNN, nn.RNNCell)) else []
    arguments = {name: getattr(layer, name) for name in names}
    if isinstance(layer, nn.RNN):
        arguments["nonlinearity"] = layer.mode.removeprefix("RNN_").lower()
    bias = layer.bias
    twin = _LAYERS[type(layer)](**{**arguments, "bias": bool(bias), **options})
    twin.train(layer.training)
    moved = None
    first = next(layer.parameters())
    if weights == "project" and not first.is_meta:
        state = layer.state_dict()
        distances = []
        for name, value in state.items():
            if name not in twin.recurrent:
                getattr(twin, name).copy_(value)
                continue
            kernel = twin.recurrent[name]
            distances.append(kernel.project_(value.view(kernel.shape), twin))
        moved = max(distances)
    for parameter in twin.parameters():
        parameter.requires_grad_(first.requires_grad)
    return Twin(twin, "recurrent kernels only; the input kernel is free", moved)


def attention_twin(layer: nn.MultiheadAttention, weights: str) -> Twin:
    """A copy of attention in which query, key, value and output matrices are orthogonal.

    Each of the three blocks of `in_proj_weight` is constrained on its own.
    """
    twin = copy.deepcopy(layer)
    init = "sample" if weights == "reset" else "project"
    if twin.in_proj_weight is not None:
        product(twin, "in_proj_weight", [Stiefel()] * 3, init=init)
    else:
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            orthogonal(twin, name, init=init)
    orthogonal(twin.out_proj, "weight", init=init)
    return Twin(twin, "q, k, v and output matrices; softmax attention has no constant")
