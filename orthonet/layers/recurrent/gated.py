"""GRU and LSTM with an orthogonal recurrent kernel in each gate."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orthonet import _checks
from orthonet._torch import in_forward_mode, is_traced
from orthonet.layers.recurrent.base import RecurrentLayer, State, at_last
from orthonet.layers.recurrent.cells import RecurrentCell
from orthonet.manifolds.trivialization import Triv
from orthonet.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams

__all__ = ["OrthoGRU", "OrthoGRUCell", "OrthoLSTM", "OrthoLSTMCell"]


def _differentiated_by_torch() -> bool:
    """Return whether PyTorch's own sequence kernels cannot be used."""
    return is_traced() or in_forward_mode()


class _GatedLayer(RecurrentLayer):
    """Runs all layers in PyTorch's own kernel, cuDNN or oneDNN; a loop under `torch.compile`."""

    def _stack(self, x: Tensor, sizes: Tensor | None, states: State) -> tuple[Tensor, State]:
        if _differentiated_by_torch():
            return super()._stack(x, sizes, states)
        weights = [self._any(name).to(x.dtype) for names in self._all_weights for name in names]
        run: Any = torch.lstm if self._states > 1 else torch.gru
        hx = list(states) if self._states > 1 else states[0]
        options = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)
        with _no_advice(x.is_cuda or self.proj_size > 0):
            if sizes is None:
                y, *states_ = run(x, hx, weights, *options, False)
            else:
                y, *states_ = run(x, sizes, hx, weights, *options)
        return y, tuple(states_)

    def _any(self, name: str) -> Tensor:
        return self._kernel(name) if name in self.recurrent else getattr(self, name)

    def _parts(self, suffix: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Projected inputs of all steps, transposed kernel, its bias, transposed projection."""
        bias = bias_hh = None
        if self.bias:
            bias = getattr(self, f"bias_ih{suffix}").to(x.dtype)
            bias_hh = getattr(self, f"bias_hh{suffix}").to(x.dtype)
        inputs = F.linear(x, getattr(self, f"weight_ih{suffix}").to(x.dtype), bias)
        project = self._kernel(f"weight_hr{suffix}").mT if self.proj_size else None
        return inputs, self._kernel(f"weight_hh{suffix}").mT, bias_hh, project


class OrthoGRU(_GatedLayer):
    r"""`nn.GRU` with an orthogonal recurrent kernel in each gate.

    \(r = \sigma(W_{ir} x + b_{ir} + Q_r h + b_{hr})\), \(z = \sigma(W_{iz} x + b_{iz} + Q_z h +
    b_{hz})\), \(n = \tanh(W_{in} x + b_{in} + r \odot (Q_n h + b_{hn}))\),
    \(h' = (1 - z) \odot n + z \odot h\), with \(Q_r, Q_z, Q_n\) orthogonal.

    The arguments are those of `nn.GRU`, then `ortho_params`, `triv` and `init` of
    [`OrthoRNN`][orthonet.layers.OrthoRNN], for the kernel of each gate.

    Shape:
        As `nn.GRU`.

    Guarantee:
        \(\max|\sigma - 1|\) of the kernel of each gate as the orthogonalizer promises, 2e-6 in
        float32 with every preset. The gates multiply states, so the map of sequences has no
        constant that is independent of the length and the inputs: `certify` refuses it.

    Raises:
        ValueError: As of `OrthoRNN`.

    Examples:
        >>> output, last = OrthoGRU(3, 8)(torch.zeros(5, 2, 3))
        >>> output.shape, last.shape
        (torch.Size([5, 2, 8]), torch.Size([1, 2, 8]))

    References:
        Cho et al., *Learning phrase representations using RNN encoder-decoder*, EMNLP 2014; Jing
        et al., *Gated orthogonal recurrent units*, Neural Computation 31 (2019).
    """

    _gates = 3

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
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
        shape = (input_size, hidden_size, num_layers)
        run = (bias, batch_first, dropout, bidirectional, 0)
        super().__init__("GRU", *shape, *run, device, dtype, ortho_params, triv, init)

    def _scan(
        self, suffix: str, x: Tensor, states: State, last: Tensor | None
    ) -> tuple[Tensor, State]:
        inputs, kernel, bias, _ = self._parts(suffix, x)
        h, outputs = states[0], []
        for u in inputs.unbind(0):
            v = h @ kernel if bias is None else torch.addmm(bias, h, kernel)
            (ur, uz, un), (vr, vz, vn) = u.chunk(3, -1), v.chunk(3, -1)
            r, z = torch.sigmoid(ur + vr), torch.sigmoid(uz + vz)
            n = torch.tanh(un + r * vn)
            h = n + z * (h - n)
            outputs.append(h)
        y = torch.stack(outputs)
        return y, (at_last(y, last),)

    def to_plain(self) -> nn.GRU:
        """Return a new `nn.GRU` with the present weights, independent of this layer."""
        return self._plain(nn.GRU)


class OrthoLSTM(_GatedLayer):
    r"""`nn.LSTM` with an orthogonal recurrent kernel in each gate.

    \((i, f, g, o) = W_{ih} x + b + (Q_i, Q_f, Q_g, Q_o) h\),
    \(c' = \sigma(f) \odot c + \sigma(i) \odot \tanh g\), \(h' = \sigma(o) \odot \tanh c'\), with
    orthogonal \(Q\). With `proj_size`, \(h' = P (\sigma(o) \odot \tanh c')\), and \(P\) and the
    now tall \(Q\) are semi-orthogonal.

    The arguments are those of `nn.LSTM`, `proj_size` among them, and those of
    [`OrthoGRU`][orthonet.layers.OrthoGRU].

    Shape:
        As `nn.LSTM`.

    Guarantee:
        As of `OrthoGRU`.

    Raises:
        ValueError: As of `OrthoGRU`.

    Examples:
        >>> output, (h, c) = OrthoLSTM(3, 8, proj_size=4)(torch.zeros(5, 2, 3))
        >>> output.shape, h.shape, c.shape
        (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]), torch.Size([1, 2, 8]))

    References:
        Hochreiter & Schmidhuber, *Long short-term memory*, Neural Computation 9 (1997).
    """

    _gates = 4
    _states = 2

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        ortho_params: OrthoParams | str = DEFAULT_ORTHO_PARAMS,
        triv: Triv | None = None,
        init: str = "haar",
    ) -> None:
        shape = (input_size, hidden_size, num_layers)
        run = (bias, batch_first, dropout, bidirectional, proj_size)
        super().__init__("LSTM", *shape, *run, device, dtype, ortho_params, triv, init)

    def _scan(
        self, suffix: str, x: Tensor, states: State, last: Tensor | None
    ) -> tuple[Tensor, State]:
        inputs, kernel, bias, project = self._parts(suffix, x)
        if bias is not None:
            inputs = inputs + bias
        (h, c), outputs, cells = states, [], []
        for u in inputs.unbind(0):
            i, f, g, o = torch.addmm(u, h, kernel).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            h = h if project is None else h @ project
            outputs.append(h)
            cells.append(c)
        y = torch.stack(outputs)
        return y, (at_last(y, last), c if last is None else at_last(torch.stack(cells), last))

    def to_plain(self) -> nn.LSTM:
        """Return a new `nn.LSTM` with the present weights, independent of this layer."""
        return self._plain(nn.LSTM, proj_size=self.proj_size)


class OrthoGRUCell(RecurrentCell, nn.GRUCell):
    """`nn.GRUCell` with an orthogonal recurrent kernel in each gate: one step of `OrthoGRU`.

    The arguments are those of `nn.GRUCell`, then the options of
    [`OrthoGRU`][orthonet.layers.OrthoGRU], whose guarantee and errors hold here.

    Shape:
        As `nn.GRUCell`.

    Examples:
        >>> OrthoGRUCell(3, 8)(torch.zeros(2, 3)).shape
        torch.Size([2, 8])
    """

    _gates = 3

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return the next state; `hx` defaults to zeros."""
        _checks.real_input(self, input, "input")
        with torch.autocast(input.device.type, enabled=False):
            x, states, single = self._prepared(input, hx)
            h = torch.gru_cell(x, states[0], *self._weights(x))
        return self._finished(h, single)

    def to_plain(self) -> nn.GRUCell:
        """Return a new `nn.GRUCell` with the present weights, independent of this cell."""
        return self._plain(nn.GRUCell)


