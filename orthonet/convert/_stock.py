"""Stock twins of the modules that have no weights to bake: activations, pooling, norms, sums.

Each is a module of torch, or a `torch.fx.GraphModule` whose code calls torch alone. A dimension is
moved to the end where only its index is known, because the number of dimensions is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from orthonet import layers
from orthonet.convert._sums import BranchGain, ConvexSum, PrescaledSum

__all__ = ["as_graph", "stock_twin"]

_AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_LP_POOL = {1: nn.LPPool1d, 2: nn.LPPool2d, 3: nn.LPPool3d}
_PAD = {1: nn.ConstantPad1d, 2: nn.ConstantPad2d, 3: nn.ConstantPad3d}
_ADAPTIVE = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def as_graph(root: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """A graph module that remembers nothing of who traced it, so that a pickle needs torch only."""
    clean = fx.Graph()
    output = clean.graph_copy(graph, {})
    clean.output(output)
    return fx.GraphModule(root, clean, name).train(root.training)


def _graph(owner: nn.Module, forward: Callable[..., Any]) -> fx.GraphModule:
    """Trace `forward(module, x)`, in which `module` holds what `owner` holds, under its names."""
    root = nn.Module()
    for name, value in owner.named_parameters(recurse=False):
        root.register_parameter(name, nn.Parameter(value.detach().clone(), value.requires_grad))
    for name, value in owner.named_buffers(recurse=False):
        root.register_buffer(name, value.detach().clone())
    for name, module in owner.named_children():
        root.add_module(name, module)
    root.__class__ = type("Root", (nn.Module,), {"forward": forward})
    graph = _Leaves().trace(root)
    root.__class__ = nn.Module
    return as_graph(root.train(owner.training), graph, type(owner).__name__)


class _Leaves(fx.Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _share(size: Any, share: float) -> Any:
    """`round(share * size)` by whole numbers, which a trace follows."""
    p, q = Fraction(share).limit_denominator(10**6).as_integer_ratio()
    count, rest = (2 * p * size + q) // (2 * q), (2 * p * size + q) % (2 * q)
    return count - (2 * q - rest) // (2 * q) * (count % 2)  # a tie goes to the even number


# activations ------------------------------------------------------------------------------------


def _sorted_groups(owner: Any, size: int, dim: int) -> fx.GraphModule:
    inside = dim + 1 if dim >= 0 else dim
    outside = dim if dim >= 0 else dim - 1

    def pairs(self: nn.Module, x: Any) -> Any:  # ten times faster than a sort of two entries
        groups = x.unflatten(dim, (-1, 2))
        a, b = groups.select(inside, 0), groups.select(inside, 1)
        both = torch.stack((torch.minimum(a, b), torch.maximum(a, b)), inside)
        return both.flatten(outside, inside)

    def groups(self: nn.Module, x: Any) -> Any:
        return x.unflatten(dim, (-1, size)).sort(dim=inside)[0].flatten(outside, inside)

    return _graph(owner, pairs if size == 2 else groups)


def _max_min(m: Any) -> fx.GraphModule:
    def forward(self: nn.Module, x: Any) -> Any:
        halves = x.chunk(2, m.dim)
        a, b = halves[0], halves[1]
        return torch.cat((torch.maximum(a, b), torch.minimum(a, b)), m.dim)

    return _graph(m, forward)


def _beta_abs(m: Any) -> fx.GraphModule:
    def forward(self: nn.Module, x: Any) -> Any:
        size = x.size(m.dim)
        count = _share(size, m.beta)
        first, rest = x.narrow(m.dim, 0, count), x.narrow(m.dim, count, size - count)
        return torch.cat((first.abs(), rest), m.dim)

    return _graph(m, forward)


def _wide(value: Any, half: bool) -> Any:
    """In float32 at least; `half` tells the dtype, which a traced value does not."""
    return value.float() if half else value


def _is_half(stored: Tensor) -> bool:
    return stored.dtype.itemsize < 4


def _householder(m: Any) -> fx.GraphModule:
    half = _is_half(m.theta)

    def forward(self: Any, x: Any) -> Any:
        angle = _wide(self.theta, half) / 2
        v1, v2 = angle.sin(), -angle.cos()
        z = x.movedim(m.dim, -1).chunk(2, -1)
        distance = 2 * F.relu(-(v1 * z[0] + v2 * z[1]))
        y = torch.cat((z[0] + v1 * distance, z[1] + v2 * distance), -1)
        return y.to(x.dtype).movedim(-1, m.dim)

    return _graph(m, forward)


def _householder2(m: Any) -> fx.GraphModule:
    half = _is_half(m.theta)

    def forward(self: Any, x: Any) -> Any:
        theta = _wide(self.theta, half)
        start = theta[0]
        a, b = theta[1].clamp(0.0, math.pi), theta[2].clamp(0.0, math.pi)
        z = x.movedim(m.dim, -1).to(theta.dtype).chunk(2, -1)
        psi = (torch.atan2(z[1], z[0]) - start).remainder(2 * math.pi)
        first, second, third = psi < a, psi < a + b, psi < b + math.pi
        last = torch.logical_and(third, torch.logical_not(second))
        turn = torch.where(second, 2 * (start + a), 2 * start)
        turn = torch.where(first, torch.zeros_like(psi), turn)
        turn = torch.where(last, -2 * b, turn)
        flipped = torch.where(torch.logical_or(first, last), z[1], -z[1])
        cos, sin = turn.cos(), turn.sin()
        y = torch.cat((cos * z[0] - sin * flipped, sin * z[0] + cos * flipped), -1)
        return y.to(x.dtype).movedim(-1, m.dim)

    return _graph(m, forward)


def _n_activation(m: Any) -> fx.GraphModule:
    def forward(self: Any, x: Any) -> Any:
        y, theta = x.movedim(m.dim, -1), self.theta.to(x.dtype)
        low, high = theta.amin(0), theta.amax(0)
        above = torch.where(y > high, y - 2 * high, -y)
        return torch.where(y < low, y - 2 * low, above).movedim(-1, m.dim)

    return _graph(m, forward)


# pooling, down-sampling and permutations --------------------------------------------------------


def _channel_shuffle(m: Any) -> fx.GraphModule:
    first, second = (m.dim, m.dim + 1) if m.dim >= 0 else (m.dim - 1, m.dim)
    return _graph(
        m,
        lambda self, x: (
            x.unflatten(m.dim, (m.groups, -1)).transpose(first, second).flatten(first, second)
        ),
    )


def _pad_to_stride(m: Any) -> fx.GraphModule:
    s, k, spatial = m.stride, m.kernel_size, m.spatial

    def forward(self: nn.Module, x: Any) -> Any:
        pads: list[Any] = []
        for dim in range(1, spatial + 1):
            n = x.size(-dim)
            pads += [0, ((n - k) // s + 1) * s - n]
        return F.pad(x, pads)

    return _graph(m, forward)


def _symmetric_pad(m: Any) -> fx.GraphModule:
    def forward(self: nn.Module, x: Any) -> Any:
        for i, (low, high) in enumerate(zip(m.pad[::2], m.pad[1::2], strict=True)):
            dim = -1 - i
            first = x.narrow(dim, 0, low).flip(dim)
            last = x.narrow(dim, x.size(dim) - high, high).flip(dim)
            x = torch.cat((first, x, last), dim)
        return x

    return _graph(m, forward)


def _space_to_depth(m: Any) -> nn.Module:
    r, spatial = m.downscale_factor, 1 if isinstance(m, layers.SpaceToDepth1d) else 3

    def forward(self: nn.Module, x: Any) -> Any:
        for dim in range(spatial):
            x = x.unflatten(-1 - 2 * dim, (-1, r))
        inner = tuple(range(-2 * spatial + 1, 0, 2))
        moved = x.movedim(inner, tuple(range(-2 * spatial, -spatial)))
        return moved.flatten(-2 * spatial - 1, -spatial - 1)

    return _graph(m, forward)


def _spatial_shift(m: Any) -> fx.GraphModule:
    def forward(self: nn.Module, x: Any) -> Any:
        size = x.size(-3)
        quarter = _share(size, m.fraction / 4)
        moved = []
        for i, (dim, step) in enumerate(((-1, 1), (-1, -1), (-2, 1), (-2, -1))):
            part = x.narrow(-3, i * quarter, quarter)
            if m.padding_mode == "circular":
                moved.append(part.roll(step, dim))
                continue
            kept = part.narrow(dim, 0 if step > 0 else 1, x.size(dim) - 1)
            pads = (1, 0) if step > 0 else (0, 1)
            moved.append(F.pad(kept, pads if dim == -1 else (0, 0, *pads)))
        moved.append(x.narrow(-3, 4 * quarter, size - 4 * quarter))
        return torch.cat(moved, -3)

    return _graph(m, forward)


def _l2_norm_pool(m: Any) -> nn.Module:
    spatial = m.dims
    parts: list[nn.Module] = []
    if any(m.padding):
        pads = tuple(p for size in reversed(m.padding) for p in (size, size))
        parts.append(_PAD[spatial](pads, 0.0))
    square = spatial == 1  # LPPool1d takes a number
    size, stride = (m.kernel_size[0], m.stride[0]) if square else (m.kernel_size, m.stride)
    parts.append(_LP_POOL[spatial](2.0, size, stride))
    shared = math.prod(-(-k // s) for k, s in zip(m.kernel_size, m.stride, strict=True))
    if shared > 1:
        parts.append(_graph(m, lambda self, x: x * (1 / math.sqrt(shared))))
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts)


def _scaled_avg_pool(m: Any) -> nn.Module:
    square, pool = 1.0, _AVG_POOL[m.dims]
    for k, s in zip(m.kernel_size, m.stride, strict=True):
        q = -(-k // s) - 1
        square *= 1 + 2 * q - s * q * (q + 1) / k
    scale = math.sqrt(math.prod(m.kernel_size) / square)
    return _graph(m, lambda self, x: pool(x, m.kernel_size, m.stride, m.padding) * scale)


def _adaptive_l2(m: Any) -> fx.GraphModule:
    spatial, sizes = m.dims, m.output_size

    def forward(self: nn.Module, x: Any) -> Any:
        for dim in range(spatial):
            x = x.unflatten(-1 - 2 * dim, (sizes[-1 - dim], -1))
        return torch.linalg.vector_norm(x, dim=tuple(range(-2 * spatial + 1, 0, 2)))

    return _graph(m, forward)


def _pixels(x: Any, spatial: int) -> Any:
    count = x.size(-1)
    for dim in range(2, spatial + 1):
        count = count * x.size(-dim)
    return count


def _adaptive_average(m: Any) -> fx.GraphModule:
    spatial, sizes, pool = m.dims, m.output_size, _ADAPTIVE[m.dims]
    given, windows = sizes[0] if spatial == 1 else sizes, math.prod(sizes)

    def forward(self: nn.Module, x: Any) -> Any:
        return pool(x, given) * (_pixels(x, spatial) / windows) ** 0.5

    return _graph(m, forward)


def _global_l2(m: Any) -> fx.GraphModule:
    dims, keepdim = tuple(range(-m.dims, 0)), m.keepdim
    return _graph(m, lambda self, x: torch.linalg.vector_norm(x, dim=dims, keepdim=keepdim))


def _global_average(m: Any) -> fx.GraphModule:
    spatial, dims, keepdim = m.dims, tuple(range(-m.dims, 0)), m.keepdim
    return _graph(m, lambda self, x: x.mean(dim=dims, keepdim=keepdim) * _pixels(x, spatial) ** 0.5)


# norms, sums ------------------------------------------------------------------------------------


def _normalize(m: Any) -> fx.GraphModule:
    return _graph(
        m, lambda self, x: ((x.movedim(m.dim, -1) - self.mean) / self.std).movedim(-1, m.dim)
    )


def _batch_norm(m: Any) -> fx.GraphModule:
    """The formula of the mode that the layer is in."""
    gains, has_weight, has_bias = hasattr(m, "gains"), getattr(m, "weight", None), m.bias

    def forward(self: Any, x: Any) -> Any:
        y = x.movedim(1, -1)
        flat = y.flatten(0, -2)
        mean = flat.mean(0) if m.training else self.running_mean
        if not gains:
            shift = mean if has_bias is None else mean - self.bias
            return (y - shift).movedim(-1, 1)
        variance = flat.var(0, correction=0) if m.training else self.running_var
        gain = (variance + m.eps).rsqrt()
        gain = gain if has_weight is None else gain * self.weight
        y = (y - mean) * (gain / gain.abs().max().clamp_min(1e-30))
        return (y if has_bias is None else y + self.bias).movedim(-1, 1)

    return _graph(m, forward)


def _convex(m: Any) -> fx.GraphModule:
    half = _is_half(m.logit)

    def forward(self: Any, branch: Any, skip: Any) -> Any:
        a = _wide(self.logit, half).sigmoid()
        return ((1 - a) * skip + a * branch).to(skip.dtype)

    return _graph(m, forward)


def _gain_of(module: Any, half: bool) -> Any:
    return _wide(module.log_gain, half).clamp(-20.0, 20.0).exp()


def _gain(m: Any) -> fx.GraphModule:
    half = _is_half(m.log_gain)
    return _graph(m, lambda self, x: (_gain_of(self, half) * x).to(x.dtype))


def _prescaled(m: Any) -> fx.GraphModule:
    half = _is_half(m.before.log_gain)

    def forward(self: Any, branch: Any, skip: Any) -> Any:
        return ((skip + branch) / (1 + _gain_of(self.before, half))).to(skip.dtype)

    plain = _graph(m, forward)
    plain.add_module("before", _gain(m.before))  # the graph of the block calls it
    return plain


def _residual(formula: Callable[[Any, Any], Any]) -> Callable[[Any], fx.GraphModule]:
    return lambda m: _graph(m, lambda self, x: formula(x, self.branch(x)))


def _convex_residual(m: Any) -> fx.GraphModule:
    half = _is_half(m.logit)

    def forward(self: Any, x: Any) -> Any:
        a = _wide(self.logit, half).sigmoid()
        return ((1 - a) * x + a * self.branch(x)).to(x.dtype)

    return _graph(m, forward)


def _prescaled_residual(m: Any) -> fx.GraphModule:
    half = _is_half(m.log_gain)

    def forward(self: Any, x: Any) -> Any:
        g = _gain_of(self, half)
        return ((x + self.branch((g * x).to(x.dtype))) / (1 + g)).to(x.dtype)

    return _graph(m, forward)


def _concat_residual(m: Any) -> fx.GraphModule:
    dim = m.dim
    first, second = (dim, dim + 1) if dim >= 0 else (dim - 1, dim)

    def forward(self: Any, x: Any) -> Any:
        halves = x.chunk(2, dim)
        pair = (halves[0], self.branch(halves[1]))
        if m.shuffle:
            return torch.stack(pair, second).flatten(first, second)
        return torch.cat(pair, dim)

    return _graph(m, forward)


def _l2_residual(m: Any) -> fx.GraphModule:
    def forward(self: Any, x: Any) -> Any:
        pair = torch.stack((x, self.branch(x)), -1)
        return torch.linalg.vector_norm(pair, dim=-1) * 0.5**0.5

    return _graph(m, forward)


_TWINS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    layers.MaxMin: _max_min,
    layers.Abs: lambda m: _graph(m, lambda self, x: x.abs()),
    layers.GroupSort: lambda m: _sorted_groups(m, m.group_size, m.dim),
    layers.FullSort: lambda m: _graph(m, lambda self, x: x.sort(dim=m.dim)[0]),
    layers.BetaAbs: _beta_abs,
    layers.SoftHuber: lambda m: _graph(
        m, lambda self, x: (x * x + m.delta * m.delta).sqrt() - m.delta
    ),
    layers.HouseholderActivation: _householder,
    layers.HouseholderActivation2: _householder2,
    layers.NActivation: _n_activation,
    layers.ChannelShuffle: _channel_shuffle,
    layers.PadToStride: _pad_to_stride,
    layers.SymmetricPad: _symmetric_pad,
    layers.SpaceToDepth1d: _space_to_depth,
    layers.SpaceToDepth2d: lambda m: nn.PixelUnshuffle(m.downscale_factor),
    layers.SpaceToDepth3d: _space_to_depth,
    layers.SpatialShift2d: _spatial_shift,
    layers.Normalize: _normalize,
    layers.LayerCentering: lambda m: _graph(m, lambda self, x: x - x.mean(dim=m.dim, keepdim=True)),
    layers.Scale: lambda m: _graph(m, lambda self, x: x * m.factor),
    layers.FirstChannels: lambda m: _graph(m, lambda self, x: x[:, : m.channels]),
    layers.ConvexResidual: _convex_residual,
    layers.PrescaledResidual: _prescaled_residual,
    layers.AdditiveResidual: _residual(lambda x, y: (x + y) / 2),
    layers.ConcatResidual: _concat_residual,
    layers.L2NormResidual: _l2_residual,
    ConvexSum: _convex,
    BranchGain: _gain,
    PrescaledSum: _prescaled,
    layers.L2NormPool: _l2_norm_pool,
    layers.ScaledAvgPool: _scaled_avg_pool,
    layers.AdaptiveL2NormPool: _adaptive_l2,
    layers.AdaptiveScaledAvgPool: _adaptive_average,
    layers.GlobalL2NormPool: _global_l2,
    layers.GlobalScaledAvgPool: _global_average,
    layers.BatchCentering: _batch_norm,
    layers.BatchLipNorm: _batch_norm,
}


@torch.no_grad()
def stock_twin(module: nn.Module) -> nn.Module | None:
    """A module without anything of this library that does the same; None where there is none.

    Its sub-modules are those of `module`.
    """
    make = _TWINS.get(type(module))
    return None if make is None else make(module).train(module.training)
