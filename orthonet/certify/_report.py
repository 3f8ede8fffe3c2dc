"""The report of a certificate: one HTML page without any external resource."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.metadata import version

import torch

from orthonet import _checks
from orthonet.certify._bound import Bound
from orthonet.certify._certificate import LipschitzCertificate
from orthonet.certify._radius import RadiusCurve

__all__ = ["report_html"]

_WIDTH, _HEIGHT = 640.0, 300.0
_LEFT, _BOTTOM, _TOP, _RIGHT = 52.0, 42.0, 12.0, 12.0

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #5b6470;
  --line: #d9dee4; --blue: #0a6ab6; --orange: #c2500a; --bar: #0a6ab633; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --paper: #14181d; --soft: #9aa5b1;
  --line: #323a43; --blue: #5db3f0; --orange: #f29a4d; --bar: #5db3f033; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.note { color: var(--soft); font-size: .9rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem;
  margin: 0; }
.facts div { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.facts dt { color: var(--soft); font-size: .85rem; } .facts dd { margin: 0; font-size: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; overflow-wrap: normal; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.bar { min-width: 7rem; } td.bar i { display: block; height: .8rem; background: var(--blue);
  border-radius: .2rem; } td.bar i.down { background: var(--line); }
figure { margin: 1rem 0; } figcaption { color: var(--soft); font-size: .85rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr));
  gap: 1rem; } .grid figure { margin: 0; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 15px; }
.axis { stroke: var(--line); fill: none; } .certified { stroke: var(--blue); fill: none;
  stroke-width: 2.5; } .under { fill: var(--bar); stroke: none; }
.attacked { stroke: var(--orange); fill: none; stroke-width: 2.5; stroke-dasharray: 7 5; }
.dot { fill: var(--orange); } .key-c { color: var(--blue); } .key-a { color: var(--orange); }
"""


def report_html(
    certificate: LipschitzCertificate,
    *,
    title: str = "Lipschitz certificate",
    estimate: Bound | None = None,
    spectra: Iterable[tuple[str, str, Sequence[float]]] = (),
    curve: RadiusCurve | None = None,
    attacked: Mapping[float, float] | None = None,
) -> str:
    """A certificate as one self-contained HTML page: no script, no font, no link.

    Args:
        certificate: What `certify` returned.
        title: The heading of the page.
        estimate: What was found from below, to show how far the bound may be from the truth;
            by default the `lower` of the certificate, from which all rounding is taken off.
        spectra: (layer, operator, singular values from the largest) of each layer.
        curve: The certified accuracy, see `certified_curve`.
        attacked: The accuracy under an attack, by radius.

    Returns:
        The page; it follows the light or dark scheme of the reader and fits narrow screens.

    Raises:
        ValueError: `estimate` is a bound.
    """
    if estimate is not None:
        _checks.require(
            estimate.kind == "estimate", "report_html", "estimate must come from below",
            "Pass what lipschitz_estimate returns", estimate=estimate,
        )  # fmt: skip
    estimate = certificate.lower if estimate is None else estimate
    parts = [_facts(certificate, estimate, curve), _table(certificate)]
    if curve is not None:
        parts.append(_accuracy(curve, attacked or {}))
    figures = [_spectrum(*entry) for entry in spectra]
    if figures:
        parts.append(
            '<h2>Singular values</h2><p class="note">Of every layer as a linear operator on its '
            "input, largest first, computed numerically.</p>"
            f'<div class="grid">{"".join(figures)}</div>'
        )
    versions = (
        f"orthonet {version('orthonet')}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>{''.join(parts)}"
        f'<p class="note">{escape(versions)}</p></body></html>\n'
    )


def _facts(
    certificate: LipschitzCertificate, estimate: Bound | None, curve: RadiusCurve | None
) -> str:
    constant = certificate.constant
    name = "exact constant" if constant.kind == "exact" else "proved upper bound"
    facts = [(f"{name} ({constant.norm})", f"{constant.value:.9g}")]
    if estimate is not None:
        facts.append(("reached by a secant", f"{estimate.value:.6g}"))
        if estimate.value > 0:
            facts.append(("at most too large by", f"{constant.value / estimate.value:.3g} times"))
    shape = "×".join(map(str, certificate.input_shape))
    facts.append(("input of one sample", shape))
    if curve is not None:
        facts.append(("clean accuracy", f"{curve.clean:.1%} of {curve.samples}"))
        facts.append((f"average certified radius ({curve.norm})", f"{curve.area:.4g}"))
    cells = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    return f'<dl class="facts">{cells}</dl>'


