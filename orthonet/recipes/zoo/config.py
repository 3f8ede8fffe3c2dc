"""What a comparison of methods runs."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from typing import Any

from orthonet import _checks
from orthonet.recipes.data.sets import IMAGE_SETS
from orthonet.recipes.images.config import RADII, TrainConfig
from orthonet.recipes.running.options import check_choices, option
from orthonet.recipes.zoo.networks import method_names

__all__ = ["LEARNING_RATES", "ZooConfig", "run_config", "zoo"]

_DATASETS = ("digits", "mnist5k", "fashion", "mnist")
# Highest learning rate of Adam where none is searched; of 0.005, 0.02 and 0.06 the best on
# validation images of the training set of digits. The others take 0.02, which was best for them.
# Nothing was tried for the peers: they take the rate of the method of ours that resembles them.
LEARNING_RATES: Mapping[str, float] = {
    "aol": 0.005,
    "liresnet": 0.005,
    "sandwich": 0.005,
    "sll": 0.06,
    "spectral": 0.005,
    "orthogonium-aol": 0.005,
    "torchlip-spectral": 0.005,
    "torch-spectral-norm": 0.005,
}
# How training images are changed at random; the default of `TrainConfig` where nothing is said.
_AUGMENTATION: Mapping[str, Mapping[str, Any]] = {
    "digits": {"shift": 0.5},
    "fashion": {"flip": True, "shift": 0.0, "rotation": 0.0, "zoom": 0.0, "shear": 0.0},
}
# The field's own measure: 2 CPU hours and more a method and seed, with its search.
_WHOLE: Mapping[str, Any] = {
    "budget": 3600.0,
    "parameters": 200_000,
    "batch_size": 128,
    "learning_rates": (0.003, 0.01, 0.03),
    "loss_radii": (0.5, 1.0),
    "radii": (36 / 255, 72 / 255, 108 / 255, 0.5, 1.0, 1.58),
}


@dataclasses.dataclass(frozen=True)
class ZooConfig:
    """What `bench zoo` runs; plain values, so that JSON can hold them.

    Attributes:
        dataset: Images to train on.
        methods: Names of the methods to compare, our convolutions and the peers' layers; all of
            them if empty. A peer that is not installed is skipped.
        seeds: Number of seeds, 0 to `seeds - 1`, of each method.
        parameters: Trained numbers of each network; the width of the convolutions is chosen so
            that their number is nearest.
        budget: CPU seconds of a training; 0 trains `epochs` epochs.
        epochs: Passes over the training images, without a budget.
        learning_rates: Highest learning rates to choose from; the one of each method if empty.
        loss_radii: Radii that the loss may ask for, to choose from.
        tuning: Share of the budget, or of the epochs, of each training that the choice takes.
        batch_size: Images in a step.
        temperature: Temperature of the offset cross-entropy.
        radii: Radii of certified accuracy and attacks.
        attack_steps: Gradient steps of an attack.
        attacked: Test images, evenly spaced, that are attacked; 0 for all. All are certified.
        autoattack: Images, evenly spaced among the attacked, that AutoAttack attacks too, which
            the package torchattacks holds; 0 for none.
        device: Device of the runs, such as cpu or cuda.
        data_root: Folder of the data.

    Raises:
        ValueError: A value out of range.
    """

    dataset: str = option("digits", choices=_DATASETS)
    methods: tuple[str, ...] = option((), choices=method_names)
    seeds: int = 3
    parameters: int = 100_000
    budget: float = 0.0
    epochs: int = 20
    learning_rates: tuple[float, ...] = ()
    loss_radii: tuple[float, ...] = (0.75,)
    tuning: float = 0.25
    batch_size: int = 64
    temperature: float = 0.2
    radii: tuple[float, ...] = RADII
    attack_steps: int = 20
    attacked: int = 0
    autoattack: int = 0
    device: str = "cpu"
    data_root: str = option("data", flags=("--data",))

    def __post_init__(self) -> None:
        check_choices(self)
        names = tuple(self.methods) or method_names()
        _checks.positive_int(
            self,
            seeds=self.seeds,
            parameters=self.parameters,
            epochs=self.epochs,
            batch_size=self.batch_size,
            attack_steps=self.attack_steps,
        )
        _checks.non_negative_int(self, attacked=self.attacked, autoattack=self.autoattack)
        _checks.in_range(self, 1e-6, 1e6, temperature=self.temperature)
        _checks.in_range(self, 0.0, 1e9, budget=self.budget)
        _checks.in_range(self, 1e-3, 1.0, tuning=self.tuning)
        for rate in self.learning_rates:
            _checks.in_range(self, 1e-6, 1e3, learning_rates=rate)
        for radius in (*self.loss_radii, *self.radii):
            _checks.in_range(self, 0.0, 1e3, radius=radius)
        _checks.require(
            bool(self.loss_radii),
            self,
            "there must be a radius that the loss asks for",
            "Name one or several",
            loss_radii=self.loss_radii,
        )
        object.__setattr__(self, "methods", names)
        object.__setattr__(self, "learning_rates", tuple(self.learning_rates))
        object.__setattr__(self, "loss_radii", tuple(self.loss_radii))
        object.__setattr__(self, "radii", tuple(sorted(self.radii)))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON gives them back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def protocol(self) -> dict[str, Any]:
        """Return the fields that runs must share to be comparable: all but how many there are."""
        fields = self.to_dict()
        free = ("methods", "seeds", "device", "data_root")
        return {name: fields[name] for name in fields if name not in free}

    def candidates(self, name: str) -> list[tuple[float, float]]:
        """Return the pairs of learning rate and loss radius that a method chooses from."""
        rates = self.learning_rates or (LEARNING_RATES.get(name, 0.02),)
        return list(itertools.product(rates, self.loss_radii))


def zoo(**changes: Any) -> ZooConfig:
    """Compare the methods of the zoo and the peers' layers in one network with equal budgets.

    With `--dataset fashion` or `mnist`, each run has 60 CPU minutes, and each method chooses its
    learning rate and its loss radius on validation images.

    Args:
        changes: Fields of [`ZooConfig`][orthonet.recipes.ZooConfig] to set differently.

    Raises:
        ValueError: A value out of range.
    """
    whole = changes.get("dataset") in ("fashion", "mnist")
    return ZooConfig(**{**(_WHOLE if whole else {}), **changes})


def run_config(
    config: ZooConfig, name: str, seed: int, width: int, lr: float, radius: float, share: float = 1
) -> TrainConfig:
    """Return the configuration of one training with a share of the budget."""
    shape = IMAGE_SETS[config.dataset].shape
    return TrainConfig(
        dataset=config.dataset,
        model="convnet_zoo",
        model_arguments={"in_shape": shape, "layer": name, "width": width},
        epochs=max(1, round(share * config.epochs)),
        cpu_seconds=share * config.budget,
        batch_size=config.batch_size,
        lr=lr,
        radius=radius,
        temperature=config.temperature,
        seed=seed,
        device=config.device,
        radii=config.radii,
        attack_steps=config.attack_steps,
        **_AUGMENTATION.get(config.dataset, {}),
    )
