r"""The time loop of a simple recurrent network, with a backward pass of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from orthonet import _checks
from orthonet._torch import in_forward_mode, in_transform
from orthonet.functional._activations import absolute, max_min

__all__ = ["ACTIVATIONS", "NONLINEARITIES", "mod_relu", "recurrence", "recurrence_loop"]

NONLINEARITIES = ("tanh", "relu", "modrelu", "max_min", "abs", "identity")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "max_min": lambda z: max_min(z, -1),
    "abs": absolute,
    "identity": lambda z: z,
}


def mod_relu(
    x: Tensor,  # (*, features)
    bias: Tensor,  # (features,)
) -> Tensor:
    r"""Shift the modulus of every entry: \(\operatorname{sign}(x)\,\max(|x| + b, 0)\).

    Args:
        x: Input, with the features in the last dimension.
        bias: One shift for each feature.

    Shape:
        Any shape ending in the size of `bias`; the output has the same.

    Guarantee:
        With \(b \le 0\) this is soft thresholding: 1-Lipschitz, and gradient-norm preserving where
        no entry is cut off. With \(b > 0\) it jumps by \(2b\) at 0 and has no Lipschitz constant.

    Raises:
        ValueError: `bias` is not a vector of the size of the last dimension.

    Examples:
        >>> mod_relu(torch.tensor([[-2.0, 0.5]]), torch.tensor([-1.0, -1.0]))
        tensor([[-1., 0.]])

    References:
        Arjovsky, Shah & Bengio, *Unitary evolution recurrent neural networks*, ICML 2016,
        equation 8, https://arxiv.org/abs/1511.06464
    """
    _checks.real_input("mod_relu", x)
    _checks.tensor("mod_relu", bias=bias)
    _checks.require(
        x.ndim >= 1 and bias.shape == x.shape[-1:],
        "mod_relu",
        "bias must hold one shift for each feature",
        "Make it a vector of the size of the last dimension",
        x=x,
        bias=bias,
    )
    return x.sign() * F.relu(x.abs() + bias)


def recurrence(
    x: Tensor,  # (time, batch, inputs)
    h0: Tensor,  # (batch, hidden)
    weight_ih: Tensor,  # (hidden, inputs)
    weight_hh: Tensor,  # (hidden, hidden)
    bias: Tensor | None = None,  # (hidden,)
    nonlinearity: str = "tanh",
    threshold: Tensor | None = None,  # (hidden,)
) -> tuple[Tensor, Tensor]:
    r"""Run \(h_t = \phi(W_{hh} h_{t-1} + W_{ih} x_t + b)\) over a sequence.

    The inputs of all steps are projected in one product. The backward pass is written by hand:
    one product a step for \(\partial L / \partial h_t\), and one for the whole sequence for each
    gradient of a weight, \(\partial L/\partial W_{hh} = \sum_t \delta_t h_{t-1}^\top\). Under
    `torch.compile` the loop is one opaque operator, so that the graph does not grow with the
    time. `torch.func` transforms, forward-mode differentiation and a second derivative take the
    plain loop, which PyTorch differentiates itself.

    Args:
        x: The sequence, time first.
        h0: state before the first step.
        weight_ih: Input kernel.
        weight_hh: Recurrent kernel.
        bias: Added in every step.
        nonlinearity: "tanh", "relu", "modrelu", "max_min" (pairs channel i of the first half with
            channel i of the second), "abs" or "identity".
        threshold: The shift of "modrelu", see [`mod_relu`][orthonet.functional.mod_relu]; needed
            there and refused elsewhere.

    Returns:
        The states of all steps (time, batch, hidden) and the last one (batch, hidden).

    Raises:
        ValueError: An unknown nonlinearity, a missing or superfluous threshold, an odd number of
            hidden features for "max_min", no time step, or shapes that do not fit.

    Examples:
        >>> x, h0 = torch.ones(3, 1, 1), torch.zeros(1, 1)
        >>> recurrence(x, h0, torch.eye(1), torch.eye(1), nonlinearity="identity")[1]
        tensor([[3.]])
    """
    _check(x, h0, weight_ih, weight_hh, bias, nonlinearity, threshold)
    arguments = (x, h0, weight_ih, weight_hh, bias, nonlinearity, threshold)
    if in_transform() or in_forward_mode():
        return recurrence_loop(*arguments)
    if torch.compiler.is_compiling():
        states, _ = _forward_op(*arguments)
        return states, states[-1]
    return _Recurrence.apply(*arguments)


def recurrence_loop(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    nonlinearity: str = "tanh",
    threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence step by step, for PyTorch to differentiate."""
    kernel, h, states = weight_hh.mT, h0, []
    for u in F.linear(x, weight_ih, bias).unbind(0):
        z = torch.addmm(u, h, kernel)
        h = mod_relu(z, threshold) if threshold is not None else ACTIVATIONS[nonlinearity](z)
        states.append(h)
    return torch.stack(states), h


