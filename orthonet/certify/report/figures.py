"""Figures as SVG text: they need no package, and look the same in a page, a notebook, a file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from orthonet import _checks
from orthonet.certify._bound import Bound, Row
from orthonet.certify._radius import RadiusCurve
from orthonet.certify.report.files import replacing

__all__ = [
    "STYLE",
    "Plot",
    "accuracy_figure",
    "accuracy_plot",
    "constants_plot",
    "spectrum_figure",
    "ticks",
]

_WIDTH, _HEIGHT = 640.0, 300.0
_LEFT, _BOTTOM, _TOP, _RIGHT = 52.0, 42.0, 12.0, 12.0
_LINE = 24.0  # height of a bar with its gap
_MOST = 24  # bars of a figure

_LIGHT = "--ink: #1b1f24; --soft: #5b6470; --line: #d9dee4; --blue: #0a6ab6; --orange: #c2500a"
_DARK = "--ink: #e7eaee; --soft: #9aa5b1; --line: #323a43; --blue: #5db3f0; --orange: #f29a4d"
STYLE = f"""
svg.orthonet {{ {_LIGHT}; width: 100%; height: auto; display: block; }}
@media (prefers-color-scheme: dark) {{ svg.orthonet {{ {_DARK}; }} }}
svg.orthonet text {{ fill: var(--soft); font: 15px system-ui, sans-serif; }}
svg.orthonet .axis {{ stroke: var(--line); fill: none; }}
svg.orthonet .certified {{ stroke: var(--blue); fill: none; stroke-width: 2.5; }}
svg.orthonet .under {{ fill: var(--blue); fill-opacity: .2; stroke: none; }}
svg.orthonet .attacked {{ stroke: var(--orange); fill: none; stroke-width: 2.5;
  stroke-dasharray: 7 5; }}
