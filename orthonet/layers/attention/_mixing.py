"""Mixing of tokens by matrices that do not depend on them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, fx, nn

from orthonet import _checks
from orthonet.layers._declared import SAFE, Declared, Norms, float64, length_of
from orthonet.layers.attention._base import check_sequence, joined, sequence_of, split, traced
from orthonet.layers.zoo._base import InnerWeight, new_bias
from orthonet.linalg.bounds.rounding import mul_up
from orthonet.linalg.bounds.sizes import Chained, absolute_matrix
from orthonet.linalg.matrix import compute_dtype
from orthonet.linalg.rescaling import almost_orthogonal
from orthonet.linalg.sinkhorn import sinkhorn
from orthonet.reparametrizers import (
    DEFAULT_ORTHO_PARAMS,
    MappedWeight,
    OrthoParams,
    OrthoWeight,
    Weight,
)
from orthonet.reparametrizers.params import read_params

__all__ = ["TokenMixing"]


def _doubly_stochastic(logits: Tensor) -> Tensor:
    """Sums of 1 in rows and columns; where they are not reached, divided by Schur's bound."""
    p = sinkhorn(logits)
    rows, columns = p.sum(-1).amax(-1), p.sum(-2).amax(-1)
    return p / (rows * columns).sqrt().clamp_min(1.0)[..., None, None]


def _causal(w: Tensor) -> Tensor:
    """The lower triangle, scaled by the almost-orthogonal rule."""
    return almost_orthogonal(w.tril().flatten(0, 1), groups=w.shape[0]).view_as(w)


def _logits(shape: tuple[int, ...], *, dtype=None, device=None) -> Tensor:
    """Large on the diagonal: a mixing that begins near the identity."""
    eye = torch.eye(shape[-1], dtype=dtype, device=device)
    return 2.0 * eye + torch.randn(shape, dtype=dtype, device=device)


def _decays(shape: tuple[int, ...], *, dtype=None, device=None) -> Tensor:
    """Means over the past that decay, at another rate in each head."""
    places = torch.arange(shape[-1], device=device)
    rates = 2.0 ** -torch.arange(shape[0], device=device).double()
    means = (-rates[:, None, None] * (places[:, None] - places).clamp_min(0)).exp()
    noise = torch.randn(shape, device=device, dtype=torch.float64)
    return (means.tril() * (1.0 + 0.1 * noise)).to(dtype or torch.get_default_dtype())


_INITIAL = {"doubly_stochastic": _logits, "causal": _decays}
_MAPS = {"doubly_stochastic": _doubly_stochastic, "causal": _causal}


