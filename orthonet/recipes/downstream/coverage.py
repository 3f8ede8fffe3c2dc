"""What coverage over many splits looks like, in lines and in a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from orthonet.recipes.running.figures import BLUE, GRAY, GREEN, ORANGE

__all__ = ["coverage_lines", "coverage_picture", "mean_and_range"]

_CURVES = {
    "attacked": (ORANGE, "--o", "plain, under attack"),
    "worst": (GRAY, "-s", "plain, proved worst case"),
    "robust": (GREEN, "-o", "robust, under attack"),
}


def mean_and_range(values: Sequence[float]) -> dict[str, float]:
    """The mean of some values, the least and the largest of them."""
    return {"mean": statistics.fmean(values), "least": min(values), "largest": max(values)}


def coverage_lines(
    rows: Sequence[Mapping[str, Any]], size: str, alpha: float, splits: int
) -> tuple[str, ...]:
    """A table of coverage: a line for each eps, the means over the splits."""
    head = f"{'eps':>6} {'plain':>8} {'attacked':>9} {'proved':>8} {'robust':>8} {'':>3}"
    head += f"{size + ', plain':>14} {size + ', robust':>15}"
    lines = [
        f"coverage wanted {1 - alpha:g}; means over {splits} splits; proved is the worst case of "
        "plain, robust is under attack",
        head,
    ]
    for row in rows:
        share = [row[name]["mean"] for name in ("clean", "attacked", "worst", "robust")]
        text = (
            f"{row['eps']:>6g} {share[0]:>8.3f} {share[1]:>9.3f} {share[2]:>8.3f} {share[3]:>8.3f}"
        )
        lines.append(
            f"{text} {'':>3}{row['plain_size']['mean']:>14.3f} {row['robust_size']['mean']:>15.3f}"
        )
    return tuple(lines)


def coverage_picture(axes: Any, rows: Sequence[Mapping[str, Any]], alpha: float) -> None:
    """Draw coverage over eps, its range over the splits shaded."""
    eps = [row["eps"] for row in rows]
    for name, (color, dash, label) in _CURVES.items():
        axes.plot(eps, [row[name]["mean"] for row in rows], dash, color=color, label=label, ms=4)
        least, largest = ([row[name][end] for row in rows] for end in ("least", "largest"))
        axes.fill_between(eps, least, largest, color=color, alpha=0.12, lw=0)
    axes.axhline(1.0 - alpha, color=BLUE, lw=1, ls=":", label=f"wanted, {1 - alpha:g}")
    axes.set(xlabel=r"$\ell_2$ perturbation", ylabel="coverage", ylim=(-0.02, 1.02))
    axes.legend(frameon=False, loc="lower left", fontsize=8)