svg.orthonet .dot {{ fill: var(--orange); }} svg.orthonet .bar {{ fill: var(--blue); }}
"""
"""The style of the figures, for the page that holds them."""


@dataclass(frozen=True, repr=False)
class Plot:
    """A figure: a notebook shows it, `save` writes it, and `svg` is its text.

    Attributes:
        svg: A complete SVG file, without a script, a font or a link.
        title: What it shows.
    """

    svg: str
    title: str

    def __repr__(self) -> str:
        return f"Plot({self.title!r}): call save('figure.svg'), or show it in a notebook"

    def _repr_html_(self) -> str:
        return f'<div style="max-width: 44rem">{self.svg}</div>'

    def save(self, path: str | Path) -> None:
        """Write the figure to an SVG file.

        Args:
            path: The file, e.g. `"figure.svg"`.

        Raises:
            ValueError: The name ends otherwise: other formats need another program.
            OSError: The disk is full, or the folder is missing; an older file stays.
        """
        _checks.require(
            isinstance(path, (str, Path)) and Path(path).suffix == ".svg",
            "Plot",
            "path must end in .svg",
            "Save it so, or pass plot(ax=axes) and save the figure of matplotlib",
            path=path,
        )
        with replacing(Path(path)) as file:
            file.write(f"{self.svg}\n".encode())


def _plot(svg: str, title: str) -> Plot:
    namespace = '<svg xmlns="http://www.w3.org/2000/svg" '
    text = namespace + svg.removeprefix("<svg ").replace(">", f"><style>{STYLE}</style>", 1)
    return Plot(text, title)


def ticks(limit: float) -> list[float]:
    """At most six round numbers from 0 to `limit`: multiples of 1, 2, 2.5 or 5 times 10^k."""
    rough = limit / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1.0, 2.0, 2.5, 5.0, 10.0) if f * power >= rough * (1 - 1e-9))
    return [i * step for i in range(int(limit / step * (1 + 1e-9)) + 1)]


def accuracy_figure(
    curve: RadiusCurve, attacked: Mapping[float, float], limit: float | None = None
) -> str:
    """The certified accuracy against the radius, and the one under attack where it is known."""
    found = curve.radii[curve.radii > 0]
    finite = found[found.isfinite()]
    if limit is None:
        alive = [radius for radius, value in attacked.items() if value > 0.01]
        limit = 1.05 * max([float(finite.max()) if len(finite) else 0.0, *alive, 1e-12])
    steps = [(0.0, curve.clean), *_steps(curve, limit)]
    area = _points([*steps, (limit, 0.0), (0.0, 0.0)], limit)
    shapes = [f'<polygon class="under" points="{area}"/>']
    shapes.append(f'<polyline class="certified" points="{_points(steps, limit)}"/>')
    dots = sorted((radius, value) for radius, value in attacked.items() if radius <= limit)
    if dots:
        shapes.append(f'<polyline class="attacked" points="{_points(dots, limit)}"/>')
        for point in _points(dots, limit).split():
            x, y = point.split(",")
            shapes.append(f'<circle class="dot" cx="{x}" cy="{y}" r="4"/>')
    return _svg(
        shapes,
        limit,
        f"radius ({curve.norm}, units of the input)",
        1.0,
        percent=True,
        label="Certified and attacked accuracy against the radius",
    )


def _steps(curve: RadiusCurve, limit: float) -> list[tuple[float, float]]:
    """The corners of the staircase of certified accuracy, from just above radius 0."""
    found = curve.radii[curve.radii > 0]
    level, share = len(found), 1.0 / max(1, curve.samples)
    steps = [(0.0, level * share)]
    for radius in sorted(r for r in found.tolist() if r <= limit):
        steps += [(radius, level * share), (radius, (level - 1) * share)]
        level -= 1
    return [*steps, (limit, level * share)]


def spectrum_figure(layer: str, values: Sequence[float]) -> str:
    """Singular values from the largest."""
    top = 1.1 * max([*values, 1e-300])
    limit = max(1.0, float(len(values) - 1))
    line = _points([(float(i), v) for i, v in enumerate(values)], limit, top)
    if len(values) == 1:
        line = _points([(0.0, values[0]), (1.0, values[0])], limit, top)
    return _svg(
        [f'<polyline class="certified" points="{line}"/>'],
        limit,
        "index",
        top,
        label=f"Singular values of {layer}",
    )


def constants_plot(rows: Sequence[Row], constant: Bound, axes: Any = None) -> Plot:
    """The constant of each operation as a bar; of many the ones farthest from 1.

    Bars are as long as the constants, or, where these differ by more than a factor of 20, as their
    logarithms above that of the smallest. They are drawn into `axes` of matplotlib, too.
    """
    _check_axes(axes)
    far = sorted(range(len(rows)), key=lambda i: -_distance(rows[i].constant))[:_MOST]
    shown = [rows[i] for i in sorted(far)]
    if axes is not None:
        axes.barh(
            [f"{i} {r.path} {r.op}" for i, r in enumerate(shown)], [r.constant for r in shown]
        )
        axes.invert_yaxis()
        axes.set_xlabel("constant")
    finite = [r.constant for r in shown if 0.0 < r.constant < math.inf] or [1.0]
    high, low = max(1.0, *finite), min(1.0, *finite)
    logarithmic = high > 20.0 * low

    def length(value: float) -> float:
        value = min(max(value, 0.0), high)
        if not logarithmic:
            return value / high
        low_ = low / 2.0
        return math.log(max(value, low_) / low_) / math.log(high / low_)

    left, wide, parts = 240.0, _WIDTH - 240.0 - 90.0, []
    for i, row in enumerate(shown):
        y = _TOP + i * _LINE
        name = " ".join(dict.fromkeys([row.path, row.op]))
        name = name if len(name) <= 30 else f"{name[:29]}…"
        bar, text = wide * length(row.constant), f"{row.constant:.5g}"
        parts.append(
            f'<text x="{left - 8:g}" y="{y + 16:g}" text-anchor="end">{escape(name)}</text>'
            f'<rect class="bar" x="{left:g}" y="{y + 3:g}" width="{bar:.1f}" '
            f'height="{_LINE - 6:g}"/><text x="{left + bar + 6:.1f}" y="{y + 16:g}">{text}</text>'
        )
    bottom = _TOP + max(1, len(shown)) * _LINE
    one = left + wide * length(1.0)
    parts.append(f'<path class="axis" d="M{one:.1f} {_TOP:g}V{bottom:g}"/>')
    more = f", {len(rows) - len(shown)} nearest to 1 left out" if len(rows) > len(shown) else ""
    scale = "logarithmic, " if logarithmic else ""
    title = f"Constants of the operations ({constant.kind} for the model: {constant.value:.6g})"
    parts.append(
        f'<text x="{_WIDTH / 2:g}" y="{bottom + 24:g}" text-anchor="middle">constant '
        f"({scale}the line is 1{more})</text>"
    )
    svg = (
        f'<svg class="orthonet" viewBox="0 0 {_WIDTH:g} {bottom + 34:g}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
    return _plot(svg, title)


def _check_axes(axes: Any) -> None:
    _checks.require(
        axes is None or hasattr(axes, "barh"),
        "plot",
        "ax must be axes of matplotlib, or None",
        "Call plot().save('figure.svg') to write a file, or pass ax=plt.gca()",
        ax=axes,
    )


def _distance(constant: float) -> float:
    return abs(math.log(constant)) if 0.0 < constant < math.inf else math.inf


def accuracy_plot(curve: RadiusCurve, attacked: Mapping[float, float], axes: Any = None) -> Plot:
    """The figure of the accuracies by itself; drawn into `axes` of matplotlib, too."""
    _check_axes(axes)
    if axes is not None:
        steps = _steps(
            curve, max([*curve.radii[curve.radii.isfinite()].tolist(), *attacked, 1e-12])
        )
        axes.plot([x for x, _ in steps], [y for _, y in steps], label="certified")
        if attacked:
            axes.plot(list(attacked), list(attacked.values()), "--o", label="under attack")
        axes.set(xlabel=f"radius ({curve.norm})", ylabel="accuracy", ylim=(0, 1))
        axes.legend()
    title = "Certified accuracy" + (
        " (line) and accuracy under attack (dashed)" if attacked else ""
    )
    return _plot(accuracy_figure(curve, attacked), title)


def _points(values: Iterable[tuple[float, float]], limit: float, top: float = 1.0) -> str:
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    return " ".join(
        f"{_LEFT + wide * x / limit:.1f},{_TOP + high * (1 - y / top):.1f}" for x, y in values
    )


def _svg(
    shapes: list[str],
    limit: float,
    axis: str,
    top: float,
    *,
    label: str,
    percent: bool = False,
) -> str:
    marks, down = [], _HEIGHT - _BOTTOM
    for x in ticks(limit):
        spot = _points([(x, 0.0)], limit, top).split(",")[0]
        marks.append(f'<text x="{spot}" y="{down + 18:g}" text-anchor="middle">{x:.4g}</text>')
    for y in ticks(top):
        height = float(_points([(0.0, y)], limit, top).split(",")[1])
        text = f"{100 * y:.0f}%" if percent else f"{y:.4g}"
        marks.append(f'<text x="{_LEFT - 6:g}" y="{height + 5:.1f}" text-anchor="end">')
        marks.append(f"{text}</text>")
        marks.append(f'<path class="axis" d="M{_LEFT:g} {height:.1f}H{_WIDTH - _RIGHT:g}"/>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    marks.append(
        f'<text x="{middle:g}" y="{_HEIGHT - 4:g}" text-anchor="middle">{escape(axis)}</text>'
    )
    return (
        f'<svg class="orthonet" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" '
        f'aria-label="{escape(label)}">{"".join(marks)}{"".join(shapes)}</svg>'
    )
