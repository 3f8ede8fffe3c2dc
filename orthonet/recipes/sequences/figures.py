"""The pictures of a run on sequences, as PNG files."""

from __future__ import annotations

from pathlib import Path

from orthonet.recipes.running.figures import BLUE, GRAY, GREEN, ORANGE, figure_of, save_figure
from orthonet.recipes.sequences.report import SequenceReport

__all__ = ["PURPLE", "gradient_figure", "learning_figure"]

PURPLE = "#CC79A7"
_STYLES = {
    "orthonet": ("orthonet OrthoRNN", BLUE, "-"),
    "lstm": ("nn.LSTM", ORANGE, "--"),
    "torch": ("nn.RNN, torch orthogonal", GREEN, "-."),
    "geotorch": ("nn.RNN, geotorch", PURPLE, ":"),
}
_SMALLEST = 1e-12  # what a logarithmic axis can show of a gradient that has vanished


def learning_figure(path: Path, report: SequenceReport) -> Path:
    """Loss and score of the training batches against the optimizer step."""
    figure = figure_of(9.0, 4.4)
    left, right = figure.subplots(1, 2)
    for result in report.results:
        label, color, dash = _STYLES[result.model]
        steps = [row["iteration"] for row in result.history]
        losses = [row["loss"] for row in result.history]
        scores = [100 * row["score"] for row in result.history]
        left.semilogy(steps, losses, dash, color=color, lw=2, label=f"{label}: {losses[-1]:.2g}")
        right.plot(steps, scores, dash, color=color, lw=2, label=f"{label}: {scores[-1]:.0f} %")
    left.axhline(report.config.baseline, color=GRAY, lw=1, ls=":", label="without memory")
    copying = report.config.task == "copying"
    left.set(xlabel="optimizer step", ylabel="cross-entropy")
    right.set(
        xlabel="optimizer step",
        ylabel="symbols recalled (%)" if copying else "accuracy (%)",
        ylim=(0, 102),
    )
    for axes in (left, right):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False, fontsize=9)
    figure.suptitle(f"{report.config.title}, hidden {report.config.hidden}")
    return save_figure(figure, path, left, right)


def gradient_figure(path: Path, report: SequenceReport) -> Path:
    """Norm of the gradient of the last step's loss by the state, along time."""
    figure = figure_of(7.2, 4.6)
    axes = figure.subplots()
    lowest, highest = 0.1, 1.0  # a decade at least, so that what is flat looks flat
    for result in report.results:
        label, color, dash = _STYLES[result.model]
        last = max(result.flow[-1], _SMALLEST)
        values = [max(value / last, _SMALLEST) for value in result.flow]
        steps = range(1, len(values) + 1)
        axes.semilogy(steps, values, dash, color=color, lw=2, label=f"{label}: {values[0]:.2g}")
        lowest, highest = min(lowest, *values), max(highest, *values)
    axes.set(
        ylim=(lowest / 2, highest * 2),
        xlabel="time step t",
        ylabel=r"$\|\partial L_T / \partial h_t\|$ relative to t = T",
        title=f"{report.config.title}: the gradient of the last step's loss, after training",
    )
    axes.legend(title="value at t = 1", loc="lower right", frameon=False)
    return save_figure(figure, path, axes)
