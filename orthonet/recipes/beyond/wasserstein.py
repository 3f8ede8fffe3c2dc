"""The distance of two distributions, bounded from below by a critic whose constant is proved."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify import certify
from orthonet.models import mlp
from orthonet.recipes.beyond.report import BeyondReport, grid
from orthonet.recipes.running.figures import BLUE, GRAY, ORANGE, figure_of, save_figure
from orthonet.recipes.running.fitting import fitted, seeded
from orthonet.recipes.running.folder import guarded
from orthonet.recipes.running.options import option
from orthonet.recipes.running.processes import part_of
from orthonet.recipes.running.registry import Recipe, register

__all__ = ["W1Config", "mean_below", "shells", "train_w1"]


@dataclasses.dataclass(frozen=True)
class W1Config:
    r"""Bound the Wasserstein distance of two Gaussian shells from below, with a proof.

    A point of the first shell is \(r u\), of the second \((r' + g) u\): directions u uniform on the
    sphere, radii r, r' of one law (normal, cut off at four deviations and at 0). Moving each point
    outward by g carries the first shell to the second, and \(\|x\|\) is 1-Lipschitz, so that their
    Wasserstein-1 distance is g, exactly.

    Attributes:
        dimension: Dimension of the space, at least 2.
        mean: Mean radius of the inner shell.
        deviation: Deviation of the radii.
        gap: Distance of the shells, g.
        hidden: Width of the two hidden layers, even.
        batch_size: Points of each shell in a step.
        iterations: Optimizer steps.
        lr: Highest learning rate.
        samples: Fresh points of each shell that the estimate is made of.
        confidence: Probability, at least, that the printed lower bound is below the distance.
        seed: Seed of weights and points.

    Raises:
        ValueError: A value out of range.
    """

    dimension: int = 2
    mean: float = 1.0
    deviation: float = 0.1
    gap: float = 1.0
    hidden: int = 64
    batch_size: int = 256
    iterations: int = 1000
    lr: float = 0.02
    samples: int = option(100_000, trains=False)
    confidence: float = option(0.99, trains=False)
    seed: int = 0

    def __post_init__(self) -> None:
        _checks.positive_int(
            self,
            dimension=self.dimension,
            hidden=self.hidden,
            batch_size=self.batch_size,
            iterations=self.iterations,
            samples=self.samples,
        )
        _checks.require(
            self.dimension >= 2 and self.samples >= 2,
            self,
            "dimension and samples must be at least 2",
            "Use a larger one",
            dimension=self.dimension,
            samples=self.samples,
        )
        _checks.in_range(self, 0.0, 1e3, mean=self.mean, deviation=self.deviation)
        _checks.in_range(self, 1e-6, 1e3, gap=self.gap, lr=self.lr)
        _checks.in_range(self, 0.0, 1.0 - 1e-9, confidence=self.confidence)
        _checks.non_negative_int(self, seed=self.seed)

    @property
    def reach(self) -> tuple[float, float]:
        """Largest radius of each shell."""
        inner = self.mean + 4 * self.deviation
        return inner, inner + self.gap


def shells(config: W1Config, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Independent points of the inner and of the outer shell, (number, dimension) each, float32."""
    found = []
    for gap in (0.0, config.gap):
        direction = torch.randn(number, config.dimension, generator=generator)
        direction = direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True)
        normal = torch.randn(number, 1, generator=generator).clamp(-4.0, 4.0)
        radius = (config.mean + config.deviation * normal).clamp_min(0.0) + gap
        found.append(radius * direction)
    return found[0], found[1]


def mean_below(values: Tensor, width: float, risk: float) -> float:
    r"""A number that is above the mean of the law of `values` with probability `risk` at most.

    The empirical Bernstein bound, with the sample variance V of n values in an interval of
    length w: \(\bar v - \sqrt{2 V \ln(2/\delta) / n} - 7 w \ln(2/\delta) / (3 (n - 1))\).

    Args:
        values: Independent values of one law.
        width: Length of an interval that holds them all.
        risk: \(\delta\).

    References:
        Maurer & Pontil, *Empirical Bernstein bounds and sample variance penalization*, COLT 2009,
        theorem 4.
    """
    values = values.double()
    number, log = len(values), math.log(2.0 / risk)
    spread = math.sqrt(2.0 * values.var().item() * log / number)
    return values.mean().item() - spread - 7.0 * width * log / (3.0 * (number - 1))


@guarded
def train_w1(
    config: W1Config,
    out: str | os.PathLike[str],
    *,
    progress: bool = False,
    resume: bool = False,
    tensorboard: bool = False,
) -> BeyondReport | None:
    r"""Train a critic f by the Kantorovich-Rubinstein loss, and bound the distance from below.

    By duality \(W_1 \ge (E f(Y) - E f(X)) / K\) for every f of constant K, and K is certified. The
    two means are those of fresh points; what chance can do to them is bounded with the given
    confidence, so that the bound holds without any assumption about the training. Into the folder
    `out` go `metrics.json`, `model.pt` and `critic.png`.

    The arguments are those of [`train`][orthonet.recipes.train], and so are the errors.

    Returns:
        The report, None in all processes of `torchrun` but the first. Its figures are `distance`,
        `estimate` (the mean), `lower` (with confidence) and `constant`.

    References:
        Anil, Lucas & Grosse, *Sorting out Lipschitz function approximation*, ICML 2019 (Wasserstein
        distances by 1-Lipschitz networks).
    """
    generator = torch.Generator().manual_seed(config.seed)
    with seeded(config.seed):
        model = mlp(config.dimension, 1, hidden=(config.hidden, config.hidden))

    def loss_of() -> Tensor:
        inner, outer = map(part_of, shells(config, config.batch_size, generator))
        return model(inner).mean() - model(outer).mean()

    switches = {"progress": progress, "resume": resume, "tensorboard": tensorboard}
    history = fitted(model, loss_of, generator, config, "w1", out, **switches)
    if history is None:
        return None
    model = model.double()
    constant = certify(model, torch.zeros(1, config.dimension).double()).constant.value
    figures = {"distance": config.gap, **_bounds(model, constant, config, generator)}
    text = (
        f"two Gaussian shells in {config.dimension} dimensions, {config.samples} points of each",
        f"Wasserstein-1 distance, by construction    {config.gap:.5f}",
        f"critic's estimate, over its constant       {figures['estimate']:.5f}",
        f"certified lower bound                      {figures['lower']:.5f}  (confidence "
        f"{config.confidence:g})",
        f"Lipschitz constant of the critic           {constant:.9f}  (l2, proved upper bound)",
    )
    report = BeyondReport("w1", dataclasses.asdict(config), figures, text, history)
    picture = _picture(Path(out) / "critic.png", model, config, report, generator)
    return report.written(Path(out), model, picture)


@torch.no_grad()
def _bounds(
    model: nn.Module, constant: float, config: W1Config, generator: torch.Generator
) -> dict[str, float]:
    inner, outer = shells(config, config.samples, generator)
    high = torch.cat([model(part.double())[:, 0] for part in outer.split(8192)])
    low = torch.cat([model(part.double())[:, 0] for part in inner.split(8192)])
    # On a ball of radius r a K-Lipschitz function stays within an interval of length 2 K r.
    widths = [2.0 * constant * r for r in config.reach]
    risk = (1.0 - config.confidence) / 2.0
    below = mean_below(high, widths[1], risk) + mean_below(-low, widths[0], risk)
    mean = high.mean().item() - low.mean().item()
    # The points are rounded to float32, by 1e-7 of their length: the distance moves by as much.
    lower = max(0.0, below / constant - 1e-6 * config.reach[1])
    return {"estimate": mean / constant, "lower": lower, "constant": constant}


def _picture(
    path: Path, model: nn.Module, config: W1Config, report: BeyondReport, generator: Any
) -> Path:
    figure = figure_of(10.0, 4.6)
    left, right = figure.subplots(1, 2)
    inner, outer = shells(config, 600, generator)
    limit = 1.15 * config.reach[1]
    if config.dimension == 2:
        points = grid(-limit, limit, 160)
        with torch.no_grad():
            height = model(points.flatten(0, 1)).reshape(160, 160)
        x, y = points.unbind(-1)
        lines = left.contour(x, y, height, levels=18, cmap="viridis", linewidths=1)
        left.clabel(lines, fontsize=7)
        for shell, color in ((inner, BLUE), (outer, ORANGE)):
            left.plot(shell[:, 0], shell[:, 1], ".", color=color, ms=2)
        left.set(aspect="equal", title="level lines of the critic")
    else:
        for shell, color in ((inner, BLUE), (outer, ORANGE)):
            with torch.no_grad():
                height = model(shell.double())[:, 0]
            left.plot(shell.norm(dim=1), height, ".", color=color, ms=3)
        left.set(xlabel="radius", ylabel="critic", title="the critic on both shells")
    history = report.history
    right.axhline(config.gap, color=GRAY, ls="--", label=f"distance {config.gap:g}")
    right.plot(
        [row["iteration"] for row in history],
        [-row["loss"] for row in history],
        color=BLUE,
        label="critic on a batch, constant at most 1",
    )
    lower = report.figures["lower"]
    right.axhline(lower, color=ORANGE, label=f"certified lower bound {lower:.4f}")
    right.set(xlabel="iteration", ylabel="mean difference")
    right.legend(frameon=False, loc="lower right")
    figure.suptitle("Wasserstein-1 distance of two Gaussian shells")
    return save_figure(figure, path, left, right)


register("w1", Recipe(W1Config, W1Config, train_w1))
