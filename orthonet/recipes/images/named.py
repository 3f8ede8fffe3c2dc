"""The recipes of image classification by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from orthonet.layers import available
from orthonet.recipes.data.idx import FASHION, find_idx
from orthonet.recipes.data.sets import IMAGE_SETS
from orthonet.recipes.images.config import FolderConfig, TrainConfig
from orthonet.recipes.images.run import train
from orthonet.recipes.running.options import Option
from orthonet.recipes.running.registry import Recipe, register

__all__ = ["cifar100_xs", "cifar10_xs", "demo", "digits", "fashion", "folder", "mnist", "mnist5k"]

_INSIDE = {"dataset": None, "data_root": None}  # the data comes inside a package


def digits(**changes: Any) -> TrainConfig:
    """Classify the 1797 digits of scikit-learn, 8x8 pixels: less than a minute on one core.

    Args:
        changes: Fields of [`TrainConfig`][orthonet.recipes.TrainConfig] to set differently.

    Raises:
        ValueError: A value out of range.
    """
    values: dict[str, Any] = {
        "dataset": "digits",
        "model": "convnet_digits",
        "epochs": 30,
        "batch_size": 64,
        "shift": 0.5,
        "radius": 0.6,
    }
    return _configured(values, changes)


def mnist5k(**changes: Any) -> TrainConfig:
    """Classify 5000 digits of MNIST, 28x28 pixels: a few minutes on two cores.

    Args:
        changes: Fields of [`TrainConfig`][orthonet.recipes.TrainConfig] to set differently.

    Raises:
        ValueError: A value out of range.
    """
    values: dict[str, Any] = {"dataset": "mnist5k", "model": "convnet_mnist", "epochs": 30}
    return _configured(values, changes)


def fashion(**changes: Any) -> TrainConfig:
    """Classify the 60,000 training images of Fashion-MNIST, 28x28 pixels: a minute an epoch.

    Debian's package dataset-fashion-mnist brings the images, or `data_root` holds them. Of the
    10,000 test images 1000, evenly spaced, are certified and attacked in the end; set
    `evaluated=0` for all.

    Args:
        changes: Fields of [`TrainConfig`][orthonet.recipes.TrainConfig] to set differently.

    Raises:
        ValueError: A value out of range.
    """
    return _configured(_FASHION, changes)


def demo(**changes: Any) -> TrainConfig:
    """Classify Fashion-MNIST if its images are on this machine, else 5000 digits of MNIST.

    What `make demo` runs: a few minutes on two cores. On Fashion-MNIST training ends after 200 CPU
    seconds. A `data_root` that is given must hold Fashion-MNIST.

    Args:
        changes: Fields of [`TrainConfig`][orthonet.recipes.TrainConfig] to set differently.

    Raises:
        ValueError: A value out of range.
    """
    there = "data_root" in changes or find_idx(FASHION, Path("data")) is not None
    return fashion(**{"cpu_seconds": 200.0, **changes}) if there else mnist5k(**changes)


def mnist(**changes: Any) -> TrainConfig:
    """Classify the 60,000 training images of MNIST, 28x28 pixels: minutes an epoch.

    `data_root` holds the images. 1000 evenly spaced test images are certified and attacked in the
    end; set `evaluated=0` for all.

    Args:
        changes: Fields of [`TrainConfig`][orthonet.recipes.TrainConfig] to set differently.

    Raises:
        ValueError: A value out of range.
    """
    return _configured({**_WHOLE, "dataset": "mnist"}, changes)


def _configured(values: dict[str, Any], changes: dict[str, Any]) -> TrainConfig:
    """The configuration; l-infinity has a network of its own, and another model other arguments."""
    if changes.get("norm") == "linf":
        features = math.prod(IMAGE_SETS[values["dataset"]].shape)
        arguments = {"in_features": features, "num_classes": 10, "norm": "linf"}
        values = {**values, **_LINF, "model_arguments": arguments}
    if changes.get("model", values["model"]) != values["model"]:
        values = {**values, "model_arguments": {}}
    return TrainConfig(**{**values, **changes})


# Chosen on validation images of mnist5k.
_LINF: dict[str, Any] = {
    "model": "mlp",
    "lr": 0.01,
    "radius": 0.15,
    "temperature": 0.02,
    "shift": 0.0,
    "rotation": 0.0,
    "zoom": 0.0,
    "shear": 0.0,
    "flip": False,
    "radii": (2 / 255, 8 / 255, 0.1, 0.15),
}
_WHOLE: dict[str, Any] = {"model": "convnet_mnist", "epochs": 10, "evaluated": 1000}
# Chosen on validation images, see "What helps on Fashion-MNIST?" in docs/zoo-benchmark.md.
_FASHION: dict[str, Any] = {
    "dataset": "fashion",
    "model": "convnet_zoo",
    "model_arguments": {"in_shape": (1, 28, 28), "layer": "cholesky", "width": 28},
    "epochs": 20,
    "lr": 0.01,
    "radius": 1.0,
    "temperature": 0.2,
    "shift": 0.0,
    "rotation": 0.0,
    "zoom": 0.0,
    "shear": 0.0,
    "flip": True,
    "radii": (36 / 255, 72 / 255, 108 / 255, 0.5, 1.0, 1.58),
    "evaluated": 1000,
}


# Loss and optimizer of "1-Lipschitz layers compared"; nothing is moved but by crops and flips.
_COMPARED: dict[str, Any] = {
    "batch_size": 256,
    "optimizer": "sgd",
    "lr": 0.1,
    "radius": 2 * 36 / 255,
    "temperature": 0.25,
    "shift": 0.0,
    "rotation": 0.0,
    "zoom": 0.0,
    "shear": 0.0,
    "flip": True,
}


def cifar10_xs(**changes: Any) -> TrainConfig:
    r"""Train the network "XS" of "1-Lipschitz layers compared" on CIFAR-10, on a GPU.

    The data set must lie in `data_root`, see [`load_cifar10`][orthonet.recipes.load_cifar10]. The
    training: SGD on a one-cycle schedule, batches of 256, cross-entropy with the offset
    \(2 \sqrt 2 \cdot 36 / 255\) at temperature 1/4, crops and flips. Another layer is chosen by
    `model_arguments={"layer": name}`, from the shell by `--layer`.

    Args:
        changes: Fields of [`TrainConfig`][orthonet.recipes.TrainConfig] to set differently.

    Raises:
        ValueError: A value out of range.

    References:
        Prach, Brau, Buttazzo & Lampert, CVPR 2024.
    """
    values: dict[str, Any] = {
        "dataset": "cifar10",
        "model": "convnet_xs",
        "epochs": 100,
        "crop": 4,
        "radii": (36 / 255, 72 / 255, 108 / 255, 1.0),
    }
    return TrainConfig(**{**_COMPARED, **values, **changes})


def cifar100_xs(**changes: Any) -> TrainConfig:
    """Train the network of `cifar10_xs` on the 100 classes of CIFAR-100, on a GPU.

    Args:
        changes: Fields of [`TrainConfig`][orthonet.recipes.TrainConfig] to set differently.

    Raises:
        ValueError: A value out of range.
    """
    return cifar10_xs(**{"dataset": "cifar100", **changes})


def folder(**changes: Any) -> FolderConfig:
    r"""Classify images in an ImageNet-style folder: DIR/train/CLASS/* and DIR/val/CLASS/*.

    Name DIR as `data_root`, from the shell by `--data`; torchvision reads it (the extra `vision`).
    Pictures are cropped at random, resized and mirrored to train on; the shorter side becomes
    256/224 of `image_size` and the center is cut out to validate on, and it is there that
    perturbations have their radius. Loss and optimizer are those of `cifar10_xs`. Start it by
    `torchrun` for several processes.

    Args:
        changes: Fields of [`FolderConfig`][orthonet.recipes.FolderConfig] to set differently.

    Raises:
        ValueError: A value out of range.
    """
    values: dict[str, Any] = {
        "dataset": "folder",
        "model": "convnet_images",
        "epochs": 90,
        "radii": (36 / 255, 72 / 255, 0.5, 1.0),
    }
    return FolderConfig(**{**_COMPARED, **values, **changes})


_LAYER = Option(
    lambda: available("conv"), into="model_arguments", help="The convolution, a name of the zoo"
)
register("digits", Recipe(TrainConfig, digits, train, _INSIDE))
register("mnist5k", Recipe(TrainConfig, mnist5k, train, _INSIDE))
register("demo", Recipe(TrainConfig, demo, train, {"dataset": None}))
register("fashion", Recipe(TrainConfig, fashion, train, {"dataset": None}))
register("mnist", Recipe(TrainConfig, mnist, train, {"dataset": None}))
register("cifar10-xs", Recipe(TrainConfig, cifar10_xs, train, {"dataset": None, "layer": _LAYER}))
register("cifar100-xs", Recipe(TrainConfig, cifar100_xs, train, {"dataset": None, "layer": _LAYER}))
register("folder", Recipe(FolderConfig, folder, train, {"dataset": None, "validation": None}))
