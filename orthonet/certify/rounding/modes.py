"""The modes of PyTorch that change what a model computes, or what this process does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from orthonet import _checks
from orthonet.errors import UncertifiableError

__all__ = ["check_products", "check_subnormal", "exclusive"]

_LOCK = threading.RLock()
_TINY = {torch.float32: 1e-40, torch.float64: 1e-310}  # subnormal: flushed to zero, or kept


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """Let one thread at a time trace and run models, and put PyTorch's switches back after it.

    `torch.export` changes switches of the whole process while it traces.
    """
    with _LOCK:
        backends = (torch.backends.mkldnn, torch.backends.cudnn)
        before: list[tuple[Any, str, Any]] = [(b, "enabled", b.enabled) for b in backends]
        try:
            yield
        finally:
            for owner, name, value in before:
                if getattr(owner, name) != value:
                    setattr(owner, name, value)


def check_subnormal(owner: str) -> None:
    """Refuse to compute bounds where subnormal numbers are flushed to zero; found by computing.

    Raises:
        UncertifiableError: They are.
    """
    for dtype, tiny in _TINY.items():
        kept = torch.tensor([tiny], dtype=dtype).mul(torch.tensor([1.0], dtype=dtype))
        _checks.require(
            bool((kept.view(torch.uint8) != 0).any()),  # no comparison, which flushes, too
            owner,
            "subnormal numbers must not be flushed to zero",
            "Call torch.set_flush_denormal(False): bounds of rounding assume IEEE arithmetic",
            UncertifiableError,
            dtype=dtype,
        )


def check_products(owner: str, devices: Iterable[torch.device], dtypes: set[torch.dtype]) -> None:
    """Refuse modes in which a forward pass takes products with fewer bits than its dtype says.

    Raises:
        UncertifiableError: Such a mode is on, on one of the devices, for one of the dtypes.
    """
    for device in devices:
        for switch, dtype, on in _reduced(device.type):
            _checks.require(
                not (on and dtype in dtypes),
                owner,
                f"{switch[0]} must be {switch[1]}: {dtype} would be multiplied with fewer bits",
                "Set it before the call and where the model runs, or leave the rounding out",
                UncertifiableError,
                device=device.type,
            )


def _reduced(device: str) -> Iterator[tuple[tuple[str, str], torch.dtype, bool]]:
    """The switches of a device, the dtype that each one is of, and whether it is on."""
    single, matmul = torch.float32, torch.backends.cuda.matmul
    if device == "cuda":
        yield ("torch.backends.cuda.matmul.allow_tf32", "False"), single, _low(matmul)
        convolutions = (getattr(torch.backends.cudnn, "conv", None), torch.backends.cudnn)
        yield ("torch.backends.cudnn.allow_tf32", "False"), single, _low(*convolutions)
        for kind, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
            name = f"allow_{kind}_reduced_precision_reduction"
            yield (
                (f"torch.backends.cuda.matmul.{name}", "False"),
                dtype,
                bool(getattr(matmul, name)),
            )
    else:
        precision = "torch.set_float32_matmul_precision, or torch.backends.mkldnn.*.fp32_precision,"
        engine = [getattr(torch.backends.mkldnn, n, None) for n in ("matmul", "conv", "rnn")]
        low = any(getattr(e, "fp32_precision", "none") in ("tf32", "bf16") for e in engine)
        low = low or torch.get_float32_matmul_precision() != "highest"
        yield (precision, '"highest"'), single, low


def _low(*owners: Any) -> bool:
    """Whether TF32 is allowed: by the setting of newer versions, or else by the older one."""
    for owner in owners:
        precision = getattr(owner, "fp32_precision", "none")
        if precision != "none":
            return precision != "ieee"
        with contextlib.suppress(AttributeError, RuntimeError):
            return bool(owner.allow_tf32)
    return False
