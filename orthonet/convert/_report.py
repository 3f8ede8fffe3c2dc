"""What a conversion did to each module, and why it left some alone."""

from __future__ import annotations

import dataclasses

__all__ = ["ConversionReport", "ConversionRow"]


@dataclasses.dataclass(frozen=True)
class ConversionRow:
    r"""One module of the model that was converted.

    Attributes:
        name: Its path in the model; a module used at several places has all of them, by comma.
        action: "changed", "skipped" (it has parameters and stayed), or "noted" (something in the
            code of `forward`, which no exchange of modules reaches).
        before: The class it had.
        after: What stands in its place, empty unless it was changed.
        reason: Why it was skipped, or what differs now.
        moved: \(\|W_{new} - W\|_F / \|W\|_F\) where a weight was projected, else None.
    """

    name: str
    action: str
    before: str
    after: str = ""
    reason: str = ""
    moved: float | None = None


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """The rows of a conversion; `print` shows them as a table.

    Attributes:
        rows: One for each module with parameters, in the order of `model.modules()`.
    """

    rows: tuple[ConversionRow, ...]

    @property
    def changed(self) -> tuple[ConversionRow, ...]:
        """The rows of modules that were replaced."""
        return tuple(row for row in self.rows if row.action == "changed")

    @property
    def skipped(self) -> tuple[ConversionRow, ...]:
        """The rows of modules with parameters that stayed as they were."""
        return tuple(row for row in self.rows if row.action == "skipped")

    @property
    def notes(self) -> tuple[ConversionRow, ...]:
        """What the code of `forward` does that is not 1-Lipschitz and no module."""
        return tuple(row for row in self.rows if row.action == "noted")

    def summary(self) -> str:
        """The table, with a line of totals."""
        head = ("module", "was", "is", "moved", "remark")
        lines: list[tuple[str, ...]] = [head]
        for row in self.rows:
            moved = "" if row.moved is None else f"{row.moved:.3f}"
            now = row.after if row.action == "changed" else row.action
            lines.append((row.name or "<root>", row.before, now, moved, row.reason))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        text.insert(1, "  ".join("-" * w for w in widths))
        text.append(
            f"{len(self.changed)} changed, {len(self.skipped)} skipped, {len(self.notes)} noted"
        )
        return "\n".join(text)

    def __str__(self) -> str:
        return self.summary()
