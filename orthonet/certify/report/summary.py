"""A model as a table: each layer with its constraint, its constant and its share of the time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify._bound import Row
from orthonet.certify._certificate import LipschitzCertificate
from orthonet.certify._certify import certify
from orthonet.certify.graph.export import failure_of
from orthonet.errors import UncertifiableError
from orthonet.linalg import spectral_norm_bound
from orthonet.manifolds import SO, Grassmannian, Stiefel, Unitary
from orthonet.reparametrizers import CachedParametrizationList, Weight
from orthonet.reparametrizers.recorded import RecordedWeight

__all__ = ["LayerRow", "Summary", "summary"]

_REPEATS = 3  # forward passes that are timed, the fastest counts


@dataclass(frozen=True)
class LayerRow:
    """One layer of a model.

    Attributes:
        name: Its path in the model.
        layer: Its class.
        constraint: What its weight is kept to, and the preset that does so; empty without.
        residual: The largest distance of a singular value from 1, over the orthogonal matrices
            that the weight is made of; None where there is none.
        constant: Its Lipschitz constant or a bound of it; None where it is not known.
        kind: What the constant is: `"declared"` by the class of the layer, or proved, `"exact"` or
            `"upper"`; `"joined"` if it is counted in the row of the layer before.
        share: Its share of the time of a forward pass in eval mode; None without an example.
    """

    name: str
    layer: str
    constraint: str = ""
    residual: float | None = None
    constant: float | None = None
    kind: str = ""
    share: float | None = None

    def _cells(self) -> tuple[str, ...]:
        return (
            self.name or "-",
            self.layer,
            self.constraint or "-",
            "-" if self.residual is None else f"{self.residual:.1e}",
            "-" if self.constant is None else f"{self.constant:.6g}",
            self.kind or "-",
            "-" if self.share is None else f"{self.share:.1%}",
        )


_HEAD = ("layer", "class", "constraint", "max|s-1|", "constant", "kind", "time")


@dataclass(frozen=True, repr=False)
class Summary:
    """What `summary` found; prints as a table.

    Attributes:
        rows: One for each layer.
        certificate: The certificate for inputs as the example; None without one, or where the
            model cannot be certified.
        note: Why it cannot.
    """

    rows: tuple[LayerRow, ...]
    certificate: LipschitzCertificate | None = None
    note: str = ""

    def __repr__(self) -> str:
        lines = [_HEAD, *(row._cells() for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
        text = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        text.insert(1, "-" * max(map(len, text)))
        return "\n".join([*text, *self._last()])

    def _last(self) -> list[str]:
        if self.certificate is not None:
            return [self.certificate.summary()]
        return [f"not certified: {self.note}"] if self.note else []

    def _repr_html_(self) -> str:
        """The same in a notebook."""
        head = "".join(f"<th>{escape(name)}</th>" for name in _HEAD)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row._cells()) + "</tr>"
            for row in self.rows
        )
        last = "".join(f"<p>{escape(line)}</p>" for line in self._last())
        return f"<table><tr>{head}</tr>{body}</table>{last}"


def summary(model: nn.Module, example_input: Tensor | Sequence[Tensor] | None = None) -> Summary:
    """List the layers of a model: constraint, distance from it, constant, and share of the time.

    With an example the model is certified and its forward pass timed, both in eval mode; modes are
    restored. Without one, constants are those that layers declare, and bounds of linear layers.

    Args:
        model: Any module.
        example_input: A batch of inputs, or one batch for each argument of the model.

    Returns:
        The table, with the certificate where there is one.

    Raises:
        ValueError: `model` is no module, or the example is no batch of floating-point numbers.

    Examples:
        >>> import orthonet
        >>> model = nn.Sequential(orthonet.OrthoLinear(4, 2), orthonet.MaxMin())
        >>> [(row.layer, row.constraint, row.constant) for row in summary(model).rows]
        [('OrthoLinear', 'orthogonal (default)', 1.0), ('MaxMin', '', None)]
        >>> [(row.constant, row.kind) for row in summary(model, torch.ones(1, 4)).rows][1:]
        [(1.0, 'exact')]
    """
    _checks.module("summary", model=model)
    layers = dict(_layers(model))
    certificate, note, shares, proved = None, "", {}, {}
    if example_input is not None:
        single = isinstance(example_input, Tensor)
        _checks.require(
            single
            or (
                (isinstance(example_input, (tuple, list)) and len(example_input) > 0)
                and all(isinstance(x, Tensor) for x in example_input)
            ),
            "summary",
            "example_input must be a tensor, or one for each argument of the model",
            "Pass a batch, e.g. torch.zeros(1, 3, 32, 32)",
            example_input=example_input,
        )
        examples = (example_input,) if single else tuple(example_input)
        with _eval(model):
            try:
                certificate = certify(model, examples, effort="fast")
            except UncertifiableError as error:
                note = str(error)
                failure = failure_of(model, examples)
                _checks.require(
                    not failure,
                    "summary",
                    "the model must run on example_input",
                    "Pass a batch of the shape and dtype that the model takes, samples in the "
                    "first dim",
                    example_input=example_input,
                    error=failure,
                )
            shares = _shares(model, layers, examples)
        if certificate is not None:
            proved = _constants(certificate.rows, layers)
    rows = []
    for name, module in layers.items():
        constraint, residual = _constraint(module)
        constant, kind = proved.get(name) or _declared(module)
        if certificate is not None and name not in proved:
            constant, kind = None, "joined" if name in shares else ""
        cls = type(module)
        layer = cls.__name__.removeprefix("Parametrized")
        rows.append(LayerRow(name, layer, constraint, residual, constant, kind, shares.get(name)))
    return Summary(tuple(rows), certificate, note)


def _layers(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that count as one layer: those that hold a weight, or no other layer."""
    own = [
        (name, child)
        for name, child in module.named_children()
        if not any(isinstance(part, Weight) for part in _parts(child))
    ]
    weights = len(own) < len(list(module.named_children()))
    if weights or not own or isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        yield path, module
        own = [(name, child) for name, child in own if weights and list(child.parameters())]
    for name, child in own:
        yield from _layers(child, f"{path}.{name}" if path else name)


