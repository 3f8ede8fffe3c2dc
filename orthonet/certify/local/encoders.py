"""PyTorch's attention layers, written out in operations that have constants in balls.

`nn.MultiheadAttention` and the encoder layers choose among fused kernels by modes, sizes and
masks; all of them stand for the same function, which is written here once.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthonet import _checks
from orthonet.errors import UncertifiableError
from orthonet.layers.children import is_as_its_class

__all__ = ["written_out"]

_NEAR = 1e-3
"""How far outputs of the original may be off, relative to the largest: fused kernels in float32."""


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
    with torch.no_grad():
        wanted = _flat(twin(*examples))
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


def _require(good: bool, module: nn.Module, requirement: str, **found: object) -> None:
    _checks.require(
        good,
        type(module).__name__.removeprefix("_"),
        f"in balls {requirement}",
        "Write it with F.scaled_dot_product_attention in a module of yours",
        UncertifiableError,
        **found,
    )


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
        y = self.out_proj(y.transpose(1, 2).flatten(2))
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
        def attended(x: Tensor) -> Tensor:
            found = self.self_attn(
                x, x, x, src_key_padding_mask, False, src_mask, is_causal=is_causal
            )
            return found[0]

        def fed(x: Tensor) -> Tensor:
            return self.linear2(self.activation(self.linear1(x)))

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
