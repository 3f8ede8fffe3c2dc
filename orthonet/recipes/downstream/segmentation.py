"""Certified segmentation: radii of pixels, and of all pixels of an image together."""

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
from orthonet.downstream import certified_pixel_accuracy, pixel_radii
from orthonet.layers import MaxMin, OrthoConv2d
from orthonet.losses import OffsetCrossEntropyLoss
from orthonet.recipes.beyond.report import BeyondReport
from orthonet.recipes.data.digits import Images
from orthonet.recipes.downstream.attack import raised
from orthonet.recipes.running.figures import BLUE, GREEN, ORANGE, figure_of, save_figure
from orthonet.recipes.running.fitting import fitted, seeded
from orthonet.recipes.running.folder import guarded
from orthonet.recipes.running.options import option
from orthonet.recipes.running.processes import part_of
from orthonet.recipes.running.registry import Recipe, register

__all__ = ["SegmentationConfig", "drawn_shapes", "segmentation_model", "train_segmentation"]

CLASSES = ("background", "disc", "square")
_HUES = torch.tensor([[0.5, 0.5, 0.5], [0.85, 0.4, 0.3], [0.3, 0.4, 0.85]])


@dataclasses.dataclass(frozen=True)
class SegmentationConfig:
    """Segment generated images with a certificate for each pixel.

    An image shows a reddish disc and a bluish square of random places, sizes and brightness, on
    gray, with noise. The network keeps the size of the image; its constant is 1.

    Attributes:
        size: Rows and columns of an image.
        noise: Standard deviation of the noise of each pixel.
        channels: Channels of the hidden layers, even.
        layers: Convolutions with kernels of 3 x 3 before the last one of 1 x 1.
        batch_size: Images in a step.
        iterations: Optimizer steps.
        lr: Highest learning rate.
        radius: Radius that the loss asks for at each pixel.
        temperature: Temperature of the offset cross-entropy.
        radii: l2 sizes of the perturbations of an image.
        images: Fresh images that are certified and attacked.
        attack_steps: Gradient steps of an attack.
        seed: Seed of the weights and of the images.

    Raises:
        ValueError: A value out of range.
    """

    size: int = 24
    noise: float = 0.1
    channels: int = 16
    layers: int = 4
    batch_size: int = 8
    iterations: int = 300
    lr: float = 0.02
    radius: float = 0.2
    temperature: float = 0.05
    radii: tuple[float, ...] = option((0.1, 0.25, 0.5, 1.0), trains=False)
    images: int = option(100, trains=False)
    attack_steps: int = option(30, trains=False)
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "radii", tuple(sorted(self.radii)))
        _checks.positive_int(
            self,
            size=self.size,
            channels=self.channels,
            layers=self.layers,
            batch_size=self.batch_size,
            iterations=self.iterations,
            images=self.images,
            attack_steps=self.attack_steps,
        )
        _checks.require(
            self.size >= 8 and self.channels % 2 == 0,
            self,
            "size must be at least 8 and channels even",
            "Choose such ones",
            size=self.size,
            channels=self.channels,
        )
        _checks.non_negative_int(self, seed=self.seed)
        _checks.in_range(self, 1e-6, 1e3, lr=self.lr, temperature=self.temperature)
        _checks.in_range(self, 0.0, 1e3, radius=self.radius, noise=self.noise)
        for radius in self.radii:
            _checks.in_range(self, 0.0, 1e3, radii=radius)


def drawn_shapes(config: SegmentationConfig, number: int, generator: torch.Generator) -> Images:
    """Return images, (number, 3, size, size), and the class of each pixel, (number, size, size)."""
    size = config.size
    place = torch.arange(size) + 0.5
    y = torch.zeros(number, size, size, dtype=torch.long)
    for kind in (1, 2):
        draw = torch.rand(number, 3, 1, 1, generator=generator)
        half = size * (0.12 + 0.13 * draw[:, 0])
        across = half + (size - 2 * half) * draw[:, 1]
        down = half + (size - 2 * half) * draw[:, 2]
        dx, dy = (place - across).abs(), (place[:, None] - down).abs()
        inside = torch.hypot(dx, dy) <= half if kind == 1 else torch.maximum(dx, dy) <= half
        y[inside] = kind
    light = 0.85 + 0.3 * torch.rand(number, 1, 1, 1, generator=generator)
    x = _HUES[y].movedim(-1, 1) * light
    noise = torch.randn(x.shape, generator=generator)
    return Images((x + config.noise * noise).contiguous(), y)


def segmentation_model(config: SegmentationConfig) -> nn.Sequential:
    """Build an untrained network; torch's global generators are left as they were."""
    with seeded(config.seed):
        layers, width = [], 3
        for _ in range(config.layers):
            layers += [OrthoConv2d(width, config.channels, 3, padding=1), MaxMin()]
            width = config.channels
        return nn.Sequential(*layers, OrthoConv2d(width, len(CLASSES), 1))


