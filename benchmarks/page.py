"""Write the tables of the documentation from the JSON files in benchmarks/results.

python -m benchmarks.page [--check]
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import _harness as harness
from benchmarks import (
    across_processes,
    attention,
    certificate_peers,
    certificates,
    convolutions,
    engine,
    floor,
    launches,
    linear_step,
    local_peers,
    local_radii,
    manifolds,
    optim,
    orthogonalizers,
    rnn,
)
from orthonet.recipes.running.figures import figure_of, save_figure

# Benchmarks whose page shows what they print, by the name of their JSON file.
PRINTED = {
    module.__name__.rpartition(".")[2]: module.summary
    for module in (
        orthogonalizers,
        floor,
        linear_step,
        convolutions,
        engine,
        manifolds,
        rnn,
        optim,
        across_processes,
        certificates,
        certificate_peers,
        local_peers,
        local_radii,
        attention,
    )
}
PRINTED["local_radii_published"] = local_radii.summary
PRINTED["launches"] = launches.overview  # of all networks in one table
Cell = Callable[[Mapping[str, Any], Mapping[str, Any]], str]
DOCS = Path(__file__).parents[1] / "docs"
PAGES = (
    DOCS / "benchmarks.md",
    DOCS / "guide" / "presets.md",
    DOCS / "guide" / "attention.md",
    DOCS / "guide" / "robustness.md",
)
# `<!-- table: Title -->` ... `<!-- end -->` in a page is filled with the table of that title.
SLOT = re.compile(r"(<!-- table: (?P<title>[^>]+?) -->\n).*?(<!-- end -->)", re.S)
STATES = {"init": "own init", "trained": "trained", "gaussian": "Gaussian", "kappa 1e3": "κ = 1e3"}


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def _pairs(result: Mapping[str, Any], key: str) -> list[tuple[str, str]]:
    """The (library, preset) pairs in the order of the measurement, the plain layer left out."""
    pairs = {(row["library"], row["preset"]): None for row in result[key]}
    return [pair for pair in pairs if pair[1] != "plain"]


def _worst(rows: list[Mapping[str, Any]]) -> str:
    """The largest residual of some rows, or why there is none."""
    errors = {row["error"] for row in rows if "error" in row}
    if errors:
        return "not installed" if errors == {"not installed"} else "raises"
    values = [row["residual"] for row in rows]
    finite = all(value is not None and math.isfinite(value) for value in values)
    return _scientific(max(values)) if finite else "not finite"


def _orthogonality(result: Mapping[str, Any], ours: bool, dtype: str) -> str:
    """Worst residual over the shapes, by state."""
    lines = []
    for library, preset in _pairs(result, "accuracy"):
        if (library == "orthonet") == ours:
            rows = [
                r for r in result["accuracy"] if (r["library"], r["preset"]) == (library, preset)
            ]
            name = f"`{preset}`" if ours else f"{library} `{preset}`"
            wanted = ([r for r in rows if _is(r, state, dtype)] for state in STATES)
            lines.append([name, *map(_worst, wanted)])
    return harness.table(["preset", *STATES.values()], lines)


def _is(row: Mapping[str, Any], state: str, dtype: str) -> bool:
    """Whether a row is about this state and dtype; that of an absent library is about all."""
    return row.get("state", state) == state and row.get("dtype", dtype) == dtype


def _cases(result: Mapping[str, Any], cell: Cell) -> str:
    """One line a layer, one column a case."""
    cases = list({row["case"]: None for row in result["speed"]})
    found = {(row["library"], row["preset"], row["case"]): row for row in result["speed"]}
    lines = []
    for library, preset in _pairs(result, "speed"):
        cells = []
        for case in cases:
            row = found.get((library, preset, case))
            plain = found["torch", "plain", case]
            cells.append("" if row is None else row.get("error") or cell(row, plain))
        lines.append([f"{library} `{preset}`", *cells])
    return harness.table(["layer", *cases], lines)


def _ratio(mode: str) -> Cell:
    return lambda row, _: f"{row[mode]['ratio']:.3g}"


def _peak(row: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    return f"{row['peak_bytes'] / max(plain['peak_bytes'], 1):.2f}"


def _memory(row: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    return f"{(row['saved_bytes'] - plain['saved_bytes']) / row['weight_bytes']:.1f}"


def _machine(machine: Mapping[str, Any]) -> str:
    described = ", ".join(f"{key} {value}" for key, value in machine.items() if key != "date")
    return f"Measured on {machine['date']}: {described}."


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Every table that the measured parts allow, by its title."""
    texts = {}
    if "accuracy" in result:
        texts["Machine of the orthogonality"] = _machine(result["accuracy_environment"])
        for who, ours in (("orthonet", True), ("the peers", False)):
            for dtype in ("float32", "float64"):
                text = _orthogonality(result, ours, dtype)
                texts[f"Orthogonality of {who} in {dtype}"] = text
    if "speed" in result:
        texts |= {
            "Machine": _machine(result["speed_environment"]),
            "Training step": _cases(result, _ratio("train")),
            "Evaluation": _cases(result, _ratio("eval")),
            "Saved for backward": _cases(result, _memory),
            "Peak memory": _cases(result, _peak),
        }
    return texts


def kept(directory: Path = harness.RESULTS) -> dict[str, str]:
    """Every table, from the results in a directory."""
    texts = tables(json.loads((directory / "presets.json").read_text()))
    for name, summary in PRINTED.items():
        result = json.loads((directory / f"{name}.json").read_text())
        texts[name] = f"{_machine(result['environment'])}\n\n{summary(result)}"
    return texts


def fill(page: str, texts: Mapping[str, str]) -> str:
    """The page with every slot filled."""
    return SLOT.sub(lambda slot: f"{slot[1]}{texts[slot['title']]}\n{slot[3]}", page)


def linear_figure(path: Path, result: Mapping[str, Any]) -> Path:
    """Draw the training step of a linear layer relative to `nn.Linear`, a line a method."""
    rows = result["rows"]
    names = list(dict.fromkeys((row["library"], row["preset"]) for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure = figure_of(7.2, 4.2)
    axes = figure.subplots()
    for case, marker, color in zip(cases, "osD^vP", _shades(len(cases)), strict=True):
        found = {(r["library"], r["preset"]): r["ratio"] for r in rows if r["case"] == case}
        axes.plot([found[n] for n in names], range(len(names)), marker, color=color, label=case)
    axes.set_yticks(range(len(names)), [" ".join(name) for name in names])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="training step / nn.Linear", xticks=(1, 2, 5, 10, 20))
    axes.set_xticklabels(["1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(title="features, batch", frameon=False, loc="upper right", fontsize=8)
    return save_figure(figure, path, axes)


def _shades(count: int) -> list[str]:
    """Return colors that are told apart with every kind of color vision (Okabe & Ito)."""
    return ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"][:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail when a page is out of date")
    check = parser.parse_args().check
    texts = kept()
    for page in PAGES:
        old = page.read_text()
        new = fill(old, texts)
        if check and new != old:
            raise SystemExit(f"{page} is out of date: run `python -m benchmarks.page`")
        page.write_text(new)
    if not check:
        linear = json.loads((harness.RESULTS / "linear_step.json").read_text())
        linear_figure(DOCS / "assets" / "benchmark_linear.png", linear)


if __name__ == "__main__":
    main()
