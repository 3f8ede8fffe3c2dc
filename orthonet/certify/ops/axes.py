"""Matrices of pooling, padding, windows and interpolation along one axis, from their definitions.

The operations are Kronecker products of these over the spatial axes. Entries that are no small
integers are computed in float64; `tests/certify/test_axes.py` compares all with PyTorch's kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

_TOGETHER = 2**15  # entries of one matrix for two axes


__all__ = [
    "Grid",
    "adaptive",
    "along",
    "average",
    "empty",
    "interpolation",
    "kept",
    "padding",
    "taps",
    "windows",
]


def along(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Apply one matrix to each of the last dims."""
    if len(matrices) == 2 and math.prod(m.numel() for m in matrices) <= _TOGETHER:
        joint = torch.kron(*matrices).mT.to(x.dtype)  # one product moves no dims
        return (x.flatten(-2) @ joint).unflatten(-1, [len(m) for m in matrices])
    for dim, matrix in zip(range(-len(matrices), 0), matrices, strict=True):
        x = (x.movedim(dim, -1) @ matrix.mT.to(x.dtype)).movedim(-1, dim)
    return x


def padding(size: int, pad: tuple[int, int], mode: str) -> Tensor:
    """Rows of ones where an entry is copied to; negative pads cut off, before the rest wraps."""
    places = torch.arange(-pad[0], size + pad[1])
    if mode == "circular":
        first, left = max(-pad[0], 0), kept(size, pad)
        source = first + (places - first) % left
    elif mode == "replicate":
        source = places.clamp(0, size - 1)
    elif mode == "reflect":
        source = places.abs()
        source = torch.where(source >= size, 2 * (size - 1) - source, source)
    else:
        source = places
    matrix = torch.zeros(len(places), size, dtype=torch.float64)
    inside = (source >= 0) & (source < size)
    matrix[inside.nonzero()[:, 0], source[inside]] = 1.0
    return matrix


def kept(size: int, pad: tuple[int, int]) -> int:
    """How many entries negative pads leave."""
    return size + min(pad[0], 0) + min(pad[1], 0)


def taps(size: int, outputs: int, kernel: int, stride: int, pad: int, dilation: int) -> Tensor:
    """(kernel, outputs, size): what each tap of a window reads, nothing in the padding."""
    places = torch.arange(kernel)[:, None] * dilation + torch.arange(outputs)[None] * stride - pad
    columns = torch.arange(size)
    return (places[..., None] == columns).to(torch.float64)


def windows(size: int, outputs: int, kernel: int, stride: int, pad: int, dilation: int = 1) -> int:
    """How many windows an entry is in, at most."""
    seen = taps(size, outputs, kernel, stride, pad, dilation).sum((0, 1))
    return int(seen.max()) if seen.numel() else 0


def empty(size: int, outputs: int, kernel: int, stride: int, pad: int, dilation: int) -> bool:
    """Whether a window lies in the padding with all of its taps."""
    places = torch.arange(kernel)[:, None] * dilation + torch.arange(outputs)[None] * stride - pad
    return not bool(((places >= 0) & (places < size)).any(0).all())


def average(
    size: int, outputs: int, kernel: int, stride: int, pad: int, inside: bool, whole: bool
) -> Tensor:
    """Averages of windows; of `inside` entries only, or sums if `whole`."""
    matrix = torch.zeros(outputs, size, dtype=torch.float64)
    for i in range(outputs):
        begin = i * stride - pad
        end = min(begin + kernel, size + pad)
        first, last = max(begin, 0), min(end, size)
        if last > first:
            count = 1 if whole else last - first if inside else end - begin
            matrix[i, first:last] = 1.0 / count
    return matrix


def adaptive(size: int, outputs: int) -> Tensor:
    """Averages over parts of an axis that cover it."""
    matrix = torch.zeros(outputs, size, dtype=torch.float64)
    for i in range(outputs):
        begin, end = i * size // outputs, -(-(i + 1) * size // outputs)
        matrix[i, begin:end] = 1.0 / (end - begin)
    return matrix


