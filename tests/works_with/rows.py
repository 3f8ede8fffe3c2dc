"""The rows: every kind of layer and every constraint, small enough that all columns are cheap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import constraints as c
from orthonet import layers
from orthonet.layers import available, make_conv, make_linear
from orthonet.manifolds import Parametrization, Stiefel
from orthonet.testing import jacobian

__all__ = ["ROWS", "Row"]


@dataclass(frozen=True)
class Row:
    """A layer, the shape of one sample, and what it promises about its weight."""

    name: str
    group: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    twin: Callable[[], nn.Module] | None = None  # the stock layer whose checkpoint may be loaded

    def __repr__(self) -> str:
        return self.name

    def input(self, batch: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        return torch.randn(batch, *self.shape, generator=generator).to(dtype)


def excess(row: Row, layer: nn.Module) -> float:
    """How far the layer is from its promise: the norm of its Jacobian, its kernel, its space."""
    dtype = next(layer.parameters()).dtype
    layer = layer.rnn if isinstance(layer, First) else layer
    if row.group == "constraint":
        worst = 0.0
        for name, entry in layer.parametrizations.items():
            last = entry[len(entry) - 1]
            assert isinstance(last, Parametrization)
            value = getattr(layer, name).detach()
            worst = max(worst, 0.0 if last.contains(value) else 1.0)
        return worst
    if row.group == "recurrent":
        kernel = layer.recurrent["weight_hh_l0"]().detach()
        gram = kernel.mT @ kernel
        return float((gram - torch.eye(gram.shape[-1], dtype=dtype)).abs().max())
    largest = torch.linalg.matrix_norm(jacobian(layer, row.input(1, dtype)[0]).double(), 2)
    return float(largest) - 1.0


SAME: dict[str, Any] = {"padding": 1, "padding_mode": "circular"}


class First(nn.Module):
    """The outputs of a recurrent layer, without its state."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


def _zoo(kind: str, name: str) -> Row:
    if kind == "linear":
        return Row(
            f"{name} (linear)",
            "zoo",
            lambda: make_linear(name, 4, 6),
            (4,),
            lambda: nn.Linear(4, 6),
        )
    kernel = 1 if name == "cholesky" else 3
    padding: dict[str, Any] = {"padding": "same", "padding_mode": "circular"}
    if name in ("cayley", "lot", "bro", "soc", "sandwich"):
        padding["image_size"] = (5, 6)
    return Row(
        f"{name} (convolution)",
        "zoo",
        lambda: make_conv(name, 4, 6, kernel, **padding),
        (4, 5, 6),
        lambda: nn.Conv2d(4, 6, kernel),
    )


def _recurrent(kind: Callable[..., nn.Module], twin: Callable[..., nn.Module]) -> Row:
    name = kind.__name__
    return Row(
        name,
        "recurrent",
        lambda: First(kind(3, 4, batch_first=True)),
        (5, 3),
        lambda: First(twin(3, 4)),
    )


def _constraint(
    verb: Callable[..., nn.Module], *arguments: Any, square: bool = False, name: str = ""
) -> Row:
    shape = (4, 4) if square else (4, 8)

    def make() -> nn.Module:
        return verb(nn.Linear(*shape), "weight", *arguments)

    return Row(name or verb.__name__, "constraint", make, (4,), lambda: nn.Linear(*shape))


_ROWS = [
    Row("OrthoLinear", "layer", lambda: layers.OrthoLinear(8, 6), (8,), lambda: nn.Linear(8, 6)),
    Row(
        "UnitNormLinear",
        "layer",
        lambda: layers.UnitNormLinear(8, 1),
        (8,),
        lambda: nn.Linear(8, 1),
    ),
    Row(
        "OrthoConv2d, kernel 3",
        "layer",
        lambda: layers.OrthoConv2d(4, 6, 3, **SAME),
        (4, 5, 6),
        lambda: nn.Conv2d(4, 6, 3),
    ),
    Row(
        "OrthoConv2d, kernel 3, stride 2",
        "layer",
        lambda: layers.OrthoConv2d(4, 8, 3, 2, **SAME),
        (4, 6, 6),
        lambda: nn.Conv2d(4, 8, 3, 2),
    ),
    Row(
        "OrthoConv2d, 2 groups",
        "layer",
        lambda: layers.OrthoConv2d(4, 8, 3, groups=2, **SAME),
        (4, 5, 6),
        lambda: nn.Conv2d(4, 8, 3, groups=2),
    ),
    Row(
        "OrthoConvTranspose2d",
        "layer",
        lambda: layers.OrthoConvTranspose2d(8, 4, 2, 2),
        (8, 3, 4),
        lambda: nn.ConvTranspose2d(8, 4, 2, 2),
    ),
    _recurrent(layers.OrthoRNN, nn.RNN),
    _recurrent(layers.OrthoGRU, nn.GRU),
    _recurrent(layers.OrthoLSTM, nn.LSTM),
    *(_zoo("linear", n) for n in available("linear") if n not in ("ortho", "lot", "unit_norm")),
    *(_zoo("conv", n) for n in available("conv") if n != "ortho"),
    _constraint(c.orthogonal),
    _constraint(c.orthogonal, square=True, name="orthogonal, square"),
    _constraint(c.almost_orthogonal),
    _constraint(c.grassmannian),
    _constraint(c.spectral_ball),
    _constraint(c.low_rank, 2),
    _constraint(c.fixed_rank, 2),
    _constraint(c.sphere),
    _constraint(c.oblique),
    _constraint(c.unit_norm),
    _constraint(c.nonnegative),
    _constraint(c.bounded),
    _constraint(c.norm_ball),
    _constraint(c.simplex),
    _constraint(c.stochastic),
    _constraint(c.hyperbolic),
    _constraint(c.product, (Stiefel(), Stiefel())),
    *(
        _constraint(verb, square=True)
        for verb in (
            c.symmetric,
            c.skew,
            c.invertible,
            c.sln,
            c.positive_definite,
            c.positive_semidefinite,
            c.correlation,
            c.doubly_stochastic,
            c.symplectic,
        )
    ),
    *(
        _constraint(verb, 2, square=True)
        for verb in (c.positive_semidefinite_low_rank, c.positive_semidefinite_fixed_rank)
    ),
]
ROWS: dict[str, Row] = {row.name: row for row in _ROWS}
