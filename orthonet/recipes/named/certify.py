"""Certify a model of the user's own, and attack it on images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.recipes.data.digits import Images, spaced
from orthonet.recipes.data.folder import load_pictures
from orthonet.recipes.data.sets import IMAGE_SETS, load, set_in
from orthonet.recipes.images.config import CertifyConfig
from orthonet.recipes.images.page import CertificateReport, certificate_alone
from orthonet.recipes.images.report import Report, certified, written
from orthonet.recipes.named.model import load_named, model_named, whole_model
from orthonet.recipes.running.folder import claimed, require_device
from orthonet.recipes.running.reading import FOREIGN, reason_of

__all__ = ["certify_named"]

_OWNER = "orthonet certify"


def certify_named(
    config: CertifyConfig,
    *,
    out: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    progress: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Report | CertificateReport:
    """Certify a model that a function makes or a file holds, and attack it if there are images.

    Args:
        config: The function, or the file of the whole model; the file of its weights; the images
            or the shape of an input.
        out: A folder for `metrics.json` and the picture of the accuracies; nothing is written
            without it.
        report: A file for the report, one HTML page. It is written before the attacks, and again
            after them.
        progress: Whether to show progress bars on the standard error stream.
        tell: Called with the text of the certificate, before the attacks begin.

    Returns:
        The report; without images that of the certificate alone.

    Raises:
        ValueError: The model cannot be made or certified, its weights are of another model, or it
            does not fit the images.
        OSError: A file cannot be read or written.
        ModuleNotFoundError: A package of the extra `demo` or `vision` is missing.
    """
    _checks.require(
        bool(config.data or config.input_shape),
        _OWNER,
        "data or input_shape must be given",
        "Name images, such as --data digits, or the shape of one input, such as "
        "--input-shape 3 32 32",
        source=config.source,
    )
    _checks.require(
        bool(config.data) or out is None,
        _OWNER,
        "out needs images",
        "Name them with --data",
        out=str(out),
    )
    _checks.require(
        report is None or not Path(report).is_dir(),
        _OWNER,
        "report must not be a folder",
        "Name a file in it",
        IsADirectoryError,
        report=str(report),
    )
    require_device(config.device)
    if config.trusted:
        model = whole_model(Path(config.source), _OWNER)
    else:
        model = model_named(config.source, _OWNER)
    if config.checkpoint:
        load_named(model, Path(config.checkpoint), _OWNER)
    model = model.to(config.device).eval()
    page = None if report is None else Path(report)
    if not config.data:
        _logits(model, torch.rand(1, *config.input_shape))
        return certificate_alone(model, config.input_shape, config.norm, page, config.title, tell)
    images = _images(config)
    shape = tuple(_logits(model, images.x[:1]).shape)
    classes = int(images.y.max()) + 1
    _checks.require(
        len(shape) == 2 and shape[1] >= classes,
        _OWNER,
        f"the model must return (batch, classes) with at least {classes} classes",
        "Certify a classifier of these images",
        source=config.source,
        shape=shape,
    )
    with claimed(Path(out)) if out is not None else contextlib.nullcontext() as folder:
        found = certified(model, config, images, page=page, tell=tell, progress=progress)
        return found if folder is None else written(found, model, images, folder, found.files)


def _images(config: CertifyConfig) -> Images:
    if config.data in IMAGE_SETS:
        return spaced(load(config.data).test, config.evaluated)
    folder = Path(config.data)
    _checks.require(
        folder.is_dir(),
        _OWNER,
        f"data must be one of {', '.join(IMAGE_SETS)} or a folder that exists",
        "Name one of them",
        data=config.data,
    )
    found = set_in(folder)
    if found is not None:
        return spaced(load(found, folder).test, config.evaluated)
    return load_pictures(folder, config.input_shape or (3, 224, 224), config.evaluated)


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    """The output of a model, or an error that says which input it does not take."""
    parameter = next(iter(model.parameters()), x)
    try:
        found = model(x.to(parameter.device, parameter.dtype))
    except (*FOREIGN, AssertionError) as error:
        _checks.fail(
            _OWNER,
            "the model must take the images",
            "Give the shape that it takes with --input-shape, or name other images",
            shape=tuple(x.shape),
            reason=reason_of(error),
        )
    _checks.require(
        isinstance(found, Tensor),
        _OWNER,
        "the model must return one tensor",
        "Name a function that makes a model of one output",
        returned=type(found),
    )
    return found
