"""What attention layers share: the arguments of `nn.MultiheadAttention`, heads and masks."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from orthonet import _checks
from orthonet.layers._base import WithoutPlainWeight
from orthonet.layers._declared import Declared, Norms, refuse
from orthonet.layers._linear import OrthoLinear
from orthonet.layers.children import Child
from orthonet.layers.zoo._base import new_bias
from orthonet.linalg.bounds.sizes import Chained, Rounding
from orthonet.linalg.matrix import compute_dtype
from orthonet.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams

__all__ = [
    "PROJECTION",
    "SelfAttention",
    "check_sequence",
    "joined",
    "sequence_of",
    "softmax_count",
    "split",
    "traced",
    "weighted",
    "with_offset",
]

PROJECTION = Child((OrthoLinear, nn.Linear), {"bias": None})
"""A projection on whose map a bound relies; `to_plain` makes it an `nn.Linear`."""


def check_sequence(layer: Any, x: Tensor) -> None:
    """Refuse what is no sequence, or batch of sequences, of at most `max_length` tokens."""
    _checks.real_input(layer, x, "query")
    _checks.require(
        x.ndim in (2, 3) and x.shape[-1] == layer.embed_dim,
        layer,
        f"the input must be (N, L, {layer.embed_dim}) or (L, {layer.embed_dim})",
        "Put the batch first and the features last",
        query=x,
    )
    _checks.require(
        x.shape[-2] <= layer.max_length,
        layer,
        "a sequence must have at most max_length tokens, since the constant grows with the length",
        "Make the layer with a larger max_length, or cut the sequence",
        length=x.shape[-2],
        max_length=layer.max_length,
    )


def sequence_of(module: nn.Module, input_shape: tuple[int, ...]) -> int:
    """The length of the sequences of a batch that is certified."""
    if len(input_shape) != 2:
        refuse(module, "the input must have a batch dimension", "Use x.unsqueeze(0)")
    return input_shape[0]


class SelfAttention(WithoutPlainWeight, nn.Module, abc.ABC):
    """Self-attention between orthogonal projections, times lipschitz / constant(max_length)."""

    _projections: tuple[str, ...] = ()
    _scale: tuple[str, float]  # the parameter that each head learns, and what it begins with
    out_proj: nn.Module
    _longest: float  # constant(max_length)
    bias: Tensor | None

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
        lipschitz: float = 1.0,
        ortho_params: OrthoParams | str = DEFAULT_ORTHO_PARAMS,
    ) -> None:
        super().__init__()
        owner = type(self)
        _checks.positive_int(owner, embed_dim=embed_dim, num_heads=num_heads, max_length=max_length)
        _checks.require(
            embed_dim % num_heads == 0,
            owner,
            "num_heads must divide embed_dim",
            "Choose a divisor",
            embed_dim=embed_dim,
            num_heads=num_heads,
        )
        _checks.boolean(
            owner,
            bias=bias,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
            batch_first=batch_first,
            causal=causal,
        )
        _checks.require(
            isinstance(dropout, (int, float)) and dropout == 0.0,
            owner,
            "dropout of attention weights must be 0, since its factor breaks the constant",
            "Put nn.Dropout behind the layer, which is the identity in eval mode",
            dropout=dropout,
        )
        _checks.require(
            not add_bias_kv and not add_zero_attn,
            owner,
            "add_bias_kv and add_zero_attn must be False: the proof is of attention among tokens",
            "Append a learnable token to the sequence",
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
        )
        _checks.require(
            all(n is None or (isinstance(n, int) and n == embed_dim) for n in (kdim, vdim)),
            owner,
            "kdim and vdim must be embed_dim: queries, keys and values come from one sequence",
            "Leave them out",
            kdim=kdim,
            vdim=vdim,
        )
        _checks.require(
            bool(batch_first),
            owner,
            "batch_first must be True: a certificate takes the first dimension for the batch",
            "Use x.transpose(0, 1) in front of the layer and behind it",
            batch_first=batch_first,
        )
        _checks.factory(owner, device, dtype)
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.max_length, self.causal = max_length, bool(causal)
        self.lipschitz = _checks.lipschitz_constant(owner, lipschitz)
        for name in self._names:
            projection = OrthoLinear(
                embed_dim, embed_dim, False, device, dtype, ortho_params=ortho_params
            )
            setattr(self, name, projection)
        new_bias(self, embed_dim if bias else None, device, dtype)
        name, value = self._scale
        scale = torch.full((num_heads,), value, device=device, dtype=dtype)
        self.register_parameter(name, nn.Parameter(scale))
        self._longest = self.constant(max_length)

    @property
    def head_dim(self) -> int:
        """The features of a head."""
        return self.embed_dim // self.num_heads

    def reset_parameters(self) -> None:
        """Draw the projections anew and reset the rest; nothing happens on the meta device."""
        learned, value = self._scale
        for name in self._names:
            projection: Any = getattr(self, name)
            projection.reset_parameters()
        for parameter, start in ((self.bias, 0.0), (getattr(self, learned), value)):
            if parameter is not None and not parameter.is_meta:
                nn.init.constant_(parameter, start)

    def __call__(
        self, query: Any, key: Any = None, value: Any = None, *args: Any, **kw: Any
    ) -> Any:
        """Call the layer; key and value that are the query itself are left out.

        A trace of forward for a certificate then has one input.
        """
        key, value = (None if part is query else part for part in (key, value))
        return super().__call__(query, key, value, *args, **kw)

    def forward(
        self,
        query: Tensor,  # (*batch, L, embed_dim)
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,  # (*batch, L), True where a token is padding
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Apply the layer to a sequence, and return a tensor of its shape."""
        check_sequence(self, query)
        self._check_arguments(query, key, value, need_weights, attn_mask, is_causal)
        padding = self._padding(query, key_padding_mask)
        wide = compute_dtype(torch.promote_types(query.dtype, self._dtype()))
        with torch.autocast(query.device.type, enabled=False):
            weights = {name: self._weight(name).to(wide) for name in self._names}
            hidden = self._hidden(query.shape[-2], padding, query.device)
            y = self._heads()(query.to(wide), weights, hidden, self._learned(wide)) * self._factor
            y = y if self.bias is None else y + self.bias.to(wide)
            if padding is not None:
                y = y.masked_fill(padding[..., None], 0.0)
        return y.to(query.dtype)

    @abc.abstractmethod
    def _heads(self) -> Callable[..., Tensor]:
        """Return the function of input, weights, mask and learned scale that the layer is."""

    @abc.abstractmethod
    def _learned(self, dtype: torch.dtype) -> Tensor:
        """Return the learned factor of each head, (num_heads, 1, 1)."""

    @abc.abstractmethod
    def constant(self, length: int) -> float:
        """Return C(N), the proved constant of the heads on sequences of this length."""

    @property
    def _names(self) -> tuple[str, ...]:
        return (*self._projections, "out_proj")

    @property
    def _factor(self) -> float:
        """What the output of the heads is multiplied by."""
        return self.lipschitz / self._longest

    def _dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def _weight(self, name: str) -> Tensor:
        projection: Any = getattr(self, name)
        return projection.weight

    def _hidden(self, length: int, padding: Tensor | None, device: torch.device) -> Tensor | None:
        """Where a query does not see a key: (*batch, 1, L, L). Each token sees itself."""
        hidden = None
        if self.causal:
            hidden = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
        if padding is not None:
            own = torch.eye(length, dtype=torch.bool, device=device)
            keys = padding[..., None, None, :] & ~own
            hidden = keys if hidden is None else hidden | keys
        return hidden

    def _padding(self, query: Tensor, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        _checks.require(
            mask.dtype == torch.bool and mask.shape == query.shape[:-1],
            self,
            f"key_padding_mask must be boolean, of shape {tuple(query.shape[:-1])}",
            "Pass True where a token is padding",
            key_padding_mask=mask,
        )
        return mask

    @torch.no_grad()
    def to_plain(self) -> fx.GraphModule:
        """Return a `torch.fx.GraphModule` of torch alone that does the same, without padding.

        It has no certificate, since its scores are products of activations: certify this layer.
        """
        return traced(_PlainAttention(self), self.training)

    def _check_arguments(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        _checks.require(
            (key is None or key is query) and (value is None or value is query),
            self,
            "key and value must be the query itself: the constant is that of self-attention",
            "Leave them out, or join both sequences and use one layer on the whole",
            key=key,
            value=value,
        )
        _checks.require(
            not need_weights,
            self,
            "need_weights must be False: the layer returns its output alone",
            "Leave it out",
            need_weights=need_weights,
        )
        _checks.require(
            attn_mask is None,
            self,
            "attn_mask must be None: the constant is proved for no mask, causal ones and padding",
            "Make the layer with causal=True, or pass key_padding_mask",
            attn_mask=attn_mask,
        )
        _checks.require(
            self.causal or not is_causal,
            self,
            "is_causal must be False for a layer that was made without causal=True",
            "Make the layer with causal=True",
            is_causal=is_causal,
        )

    def extra_repr(self) -> str:
        causal = ", causal=True" if self.causal else ""
        scale = "" if self.lipschitz == 1.0 else f", lipschitz={self.lipschitz:g}"
        return f"{self.embed_dim}, {self.num_heads}, max_length={self.max_length}{causal}{scale}"

    @abc.abstractmethod
    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        """Prove a bound of the Lipschitz constant from the weights that forward computes."""


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True


def traced(module: nn.Module, training: bool) -> fx.GraphModule:
    """Return the code of a module as a graph of torch alone."""
    graph = fx.Graph()  # a copy, since that of a tracer cannot be pickled without this library
    graph.output(graph.graph_copy(_Tracer().trace(module), {}))
    return fx.GraphModule(module, graph, type(module).__name__.removeprefix("_")).train(training)


class _PlainAttention(nn.Module):
    """The layer of stock linear maps that is traced for export."""

    hidden: Tensor | None
    learned: Tensor
    bias: nn.Parameter | None

    def __init__(self, layer: SelfAttention) -> None:
        super().__init__()
        names, self.heads, self.factor = layer._names, layer._heads(), layer._factor
        for name in names:
            weight = layer._weight(name)
            setattr(self, name, nn.Linear(*weight.shape, bias=False).to(weight))
            getattr(self, name).weight.copy_(weight)
        self.names = names
        self.register_buffer("learned", layer._learned(compute_dtype(layer._dtype())).clone())
        hidden = layer._hidden(layer.max_length, None, self.learned.device)
        self.register_buffer("hidden", hidden)
        new = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.register_parameter("bias", new)

    def forward(self, query: Tensor) -> Tensor:
        hidden, length = self.hidden, query.shape[-2]
        if hidden is not None:
            hidden = hidden[:length, :length]
        weights = {name: getattr(self, name).weight for name in self.names}
        y = self.heads(query, weights, hidden, self.learned) * self.factor
        return y if self.bias is None else y + self.bias


def split(x: Tensor, heads: int) -> Tensor:
    """(*batch, L, features) as (*batch, heads, L, features of a head)."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def joined(x: Tensor) -> Tensor:
    """(*batch, heads, L, features of a head) as (*batch, L, features)."""
    return x.transpose(-2, -3).flatten(-2)


def weighted(scores: Tensor, hidden: Tensor | None, values: Tensor) -> Tensor:
    """The means of the values by the softmax of the scores that are not hidden."""
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    return scores.softmax(-1) @ values


def softmax_count(length: int, head_dim: int) -> float:
    """The roundings of a softmax over so many scores and of the mean with its weights."""
    return 2.0 * length + head_dim + 160.0


def with_offset(chain: Chained, length: int, bias: float, stages: int) -> Rounding:
    """The rounding of a chain, a bias for each token, and the stages of half precision."""
    chain = chain.map(1.0, 2.0, bias * math.sqrt(length))
    return chain.rounding()._replace(stages=stages)