def _check(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    nonlinearity: str,
    threshold: Tensor | None,
) -> None:
    owner, vectors = "recurrence", {"bias": bias, "threshold": threshold}
    if nonlinearity not in NONLINEARITIES:
        _checks.one_of(owner, NONLINEARITIES, nonlinearity=nonlinearity)
    if (nonlinearity == "modrelu") != (threshold is not None):
        _checks.fail(
            owner,
            "threshold must be given for modrelu, and only there",
            "Pass a vector or None",
            nonlinearity=nonlinearity,
            threshold=threshold,
        )
    _checks.tensor(owner, x=x, h0=h0, weight_ih=weight_ih, weight_hh=weight_hh)
    _checks.tensor(owner, **{k: v for k, v in vectors.items() if v is not None})
    hidden = weight_hh.shape[0] if weight_hh.ndim else 0
    if nonlinearity == "max_min" and hidden % 2:
        _checks.fail(
            owner,
            "max_min needs an even number of hidden features",
            "Add or drop one",
            hidden=hidden,
        )
    fits = x.ndim == 3 and x.shape[0] > 0 and weight_ih.shape == (hidden, x.shape[-1])
    fits = fits and weight_hh.shape == (hidden, hidden) and h0.shape == (x.shape[1], hidden)
    if not fits or any(v is not None and v.shape != (hidden,) for v in vectors.values()):
        _checks.fail(
            owner,
            "x must be (time >= 1, batch, inputs), h0 (batch, hidden), weight_ih (hidden, "
            "inputs), weight_hh (hidden, hidden), bias and threshold (hidden,)",
            "Transpose or reshape them",
            x=x,
            h0=h0,
            weight_ih=weight_ih,
            weight_hh=weight_hh,
        )


