"""The constant of a converted model, and what makes it large."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from orthonet.convert._progress import Progress
from orthonet.convert._report import Cause
from orthonet.errors import UncertifiableError

__all__ = ["certified"]


def certified(
    model: nn.Module, example_input: Tensor | Sequence[Tensor], tell: Progress
) -> tuple[float | None, tuple[Cause, ...], str]:
    """The constant in eval mode, the three operations that raise it most, and why there is none."""
    from orthonet.certify import certify  # most conversions do without

    frozen = copy.deepcopy(model).eval().requires_grad_(False)  # weights are computed once
    try:
        certificate = certify(frozen, example_input, effort="fast", lower=False, progress=tell)
    except UncertifiableError as error:
        return None, (), str(error)
    return certificate.constant.value, causes(certificate.rows), ""


def causes(rows: Sequence[Any], count: int = 3) -> tuple[Cause, ...]:
    """The rows of a certificate that raise the constant most, by their factor over all before."""
    found, highest = [], 1.0
    for row in rows:
        if row.cumulative > highest * (1 + 1e-3):
            found.append(Cause(row.path, row.op, row.cumulative / highest))
        highest = max(highest, row.cumulative)
    return tuple(sorted(found, key=lambda cause: -cause.factor)[:count])
