"""Conformal sets of a 1-Lipschitz classifier, plain and robust, under attack."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify import LipschitzCertificate, certify
from orthonet.downstream import conformal_quantile, conformal_scores, score_bounds
from orthonet.losses import OffsetCrossEntropyLoss
from orthonet.models import mlp
from orthonet.recipes.beyond.report import BeyondReport
from orthonet.recipes.data.digits import Images, spaced
from orthonet.recipes.data.sets import IMAGE_SETS, load
from orthonet.recipes.downstream.attack import halves, raised
from orthonet.recipes.downstream.coverage import (
    coverage_lines,
    coverage_picture,
    mean_and_range,
)
from orthonet.recipes.running.figures import BLUE, GREEN, figure_of, save_figure
from orthonet.recipes.running.fitting import fitted, seeded
from orthonet.recipes.running.folder import guarded
from orthonet.recipes.running.options import check_choices, option
from orthonet.recipes.running.processes import part_of
from orthonet.recipes.running.registry import Recipe, register

__all__ = ["ConformalConfig", "train_conformal"]


@dataclasses.dataclass(frozen=True)
class ConformalConfig:
    """Calibrate prediction sets, attack them, and make them robust by the certificate.

    A 1-Lipschitz network is trained on the training images. The test images are split at random
    into halves many times: one half calibrates, the other one is attacked and judged.

    Attributes:
        dataset: Images, as [`load`][orthonet.recipes.load] takes them.
        hidden: Width of the two hidden layers.
        batch_size: Images in a step.
        iterations: Optimizer steps.
        lr: Highest learning rate.
        radius: Radius that the loss asks for.
        temperature: Temperature of the offset cross-entropy.
        score: Score of the sets, see
            [`conformal_scores`][orthonet.downstream.conformal_scores].
        score_temperature: Temperature of the score.
        alpha: The share of misses that is allowed.
        eps: l2 sizes of the perturbations.
        splits: Random splits of the test images.
        attack_steps: Gradient steps of an attack.
        evaluated: Test images, evenly spaced; 0 for all of them.
        seed: Seed of the weights, the batches and the splits.
        data_root: Folder of the data.

    Raises:
        ValueError: A value out of range.
    """

    dataset: str = option("digits", choices=tuple(IMAGE_SETS))
    hidden: int = 128
    batch_size: int = 128
    iterations: int = 500
    lr: float = 0.02
    radius: float = 0.5
    temperature: float = 0.25
    score: str = option("softmax", choices=("sigmoid", "softmax", "margin", "excess"), trains=False)
    score_temperature: float = option(0.1, trains=False)
    alpha: float = option(0.1, trains=False)
    eps: tuple[float, ...] = option((0.1, 0.25, 0.5), trains=False)
    splits: int = option(100, trains=False)
    attack_steps: int = option(40, trains=False)
    evaluated: int = option(0, trains=False)
    seed: int = 0
    data_root: str = option("data", flags=("--data",), trains=False)

    def __post_init__(self) -> None:
        check_choices(self)
        object.__setattr__(self, "eps", tuple(sorted(self.eps)))
        _checks.positive_int(
            self,
            hidden=self.hidden,
            batch_size=self.batch_size,
            iterations=self.iterations,
            splits=self.splits,
            attack_steps=self.attack_steps,
        )
        _checks.non_negative_int(self, seed=self.seed, evaluated=self.evaluated)
        _checks.in_range(self, 1e-6, 1e3, lr=self.lr, temperature=self.temperature)
        _checks.in_range(self, 1e-6, 1e3, score_temperature=self.score_temperature)
        _checks.in_range(self, 0.0, 1e3, radius=self.radius)
        _checks.in_range(self, 1e-6, 1.0 - 1e-6, alpha=self.alpha)
        for eps in self.eps:
            _checks.in_range(self, 0.0, 1e3, eps=eps)


@guarded
def train_conformal(
    config: ConformalConfig,
    out: str | os.PathLike[str],
    *,
    progress: bool = False,
    resume: bool = False,
    tensorboard: bool = False,
) -> BeyondReport | None:
    """Train a classifier, calibrate sets on random halves of the test images, and attack the rest.

    For each eps the recipe tells the coverage of the plain sets on clean and on attacked images,
    the proved bound of the latter, the coverage of the robust sets on attacked images, and the
    sizes of the sets. The attack raises the score of the true class within eps. Into the folder
    `out` go `metrics.json`, `model.pt` and `coverage.png`.

    The arguments are those of [`train`][orthonet.recipes.train], and so are the errors that are not
    named here.

    Returns:
        The report, None in all processes of `torchrun` but the first. Its figures are the
        `accuracy`, the `constant`, the number of `samples`, and `rows`, one for each eps, with
        mean, least and largest value over the splits of `clean`, `attacked`, `worst`, `robust`,
        `plain_size` and `robust_size`.

    Raises:
        FileNotFoundError: The data set is not there; the message says how to get it.
    """
    source = IMAGE_SETS[config.dataset]
    data = load(config.dataset, config.data_root)
    generator = torch.Generator().manual_seed(config.seed)
    with seeded(config.seed):
        model = mlp(math.prod(source.shape), source.classes, hidden=(config.hidden,) * 2)
    loss_fn = OffsetCrossEntropyLoss(math.sqrt(2) * config.radius, config.temperature)

    def loss_of() -> Tensor:
        chosen = torch.randint(len(data.train.y), (config.batch_size,), generator=generator)
        chosen = part_of(chosen)
        return loss_fn(model(data.train.x[chosen]), data.train.y[chosen])

    switches = {"progress": progress, "resume": resume, "tensorboard": tensorboard}
    history = fitted(model, loss_of, generator, config, "conformal", out, **switches)
    if history is None:
        return None
    model = model.eval().requires_grad_(False)
    test = spaced(data.test, config.evaluated)
    certificate = certify(model, test.x[:1], lower=False)
    logits = model(test.x)
    rows = [_covered(model, certificate, test, logits, eps, config) for eps in config.eps]
    accuracy = (logits.argmax(1) == test.y).double().mean().item()
    figures: dict[str, Any] = {
        "accuracy": accuracy,
        "constant": certificate.constant.value,
        "samples": len(test.y),
        "rows": rows,
    }
    text = (
        f"{config.dataset}: accuracy {accuracy:.3f} on {len(test.y)} test images, score "
        f"{config.score}, constant {certificate.constant.value:.9f}",
        *coverage_lines(rows, "classes", config.alpha, config.splits),
    )
    report = BeyondReport("conformal", dataclasses.asdict(config), figures, text, history)
    return report.written(Path(out), model, _picture(Path(out) / "coverage.png", rows, config))


def _covered(
    model: nn.Module,
    certificate: LipschitzCertificate,
    test: Images,
    logits: Tensor,
    eps: float,
    config: ConformalConfig,
) -> dict[str, Any]:
    """Coverage and sizes at one eps, over the splits; scores are computed once."""
    kind: dict[str, Any] = {"score": config.score, "temperature": config.score_temperature}
    own, y = test.y[:, None], test.y

    def true(outputs: Tensor) -> Tensor:
        return conformal_scores(outputs, **kind).gather(1, own)[:, 0]

    points, moved = raised(model, test.x, eps, _slope(y, config.score), true, config.attack_steps)
    clean, attacked = (conformal_scores(z, **kind) for z in (logits, moved))
    low, _ = score_bounds(moved, certificate, eps, points, **kind)
    _, high = score_bounds(logits, certificate, eps, test.x, **kind)
    found: dict[str, list[float]] = {}
    for first, rest in halves(len(y), config.splits, config.seed):
        threshold = conformal_quantile(clean.gather(1, own)[first, 0], config.alpha)
        sets = {
            "clean": clean[rest] <= threshold,
            "attacked": attacked[rest] <= threshold,
            "worst": high[rest] <= threshold,
            "robust": low[rest] <= threshold,
        }
        for name, inside in sets.items():
            share = inside.gather(1, own[rest]).double().mean().item()
            found.setdefault(name, []).append(share)
        for name, inside in (("plain_size", sets["clean"]), ("robust_size", sets["robust"])):
            found.setdefault(name, []).append(inside.sum(1).double().mean().item())
    return {"eps": eps, **{name: mean_and_range(values) for name, values in found.items()}}


def _slope(y: Tensor, score: str) -> Callable[[Tensor], Tensor]:
    """A smooth function that rises with the score of the true class."""

    def slope(logits: Tensor) -> Tensor:
        if score == "sigmoid":
            return -logits.gather(1, y[:, None])[:, 0]
        return F.cross_entropy(logits / (0.05 if score == "margin" else 1.0), y, reduction="none")

    return slope


def _picture(path: Path, rows: list[dict[str, Any]], config: ConformalConfig) -> Path:
    figure = figure_of(10.0, 4.2)
    left, right = figure.subplots(1, 2)
    coverage_picture(left, rows, config.alpha)
    eps = [row["eps"] for row in rows]
    for name, color, label in (("plain_size", BLUE, "plain"), ("robust_size", GREEN, "robust")):
        right.plot(eps, [row[name]["mean"] for row in rows], "-o", color=color, label=label, ms=4)
    right.set(xlabel=r"$\ell_2$ perturbation", ylabel="classes in a set", ylim=(0, None))
    right.legend(frameon=False)
    figure.suptitle(f"{config.dataset}, score {config.score}, {config.splits} splits")
    return save_figure(figure, path, left, right)


register("conformal", Recipe(ConformalConfig, ConformalConfig, train_conformal))
