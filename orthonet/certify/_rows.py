"""The rows of a certificate as text and HTML, and the checks of what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.certify._bound import Bound, Row
from orthonet.errors import UncertifiableError

__all__ = [
    "batch_of",
    "check_dtypes",
    "check_inputs",
    "dtype_name",
    "require_l2",
    "short_html",
    "short_text",
    "text_table",
]

_SHORT = 12  # rows of a short table


def text_table(rows: Sequence[Row]) -> str:
    """Return all rows as a text table with a head."""
    head = ("module", "operation", "input", "constant", "cumulative", "kind", "s", "method")
    lines = [head] + [
        (
            row.path,
            row.op,
            "x".join(map(str, row.input_shape)),
            f"{row.constant:.7g}",
            f"{row.cumulative:.7g}",
            row.kind,
            f"{row.seconds:.2f}",
            row.method,
        )
        for row in rows
    ]
    text = _aligned([line[:-1] for line in lines])
    text = [f"{left}  {line[-1]}" for left, line in zip(text, lines, strict=True)]
    text.insert(1, "-" * len(text[0]))
    return "\n".join(text)


def short_text(rows: Sequence[Row]) -> str:
    """Return the first and the last rows, indented, without methods."""
    lines = [f"  {line.rstrip()}" for line in _aligned(_cells(rows))]
    if len(rows) > _SHORT:
        lines.insert(_SHORT // 2, f"  ... {len(rows) - _SHORT} more, see table()")
    return "\n".join(lines)


def short_html(rows: Sequence[Row]) -> str:
    """Return the same as a table of HTML."""
    head = "<tr><th>module</th><th>operation</th><th>constant</th><th>cumulative</th></tr>"
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for cells in _cells(rows)
    )
    more = len(rows) - _SHORT
    note = f"<p>and {more} more rows in the middle, see table()</p>" if more > 0 else ""
    return f"<table>{head}{body}</table>{note}"


def _cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    half = _SHORT // 2
    few = rows if len(rows) <= _SHORT else (*rows[:half], *rows[-half:])
    return [(r.path, r.op, f"{r.constant:.6g}", f"{r.cumulative:.6g}") for r in few]


def _aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    """Cells in columns that are as wide as their longest one."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]


def batch_of(inputs: Any) -> tuple[Any, ...]:
    """The tensors of a batch; what holds none becomes an entry, and is refused as such."""
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without that of its module."""
    return str(dtype).removeprefix("torch.")


def check_dtypes(
    logits: Tensor,
    inputs: Any,
    dtype: torch.dtype | None,
    output: torch.dtype | None,
    samples: Sequence[Tensor],
) -> None:
    """Refuse a forward pass in another dtype than the one whose rounding is counted."""
    batch = batch_of(inputs)
    wanted = dtype or output
    coarse = wanted is not None and torch.finfo(logits.dtype).eps > torch.finfo(wanted).eps
    other = dtype is None and any(x.dtype != s.dtype for x, s in zip(batch, samples, strict=False))
    _checks.require(
        not coarse and not other,
        "LipschitzCertificate",
        f"inputs and logits must be of the dtypes that were certified: "
        f"{[dtype_name(s.dtype) for s in samples]} and {wanted and dtype_name(wanted)}",
        "Call certify with an example of the dtype that is deployed, or pass dtype=",
        inputs=[dtype_name(x.dtype) for x in batch],
        logits=dtype_name(logits.dtype),
    )


def check_inputs(
    input_shape: tuple[Any, ...], batch: tuple[Any, ...], within: Tensor | float
) -> None:
    """Refuse inputs of other shapes than those that were certified."""
    nested = bool(input_shape) and isinstance(input_shape[0], tuple)
    shapes = input_shape if nested else (input_shape,)
    samples = [len(x) if isinstance(x, Tensor) and x.ndim else -1 for x in batch]
    if isinstance(within, Tensor) and within.ndim:
        samples.append(len(within))
    _checks.require(
        all(isinstance(x, Tensor) for x in batch)
        and tuple(tuple(x.shape[1:]) for x in batch) == tuple(shapes)
        and len(set(samples)) == 1,
        "LipschitzCertificate",
        f"inputs must be batches of {shapes}, one sample for each row of the logits",
        "Pass what the model was given",
        inputs=batch[0] if len(batch) == 1 else batch,
        samples=samples,
    )


def require_l2(what: str, constant: Bound) -> None:
    """Refuse what has no proof in another norm."""
    _checks.require(
        constant.norm == "l2",
        "LipschitzCertificate",
        f"{what} needs a certificate in l2",
        "Call certify without norm= and to=; its radii convert to other norms",
        UncertifiableError,
        norm=constant.norm,
    )
