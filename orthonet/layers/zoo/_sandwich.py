r"""Sandwich layers of LBDN: \(y = \sqrt 2 A^\top \Psi\, s(\sqrt 2\, \Psi^{-1} B x + b)\)."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from orthonet import _checks, functional
from orthonet.layers._base import WithoutPlainWeight, add_bias, new_bias, set_zero
from orthonet.layers._declared import SAFE, Declared, Norms, at_zero, float64, length_of, of_rows
from orthonet.layers.zoo._export import circular_twin
from orthonet.layers.zoo._fourier_base import FourierConv2d, fourier_chain
from orthonet.layers.zoo.residual_base import ACTIVATIONS, SLOPED
from orthonet.linalg.bounds.rounding import mul_up
from orthonet.linalg.bounds.sizes import Chained, absolute_matrix
from orthonet.linalg.kernels.fourier import apply_symbol
from orthonet.linalg.matrix import compute_dtype
from orthonet.linalg.unitary import cayley_rectangular
from orthonet.reparametrizers import Weight
from orthonet.reparametrizers.weight import settled

__all__ = ["SandwichConv2d", "SandwichLinear"]


class _Pair(Weight):
    r"""The matrices A, B with \(A A^\top + B B^\top = I\), by the Cayley transform."""

    def __init__(
        self,
        outside: int,
        inside: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.outside = outside
        self.original = nn.Parameter(
            torch.empty(outside + inside, outside, device=device, dtype=dtype)
        )
        self.reset_parameters()

    @property
    def shape(self) -> torch.Size:
        """Shape of A and B, transposed and one below the other."""
        return self.original.shape

    def evaluate(self) -> Tensor:
        """Return A and B, transposed and one below the other, in float32 at least."""
        stored = settled(self.original)
        with torch.autocast(stored.device.type, enabled=False):
            return cayley_rectangular(stored.to(compute_dtype(stored.dtype)))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return A (out, out) and B (out, in)."""
        q = super().forward()
        return q[: self.outside].mT, q[self.outside :].mT

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the free matrix anew; nothing happens on the meta device."""
        if not self.original.is_meta:
            self.original.normal_().mul_(self.original.shape[0] ** -0.5)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.original.shape)}"


def _clamped(log_scale: Tensor) -> Tensor:
    """Return the logarithm of Psi, kept within float range."""
    return log_scale.clamp(-20.0, 20.0)


# For any A and B, s of slopes in [0, 1] and positive D, x -> sqrt2 K A* D s(sqrt2 D^-1 B x + b) has
# the constant K N with N = |[A, B]|^2: u = D ds has |u|^2 <= sqrt2 <u, B dx>, and
# |A* u|^2 <= N |u|^2 - |B* u|^2, so |dy|^2 <= 2 K^2 max_w (sqrt2 N <w, dx> - |w|^2), which is
# K^2 N^2 |dx|^2.


class SandwichLinear(WithoutPlainWeight, nn.Module):
    r"""Sandwich layer: \(y = K \sqrt 2 A^\top \Psi\, s(\sqrt 2\, \Psi^{-1} B x + b)\).

    \([A, B]\) has orthonormal rows by the Cayley transform, \(\Psi\) is a positive diagonal and s
    has slopes in [0, 1]. With \(u = \Psi\, \Delta s\) the slope condition
    \(\sqrt 2\, u^\top B \Delta x \ge \|u\|^2\) gives
    \(\|\Delta x\|^2 - \|\Delta y\|^2 \ge \|\Delta x - \sqrt 2 B^\top u\|^2 \ge 0\) for K = 1. The
    layer contains its activation. A chain of them with any factors K whose product is \(\gamma\) is
    an LBDN of that bound.

    Arguments, shapes, guarantee and errors are those of [`CPLLinear`][orthonet.layers.CPLLinear],
    without `hidden_features`.

    Examples:
        >>> SandwichLinear(3, 8, activation="tanh")(torch.zeros(2, 3)).shape
        torch.Size([2, 8])

    References:
        Wang & Manchester, *Direct parameterization of Lipschitz-bounded deep networks*, ICML 2023,
        arXiv:2301.11526.
    """

    relies_on = SLOPED
    log_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "relu",
        lipschitz: float = 1.0,
    ) -> None:
        super().__init__()
        owner = type(self)
        _checks.positive_int(owner, in_features=in_features, out_features=out_features)
        _checks.one_of(owner, tuple(ACTIVATIONS), activation=activation)
        _checks.lipschitz_constant(owner, lipschitz)
        _checks.factory(owner, device, dtype)
        self.in_features = in_features
        self.out_features = out_features
        self.lipschitz = float(lipschitz)
        self.activation = ACTIVATIONS[activation]()
        self.parametrization = _Pair(out_features, in_features, device, dtype)
        new_bias(self, out_features, device, dtype, "log_scale")
        add_bias(self, bias, out_features, device, dtype)

    def reset_parameters(self) -> None:
        """Draw the weights anew, Psi = I and the bias zero; nothing happens on the meta device."""
        self.parametrization.reset_parameters()
        set_zero(self.log_scale, self.bias)

    def factors(self) -> tuple[Tensor, Tensor]:
        r"""Return the matrices \(K \sqrt 2 A^\top \Psi\) and \(\sqrt 2 \Psi^{-1} B\)."""
        a, b = self.parametrization()
        log_psi = _clamped(self.log_scale.to(a.dtype))
        outer = math.sqrt(2) * self.lipschitz * (a.mT * log_psi.exp())
        return outer, math.sqrt(2) * ((-log_psi).exp()[:, None] * b)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to the last dimension of `input`."""
        _checks.channels(self, input, self.in_features, -1)
        with torch.autocast(input.device.type, enabled=False):
            outer, inner = self.factors()
            bias = None if self.bias is None else self.bias.to(inner.dtype)
            hidden = nn.functional.linear(input.to(inner.dtype), inner, bias)
            y = self.activation(hidden) @ outer.mT
        return y.to(input.dtype)

    @torch.no_grad()
    def to_plain(self) -> nn.Sequential:
        """Return two stock linear layers around the activation that do the same.

        Its certificate is the product over its layers, up to 2 K: certify this layer instead.
        """
        outer, inner = self.factors()
        first = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        last = nn.Linear(self.out_features, self.out_features, bias=False)
        first, last = first.to(self.log_scale), last.to(self.log_scale)
        first.weight.copy_(inner)
        last.weight.copy_(outer)
        if self.bias is not None:
            first.bias.copy_(self.bias)
        plain = nn.Sequential(first, copy.deepcopy(self.activation), last)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        scale = "" if self.lipschitz == 1.0 else f", lipschitz={self.lipschitz:g}"
        return f"{self.in_features}, {self.out_features}{scale}"

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        with torch.no_grad():
            outer, inner = (float64(self, w) for w in self.factors())
            psi = float64(self, self.log_scale).clamp(-20.0, 20.0).exp()
        root = math.sqrt(2.0)
        a, b = outer.mT / (psi[:, None] * root * self.lipschitz), inner * (psi[:, None] / root)
        norm = mul_up(norms.matrix(torch.cat([a, b], 1)), SAFE)
        chain = Chained().map(absolute_matrix(inner), inner.shape[1] + 1.0, length_of(self.bias))
        chain = chain.activation(at_zero(self, inner.shape[0]))
        chain = chain.map(absolute_matrix(outer), outer.shape[1] + 1.0)
        value = mul_up(norm, norm, self.lipschitz, SAFE)
        return Declared(value, "|[A, B]|^2", rounding=of_rows(chain.rounding(), input_shape))


