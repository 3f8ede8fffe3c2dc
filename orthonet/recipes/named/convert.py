"""A model named on the command line, converted and saved."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from orthonet import _checks
from orthonet.convert import ConversionReport, orthogonalize
from orthonet.recipes.named.model import load_named, model_named
from orthonet.recipes.running.files import replacing
from orthonet.recipes.running.reading import reason_of

__all__ = ["convert_file"]

_OWNER = "orthonet convert"


def convert_file(
    source: str,
    out: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    input_shape: Sequence[int] = (),
    **options: Any,
) -> ConversionReport:
    """Make a model by name, orthogonalize it and save it whole with `torch.save`.

    The file is opened before the work begins, and an older one stays whole until the end.

    Args:
        source: `"package.module:function"`, a function without arguments that returns a module,
            such as `"torchvision.models:resnet18"`; the present folder is searched too.
        out: The file of the new model, .pt or .pth, in a folder that exists. Load it with
            `torch.load(out, weights_only=False)`, or certify it from the shell with
            `orthonet certify out --trusted`.
        checkpoint: A file of a `state_dict` that the model loads first, .pt or .safetensors.
        input_shape: Shape of one input. With it the report ends with a proved constant.
        **options: Those of [`orthogonalize`][orthonet.convert.orthogonalize].

    Returns:
        The report.

    Raises:
        ValueError: `source` names no function, what it returns is no module, the weights are of
            another model, or an option is wrong.
        OSError: A file cannot be read or written.
    """
    path = Path(out)
    _checks.require(
        path.suffix in (".pt", ".pth"),
        _OWNER,
        "out must be a file of torch.save",
        "Name a file that ends in .pt; it holds the whole model",
        out=str(path),
    )
    for size in input_shape:
        _checks.positive_int(_OWNER, input_shape=size)
    with replacing(path) as file:
        model = model_named(source, _OWNER)
        if checkpoint is not None:
            load_named(model, Path(checkpoint), _OWNER)
        if input_shape:
            parameter = next(iter(model.parameters()), torch.empty(0))
            options["example_input"] = torch.rand(1, *input_shape, dtype=parameter.dtype)
        new, report = orthogonalize(model, return_report=True, **options)
        try:
            torch.save(new, file)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            _checks.fail(
                _OWNER,
                "the model must be picklable to be saved whole",
                "Define its classes and functions at the top level of a module",
                source=source,
                reason=reason_of(error),
            )
    return report
