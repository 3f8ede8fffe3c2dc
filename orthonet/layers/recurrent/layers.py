"""Simple recurrent networks with an orthogonal recurrent kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orthonet import _checks
from orthonet.functional.recurrence import ACTIVATIONS, NONLINEARITIES, mod_relu, recurrence
from orthonet.layers.recurrent.base import RecurrentLayer, State, at_last
from orthonet.layers.recurrent.cells import RecurrentCell
from orthonet.layers.recurrent.kernels import check_nonlinearity, uniform_
from orthonet.manifolds.trivialization import Triv
from orthonet.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams

__all__ = ["FinalState", "OrthoRNN", "OrthoRNNCell"]

_THRESHOLD = 0.01  # the first shifts of modReLU are uniform in (-0.01, 0.01)


def _require_stock(layer: Any, twin: str) -> None:
    _checks.require(
        layer.nonlinearity in ("tanh", "relu"),
        layer,
        f"nn.{twin} has the nonlinearities tanh and relu only",
        "Keep it as it is, or export it with torch.export",
        nonlinearity=layer.nonlinearity,
    )


class OrthoRNN(RecurrentLayer):
    r"""`nn.RNN` with orthogonal recurrent kernels: \(h_t = \phi(W_{ih} x_t + b + Q h_{t-1})\).

    \(Q\) is square with \(Q^\top Q = I\), so the state neither explodes nor vanishes through
    it. The nonlinearity decides how the gradient passes through \(\phi\):

    | `nonlinearity` | constant | gradient norm through time |
    |---|---|---|
    | `"abs"`, `"max_min"`, `"identity"` | 1 | kept exactly |
    | `"modrelu"` | 1 if its shifts are \(\le 0\), else none | kept where no entry is cut off |
    | `"tanh"`, `"relu"` | 1 | falls |

    Args:
        input_size: Features of the input.
        hidden_size: Features of the state.
        num_layers: Layers that are stacked.
        nonlinearity: One of the table.
        bias: Whether to add the learnable biases `bias_ih` and `bias_hh`.
        batch_first: Whether batches come as (batch, time, features).
        dropout: Probability of dropping a feature between two layers, in training.
        bidirectional: Whether a second kernel runs backwards in time.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters; the layer computes in at least float32.
        ortho_params: How the recurrent kernels are made orthogonal.
        triv: Instead of `ortho_params`: "exponential", "cayley" or a map from skew-symmetric
            matrices, for dynamic trivialization around a base, see `update_base`.
        init: Where they start: `"haar"`; `"henaff"`, 2x2 rotations by angles uniform in
            \((-\pi, \pi)\); `"cayley"`, in \((0, \pi/2)\); `"identity"`.

    Shape:
        As `nn.RNN`: input (time, batch, input_size), (time, input_size), with `batch_first`
        (batch, time, input_size), or a `PackedSequence`; output the same with
        `directions * hidden_size` features, and the last state
        (num_layers * directions, batch, hidden_size).

    Guarantee:
        \(\max|\sigma - 1|\) of each recurrent kernel as the orthogonalizer promises, 2e-6 in
        float32 with every preset, in train and eval. A step is non-expansive in the state; for the
        constant of a whole sequence see
        [`sequence_bound`][orthonet.certify.sequence_bound]. A kernel is computed once a call,
        however long the sequence. Under autocast the layer computes in, and returns, the dtype of
        its
        parameters: an error of the kernel would act once a step.

    Raises:
        ValueError: An argument is out of range; when called: shapes or dtypes do not fit.

    Examples:
        >>> layer = OrthoRNN(3, 8, nonlinearity="abs", batch_first=True)
        >>> output, last = layer(torch.zeros(2, 5, 3))
        >>> output.shape, last.shape
        (torch.Size([2, 5, 8]), torch.Size([1, 2, 8]))

    References:
        Arjovsky, Shah & Bengio, *Unitary evolution recurrent neural networks*, ICML 2016;
        Lezcano-Casado & Martínez-Rubio, *Cheap orthogonal constraints in neural networks*, ICML
        2019.
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
        ortho_params: OrthoParams | str = DEFAULT_ORTHO_PARAMS,
        triv: Triv | None = None,
        init: str = "haar",
    ) -> None:
        _checks.positive_int(type(self), hidden_size=hidden_size)
        check_nonlinearity(type(self), NONLINEARITIES, nonlinearity, hidden_size)
        self.nonlinearity = nonlinearity
        shape = (input_size, hidden_size, num_layers)
        run = (bias, batch_first, dropout, bidirectional, 0)
        mode = f"RNN_{nonlinearity.upper()}"
        super().__init__(mode, *shape, *run, device, dtype, ortho_params, triv, init)

    def _build(self, suffix: str, inputs: int, factory: dict[str, Any]) -> None:
        super()._build(suffix, inputs, factory)
        if self.nonlinearity == "modrelu":
            threshold = nn.Parameter(torch.empty(self.hidden_size, **factory))
            self.register_parameter(f"threshold{suffix}", threshold)

    def reset_parameters(self) -> None:
        """Draw the kernels anew, the rest uniformly as `nn.RNN`, and small shifts of modReLU."""
        super().reset_parameters()
        shifts = [p for name, p in self.named_parameters(recurse=False) if "threshold" in name]
        uniform_(shifts, _THRESHOLD)

    def _scan(
        self, suffix: str, x: Tensor, states: State, last: Tensor | None
    ) -> tuple[Tensor, State]:
        bias = threshold = None
        if self.bias:
            bias = getattr(self, f"bias_ih{suffix}") + getattr(self, f"bias_hh{suffix}")
            bias = bias.to(x.dtype)
        if self.nonlinearity == "modrelu":
            threshold = getattr(self, f"threshold{suffix}").to(x.dtype)
        weight_ih = getattr(self, f"weight_ih{suffix}").to(x.dtype)
        kernel = self._kernel(f"weight_hh{suffix}")
        y, final = recurrence(x, states[0], weight_ih, kernel, bias, self.nonlinearity, threshold)
        return y, (final if last is None else at_last(y, last),)

    def to_plain(self) -> nn.RNN:
        """Return a new `nn.RNN` with the present weights, independent of this layer.

        Raises:
            ValueError: `nn.RNN` does not have the nonlinearity.
        """
        _require_stock(self, "RNN")
        return self._plain(nn.RNN, nonlinearity=self.nonlinearity)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, nonlinearity={self.nonlinearity}, init={self.init}"


