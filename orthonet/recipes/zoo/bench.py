"""The comparison of methods: one network, one budget, one certificate, a layer swapped."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from orthonet import _checks
from orthonet.layers import available
from orthonet.models import convnet_zoo
from orthonet.recipes.data.digits import Images, Split, require_package, spaced
from orthonet.recipes.data.sets import IMAGE_SETS, load
from orthonet.recipes.images.config import RADII, TrainConfig
from orthonet.recipes.images.evaluate import evaluate
from orthonet.recipes.images.train import fit
from orthonet.recipes.running.files import versions, write_json
from orthonet.recipes.running.folder import guarded
from orthonet.recipes.running.options import check_choices, option
from orthonet.recipes.running.processes import launched
from orthonet.recipes.running.reading import Wanted, read_json
from orthonet.recipes.running.registry import Recipe, register
from orthonet.recipes.zoo.cost import StepCost, step_cost
from orthonet.recipes.zoo.figures import zoo_figure
from orthonet.recipes.zoo.report import ZooReport

__all__ = [
    "BUDGETS",
    "LEARNING_RATES",
    "ZooConfig",
    "bench_zoo",
    "planned_run",
    "run_method",
    "width_for",
]

_WANTED = Wanted("bench_zoo", "the runs of a comparison", "Remove it or choose another folder")
BUDGETS = ("parameters", "cpu")
_DATASETS = ("digits", "mnist5k", "fashion", "mnist")
# Highest learning rate of Adam; of 0.005, 0.02 and 0.06 the best on validation images of the
# training set of digits. The others take the default, which was best for them.
LEARNING_RATES: Mapping[str, float] = {
    "aol": 0.005,
    "liresnet": 0.005,
    "sandwich": 0.005,
    "sll": 0.06,
    "spectral": 0.005,
}


@dataclasses.dataclass(frozen=True)
class ZooConfig:
    r"""What `bench zoo` runs; plain values, so that JSON can hold them.

    Attributes:
        dataset: Images to train on.
        methods: Names of the convolutions to compare, all of them if empty;
            `orthonet.layers.available("conv")` lists them.
        seeds: Number of seeds, 0 to `seeds - 1`, of each method.
        budget: What is equal for all methods; "parameters" (the width of the convolutions is chosen
            so that their number is nearest to `parameters`) or "cpu" (the same width, and as many
            epochs as fit into `cpu_seconds` of process time, at most 4 `epochs`).
        parameters: Trained numbers of each network, with the budget "parameters".
        cpu_seconds: Process time of a training, with the budget "cpu".
        width: Channels of the convolutions, with the budget "cpu".
        epochs: Passes over the training images, with the budget "parameters".
        batch_size: Images in a step.
        lr: Highest learning rate; 0 takes the one of each method.
        radius: Radius that the loss asks for.
        temperature: Temperature of the offset cross-entropy.
        radii: Radii of certified accuracy and attacks.
        attack_steps: Gradient steps of an attack.
        device: Device of the runs, such as cpu or cuda.
        data_root: Folder of the data.
        evaluated: Test images, evenly spaced, that are certified and attacked; 0 for all of them.

    Raises:
        ValueError: A value out of range.
    """

    dataset: str = option("digits", choices=_DATASETS)
    methods: tuple[str, ...] = option((), choices=lambda: available("conv"))
    seeds: int = 3
    budget: str = option("parameters", choices=BUDGETS)
    parameters: int = 100_000
    cpu_seconds: float = 30.0
    width: int = 32
    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.0
    radius: float = 0.75
    temperature: float = 0.2
    radii: tuple[float, ...] = RADII
    attack_steps: int = 20
    device: str = "cpu"
    data_root: str = option("data", flags=("--data",))
    evaluated: int = 0

    def __post_init__(self) -> None:
        names = tuple(self.methods) or tuple(available("conv"))
        check_choices(self)
        _checks.positive_int(
            self,
            seeds=self.seeds,
            parameters=self.parameters,
            width=self.width,
            epochs=self.epochs,
            batch_size=self.batch_size,
            attack_steps=self.attack_steps,
        )
        _checks.non_negative_int(self, evaluated=self.evaluated)
        _checks.in_range(self, 0.0, 1e3, lr=self.lr, radius=self.radius)
        _checks.in_range(self, 1e-6, 1e6, temperature=self.temperature)
        _checks.in_range(self, 1e-3, 1e9, cpu_seconds=self.cpu_seconds)
        object.__setattr__(self, "methods", names)
        object.__setattr__(self, "radii", tuple(sorted(self.radii)))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON gives them back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def protocol(self) -> dict[str, Any]:
        """The fields that runs must share to be comparable: all but how many there are."""
        fields = self.to_dict()
        free = ("methods", "seeds", "device", "data_root")
        return {name: fields[name] for name in fields if name not in free}


@guarded
def bench_zoo(
    config: ZooConfig, out: str | os.PathLike[str], *, progress: bool = False
) -> ZooReport:
    """Train, certify and attack the same network with each method, and compare.

    Into the folder `out` go `zoo.json`, rewritten after each run, and `zoo.png`. Runs that
    `zoo.json` already holds are not repeated, so that an interrupted comparison goes on where it
    was, and more seeds or methods can be added later.

    Args:
        config: What to run.
        out: A folder, made if it is missing.
        progress: Whether to write a line for each run to the standard error stream.

    Returns:
        The report.

    Raises:
        ModuleNotFoundError: A package of the extra `demo` is missing.
        ValueError: `zoo.json` holds runs under another protocol.
        OSError: `out` cannot be written.
    """
    _checks.require(
        launched() == 1,
        "orthonet bench",
        "a comparison must run in one process",
        "Start it without torchrun",
        subject="zoo",
    )
    folder = Path(out)
    file, data = folder / "zoo.json", load(config.dataset, config.data_root)
    runs = _earlier(file, config)
    wanted = [(name, seed) for seed in range(config.seeds) for name in config.methods]
    done = {(run["method"], run["seed"]) for run in runs}
    missing = [pair for pair in wanted if pair not in done]
    report = ZooReport(config.to_dict(), tuple(runs))
    with _Lines(progress, len(missing)) as tell:
        for name, seed in missing:
            run = run_method(config, name, seed, data)
            runs.append(run)
            report = ZooReport(config.to_dict(), tuple(runs))
            write_json(file, {**report.to_dict(), "protocol": config.protocol()})
            tell(report.line(run))
    picture = zoo_figure(folder / "zoo.png", report)
    return dataclasses.replace(report, files=(file, picture))


def run_method(config: ZooConfig, name: str, seed: int, data: Split) -> dict[str, Any]:
    """One training, its certificate and its attack, as plain values."""
    train_config, cost = planned_run(config, name, seed, data.train)
    start = time.process_time()
    try:
        model, history = fit(train_config, data)
    except ValueError as error:  # the loss is not finite: a result, and not a good one
        return _failed(name, seed, train_config, str(error))
    seconds = time.process_time() - start
    test = spaced(data.test, config.evaluated)
    found = evaluate(
        model, test, radii=config.radii, attack_steps=config.attack_steps, seed=seed, export=False
    )
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    return {
        "method": name,
        "seed": seed,
        "width": train_config.model_arguments["width"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "lr": train_config.lr,
        "epochs": train_config.epochs,
        "accuracy": found.accuracy,
        "certified": [found.certified[r] for r in config.radii],
        "attacked": [found.attacked[r] for r in config.radii if r > 0],
        "constant": found.constant,
        "average_radius": sum(found.radii) / len(found.radii),
        "attempts": found.attempts,
        "broken": found.broken,
        "finite": finite and math.isfinite(history[-1]["loss"]),
        "seconds_per_step": cost.seconds,
        "saved_bytes": cost.saved_bytes,
        "training_cpu_seconds": round(seconds, 3),
        "versions": versions(),
    }


def _failed(name: str, seed: int, config: TrainConfig, reason: str) -> dict[str, Any]:
    return {
        "method": name,
        "seed": seed,
        "width": config.model_arguments["width"],
        "lr": config.lr,
        "epochs": config.epochs,
        "finite": False,
        "reason": reason,
        "versions": versions(),
    }


def planned_run(
    config: ZooConfig, name: str, seed: int, images: Images
) -> tuple[TrainConfig, StepCost]:
    """The training of one method within the budget, and what a step of it costs."""
    width, epochs = config.width, config.epochs
    if config.budget == "parameters":
        width = width_for(name, config.parameters, IMAGE_SETS[config.dataset].shape)

    def planned(epochs: int) -> TrainConfig:
        return TrainConfig(
            dataset=config.dataset,
            model="convnet_zoo",
            model_arguments={
                "in_shape": IMAGE_SETS[config.dataset].shape,
                "layer": name,
                "width": width,
            },
            epochs=epochs,
            batch_size=config.batch_size,
            lr=config.lr or LEARNING_RATES.get(name, 0.02),
            radius=config.radius,
            temperature=config.temperature,
            shift=0.5 if config.dataset == "digits" else 1.0,
            seed=seed,
            device=config.device,
            radii=config.radii,
            attack_steps=config.attack_steps,
        )

    cost = step_cost(planned(epochs), images)
    if config.budget == "cpu":
        steps = math.ceil(len(images.y) / config.batch_size)
        epochs = round(config.cpu_seconds / (steps * cost.seconds))
        epochs = max(1, min(epochs, 4 * config.epochs))
    return planned(epochs), cost


def width_for(name: str, parameters: int, shape: tuple[int, ...]) -> int:
    """The width, a multiple of 4, whose network has the number nearest to `parameters`."""

    def size(width: int) -> int:
        with torch.random.fork_rng(devices=[]):
            model = convnet_zoo(shape, layer=name, width=width)
        return sum(p.numel() for p in model.parameters())

    low, high = 4, 8
    while high < 1024 and size(high) < parameters:
        low, high = high, 2 * high
    while high - low > 4:
        middle = 4 * round((low + high) / 8)
        low, high = (middle, high) if size(middle) < parameters else (low, middle)
    return min((low, high), key=lambda width: abs(size(width) - parameters))


def _earlier(file: Path, config: ZooConfig) -> list[dict[str, Any]]:
    """The runs that the file holds already."""
    if not file.exists():
        return []
    content = read_json(file, _WANTED)
    good = isinstance(content, dict) and isinstance(content.get("runs"), list)
    if not good or not isinstance(content.get("protocol"), dict):
        _WANTED.fail(file, "it holds no protocol and runs")
    known, wanted = {**ZooConfig().protocol(), **content["protocol"]}, config.protocol()
    different = [k for k in wanted if known.get(k) != wanted[k]]
    _checks.require(
        not different,
        "bench_zoo",
        "the runs of one file must share their protocol",
        "Choose another folder",
        file=str(file),
        **{k: f"{wanted[k]!r} (there {known.get(k)!r})" for k in different},
    )
    return content["runs"]


class _Lines:
    """Lines on the standard error stream, by tqdm so that bars survive; or none."""

    def __init__(self, progress: bool, total: int) -> None:
        self.bar = (
            require_package("tqdm", "tqdm").tqdm(total=total, unit="run", desc="zoo")
            if progress
            else None
        )

    def __enter__(self):
        return self._tell

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def _tell(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=self.bar.fp)
            self.bar.update()


register(
    "zoo",
    Recipe(ZooConfig, ZooConfig, bench_zoo, folder=lambda c: f"zoo-{c.dataset}-{c.budget}"),
    command="bench",
)
