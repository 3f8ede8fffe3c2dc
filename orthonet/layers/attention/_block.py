"""A transformer block whose constant is that of its branches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.layers._activations import MaxMin
from orthonet.layers._linear import OrthoLinear
from orthonet.layers.attention._clip import RMSClip
from orthonet.layers.attention._cosine import CosineAttention
from orthonet.layers.attention._distance import DistanceAttention
from orthonet.layers.attention._mixing import TokenMixing
from orthonet.layers.residual import ConvexResidual
from orthonet.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams

__all__ = ["LipschitzTransformerBlock"]


class LipschitzTransformerBlock(nn.Module):
    r"""Attention, then a network on each token, in convex residual connections.

    \[ y = (1 - a)\, x + a\, \mathrm{mix}(\nu(x)), \qquad
       z = (1 - b)\, y + b\, W_2\, \mathrm{MaxMin}(W_1\, \nu(y)), \]

    with learned a and b in (0, 1), orthogonal \(W_1\) and \(W_2\), and \(\nu\) the identity or
    [`RMSClip`][orthonet.layers.RMSClip].

    Args:
        embed_dim: Features of a token.
        num_heads: Heads of the attention or of the mixing.
        dim_feedforward: Width between \(W_1\) and \(W_2\), even; 4 `embed_dim` if None.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.
        max_length: The longest sequence.
        attention: "distance", "cosine" or "mixing".
        causal: Whether a token sees itself and earlier ones only.
        norm: "none" or "rms_clip".
        max_rms: The limit of "rms_clip".
        temperature: The limit of the scores of "cosine".
        lipschitz: The constant K of each branch; above 1 that of the block is above 1, too.
        init: The first a and b.
        ortho_params: How matrices are made orthogonal.

    Shape:
        (N, L, embed_dim), or (L, embed_dim), with L <= `max_length`; the output has the same.
        `key_padding_mask` is boolean, (N, L) or (L,), True where a token is padding.

    Guarantee:
        l2 -> l2 constant of whole sequences at most \((1 - a + a K)(1 - b + b K)\): 1 for K = 1, to
        \(10^{-5}\) (float32) or \(10^{-12}\) (float64) relative, in train and eval, for each fixed
        padding. Proof. Each branch is K-Lipschitz (see its layers); a convex combination of the
        identity and a K-Lipschitz map has the combined constant; constants of a composition
        multiply. `lipschitz_bound()` reads it from a and b; `certify` proves it from the weights.

    Raises:
        ValueError: An argument out of range, or one of two that exclude each other.

    Examples:
        >>> block = LipschitzTransformerBlock(16, 4, max_length=32, causal=True)
        >>> block(torch.randn(2, 32, 16)).shape, block.lipschitz_bound()
        (torch.Size([2, 32, 16]), 1.0)

    References:
        Qi et al., *LipsFormer*, ICLR 2023; Newhouse et al., arXiv:2507.13338 (convex residuals).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dim_feedforward: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_length: int,
        attention: str = "distance",
        causal: bool = False,
        norm: str = "none",
        max_rms: float = 1.0,
        temperature: float = 2.0,
        lipschitz: float = 1.0,
        init: float = 0.5,
        ortho_params: OrthoParams | str = DEFAULT_ORTHO_PARAMS,
    ) -> None:
        super().__init__()
        owner = type(self)
        _checks.one_of(owner, ("distance", "cosine", "mixing"), attention=attention)
        _checks.one_of(owner, ("none", "rms_clip"), norm=norm)
        _checks.positive_int(owner, embed_dim=embed_dim)
        hidden = 4 * embed_dim if dim_feedforward is None else dim_feedforward
        _checks.positive_int(owner, dim_feedforward=hidden)
        _checks.require(
            hidden % 2 == 0,
            owner,
            "dim_feedforward must be even, since MaxMin works on pairs",
            "Add one",
            dim_feedforward=hidden,
        )
        _checks.boolean(owner, causal=causal)
        _checks.in_range(owner, 1e-6, 1e6, max_rms=max_rms)
        _checks.in_range(owner, 1e-3, 20.0, temperature=temperature)
        self.lipschitz = _checks.lipschitz_constant(owner, lipschitz)
        made: Any = {"device": device, "dtype": dtype}
        options: Any = {
            **made,
            "max_length": max_length,
            "lipschitz": lipschitz,
            "ortho_params": ortho_params,
        }
        if attention == "mixing":
            kind = "causal" if causal else "orthogonal"
            mixing: nn.Module = TokenMixing(embed_dim, num_heads, kind=kind, **options)
        elif attention == "distance":
            mixing = DistanceAttention(embed_dim, num_heads, causal=causal, **options)
        else:
            options |= {"causal": causal, "temperature": temperature, "max_rms": max_rms}
            mixing = CosineAttention(embed_dim, num_heads, **options)
        network = nn.Sequential(
            OrthoLinear(embed_dim, hidden, **made, ortho_params=ortho_params),
            MaxMin(-1),
            OrthoLinear(hidden, embed_dim, **made, ortho_params=ortho_params, lipschitz=lipschitz),
        )
        if norm == "rms_clip":
            mixing = nn.Sequential(RMSClip(max_rms), mixing)
            network.insert(0, RMSClip(max_rms))
        self.mixing = ConvexResidual(mixing, init, **made)
        self.feed_forward = ConvexResidual(network, init, **made)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Apply the block to sequences, batched or not."""
        if key_padding_mask is not None:
            _checks.tensor(self, key_padding_mask=key_padding_mask)
        masked = isinstance(key_padding_mask, Tensor)  # not where torch.fx traces
        return self.feed_forward(self._masked(x, key_padding_mask) if masked else self.mixing(x))

    def _masked(self, x: Tensor, mask: Tensor) -> Tensor:
        """The first residual connection with a mask for its attention."""
        branch, inside = self.mixing.branch, x
        if isinstance(branch, nn.Sequential):
            inside, branch = branch[0](x), branch[1]
        _checks.require(
            not isinstance(branch, TokenMixing),
            self,
            "key_padding_mask must be None where attention='mixing', whose matrices are fixed",
            "Set padded tokens to zero, or use another attention",
        )
        alpha = self.mixing.alpha
        return ((1 - alpha) * x + alpha * branch(inside, key_padding_mask=mask)).to(x.dtype)

    def lipschitz_bound(self) -> float:
        """Return the constant of the block, read from a, b and the constant of its branches."""
        first, second = self.mixing, self.feed_forward
        return first.lipschitz_bound(self.lipschitz) * second.lipschitz_bound(self.lipschitz)
