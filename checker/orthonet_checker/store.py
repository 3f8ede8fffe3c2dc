"""Constants: read from safetensors files, and known by name, type, shape and SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orthonet_checker.norms import moderate
from orthonet_checker.schema import many, need, parse, record, text, whole

DTYPES = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
_BYTES = 2**50
_QUANTIZED = ("I8", "U8")


class Key(NamedTuple):
    """What a constant is: its bytes (little endian, row by row), how they are read, its shape."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} with SHA-256 {self.sha256}"


def read_safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """(dtype, shape, bytes) by name; overlapping, missing or surplus bytes are rejected."""
    data, file = path.read_bytes(), repr(path.name)
    need(len(data) >= 8, f"{file} is no safetensors file")
    length = int.from_bytes(data[:8], "little")
    need(length <= len(data) - 8, f"{file} is cut off")
    header = parse(data[8 : 8 + length], f"the header of {file}")
    need(type(header) is dict, f"{file} has no readable header")
    body, tensors, spans = data[8 + length :], {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        found = record(
            entry,
            f"{file}: {name!r}",
            {
                "dtype": text,
                "shape": many(whole(0, _BYTES)),
                "data_offsets": many(whole(0, _BYTES)),
            },
        )
        need(len(found["data_offsets"]) == 2, f"{file}: {name!r} needs two offsets")
        need(found["dtype"].replace("_", "").isalnum(), f"{file}: {name!r} has no type")
        begin, end = found["data_offsets"]
        need(begin <= end <= len(body), f"{file}: {name!r} lies outside of the file")
        spans.append((begin, end))
        tensors[name] = (found["dtype"], found["shape"], body[begin:end])
    edges = [0, *(edge for span in sorted(spans) for edge in span), len(body)]
    need(
        all(a == b for a, b in zip(edges[::2], edges[1::2], strict=True)),
        f"{file} has gaps or overlaps",
    )
    return tensors


class Store:
    """The tensors of one file or more, by their names."""

    def __init__(self, *paths: Path) -> None:
        self.keys: dict[str, Key] = {}
        self._data: dict[Key, bytes] = {}
        for path in paths:
            for name, (dtype, shape, data) in read_safetensors(path).items():
                need(name not in self.keys, f"two of the files have a tensor {name!r}")
                self.add(name, dtype, shape, data)

    def add(self, name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> Key:
        """Put in a tensor; what it is."""
        key = self.keys[name] = Key(dtype, tuple(shape), hashlib.sha256(data).hexdigest())
        self._data[key] = data
        return key

    def __contains__(self, key: Key) -> bool:
        return key in self._data

    def array(self, key: Key) -> np.ndarray:
        """The finite numbers of a constant, in binary64: exact for both dtypes."""
        values = np.frombuffer(self._data[key], DTYPES[key.dtype])
        values = values.reshape(key.shape).astype(np.float64)
        need(bool(np.isfinite(values).all()), "a constant is not finite")
        need(
            moderate(values, -200, 200),
            "a constant is beyond the range in which roundings are counted",
        )
        return values


def unread(model: Store, names: Sequence[tuple[str, Key]]) -> list[str]:
    """The tensors of a model that may be weights and are no constants by name, of (name, key) each.

    Those are floating-point and complex numbers, and bytes, which hold quantized weights; other
    integers count steps or places.

    In the files all names may stand behind one common prefix, such as `model.`: the one with which
    most are found. Another tensor under the name of a constant is rejected. A name that two
    constants have tells nothing.
    """
    wanted = dict(names)
    for name, key in names:
        if wanted.get(name) not in (None, key):
            del wanted[name]
    counts = {"": 0}
    for found in model.keys:
        parts = found.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in wanted:
                prefix = found[: len(found) - len(".".join(parts[i:]))]
                counts[prefix] = counts.get(prefix, 0) + 1
    prefix = max(sorted(counts, key=len), key=counts.__getitem__)
    left = []
    for found, key in sorted(model.keys.items()):
        expected = wanted.get(found[len(prefix) :]) if found.startswith(prefix) else None
        need(
            expected in (None, key),
            f"tensor {found!r} of the weights is {key}, "
            f"not the constant of that name, which is {expected}",
        )
        if expected is None and (key.dtype[0] in "FC" or key.dtype in ("BF16", *_QUANTIZED)):
            left.append(found)
    return left


def digest(keys: Any) -> str:
    """One SHA-256 for a set of constants: of their sorted keys, one a line."""
    lines = sorted({f"{k.dtype} {'x'.join(map(str, k.shape))} {k.sha256}\n" for k in keys})
    return hashlib.sha256("".join(lines).encode()).hexdigest()
