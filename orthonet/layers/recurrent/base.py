"""The frame of the recurrent layers: shapes, layers, directions, packed sequences."""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from orthonet import _checks
from orthonet.layers.recurrent.kernels import RecurrentKernels, uniform_
from orthonet.linalg.matrix import compute_dtype
from orthonet.manifolds.trivialization import Triv
from orthonet.reparametrizers import OrthoParams

__all__ = ["RecurrentLayer", "State", "at_last"]

State = tuple[Tensor, ...]


class RecurrentLayer(RecurrentKernels, nn.RNNBase):
    """Everything of a recurrent layer but one pass of one kernel over one sequence.

    A subclass says how many gates it has (`_gates`), how many states (`_states`), and how one
    layer runs in one direction (`_scan`). Computations are done in float32 at least and with
    autocast off: an error of the kernel, however small, acts once in every time step.
    """

    _gates: ClassVar[int] = 1
    _states: ClassVar[int] = 1

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        ortho_params: OrthoParams | str,
        triv: Triv | None,
        init: str,
    ) -> None:
        nn.Module.__init__(self)
        _checks.positive_int(
            self, input_size=input_size, hidden_size=hidden_size, num_layers=num_layers
        )
        _checks.boolean(self, bias=bias, batch_first=batch_first, bidirectional=bidirectional)
        _checks.in_range(self, 0.0, 1.0, dropout=dropout)
        _checks.in_range(self, 0, hidden_size - 1, proj_size=proj_size)
        _checks.factory(self, device, dtype)
        self._kernel_options(ortho_params, triv, init)
        if dropout > 0 and num_layers == 1:
            sentence = _checks.message(
                self,
                "dropout acts between layers, so it needs num_layers > 1",
                "Add a layer, or nn.Dropout on the output",
                dropout=dropout,
                num_layers=num_layers,
            )
            warnings.warn(sentence, UserWarning, stacklevel=3)
        self.mode = mode
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size = bidirectional, proj_size
        # What nn.RNNBase keeps for cuDNN; the kernels here are not its parameters.
        self._flat_weights_names, self._flat_weights, self._flat_weight_refs = [], [], []
        self._all_weights: list[list[str]] = []
        self.recurrent = nn.ModuleDict()
        for layer in range(num_layers):
            inputs = self.input_size if layer == 0 else self._outputs
            for suffix in self._suffixes(layer):
                self._build(suffix, inputs, {"device": device, "dtype": dtype})
        self.reset_parameters()

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def _outputs(self) -> int:
        """Features of the output of one layer."""
        return self._directions * (self.proj_size or self.hidden_size)

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}", f"_l{layer}_reverse"][: self._directions]

    def _build(self, suffix: str, inputs: int, factory: dict[str, Any]) -> None:
        """Make the parameters of one layer in one direction."""
        rows, size = self._gates * self.hidden_size, self.proj_size or self.hidden_size
        names = [f"weight_ih{suffix}", f"weight_hh{suffix}"]
        self.register_parameter(names[0], nn.Parameter(torch.empty(rows, inputs, **factory)))
        shape = (
            (self.hidden_size, size) if self._gates == 1 else (self._gates, self.hidden_size, size)
        )
        self._add_kernel(names[1], shape, **factory)
        if self.bias:
            for name in (f"bias_ih{suffix}", f"bias_hh{suffix}"):
                names.append(name)
                self.register_parameter(name, nn.Parameter(torch.empty(rows, **factory)))
        if self.proj_size:
            names.append(f"weight_hr{suffix}")
            self._add_kernel(names[-1], (size, self.hidden_size), **factory)
        self._all_weights.append(names)

    def reset_parameters(self) -> None:
        """Draw the kernels anew, and the rest uniformly as the `nn` twin does."""
        self._reset_kernels()
        uniform_(list(self.parameters(recurse=False)), 1 / math.sqrt(self.hidden_size))

    def flatten_parameters(self) -> None:
        """Do nothing: the recurrent kernels are computed, and no block of memory holds them."""

    def __setstate__(self, d: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, d)
        self._flat_weight_refs = []

    @torch.no_grad()
    def _plain(self, plain_class: type[nn.RNNBase], **options: Any) -> Any:
        """Return a stock layer with the present weights."""
        first = next(self.parameters())
        with warnings.catch_warnings():  # the layer said it when it was made
            warnings.simplefilter("ignore", UserWarning)
            make: Any = plain_class
            plain = make(
                self.input_size,
                self.hidden_size,
                self.num_layers,
                bias=self.bias,
                batch_first=self.batch_first,
                dropout=self.dropout,
                bidirectional=self.bidirectional,
                device="meta",
                dtype=first.dtype,
                **options,
            ).to_empty(device=first.device)
        for name, parameter in plain.named_parameters():
            parameter.copy_(getattr(self, name))
        return plain.train(self.training)

    # --- one pass ------------------------------------------------------------------------------

    def _scan(
        self, suffix: str, x: Tensor, states: State, last: Tensor | None
    ) -> tuple[Tensor, State]:
        """Run one layer in one direction over (time, batch, inputs).

        `last` holds the last time step of each sequence where their lengths differ. Returns the
        outputs of all steps and the states at the last one.
        """
        raise RuntimeError("RecurrentLayer: a subclass must define _scan")

    def _stack(self, x: Tensor, sizes: Tensor | None, states: State) -> tuple[Tensor, State]:
        """Run all layers; `x` is (time, batch, inputs), or packed if `sizes` are given."""
        last, lengths = None, None
        if sizes is not None:
            x, lengths = pad_packed_sequence(PackedSequence(x, sizes))
            last = (lengths - 1).to(x.device)
        finals: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for suffix in self._suffixes(layer):
                mine = tuple(state[len(finals)] for state in states)
                if suffix.endswith("_reverse"):
                    y, final = self._scan(suffix, _reversed(x, last), mine, last)
                    y = _reversed(y, last)
                else:
                    y, final = self._scan(suffix, x, mine, last)
                outputs.append(y)
                finals.append(final)
            x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
            if self.dropout and layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, self.training)
        if lengths is not None:
            x = pack_padded_sequence(x, lengths).data
        return x, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run the layer over sequences.

        Args:
            input: (time, batch, input_size), (batch, time, input_size) with `batch_first`, without
                a batch (time, input_size), or a `PackedSequence`.
            hx: The first state, (num_layers * directions, batch, hidden_size), for an LSTM a pair
                of states; zeros if None.

        Returns:
            The outputs of all steps, in the form of `input`, and the last state, in that of `hx`.

        Raises:
            ValueError: The shapes or dtypes do not fit.
        """
        packed = isinstance(input, PackedSequence)
        if packed:
            x, sizes, order, back = input
            batch = int(sizes[0])
        else:
            x, sizes, order, back = input, None, None, None
        self._check_input(x, 2 if packed else None)
        single = not packed and x.ndim == 2
        if single:
            x = x.unsqueeze(1)
        elif self.batch_first and not packed:
            x = x.transpose(0, 1)
        if not packed:
            batch = x.shape[1]
        dtype = next(self.parameters()).dtype
        with torch.autocast(x.device.type, enabled=False):
            work = compute_dtype(dtype)
            x = x.to(work)
            states = self._first_states(x, hx, batch, single)
            if order is not None:
                states = tuple(state.index_select(1, order) for state in states)
            y, states = self._stack(x, sizes, states)
            y, states = y.to(dtype), tuple(state.to(dtype) for state in states)
        if packed:
            if back is not None:
                states = tuple(state.index_select(1, back) for state in states)
            y = PackedSequence(y, sizes, order, back)
        elif single:
            y, states = y.squeeze(1), tuple(state.squeeze(1) for state in states)
        elif self.batch_first:
            y = y.transpose(0, 1)
        return y, states if self._states > 1 else states[0]

    # --- what comes in -------------------------------------------------------------------------

    def _check_input(self, x: Tensor, ndim: int | None) -> None:
        _checks.tensor(self, input=x)
        dims = (2, 3) if ndim is None else (ndim,)
        if x.ndim not in dims or x.shape[-1] != self.input_size or 0 in x.shape[:1]:
            form = "(batch, time, input_size)" if self.batch_first else "(time, batch, input_size)"
            _checks.fail(
                self,
                f"input must be {form} or (time, input_size), with input_size={self.input_size} "
                "and at least one time step",
                "Reshape it",
                input=x,
            )
        mine = next(self.parameters()).dtype
        if x.dtype != mine and not torch.is_autocast_enabled(x.device.type):
            _checks.fail(
                self,
                f"input must have the dtype of the parameters, {mine}",
                f"Convert it with input.to({mine}), or the layer with layer.to({x.dtype})",
                ValueError,
                input=x,
            )

    def _first_states(self, x: Tensor, hx: Any, batch: int, single: bool) -> State:
        number = self.num_layers * self._directions
        widths = (self.proj_size or self.hidden_size, self.hidden_size)[: self._states]
        if hx is None:
            return tuple(x.new_zeros(number, batch, width) for width in widths)
        given = tuple(hx) if self._states > 1 else (hx,)
        middle = () if single else (batch,)
        expected = [(number, *middle, width) for width in widths]
        if [tuple(state.shape) for state in given] != expected:
            _checks.fail(
                self,
                f"hx must be {'a pair of shapes' if self._states > 1 else 'of shape'} "
                f"{expected if self._states > 1 else expected[0]}",
                "The first state has no batch_first; it is (num_layers * directions, batch, size)",
                hx=[tuple(state.shape) for state in given],
            )
        given = tuple(state.to(x.dtype) for state in given)
        return tuple(state.unsqueeze(1) for state in given) if single else given


def _reversed(x: Tensor, last: Tensor | None) -> Tensor:
    """Return each sequence backwards; what follows its end stays where it is. Its own inverse."""
    if last is None:
        return x.flip(0)
    step = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    source = torch.where(step <= last, last - step, step)
    return x[source, torch.arange(x.shape[1], device=x.device)]


def at_last(states: Tensor, last: Tensor | None) -> Tensor:
    """Return the state (batch, size) of every sequence at its last step, of (time, batch, size)."""
    if last is None:
        return states[-1]
    return states[last, torch.arange(states.shape[1], device=states.device)]
