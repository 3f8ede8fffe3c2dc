"""Linear layers: semi-orthogonal, and with rows of unit norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.layers._base import ConstrainedWeight, add_bias
from orthonet.layers.turned_linear import turned_linear
from orthonet.reparametrizers import (
    DEFAULT_ORTHO_PARAMS,
    L2Normalize,
    MappedWeight,
    OrthoParams,
    OrthoWeight,
    Weight,
)
from orthonet.reparametrizers.params import read_params

__all__ = ["OrthoLinear", "UnitNormLinear"]


class _ConstrainedLinear(ConstrainedWeight, nn.Linear):
    _plain_class = nn.Linear

    if TYPE_CHECKING:
        weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        parametrization: Weight,
        lipschitz: float = 1.0,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.parametrization = parametrization
        self._set_factor(lipschitz)
        add_bias(self, bias, out_features, device, dtype)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self._factor == 1.0 else f"{text}, lipschitz={self._factor:g}"


class OrthoLinear(_ConstrainedLinear):
    r"""`nn.Linear` with a semi-orthogonal weight: \(y = W x + b\), all singular values of W are 1.

    \(W^\top W = I\) when `out_features >= in_features` (the map preserves norms), and
    \(W W^\top = I\) otherwise (gradients keep their norm backwards).

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether to add a learnable bias; it starts at zero.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters; the weight is computed in at least float32.
        ortho_params: Which normalizer and orthogonalizer make the weight; a preset or its name.
        lipschitz: The constant K of the layer: the weight is K times a semi-orthogonal one.

    Shape:
        Input `(*, in_features)`, output `(*, out_features)`, as `nn.Linear`.

    Guarantee:
        l2 -> l2 constant `lipschitz`, exact up to rounding: for 1,
        \(\max|\sigma - 1| \le 2\cdot 10^{-6}\) in float32 and \(10^{-12}\) in float64, in train and
        eval mode, with every preset. Reading the weight in eval mode writes nothing.

    Raises:
        ValueError: A size is not a positive integer, or `ortho_params` is no preset.

    Examples:
        >>> layer = OrthoLinear(8, 4)
        >>> torch.linalg.svdvals(layer.weight).allclose(torch.ones(4), atol=1e-5)
        True

    References:
        Anil, Lucas & Grosse, *Sorting out Lipschitz function approximation*, ICML 2019.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        ortho_params: OrthoParams | str = DEFAULT_ORTHO_PARAMS,
        lipschitz: float = 1.0,
    ) -> None:
        _checks.positive_int(type(self), in_features=in_features, out_features=out_features)
        _checks.factory(type(self), device, dtype)
        params = read_params(type(self), ortho_params)
        weight = OrthoWeight((out_features, in_features), params, device, dtype)
        super().__init__(in_features, out_features, bias, device, dtype, weight, lipschitz)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input(input, self.in_features, -1)
        # Together with the gradient of its input, where that spares a product: square, training.
        turned = turned_linear(self, input)
        return super().forward(input) if turned is None else turned

    def adjoint(self, y: Tensor) -> Tensor:
        r"""Apply the transpose of the linear part, \(W^\top y\).

        Shape:
            `(*, out_features)` to `(*, in_features)`.
        """
        self._require_features(y)
        return y @ self.weight

    def inverse(self, y: Tensor) -> Tensor:
        r"""Return the x that the layer maps to `y`: \(W^\top (y - b) / K^2\), for square W.

        Shape:
            As of `adjoint`.

        Raises:
            ValueError: The weight is not square.
        """
        _checks.require(
            self.in_features == self.out_features,
            self,
            "only a square layer can be inverted",
            "Use adjoint(y) / lipschitz ** 2: it is the least-squares solution of W x = y",
            in_features=self.in_features,
            out_features=self.out_features,
        )
        self._require_features(y)
        shifted = y if self.bias is None else y - self.bias
        x = shifted @ self.weight
        return x if self._factor == 1.0 else x / self._factor**2

    def _require_features(self, y: Tensor) -> None:
        _checks.require(
            y.ndim > 0 and y.shape[-1] == self.out_features,
            self,
            f"y must have {self.out_features} features in its last dim",
            "Pass what the layer returns",
            y=y,
        )


_rows = L2Normalize(torch.float32, dim=1)


def _unit_rows(w: Tensor) -> Tensor:
    """Divide each row by its norm."""
    return _rows(w)


def _random_rows(shape: Sequence[int], **factory: Any) -> Tensor:
    return _rows(torch.randn(tuple(shape), **factory))


class UnitNormLinear(_ConstrainedLinear):
    r"""`nn.Linear` whose rows have unit norm: each output on its own is 1-Lipschitz.

    For the last layer of a classifier, where the certificate of a pair of classes uses
    \(\|w_i - w_j\| \le 2\); the constant of the whole layer is up to \(\sqrt{\min(m, n)}\)
    and more precisely \(\|W\|_2\). The other arguments, shapes and errors are those of `nn.Linear`.

    Args:
        lipschitz: The norm K of every row, positive.

    Guarantee:
        Every row has norm K to rounding; a zero row of the parameter becomes a constant row.

    Examples:
        >>> UnitNormLinear(8, 4).weight.norm(dim=1).allclose(torch.ones(4))
        True

    References:
        Singla, Singla & Feizi, ICLR 2022 (last layer normalization), arXiv:2108.04062.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        lipschitz: float = 1.0,
    ) -> None:
        _checks.positive_int(type(self), in_features=in_features, out_features=out_features)
        _checks.factory(type(self), device, dtype)
        shape = (out_features, in_features)
        rows = MappedWeight(
            shape, _unit_rows, _random_rows, device=device, dtype=dtype, inverse=_unit_rows
        )
        super().__init__(in_features, out_features, bias, device, dtype, rows, lipschitz)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to the last dimension of `input`."""
        self._check_input(input, self.in_features, -1)
        return super().forward(input)
