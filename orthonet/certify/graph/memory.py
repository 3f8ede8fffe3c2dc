"""The memory of tensors: whether they share it, and what it holds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["digest", "storages_of"]


def storages_of(tensors: Iterable[Tensor]) -> set[int]:
    """Where the memory of tensors begins, of those that have any."""
    found = set()
    for tensor in tensors:
        try:
            found.add(tensor.untyped_storage().data_ptr())
        except RuntimeError:  # of a transform, or sparse
            continue
    return found - {0}


def digest(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a tensor: little-endian, in row-major order."""
    tensor = tensor.detach().cpu()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.resolve_conj().resolve_neg().contiguous()
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
