"""Dot-product attention of clipped queries, keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.layers._declared import SAFE, Declared, Norms, float64, length_of
from orthonet.layers.attention._base import (
    PROJECTION,
    SelfAttention,
    joined,
    sequence_of,
    softmax_count,
    split,
    weighted,
    with_offset,
)
from orthonet.layers.attention._clip import clip_norm, clip_roundings
from orthonet.layers.attention._constants import clipped_scores
from orthonet.linalg.bounds.rounding import add_up, mul_up
from orthonet.linalg.bounds.sizes import Chained, absolute_matrix
from orthonet.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams

__all__ = ["CosineAttention"]


def _clipped_heads(
    x: Tensor,  # (*batch, L, features)
    weights: dict[str, Tensor],
    hidden: Tensor | None,
    temperature: Tensor,  # (heads, 1, 1)
    *,
    heads: int,
    radius: float,
) -> Tensor:
    q, k, v = (
        clip_norm(split(nn.functional.linear(x, weights[name]), heads), radius)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    scores = (q / radius) @ (k / radius).mT * temperature
    return nn.functional.linear(joined(weighted(scores, hidden, v)), weights["out_proj"])


class CosineAttention(SelfAttention):
    r"""Dot-product self-attention of queries, keys and values whose norms are clipped.

    \[ f(X) = \tfrac{K}{C(N_{max})}\, B\, [g_h]_h + b, \qquad
       g_{h,i} = \sum_j P_{ij} v_j, \qquad P_{ij} = \mathrm{softmax}_j(\tau_h\, q_i \cdot k_j), \]

    with \(q = \pi(A^q_h x / R)\), \(k = \pi(A^k_h x / R)\) and \(v = R\, \pi(A^v_h x / R)\). The
    projection \(\pi\) onto the unit ball makes long vectors unit vectors, so that their scores are
    cosines, and leaves short ones alone: cosines of short vectors have no Lipschitz constant. The
    radius R is `max_rms` times the root of the features of a head. B and the \(A\), stacked over
    the heads, are orthogonal; \(\tau_h \in (0, \tau)\) is learned for each head.

    Args:
        temperature: \(\tau\), the limit of the scores.
        max_rms: The root mean square of the features of a head beyond which they are clipped.
        ortho_params: How the projections are made orthogonal.

    All other arguments are those of [`DistanceAttention`][orthonet.layers.DistanceAttention].

    Shape:
        (N, L, embed_dim) or (L, embed_dim) with L <= `max_length`; the output has the same.
        `key_padding_mask` is boolean, (N, L) or (L,): padding is not seen, and its outputs are 0.

    Guarantee:
        l2 -> l2 constant of whole sequences of length N at most \(K\, C(N) / C(N_{max})\), on the
        whole space since the clipping is part of the layer, for each fixed padding, in train and
        eval. \(C(N) = \sqrt c\, (1 + \tau) + \tau\), with \(c = N / (1 + (N - 1) e^{-2\tau})\), at
        most \(e^{2\tau}\) for all N; causal: \(c = \sum_{m < N} 1 / (1 + m e^{-2\tau})\).

        Proof. Let R = 1, a factor of X and its inverse behind. A row that sees m + 1 keys has
        \(P_{ij} \le 1 / (1 + m e^{-2\tau})\), so that columns of P sum to at most c and
        \(\|P\| \le \sqrt c\): the constant in v. In q,
        \(dg_i = \tau \sum_j P_{ij} (v_j - g_i) k_j^\top dq_i\) is the covariance of v and k, whose
        norm is at most the product of their deviations, 1. In k,
        \(|dg_i|^2 = \tau^2 |\sum_j P_{ij} (v_j - g_i)\, q_i^\top dk_j|^2 \le
        \tau^2 \sum_j P_{ij} |dk_j|^2\), so that the constant is \(\tau \sqrt c\). \(\pi\) and the
        projections stretch nothing, and heads act on orthogonal parts. Padding leaves attention
        among fewer tokens.

    Raises:
        ValueError: An argument out of range, or one of `nn.MultiheadAttention` that the proof does
            not cover; when called: a sequence that is too long, other keys than the queries, or an
            `attn_mask`.

    Examples:
        >>> layer = CosineAttention(16, 4, max_length=32, temperature=1.0)
        >>> layer(torch.randn(2, 20, 16)).shape
        torch.Size([2, 20, 16])
        >>> round(layer.constant(8), 2), round(layer.constant(32), 2)
        (5.05, 5.96)

    References:
        Qi et al., *LipsFormer*, ICLR 2023, arXiv:2304.09856 (scaled cosine similarity attention);
        Newhouse et al., *Training transformers with enforced Lipschitz constants*, 2025,
        arXiv:2507.13338.
    """

    relies_on: ClassVar = dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), PROJECTION)
    _projections = ("q_proj", "k_proj", "v_proj")
    _scale = ("logit", 2.0)
    logit: nn.Parameter

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_length: int,
        causal: bool = False,
        temperature: float = 2.0,
        max_rms: float = 1.0,
        lipschitz: float = 1.0,
        ortho_params: OrthoParams | str = DEFAULT_ORTHO_PARAMS,
    ) -> None:
        _checks.in_range(type(self), 1e-3, 20.0, temperature=temperature)
        _checks.in_range(type(self), 1e-6, 1e6, max_rms=max_rms)
        self.temperature, self.max_rms = float(temperature), float(max_rms)  # read by `constant`
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
            max_length=max_length,
            causal=causal,
            lipschitz=lipschitz,
            ortho_params=ortho_params,
        )

    def constant(self, length: int, temperature: float | None = None) -> float:
        """Return C(N), the proved constant of the heads on sequences of this length.

        Args:
            length: N.
            temperature: The limit of the scores; that of the layer if None.
        """
        limit = self.temperature if temperature is None else temperature
        root = clipped_scores(length, limit, self.causal)
        return add_up(mul_up(root, add_up(1.0, limit)), limit)

    def _learned(self, dtype: torch.dtype) -> Tensor:
        """The temperature of each head."""
        return (self.temperature * self.logit.to(dtype).sigmoid())[:, None, None]

    def _heads(self) -> Callable[..., Tensor]:
        radius = self.max_rms * math.sqrt(self.head_dim)
        return partial(_clipped_heads, heads=self.num_heads, radius=radius)

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        length = sequence_of(self, input_shape)
        with torch.no_grad():
            query, key, values, out = (float64(self, self._weight(name)) for name in self._names)
            limit = float(float64(self, self._learned(torch.float64)).max()) * SAFE
        root = clipped_scores(length, limit, self.causal)
        sizes = [norms.matrix(m) for m in (query, key, values)]
        gains = (limit, mul_up(limit, root), root)
        constant = add_up(*(mul_up(g, s) for g, s in zip(gains, sizes, strict=True)))
        value = mul_up(constant, norms.matrix(out), self._factor, SAFE)
        moduli = max(absolute_matrix(m) for m in (query, key, values))
        chain = Chained().map(moduli, self.embed_dim + 2.0).map(1.0, clip_roundings(self.head_dim))
        count = softmax_count(length, self.head_dim)
        count += 2.0 * limit * (self.head_dim + 100.0)  # of scores, twice that of weights
        chain = chain.map(self.constant(length, limit), count)
        chain = chain.map(absolute_matrix(out), self.embed_dim + 2.0).map(self._factor, 2.0)
        rounding = with_offset(chain, length, length_of(self.bias), chain.stages + 1)
        return Declared(value, f"clipped attention over {length} tokens", rounding=rounding)

    def extra_repr(self) -> str:
        text = f"temperature={self.temperature:g}, max_rms={self.max_rms:g}"
        return f"{super().extra_repr()}, {text}"
