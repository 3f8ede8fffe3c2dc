"""What a run is made of: one frozen dataclass, and a function for every recipe."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from orthonet import _checks, reparametrizers
from orthonet.models import list_models
from orthonet.recipes.data.digits import DATASETS
from orthonet.reparametrizers import OrthoParams

__all__ = [
    "FolderConfig",
    "ORTHO_PARAMS",
    "RADII",
    "RECIPES",
    "TrainConfig",
    "cifar10_xs",
    "digits",
    "folder",
    "mnist5k",
]

ORTHO_PARAMS = {
    "default": reparametrizers.DEFAULT_ORTHO_PARAMS,
    "default_test": reparametrizers.DEFAULT_TEST_ORTHO_PARAMS,
    "bjorck_pass_through": reparametrizers.BJORCK_PASS_THROUGH_ORTHO_PARAMS,
    "qr": reparametrizers.QR_ORTHO_PARAMS,
    "exp": reparametrizers.EXP_ORTHO_PARAMS,
    "cholesky": reparametrizers.CHOLESKY_ORTHO_PARAMS,
    "cholesky_stable": reparametrizers.CHOLESKY_STABLE_ORTHO_PARAMS,
    "polar": reparametrizers.POLAR_ORTHO_PARAMS,
    "polar_warm": reparametrizers.POLAR_WARM_ORTHO_PARAMS,
    "auto": reparametrizers.AUTO_ORTHO_PARAMS,
}
RADII = (0.141, 0.5, 1.0, 1.58)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    r"""Everything that decides the outcome of a run; plain values, so that JSON can hold it.

    Attributes:
        dataset: "digits", "mnist5k" or "cifar10".
        model: Name of a model, as [`create`][orthonet.models.create] takes it.
        model_arguments: Keywords of the model, without `ortho_params`.
        ortho_params: Preset of the orthogonal layers, e.g. "default" or "qr".
        epochs: Passes over the training images.
        batch_size: Images in a step; an incomplete last batch is kept.
        optimizer: "adam", or "sgd" with momentum 0.9.
        lr: Highest learning rate of its one-cycle schedule.
        warmup: Share of the steps in which the learning rate rises.
        radius: Radius that the loss asks for; its offset is \(\sqrt 2 K\) times this, with the
            constant K that `model_arguments` asks of the model as `lipschitz`.
        temperature: Temperature of the offset cross-entropy.
        shift: Largest random translation of a training image, in pixels.
        rotation: Largest random rotation, in degrees.
        zoom: Largest random relative change of the width and of the height.
        shear: Largest random shear.
        crop: Zeros at each side before a random crop back to the size, in pixels.
        flip: Whether half of the training images, chosen at random, are mirrored.
        seed: Seed of the weights, the order of the images and the augmentation.
        device: Where the run takes place.
        radii: Radii at which accuracy is certified and attacked; 0.5 is followed during training.
        attack_steps: Gradient steps of an attack.
        data_root: Folder that holds CIFAR-10; the other data sets come inside packages.

    Raises:
        ValueError: A value out of range.
    """

    dataset: str
    model: str
    model_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ortho_params: str = "default"
    epochs: int = 20
    batch_size: int = 128
    optimizer: str = "adam"
    lr: float = 0.05
    warmup: float = 0.2
    radius: float = 0.92
    temperature: float = 0.1
    shift: float = 1.0
    rotation: float = 10.0
    zoom: float = 0.08
    shear: float = 0.1
    crop: int = 0
    flip: bool = False
    seed: int = 0
    device: str = "cpu"
    radii: tuple[float, ...] = RADII
    attack_steps: int = 40
    data_root: str = "data"

    _SOURCES: ClassVar[tuple[str, ...]] = (*DATASETS, "cifar10")

    def __post_init__(self) -> None:
        _checks.one_of(self, self._SOURCES, dataset=self.dataset)
        _checks.one_of(self, ("adam", "sgd"), optimizer=self.optimizer)
        _checks.one_of(self, list_models(), model=self.model)
        _checks.one_of(self, tuple(ORTHO_PARAMS), ortho_params=self.ortho_params)
        _checks.positive_int(
            self, epochs=self.epochs, batch_size=self.batch_size, attack_steps=self.attack_steps
        )
        _checks.in_range(self, 0.0, 1.0, warmup=self.warmup, zoom=self.zoom, shear=self.shear)
        _checks.in_range(self, 0.0, 180.0, rotation=self.rotation)
        _checks.in_range(self, 0.0, 1e3, shift=self.shift, radius=self.radius)
        _checks.in_range(self, 1e-6, 1e3, lr=self.lr, temperature=self.temperature)
        _checks.non_negative_int(self, seed=self.seed, crop=self.crop)
        for radius in self.radii:
            _checks.in_range(self, 0.0, 1e3, radii=radius)
        object.__setattr__(self, "radii", tuple(sorted(self.radii)))
        # JSON turns tuples into lists: both make the same configuration.
        values = {
            k: tuple(v) if isinstance(v, list) else v for k, v in self.model_arguments.items()
        }
        object.__setattr__(self, "model_arguments", values)

    @property
    def offset(self) -> float:
        """Margin that the loss asks of the logits."""
        return math.sqrt(2) * self.radius * self.lipschitz

    @property
    def lipschitz(self) -> float:
        """The constant that is asked of the model."""
        return float(self.model_arguments.get("lipschitz", 1.0))

    @property
    def exports(self) -> bool:
        """Whether the certificate is that of the plain copy: not for layers of the zoo."""
        return self.model_arguments.get("layer", "ortho") == "ortho"

    @property
    def preset(self) -> OrthoParams:
        """The preset that `ortho_params` names."""
        return ORTHO_PARAMS[self.ortho_params]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain Python values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: A field that this version does not know, or a value out of range.
        """
        if values.get("dataset") in FolderConfig._SOURCES:
            cls = FolderConfig
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        _checks.require(
            not unknown, cls, "every field must be known",
            "Use the version of orthonet that wrote the checkpoint", unknown=unknown,
        )  # fmt: skip
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class FolderConfig(TrainConfig):
    """A run on pictures in the folders of their classes; all of `TrainConfig`, and these.

    What `model_arguments` does not say of `in_shape` and `num_classes` is that of the folder.

    Attributes:
        image_size: Side of the square images that the network sees.
        min_scale: Smallest share of a picture that a random crop keeps, before it is resized.
        workers: Processes that read pictures, for each that trains; never more than there are
            cores, 0 for none.
        evaluated: Validation pictures, evenly spaced, that are certified and attacked in the end;
            0 for all of them.

    Raises:
        ValueError: A value out of range.
    """

    image_size: int = 224
    min_scale: float = 0.25
    workers: int = 4
    evaluated: int = 1000

    _SOURCES: ClassVar[tuple[str, ...]] = ("folder",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.positive_int(self, image_size=self.image_size)
        _checks.in_range(self, 1e-3, 1.0, min_scale=self.min_scale)
        _checks.non_negative_int(self, workers=self.workers, evaluated=self.evaluated)


def digits(**changes: Any) -> TrainConfig:
    """The 1797 digits of scikit-learn, 8x8 pixels: less than a minute on one core.

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
    return TrainConfig(**{**values, **changes})


def mnist5k(**changes: Any) -> TrainConfig:
    """5000 digits of MNIST, 28x28 pixels: a few minutes on two cores.

    Args:
        changes: Fields of [`TrainConfig`][orthonet.recipes.TrainConfig] to set differently.

    Raises:
        ValueError: A value out of range.
    """
    values: dict[str, Any] = {"dataset": "mnist5k", "model": "convnet_mnist", "epochs": 30}
    return TrainConfig(**{**values, **changes})


# Loss and optimizer of "1-Lipschitz layers compared"; nothing is moved but by crops and flips.
_COMPARED: dict[str, Any] = {
    "batch_size": 256, "optimizer": "sgd", "lr": 0.1, "radius": 2 * 36 / 255, "temperature": 0.25,
    "shift": 0.0, "rotation": 0.0, "zoom": 0.0, "shear": 0.0, "flip": True,
}  # fmt: skip


def cifar10_xs(**changes: Any) -> TrainConfig:
    r"""The network "XS" of "1-Lipschitz layers compared" on CIFAR-10, for a GPU.

    The data set must lie in `data_root`, see [`load_cifar10`][orthonet.recipes.load_cifar10]. Its
    recipe: SGD on a one-cycle schedule, batches of 256, cross-entropy with the offset
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


def folder(**changes: Any) -> FolderConfig:
    r"""Pictures in folders, as those of ImageNet lie: DIR/train/CLASS/* and DIR/val/CLASS/*.

    Name DIR as `data_root`, from the shell by `--data`; torchvision reads it (the extra `vision`).
    Pictures are cropped at random, resized and mirrored to train on; the shorter side becomes
    256/224 of `image_size` and the centre is cut out to validate on, and it is there that
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


RECIPES = {"cifar10-xs": cifar10_xs, "digits": digits, "folder": folder, "mnist5k": mnist5k}
