"""What the pictures of all recipes share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orthonet.recipes.data.digits import require_package
from orthonet.recipes.running.files import write_atomically

__all__ = ["BLUE", "GREEN", "GRAY", "ORANGE", "figure_of", "save_figure"]

# Okabe & Ito: told apart with every kind of color vision, and in gray by their dashes.
BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#666666"


def figure_of(width: float, height: float) -> Any:
    """Return an empty matplotlib figure; its size is in inches."""
    module = require_package("matplotlib.figure", "matplotlib")
    return module.Figure(figsize=(width, height), dpi=150, layout="constrained")


def save_figure(figure: Any, path: Path, *axes: Any) -> Path:
    """Draw with Agg (no screen, no global state) and write the PNG file."""
    for each in axes:
        each.grid(color="0.9")
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    require_package("matplotlib.backends.backend_agg", "matplotlib").FigureCanvasAgg(figure)
    return write_atomically(path, lambda file: figure.savefig(file, format="png"))
