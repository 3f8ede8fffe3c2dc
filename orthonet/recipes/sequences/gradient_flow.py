"""How the gradient of a loss travels back through the states of a recurrent layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks

__all__ = ["gradient_norms"]


def gradient_norms(
    rnn: nn.Module,
    x: Tensor,  # (time, batch, features)
    loss: Callable[[Tensor], Tensor],
) -> Tensor:
    r"""Norm of the gradient of a loss with respect to the state after each step.

    \(\|\partial L / \partial h_t\|_F\) over the batch, for t = 1 ... T, where everything after
    step t depends on \(h_t\); for a stack of layers and for an LSTM (h, c), all states of
    step t together. For a loss of the last state alone it is the same for every t, up to rounding,
    in an `OrthoRNN` of one layer whose nonlinearity keeps gradient norms: "abs", "max_min",
    "identity". With "modrelu" it falls by what is cut off, with "tanh" by the slopes.

    Args:
        rnn: `OrthoRNN`, `OrthoGRU`, `OrthoLSTM`, `ContractiveRNN`, or their `nn` twins, in one
            direction.
        x: Sequences, time first unless the layer has `batch_first`.
        loss: Of the outputs of all steps, in the form in which the layer returns them.

    Returns:
        The norms, (time,), in float64.

    Raises:
        ValueError: a bidirectional layer, whose states do not come one after the other.

    Examples:
        >>> from orthonet.layers import OrthoRNN
        >>> layer = OrthoRNN(2, 4, nonlinearity="abs")
        >>> norms = gradient_norms(layer, torch.randn(9, 3, 2), lambda y: y[-1].square().sum())
        >>> bool((norms / norms[-1] - 1).abs().max() < 1e-5)
        True
    """
    layer: Any = rnn
    _checks.require(
        not layer.bidirectional,
        "gradient_norms",
        "the layer must run in one direction",
        "Look at each direction on its own",
        bidirectional=layer.bidirectional,
    )
    dim = 1 if layer.batch_first else 0
    state, outputs, states = None, [], []
    with torch.enable_grad():
        for part in x.detach().split(1, dim):
            y, state = layer(part, state)
            parts = state if isinstance(state, tuple) else (state,)
            if not parts[0].requires_grad:  # no parameter is trained
                parts = tuple(p.requires_grad_() for p in parts)
            outputs.append(y)
            states.append(parts)
        value = loss(torch.cat(outputs, dim))
        flat = [tensor for parts in states for tensor in parts]
        wanted = [*flat, *outputs]
        found = torch.autograd.grad(value, wanted, allow_unused=True, retain_graph=False)
    count = len(states[0])
    norms = []
    for t in range(len(states)):
        gradients = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(states[t], found[t * count : (t + 1) * count], strict=True)
        ]
        direct = found[len(flat) + t]
        if direct is not None:  # the output of a step is the state of its last layer
            top = gradients[0].clone()
            top[-1] += direct.squeeze(dim)
            gradients[0] = top
        norms.append(sum(g.double().square().sum() for g in gradients).sqrt())  # type: ignore[union-attr]
    return torch.stack(norms)
