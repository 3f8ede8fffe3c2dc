"""The frame of the recurrent cells: parameters, shapes, states."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.layers.recurrent.kernels import RecurrentKernels, uniform_
from orthonet.linalg.matrix import compute_dtype
from orthonet.manifolds.trivialization import Triv
from orthonet.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams

__all__ = ["RecurrentCell"]


class RecurrentCell(RecurrentKernels):
    """Mixin before a cell of `nn`: its `weight_hh` becomes orthogonal, gate by gate."""

    _gates: ClassVar[int] = 1
    _states: ClassVar[int] = 1

    input_size: int
    hidden_size: int
    bias: bool
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Any
    bias_hh: Any

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        ortho_params: OrthoParams | str = DEFAULT_ORTHO_PARAMS,
        triv: Triv | None = None,
        init: str = "haar",
    ) -> None:
        _checks.positive_int(type(self), input_size=input_size, hidden_size=hidden_size)
        _checks.boolean(type(self), bias=bias)
        _checks.factory(type(self), device, dtype)
        module: Any = self
        nn.Module.__init__(self)
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        self._kernel_options(ortho_params, triv, init)
        self.recurrent = nn.ModuleDict()
        rows, factory = self._gates * hidden_size, {"device": device, "dtype": dtype}
        module.weight_ih = nn.Parameter(torch.empty(rows, input_size, **factory))
        shape = (hidden_size, hidden_size)
        shape = shape if self._gates == 1 else (self._gates, *shape)
        self._add_kernel("weight_hh", shape, device, dtype)
        for name in ("bias_ih", "bias_hh"):
            value = nn.Parameter(torch.empty(rows, **factory)) if bias else None
            module.register_parameter(name, value)
        self._add_parameters(factory)
        self.reset_parameters()

    def _add_parameters(self, factory: dict[str, Any]) -> None:
        """Register what a cell has beyond kernels and biases, before all of it is drawn."""

    def reset_parameters(self) -> None:
        """Draw the kernel anew, and the rest uniformly as the `nn` twin does."""
        module: Any = self
        self._reset_kernels()
        uniform_(list(module.parameters(recurse=False)), 1 / math.sqrt(self.hidden_size))

    def _weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return both kernels and both biases in the dtype of `x`."""
        biases = [None if b is None else b.to(x.dtype) for b in (self.bias_ih, self.bias_hh)]
        return self.weight_ih.to(x.dtype), self._kernel("weight_hh"), biases[0], biases[1]

    def _prepared(self, x: Tensor, hx: Any) -> tuple[Tensor, tuple[Tensor, ...], bool]:
        """Input (batch, input_size) and states in the dtype of the computation, checked."""
        dtype = self.weight_ih.dtype
        if x.ndim not in (1, 2) or x.shape[-1] != self.input_size:
            _checks.fail(
                self,
                f"input must be (batch, {self.input_size}) or ({self.input_size},)",
                "Reshape it; a whole sequence goes into the layer",
                input=x,
            )
        if not x.is_floating_point():
            _checks.floating(self, input=x)
        single = x.ndim == 1
        x = (x.unsqueeze(0) if single else x).to(compute_dtype(dtype))
        if hx is None:
            zeros = x.new_zeros(x.shape[0], self.hidden_size)
            return x, (zeros,) * self._states, single
        states = tuple(hx) if self._states > 1 else (hx,)
        expected = (self.hidden_size,) if single else (x.shape[0], self.hidden_size)
        if len(states) != self._states or any(s.shape != expected for s in states):
            _checks.fail(
                self,
                f"hx must be {self._states} state(s) of shape {expected}",
                "Reshape it",
                hx=[tuple(s.shape) for s in states],
            )
        states = tuple((s.unsqueeze(0) if single else s).to(x.dtype) for s in states)
        return x, states, single

    def _finished(self, h: Tensor, single: bool) -> Tensor:
        h = h.squeeze(0) if single else h
        return h.to(self.weight_ih.dtype)

    @torch.no_grad()
    def _plain(self, plain_class: type[nn.Module], **options: Any) -> Any:
        """Return a stock cell with the present weights."""
        make: Any = plain_class
        plain = make(
            self.input_size,
            self.hidden_size,
            self.bias,
            device="meta",
            dtype=self.weight_ih.dtype,
            **options,
        ).to_empty(device=self.weight_ih.device)
        for name, parameter in plain.named_parameters():
            parameter.copy_(getattr(self, name))
        module: Any = self
        return plain.train(module.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, init={self.init}"
