"""What a conversion did to each module, and why it left some alone."""

from __future__ import annotations

import dataclasses

__all__ = ["Cause", "ConversionReport", "ConversionRow"]


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
class Cause:
    """An operation that raises the Lipschitz constant of the new model.

    Attributes:
        path: The module that it belongs to.
        operation: Its name, as in the rows of a certificate.
        factor: The constant behind it over the largest one before it.
    """

    path: str
    operation: str
    factor: float


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """The rows of a conversion; `print` shows them as a table, and the constant that results.

    Attributes:
        rows: One for each module with parameters, in the order of `model.modules()`.
        constant: The Lipschitz constant of the new model in eval mode, proved by
            [`certify`][orthonet.certify.certify] with `effort="fast"`; None without an
            `example_input`, and where nothing can be proved.
        causes: The up to three operations that raise it most, largest first.
        reason: Why there is no constant, by the words of `certify`; empty where there is one.
    """

    rows: tuple[ConversionRow, ...]
    constant: float | None = None
    causes: tuple[Cause, ...] = ()
    reason: str = ""

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

    def _last_line(self) -> str:
        if self.reason:
            return f"Lipschitz constant: none is proved. {self.reason}"
        if self.constant is None:
            return (
                "Lipschitz constant: not known. Pass example_input=x, or call "
                "orthonet.certify(model.eval(), x)"
            )
        line = f"Lipschitz constant: at most {self.constant:.6g}"
        if not self.causes:
            return line
        most = ", ".join(f"{c.path} ({c.operation}) {c.factor:.4g}" for c in self.causes)
        return f"{line}; the largest factors: {most}"

    def summary(self) -> str:
        """The table, with a line of totals and one of the constant."""
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
        text.append(self._last_line())
        return "\n".join(text)

    def __str__(self) -> str:
        return self.summary()
