"""Certified classification of time series, next to an LSTM that can only be attacked."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify import apgd_l2, certify, pgd_l2, sequence_bound
from orthonet.constraints import orthogonal
from orthonet.layers import FinalState, OrthoLinear, OrthoRNN
from orthonet.losses import OffsetCrossEntropyLoss
from orthonet.models import convnet_series
from orthonet.recipes.data.series import Series, SeriesSplit, load_series
from orthonet.recipes.running.figures import BLUE, GREEN, ORANGE, figure_of, save_figure
from orthonet.recipes.running.files import versions, write_atomically, write_json
from orthonet.recipes.running.fitting import optimize, seeded
from orthonet.recipes.running.folder import guarded
from orthonet.recipes.running.options import check_choices, option
from orthonet.recipes.running.processes import joined, part_of
from orthonet.recipes.running.registry import Recipe, register

__all__ = ["SeriesConfig", "SeriesReport", "SeriesResult", "series_model", "train_series"]

LEARNING_RATES = (0.01, 0.03)
LOSS_RADII = (0.5, 1.0, 2.0)
FRAMES = (5, 25)
_STYLES = {"conv": (BLUE, "Conv1d"), "rnn": (GREEN, "OrthoRNN"), "lstm": (ORANGE, "nn.LSTM")}


@dataclasses.dataclass(frozen=True)
class SeriesConfig:
    """Compare classifiers of time series, certified where they have a constant.

    The values are divided by the standard deviation of the training set, one number for all. Radii
    are those of l2 perturbations of the whole series after that.

    Attributes:
        dataset: Name of the data set, as [`load_series`][orthonet.recipes.load_series] takes it.
        models: Models to train; "conv" (orthogonal convolutions), "rnn" (`OrthoRNN` that reads
            frames), "lstm" (`nn.LSTM` that reads frames, without a certificate).
        hidden: Channels of the convolutions, and features of the states.
        frame: Time steps that recurrent models read at once.
        batch_size: Series in a step.
        iterations: Optimizer steps.
        lr: Highest learning rate.
        radius: Radius that the loss asks for.
        temperature: Temperature of the offset cross-entropy.
        seeds: Number of seeds of each model, from `seed` on.
        seed: First seed of the weights and of the batches.
        tune: Whether to choose `lr`, `radius` and `frame` for each model on validation series.
        validation: Whether to hold validation series out of the training series, and to take them
            in place of the test series.
        radii: l2 radii at which accuracy is certified and attacked.
        attack_steps: Gradient steps of an attack.
        data_root: Folder of the archive; the package aeon is looked in too.

    Raises:
        ValueError: A value out of range.
    """

    dataset: str = "JapaneseVowels"
    models: tuple[str, ...] = option(tuple(_STYLES), choices=tuple(_STYLES), trains=False)
    hidden: int = 64
    frame: int = 5
    batch_size: int = 64
    iterations: int = 400
    lr: float = 0.01
    radius: float = 1.0
    temperature: float = 0.25
    seeds: int = option(1, trains=False)
    seed: int = 0
    tune: bool = option(False, trains=False)
    validation: bool = False
    radii: tuple[float, ...] = option((0.25, 0.5, 1.0, 2.0), trains=False)
    attack_steps: int = option(40, trains=False)
    data_root: str = option("data", flags=("--data",), trains=False)

    def __post_init__(self) -> None:
        check_choices(self)
        object.__setattr__(self, "models", tuple(self.models))
        object.__setattr__(self, "radii", tuple(sorted(self.radii)))
        _checks.positive_int(
            self,
            hidden=self.hidden,
            frame=self.frame,
            batch_size=self.batch_size,
            iterations=self.iterations,
            seeds=self.seeds,
            attack_steps=self.attack_steps,
        )
        _checks.in_range(self, 1e-6, 1e3, lr=self.lr, temperature=self.temperature)
        _checks.in_range(self, 0.0, 1e3, radius=self.radius)
        for radius in self.radii:
            _checks.in_range(self, 0.0, 1e3, radii=radius)
        _checks.non_negative_int(self, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class SeriesResult:
    """What became of one model with one seed.

    Attributes:
        model: Its name.
        seed: Its seed.
        settings: Learning rate, radius of the loss and frame that it was trained with.
        parameters: Number of trained numbers.
        accuracy: Share of right test series.
        constant: Proved Lipschitz constant in l2 over the series; None without a certificate.
        certified: Radius -> certified accuracy; empty without a certificate.
        attacked: Radius -> accuracy under the attacks of that radius.
        history: Rows of the training.
    """

    model: str
    seed: int
    settings: Mapping[str, float]
    parameters: int
    accuracy: float
    constant: float | None
    certified: dict[float, float]
    attacked: dict[float, float]
    history: list[dict[str, float]]


@dataclasses.dataclass(frozen=True)
class SeriesReport:
    """What came out of a comparison on time series.

    Attributes:
        config: What was run.
        results: One entry for each model and seed.
        tuning: What each candidate of a model reached on the validation series; empty without.
        files: What was written.
    """

    config: SeriesConfig
    results: tuple[SeriesResult, ...]
    tuning: Mapping[str, list[dict[str, float]]] = dataclasses.field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def of(self, model: str) -> list[SeriesResult]:
        """Return the results of a model, one for each seed."""
        return [each for each in self.results if each.model == model]

    def summary(self) -> str:
        """Return the outcome in a few lines of text."""
        config = self.config
        first = config.seed
        seeds = f"seed {first}" + (f" to {first + config.seeds - 1}" if config.seeds > 1 else "")
        spread = ", mean and standard deviation in %" if config.seeds > 1 else " in %"
        width = 25 if config.seeds > 1 else 15
        radii = "".join(f"{f'at {radius:g}':>{width}}" for radius in config.radii)
        lines = [
            f"{config.dataset}, {config.iterations} steps, {seeds}; certified / under attack"
            f"{spread}, l2 over the whole series",
            f"model      lr  radius  frame  parameters  constant{'clean':>{width - 10}}{radii}",
        ]
        for name in dict.fromkeys(each.model for each in self.results):
            runs = self.of(name)
            one, settings = runs[0], runs[0].settings
            constant = "-" if one.constant is None else f"{max(r.constant or 0 for r in runs):.4f}"
            radius = "-" if one.constant is None else f"{settings['radius']:g}"
            frame = "-" if name == "conv" else f"{settings['frame']:g}"
            line = f"{name:<7}{settings['lr']:>6g}{radius:>8}{frame:>7}{one.parameters:>12}"
            line += f"{constant:>10}{_spread([r.accuracy for r in runs]):>{width - 10}}"
            for radius in config.radii:
                proved = [r.certified[radius] for r in runs if r.certified]
                found = [r.attacked[radius] for r in runs]
                line += f"{_spread(proved) + ' / ' + _spread(found):>{width}}"
            lines.append(line)
        if self.files:
            lines += ["written:", *(f"  {path}" for path in self.files)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the file names, as JSON can hold it."""
        results = []
        for each in self.results:
            values = dataclasses.asdict(each)
            for name in ("certified", "attacked"):
                values[name] = [[radius, value] for radius, value in values[name].items()]
            results.append(values)
        return {
            "config": dataclasses.asdict(self.config),
            "results": results,
            "tuning": dict(self.tuning),
            "versions": versions(),
        }


