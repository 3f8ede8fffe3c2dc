"""Recurrent networks that contract: every step has a Lipschitz constant below 1 by construction."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orthonet import _checks
from orthonet.functional.recurrence import ACTIVATIONS, recurrence
from orthonet.layers.recurrent.base import RecurrentLayer, State, at_last
from orthonet.layers.recurrent.kernels import check_nonlinearity
from orthonet.manifolds.trivialization import Triv
from orthonet.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams

__all__ = ["ContractiveRNN"]

_NONLINEARITIES = tuple(ACTIVATIONS)  # each of them is 1-Lipschitz


def _check_rates(owner: object, leak: float, contraction: float) -> float:
    """Return the factor kappa of the recurrent kernel."""
    _checks.in_range(owner, 1e-6, 1.0, leak=leak)
    _checks.in_range(owner, 1.0 - leak, 1.0, contraction=contraction)
    return max(0.0, (contraction - (1.0 - leak)) / leak)


class ContractiveRNN(RecurrentLayer):
    r"""A recurrent network whose step contracts the state by a given factor, at least.

    \[ h_t = (1 - \alpha)\, R\, h_{t-1} + \alpha\, \phi(\kappa\, Q\, h_{t-1} + U x_t + b), \qquad
       \kappa = \frac{\rho - (1 - \alpha)}{\alpha}, \]

    with orthogonal \(R, Q\), semi-orthogonal \(U\), leak \(\alpha\) and contraction \(\rho\). It
    is the Lipschitz recurrent unit of Erichson et al., \(\dot h = A h + \phi(W h + U x + b)\), with
    the linear part integrated exactly (\(R\) is its rotation, \(1 - \alpha\) its damping) and
    \(\|W\|\) tied to the damping, so that stability is a property of every parameter value
    rather than of some. \(\alpha = 1\) leaves the orthogonal network
    \(\phi(\rho Q h + U x + b)\).

    *Proof of the constants.* Let \((h, x)\) and \((h', x')\) be two states and inputs. As
    \(\phi\) is 1-Lipschitz, by the triangle inequality

    \[ \|h_{t} - h'_{t}\| \le (1-\alpha)\|R(h - h')\| + \alpha\|\kappa Q(h - h') + U(x - x')\|
       \le \bigl((1-\alpha) + \alpha\kappa\bigr)\|h - h'\| + \alpha\|x - x'\|, \]

    because \(R\) and \(Q\) are isometries and \(\|U\|_2 = 1\); the first factor is \(\rho\) by the
    choice of \(\kappa\). Hence after T steps the state depends on its first value with constant
    \(\rho^T\), and on the inputs as
    [`sequence_bound`][orthonet.certify.sequence_bound]`(T, rho, alpha)` says: below
    \(\alpha / (1 - \rho)\) for \(\rho < 1\), for every T.

    The other arguments are those of [`OrthoRNN`][orthonet.layers.OrthoRNN]; there is one bias. For
    loops of your own, one step is `layer(x[None], h[None])`.

    Args:
        nonlinearity: "tanh", "relu", "max_min", "abs" or "identity".
        leak: \(\alpha\) in (0, 1], the share of the state that is renewed in a step.
        contraction: \(\rho\) in \([1 - \alpha, 1]\), the constant of a step in the state.

    Shape:
        As `OrthoRNN`.

    Guarantee:
        A step is \(\rho\)-Lipschitz in the state and \(\alpha\)-Lipschitz in the input (l2, upper
        bounds, up to the rounding of the kernels), for every value of the parameters, in train and
        eval.

    Raises:
        ValueError: As of `OrthoRNN`.

    Examples:
        >>> layer = ContractiveRNN(3, 8, leak=0.5, contraction=0.9)
        >>> layer(torch.zeros(5, 2, 3))[0].shape
        torch.Size([5, 2, 8])

    References:
        Erichson, Azencot, Queiruga, Hodgkinson & Mahoney, *Lipschitz recurrent neural networks*,
        ICLR 2021, https://arxiv.org/abs/2006.12070; Lohmiller & Slotine, *On contraction analysis
        for non-linear systems*, Automatica 34 (1998).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        leak: float = 1.0,
        contraction: float = 0.95,
        ortho_params: OrthoParams | str = DEFAULT_ORTHO_PARAMS,
        triv: Triv | None = None,
        init: str = "haar",
    ) -> None:
        owner = type(self)
        _checks.positive_int(owner, hidden_size=hidden_size)
        check_nonlinearity(owner, _NONLINEARITIES, nonlinearity, hidden_size)
        self.kappa = _check_rates(owner, leak, contraction)
        self.leak, self.contraction, self.nonlinearity = leak, contraction, nonlinearity
        shape = (input_size, hidden_size, num_layers)
        run = (bias, batch_first, dropout, bidirectional, 0)
        super().__init__("CONTRACTIVE", *shape, *run, device, dtype, ortho_params, triv, init)

    def _build(self, suffix: str, inputs: int, factory: dict[str, Any]) -> None:
        size = self.hidden_size
        names = [f"weight_ih{suffix}", f"weight_hh{suffix}"]
        self._add_kernel(names[0], (size, inputs), **factory)
        self._add_kernel(names[1], (size, size), **factory)
        if self.leak < 1.0:
            names.append(f"weight_hh_linear{suffix}")
            self._add_kernel(names[-1], (size, size), **factory)
        if self.bias:
            names.append(f"bias_ih{suffix}")
            self.register_parameter(names[-1], nn.Parameter(torch.empty(size, **factory)))
        self._all_weights.append(names)

    def step_weights(self, suffix: str) -> tuple[Tensor, Tensor, Tensor | None]:
        r"""Return the matrices \(U\), \(\kappa Q\) and, if there is a leak, \((1 - \alpha) R\)."""
        kernel = self.kappa * self._kernel(f"weight_hh{suffix}")
        linear = None
        if self.leak < 1.0:
            linear = (1.0 - self.leak) * self._kernel(f"weight_hh_linear{suffix}")
        return self._kernel(f"weight_ih{suffix}"), kernel, linear

    def _scan(
        self, suffix: str, x: Tensor, states: State, last: Tensor | None
    ) -> tuple[Tensor, State]:
        bias = getattr(self, f"bias_ih{suffix}").to(x.dtype) if self.bias else None
        weight_ih, kernel, linear = self.step_weights(suffix)
        if linear is None:
            y, final = recurrence(x, states[0], weight_ih, kernel, bias, self.nonlinearity)
            return y, (final if last is None else at_last(y, last),)
        both, h, outputs = torch.cat((linear, kernel)).mT, states[0], []
        activation = ACTIVATIONS[self.nonlinearity]
        for u in F.linear(x, weight_ih, bias).unbind(0):
            kept, pre = (h @ both).chunk(2, -1)
            h = torch.add(kept, activation(pre + u), alpha=self.leak)
            outputs.append(h)
        y = torch.stack(outputs)
        return y, (at_last(y, last),)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, nonlinearity={self.nonlinearity}, leak={self.leak}, "
            f"contraction={self.contraction}, init={self.init}"
        )
