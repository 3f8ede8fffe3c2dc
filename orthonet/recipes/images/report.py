"""What came out of a run on images, as text, as JSON, as pictures."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from orthonet.convert import to_plain
from orthonet.recipes.data.digits import Images
from orthonet.recipes.images.config import CertifyConfig, TrainConfig
from orthonet.recipes.images.evaluate import Evaluation, evaluate
from orthonet.recipes.images.figures import radius_figure, spectra_figure, training_figure
from orthonet.recipes.images.page import write_page
from orthonet.recipes.images.spectra import layer_spectra
from orthonet.recipes.running.files import versions, write_json

__all__ = ["Report", "certified", "written"]


@dataclasses.dataclass(frozen=True)
class Report:
    """What came out of a run.

    Attributes:
        config: What was run, or what was certified.
        evaluation: Accuracy, certificate and attack on the test images.
        history: A row for every epoch; empty where nothing was trained.
        seconds: Duration of every part.
        files: What was written.
    """

    config: TrainConfig | CertifyConfig
    evaluation: Evaluation
    history: list[dict[str, float]]
    seconds: dict[str, float]
    files: tuple[Path, ...] = ()

    def summary(self, *, certificate: bool = True) -> str:
        """Return the outcome as text, with the table of the certificate or without."""
        lines = [
            f"{self.config.title}, seed {self.config.seed}: "
            + ", ".join(f"{part} {value:.1f} s" for part, value in self.seconds.items()),
            *self.evaluation.lines(certificate=certificate),
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


def certified(
    model: nn.Module,
    config: TrainConfig | CertifyConfig,
    images: Images,
    *,
    history: list[dict[str, float]] | None = None,
    seconds: Mapping[str, float] | None = None,
    page: Path | None = None,
    tell: Callable[[str], None] | None = None,
    progress: bool = False,
) -> Report:
    """Certify a model and attack it.

    Args:
        model: The model, in eval mode.
        config: Radii, attack and seed.
        images: The test images.
        history: Rows of the training.
        seconds: Duration of what came before.
        page: A file for the HTML page. It is written before the attacks, and again after them.
        tell: Called with the text of the certificate before the attacks.
        progress: Whether to show a progress bar.
    """
    start, title, files = time.perf_counter(), config.title, ()

    def before(evaluation: Evaluation) -> None:
        if page is not None:
            write_page(page, model, images.x, evaluation, title)
        if tell is not None:
            tell(evaluation.table)

    evaluation = evaluate(
        model,
        images,
        radii=config.radii,
        norm=config.norm,  # type: ignore[arg-type]
        attack_steps=config.attack_steps,
        local=config.local,
        seed=config.seed,
        export=config.exports,
        progress=progress,
        tell=before,
    )
    if page is not None:
        files = (write_page(page, model, images.x, evaluation, title),)
    spent = {**(seconds or {}), "certificate and attack": time.perf_counter() - start}
    return Report(config, evaluation, history or [], spent, files)


def written(
    report: Report, model: nn.Module, images: Images, folder: Path, files: tuple[Path, ...] = ()
) -> Report:
    """Write the metrics and the pictures, and return the report with the names of its files."""
    start = time.perf_counter()
    evaluation, config = report.evaluation, report.config
    title = config.title
    pictures = [
        radius_figure(
            folder / "certified_accuracy.png",
            evaluation.radii,
            evaluation.attacked,
            evaluation.certified,
            f"{title}: certified accuracy (constant {evaluation.constant:.6f})",
            evaluation.certificate.norm,
        ),
    ]
    if config.exports:
        pictures.append(
            spectra_figure(
                folder / "singular_values.png",
                layer_spectra(to_plain(model), images.x[:1].to(config.device)),
                f"{title}: singular values of every layer on its input\n"
                "(zero padding can only shrink)",
            )
        )
    if report.history:
        followed = config.followed if isinstance(config, TrainConfig) else 0.5
        picture = training_figure(folder / "training.png", report.history, title, followed)
        pictures.insert(0, picture)
    seconds = {**report.seconds, "figures": time.perf_counter() - start}
    report = dataclasses.replace(report, seconds=seconds)
    metrics = write_json(folder / "metrics.json", report.to_dict())
    return dataclasses.replace(report, files=(*files, metrics, *pictures))
