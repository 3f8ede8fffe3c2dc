"""The pictures of image classification, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from orthonet.recipes.images.spectra import Spectrum
from orthonet.recipes.running.figures import BLUE, GRAY, GREEN, ORANGE, figure_of, save_figure

__all__ = ["radius_figure", "spectra_figure", "training_figure"]


def training_figure(
    path: Path, history: Sequence[Mapping[str, float]], title: str, followed: float = 0.5
) -> Path:
    """Loss and accuracies against the epoch; `followed` is the radius of the last one."""
    figure = figure_of(9.0, 4.4)
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    left.plot(epochs, [row["loss"] for row in history], color=GRAY, lw=2)
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    curves = (
        ("test_accuracy", "test", BLUE, "-"),
        ("train_accuracy", "training (augmented)", GREEN, "--"),
        ("test_margin_accuracy", f"test, margin for radius {followed:g}", ORANGE, "-."),
    )
    for key, label, color, dash in curves:
        values = [100 * row[key] for row in history]
        label = f"{label}: {values[-1]:.1f} %"
        right.plot(epochs, values, dash, color=color, lw=2, label=label)
    low = min(100 * row["test_margin_accuracy"] for row in history[len(history) // 4 :])
    bottom = min(90, 10 * math.floor(low / 10))
    right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(bottom, 100))
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False)
    figure.suptitle(title)
    return save_figure(figure, path, left, right)


def radius_figure(
    path: Path,
    radii: Sequence[float],
    attacked: Mapping[float, float],
    marked: Mapping[float, float],
    title: str,
    norm: str = "l2",
) -> Path:
    """Certified accuracy against the radius, below the accuracy under attack.

    Args:
        path: The file.
        radii: Certified radius of every test image, 0 where it is misclassified.
        attacked: Accuracy under attack at some radii.
        marked: Certified accuracy at the radii to be labeled.
        title: Title of the picture.
        norm: The norm of the radii, "l2" or "linf".
    """
    figure = figure_of(7.2, 4.6)
    axes = figure.subplots()
    number = len(radii)
    certified = sorted(r for r in radii if r > 0)
    x = [0.0, *certified]
    y = [100 * len(certified) / number]
    y += [100 * (len(certified) - i - 1) / number for i in range(len(certified))]
    survived = {radius: 100 * value for radius, value in attacked.items()}
    alive = [radius for radius, value in survived.items() if value >= 1.0]
    limit = 1.08 * max([*marked, *alive, 0.1])
    sign = {"l2": "2", "linf": r"\infty"}[norm]
    axes.step(x, y, where="post", color=BLUE, lw=2.2, label="certified: no attack can succeed")
    axes.fill_between(x, y, step="post", color=BLUE, alpha=0.12, lw=0)
    axes.plot(
        list(survived),
        list(survived.values()),
        "--o",
        color=ORANGE,
        lw=2,
        ms=5,
        label="right after a PGD attack of that radius",
    )
    level, before = 0, -math.inf
    for radius, value in sorted(marked.items()):
        level = level + 1 if radius - before < 0.11 * limit else 0  # labels would overlap
        before = radius
        axes.plot([radius, radius], [0, 100 * value], ":", color=BLUE, lw=1.2)
        axes.plot([radius], [100 * value], "s", color=BLUE, ms=5)
        last = radius > 0.85 * limit
        axes.annotate(
            f"{100 * value:.1f} %\nat {radius:.3g}",
            (radius, 3 + 11 * level),
            xytext=(-4 if last else 4, 0),
            textcoords="offset points",
            ha="right" if last else "left",
            va="bottom",
            color=BLUE,
            fontsize=9,
            bbox={"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1},
        )
    axes.set(
        xlabel=rf"$\ell_{sign}$ radius of the perturbation (pixels in [0, 1])",
        ylabel="accuracy on the test images (%)",
        xlim=(0, limit),
        ylim=(0, 102),
        title=title,
    )
    axes.legend(loc="upper right", frameon=False)
    return save_figure(figure, path, axes)


def spectra_figure(path: Path, spectra: Sequence[Spectrum], title: str) -> Path:
    """Singular values of every layer, one small picture each."""
    columns = 2 if len(spectra) in (2, 4) else min(3, len(spectra))
    rows = math.ceil(len(spectra) / columns)
    figure = figure_of(3.1 * columns + 0.4, 2.4 * rows + 0.7)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    used, top = [], max([1.12, *(1.05 * spectrum.values[0] for spectrum in spectra)])
    for axes, spectrum in zip(grid.flat, spectra, strict=False):
        values = spectrum.values
        axes.axhline(1.0, color=GRAY, lw=1, ls=":")
        axes.plot(range(1, len(values) + 1), values, color=BLUE, lw=2.2)
        axes.set_title(f"{spectrum.layer}\n{spectrum.operator}", fontsize=9)
        note = f"max {values[0]:.7f}\nmin {values[-1]:.7f}"
        axes.text(
            0.04, 0.06, note, transform=axes.transAxes, fontsize=8, family="monospace", va="bottom"
        )
        axes.set(ylim=(0, top), xlim=(0, len(values) + 1))
        used.append(axes)
    for axes in grid.flat[len(spectra) :]:
        axes.set_visible(False)
    figure.supxlabel("index, largest first", fontsize=10)
    figure.supylabel("singular value", fontsize=10)
    figure.suptitle(title)
    return save_figure(figure, path, *used)
