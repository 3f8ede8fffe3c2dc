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
from orthonet.certify._radius import RadiusCurve, check_radii
from orthonet.certify.report.figures import STYLE, accuracy_figure, spectrum_figure

__all__ = ["accuracy_table", "report_html"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #5b6470;
  --line: #d9dee4; --blue: #0a6ab6; --orange: #c2500a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --paper: #14181d; --soft: #9aa5b1;
  --line: #323a43; --blue: #5db3f0; --orange: #f29a4d; } }
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
.key-c { color: var(--blue); } .key-a { color: var(--orange); }
"""


def report_html(
    certificate: LipschitzCertificate,
    *,
    title: str = "Lipschitz certificate",
    estimate: Bound | None = None,
    spectra: Iterable[tuple[str, str, Sequence[float]]] = (),
    curve: RadiusCurve | None = None,
    attacked: Mapping[float, float] | None = None,
    radii: Sequence[float] = (),
) -> str:
    """Return a certificate as one self-contained HTML page: no script, no font, no link.

    Args:
        certificate: What `certify` returned.
        title: The heading of the page.
        estimate: What was found from below, to show how far the bound may be from the truth;
            by default the `lower` of the certificate, from which all rounding is taken off.
        spectra: (layer, operator, singular values from the largest) of each layer.
        curve: The certified accuracy, see `certified_curve`.
        attacked: The accuracy under an attack, by radius.
        radii: Radii for the table of accuracies; those of `attacked` are in it anyway.

    Returns:
        The page; it follows the light or dark scheme of the reader and fits narrow screens.

    Raises:
        ValueError: `estimate` is a bound.
    """
    _checks.require(
        isinstance(certificate, LipschitzCertificate),
        "report_html",
        "certificate must be a LipschitzCertificate",
        "Pass what orthonet.certify(model, x) returns",
        certificate=certificate,
    )
    _checks.require(
        curve is None or isinstance(curve, RadiusCurve),
        "report_html",
        "curve must be a RadiusCurve, or None",
        "Pass what certified_curve(model, loader) returns",
        curve=curve,
    )
    _checks.require(
        attacked is None or isinstance(attacked, Mapping),
        "report_html",
        "attacked must map radii to accuracies, or be None",
        "Pass the attacked of evaluate(model, loader, radii)",
        attacked=attacked,
    )
    _checks.require(
        isinstance(title, str),
        "report_html",
        "title must be a string",
        "Name the page",
        title=title,
    )
    check_radii("report_html", radii)
    if estimate is not None:
        _checks.require(
            estimate.kind == "estimate",
            "report_html",
            "estimate must come from below",
            "Pass what lipschitz_estimate returns",
            estimate=estimate,
        )
    estimate = certificate.lower if estimate is None else estimate
    parts = [_facts(certificate, estimate, curve)]
    if curve is not None:
        parts.append(_accuracy(curve, attacked or {}, radii))
    parts.append(_table(certificate))
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
        f"<title>{escape(title)}</title><style>{_STYLE}{STYLE}</style></head><body>"
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
    largest = max([0.0, *map(abs, logs)])
    bars = largest > 1e-3  # what rounding leaves of a 1-Lipschitz network fills no bar
    lines = []
    for row, value in zip(certificate.rows, logs, strict=True):
        width = 100 * abs(value) / largest if bars else 0.0
        bar = f'<i class="{"up" if value > 0 else "down"}" style="width:{width:.1f}%"></i>'
        cells = [row.path, row.op, "×".join(map(str, row.input_shape))]
        numbers = [f"{row.constant:.7g}", f"{row.cumulative:.7g}"]
        lines.append(
            "<tr>"
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + "".join(f'<td class="number">{n}</td>' for n in numbers)
            + (f'<td class="bar">{bar if width >= 0.05 else ""}</td>' if bars else "")
            + f"<td>{escape(row.kind)}</td><td>{escape(row.method)}</td>"
            + f'<td class="number">{row.seconds:.2f}</td></tr>'
        )
    head = (
        "<tr><th>module</th><th>operation</th><th>input</th><th class=number>constant</th>"
        f"<th class=number>cumulative</th>{'<th>log of constant</th>' if bars else ''}<th>kind</th>"
        "<th>method</th><th class=number>s</th></tr>"
    )
    note = (
        " The bars are the logarithms of the constants: the bound grows where they are long and "
        "blue, and shrinks where they are gray."
    )
    return (
        f"<h2>Layers</h2><p class=note>What each operation contributes to the bound."
        f"{note if bars else ''}</p>"
        f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table>'
        "</div>"
    )


def _accuracy(curve: RadiusCurve, attacked: Mapping[float, float], radii: Sequence[float]) -> str:
    key = '<span class="key-c">━ certified: no perturbation can succeed</span>'
    if attacked:
        key += ' · <span class="key-a">╌ right under attack</span>'
    marks = sorted({*radii, *attacked})
    limit = None
    if radii:  # what was asked for fills the figure
        limit = 1.05 * max([*radii, 1e-12])
    figure = (
        f'<figure style="max-width: 44rem">{accuracy_figure(curve, attacked, limit)}'
        f"<figcaption>{key}</figcaption></figure>"
    )
    return f"<h2>Accuracy</h2>{accuracy_table(curve, attacked, marks) if marks else ''}{figure}"


def accuracy_table(
    curve: RadiusCurve, attacked: Mapping[float, float], radii: Sequence[float]
) -> str:
    """Clean, certified and attacked accuracy at each radius, as an HTML table."""
    names = ["radius", "clean", "certified", *(["attacked"] if attacked else [])]
    head = "".join(f"<th class=number>{name}</th>" for name in names)
    lines = []
    for radius in radii:
        values = [curve.clean, curve.at(radius)]
        values += [attacked.get(radius, math.nan)] if attacked else []
        cells = [f"{radius:g}", *("-" if math.isnan(v) else f"{v:.2%}" for v in values)]
        lines.append("".join(f'<td class="number">{cell}</td>' for cell in cells))
    body = "".join(f"<tr class=radius>{line}</tr>" for line in lines)
    return (
        f'<div class="scroll"><table style="width: auto"><thead><tr class=radius>{head}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def _spectrum(layer: str, operator: str, values: Sequence[float]) -> str:
    caption = f"<b>{escape(layer)}</b> {escape(operator)}: {values[0]:.6g} … {values[-1]:.6g}"
    figure = spectrum_figure(layer, values)
    return f"<figure>{figure}<figcaption>{caption}</figcaption></figure>"