class OrthoRNNCell(RecurrentCell, nn.RNNCell):
    r"""`nn.RNNCell` with an orthogonal recurrent kernel: \(h' = \phi(W_{ih} x + b + Q h)\).

    The arguments are those of `nn.RNNCell` and the options of
    [`OrthoRNN`][orthonet.layers.OrthoRNN], which is faster for a whole sequence.

    Shape:
        Input (batch, input_size) or (input_size,); state and output (batch, hidden_size) or
        (hidden_size,).

    Guarantee:
        As of `OrthoRNN`. A step is non-expansive in the state, and in the input up to
        \(\|W_{ih}\|_2\) (for modReLU: with shifts \(\le 0\)).

    Raises:
        ValueError: As of `OrthoRNN`.

    Examples:
        >>> OrthoRNNCell(3, 8)(torch.zeros(2, 3)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        ortho_params: OrthoParams | str = DEFAULT_ORTHO_PARAMS,
        triv: Triv | None = None,
        init: str = "haar",
    ) -> None:
        _checks.positive_int(type(self), hidden_size=hidden_size)
        check_nonlinearity(type(self), NONLINEARITIES, nonlinearity, hidden_size)
        self.nonlinearity = nonlinearity
        options: Any = {"ortho_params": ortho_params, "triv": triv, "init": init}
        super().__init__(input_size, hidden_size, bias, device, dtype, **options)

    def _add_parameters(self, factory: dict[str, Any]) -> None:
        if self.nonlinearity == "modrelu":
            self.threshold = nn.Parameter(torch.empty(self.hidden_size, **factory))

    def reset_parameters(self) -> None:
        """Draw the kernel anew, the rest uniformly as `nn.RNNCell`, and small shifts of modReLU."""
        super().reset_parameters()
        if self.nonlinearity == "modrelu":
            uniform_([self.threshold], _THRESHOLD)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return the next state, from the state `hx` (zeros if None)."""
        _checks.real_input(self, input, "input")
        with torch.autocast(input.device.type, enabled=False):
            x, states, single = self._prepared(input, hx)
            weight_ih, kernel, bias_ih, bias_hh = self._weights(x)
            z = F.linear(x, weight_ih, bias_ih) + F.linear(states[0], kernel, bias_hh)
            if self.nonlinearity == "modrelu":
                h = mod_relu(z, self.threshold.to(z.dtype))
            else:
                h = ACTIVATIONS[self.nonlinearity](z)
        return self._finished(h, single)

    def to_plain(self) -> nn.RNNCell:
        """Return a new `nn.RNNCell` with the present weights, independent of this cell.

        Raises:
            ValueError: `nn.RNNCell` does not have the nonlinearity.
        """
        _require_stock(self, "RNNCell")
        return self._plain(nn.RNNCell, nonlinearity=self.nonlinearity)


class FinalState(nn.Module):
    """Map a sequence to the last state of the last layer of a recurrent layer.

    For classifiers and for certificates: the constant of this map grows with the root of the number
    of steps, that of the whole output with the number itself.

    Args:
        rnn: `OrthoRNN`, `OrthoGRU`, `OrthoLSTM`, `ContractiveRNN`, or a stock layer.

    Shape:
        Input as that of `rnn`; output (batch, directions * hidden_size), for an LSTM its h.

    Examples:
        >>> model = nn.Sequential(FinalState(OrthoRNN(3, 8, batch_first=True)), nn.Linear(8, 2))
        >>> model(torch.zeros(4, 5, 3)).shape
        torch.Size([4, 2])

    Raises:
        ValueError: `rnn` is no module.
    """

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        _checks.module(self, rnn=rnn)
        self.rnn = rnn

    def forward(self, input: Any) -> Tensor:
        """Return the last state after a sequence."""
        _, state = self.rnn(input)
        state = state[0] if isinstance(state, tuple) else state
        return torch.cat((state[-2], state[-1]), -1) if self.rnn.bidirectional else state[-1]