class _Frames(nn.Module):
    """Read a series in frames, and map the last state to logits."""

    def __init__(self, rnn: nn.Module, head: nn.Module, frame: int) -> None:
        super().__init__()
        self.rnn, self.head, self.frame = FinalState(rnn), head, frame

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, -x.shape[-1] % self.frame))
        frames = x.unflatten(2, (-1, self.frame)).transpose(1, 2).flatten(2)
        return self.head(self.rnn(frames))


def series_model(config: SeriesConfig, name: str, shape: Sequence[int], classes: int) -> nn.Module:
    """Build an untrained model; torch's global generators are left as they were.

    Args:
        config: Sizes and seed.
        name: "conv", "rnn" or "lstm".
        shape: (channels, length) of a series.
        classes: Number of classes.
    """
    channels, length = shape
    hidden, inputs = config.hidden, channels * config.frame
    with seeded(config.seed):
        if name == "conv":
            return convnet_series((channels, length), classes, width=hidden)
        if name == "lstm":
            lstm = nn.LSTM(inputs, hidden, batch_first=True)
            return _Frames(lstm, nn.Linear(hidden, classes), config.frame)
        rnn = OrthoRNN(inputs, hidden, nonlinearity="abs", batch_first=True)
        orthogonal(rnn, "weight_ih_l0")
        return _Frames(rnn, OrthoLinear(hidden, classes), config.frame)


