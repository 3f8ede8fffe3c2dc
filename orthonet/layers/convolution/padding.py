"""What a padding does to the norm of a convolution, and on which input sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from orthonet import _checks
from orthonet.functional import circular_pad, symmetric_pad

__all__ = ["SymmetricPad", "pad_input", "padding_norm", "required_sizes"]


def padding_norm(padding_mode: str, pads: Sequence[int]) -> float:
    r"""Return the norm of a padding, for all sizes that `required_sizes` allows.

    Every padded value copies one input value, so the operator P has a single 1 in each row:
    \(P^\top P\) is diagonal, holds how often each value appears, and \(\|P\|_2\) is the square root
    of the largest count, exactly. Counts multiply over the dimensions. In one of them, with p
    values before and q behind:

    - "replicate": an end appears 1 + p or 1 + q times; \(\sqrt{1 + \max(p, q)}\).
    - "reflect": values 1 to p (and likewise at the other end) appear twice; \(\sqrt 2\). No value
      is reflected at both ends as soon as the size is at least p + q + 2.
    - "symmetric": as "reflect" with the end itself: \(\sqrt 2\), for sizes of at least p + q.

    For other modes 1: zero padding is an isometry, and with circular padding the convolution is
    taken on the torus as a whole.

    Args:
        padding_mode: As for `nn.Conv2d`.
        pads: Padding before and behind, last dimension first.
    """
    ends = zip(pads[::2], pads[1::2], strict=True)
    if padding_mode == "replicate":
        return math.sqrt(math.prod(1 + max(p, q) for p, q in ends))
    if padding_mode in ("reflect", "symmetric"):
        return math.sqrt(math.prod(2 if p or q else 1 for p, q in ends))
    return 1.0


def required_sizes(padding_mode: str, pads: Sequence[int]) -> tuple[int, ...]:
    """Return the smallest input size of each dimension for which `padding_norm` holds."""
    ends = list(zip(pads[::2], pads[1::2], strict=True))[::-1]
    if padding_mode == "reflect":
        return tuple(p + q + 2 if p and q else p + q + 1 for p, q in ends)
    if padding_mode == "symmetric":
        return tuple(max(1, p + q) for p, q in ends)
    if padding_mode == "replicate":
        return tuple(2 if p and q else 1 for p, q in ends)
    if padding_mode == "circular":
        return tuple(max(p, q, 1) for p, q in ends)
    return (1,) * len(ends)


def pad_input(input: Tensor, padding_mode: str, pads: Sequence[int]) -> Tensor:
    """Pad by a mode other than zeros."""
    if not any(pads):
        return input
    if padding_mode == "circular":
        return circular_pad(input, pads)
    if padding_mode == "symmetric":
        return symmetric_pad(input, pads)
    return F.pad(input, list(pads), mode=padding_mode)


class SymmetricPad(nn.Module):
    """Mirror the last dimensions at their edges, the edge values included.

    See [`symmetric_pad`][orthonet.functional.symmetric_pad].

    Args:
        pad: Values to repeat before and behind the last dimension, then the one in front of it.

    Shape:
        `(*, *sizes)` to the same with the padded sizes.

    Guarantee:
        The norm is exactly the square root of 2 for every dimension that is padded, where its size
        is at least the sum of both paddings.

    Raises:
        ValueError: When called: an entry is negative or larger than the size.

    Examples:
        >>> import torch
        >>> SymmetricPad((1, 0))(torch.tensor([[1.0, 2.0]]))
        tensor([[1., 1., 2.]])
    """

    def __init__(self, pad: Sequence[int]) -> None:
        super().__init__()
        _checks.require(
            isinstance(pad, (tuple, list)) and len(pad) % 2 == 0,
            self,
            "pad must be a tuple of two integers for each dimension that is padded",
            "Pass e.g. pad=(1, 1, 1, 1) for images",
            pad=pad,
        )
        for size in pad:
            _checks.non_negative_int(self, pad=size)
        self.pad = tuple(pad)

    def forward(self, x: Tensor) -> Tensor:
        """Pad."""
        return symmetric_pad(x, self.pad)

    def extra_repr(self) -> str:
        """Return the paddings."""
        return f"{self.pad}"
