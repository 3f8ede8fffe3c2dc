"""The norms that rules ask for, computed once in a walk with the effort that was asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from orthonet.linalg.bounds.convolutions import NormBound, convolution_norm_bound
from orthonet.linalg.bounds.enclosure import spectral_norm_bound

__all__ = ["EFFORTS", "Effort", "Limits", "conv_norm", "effort", "limits", "matrix_norm"]

Effort = Literal["fast", "default", "tight"]


@dataclass(frozen=True)
class Limits:
    """What an effort allows.

    Attributes:
        name: Its name.
        side: The shorter side of the largest matrix of an island.
        entries: Its largest number of entries.
        search: Steps of the search from below, at least; 0 for none.
        starts: Points that it starts from, at least.
        work: Floating-point operations that it may take beyond that.
    """

    name: Effort
    side: int
    entries: int
    search: int
    starts: int
    work: float = 0.0


EFFORTS: dict[str, Limits] = {
    "fast": Limits("fast", 128, 2**18, 0, 0),
    "default": Limits("default", 1024, 2**22, 30, 4, 1e10),
    "tight": Limits("tight", 4096, 2**24, 120, 8, 2e11),
}


@dataclass
class _Session:
    limits: Limits = EFFORTS["default"]
    known: dict[Any, Any] = field(default_factory=dict)


_SESSION: ContextVar[_Session] = ContextVar("orthonet_certify_session")


@contextmanager
def effort(name: Effort) -> Iterator[None]:
    """Within it, rules work with this effort and share what they computed."""
    token = _SESSION.set(_Session(EFFORTS[name]))
    try:
        yield
    finally:
        _SESSION.reset(token)


def limits() -> Limits:
    """The limits of the effort in force."""
    return _SESSION.get(_Session()).limits


def _digest(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu().contiguous()
    code = hashlib.blake2b(tensor.numpy().tobytes(), digest_size=16).digest()
    return code, tuple(tensor.shape), tensor.dtype


def matrix_norm(matrix: Tensor) -> float:
    """`spectral_norm_bound`, once for equal matrices."""
    known = _SESSION.get(_Session()).known
    key = _digest(matrix)
    if key not in known:
        known[key] = spectral_norm_bound(matrix)
    return known[key]


def conv_norm(kernel: Tensor, input_size: tuple[int, ...], **geometry: Any) -> NormBound:
    """`convolution_norm_bound`, once for equal kernels in equal places."""
    session = _SESSION.get(_Session())
    key = (*_digest(kernel), input_size, *((k, str(v)) for k, v in sorted(geometry.items())))
    if key not in session.known:
        session.known[key] = convolution_norm_bound(
            kernel, input_size, effort=session.limits.name, **geometry
        )
    return session.known[key]
