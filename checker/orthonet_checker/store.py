"""Constants: read from safetensors files, and known by the SHA-256 of their bytes."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orthonet_checker.norms import moderate
from orthonet_checker.schema import Rejected, many, need, parse, record, text, whole

DTYPES = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}


class Key(NamedTuple):
    """What a constant is: its bytes (little endian, row by row), how they are read, its shape."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


def read_safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """(dtype, shape, bytes) by name; overlapping, missing or surplus bytes are rejected."""
    data = path.read_bytes()
    need(len(data) >= 8, f"{path.name} is no safetensors file")
    length = int.from_bytes(data[:8], "little")
    need(length <= len(data) - 8, f"{path.name} is cut off")
    try:
        header = parse(data[8 : 8 + length].decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise Rejected(f"{path.name} has no readable header") from None
    need(type(header) is dict, f"{path.name} has no readable header")
    body, tensors, spans = data[8 + length :], {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        offsets = many(whole(0))
        found = record(
            entry, f"{path.name}: {name}",
            {"dtype": text, "shape": many(whole(0)), "data_offsets": offsets},
        )  # fmt: skip
        need(len(found["data_offsets"]) == 2, f"{path.name}: {name} needs two offsets")
        begin, end = found["data_offsets"]
        need(begin <= end <= len(body), f"{path.name}: {name} lies outside of the file")
        spans.append((begin, end))
        tensors[name] = (found["dtype"], found["shape"], body[begin:end])
    edges = [0, *(edge for span in sorted(spans) for edge in span), len(body)]
    need(all(a == b for a, b in zip(edges[::2], edges[1::2], strict=True)),
         f"{path.name} has gaps or overlaps")  # fmt: skip
    return tensors


class Store:
    """The tensors of one file or more, found by what they are and not by their names."""

    def __init__(self, *paths: Path) -> None:
        self.tensors: dict[tuple[str, str], bytes] = {}
        for path in paths:
            for dtype, _, data in read_safetensors(path).values():
                self.tensors[dtype, hashlib.sha256(data).hexdigest()] = data

    def __contains__(self, key: Key) -> bool:
        return (key.dtype, key.sha256) in self.tensors

    def array(self, key: Key) -> np.ndarray:
        """The finite numbers of a constant, in binary64: exact for both dtypes."""
        data = self.tensors[key.dtype, key.sha256]
        need(len(data) == math.prod(key.shape) * DTYPES[key.dtype].itemsize, "size of a tensor")
        values = np.frombuffer(data, DTYPES[key.dtype]).reshape(key.shape).astype(np.float64)
        need(bool(np.isfinite(values).all()), "a constant is not finite")
        need(moderate(values, -200, 200),
             "a constant is beyond the range in which roundings are counted")  # fmt: skip
        return values


def digest(keys: Any) -> str:
    """One SHA-256 for a set of constants: of their sorted keys, one a line."""
    lines = sorted({f"{k.dtype} {'x'.join(map(str, k.shape))} {k.sha256}\n" for k in keys})
    return hashlib.sha256("".join(lines).encode()).hexdigest()
