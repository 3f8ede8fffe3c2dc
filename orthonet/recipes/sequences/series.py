"""Certified classification of time series, next to an LSTM that can only be attacked."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify import certify, empirical_accuracy, sequence_bound
from orthonet.constraints import orthogonal
from orthonet.layers import OrthoLinear, OrthoRNN
from orthonet.losses import OffsetCrossEntropyLoss
from orthonet.models import convnet_series
from orthonet.recipes.beyond.report import optimize
from orthonet.recipes.data.series import SeriesSplit, load_series
from orthonet.recipes.running.figures import BLUE, GREEN, ORANGE, figure_of, save_figure
from orthonet.recipes.running.files import versions, write_atomically, write_json
from orthonet.recipes.running.folder import guarded
from orthonet.recipes.running.options import check_choices, option
from orthonet.recipes.running.processes import joined, part_of
from orthonet.recipes.running.registry import Recipe, register

__all__ = ["SeriesConfig", "SeriesReport", "SeriesResult", "series_model", "train_series"]

_STYLES = {"conv": (BLUE, "Conv1d"), "rnn": (GREEN, "OrthoRNN"), "lstm": (ORANGE, "nn.LSTM")}


@dataclasses.dataclass(frozen=True)
class SeriesConfig:
    """A comparison of classifiers of time series, certified where they have a constant.

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
        seed: Seed of the weights and of the batches.
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
    seed: int = 0
    validation: bool = False
    radii: tuple[float, ...] = option((0.25, 0.5, 1.0, 2.0), trains=False)
    attack_steps: int = option(40, trains=False)
    data_root: str = option("data", flags=("--data",), trains=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "models", tuple(self.models))
        object.__setattr__(self, "radii", tuple(sorted(self.radii)))
        check_choices(self)
        _checks.positive_int(
            self,
            hidden=self.hidden,
            frame=self.frame,
            batch_size=self.batch_size,
            iterations=self.iterations,
            attack_steps=self.attack_steps,
        )
        _checks.in_range(self, 1e-6, 1e3, lr=self.lr, temperature=self.temperature)
        _checks.in_range(self, 0.0, 1e3, radius=self.radius)
        for radius in self.radii:
            _checks.in_range(self, 0.0, 1e3, radii=radius)
        _checks.non_negative_int(self, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class SeriesResult:
    """What became of one model.

    Attributes:
        model: Its name.
        parameters: Number of trained numbers.
        accuracy: Share of right test series.
        constant: Proved Lipschitz constant in l2 over the series; None without a certificate.
        certified: Radius -> certified accuracy; empty without a certificate.
        attacked: Radius -> accuracy under an attack of that radius.
        history: Rows of the training.
    """

    model: str
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
        results: One entry for each model.
        files: What was written.
    """

    config: SeriesConfig
    results: tuple[SeriesResult, ...]
    files: tuple[Path, ...] = ()

    def summary(self) -> str:
        """Return the outcome in a few lines of text."""
        config = self.config
        radii = "".join(f"{f'at {radius:g}':>16}" for radius in config.radii)
        lines = [
            f"{config.dataset}, {config.iterations} steps, seed {config.seed}; certified / under "
            "attack, l2 over the whole series",
            f"model   parameters   constant    clean{radii}",
        ]
        for each in self.results:
            constant = "-" if each.constant is None else f"{each.constant:.4f}"
            cells = "".join(
                f"{_percent(each.certified.get(radius)) + ' / ' + _percent(value):>16}"
                for radius, value in each.attacked.items()
            )
            lines.append(
                f"{each.model:<7} {each.parameters:>10}   {constant:>8}   {each.accuracy:>6.1%}"
                + cells
            )
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
            "versions": versions(),
        }


class _Frames(nn.Module):
    """Read a series in frames, and map the last state to logits."""

    def __init__(self, rnn: nn.Module, head: nn.Module, frame: int) -> None:
        super().__init__()
        self.rnn, self.head, self.frame = rnn, head, frame

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, -x.shape[-1] % self.frame))
        frames = x.unflatten(2, (-1, self.frame)).transpose(1, 2).flatten(2)
        return self.head(self.rnn(frames)[0][:, -1])


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
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

    Into the folder `out` go `metrics.json`, `certified_accuracy.png`, and for each model a folder
    with its weights (`model.pt`, a state_dict), its history and its state.

    Args:
        config: What to run.
        out: A folder, made if it is missing.
        progress: Whether to show progress bars on the standard error stream.
        resume: Whether to go on from the states in `out`, if there are any.
        tensorboard: Whether to write every row of the training for TensorBoard too.

    Returns:
        The report; None in all processes of `torchrun` but the first.

    Raises:
        ModuleNotFoundError: A package of the extra `demo`, or tensorboard, is missing.
        FileNotFoundError: The data set is not there; the message says how to get it.
        ValueError: The loss is not finite, or a state is that of another training.
        OSError: `out` cannot be written.
    """
    folder, data = Path(out), _scaled(config)
    shape, classes = tuple(data.train.x.shape[1:]), len(data.classes)
    trained = []
    with joined("cpu") as rank:
        for name in config.models:
            model = series_model(config, name, shape, classes)
            history = _fit(
                model,
                name,
                config,
                data,
                folder / name,
                progress=progress,
                resume=resume,
                tensorboard=tensorboard,
            )
            trained.append((name, model, history))
    if rank != 0:
        return None
    results, files = [], []
    for name, model, history in trained:
        results.append(_assessed(name, model, config, data, history))
        state = model.state_dict()
        files.append(
            write_atomically(
                folder / name / "model.pt", lambda file, state=state: torch.save(state, file)
            )
        )
    report = SeriesReport(config, tuple(results))
    files.append(write_json(folder / "metrics.json", report.to_dict()))
    files.append(_picture(folder / "certified_accuracy.png", report))
    return dataclasses.replace(report, files=tuple(files))


def _scaled(config: SeriesConfig) -> SeriesSplit:
    data = load_series(config.dataset, config.data_root, validation=config.validation)
    train = data.train
    inside = torch.arange(train.x.shape[2]) < train.lengths[:, None]
    scale = train.x.movedim(1, 2)[inside].std()
    train, test = (part._replace(x=part.x / scale) for part in (train, data.test))
    return SeriesSplit(train, test, data.classes)


def _fit(
    model: nn.Module,
    name: str,
    config: SeriesConfig,
    data: SeriesSplit,
    folder: Path,
    **options: Any,
) -> list[dict[str, float]]:
    steps = -(-data.train.x.shape[2] // config.frame)
    constant = {"conv": 1.0, "rnn": sequence_bound(steps).value, "lstm": 0.0}[name]
    loss_fn = OffsetCrossEntropyLoss(
        math.sqrt(2) * config.radius * constant, config.temperature if constant else 1.0
    )
    generator = torch.Generator().manual_seed(config.seed)
    number = len(data.train.y)

    def loss_of() -> Tensor:
        chosen = part_of(torch.randint(number, (config.batch_size,), generator=generator))
        return loss_fn(model(data.train.x[chosen]), data.train.y[chosen])

    return optimize(model, loss_of, generator, config, name=name, folder=folder, **options)


def _assessed(
    name: str,
    model: nn.Module,
    config: SeriesConfig,
    data: SeriesSplit,
    history: list[dict[str, float]],
) -> SeriesResult:
    parameters = sum(p.numel() for p in model.parameters())
    model = model.double().eval().requires_grad_(False)
    x, y = data.test.x.double(), data.test.y
    logits = torch.cat([model(part) for part in x.split(250)])
    constant, certified = None, {}
    if name != "lstm":
        certificate = certify(model, x[:1])
        constant = certificate.constant.value
        shares = certificate.certified_accuracy(logits, y, config.radii)
        certified = dict(zip(config.radii, shares, strict=True))
    found = empirical_accuracy(
        model,
        x,
        y,
        config.radii,
        steps=config.attack_steps,
        restarts=1,
        bounds=None,
        generator=torch.Generator().manual_seed(config.seed),
    )
    accuracy = (logits.argmax(1) == y).double().mean().item()
    attacked = dict(zip(config.radii, found, strict=True))
    return SeriesResult(name, parameters, accuracy, constant, certified, attacked, history)


def _picture(path: Path, report: SeriesReport) -> Path:
    figure = figure_of(7.2, 4.6)
    axes = figure.subplots()
    for each in report.results:
        color, label = _STYLES[each.model]
        for values, dash, kind in (
            (each.certified, "-s", "certified"),
            (each.attacked, "--o", "under PGD"),
        ):
            if values:
                points = {0.0: each.accuracy, **values}
                axes.plot(
                    list(points),
                    [100 * value for value in points.values()],
                    dash,
                    color=color,
                    lw=2,
                    ms=5,
                    label=f"{label}, {kind}",
                )
    axes.set(
        xlabel=r"$\ell_2$ radius over the whole series, in standard deviations",
        ylabel="accuracy on the test series (%)",
        ylim=(0, 102),
        title=report.config.dataset,
    )
    axes.legend(frameon=False)
    return save_figure(figure, path, axes)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


register("series", Recipe(SeriesConfig, SeriesConfig, train_series))
