"""Read files of tensors that may be anything: damaged, foreign, or a pickle that runs code."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import torch
from torch import nn

from orthonet import _checks
from orthonet.recipes.data.digits import require_package

__all__ = ["FOREIGN", "Wanted", "load_weights", "read_json", "read_tensors", "reason_of"]

# What the parts of a foreign file raise where they are put to use.
FOREIGN = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class Wanted(NamedTuple):
    """The file that is expected, for the errors.

    Attributes:
        owner: Who reads it.
        kind: What it must be, such as "a checkpoint of orthonet train".
        advice: What to do if it is not.
    """

    owner: str
    kind: str
    advice: str

    def fail(self, path: Path, reason: str, requirement: str = "") -> NoReturn:
        """Refuse the file."""
        requirement = requirement or f"the file must be {self.kind}"
        _checks.fail(self.owner, requirement, self.advice, path=str(path), reason=reason)


def read_tensors(
    path: Path, wanted: Wanted, *, device: torch.device | str = "cpu"
) -> tuple[Any, dict[str, str]]:
    """Read a file of `torch.save` or, by its suffix, of safetensors; no code in it is run.

    Args:
        path: The file.
        wanted: For the errors.
        device: Where the tensors go.

    Returns:
        What was saved, and the metadata of safetensors.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: The file is damaged, or a pickle of other objects than tensors.
        ModuleNotFoundError: The package safetensors is needed and missing.
    """
    if path.is_dir():
        inside = next(iter(sorted(path.glob("*.pt"))), None)
        name = "it is a folder" + ("" if inside is None else f", which holds {inside.name}")
        wanted.fail(path, name)
    with path.open("rb") as file:
        if not file.read(1):
            wanted.fail(path, "it is empty")
        file.seek(0)
        if path.suffix == ".safetensors":
            return _read_safetensors(path, wanted, device)
        try:
            place = torch.device(device)
            where = "cpu" if place.type == "cpu" else place  # torch.load knows no cpu:0
            return torch.load(file, map_location=where, weights_only=True), {}
        except pickle.UnpicklingError as error:
            _refuse_code(path, file, error, wanted)
            wanted.fail(path, "torch.save did not write it")
        except (*FOREIGN, EOFError, OSError, AssertionError):
            wanted.fail(path, "it is cut off, damaged, or not written by torch.save")


def load_weights(model: nn.Module, state: Any, path: Path, wanted: Wanted) -> None:
    """Load a `state_dict` that was read from a file.

    Raises:
        ValueError: It belongs to another model.
    """
    requirement = "the file must hold the weights of this very model"
    if not isinstance(state, Mapping):
        wanted.fail(path, f"it holds a {type(state).__name__}, not a state_dict", requirement)
    own = model.state_dict().keys()
    absent, foreign = sorted(own - state.keys()), sorted(map(str, state.keys() - own))
    try:
        model.load_state_dict(state)
    except FOREIGN as error:
        reason = reason_of(error)
        if absent or foreign:
            parts = [_counted("are missing", absent), _counted("are unknown", foreign)]
            reason = ", ".join(part for part in parts if part)
        wanted.fail(path, reason, requirement)


def read_json(path: Path, wanted: Wanted) -> Any:
    """Read a JSON file.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: It is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        wanted.fail(path, reason_of(error))


def reason_of(error: BaseException) -> str:
    """Return the message of an error in one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def _counted(what: str, names: list[str]) -> str:
    return (
        f"{len(names)} tensors {what} ({names[0]}{', ...' if names[1:] else ''})" if names else ""
    )


def _refuse_code(path: Path, file: BinaryIO, error: Exception, wanted: Wanted) -> None:
    """Refuse pickled objects; a file that is no pickle at all is left to the caller."""
    unsafe = "Unsupported global" in str(error) or "weights_only" in str(error).lower()
    file.seek(0)
    if not unsafe or file.read(2) not in _PICKLES:
        return
    found = re.search(r"GLOBAL\s+(\S+)", str(error))
    _checks.fail(
        wanted.owner,
        "a checkpoint must hold tensors and plain values only; this file is a pickle of other "
        "objects, and reading it could run any code",
        "Save model.state_dict(), or safetensors, where you trust the file. The command orthonet "
        "certify FILE --trusted reads a model that was saved whole",
        path=str(path),
        object=found[1] if found else "unknown",
    )


def _read_safetensors(
    path: Path, wanted: Wanted, device: torch.device | str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    package = require_package("safetensors", "safetensors")
    try:
        with package.safe_open(str(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except package.SafetensorError as error:
        wanted.fail(path, reason_of(error))
