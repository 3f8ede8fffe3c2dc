"""The picture of a comparison of methods."""

from __future__ import annotations

from pathlib import Path

from orthonet.recipes.running.figures import BLUE, GRAY, ORANGE, figure_of, save_figure
from orthonet.recipes.zoo.report import ZooReport

__all__ = ["zoo_figure"]

_SHADES = ("#C6DBEF", "#9ECAE1", "#6BAED6", "#4292C6", "#2171B5", "#08519C", "#08306B")


def zoo_figure(path: Path, report: ZooReport) -> Path:
    """Certified accuracy of each method at each radius, and what a step costs it."""
    rows = [row for row in report.rows() if "accuracy" in row][::-1]
    radii = report.radii
    figure = figure_of(9.6, 1.6 + 0.36 * max(4, len(rows)))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    names = [row["method"] for row in rows]
    places = range(len(rows))
    left.barh(
        places, [100 * r["accuracy"] for r in rows], color="0.9", height=0.8, label="accuracy"
    )
    for i, radius in enumerate(radii):
        left.barh(
            places,
            [100 * row["certified"][i] for row in rows],
            color=_SHADES[i * (len(_SHADES) - 1) // max(1, len(radii) - 1)],
            height=0.8,
            label=f"certified at {radius:.3g}",
        )
    middle = min(range(len(radii)), key=lambda i: abs(radii[i] - 0.5))
    for place, row in zip(places, rows, strict=True):
        # attacks are made at positive radii only
        attacked = row["attacked"][middle - sum(r <= 0 for r in radii)]
        label = f"under attack at {radii[middle]:g}" if place == 0 else None
        left.plot([100 * attacked] * 2, [place - 0.4, place + 0.4], color=ORANGE, lw=2, label=label)
    left.set(xlabel="test images (%)", xlim=(0, 100), yticks=list(places), yticklabels=names)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, ncols=3)
    seconds = [1e3 * row["seconds_per_step"] for row in rows]
    right.plot(seconds, list(places), "o", color=BLUE, label="ms a training step")
    memory = [row["saved_bytes"] / 2**20 for row in rows]
    right.plot(memory, list(places), "s", color=GRAY, label="MB kept for backward")
    costs = [*seconds, *memory] or [1.0]  # no run may have stayed finite
    low, high = min(costs), max(costs)
    ticks = [m * 10.0**e for e in range(-3, 6) for m in (1, 2, 5)]
    ticks = [t for t in ticks if low / 2.5 <= t <= 2.5 * high]
    right.set(xscale="log", xlabel="cost, logarithmic", xlim=(ticks[0], ticks[-1]))
    right.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    right.minorticks_off()
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    figure.suptitle(f"{report.config['dataset']}: one network, its layer swapped")
    return save_figure(figure, path, left, right)
