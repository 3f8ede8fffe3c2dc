"""Train Lipschitz transformers of several constants, and a plain one, at equal budget."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from orthonet import _checks
from orthonet.certify import certify
from orthonet.recipes.beyond.report import BeyondReport
from orthonet.recipes.running.figures import BLUE, GRAY, ORANGE, figure_of, save_figure
from orthonet.recipes.running.fitting import optimize, seeded
from orthonet.recipes.running.folder import guarded
from orthonet.recipes.running.options import check_choices, option, training_fields
from orthonet.recipes.running.processes import joined, part_of
from orthonet.recipes.running.registry import Recipe, register
from orthonet.recipes.text.data import Text, python_topics, read_text
from orthonet.recipes.text.models import LipschitzCharacters, PlainCharacters

__all__ = ["TextConfig", "train_text"]


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Continue a text by transformers, with proved constants and without.

    Attributes:
        attention: How tokens are mixed in each block: "mixing", "distance" or "cosine".
        constants: The constants of the Lipschitz transformers, one of each.
        length: Characters that are read.
        characters: Characters that are told apart; rare ones count as one.
        width: Features of a token.
        heads: Heads; they divide the width.
        batch_size: Pieces of text in a step.
        iterations: Optimizer steps of each model.
        lr: Highest learning rate of the Lipschitz transformers.
        plain_lr: Highest learning rate of the plain one.
        validation: Pieces of the rest of the text that are read in the end, at most.
        radius: Distance within which predictions are certified; another character is at 1.41.
        seed: Seed of weights and batches.

    Raises:
        ValueError: A value out of range.
    """

    attention: tuple[str, ...] = option(
        ("mixing", "distance"), choices=("mixing", "distance", "cosine")
    )
    constants: tuple[float, ...] = option((1.0, 4.0, 16.0, 64.0), trains=False)
    length: int = 32
    characters: int = 64
    width: int = 64
    heads: int = 4
    batch_size: int = 32
    iterations: int = 600
    lr: float = option(0.01, trains=False)
    plain_lr: float = option(0.003, trains=False)
    validation: int = option(400, trains=False)
    radius: float = option(0.1, trains=False)
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        _checks.require(
            len(self.attention) > 0 and len(self.constants) > 0,
            self,
            "there must be one block and one constant or more",
            "Name them",
            attention=self.attention,
            constants=self.constants,
        )
        for constant in self.constants:
            _checks.in_range(self, 1e-3, 1e6, constants=constant)
        sizes = ("length", "characters", "width", "heads", "batch_size", "iterations", "validation")
        _checks.positive_int(self, **{name: getattr(self, name) for name in sizes})
        _checks.require(
            self.width % self.heads == 0,
            self,
            "heads must divide width",
            "Choose a divisor",
            width=self.width,
            heads=self.heads,
        )
        _checks.in_range(self, 1e-6, 1e3, lr=self.lr, plain_lr=self.plain_lr)
        _checks.in_range(self, 0.0, 1e3, radius=self.radius)
        _checks.non_negative_int(self, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What `optimize` reads, and with what it compares a run that goes on."""

    iterations: int
    lr: float
    fields: dict[str, Any]


@guarded
def train_text(
    config: TextConfig,
    out: str | os.PathLike[str],
    *,
    progress: bool = False,
    resume: bool = False,
    tensorboard: bool = False,
) -> BeyondReport | None:
    r"""Train Lipschitz character transformers of several constants, and a plain one.

    The text is [`python_topics`][orthonet.recipes.python_topics], which Python ships. All models
    have the same sizes, batches and number of steps. The input is one-hot. Where the largest logit
    is ahead of the second by more than \(\sqrt 2\,(K r + e)\), with the proved error e of the
    rounding, no change of the input within the l2 distance r changes the prediction; another
    character is at \(\sqrt 2\). Into the folder `out` go `metrics.json`, `model.pt` with all
    models, `text.png`, and a folder for each model.

    The arguments are those of [`train`][orthonet.recipes.train], and so are the errors.

    Returns:
        The report, None in all processes of `torchrun` but the first. For each constant K, and for
        "plain", its figures are `loss_K` (nats a character of the rest of the text), `accuracy_K`
        and `parameters_K`; for each K also `constant_K` (proved), `rounding_K` (largest proved
        error of the logits of a piece, float32), `steepest_K` (a secant of the certificate's
        search from below) and `certified_K` (share of characters that are predicted right wherever
        the input moves within the radius).
    """
    text = read_text(python_topics(), config.characters)
    models, figures, history = nn.ModuleDict(), {}, []
    with joined("cpu") as rank:
        for name, constant in [("plain", None), *((f"{k:g}", k) for k in config.constants)]:
            model = _model(config, constant)
            lr = config.plain_lr if constant is None else config.lr
            switches = {"progress": progress, "resume": resume, "tensorboard": tensorboard}
            run = _Run(config.iterations, lr, training_fields(config))
            rows = _trained(model, text, config, run, Path(out) / name, **switches)
            history += [{"constant": math.inf if constant is None else constant, **r} for r in rows]
            if rank == 0:
                figures |= _measured(model, text, config, name, constant)
            models[name.replace(".", "_")] = model
    if rank != 0:
        return None
    history = [{k: v for k, v in row.items() if math.isfinite(v)} for row in history]
    report = BeyondReport(
        "text", dataclasses.asdict(config), figures, _lines(config, figures, text), history
    )
    return report.written(Path(out), models, _picture(Path(out) / "text.png", config, figures))


def _model(config: TextConfig, constant: float | None) -> nn.Module:
    with seeded(config.seed):
        sizes = config.characters, config.length, config.width, config.heads
        if constant is None:
            return PlainCharacters(*sizes, len(config.attention))
        return LipschitzCharacters(*sizes, config.attention, constant)


def _trained(
    model: nn.Module, text: Text, config: TextConfig, run: _Run, folder: Path, **switches: bool
) -> list[dict[str, float]]:
    generator = torch.Generator().manual_seed(config.seed)
    folder.mkdir(parents=True, exist_ok=True)

    def loss_of() -> Tensor:
        x, y = (part_of(t) for t in text.batch(config.batch_size, config.length, generator))
        logits = model(one_hot(x, config.characters).float())
        return cross_entropy(logits.flatten(0, 1), y.flatten())

    return optimize(
        model, loss_of, generator, run, name=f"text {folder.name}", folder=folder, **switches
    )


@torch.no_grad()
def _measured(
    model: nn.Module, text: Text, config: TextConfig, name: str, constant: float | None
) -> dict[str, float]:
    """The figures of a model on the rest of the text."""
    x, y = text.pieces(config.length, config.validation)
    x = one_hot(x, config.characters).float()
    logits = model(x)
    right = logits.argmax(-1) == y
    found = {
        "loss": cross_entropy(logits.flatten(0, 1), y.flatten()).item(),
        "accuracy": right.float().mean().item(),
        "parameters": float(sum(p.numel() for p in model.parameters())),
    }
    if constant is not None:
        certificate = certify(model, x[:2])
        proved, rounding = certificate.constant.value, certificate.rounding(x)
        lower = certificate.lower
        best = logits.double().topk(2, -1).values
        lost = math.sqrt(2.0) * (proved * config.radius + rounding[:, None])
        found |= {
            "constant": proved,
            "steepest": 0.0 if lower is None else lower.value,
            "rounding": rounding.max().item(),
            "certified": (right & (best[..., 0] - best[..., 1] > lost)).float().mean().item(),
        }
    return {f"{key}_{name}": value for key, value in found.items()}


def _lines(config: TextConfig, found: dict[str, float], text: Text) -> tuple[str, ...]:
    python = ".".join(map(str, sys.version_info[:2]))
    lines = [
        f"topics of Python {python} ({text.digest}), {config.length} characters, "
        f"{len(config.attention)} blocks ({', '.join(config.attention)}), "
        f"{config.iterations} steps of {config.batch_size}",
        "model   nats  accuracy  parameters  proved constant  steepest  rounding  certified",
    ]
    for name in ("plain", *(f"{k:g}" for k in config.constants)):
        row = (
            f"{name:6}  {found[f'loss_{name}']:.3f}  {100 * found[f'accuracy_{name}']:6.1f} %"
            f"  {found[f'parameters_{name}']:10.0f}"
        )
        if name != "plain":
            row += (
                f"  {found[f'constant_{name}']:15.8g}  {found[f'steepest_{name}']:8.3g}"
                f"  {found[f'rounding_{name}']:8.1e}  {100 * found[f'certified_{name}']:7.1f} %"
            )
        lines.append(row)
    return tuple(lines)


def _picture(path: Path, config: TextConfig, found: dict[str, float]) -> Path:
    figure = figure_of(9.0, 3.6)
    panels = figure.subplots(1, 2)
    names = [f"{k:g}" for k in config.constants]
    proved = [found[f"constant_{name}"] for name in names]
    for axes, key, factor in zip(panels, ("loss", "accuracy"), (1.0, 100.0), strict=True):
        plain: Any = factor * found[f"{key}_plain"]
        axes.axhline(plain, color=GRAY, ls="--", label="plain, no constant")
        values = [factor * found[f"{key}_{n}"] for n in names]
        axes.plot(proved, values, "o-", color=BLUE, label="Lipschitz")
        axes.set(xscale="log", xlabel="proved constant")
    certified = [100.0 * found[f"certified_{n}"] for n in names]
    panels[1].plot(
        proved, certified, "s:", color=ORANGE, label=f"certified within {config.radius:g}"
    )
    panels[0].set(ylabel="nats a character")
    panels[1].set(ylabel="% of characters")
    for axes in panels:
        axes.legend(frameon=False)
    return save_figure(figure, path, *panels)


register("text", Recipe(TextConfig, TextConfig, train_text))