def _run(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    nonlinearity: str,
    threshold: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the states of all steps (time, batch, hidden), and what else backward needs."""
    time, batch, inputs = x.shape
    hidden = weight_hh.shape[0]
    states = h0.new_empty(time, batch, hidden)
    projected = states.view(time * batch, hidden)
    if bias is None:
        torch.mm(x.reshape(-1, inputs), weight_ih.mT, out=projected)
    else:
        torch.addmm(bias, x.reshape(-1, inputs), weight_ih.mT, out=projected)
    kept = states.new_empty(0)
    if nonlinearity == "abs":
        kept = torch.empty_like(states)
    elif nonlinearity == "max_min":
        kept = torch.empty(time, batch, hidden // 2, dtype=torch.bool, device=x.device)
    kernel, h = weight_hh.mT, h0
    for t, z in enumerate(states.unbind(0)):
        z.addmm_(h, kernel)
        h = z
        if nonlinearity == "tanh":
            z.tanh_()
        elif nonlinearity == "relu":
            z.relu_()
        elif nonlinearity == "abs":
            torch.ge(z, 0, out=kept[t])
            kept[t].mul_(2).sub_(1)
            z.mul_(kept[t])
        elif nonlinearity == "max_min":
            a, b = z.chunk(2, -1)
            torch.lt(a, b, out=kept[t])
            low = torch.minimum(a, b)
            torch.maximum(a, b, out=a)
            b.copy_(low)
        elif threshold is not None:
            sign = z.sign()
            z.abs_().add_(threshold).relu_().mul_(sign)
    return states, kept


def _pull_back(
    grad_states: Tensor | None,  # (time, batch, hidden)
    grad_last: Tensor | None,  # (batch, hidden)
    states: Tensor,
    kept: Tensor,
    weight_hh: Tensor,
    nonlinearity: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of the pre-activations (time, batch, hidden) and of h0."""
    time = states.shape[0]
    if nonlinearity == "tanh":
        delta = torch.addcmul(torch.ones_like(states), states, states, value=-1)
    elif nonlinearity in ("relu", "modrelu"):
        delta = (states != 0).to(states.dtype)
    elif nonlinearity == "abs":
        delta = kept.clone()
    else:
        delta = torch.empty_like(states)
    rows = delta.unbind(0)
    arriving = grad_states.unbind(0) if grad_states is not None else None
    g = torch.zeros_like(states[0]) if grad_last is None else grad_last
    if arriving is not None:
        g = g + arriving[-1]
    for t in range(time - 1, -1, -1):
        row = rows[t]
        if nonlinearity == "identity":
            row.copy_(g)
        elif nonlinearity == "max_min":
            high, low = g.chunk(2, -1)
            swapped = torch.where(kept[t], low, high), torch.where(kept[t], high, low)
            torch.cat(swapped, -1, out=row)
        else:
            row.mul_(g)
        if t and arriving is not None:
            g = torch.addmm(arriving[t - 1], row, weight_hh)
        else:
            g = row @ weight_hh
    return delta, g


def _gradients(
    grad_states: Tensor | None,
    grad_last: Tensor | None,
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    states: Tensor,
    kept: Tensor,
    nonlinearity: str,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, h0, weight_ih, weight_hh, bias and threshold, where they are needed."""
    delta, grad_h0 = _pull_back(grad_states, grad_last, states, kept, weight_hh, nonlinearity)
    flat, hidden = delta.flatten(0, 1), weight_hh.shape[0]
    x_needed, h0_needed, ih_needed, hh_needed, bias_needed, threshold_needed = needed
    grad_hh = None
    if hh_needed:
        grad_hh = delta[0].mT @ h0
        grad_hh.addmm_(delta[1:].flatten(0, 1).mT, states[:-1].view(-1, hidden))
    return (
        (flat @ weight_ih).view(x.shape) if x_needed else None,
        grad_h0 if h0_needed else None,
        flat.mT @ x.reshape(-1, x.shape[-1]) if ih_needed else None,
        grad_hh,
        flat.sum(0) if bias_needed else None,
        (delta * states.sign()).sum((0, 1)) if threshold_needed else None,
    )


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h0, weight_ih, weight_hh, bias, nonlinearity, threshold):
        states, kept = _run(x, h0, weight_ih, weight_hh, bias, nonlinearity, threshold)
        ctx.save_for_backward(x, h0, weight_ih, weight_hh, bias, threshold, states, kept)
        ctx.nonlinearity = nonlinearity
        ctx.set_materialize_grads(False)
        return states, states[-1].clone()

    @staticmethod
    def backward(ctx, grad_states, grad_last):
        x, h0, weight_ih, weight_hh, bias, threshold, states, kept = ctx.saved_tensors
        needed = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 4, 6)]
        if torch.is_grad_enabled():  # create_graph: PyTorch differentiates the plain loop
            arguments = (x, h0, weight_ih, weight_hh, bias, ctx.nonlinearity, threshold)
            gradients = _differentiable(arguments, needed, grad_states, grad_last)
        else:
            gradients = _gradients(
                grad_states,
                grad_last,
                x,
                h0,
                weight_ih,
                weight_hh,
                states,
                kept,
                ctx.nonlinearity,
                tuple(needed),
            )
        return (*gradients[:5], None, gradients[5])


def _differentiable(
    arguments: tuple, needed: list[bool], grad_states: Tensor | None, grad_last: Tensor | None
) -> tuple[Tensor | None, ...]:
    outputs = recurrence_loop(*arguments)
    given = zip(outputs, (grad_states, grad_last), strict=True)
    arrived = [(y, g) for y, g in given if g is not None]
    tensors = (*arguments[:5], arguments[6])
    chosen = [t for t, wanted in zip(tensors, needed, strict=True) if wanted]
    ys, gs = zip(*arrived, strict=True)
    found = iter(torch.autograd.grad(ys, chosen, gs, create_graph=True, allow_unused=True))
    return tuple(next(found) if wanted else None for wanted in needed)


# --- the same as operators that torch.compile does not look into -----------------------------


@torch.library.custom_op("orthonet::recurrence", mutates_args=())
def _forward_op(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    nonlinearity: str,
    threshold: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _run(x, h0, weight_ih, weight_hh, bias, nonlinearity, threshold)


@_forward_op.register_fake
def _forward_fake(x, h0, weight_ih, weight_hh, bias, nonlinearity, threshold):
    time, (batch, hidden) = x.shape[0], h0.shape
    if nonlinearity == "abs":
        kept = h0.new_empty(time, batch, hidden)
    elif nonlinearity == "max_min":
        kept = h0.new_empty(time, batch, hidden // 2, dtype=torch.bool)
    else:
        kept = h0.new_empty(0)
    return h0.new_empty(time, batch, hidden), kept


@torch.library.custom_op("orthonet::recurrence_backward", mutates_args=())
def _backward_op(
    grad_states: Tensor,  # (time, batch, hidden)
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    states: Tensor,
    kept: Tensor,
    nonlinearity: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = _gradients(
        grad_states, None, x, h0, weight_ih, weight_hh, states, kept, nonlinearity, (True,) * 6
    )
    grad_x, grad_h0, *rest = (g for g in gradients if g is not None)
    return grad_x, grad_h0, rest[0], rest[1], rest[2], rest[3]


@_backward_op.register_fake
def _backward_fake(grad_states, x, h0, weight_ih, weight_hh, states, kept, nonlinearity):
    like, vector = torch.empty_like, weight_hh.new_empty(weight_hh.shape[0])
    return (
        x.new_empty(x.shape),
        h0.new_empty(h0.shape),
        like(weight_ih).contiguous(),
        like(weight_hh).contiguous(),
        vector,
        like(vector),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, h0, weight_ih, weight_hh, bias, nonlinearity, threshold = inputs
    ctx.save_for_backward(x, h0, weight_ih, weight_hh, *output)
    ctx.nonlinearity = nonlinearity
    ctx.present = (bias is not None, threshold is not None)


def _backward_of_op(ctx, grad_states, grad_kept):
    x, h0, weight_ih, weight_hh, states, kept = ctx.saved_tensors
    gradients = _backward_op(
        grad_states, x, h0, weight_ih, weight_hh, states, kept, ctx.nonlinearity
    )
    has_bias, has_threshold = ctx.present
    bias = gradients[4] if has_bias else None
    return (*gradients[:4], bias, None, gradients[5] if has_threshold else None)


_forward_op.register_autograd(_backward_of_op, setup_context=_setup_context)
