"""A whole run: data, training, certificate, attack, files."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from orthonet import _checks
from orthonet.convert import to_plain
from orthonet.recipes.data.cifar import load_cifar10
from orthonet.recipes.data.digits import Split, load, require_package
from orthonet.recipes.data.folder import ImageFolders
from orthonet.recipes.images.config import FolderConfig, TrainConfig
from orthonet.recipes.images.evaluate import Evaluation, evaluate
from orthonet.recipes.images.page import CertificateReport, certificate_alone, write_page
from orthonet.recipes.images.spectra import layer_spectra
from orthonet.recipes.images.train import fit
from orthonet.recipes.running.checkpoint import load_checkpoint, save_checkpoint
from orthonet.recipes.running.figures import radius_figure, spectra_figure, training_figure
from orthonet.recipes.running.files import versions, write_json
from orthonet.recipes.running.log import writer_class
from orthonet.recipes.running.processes import joined

__all__ = ["Report", "certify_checkpoint", "train"]


@dataclasses.dataclass(frozen=True)
class Report:
    """What came out of a run.

    Attributes:
        config: What was run.
        evaluation: Accuracy, certificate and attack on the test images.
        history: A row for every epoch; empty where nothing was trained.
        seconds: Duration of every part.
        files: What was written.
    """

    config: TrainConfig
    evaluation: Evaluation
    history: list[dict[str, float]]
    seconds: dict[str, float]
    files: tuple[Path, ...] = ()

    def summary(self) -> str:
        """The outcome in a few lines of text."""
        lines = [
            f"{self.config.dataset}, {self.config.model}, seed {self.config.seed}: "
            + ", ".join(f"{part} {value:.1f} s" for part, value in self.seconds.items()),
            *self.evaluation.lines(),
        ]
        if self.files:
            lines += ["written:", *(f"  {path}" for path in self.files)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the file names, as JSON can hold it."""
        return {
            "config": self.config.to_dict(),
            "evaluation": self.evaluation.to_dict(),
            "history": self.history,
            "seconds": {part: round(value, 3) for part, value in self.seconds.items()},
            "versions": versions(),
        }


def train(
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    progress: bool = False,
    resume: bool = False,
    tensorboard: bool = False,
) -> Report | None:
    """Train, certify and attack a model, and write what came out.

    Into the folder `out` go `checkpoint.pt` (right after training), `metrics.json` and the pictures
    `training.png`, `certified_accuracy.png` and `singular_values.png`. While it trains, `state.pt`
    and `log.csv` are replaced after every epoch, each in one step, so that a process that is killed
    loses one epoch at most.

    Started by `torchrun`, the processes train together, see [`fit`][orthonet.recipes.fit]; the
    first one does the rest.

    Args:
        config: What to run: `digits()`, `mnist5k()`, `cifar10_xs()` or `folder()`, changed as you
            like.
        out: A folder, made if it is missing.
        progress: Whether to show progress bars on the standard error stream.
        resume: Whether to go on from `state.pt` in `out`, if there is one.
        tensorboard: Whether to write every row of the training into `tensorboard` in `out` too.

    Returns:
        The report; None in all processes of `torchrun` but the first.

    Raises:
        ModuleNotFoundError: A package of the extras `demo`, `vision` (for folders) or `tensorboard`
            is missing.
        ValueError: A value of `config` that training cannot work with.
        OSError: `out` cannot be written.
    """
    require_package("matplotlib", "matplotlib")  # better now than after the training
    if tensorboard:
        writer_class()
    folder = Path(out)
    source: Split | ImageFolders
    if isinstance(config, FolderConfig):
        source = ImageFolders(config)
        config = source.completed()
    else:
        source = _data(config)
    start = time.perf_counter()
    with joined(config.device) as rank:
        progress = progress and rank == 0
        model, history = fit(
            config, source, progress=progress, folder=folder, resume=resume, tensorboard=tensorboard
        )
    if rank != 0:
        return None
    data = source if isinstance(source, Split) else source.evaluated()
    seconds = {"training": time.perf_counter() - start}
    checkpoint = save_checkpoint(folder / "checkpoint.pt", model, config)
    report = _certified(model, config, data, history, seconds, progress)
    return _written(report, model, data, folder, (checkpoint,))


def certify_checkpoint(
    checkpoint: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    input_shape: Sequence[int] | None = None,
    progress: bool = False,
    **changes: Any,
) -> Report | CertificateReport:
    """Certify and attack a trained model again, on its test images.

    Args:
        checkpoint: A file that [`train`][orthonet.recipes.train] wrote.
        out: A folder for `metrics.json` and the pictures; nothing is written without it.
        report: A file for the report, one HTML page, see
            [`report_html`][orthonet.certify.report_html].
        input_shape: Shape of one sample. With it the model is certified for inputs of this shape
            without any data: no accuracies, no attacks, no `out`.
        progress: Whether to show progress bars on the standard error stream.
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
    title = f"{config.dataset}, {config.model}: {Path(checkpoint).name}"
    if input_shape is not None:
        _checks.require(out is None, "certify_checkpoint", "out needs the data of the recipe",
                        "Leave out input_shape", input_shape=input_shape)  # fmt: skip
        return certificate_alone(model, input_shape, report, title)
    data = _data(config)
    result = _certified(model.to(config.device), config, data, [], {}, progress)
    if out is not None:
        result = _written(result, model, data, Path(out), ())
    if report is not None:
        page = write_page(Path(report), model, data.test.x[:64], result.evaluation, title)
        result = dataclasses.replace(result, files=(*result.files, page))
    return result


def _data(config: TrainConfig) -> Split:
    if config.dataset == "cifar10":
        return load_cifar10(config.data_root)
    if isinstance(config, FolderConfig):
        return ImageFolders(config).evaluated()
    return load(config.dataset)


def _certified(
    model: nn.Module,
    config: TrainConfig,
    data: Split,
    history: list[dict[str, float]],
    seconds: Mapping[str, float],
    progress: bool,
) -> Report:
    start = time.perf_counter()
    evaluation = evaluate(
        model, data.test, radii=config.radii, attack_steps=config.attack_steps,
        seed=config.seed, export=config.exports, progress=progress,
    )  # fmt: skip
    spent = {**seconds, "certificate and attack": time.perf_counter() - start}
    return Report(config, evaluation, history, spent)


def _written(
    report: Report, model: nn.Module, data: Split, folder: Path, files: tuple[Path, ...]
) -> Report:
    start = time.perf_counter()
    evaluation, config = report.evaluation, report.config
    title = f"{config.dataset}, {config.model}"
    pictures = [
        radius_figure(
            folder / "certified_accuracy.png",
            evaluation.radii,
            evaluation.attacked,
            evaluation.certified,
            f"{title}: certified accuracy (constant {evaluation.constant:.6f})",
        ),
    ]
    if config.exports:
        pictures.append(
            spectra_figure(
                folder / "singular_values.png",
                layer_spectra(to_plain(model), data.test.x[:1].to(config.device)),
                f"{title}: singular values of every layer on its input\n"
                "(zero padding can only shrink)",
            )
        )
    if report.history:
        pictures.insert(0, training_figure(folder / "training.png", report.history, title))
    seconds = {**report.seconds, "figures": time.perf_counter() - start}
    report = dataclasses.replace(report, seconds=seconds)
    metrics = write_json(folder / "metrics.json", report.to_dict())
    return dataclasses.replace(report, files=(*files, metrics, *pictures))