def _parts(child: nn.Module) -> list[nn.Module]:
    """A child that may be a weight, or a dictionary of weights."""
    return [child, *child.children()] if isinstance(child, nn.ModuleDict) else [child]


@contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _constraint(module: nn.Module) -> tuple[str, float | None]:
    """What the weights of a layer are kept to, and how far their singular values are from 1."""
    names: dict[str, None] = {}
    residuals: list[float] = []
    for child in module.children():
        for weight in _parts(child):
            for part in weight.modules() if isinstance(weight, Weight) else ():
                if isinstance(part, RecordedWeight):
                    residuals += _residual(part())
            if isinstance(weight, CachedParametrizationList):
                spaces = [getattr(stage, "space", stage) for stage in weight]
                names.update(dict.fromkeys(type(space).__name__ for space in spaces))
                if isinstance(spaces[-1], (Stiefel, SO, Unitary, Grassmannian)):
                    residuals += _residual(weight())
            elif isinstance(weight, Weight):
                names[_title(weight)] = None
    return ", ".join(names), max(residuals, default=None)


def _title(weight: Weight) -> str:
    presets: dict[str, None] = {}
    for part in weight.modules():
        if isinstance(part, RecordedWeight):
            short = part.preset.removesuffix("_ORTHO_PARAMS")
            known = short != part.preset or short.startswith("triv=")
            presets[short.lower() if known else "own map"] = None
    if presets:
        return f"orthogonal ({', '.join(presets)})"
    shown = weight.extra_repr().split(",")[0]
    shown = shown if shown.isidentifier() else type(weight).__name__
    return shown.strip("_").replace("_", " ")


@torch.no_grad()
def _residual(value: Tensor) -> list[float]:
    if value.is_meta or not value.numel():
        return []
    high = torch.complex128 if value.is_complex() else torch.float64
    sigma = torch.linalg.svdvals(value.detach().to("cpu", high))
    return [float((sigma - 1.0).abs().max())]


def _declared(module: nn.Module) -> tuple[float | None, str]:
    """The constant that a layer declares; of a linear one a bound of its weight."""
    lipschitz = getattr(module, "lipschitz", None)
    if isinstance(lipschitz, (int, float)):
        return float(lipschitz), "declared"
    if isinstance(module, nn.Linear) and not module.weight.is_meta:
        return float(spectral_norm_bound(module.weight.detach())), "upper"
    return None, ""


def _constants(rows: Sequence[Row], layers: dict[str, nn.Module]) -> dict[str, tuple[float, str]]:
    """The proved constants of the layers that a single row of the certificate speaks of."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        path = row.path
        while path not in layers and path:
            path = path.rpartition(".")[0]
        found.setdefault(path, []).append(row)
    return {
        path: (each[0].constant, each[0].kind) for path, each in found.items() if len(each) == 1
    }


@torch.no_grad()
def _shares(
    model: nn.Module, layers: dict[str, nn.Module], examples: tuple[Tensor, ...]
) -> dict[str, float]:
    """The shares of the fastest of some forward passes that the layers take."""
    names = {id(module): name for name, module in layers.items()}
    spent: dict[str, float] = {}
    begun: list[float] = []

    def before(module: nn.Module, args: Any) -> None:
        begun.append(_now(examples[0]))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        name = names[id(module)]
        spent[name] = spent.get(name, 0.0) + _now(examples[0]) - begun.pop()

    best, shares = float("inf"), {}
    handles = []
    for module in layers.values():
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        for _ in range(1 + _REPEATS):  # the first computes the weights
            spent.clear()
            start = _now(examples[0])
            model(*examples)
            total = _now(examples[0]) - start
            if total < best:
                best, shares = total, {name: s / total for name, s in spent.items()}
    finally:
        for handle in handles:
            handle.remove()
    return shares


def _now(x: Tensor) -> float:
    if x.device.type != "cpu":
        torch.accelerator.synchronize(x.device)
    return time.perf_counter()
