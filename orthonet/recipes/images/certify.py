"""Certify what `orthonet train` has trained."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orthonet import _checks
from orthonet.recipes.data.digits import spaced
from orthonet.recipes.images.checkpoint import load_checkpoint
from orthonet.recipes.images.page import CertificateReport, certificate_alone
from orthonet.recipes.images.report import Report, certified, written
from orthonet.recipes.images.run import images_of
from orthonet.recipes.running.folder import claimed, require_device

__all__ = ["certify_checkpoint"]


def certify_checkpoint(
    checkpoint: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    input_shape: Sequence[int] | None = None,
    progress: bool = False,
    tell: Callable[[str], None] | None = None,
    **changes: Any,
) -> Report | CertificateReport:
    """Certify and attack a trained model again, on its test images.

    Args:
        checkpoint: A file that [`train`][orthonet.recipes.train] wrote.
        out: A folder for `metrics.json` and the pictures; nothing is written without it.
        report: A file for the report, one HTML page, see
            [`report_html`][orthonet.certify.report_html]. It is written before the attacks, and
            again after them.
        input_shape: Shape of one sample. With it the model is certified for inputs of this shape
            without any data: no accuracies, no attacks, no `out`.
        progress: Whether to show progress bars on the standard error stream.
        tell: Called with the text of the certificate, before the attacks begin.
        changes: Fields of the configuration to set differently, e.g. `radii` or `attack_steps`.

    Returns:
        The report, without a history; with `input_shape` that of the certificate alone.

    Raises:
        ModuleNotFoundError: A package of the extra `demo` is missing.
        ValueError: The file is not a checkpoint, or a value is out of range.
        OSError: The file cannot be read, or `out` not written.
    """
    model, config = load_checkpoint(checkpoint)
    config = dataclasses.replace(config, **changes)
    require_device(config.device)
    page = None if report is None else Path(report)
    if input_shape is not None:
        _checks.require(
            out is None,
            "certify_checkpoint",
            "out needs the data of the recipe",
            "Leave out input_shape",
            input_shape=input_shape,
        )
        title = f"{config.title}: {Path(checkpoint).name}"
        return certificate_alone(model, input_shape, config.norm, page, title, tell)
    with claimed(Path(out)) if out is not None else contextlib.nullcontext() as folder:
        images = spaced(images_of(config).test, config.evaluated)
        model = model.to(config.device)
        found = certified(model, config, images, page=page, tell=tell, progress=progress)
        return found if folder is None else written(found, model, images, folder, found.files)
