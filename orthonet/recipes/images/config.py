"""The configurations of image classification: frozen dataclasses of plain values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from orthonet import _checks, reparametrizers
from orthonet.models import list_models
from orthonet.recipes.data.sets import IMAGE_SETS
from orthonet.recipes.running.options import check_choices, option
from orthonet.reparametrizers import OrthoParams

__all__ = ["CertifyConfig", "FolderConfig", "ORTHO_PARAMS", "RADII", "TrainConfig"]

ORTHO_PARAMS = reparametrizers.presets()
RADII = (0.141, 0.5, 1.0, 1.58)
_SEPARATION = {"l2": math.sqrt(2.0), "linf": 2.0}
"""How far the difference of two logits moves at most, in units of how far the logits move."""


def _check_local(config: Any) -> None:
    """Require that bounds in balls are asked for in l2 only."""
    _checks.non_negative_int(config, local=config.local)
    _checks.require(
        not config.local or config.norm == "l2",
        config,
        "local must be 0 unless the norm is l2: bounds in balls are in l2",
        "Leave it out",
        local=config.local,
        norm=config.norm,
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    r"""Everything that decides the outcome of a run; plain values, so that JSON can hold it.

    Attributes:
        dataset: Name of the images, as [`load`][orthonet.recipes.load] takes it.
        model: Name of the model; [`create`][orthonet.models.create] builds it.
        model_arguments: Keywords of the model, without `ortho_params`.
        ortho_params: Preset of the orthogonal layers.
        epochs: Passes over the training images.
        cpu_seconds: Process time of the training; 0 trains `epochs` epochs. Otherwise the learning
            rate follows the share that is spent, and the last epoch ends where the time does.
        batch_size: Images in a step; an incomplete last batch is kept.
        optimizer: "adam", or "sgd" with momentum 0.9.
        lr: Highest learning rate of its one-cycle schedule.
        warmup: Share of the steps in which the learning rate rises.
        unconstrained: Whether to train the stock twin of the model: ReLU, and weights that nothing
            bounds.
        norm: "l2" or "linf": the norm of all radii, of the certificate and of the attacks.
        loss: "offset" (offset cross-entropy), "annealing" (the same, fading out samples whose
            margin is large), or "emma" (cross-entropy of the worst logits inside the radius).
        radius: Radius that the loss asks for; its offset is \(\sqrt 2 K\) times this, 2 K times in
            l-infinity, with the constant K that `model_arguments` asks of the model as `lipschitz`.
        temperature: Temperature of the offset cross-entropy, annealed or not.
        noise: Standard deviation of the Gaussian noise on training images, which stay in [0, 1].
        shift: Largest random translation of a training image, in pixels.
        rotation: Largest random rotation, in degrees.
        zoom: Largest random relative change of the width and of the height.
        shear: Largest random shear.
        crop: Zeros at each side before a random crop back to the size, in pixels.
        flip: Whether half of the training images, chosen at random, are mirrored.
        seed: Seed of the weights, the order of the images and the augmentation.
        device: Device of the run, such as cpu or cuda.
        radii: Radii at which accuracy is certified and attacked; 0.5, or 0.1 in l-infinity, is
            followed during training.
        attack_steps: Gradient steps of an attack.
        local: Test images, evenly spaced, whose radii are enlarged by bounds in balls around them.
        data_root: Folder of the data.
        validation: Whether to hold validation images out of the training images, and to take them
            in place of the test images.
        evaluated: Test images, evenly spaced, that are certified and attacked in the end; 0 for
            all of them.

    Raises:
        ValueError: A value out of range.
    """

    dataset: str = option(choices=tuple(IMAGE_SETS))
    model: str = option(choices=list_models)
    model_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ortho_params: str = option("default", choices=tuple(ORTHO_PARAMS))
    epochs: int = 20
    cpu_seconds: float = 0.0
    batch_size: int = 128
    optimizer: str = option("adam", choices=("adam", "sgd"))
    lr: float = 0.05
    warmup: float = 0.2
    unconstrained: bool = False
    norm: str = option("l2", choices=tuple(_SEPARATION))
    loss: str = option("offset", choices=("offset", "annealing", "emma"))
    radius: float = 0.92
    temperature: float = 0.1
    noise: float = 0.0
    shift: float = 1.0
    rotation: float = 10.0
    zoom: float = 0.08
    shear: float = 0.1
    crop: int = 0
    flip: bool = False
    seed: int = 0
    device: str = option("cpu", trains=False)
    radii: tuple[float, ...] = option(RADII, trains=False)
    attack_steps: int = option(40, trains=False)
    local: int = option(0, trains=False)
    data_root: str = option("data", flags=("--data",), trains=False)
    validation: bool = False
    evaluated: int = option(0, trains=False)

    def __post_init__(self) -> None:
        check_choices(self)
        _checks.positive_int(
            self, epochs=self.epochs, batch_size=self.batch_size, attack_steps=self.attack_steps
        )
        _checks.in_range(self, 0.0, 1.0, warmup=self.warmup, zoom=self.zoom, shear=self.shear)
        _checks.in_range(self, 0.0, 180.0, rotation=self.rotation)
        _checks.in_range(self, 0.0, 1e3, shift=self.shift, radius=self.radius, noise=self.noise)
        _checks.in_range(self, 1e-6, 1e3, lr=self.lr, temperature=self.temperature)
        _checks.in_range(self, 0.0, 1e9, cpu_seconds=self.cpu_seconds)
        _checks.non_negative_int(self, seed=self.seed, crop=self.crop, evaluated=self.evaluated)
        _check_local(self)
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
        return self.margin(self.radius)

    @property
    def followed(self) -> float:
        """The radius whose margin is followed during training."""
        return 0.1 if self.norm == "linf" else 0.5

    def margin(self, radius: float) -> float:
        """Return the margin that certifies a radius if the constant is the one asked for."""
        return _SEPARATION[self.norm] * radius * self.lipschitz

    @property
    def lipschitz(self) -> float:
        """The constant that is asked of the model."""
        return float(self.model_arguments.get("lipschitz", 1.0))

    @property
    def exports(self) -> bool:
        """Whether the certificate is that of the plain copy: not for layers of the zoo."""
        return self.model_arguments.get("layer", "ortho") == "ortho"

    @property
    def title(self) -> str:
        """The data and the model in a few words."""
        norm = "" if self.norm == "l2" else f", {self.norm}"
        return f"{self.dataset}, {self.model}{', unconstrained' * self.unconstrained}{norm}"

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
        if values.get("dataset") == "folder":
            cls = FolderConfig
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        _checks.require(
            not unknown,
            cls,
            "every field must be known",
            "Use the version of orthonet that wrote the checkpoint",
            unknown=unknown,
        )
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

    Raises:
        ValueError: A value out of range.
    """

    dataset: str = option(choices=("folder",))
    image_size: int = 224
    min_scale: float = 0.25
    workers: int = option(4, trains=False)
    evaluated: int = option(1000, trains=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.positive_int(self, image_size=self.image_size)
        _checks.in_range(self, 1e-3, 1.0, min_scale=self.min_scale)
        _checks.non_negative_int(self, workers=self.workers)


@dataclasses.dataclass(frozen=True)
class CertifyConfig:
    """What `orthonet certify package.module:function` certifies, and how it is attacked.

    Attributes:
        source: The function that makes the model, `package.module:function`, or the file of a
            model that was saved whole.
        trusted: Whether source is such a file, of orthonet convert or `torch.save(model)`. To read
            it can run any code: trust who wrote it.
        checkpoint: File with the weights of the model, .pt or .safetensors.
        data: Images to certify and attack, digits, mnist5k, fashion, mnist, or a folder, of
            pictures CLASS/*, val/CLASS/* or test/CLASS/*, or of the files of CIFAR-10 or CIFAR-100.
        input_shape: Shape of one sample, to which the pictures of a folder are resized. Without
            data the model is certified for this shape alone.
        norm: "l2" or "linf": the norm of all radii, of the certificate and of the attacks.
        radii: Radii at which accuracy is certified and attacked.
        attack_steps: Gradient steps of an attack.
        local: Images, evenly spaced, whose radii are enlarged by bounds in balls around them.
        evaluated: Images that are certified and attacked, evenly spaced, 0 for all.
        seed: Seed of the attacks.
        device: Device of the run, such as cpu or cuda.

    Raises:
        ValueError: A value out of range.
    """

    source: str
    trusted: bool = False
    checkpoint: str = ""
    data: str = ""
    input_shape: tuple[int, ...] = ()
    norm: str = option("l2", choices=tuple(_SEPARATION))
    radii: tuple[float, ...] = RADII
    attack_steps: int = 40
    local: int = 0
    evaluated: int = 1000
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_choices(self)
        _checks.positive_int(self, attack_steps=self.attack_steps)
        _check_local(self)
        _checks.require(
            bool(self.data) or not self.local,
            self,
            "local needs images, around which the balls lie",
            "Name them with --data, or leave local out",
            local=self.local,
        )
        _checks.non_negative_int(self, seed=self.seed, evaluated=self.evaluated)
        for size in self.input_shape:
            _checks.positive_int(self, input_shape=size)
        for radius in self.radii:
            _checks.in_range(self, 0.0, 1e3, radii=radius)
        object.__setattr__(self, "input_shape", tuple(self.input_shape))
        object.__setattr__(self, "radii", tuple(sorted(self.radii)))

    @property
    def title(self) -> str:
        """The data and the model in a few words."""
        return f"{self.data or 'no data'}, {self.source}"

    @property
    def exports(self) -> bool:
        """False: the certificate is that of the model as it is."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain Python values."""
        return dataclasses.asdict(self)