# --- interpolation -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Interpolation along one axis.

    Attributes:
        matrix: (outputs, size).
        moved: How far a weight times the norm moves for each unit that a place is moved by: a
            bound of the spectral norm of the change of the matrix, over that of the places.
        reach: A bound of the modulus of the places, which float arithmetic rounds relative to.
        certain: Every float dtype picks the same entries; otherwise `matrix` holds all that one of
            them picks, which has no smaller norm but is no map to go on with.
    """

    matrix: Tensor
    moved: float
    reach: float
    certain: bool = True


def interpolation(size: int, outputs: int, mode: str, corners: bool, scale: float | None) -> Grid:
    """Interpolation of an axis; `scale` is the factor that it was given, None for the sizes."""
    if mode.startswith("nearest"):
        return _nearest(size, outputs, mode == "nearest-exact", scale)
    smooth, cubic = mode.endswith("aa"), "cubic" in mode
    if corners:
        ratio = (size - 1) / (outputs - 1) if outputs > 1 else 0.0
    else:
        ratio = 1.0 / scale if scale is not None and scale > 0 else size / outputs
    if smooth:
        return _smoothed(size, outputs, ratio, cubic, corners)
    places = torch.arange(outputs, dtype=torch.float64)
    places = places * ratio if corners else (places + 0.5) * ratio - 0.5
    if not cubic:
        places = places.clamp_min(0.0)
    first = places.floor()
    share = places - first
    weights = (
        [
            _cubic(share + 1, -0.75),
            _cubic(share, -0.75),
            _cubic(1 - share, -0.75),
            _cubic(2 - share, -0.75),
        ]
        if cubic
        else [1 - share, share]
    )
    matrix = torch.zeros(outputs, size, dtype=torch.float64)
    rows = torch.arange(outputs)
    for offset, weight in zip(range(-1, 3) if cubic else range(2), weights, strict=True):
        column = (first.long() + offset).clamp(0, size - 1)
        matrix.index_put_((rows, column), weight, accumulate=True)
    # Each weight has a slope of 1.35 at most in the place, 1 if it is linear; a step of the place
    # touches the taps of two neighboring cells. Rows and columns of the change are summed.
    width = 5 if cubic else 3
    near = width / ratio + 1.0 if ratio > 0.0 else float(outputs)
    moved = 2.0 * math.sqrt(width * min(near + width, float(outputs) + width))
    return Grid(matrix, moved, float(size) + 2.0)


def _cubic(x: Tensor, a: float) -> Tensor:
    """The cubic convolution kernel of Keys (1981) on [0, 2]."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _smoothed(size: int, outputs: int, ratio: float, cubic: bool, corners: bool) -> Grid:
    """Antialiased interpolation: the kernel is as wide as the step, its weights sum to one."""
    support = (2.0 if cubic else 1.0) * max(ratio, 1.0)
    narrow = 1.0 / ratio if ratio >= 1.0 else 1.0
    matrix = torch.zeros(outputs, size, dtype=torch.float64)
    columns = torch.arange(size, dtype=torch.float64)
    least, most = math.inf, 1
    for i in range(outputs):
        center = ratio * (i + 0.5)
        distance = ((columns - center + 0.5) * narrow).abs()
        weights = _cubic(distance, -0.5) if cubic else (1 - distance).clamp_min(0.0)
        total = float(weights.sum())
        least, most = min(least, abs(total)), max(most, int((weights != 0).sum()))
        matrix[i] = weights / total if total else weights
    if not least > 0.0:
        raise ValueError("an antialiased window without weight")
    near = (2.0 * support + 3.0) / ratio + 2.0 if ratio > 0.0 else float(outputs)
    count = most + 2.0
    moved = 4.0 * count * math.sqrt(count * (near + 1.0)) * max(1.0, 1.0 / least)
    return Grid(matrix, moved, float(size) + 2.0)


def _nearest(size: int, outputs: int, exact: bool, scale: float | None) -> Grid:
    """The entry at or below a place; every entry that some float arithmetic may take for it."""
    scale = scale if scale is not None and 0.0 < scale < math.inf else None
    ratio = Fraction(size, outputs) if scale is None else 1 / Fraction(scale)
    half = Fraction(1, 2) if exact else Fraction(0)
    shift = 0.5 if exact else 0.0
    choices: list[Callable[[int], int]] = [lambda i: math.floor((i + half) * ratio)]
    for dtype in (torch.float32, torch.float64):
        if scale is None:
            step = torch.tensor(float(size), dtype=dtype) / torch.tensor(outputs, dtype=dtype)
        else:
            step = torch.tensor(1.0 / scale, dtype=dtype)
        choices.append(lambda i, step=step: int(torch.floor((i + shift) * step)))
    matrix = torch.zeros(outputs, size, dtype=torch.float64)
    certain = True
    for i in range(outputs):
        found = {min(max(choose(i), 0), size - 1) for choose in choices}
        certain = certain and len(found) == 1
        matrix[i, list(found)] = 1.0
    return Grid(matrix, 0.0, float(size), certain)
