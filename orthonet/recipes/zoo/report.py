"""What came out of a comparison of methods, as text, as a table, as JSON."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["HEADER", "ZooReport"]

HEADER = (
    "method",
    "seeds",
    "accuracy",
    "certified",
    "spread",
    "attacked",
    "average radius",
    "constant",
    "ms a step",
    "saved MB",
    "parameters",
    "epochs",
    "broken",
    "not finite",
)


@dataclasses.dataclass(frozen=True)
class ZooReport:
    """The runs of a comparison.

    Attributes:
        config: What was run, as plain values.
        runs: One dictionary for each method and seed.
        files: What was written.
        choices: Learning rate and loss radius of each method, and what the others reached.
        skipped: A sentence for each method that cannot run here.
    """

    config: Mapping[str, Any]
    runs: tuple[Mapping[str, Any], ...]
    files: tuple[Path, ...] = ()
    choices: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    @property
    def radii(self) -> list[float]:
        """The radii of the certified accuracies."""
        return list(self.config["radii"])

    def rows(self) -> list[dict[str, Any]]:
        """Return means over the seeds, one row for each method, the best average radius first.

        The spread is the standard deviation of the certified accuracies, with the number of seeds
        as its divisor. The numbers of attacked, broken and non-finite results are sums; of a method
        none of whose runs was finite only these are there.
        """
        rows = []
        for name in dict.fromkeys(run["method"] for run in self.runs):
            every = [run for run in self.runs if run["method"] == name]
            good = [run for run in every if run["finite"]]
            row: dict[str, Any] = {
                "method": name,
                "seeds": len(every),
                "not_finite": len(every) - len(good),
                "attempts": sum(run["attempts"] for run in good),
                "broken": sum(run["broken"] for run in good),
            }
            if good:
                for key in ("accuracy", "average_radius", "parameters", "epochs"):
                    row[key] = _mean(run[key] for run in good)
                for key in ("certified", "attacked"):
                    row[key] = [_mean(v) for v in zip(*(r[key] for r in good), strict=True)]
                row["spread"] = [
                    statistics.pstdev(v) for v in zip(*(r["certified"] for r in good), strict=True)
                ]
                row["constant"] = max(run["constant"] for run in good)
                row["seconds_per_step"] = min(run["seconds_per_step"] for run in good)
                row["saved_bytes"] = max(run["saved_bytes"] for run in good)
            rows.append(row)
        return sorted(rows, key=lambda row: -row.get("average_radius", -1.0))

    def cells(self) -> list[list[str]]:
        """The rows as text, in the order of `HEADER`."""
        cells = []
        for row in self.rows():
            if "accuracy" not in row:
                seeds, missing = str(row["seeds"]), ["-"] * (len(HEADER) - 3)
                cells.append([row["method"], seeds, *missing, str(row["not_finite"])])
                continue
            cells.append(
                [
                    row["method"],
                    str(row["seeds"]),
                    _percent(row["accuracy"]),
                    _percents(row["certified"]),
                    _percents(row["spread"]) if row["seeds"] > 1 + row["not_finite"] else "-",
                    _percents(row["attacked"]),
                    f"{row['average_radius']:.3f}",
                    f"{row['constant']:.7f}",
                    f"{1e3 * row['seconds_per_step']:.1f}",
                    f"{row['saved_bytes'] / 2**20:.1f}",
                    f"{row['parameters']:.0f}",
                    f"{row['epochs']:.3g}",
                    f"{row['broken']} of {row['attempts']}",
                    str(row["not_finite"]),
                ]
            )
        return cells

    def line(self, run: Mapping[str, Any]) -> str:
        """One run as a line of text."""
        start = f"{run['method']:<19} seed {run['seed']}"
        if not run["finite"]:
            return f"{start}  NOT FINITE: {run.get('reason', 'a parameter')}"
        return (
            f"{start}  {_percent(run['accuracy'])} clean, certified "
            f"{_percents(run['certified'])}, {1e3 * run['seconds_per_step']:.1f} ms a step, "
            f"{run['broken']} of {run['attempts']} broken"
        )

    def summary(self) -> str:
        """The comparison as a text table."""
        radii = "/".join(f"{r:g}" for r in self.radii)
        config = self.config
        fixed = (
            f"{config['budget']:g} CPU seconds"
            if config["budget"]
            else f"{config['epochs']} epochs"
        )
        lines = [
            f"{config['dataset']}, {config['parameters']} parameters, {fixed}; accuracies in %, "
            f"certified and under attack at l2 {radii}; means of the seeds, constant: largest",
            *_aligned(HEADER, self.cells()),
            *self.skipped,
        ]
        if self.files:
            lines += ["written:", *(f"  {path}" for path in self.files)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the file names, as JSON can hold it."""
        return {
            "config": dict(self.config),
            "choices": dict(self.choices),
            "runs": [dict(run) for run in self.runs],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ZooReport:
        """The inverse of `to_dict`."""
        return cls(content["config"], tuple(content["runs"]), choices=content.get("choices", {}))


def _mean(values: Any) -> float:
    return statistics.fmean(values)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _percents(values: Sequence[float]) -> str:
    return " / ".join(map(_percent, values))


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