@guarded
def train_series(
    config: SeriesConfig,
    out: str | os.PathLike[str],
    *,
    progress: bool = False,
    resume: bool = False,
    tensorboard: bool = False,
) -> SeriesReport | None:
    """Train every model of `config` on the same series, certify and attack it.

    With `tune`, each model is first trained with the learning rates 0.01 and 0.03, the radii 0.5, 1
    and 2 of the loss (not the LSTM) and frames of 5 and 25 steps (not the convolutions), on what
    the validation series leave of the training series. Certified models are chosen by the mean
    certified radius, cut off at the largest of `radii`; the LSTM is chosen by accuracy. Ties are
    broken by the cross-entropy. The test series take no part in the choice.

    Into the folder `out` go `metrics.json`, `certified_accuracy.png`, and for each model and seed a
    folder with its weights (`model.pt`, a state_dict), its history and its state.

    The arguments are those of [`train`][orthonet.recipes.train], and so are the errors that are not
    named here.

    Returns:
        The report; None in all processes of `torchrun` but the first.

    Raises:
        ModuleNotFoundError: A package of the extra `demo`, or tensorboard, is missing.
        FileNotFoundError: The data set is not there; the message says how to get it.
        ValueError: The loss is not finite, or a state is that of another training.
    """
    folder, data = Path(out), _scaled(config)
    options = {"progress": progress, "resume": resume, "tensorboard": tensorboard}
    trained, tuning = [], {}
    with joined("cpu") as rank:
        for name in config.models:
            chosen = config
            if config.tune:
                chosen, tuning[name] = _tuned(name, config, folder / name / "tuning", options)
            for seed in range(config.seed, config.seed + config.seeds):
                one = dataclasses.replace(chosen, seed=seed)
                model, history = _fit(name, one, data, folder / name / f"seed-{seed}", options)
                trained.append((name, model, one, history))
    if rank != 0:
        return None
    results, files = [], []
    for name, model, one, history in trained:
        results.append(_assessed(name, model, one, data.test, history))
        state = model.state_dict()
        files.append(
            write_atomically(
                folder / name / f"seed-{one.seed}" / "model.pt",
                lambda file, state=state: torch.save(state, file),
            )
        )
    report = SeriesReport(config, tuple(results), tuning)
    files.append(write_json(folder / "metrics.json", report.to_dict()))
    files.append(_picture(folder / "certified_accuracy.png", report))
    return dataclasses.replace(report, files=tuple(files))


def _tuned(
    name: str, config: SeriesConfig, folder: Path, options: Mapping[str, bool]
) -> tuple[SeriesConfig, list[dict[str, float]]]:
    """The configuration of the best candidate on the validation series, and all candidates."""
    held = dataclasses.replace(config, tune=False, validation=True)
    data, found = _scaled(held), []
    radii = (config.radius,) if name == "lstm" else LOSS_RADII
    frames = (config.frame,) if name == "conv" else FRAMES
    for lr, radius, frame in itertools.product(LEARNING_RATES, radii, frames):
        one = dataclasses.replace(held, lr=lr, radius=radius, frame=frame)
        place = folder / f"lr-{lr:g}-radius-{radius:g}-frame-{frame}"
        model, _ = _fit(name, one, data, place, options)
        found.append(
            {"lr": lr, "radius": radius, "frame": frame, **_judged(name, model, one, data)}
        )
    # The first of equal ones: the smallest learning rate, radius and frame.
    best = max(found, key=lambda row: (row["score"], -row["loss"]))
    settings = {key: type(getattr(config, key))(best[key]) for key in ("lr", "radius", "frame")}
    return dataclasses.replace(config, **settings), found


@torch.no_grad()
def _judged(
    name: str, model: nn.Module, config: SeriesConfig, data: SeriesSplit
) -> dict[str, float]:
    """How good a model is on validation series."""
    model = model.double().eval()
    x, y = data.test.x.double(), data.test.y
    logits = model(x)
    loss = F.cross_entropy(logits, y).item()
    if name == "lstm":
        return {"score": (logits.argmax(1) == y).double().mean().item(), "loss": loss}
    radii = certify(model, x[:1], lower=False).radius(logits, labels=y).clamp(max=max(config.radii))
    return {"score": radii.mean().item(), "loss": loss}


def _scaled(config: SeriesConfig) -> SeriesSplit:
    data = load_series(config.dataset, config.data_root, validation=config.validation)
    train = data.train
    inside = torch.arange(train.x.shape[2]) < train.lengths[:, None]
    scale = train.x.movedim(1, 2)[inside].std()
    train, test = (part._replace(x=part.x / scale) for part in (train, data.test))
    return SeriesSplit(train, test, data.classes)