class SandwichConv2d(FourierConv2d):
    r"""Sandwich layer with convolutions A and B that are orthogonalized at each frequency.

    See [`SandwichLinear`][orthonet.layers.SandwichLinear]; \([A, B]\) comes from the Cayley
    transform of the symbol, \(\Psi\) has one entry for each channel. The other arguments, shapes
    and
    errors are those of [`CayleyConv2d`][orthonet.layers.CayleyConv2d].

    Args:
        activation: As of `SandwichLinear`.

    Guarantee:
        As of [`AOLLinear`][orthonet.layers.AOLLinear], for every image size.

    Examples:
        >>> SandwichConv2d(3, 2, 3)(torch.zeros(1, 3, 9, 9)).shape
        torch.Size([1, 2, 9, 9])

    References:
        Wang & Manchester, ICML 2023, section 4.
    """

    relies_on = SLOPED
    log_scale: Tensor
    activation: nn.Module
    _function = staticmethod(cayley_rectangular)
    _center = False
    _noise = 0.7

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = "same",
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "circular",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "relu",
        lipschitz: float = 1.0,
        image_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
            lipschitz=lipschitz,
            image_size=image_size,
        )
        owner = type(self)
        _checks.one_of(owner, tuple(ACTIVATIONS), activation=activation)
        self.activation = ACTIVATIONS[activation]()
        original = self.parametrization.original
        new_bias(self, self.out_channels, original.device, original.dtype, "log_scale")

    def _make(
        self,
        shape: tuple[int, int, int],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        groups, rows, columns = shape
        super()._make((groups, rows + columns, rows), device, dtype)

    def reset_parameters(self) -> None:
        """Draw the kernel anew, Psi = I and the bias zero; nothing happens on the meta device."""
        super().reset_parameters()
        set_zero(self.log_scale)

    def singular_values(self, input_size: int | tuple[int, ...] | None = None) -> Tensor:
        """Refuse: the layer contains its activation and is no linear map."""
        _checks.fail(
            self,
            "a layer with an activation inside has no singular values",
            "Take those of its Jacobian at a point, orthonet.testing.jacobian",
        )

    def _scale(self, sign: int, like: Tensor) -> Tensor:
        return (sign * _clamped(self.log_scale.to(like.dtype))).exp().view(-1, 1, 1) * math.sqrt(2)

    def _factors(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the symbols of A* and of B."""
        split = self.out_channels // self.groups
        blocks = self.blocks(size)
        return blocks[:, :, :split], blocks[:, :, split:]

    def _inner(self, x: Tensor) -> Tensor:
        _, b_adjoint = self._factors((x.shape[-2], x.shape[-1]))
        return apply_symbol(x, b_adjoint.mH) * self._scale(-1, x)

    def _outer(self, h: Tensor) -> Tensor:
        a_adjoint, _ = self._factors((h.shape[-2], h.shape[-1]))
        return apply_symbol(h * self._scale(1, h), a_adjoint)

    def _on_torus(self, image: Tensor) -> Tensor:
        a_adjoint, b_adjoint = self._factors((image.shape[-2], image.shape[-1]))
        h = apply_symbol(image, b_adjoint.mH) * self._scale(-1, image)
        if self.bias is not None:
            h = h + self.bias.view(-1, 1, 1)
        return apply_symbol(self.activation(h) * self._scale(1, h), a_adjoint)

    def _add_bias(self, y: Tensor) -> Tensor:
        return y  # it is inside the activation

    @torch.no_grad()
    def to_plain(self) -> nn.Sequential:
        """Return two stock convolutions around the activation that do the same on one image size.

        Raises:
            ValueError: The layer was made without `image_size`.
        """
        dtype = compute_dtype(self.parametrization.original.dtype)
        s, size = self.stride[0], self.image_size

        def inner(x: Tensor) -> Tensor:
            return self._inner(
                functional.space_to_depth(x.to(dtype), s, 2) if s > 1 else x.to(dtype)
            )

        first = circular_twin(
            self,
            inner,
            (self.in_channels, self.out_channels),
            size,
            self.bias,
            self.stride,
            self.groups,
        )
        small = None if size is None else (size[0] // s, size[1] // s)
        last = circular_twin(
            self,
            lambda h: self._outer(h.to(dtype)) * self.lipschitz,
            (self.out_channels, self.out_channels),
            small,
            None,
            groups=self.groups,
        )
        plain = nn.Sequential(first, copy.deepcopy(self.activation), last)
        return plain.train(self.training)

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        blocks, size, text = self._symbol(input_shape)
        width = self.out_channels // self.groups
        with torch.no_grad():
            like = torch.empty(0, dtype=compute_dtype(self.parametrization.original.dtype))
            inner, outer = (float64(self, self._scale(sign, like)) for sign in (-1, 1))
        inner, outer = (t.view(self.groups, 1, 1, width) for t in (inner, outer))
        # The product of both scales is 2 up to their rounding, which is counted as one of B.
        a, b = blocks[:, :, :width], blocks[:, :, width:]
        norm = mul_up(norms.matrix(torch.cat([a, b * (inner * outer / 2)], 2)), SAFE)
        pixels = math.prod(size)
        chain = fourier_chain(Chained(), (b * inner).mH, size)
        if chain is not None:
            hidden = chain.map(1.0, 2.0, length_of(self.bias, pixels))
            hidden = hidden.activation(at_zero(self, self.out_channels * pixels))
            chain = fourier_chain(hidden, a * outer, size)
        rounding = self._finished(chain)
        return Declared(
            mul_up(norm, norm, self.lipschitz, SAFE), f"|[A, B]|^2, {text}", rounding=rounding
        )
