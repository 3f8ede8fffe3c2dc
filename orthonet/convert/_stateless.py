"""1-Lipschitz modules in place of norm layers, activations and pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from orthonet import layers
from orthonet.convert._replace import Twin, UnconvertibleError

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "POOLS",
    "activation_twin",
    "is_channel_norm",
    "norm_twin",
    "pool_twin",
]

NORMS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.SyncBatchNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.Hardswish,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
)
POOLS: tuple[type[nn.Module], ...] = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
)


def is_channel_norm(layer: nn.Module) -> bool:
    """Return whether it is the layer norm over the channels of images of torchvision or timm."""
    return (
        isinstance(layer, nn.LayerNorm)
        and type(layer).__name__ == "LayerNorm2d"
        and len(layer.normalized_shape) == 1
    )


@torch.no_grad()
def norm_twin(layer: Any, norm: str, weights: str) -> Twin:
    """Batch centering or 1-Lipschitz batch norm; layer centering for layer and instance norm."""
    name = type(layer).__name__
    instance = name.startswith("InstanceNorm") and not layer.track_running_stats
    if isinstance(layer, nn.LayerNorm) or instance:
        count = int(name[-2]) if instance else len(layer.normalized_shape)
        dims = (-3,) if is_channel_norm(layer) else tuple(range(-count, 0))
        remark = "the mean is subtracted, nothing is divided, and there is no gain"
        return Twin(layers.LayerCentering(dims).train(layer.training), remark)
    if not name.startswith("BatchNorm") or not layer.track_running_stats or layer.momentum is None:
        raise UnconvertibleError("no 1-Lipschitz twin for this normalization; give a rule")
    first = layer.running_mean
    factory = {"device": first.device, "dtype": first.dtype}
    if norm == "centering":
        twin = layers.BatchCentering(layer.num_features, layer.momentum, layer.affine, **factory)
        remark = "centered, neither divided nor multiplied"
        copied = ["running_mean", *(["bias"] if layer.affine else [])]
    else:
        twin = layers.BatchLipNorm(
            layer.num_features, layer.eps, layer.momentum, layer.affine, **factory
        )
        remark = "divided by its largest gain"
        copied = ["running_mean", "running_var", *(["weight", "bias"] if layer.affine else [])]
    if weights == "project":
        for name in copied:
            getattr(twin, name).copy_(getattr(layer, name))
    return Twin(twin.train(layer.training), remark)


def activation_twin(activation: str, before: nn.Module | None) -> Twin:
    """`Abs`, or `MaxMin` along the channels of the layer before."""
    if activation == "abs":
        return Twin(layers.Abs())
    if before is None:
        raise UnconvertibleError("no layer before it tells which dimension holds the channels")
    linear = isinstance(before, nn.Linear)
    width: Any = before.out_features if linear else before.out_channels
    if width % 2:
        raise UnconvertibleError(f"max_min needs an even number of channels, there are {width}")
    return Twin(layers.MaxMin(-1 if linear else -1 - len(before.kernel_size)))  # type: ignore[arg-type]


def pool_twin(layer: Any, pool: str) -> Twin:
    """Norm or scaled average of each window, with constant 1."""
    name = type(layer).__name__
    dims = int(name[-2])
    kind = "L2NormPool" if pool == "l2" else "ScaledAvgPool"
    if name.startswith("Adaptive"):
        size = layer.output_size
        sizes = (size,) * dims if isinstance(size, int) else tuple(size)
        if None in sizes:
            raise UnconvertibleError("an output size of None has no twin")
        remark = "" if set(sizes) == {1} else "only for inputs whose sizes these divide"
        return Twin(getattr(layers, f"Adaptive{kind}")(sizes, dims=dims), remark)
    if getattr(layer, "dilation", 1) not in (1, (1,) * dims):
        raise UnconvertibleError("dilation has no twin")
    if getattr(layer, "divisor_override", None) is not None:
        raise UnconvertibleError("divisor_override has no twin")
    twin = getattr(layers, kind)(layer.kernel_size, layer.stride, layer.padding, dims=dims)
    if not layer.ceil_mode:
        return Twin(twin)
    if twin.stride != twin.kernel_size or any(twin.padding) or len(set(twin.stride)) > 1:
        raise UnconvertibleError("ceil_mode has a twin only for square windows that tile the image")
    fit = layers.PadToStride(twin.stride[0], 1, dims)
    return Twin(nn.Sequential(fit, twin), "the border is filled up with zeros")
