"""PyTorch's attention layers, written out in operations that have constants in balls.

`nn.MultiheadAttention` and the encoder layers choose among fused kernels by modes, sizes and
masks; all of them stand for the same function, which is written here once.
"""

from __future__ import annotations

import copy
import math
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthonet import _checks
from orthonet.errors import UncertifiableError
from orthonet.layers import OrthoLinear
from orthonet.layers.children import is_as_its_class

__all__ = ["written_out"]

_NEAR = 1e-3
"""How far outputs of the original may be off, relative to the largest: fused kernels in float32."""

_VALUES: ContextVar[bool] = ContextVar("values", default=False)
"""Whether masks have values that can be read: not where the twin is exported."""


def written_out(model: nn.Module, examples: tuple[Tensor, ...]) -> nn.Module:
    """Return the model with the attention layers of PyTorch in it written out.

    They share their weights with the model, which is left as it is.

    Raises:
        UncertifiableError: A layer has an option that is not known here, or the outputs differ.
    """
    twin = _rewritten(model, {})
    if twin is not model:
        _compare(model, twin, examples)
    return twin


def _rewritten(module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
    if id(module) in seen:
        return seen[id(module)]
    form = _FORMS.get(type(module))
    if form is not None:
        _require(is_as_its_class(module), module, "it must have no hooks", hooks=True)
    children = {
        name: None if child is None else _rewritten(child, seen)
        for name, child in module._modules.items()
    }
    found = module
    if form is not None or any(child is not module._modules[n] for n, child in children.items()):
        found = copy.copy(module)
        found._modules = children
    if form is not None:
        found.__class__ = form
    seen[id(module)] = found
    return found


def _compare(model: nn.Module, twin: nn.Module, examples: tuple[Tensor, ...]) -> None:
    """Compare the outputs, with and without gradients: PyTorch runs other kernels then."""
    token = _VALUES.set(True)
    try:
        with torch.no_grad():
            wanted = _flat(twin(*examples))
    finally:
        _VALUES.reset(token)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            found = _flat(model(*examples))
        near = len(found) == len(wanted) and all(
            a.shape == b.shape
            and bool(((a - b).abs().amax() <= _NEAR * (1e-6 + b.abs().amax())) if len(b) else True)
            for a, b in zip(found, wanted, strict=True)
        )
        _checks.require(
            near,
            "certify",
            "the attention layers must compute the same with and without gradients",
            "Use masks of bool, or of 0 and -inf, or torch.backends.mha.set_fastpath_enabled(False)"
            ", as PyTorch's fused layer reads floats as bool; and is_causal for causal masks only",
            UncertifiableError,
            model=type(model).__name__,
        )


def _flat(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, dict):
        return _flat(tuple(outputs.values()))
    if isinstance(outputs, (tuple, list)):
        return [t for part in outputs for t in _flat(part)]
    return [outputs.detach().flatten()] if isinstance(outputs, Tensor) else []


_WRITE = "Write it with F.scaled_dot_product_attention in a module of yours"
_UNFUSE = (
    "Call torch.backends.mha.set_fastpath_enabled(False), also where the model is deployed: the "
    "fused layer that PyTorch runs without gradients computes something else"
)


def _require(
    good: bool, module: nn.Module, requirement: str, advice: str = _WRITE, **found: object
) -> None:
    cls = type(module)
    _checks.require(
        good,
        (cls.__bases__[0] if cls in _FORMS.values() else cls).__name__,
        f"in balls {requirement}",
        advice,
        UncertifiableError,
        **found,
    )


def _check_hint(module: nn.Module, mask: Tensor | None, is_causal: bool) -> None:
    """Refuse a hint that is wrong: some kernels read the mask, others the hint."""
    if not is_causal or mask is None or not _VALUES.get():
        return
    hidden = mask if mask.dtype == torch.bool else mask == -math.inf
    good = torch.equal(hidden, torch.ones_like(hidden).triu(1))
    if good and mask.dtype != torch.bool:
        good = bool((mask[~hidden] == 0).all())
    _require(good, module, "is_causal must go with the causal mask alone", is_causal=True)


def _check_fused(layer: nn.TransformerEncoderLayer, mask: Tensor | None) -> None:
    """Refuse what the fused layer, which runs without gradients, computes in another way.

    It reads the weights of the children, skips the dropouts, and knows two activations.
    """
    attention, kind = layer.self_attn, layer.activation_relu_or_gelu
    qkv = attention.in_proj_weight is not None and attention.in_proj_bias is not None
    same = qkv and attention.num_heads % 2 == 0 and layer.norm1.eps == layer.norm2.eps
    if not same or not kind or not torch.backends.mha.get_fastpath_enabled():
        return  # PyTorch never runs it
    activation: Any = layer.activation
    function, cls = (F.gelu, nn.GELU) if kind == 2 else (F.relu, nn.ReLU)
    usual = activation is function
    if type(activation) is cls:
        exact = getattr(activation, "approximate", "none") == "none"
        usual = exact and is_as_its_class(activation)
    _require(usual, layer, "activation must be the fused one", _UNFUSE, activation=activation)
    for name, forwards in _CHILDREN.items():
        child = getattr(layer, name)
        good = type(child).forward in forwards and "forward" not in vars(child)
        _require(good, layer, f"{name} must run what PyTorch fuses", _UNFUSE, child=child)
    if mask is not None and mask.is_floating_point() and _VALUES.get():
        good = bool(((mask == 0) | (mask == -math.inf)).all())
        _require(good, layer, "a mask must be bool, or of 0 and -inf", _UNFUSE, src_mask=mask)


_LINEAR = (nn.Linear.forward, OrthoLinear.forward)
_CHILDREN = {
    **dict.fromkeys(("linear1", "linear2"), _LINEAR),
    **dict.fromkeys(("norm1", "norm2"), (nn.LayerNorm.forward,)),
    **dict.fromkeys(("dropout", "dropout1", "dropout2"), (nn.Dropout.forward, nn.Identity.forward)),
}
"""What the children may run of a layer that PyTorch fuses."""


class _Attention(nn.MultiheadAttention):
    """The output, and the weights where they are asked for."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        _require(self.batch_first, self, "batch_first must be True", batch_first=False)
        extra = self.bias_k is not None or self.add_zero_attn
        _require(not extra, self, "keys must come from the input alone", add_bias_kv=extra)
        _require(query.ndim == 3, self, "inputs must be (N, L, E)", ndim=query.ndim)
        _require(key_padding_mask is None, self, "key_padding_mask must be None", given=True)
        _check_hint(self, attn_mask, is_causal)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, cast(Tensor, w), b).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        if attn_mask is not None:
            _require(attn_mask.ndim == 2, self, "attn_mask must be (L, S)", ndim=attn_mask.ndim)
            if attn_mask.dtype == torch.bool:  # here True leaves an entry out
                attn_mask = ~attn_mask
        causal = is_causal and attn_mask is None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=causal)
        # PyTorch reads the weights of the child, and runs neither its forward nor its hooks.
        y = F.linear(y.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not need_weights:
            return y, None
        unit = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device).expand(*k.shape[:-1], -1)
        shares = F.scaled_dot_product_attention(q, k, unit, attn_mask, is_causal=causal)
        return y, shares.mean(1) if average_attn_weights else shares


class _Layer(nn.TransformerEncoderLayer):
    """The layer in eval mode."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        _check_fused(self, src_mask)

        def attended(x: Tensor) -> Tensor:
            found = self.self_attn(
                x, x, x, src_key_padding_mask, False, src_mask, is_causal=is_causal
            )
            return self.dropout1(found[0])

        def fed(x: Tensor) -> Tensor:
            return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))

        if self.norm_first:
            src = src + attended(self.norm1(src))
            return src + fed(self.norm2(src))
        src = self.norm1(src + attended(src))
        return self.norm2(src + fed(src))


class _Encoder(nn.TransformerEncoder):
    """The encoder in eval mode."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        for layer in self.layers:
            src = layer(src, mask, src_key_padding_mask, bool(is_causal))
        return src if self.norm is None else self.norm(src)


_FORMS: dict[type, type] = {
    nn.MultiheadAttention: _Attention,
    nn.TransformerEncoderLayer: _Layer,
    nn.TransformerEncoder: _Encoder,
}