class OrthoLSTMCell(RecurrentCell, nn.LSTMCell):
    """`nn.LSTMCell` with an orthogonal recurrent kernel in each gate: one step of `OrthoLSTM`.

    The arguments are those of `nn.LSTMCell`, then the options of
    [`OrthoLSTM`][orthonet.layers.OrthoLSTM], whose guarantee and errors hold here.

    Shape:
        As `nn.LSTMCell`.

    Examples:
        >>> h, c = OrthoLSTMCell(3, 8)(torch.zeros(2, 3))
        >>> h.shape
        torch.Size([2, 8])
    """

    _gates = 4
    _states = 2

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the next states (h, c); `hx` defaults to zeros."""
        _checks.real_input(self, input, "input")
        with torch.autocast(input.device.type, enabled=False):
            x, states, single = self._prepared(input, hx)
            h, c = torch.lstm_cell(x, states, *self._weights(x))
        return self._finished(h, single), self._finished(c, single)

    def to_plain(self) -> nn.LSTMCell:
        """Return a new `nn.LSTMCell` with the present weights, independent of this cell."""
        return self._plain(nn.LSTMCell)


@contextlib.contextmanager
def _no_advice(active: bool):
    """Silence what cannot be followed: to flatten computed weights (cuDNN), not to project."""
    if not active:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single")
        warnings.filterwarnings("ignore", message="LSTM with projections is not supported")
        yield
