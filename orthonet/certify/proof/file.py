"""Certificates as files: JSON, and the constants next to it in the safetensors format.

The format, key by key, is described in docs/guide/checking.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.certify._bound import Bound, Row
from orthonet.certify.graph.program import Program
from orthonet.certify.graph.regions import autocast_region
from orthonet.certify.proof.graph import Writer
from orthonet.certify.proof.local import Claims, local_claims
from orthonet.certify.proof.nodes import Constant, counts
from orthonet.certify.report.files import replacing
from orthonet.certify.walk.walker import Walker
from orthonet.errors import UncertifiableError
from orthonet.linalg.bounds.rounding import hypot_up, mul_up, up

__all__ = ["load", "load_local", "named_constants", "save", "save_local"]

FORMAT = "orthonet certificate 1"
_SAMPLES = 2
_ROOM = 1.0 + 2.0**-26


class Proved(Protocol):
    """What is saved of a certificate beside the graph."""

    @property
    def constant(self) -> Bound: ...

    @property
    def lower(self) -> Bound | None: ...

    @property
    def rows(self) -> tuple[Row, ...]: ...

    @property
    def input_shape(self) -> tuple[Any, ...]: ...

    @property
    def pairs(self) -> Tensor | None: ...

    @property
    def autocast(self) -> torch.dtype | None: ...


def save(
    certificate: Proved, walker: Walker | None, path: str | Path, claims: Claims | None = None
) -> None:
    """Write a certificate: `path` as JSON, its constants next to it as `.safetensors`.

    `claims` are about balls around samples.
    """
    _checks.require(
        isinstance(path, (str, Path)) and Path(path).suffix not in (".html", ".htm"),
        "LipschitzCertificate",
        "path must be that of the JSON file",
        "Call save('certificate.json'); for a page, "
        "Path(path).write_text(orthonet.certify.report_html(certificate))",
        path=path,
    )
    path = Path(path)
    if walker is None:
        _checks.fail(
            "LipschitzCertificate",
            "the graph of the model must be there to be saved",
            "Call certify again: a certificate that was pickled, loaded or built by hand has none",
            UncertifiableError,
        )
    _checks.require(
        path.suffix != ".safetensors",
        "LipschitzCertificate",
        "path must be that of the JSON file, the constants go next to it",
        "Call save('certificate.json')",
        path=str(path),
    )
    with torch.no_grad():
        writer = Writer(walker)
        samples = _samples(walker.model, walker.program, writer)
        pairs = _pairs(certificate, writer)
        local = [] if claims is None else local_claims(writer, claims, pairs)
    each = [writer.bounds[i] for i in writer.outputs]
    bound = each[0] if len(each) == 1 else hypot_up(*each)
    weights = path.with_suffix(".safetensors")
    content = {
        "format": FORMAT,
        "weights": weights.name,
        "inputs": [
            list(writer.shapes[i]) for i, n in enumerate(writer.nodes) if n["op"] == "input"
        ],
        "constants": {name: c.entry() for name, c in writer.constants.items()},
        "nodes": writer.nodes,
        "outputs": writer.outputs,
        "bound": bound.hex(),
        "each": [b.hex() for b in each],
        **({"pairs": pairs} if pairs is not None else {}),
        **({"samples": samples} if samples is not None else {}),
        **({"local": local} if local else {}),
        "prover": _prover(certificate),
    }
    with replacing(path) as file, replacing(weights) as tensors:  # whole, both, before they move
        file.write((json.dumps(content, indent=1) + "\n").encode())
        _write_safetensors(tensors, writer.constants.items())


@dataclass(frozen=True)
class _Whole:
    """What is saved of a walk without a certificate of its own."""

    constant: Bound
    rows: tuple[Row, ...]
    input_shape: tuple[Any, ...]
    pairs: Tensor | None  # asked only whether there may be a table
    autocast: torch.dtype | None
    lower: Bound | None = None


def save_local(
    walker: Walker, batch: Sequence[Tensor], radius: float, labels: Tensor | None, path: str | Path
) -> None:
    """Write claims about balls, with the constant of the whole space."""
    _checks.require(
        walker.bound.value < math.inf,
        "LocalCertificate",
        "the model must have a constant of the whole space to be saved",
        "The checker knows no products of activations, softmax attention or unbounded gains",
        UncertifiableError,
        bound=walker.bound.value,
    )
    shapes = tuple(tuple(x.shape[1:]) for x in batch)
    vector = len(walker.outputs) == 1 and walker.outputs[0] is not None
    vector = vector and len(walker.outputs[0].shape) == 1  # type: ignore[union-attr]
    whole = _Whole(
        walker.bound,
        tuple(walker.rows()),
        shapes[0] if len(shapes) == 1 else shapes,
        torch.zeros(()) if vector else None,
        walker.program.autocast,
    )
    save(whole, walker, path, Claims.of(batch, radius, labels, whole.input_shape))


def load_local(path: str | Path) -> tuple[float, list[tuple[float, float, int | None]]]:
    """The constant of the whole space, and (radius, secant, class) of each ball of a file."""
    content = _read(path)
    _checks.require(
        bool(content.get("local")),
        "LocalCertificate",
        "the file must hold claims about balls",
        "Write them: certificate.save(path, local=x)",
        path=str(path),
    )
    found = [
        (float.fromhex(c["radius"]), float.fromhex(c["secant"]), c.get("label"))
        for c in content["local"]
    ]
    return float.fromhex(content["bound"]), found


def _read(path: str | Path) -> dict[str, Any]:
    """The content of a file that `save` wrote."""
    _checks.require(
        isinstance(path, (str, Path)) and Path(path).is_file(),
        "LipschitzCertificate",
        "path must be that of a file",
        "Pass the JSON file that certificate.save wrote",
        path=path,
    )
    path = Path(path)
    content: Any = None
    with contextlib.suppress(ValueError):  # neither JSON nor text
        content = json.loads(path.read_bytes())
    _checks.require(
        isinstance(content, dict) and content.get("format") == FORMAT,
        "LipschitzCertificate",
        f"the file must be of the format {FORMAT!r}",
        "Pass the JSON file that certificate.save wrote",
        path=str(path),
    )
    return content


def load(path: str | Path) -> dict[str, Any]:
    """The fields of a certificate that `save` wrote; its constants are those of the file."""
    content = _read(path)
    path = Path(path)
    told = content["prover"]
    pairs = None
    if "pairs" in content:
        entry = content["constants"][content["pairs"]]
        named = path.with_name(Path(content["weights"]).name)
        pairs = _read_tensor(named, content["pairs"], entry)
    shape = _tuples(told["input_shape"])
    rows = tuple(
        Row(**{**row, "input_shape": _tuples(row["input_shape"]), **_floats(row)})
        for row in told["rows"]
    )
    lower = told["lower"]
    autocast = told["autocast"]
    return {
        "constant": Bound(float.fromhex(content["bound"])),
        "rows": rows,
        "input_shape": shape,
        "pairs": pairs,
        "lower": None if lower is None else Bound(float.fromhex(lower), kind="estimate"),
        "outputs": tuple(Bound(float.fromhex(value)) for value in content["each"]),
        "autocast": None if autocast is None else getattr(torch, autocast),
    }


def named_constants(path: str | Path) -> dict[str, Tensor]:
    """Return the constants of a certificate by the names that they have in the model.

    Args:
        path: The JSON file; the SHA-256 of each constant is that of the file.

    Raises:
        ValueError: A constant is not the one of the certificate.
    """
    path = Path(path)
    content = json.loads(path.read_text("utf-8"))
    weights = path.with_name(Path(content["weights"]).name)
    return {
        name: _read_tensor(weights, key, entry)
        for key, entry in content["constants"].items()
        for name in entry["names"]
    }


_DTYPES = {"F32": torch.float32, "F64": torch.float64}
_NUMBERS = ("constant", "cumulative", "seconds")


def _prover(certificate: Proved) -> dict[str, Any]:
    """What the prover found, for the record: no claim of the file rests on it."""
    lower, autocast = certificate.lower, certificate.autocast
    return {
        "constant": certificate.constant.value.hex(),
        "kind": certificate.constant.kind,
        "lower": None if lower is None else lower.value.hex(),
        "input_shape": certificate.input_shape,
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
        "rows": [
            {k: v.hex() if k in _NUMBERS else v for k, v in vars(row).items()}
            for row in certificate.rows
        ],
        "versions": {
            "orthonet": version("orthonet"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _floats(row: dict[str, Any]) -> dict[str, float]:
    return {key: float.fromhex(row[key]) for key in _NUMBERS}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _samples(model: Any, program: Program, writer: Writer) -> dict[str, list[str]] | None:
    """A few inputs and what the model makes of them; None under autocast, which rounds them."""
    if program.autocast is not None:
        return None
    inputs = [x[:_SAMPLES].clone() for x in program.samples]
    with autocast_region(inputs[0].device, None):
        outputs = _flat(model(*(x.clone() for x in inputs)))
    if not all(x.dtype in (torch.float32, torch.float64) for x in (*inputs, *outputs)):
        return None
    if len(outputs) != len(writer.outputs):
        return None
    if not all(counts(x) for x in (*inputs, *outputs)):
        return None
    named = {"inputs": inputs, "outputs": outputs}
    return {k: [writer.aside(x, f"samples.{k}") for x in v] for k, v in named.items()}


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [t for v in values for t in _flat(v)]


def _pairs(certificate: Proved, writer: Writer) -> str | None:
    """The constants of differences of outputs that follow from the nodes of the file.

    Behind a last matrix |w_i - w_j| times the bound of its operand, at most root 2 times the whole.
    """
    if certificate.pairs is None or len(writer.outputs) != 1:
        return None
    place = writer.outputs[0]
    whole, count = writer.bounds[place], writer.shapes[place][0]
    factor, rows = 1.0, torch.arange(count)
    while writer.nodes[place]["op"] in ("slice", "scale"):
        node = writer.nodes[place]
        if node["op"] == "scale":
            factor = mul_up(factor, abs(float.fromhex(node["factor"])))
        else:
            rows = rows * node["step"] + node["start"]
        place = node["inputs"][0]
    pairs = torch.full(
        (count, count), mul_up(up(math.sqrt(2.0)), whole, _ROOM), dtype=torch.float64
    )
    node = writer.nodes[place]
    if node["op"] == "affine":
        weight = writer.constants[node["weight"]].value.double()[rows]
        features = mul_up(factor, writer.bounds[node["inputs"][0]], _ROOM)
        for i in range(count):
            near = torch.linalg.vector_norm(weight - weight[i], dim=1) * features
            pairs[i] = torch.minimum(pairs[i], near + 2.0**-180)
    return writer.aside(pairs.fill_diagonal_(0.0), "pairs")


def _write_safetensors(file: BinaryIO, constants: Iterable[tuple[str, Constant]]) -> None:
    header, end, parts = {}, 0, []
    for name, constant in constants:
        begin, end = end, end + len(constant.data)
        shape = list(constant.value.shape)
        header[name] = {"dtype": constant.dtype, "shape": shape, "data_offsets": [begin, end]}
        parts.append(constant.data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.writelines([len(text).to_bytes(8, "little"), text, *parts])


def _read_tensor(path: Path, name: str, wanted: dict[str, Any]) -> Tensor:
    """The tensor of a name, from the file of constants, if it is the wanted one."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    found = json.loads(data[8 : 8 + length]).get(name, {})
    same = all(found.get(key) == wanted[key] for key in ("dtype", "shape"))
    if same and found["dtype"] in _DTYPES:
        begin, end = (8 + length + n for n in found["data_offsets"])
        if hashlib.sha256(data[begin:end]).hexdigest() == wanted["sha256"]:
            values = torch.frombuffer(bytearray(data[begin:end]), dtype=_DTYPES[found["dtype"]])
            return values.reshape(found["shape"])
    return _checks.fail(
        "LipschitzCertificate",
        "the constants must be those of the certificate",
        "Keep the JSON and the safetensors file of one save together",
        path=str(path),
    )