@guarded
def train_segmentation(
    config: SegmentationConfig,
    out: str | os.PathLike[str],
    *,
    progress: bool = False,
    resume: bool = False,
    tensorboard: bool = False,
) -> BeyondReport | None:
    """Train a segmentation network, certify its pixels one by one and together, and attack them.

    The attack looks for a perturbation of the whole image that turns many pixels at once. Into the
    folder `out` go `metrics.json`, `model.pt` and `pixels.png`.

    The arguments are those of [`train`][orthonet.recipes.train], and so are the errors.

    Returns:
        The report, None in all processes of `torchrun` but the first. Its figures are `clean` (the
        share of right pixels), the `constant`, and `rows`, one for each radius, with `pixelwise`,
        `collective` and `attacked`.
    """
    generator = torch.Generator().manual_seed(config.seed)
    model = segmentation_model(config)
    loss_fn = OffsetCrossEntropyLoss(math.sqrt(2) * config.radius, config.temperature)

    def loss_of() -> Tensor:
        x, y = map(part_of, drawn_shapes(config, config.batch_size, generator))
        return loss_fn(model(x).movedim(1, -1).flatten(0, 2), y.flatten())

    switches = {"progress": progress, "resume": resume, "tensorboard": tensorboard}
    history = fitted(model, loss_of, generator, config, "segmentation", out, **switches)
    if history is None:
        return None
    model = model.eval().requires_grad_(False)
    test = drawn_shapes(config, config.images, torch.Generator().manual_seed(config.seed + 1))
    certificate = certify(model, test.x[:1], lower=False)
    logits = model(test.x)
    found = certified_pixel_accuracy(logits, test.y, certificate, config.radii, test.x)
    attacked = [_attacked(model, test, radius, config) for radius in config.radii]
    rows = [
        {"radius": radius, "pixelwise": alone, "collective": together, "attacked": under}
        for radius, alone, together, under in zip(
            config.radii, found.pixelwise, found.collective, attacked, strict=True
        )
    ]
    figures: dict[str, Any] = {
        "clean": found.clean,
        "constant": certificate.constant.value,
        "rows": rows,
    }
    text = (
        f"{config.images} images of {config.size} x {config.size} pixels: {found.clean:.4f} of the "
        f"pixels right, constant {certificate.constant.value:.9f}",
        f"{'radius':>7} {'pixel by pixel':>15} {'all together':>13} {'attacked':>9}",
        *(
            f"{row['radius']:>7g} {row['pixelwise']:>15.4f} {row['collective']:>13.4f} "
            f"{row['attacked']:>9.4f}"
            for row in rows
        ),
    )
    report = BeyondReport("segmentation", dataclasses.asdict(config), figures, text, history)
    radii = pixel_radii(logits[:3], certificate, test.x[:3], labels=test.y[:3])
    picture = _picture(Path(out) / "pixels.png", test, radii, logits, found.clean, rows)
    return report.written(Path(out), model, picture)


def _attacked(model: nn.Module, test: Images, radius: float, config: SegmentationConfig) -> float:
    """The share of pixels that stay right under a perturbation of each image."""
    own = test.y[:, None]

    def margins(logits: Tensor) -> Tensor:
        others = logits.scatter(1, own, -torch.inf).amax(1)
        return logits.gather(1, own)[:, 0] - others

    def slope(logits: Tensor) -> Tensor:
        # Pixels that are turned, and those that are out of reach, have no say.
        return -torch.tanh(margins(logits) / (0.3 * radius)).flatten(1).sum(1)

    def turned(logits: Tensor) -> Tensor:
        return (logits.argmax(1) != test.y).double().flatten(1).sum(1)

    _, logits = raised(model, test.x, radius, slope, turned, config.attack_steps)
    return (logits.argmax(1) == test.y).double().mean().item()


def _picture(
    path: Path,
    test: Images,
    radii: Tensor,
    logits: Tensor,
    clean: float,
    rows: list[dict[str, float]],
) -> Path:
    figure = figure_of(11.0, 5.6)
    grid = figure.add_gridspec(3, 5)
    top = float(radii.max())
    shown = None
    for row in range(len(radii)):
        panels = (
            (test.x[row].movedim(0, -1).clamp(0.0, 1.0), {}),
            (logits[row].argmax(0), {"vmin": 0, "vmax": len(CLASSES) - 1, "cmap": "viridis"}),
            (radii[row], {"vmin": 0.0, "vmax": top, "cmap": "magma"}),
        )
        for column, (values, options) in enumerate(panels):
            axes = figure.add_subplot(grid[row, column])
            shown = axes.imshow(values.numpy(), **options)
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(("image", "predicted", "certified radius")[column], fontsize=9)
            if column == 2:
                figure.colorbar(shown, ax=axes)
    right = figure.add_subplot(grid[:, 3:])
    at = [0.0, *(row["radius"] for row in rows)]
    for name, color, label in (
        ("attacked", ORANGE, "under attack"),
        ("collective", GREEN, "proved, all pixels together"),
        ("pixelwise", BLUE, "proved, pixel by pixel"),
    ):
        right.plot(at, [clean, *(row[name] for row in rows)], "-o", color=color, label=label, ms=4)
    right.set(
        xlabel=r"$\ell_2$ perturbation of the image", ylabel="share of right pixels", ylim=(0, 1.02)
    )
    right.legend(frameon=False, loc="lower left", fontsize=8)
    return save_figure(figure, path, right)


register("segmentation", Recipe(SegmentationConfig, SegmentationConfig, train_segmentation))