def _fit(
    name: str, config: SeriesConfig, data: SeriesSplit, folder: Path, options: Mapping[str, bool]
) -> tuple[nn.Module, list[dict[str, float]]]:
    model = series_model(config, name, data.train.x.shape[1:], len(data.classes))
    steps = -(-data.train.x.shape[2] // config.frame)
    constant = {"conv": 1.0, "rnn": sequence_bound(steps, final=True).value, "lstm": 0.0}[name]
    loss_fn = OffsetCrossEntropyLoss(
        math.sqrt(2) * config.radius * constant, config.temperature if constant else 1.0
    )
    generator = torch.Generator().manual_seed(config.seed)
    number = len(data.train.y)

    def loss_of() -> Tensor:
        chosen = part_of(torch.randint(number, (config.batch_size,), generator=generator))
        return loss_fn(model(data.train.x[chosen]), data.train.y[chosen])

    history = optimize(model, loss_of, generator, config, name=name, folder=folder, **options)
    return model, history


def _assessed(
    name: str, model: nn.Module, config: SeriesConfig, test: Series, history: list[dict[str, float]]
) -> SeriesResult:
    parameters = sum(p.numel() for p in model.parameters())
    model = model.double().eval().requires_grad_(False)
    x, y = test.x.double(), test.y
    logits = torch.cat([model(part) for part in x.split(250)])
    constant, certified = None, {}
    if name != "lstm":
        certificate = certify(model, x[:1], lower=False)
        constant = certificate.constant.value
        shares = certificate.certified_accuracy(logits, y, config.radii)
        certified = dict(zip(config.radii, shares, strict=True))
    settings = {"lr": config.lr, "radius": config.radius, "frame": config.frame}
    accuracy = (logits.argmax(1) == y).double().mean().item()
    attacked = _attacked(model, x, y, logits.argmax(1) == y, config)
    return SeriesResult(
        name, config.seed, settings, parameters, accuracy, constant, certified, attacked, history
    )


def _attacked(
    model: nn.Module, x: Tensor, y: Tensor, stands: Tensor, config: SeriesConfig
) -> dict[float, float]:
    """The share of series that no attack turns, PGD on the margin first, then two of Auto-PGD."""
    generator = torch.Generator().manual_seed(config.seed)
    options: dict[str, Any] = {
        "steps": config.attack_steps,
        "restarts": 1,
        "bounds": None,
        "generator": generator,
    }
    stands, found = stands.clone(), {}
    for radius in config.radii:
        for attack in (pgd_l2, functools.partial(apgd_l2, loss="ce"), apgd_l2):
            for part in stands.nonzero()[:, 0].split(250) if radius > 0 and stands.any() else ():
                points = attack(model, x[part], y[part], radius, **options)
                stands[part] = model(points).argmax(1) == y[part]
        found[radius] = int(stands.sum()) / len(x)
    return found


def _picture(path: Path, report: SeriesReport) -> Path:
    figure = figure_of(7.2, 4.6)
    axes = figure.subplots()
    radii = [0.0, *(radius for radius in report.config.radii if radius > 0)]
    for name in dict.fromkeys(each.model for each in report.results):
        color, label = _STYLES[name]
        runs = report.of(name)
        for which, dash, kind in (
            ("certified", "-s", "certified"),
            ("attacked", "--o", "attacked"),
        ):
            curves = [{**getattr(run, which), 0.0: run.accuracy} for run in runs]
            if not getattr(runs[0], which):
                continue
            values = [[100 * curve[radius] for curve in curves] for radius in radii]
            means = [statistics.fmean(row) for row in values]
            axes.plot(radii, means, dash, color=color, lw=2, ms=5, label=f"{label}, {kind}")
            low, high = ([pick(row) for row in values] for pick in (min, max))
            axes.fill_between(radii, low, high, color=color, alpha=0.15, lw=0)
    axes.set(
        xlabel=r"$\ell_2$ radius over the whole series, in standard deviations",
        ylabel="accuracy on the test series (%)",
        ylim=(0, 102),
        title=f"{report.config.dataset}: mean and range of {report.config.seeds} seeds",
    )
    axes.legend(frameon=False)
    return save_figure(figure, path, axes)


def _spread(values: Sequence[float]) -> str:
    """The mean in %, and the standard deviation where there are several."""
    if not values:
        return "-"
    mean = f"{100 * statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ±{100 * statistics.stdev(values):.1f}"


register("series", Recipe(SeriesConfig, SeriesConfig, train_series))