def _table(certificate: LipschitzCertificate) -> str:
    logs = [
        math.log(row.constant) if 0 < row.constant < math.inf else 0.0 for row in certificate.rows
    ]
    largest = max([0.05, *map(abs, logs)])  # rounding alone fills no bar
    lines = []
    for row, value in zip(certificate.rows, logs, strict=True):
        width = 100 * abs(value) / largest
        bar = f'<i class="{"up" if value > 0 else "down"}" style="width:{width:.1f}%"></i>'
        cells = [row.path, row.op, "×".join(map(str, row.input_shape))]
        numbers = [f"{row.constant:.7g}", f"{row.cumulative:.7g}"]
        lines.append(
            "<tr>"
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + "".join(f'<td class="number">{n}</td>' for n in numbers)
            + f'<td class="bar">{bar if width >= 0.05 else ""}</td>'
            + f"<td>{escape(row.kind)}</td><td>{escape(row.method)}</td>"
            + f'<td class="number">{row.seconds:.2f}</td></tr>'
        )
    head = (
        "<tr><th>module</th><th>operation</th><th>input</th><th class=number>constant</th>"
        "<th class=number>cumulative</th><th>log of constant</th><th>kind</th><th>method</th>"
        "<th class=number>s</th></tr>"
    )
    return (
        "<h2>Layers</h2><p class=note>What each operation contributes to the bound. The bars are "
        "the logarithms of the constants: the bound grows where they are long and blue, and "
        "shrinks where they are grey.</p>"
        f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table>'
        "</div>"
    )


def _accuracy(curve: RadiusCurve, attacked: Mapping[float, float]) -> str:
    found = curve.radii[curve.radii > 0]
    finite = found[found.isfinite()]
    alive = [radius for radius, value in attacked.items() if value > 0.01]
    limit = 1.05 * max([float(finite.max()) if len(finite) else 0.0, *alive, 1e-12])
    steps, share = [(0.0, curve.clean)], 1.0 / max(1, curve.samples)
    level = len(found)
    steps.append((0.0, level * share))
    for radius in sorted(finite.tolist()):
        steps += [(radius, level * share), (radius, (level - 1) * share)]
        level -= 1
    steps.append((limit, level * share))
    line = _points(steps, limit)
    area = _points([*steps, (limit, 0.0), (0.0, 0.0)], limit)
    shapes = [f'<polygon class="under" points="{area}"/>']
    shapes.append(f'<polyline class="certified" points="{line}"/>')
    dots = sorted((radius, value) for radius, value in attacked.items() if radius <= limit)
    if dots:
        shapes.append(f'<polyline class="attacked" points="{_points(dots, limit)}"/>')
        for point in _points(dots, limit).split():
            x, y = point.split(",")
            shapes.append(f'<circle class="dot" cx="{x}" cy="{y}" r="4"/>')
    key = '<span class="key-c">━ certified: no perturbation can succeed</span>'
    if dots:
        key += ' · <span class="key-a">╌ right under attack</span>'
    svg = _svg(shapes, limit, f"radius ({curve.norm}, units of the input)", 1.0, percent=True,
               label="Certified and attacked accuracy against the radius")  # fmt: skip
    figure = f'<figure style="max-width: 44rem">{svg}<figcaption>{key}</figcaption></figure>'
    return f"<h2>Accuracy</h2>{figure}"


def _spectrum(layer: str, operator: str, values: Sequence[float]) -> str:
    top = 1.1 * max([*values, 1e-300])
    limit = max(1.0, float(len(values) - 1))
    line = _points([(float(i), v) for i, v in enumerate(values)], limit, top)
    if len(values) == 1:
        line = _points([(0.0, values[0]), (1.0, values[0])], limit, top)
    svg = _svg([f'<polyline class="certified" points="{line}"/>'], limit, "index", top,
               label=f"Singular values of {layer}")  # fmt: skip
    caption = f"<b>{escape(layer)}</b> {escape(operator)}: {values[0]:.6g} … {values[-1]:.6g}"
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


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
    marks = []
    for i in range(5):
        x, y = limit * i / 4, top * i / 4
        spot = _points([(x, y)], limit, top).split(",")
        down = _HEIGHT - _BOTTOM
        anchor = "end" if i == 4 else "middle"
        marks.append(f'<text x="{spot[0]}" y="{down + 18:g}" text-anchor="{anchor}">{x:.3g}</text>')
        text = f"{100 * y:.0f}%" if percent else f"{y:.2g}"
        marks.append(f'<text x="{_LEFT - 6:g}" y="{float(spot[1]) + 5:.1f}" text-anchor="end">')
        marks.append(f"{text}</text>")
        marks.append(f'<path class="axis" d="M{_LEFT:g} {spot[1]}H{_WIDTH - _RIGHT:g}"/>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    marks.append(
        f'<text x="{middle:g}" y="{_HEIGHT - 4:g}" text-anchor="middle">{escape(axis)}</text>'
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{escape(label)}">'
        f"{''.join(marks)}{''.join(shapes)}</svg>"
    )
