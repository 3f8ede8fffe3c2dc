"""A model named on the command line, converted and saved."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orthonet import _checks
from orthonet.convert._orthogonalize import orthogonalize
from orthonet.convert._report import ConversionReport

__all__ = ["convert_file"]


def convert_file(
    source: str, out: Path, *, checkpoint: Path | None = None, **options: Any
) -> ConversionReport:
    """Make a model by name, orthogonalize it and save it whole with `torch.save`.

    Args:
        source: `"package.module:function"`, a function without arguments that returns a module,
            such as `"torchvision.models:resnet18"`; the present folder is searched too.
        out: The file of the new model. Load it with `torch.load(out, weights_only=False)`.
        checkpoint: A `state_dict` that the model loads first.
        **options: Those of [`orthogonalize`][orthonet.convert.orthogonalize].

    Returns:
        The report.

    Raises:
        ValueError: `source` names no function, what it returns is no module, or an option is wrong.
        OSError: A file cannot be read or written.
    """
    module_name, _, attribute = source.partition(":")
    _checks.require(
        bool(module_name) and bool(attribute),
        "orthonet convert",
        "source must be package.module:function",
        "For example torchvision.models:resnet18",
        source=source,
    )
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        make = getattr(importlib.import_module(module_name), attribute, None)
    except ModuleNotFoundError as error:
        _checks.fail(
            "orthonet convert",
            f"the module of source must exist ({error})",
            "Install the package, or call from the folder that the file is in",
            source=source,
        )
    _checks.require(
        callable(make),
        "orthonet convert",
        f"{module_name} must have a function of that name",
        "Name a function or class that takes no arguments",
        source=source,
    )
    model: Any = make()  # type: ignore[misc]
    _checks.require(
        isinstance(model, nn.Module),
        "orthonet convert",
        "source must return a torch.nn.Module",
        "Name a function that builds a model",
        returned=type(model),
    )
    if checkpoint is not None:
        model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    new, report = orthogonalize(model, return_report=True, **options)
    torch.save(new, out)
    return report