class TokenMixing(InnerWeight):
    r"""Mix tokens by a learned matrix for each head: \(y_i = K \sum_j M^h_{ij} x_j + b\).

    Heads are equal shares of the features. Sequences shorter than `max_length` meet the leading
    part of the matrices.

    Args:
        embed_dim: Features of a token.
        num_heads: Matrices; they divide the features.
        bias: Whether to add a learnable bias, zero at first.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters; computed in float32 at least.
        max_length: The longest sequence, and the size of the matrices.
        kind: "orthogonal"; "doubly_stochastic": weights of means over all tokens, by Sinkhorn's
            scaling; or "causal": lower triangular, so that a token sees itself and earlier ones.
        lipschitz: The constant K of the layer.
        ortho_params: How orthogonal matrices are made.

    Shape:
        (N, L, embed_dim) or (L, embed_dim) with L <= `max_length`; the output has the same.

    Guarantee:
        l2 -> l2 constant of whole sequences at most `lipschitz`, to \(10^{-5}\) (float32) or
        \(10^{-12}\) (float64) relative, in train and eval. Orthogonal matrices keep all distances
        at the full length. Proof. Features of a head are mixed alike, so that the constant is the
        largest \(\|M^h\|\). A doubly stochastic matrix has norm 1: by Schur's test the norm is at
        most the root of the largest row sum times the largest column sum, by which it is divided if
        that exceeds 1. The causal one is scaled by
        [`almost_orthogonal`][orthonet.linalg.almost_orthogonal], which keeps its zeros; an
        orthogonal triangular matrix would be diagonal. Parts of a matrix have no larger norm.

    Raises:
        ValueError: An argument out of range; when called: a sequence that is too long.

    Examples:
        >>> mixing = TokenMixing(8, 2, max_length=6, kind="causal")
        >>> x = torch.randn(1, 6, 8)
        >>> torch.equal(mixing(x)[:, :3], mixing(x[:, :3]))
        True

    References:
        Lee-Thorp et al., *FNet*, NAACL 2022 (fixed orthogonal mixing); Xie et al., *mHC:
        manifold-constrained hyper-connections*, 2025, arXiv:2512.24880 (doubly stochastic mixing).
    """

    parametrization: Weight

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_length: int,
        kind: str = "orthogonal",
        lipschitz: float = 1.0,
        ortho_params: OrthoParams | str = DEFAULT_ORTHO_PARAMS,
    ) -> None:
        super().__init__()
        owner = type(self)
        _checks.positive_int(owner, embed_dim=embed_dim, num_heads=num_heads, max_length=max_length)
        _checks.one_of(owner, ("orthogonal", *_MAPS), kind=kind)
        _checks.require(
            embed_dim % num_heads == 0,
            owner,
            "num_heads must divide embed_dim",
            "Choose a divisor",
            embed_dim=embed_dim,
            num_heads=num_heads,
        )
        _checks.boolean(owner, bias=bias)
        _checks.factory(owner, device, dtype)
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.max_length, self.kind = max_length, kind
        self._set_constant(lipschitz)
        shape = (num_heads, max_length, max_length)
        if kind == "orthogonal":
            params = read_params(owner, ortho_params)
            self.parametrization = OrthoWeight(shape, params, device, dtype)
        else:
            self.parametrization = MappedWeight(
                shape, _MAPS[kind], partial(_INITIAL[kind]), device=device, dtype=dtype
            )
        new_bias(self, embed_dim if bias else None, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of a sequence, batched or not."""
        check_sequence(self, x)
        length, weight = x.shape[-2], self.parametrization()
        wide = compute_dtype(torch.promote_types(x.dtype, weight.dtype))
        with torch.autocast(x.device.type, enabled=False):
            matrices = weight[:, :length, :length].to(wide)
            y = joined(matrices @ split(x.to(wide), self.num_heads))
            y = y if self.lipschitz == 1.0 else y * self.lipschitz
            y = y if self.bias is None else y + self.bias.to(wide)
        return y.to(x.dtype)

    @torch.no_grad()
    def to_plain(self) -> fx.GraphModule:
        """Return a `torch.fx.GraphModule` of torch alone that does the same."""
        return traced(_PlainMixing(self), self.training)

    def extra_repr(self) -> str:
        text = f"{self.embed_dim}, {self.num_heads}, max_length={self.max_length}"
        return ", ".join(filter(None, [text, f"kind={self.kind!r}", super().extra_repr()]))

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        length = sequence_of(self, input_shape)
        with torch.no_grad():
            weight = float64(self, self.parametrization())[:, :length, :length]
        value = mul_up(norms.matrix(weight), self.lipschitz, SAFE)
        chain = Chained().map(absolute_matrix(weight), length + 1.0).map(self.lipschitz, 1.0)
        rounding = chain.map(1.0, 1.0, length_of(self.bias, length)).rounding()
        return Declared(value, f"mixing of {length} tokens", rounding=rounding)


class _PlainMixing(nn.Module):
    """The mixing with its present matrices, which is traced for export."""

    bias: nn.Parameter | None

    def __init__(self, layer: TokenMixing) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.parametrization().detach().clone())
        new = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.register_parameter("bias", new)
        self.heads, self.lipschitz = layer.num_heads, layer.lipschitz

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-2]
        y = joined(self.weight[:, :length, :length] @ split(x, self.heads))
        y = y if self.lipschitz == 1.0 else y * self.lipschitz
        return y if self.bias is None else y + self.bias
