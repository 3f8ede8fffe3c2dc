"""The rows of a training, in a file of comma-separated values and, if wanted, in TensorBoard."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from orthonet import _checks
from orthonet.recipes.running.files import write_csv

__all__ = ["Log", "writer_class"]


class Log:
    """Write every row of a history as soon as it is there.

    Args:
        folder: The folder of the run; nothing is written without it.
        step: The column that counts.
        history: Rows that are there already.
        name: The file is NAME.csv, and events lie in `tensorboard/NAME` (in `tensorboard` if it is
            "log").
        tensorboard: Whether to write events; those of a killed run after `history` are replaced.

    Raises:
        ModuleNotFoundError: `tensorboard` is asked for and missing.
    """

    def __init__(
        self,
        folder: Path | None,
        step: str,
        history: list[dict[str, float]],
        *,
        name: str = "log",
        tensorboard: bool = False,
    ) -> None:
        self.path = folder and folder / f"{name}.csv"
        self.step, self.rows = step, list(history)
        self.writer: Any = None
        if tensorboard and folder is not None:
            events = folder / "tensorboard" / ("" if name == "log" else name)
            purge = int(history[-1][step]) if history else 0
            self.writer = writer_class()(str(events), purge_step=purge)
            if history:  # a process may be killed between its state and its events
                self._events(history[-1])

    def add(self, row: dict[str, float]) -> None:
        """Append a row."""
        self.rows.append(row)
        if self.path is not None:
            write_csv(self.path, self.rows)
        if self.writer is not None:
            self._events(row)

    def _events(self, row: dict[str, float]) -> None:
        for name, value in row.items():
            if name != self.step:
                self.writer.add_scalar(name, value, int(row[self.step]))
        self.writer.flush()

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.writer is not None:
            self.writer.close()


def writer_class() -> Any:
    """TensorBoard's `SummaryWriter`, which torch brings and the package tensorboard carries out.

    Raises:
        ModuleNotFoundError: That package is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _checks.fail(
            "orthonet.recipes",
            "the package tensorboard must be installed",
            "Run: pip install tensorboard",
            ModuleNotFoundError,
            missing="torch.utils.tensorboard",
        )
    return SummaryWriter
