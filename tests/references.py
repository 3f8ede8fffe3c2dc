"""Obviously correct and slow float64 twins of the fast code; nothing here is shipped."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# --- matrices ------------------------------------------------------------------------------


def polar_reference(w: Tensor) -> Tensor:
    """Polar factor by SVD in float64."""
    u, _, vh = torch.linalg.svd(w.double(), full_matrices=False)
    return u @ vh


def polar_gradient_reference(w: Tensor, grad: Tensor) -> Tensor:
    """Gradient of <grad, polar(w)> for full rank, entry by entry in the singular bases."""
    w, grad = w.double(), grad.double()
    if w.shape[-2] < w.shape[-1]:
        return polar_gradient_reference(w.mT, grad.mT).mT
    u, s, vh = torch.linalg.svd(w, full_matrices=True)
    n = w.shape[-1]
    inner = u.mT @ grad @ vh.mT  # rows beyond n are normal to the range of w
    top = (inner[..., :n, :] - inner[..., :n, :].mT) / (s[..., :, None] + s[..., None, :])
    bottom = inner[..., n:, :] / s[..., None, :]
    return u @ torch.cat([top, bottom], -2) @ vh


def qr_reference(w: Tensor) -> Tensor:
    """Orthogonal factor by modified Gram-Schmidt with a second pass, in float64."""
    w = w.double()
    if w.shape[-2] < w.shape[-1]:
        return qr_reference(w.mT).mT
    columns: list[Tensor] = []
    for column in w.unbind(-1):
        for _ in range(2):
            for q in columns:
                column = column - (q * column).sum(-1, keepdim=True) * q
        columns.append(column / column.norm(dim=-1, keepdim=True))
    return torch.stack(columns, -1)


def rotation_reference(w: Tensor, base: Tensor) -> Tensor:
    """exp(W B^T - B W^T) B with the full exponential in float64."""
    if w.shape[-2] < w.shape[-1]:
        return rotation_reference(w.mT, base.mT).mT
    product = w.double() @ base.double().mT
    return torch.matrix_exp(product - product.mT) @ base.double()


# --- operators -----------------------------------------------------------------------------


def convolution_by_unit_vectors(
    kernel: Tensor,
    input_size: tuple[int, ...],
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """The float64 matrix (out, in) of a convolution, one column for each unit vector."""
    dims = kernel.ndim - 2
    channels = kernel.shape[1] * groups
    shape = (channels, *input_size)
    unit = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    if padding_mode != "zeros":
        each = (padding,) * dims if isinstance(padding, int) else tuple(padding)
        amounts = [p for side in reversed(each) for p in (side, side)]
        unit, padding = F.pad(unit, amounts, mode=padding_mode), 0
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    return convolve(unit, kernel.double(), None, stride, padding, dilation, groups).flatten(1).T


def jacobian_reference(f, x: Tensor) -> Tensor:
    """The Jacobian (out, in) of `f` at one sample x, by autograd.

    `f` takes a batch and maps each sample by itself, so that each copy of x gives a row.
    """
    with torch.no_grad():
        rows = f(x[None])[0].numel()
    copies = x.detach().expand(rows, *x.shape).clone().requires_grad_()
    y = f(copies)
    if not (rows and y.requires_grad):
        return x.new_zeros(rows, x.numel())
    (jacobian,) = torch.autograd.grad(y.reshape(rows, rows).diagonal().sum(), copies)
    return jacobian.reshape(rows, x.numel())


class StiefelReference:
    """One matrix after the other, with explicit projections and an SVD for each retraction."""

    def __init__(self, optimizer) -> None:
        self.kind, self.options, self.states = type(optimizer).__name__, optimizer.defaults, {}

    def step(self, index: int, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        flat = zip(x.reshape(-1, *x.shape[-2:]), grad.reshape(-1, *x.shape[-2:]), strict=True)
        moved = [self._one((index, i), a, g) for i, (a, g) in enumerate(flat)]
        return torch.stack(moved).reshape(x.shape)

    def _one(self, key, x, grad):
        if x.shape[0] < x.shape[1]:
            return self._one(key, x.T, grad.T).T
        o = self.options
        state = self.states.setdefault(key, {"t": 0, "m": torch.zeros_like(x), "v": 0.0})
        state["t"] += 1
        t, before = state["t"], state["m"]
        if self.kind == "StiefelAdam":
            beta1, beta2 = o["betas"]
            g = _tangent_part(x, grad)
            if x.shape[0] == x.shape[1]:  # the momentum in coordinates, X times it in the space
                state["m"] = m = beta1 * before + (1 - beta1) * x.T @ g
            else:
                state["m"] = m = _tangent_part(x, beta1 * before + (1 - beta1) * grad)
            state["v"] = beta2 * state["v"] + (1 - beta2) * g.square().mean()
            root = (state["v"] / (1 - beta2**t)) ** 0.5
            d = m / (1 - beta1**t) / (root + o["eps"])
            if x.shape[0] == x.shape[1]:
                return _turned(x, o["lr"] * d)
        else:
            mu = o["momentum"]
            share = 1.0 if t == 1 else 1.0 - o.get("dampening", 0.0)
            state["m"] = m = _tangent_part(x, mu * before + share * grad)
            d = m + mu * m - mu * before if o["nesterov"] else m
        if self.kind == "StiefelMuon":
            d = d / torch.linalg.matrix_norm(d).clamp_min(1e-300)
            for _ in range(o["ns_steps"]):
                a = d @ d.T
                d = 3.4445 * d - 4.7750 * a @ d + 2.0315 * a @ a @ d
            d = _tangent_part(x, d)
        return _nearest(x - o["lr"] * d)


def _turned(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal matrix of X (I - B + B^2 / 2)."""
    return _nearest(x - x @ b + x @ b @ b / 2)


def _nearest(y: torch.Tensor) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(y, full_matrices=False)
    return u @ vh


def _tangent_part(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    s = x.T @ v
    return v - x @ (s + s.T) / 2


# --- autocast ------------------------------------------------------------------------------


class RoundedWeights(TorchFunctionMode):
    """Runs a model as under autocast, but rounds nothing except the weights it would round."""

    _AFFINE = (
        F.linear,
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.conv_transpose1d,
        F.conv_transpose2d,
        F.conv_transpose3d,
    )

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in self._AFFINE or not torch.is_autocast_enabled("cpu"):
            return func(*args, **(kwargs or {}))
        x, *rest = args
        rest = [a.to(self.dtype).to(a.dtype) if isinstance(a, Tensor) else a for a in rest]
        with torch.autocast("cpu", enabled=False):
            return func(x, *rest, **(kwargs or {}))

    def run(self, model, x: Tensor) -> Tensor:
        with self, torch.autocast("cpu", self.dtype):
            return model(x)
