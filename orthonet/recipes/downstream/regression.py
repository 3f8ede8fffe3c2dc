"""Conformal bands of a Lipschitz regression, plain and robust, under attack."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify import LipschitzCertificate, certify
from orthonet.downstream import calibrate_band, certified_interval
from orthonet.models import mlp
from orthonet.recipes.beyond.report import BeyondReport
from orthonet.recipes.data.digits import require_package
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

__all__ = ["Points", "RegressionConfig", "regression_data", "train_regression"]


class Points(NamedTuple):
    """Inputs (number, features) and targets (number,), float32."""

    x: Tensor
    y: Tensor


@dataclasses.dataclass(frozen=True)
class RegressionConfig:
    r"""Learn two quantiles with a certified constant, and make bands of them that hold.

    The two outputs of the network learn the quantiles \(\alpha / 2\) and \(1 - \alpha / 2\).
    Points that took no part in the training are split at random into halves many times: one half
    calibrates, the other one is attacked and judged.

    Attributes:
        dataset: Points to learn; "waves" (generated, one input, noise that depends on it) or
            "diabetes" (442 patients, ten inputs, in scikit-learn). Inputs and targets are divided
            by their standard deviations.
        hidden: Width of the two hidden layers.
        lipschitz: Constant of the network, in standard deviations.
        batch_size: Points in a step.
        iterations: Optimizer steps.
        lr: Highest learning rate.
        alpha: The share of misses that is allowed.
        eps: l2 sizes of the perturbations, in standard deviations of the inputs.
        splits: Random splits of the points that are held out.
        attack_steps: Gradient steps of an attack.
        seed: Seed of the weights, the points, the batches and the splits.

    Raises:
        ValueError: A value out of range.
    """

    dataset: str = option("waves", choices=("waves", "diabetes"))
    hidden: int = 64
    lipschitz: float = 3.0
    batch_size: int = 128
    iterations: int = 600
    lr: float = 0.01
    alpha: float = 0.1
    eps: tuple[float, ...] = option((0.05, 0.1, 0.2), trains=False)
    splits: int = option(100, trains=False)
    attack_steps: int = option(20, trains=False)
    seed: int = 0

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
        _checks.non_negative_int(self, seed=self.seed)
        _checks.in_range(self, 1e-6, 1e3, lr=self.lr, lipschitz=self.lipschitz)
        _checks.in_range(self, 1e-6, 1.0 - 1e-6, alpha=self.alpha)
        for eps in self.eps:
            _checks.in_range(self, 0.0, 1e3, eps=eps)


def regression_data(config: RegressionConfig) -> tuple[Points, Points]:
    """Return the points to train on, and those that are held out, as many.

    Raises:
        ModuleNotFoundError: The package of "diabetes" is missing.
    """
    generator = torch.Generator().manual_seed(config.seed)
    if config.dataset == "waves":
        x = 6.0 * torch.rand(2000, 1, generator=generator) - 3.0
        noise = torch.randn(2000, generator=generator)
        y = torch.sin(x[:, 0]) + (0.1 + 0.2 * x[:, 0].cos().square()) * noise
    else:
        read = require_package("sklearn.datasets", "scikit-learn").load_diabetes
        values = read(return_X_y=True)
        x, y = (torch.as_tensor(each, dtype=torch.float32) for each in values)
    order = torch.randperm(len(y), generator=generator)
    parts = order.tensor_split(2)
    center, scale = x[parts[0]].mean(0), x[parts[0]].std(0)
    middle, spread = y[parts[0]].mean(), y[parts[0]].std()
    x, y = (x - center) / scale, (y - middle) / spread
    return Points(x[parts[0]], y[parts[0]]), Points(x[parts[1]], y[parts[1]])


@guarded
def train_regression(
    config: RegressionConfig,
    out: str | os.PathLike[str],
    *,
    progress: bool = False,
    resume: bool = False,
    tensorboard: bool = False,
) -> BeyondReport | None:
    """Train two quantiles, calibrate bands on random halves of fresh points, and attack the rest.

    For each eps the recipe tells the coverage of the plain bands on clean and on attacked inputs,
    the proved bound of the latter, the coverage of the robust bands on attacked inputs, and the
    widths. The attack moves the input so that its target leaves the band. Into the folder `out` go
    `metrics.json`, `model.pt` and `band.png`.

    The arguments are those of [`train`][orthonet.recipes.train], and so are the errors.

    Returns:
        The report, None in all processes of `torchrun` but the first. Its figures are the
        `constant`, the number of `samples`, and `rows`, one for each eps, with mean, least and
        largest value over the splits of `clean`, `attacked`, `worst`, `robust`, `plain_size` and
        `robust_size`.
    """
    train, held = regression_data(config)
    generator = torch.Generator().manual_seed(config.seed)
    with seeded(config.seed):
        hidden = (config.hidden,) * 2
        model = mlp(train.x.shape[1], 2, hidden=hidden, lipschitz=config.lipschitz)
    levels = torch.tensor([config.alpha / 2.0, 1.0 - config.alpha / 2.0])

    def loss_of() -> Tensor:
        chosen = torch.randint(len(train.y), (config.batch_size,), generator=generator)
        chosen = part_of(chosen)
        rest = train.y[chosen, None] - model(train.x[chosen])
        return torch.maximum(levels * rest, (levels - 1.0) * rest).mean()

    switches = {"progress": progress, "resume": resume, "tensorboard": tensorboard}
    history = fitted(model, loss_of, generator, config, "regression", out, **switches)
    if history is None:
        return None
    model = model.eval().requires_grad_(False)
    certificate = certify(model, held.x[:1], lower=False)
    rows = [_covered(model, certificate, held, eps, config) for eps in config.eps]
    figures: dict[str, Any] = {
        "constant": certificate.constant.value,
        "samples": len(held.y),
        "rows": rows,
    }
    text = (
        f"{config.dataset}: {len(held.y)} points held out, constant "
        f"{certificate.constant.value:.9f}",
        *coverage_lines(rows, "width", config.alpha, config.splits),
    )
    report = BeyondReport("regression", dataclasses.asdict(config), figures, text, history)
    picture = _picture(Path(out) / "band.png", model, certificate, held, rows, config)
    return report.written(Path(out), model, picture)


def _covered(
    model: nn.Module,
    certificate: LipschitzCertificate,
    held: Points,
    eps: float,
    config: RegressionConfig,
) -> dict[str, Any]:
    """Coverage and widths at one eps, over the splits; outputs are computed once."""

    def miss(outputs: Tensor) -> Tensor:
        return torch.maximum(outputs[:, 0] - held.y, held.y - outputs[:, 1])

    points, moved = raised(model, held.x, eps, miss, miss, config.attack_steps)
    outputs = model(held.x)
    # The ends that a perturbation can reach: inward of the clean, outward of the attacked ones.
    inward, outward = (
        certified_interval(ends, certificate, eps, x)
        for ends, x in ((outputs, held.x), (moved, points))
    )
    inward = torch.stack((inward[:, 0, 1], inward[:, 1, 0]), 1)
    outward = torch.stack((outward[:, 0, 0], outward[:, 1, 1]), 1)
    found: dict[str, list[float]] = {}
    for first, rest in halves(len(held.y), config.splits, config.seed):
        band, y = calibrate_band(outputs[first], held.y[first], config.alpha), held.y[rest]
        ends = {"clean": outputs, "attacked": moved, "worst": inward, "robust": outward}
        bands = {name: band.predict(each[rest]) for name, each in ends.items()}
        for name, each in bands.items():
            inside = (each[:, 0] <= y) & (y <= each[:, 1])
            found.setdefault(name, []).append(inside.double().mean().item())
        for name, each in (("plain_size", bands["clean"]), ("robust_size", bands["robust"])):
            width = (each[:, 1] - each[:, 0]).clamp_min(0.0).mean().item()
            found.setdefault(name, []).append(width)
    return {"eps": eps, **{name: mean_and_range(values) for name, values in found.items()}}


def _picture(
    path: Path,
    model: nn.Module,
    certificate: LipschitzCertificate,
    held: Points,
    rows: list[dict[str, Any]],
    config: RegressionConfig,
) -> Path:
    figure = figure_of(10.0, 4.2)
    left, right = figure.subplots(1, 2)
    band = calibrate_band(model(held.x), held.y, config.alpha)
    eps = config.eps[len(config.eps) // 2]
    order = held.x[:, 0].argsort() if held.x.shape[1] == 1 else model(held.x).mean(1).argsort()
    x, y = held.x[order], held.y[order]
    where = x[:, 0] if held.x.shape[1] == 1 else torch.arange(len(y))
    outputs = model(x)
    wide, narrow = band.robust(outputs, certificate, eps, x), band.predict(outputs)
    left.fill_between(where, *wide.T, color=GREEN, alpha=0.25, lw=0, label=f"robust, eps {eps:g}")
    left.fill_between(where, *narrow.T, color=BLUE, alpha=0.35, lw=0, label="plain")
    left.plot(where, y, ".", color="black", ms=2)
    label = "input" if held.x.shape[1] == 1 else "points in the order of the middle of their band"
    left.set(xlabel=label, ylabel="target", title=config.dataset)
    left.legend(frameon=False, loc="lower left", fontsize=8)
    coverage_picture(right, rows, config.alpha)
    right.set(title=f"{config.splits} splits")
    return save_figure(figure, path, left, right)


register("regression", Recipe(RegressionConfig, RegressionConfig, train_regression))
