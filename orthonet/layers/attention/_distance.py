"""Attention by distances, whose queries, keys and values are one projection."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

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
from orthonet.layers.attention._constants import mean_shift, row_moment
from orthonet.linalg.bounds.rounding import mul_up
from orthonet.linalg.bounds.sizes import Chained, absolute_matrix

__all__ = ["DistanceAttention"]


def _distance_heads(
    x: Tensor,  # (*batch, L, features)
    weights: dict[str, Tensor],
    hidden: Tensor | None,
    scale: Tensor,  # (heads, 1, 1)
    *,
    heads: int,
) -> Tensor:
    z = split(nn.functional.linear(x, weights["in_proj"]), heads)
    # The factor comes last, on finite numbers: differences of infinities would be NaN. Whatever
    # it is, weights at the largest distance are 0.
    far = (z.unsqueeze(-2) - z.unsqueeze(-3)).square().sum(-1).clamp_max(1e38)
    scores = far * -(scale * scale)
    return nn.functional.linear(joined(weighted(scores, hidden, z)), weights["out_proj"])


class DistanceAttention(SelfAttention):
    r"""L2 self-attention: each token becomes a mean of the tokens near it.

    \[ f(X) = \tfrac{K}{C(N_{max})}\, B\, [g_h(A_h X)]_h + b, \qquad
       g_h(Z)_i = \sum_j P_{ij} z_j, \qquad P_{ij} = \mathrm{softmax}_j(-t_h |z_i - z_j|^2). \]

    A, the stack of the \(A_h\), and B are orthogonal, and \(t_h > 0\) is learned for each head.
    Query, key and value are the same projection; without that no constant exists. The distances
    are computed from differences, in N^2 embed_dim numbers for each sequence: a matrix product
    would lose all digits of two near tokens that are far from the origin.

    Args:
        embed_dim: Features of a token.
        num_heads: Heads; they divide the features.
        dropout: 0. An attention layer with dropout has another constant.
        bias: Whether to add a learnable bias to the output, zero at first.
        add_bias_kv: False.
        add_zero_attn: False.
        kdim: None or `embed_dim`.
        vdim: None or `embed_dim`.
        batch_first: True.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters; computed in float32 at least.
        max_length: The longest sequence. Its constant is K, that of shorter ones less.
        causal: Whether a token sees itself and earlier ones only.
        lipschitz: The constant K of the layer.
        ortho_params: How A and B are made orthogonal.

    Shape:
        (N, L, embed_dim) or (L, embed_dim) with L <= `max_length`; the output has the same.
        `key_padding_mask` is boolean, (N, L) or (L,): padding is not seen, and its outputs are 0.

    Guarantee:
        l2 -> l2 constant of whole sequences of length N at most \(K\, C(N) / C(N_{max})\), on the
        whole space, for each fixed padding, in train and eval.
        \(C(N) = \sqrt c + 2M + 2\sqrt{M s}\) grows like \(N^{1/4} \log N\): 6.4, 13.8 and 26.0 for
        8, 32 and 128 tokens (causal: 6.7, 14.4, 28.0). Kim et al. prove \(\sqrt N (4M + 1)\): 13.8,
        47.1 and 138.5, and up to \(\sqrt H\) times as much for H heads.

        Proof. With \(t_h = 1\) (a factor of Z and its inverse behind g) let
        \(r_{ij} = |z_i - z_j|^2\), \(m_i = \sum_j P_{ij} (z_j - z_i)\), and
        \(\Sigma_i = \sum_j P_{ij} (z_j - z_i - m_i) (z_j - z_i)^\top\). Then
        \(dg = P\,dz + 2 \Sigma\,dz - 2 T\,dz\),
        \((T y)_i = \sum_j P_{ij} (z_j - z_i - m_i)(z_j - z_i)^\top y_j\).

        1. Let \(M = \max_i \sum_j P_{ij} r_{ij}\), and \(n = N - 1\). From
           \(M = \sum_{j \ne i} e^{-r_{ij}} (r_{ij} - M) \le n e^{-M-1}\) follows
           \(M \le W(n / e)\), Lambert's function. So \(\|\Sigma\| \le M\).
        2. \(|(T y)_i|^2 \le \|\Sigma_i\| \sum_j P_{ij} r_{ij} |y_j|^2\) (Cauchy and Schwarz), so
           \(\|T\|^2 \le M s\) with a bound s of \(\sum_i P_{ij} r_{ij}\).
        3. \(\|P\| \le \sqrt c\) with a bound c of \(\sum_i P_{ij}\) (Schur).
        4. \(e^{-r_{ij}} = \langle \phi_i, \phi_j \rangle\) for unit vectors, as the Gaussian kernel
           is positive definite. With \(a_i = P_{ii}\) and \(v = \sum_i a_i \phi_i\),
           \(\sum_i P_{ij} = \langle \phi_j, v \rangle \le |v| \le \sqrt{\sum_i a_i} \le \sqrt N\),
           as \(|v|^2 = \sum_{il} a_i a_l e^{-r_{il}} \le \sum_i a_i^2 / a_i\). Causal:
           \(\sqrt{2N}\), as adding \(a_i \phi_i\) raises \(|v|^2\) by at most
           \(2 a_i \sum_{l \le i} e^{-r_{il}} a_l \le 2\). Also \(c \le 1 + n q\) with q of step 5,
           or 1/2 if that is less, as \(P_{ij} \le P_{ii}\).
        5. Let \(q_i = P_{ij}\) for the n rows other than j. Step 4 without the row j gives
           \((\sum q_i)^2 \le \beta \sum (1 - q_i)\), with \(\beta = 2\) if causal and else 1, so
           that their mean is at most the root q of \(n q^2 = \beta (1 - q)\). As
           \(r_{ij} = \log (P_{ii} / P_{ij}) \le \log ((1 - q_i) / q_i)\), and
           \(t \log ((1 - t) / t)\) is concave, \(\sum_i P_{ij} r_{ij}\) is at most n times its
           value at q, or at its peak .2178 if that is less: the bound s.

        Heads act on orthogonal parts, so that the constant of all is the largest, between
        \(\|A\| = \|B\| = 1\). Padding leaves attention among fewer tokens.

    Raises:
        ValueError: An argument out of range, or one of `nn.MultiheadAttention` that the proof does
            not cover; when called: a sequence that is too long, other keys than the queries, or an
            `attn_mask`.

    Examples:
        >>> layer = DistanceAttention(16, 4, max_length=32, causal=True)
        >>> layer(torch.randn(2, 20, 16)).shape
        torch.Size([2, 20, 16])
        >>> round(layer.constant(8), 2), round(layer.constant(32), 2)
        (6.67, 14.43)

    References:
        Kim, Papamakarios & Mnih, *The Lipschitz constant of self-attention*, ICML 2021,
        arXiv:2006.04710 (theorem 3.2).
    """

    relies_on: ClassVar = {"in_proj": PROJECTION, "out_proj": PROJECTION}
    _projections = ("in_proj",)
    _scale = ("log_scale", 0.0)
    in_proj: nn.Module
    log_scale: nn.Parameter

    def constant(self, length: int) -> float:
        """Return C(N), the proved constant of the heads on sequences of this length."""
        return mean_shift(length, self.causal)

    def _learned(self, dtype: torch.dtype) -> Tensor:
        """The root of t for each head, in [e^-10, e^10]."""
        return self.log_scale.to(dtype).clamp(-10.0, 10.0).exp()[:, None, None]

    def _heads(self) -> Callable[..., Tensor]:
        return partial(_distance_heads, heads=self.num_heads)

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        length = sequence_of(self, input_shape)
        with torch.no_grad():
            into, out = (float64(self, self._weight(name)) for name in ("in_proj", "out_proj"))
            scale = float(float64(self, self._learned(torch.float64)).min())
        constant = self.constant(length)
        value = mul_up(norms.matrix(into), constant, norms.matrix(out), self._factor, SAFE)
        count = softmax_count(length, self.head_dim)
        chain = Chained().map(absolute_matrix(into), self.embed_dim + 3.0)
        chain = chain.map(constant, count, self._lost(length) / scale)
        chain = chain.map(absolute_matrix(out), self.embed_dim + 2.0).map(self._factor, 2.0)
        bias = length_of(self.bias)
        rounding = with_offset(chain, length, bias, chain.stages + 1)
        return Declared(value, f"distance attention over {length} tokens", rounding=rounding)

    def _lost(self, length: int) -> float:
        r"""Bound what relative errors of the scores change, in units of their size.

        A score is off by \(\delta_{ij} r_{ij}\), a row by at most
        \(\delta \sum_j P_{ij} r_{ij} |z_j - g_i| \le \delta (E r^{3/2} + M^{3/2})\). With
        \(\rho = 2 + \log N\), \(E r^{3/2} \le \rho^{3/2} + N e^{-\rho} \rho^{3/2}\), as
        \(r^{3/2} e^{-r}\) falls beyond 3/2.
        """
        root = (2.0 + math.log(length)) ** 1.5
        row = root * (1.0 + math.exp(-2.0)) + row_moment(length) ** 1.5
        return row * math.sqrt(length) * self.num_heads**0.5 * (1.0 + 2.0**-8)
