"""Random points on the spaces of the library."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.linalg.factorization import qr
from orthonet.linalg.matrix import compute_dtype

__all__ = ["haar"]


def haar(
    shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw semi-orthogonal matrices from the Haar (uniform) distribution.

    They are the orthogonal factors of Gaussian matrices, with a positive diagonal of \(R\).

    Args:
        shape: (*batch, m, n).
        dtype: Floating-point dtype; the default is PyTorch's.
        device: Device of the result.
        generator: Source of randomness.

    Shape:
        Output: `shape`.

    Examples:
        >>> q = haar((3, 2))
        >>> (q.T @ q).allclose(torch.eye(2), atol=1e-5)
        True

    References:
        Mezzadri, *How to generate random matrices from the classical compact groups*, Notices of
        the AMS 54 (2007).
    """
    sizes = _checks.weight_shape("haar", shape, "shape")
    _checks.factory("haar", device, dtype)
    _checks.require(
        generator is None or isinstance(generator, torch.Generator),
        "haar",
        "generator must be a torch.Generator, or None",
        "Pass torch.Generator().manual_seed(0)",
        generator=generator,
    )
    dtype = torch.get_default_dtype() if dtype is None else dtype
    gaussian = torch.randn(sizes, dtype=compute_dtype(dtype), device=device, generator=generator)
    return qr(gaussian).to(dtype)
