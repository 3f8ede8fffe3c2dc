"""One call from a model and its data to certificate, accuracies and page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify._certificate import LipschitzCertificate
from orthonet.certify._certify import certify
from orthonet.certify._progress import Progress, report, reporting
from orthonet.certify._radius import NORMS, Norm, RadiusCurve, check_radii
from orthonet.certify.attacks.accuracy import survivors
from orthonet.certify.attacks.ball import check_bounds, check_model
from orthonet.certify.attacks.pgd import _predicted
from orthonet.certify.graph.regions import autocast_region
from orthonet.certify.report.accuracy import (
    check_certificate,
    check_loader,
    outputs_of,
    pair,
)
from orthonet.certify.report.figures import Plot, accuracy_plot
from orthonet.certify.report.files import replacing
from orthonet.certify.report.page import accuracy_table, report_html

__all__ = ["Evaluation", "evaluate"]

_BATCH = 250  # samples that are attacked at once


@dataclass(frozen=True, repr=False, eq=False)
class Evaluation:
    """What `evaluate` found: the certificate of a model and its accuracies on a data set.

    Attributes:
        certificate: The certificate.
        curve: The certified accuracy as a function of the radius.
        radii: The radii that were asked for.
        attacked: The accuracy under an attack, by radius; empty where none was made.
        broken: How often a sample that was certified beyond a radius fell to the attack of this
            radius: 0, or the certificate is wrong.
    """

    certificate: LipschitzCertificate
    curve: RadiusCurve
    radii: tuple[float, ...]
    attacked: Mapping[float, float]
    broken: int = 0

    @property
    def clean(self) -> float:
        """The accuracy without any perturbation."""
        return self.curve.clean

    @property
    def certified(self) -> dict[float, float]:
        """The share of samples that are right and certified beyond each radius."""
        return {radius: self.curve.at(radius) for radius in self.radii}

    @property
    def samples(self) -> int:
        """The number of samples."""
        return self.curve.samples

    def __repr__(self) -> str:
        return f"Evaluation: {self.table()}"

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        """The same in a notebook, with the figure."""
        table = accuracy_table(self.curve, self.attacked, self.radii)
        return f"<p>{self._title()}</p>{table}{self.plot()._repr_html_()}"

    def _title(self) -> str:
        return f"{self.samples} samples; {self.certificate.summary()}"

    def table(self) -> str:
        """The accuracies at each radius as a text table, and the average certified radius."""
        names = ("radius", "clean", "certified", *(("attacked",) if self.attacked else ()))
        lines = [self._title(), "".join(f"{name:>11}" for name in names)]
        for radius in self.radii:
            values = [self.clean, self.curve.at(radius)]
            values += [self.attacked[radius]] if self.attacked else []
            lines.append(f"{radius:>11g}" + "".join(f"{value:>11.2%}" for value in values))
        lines.append(f"average certified radius {self.curve.area:.4g} ({self.curve.norm})")
        if self.broken:
            lines.append(f"{self.broken} CERTIFIED SAMPLES FELL: the certificate is wrong")
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> Plot:
        """Return a figure of the certified accuracy, and of the one under attack.

        Args:
            ax: Axes of matplotlib to draw into, too. The figure itself needs no package.
        """
        return accuracy_plot(self.curve, self.attacked, ax)

    def html(self, title: str = "Evaluation") -> str:
        """Return one self-contained page: accuracies, figures, and every row of the certificate.

        Args:
            title: The heading of the page.
        """
        return report_html(
            self.certificate,
            title=title,
            curve=self.curve,
            attacked=self.attacked,
            radii=self.radii,
        )

    def save(self, path: str | Path, title: str = "Evaluation") -> None:
        """Write the page.

        Args:
            path: The file, e.g. `"report.html"`. The proof is saved by `certificate.save`.
            title: The heading of the page.

        Raises:
            ValueError: The name does not end in `.html`.
            OSError: The disk is full, or the folder is missing; an older file stays.
        """
        _checks.require(
            isinstance(path, (str, Path)) and Path(path).suffix in (".html", ".htm"),
            "Evaluation",
            "path must end in .html",
            "Call save('report.html'); the proof for a checker is written by "
            "evaluation.certificate.save('certificate.json')",
            path=path,
        )
        with replacing(Path(path)) as file:
            file.write(self.html(title).encode())

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON can hold them."""
        return {
            "samples": self.samples,
            "constant": self.certificate.constant.value,
            "kind": self.certificate.constant.kind,
            "norm": self.curve.norm,
            "clean": self.clean,
            "area": self.curve.area,
            "broken": self.broken,
            "at_radii": [
                {"radius": r, "certified": self.curve.at(r), "attacked": self.attacked.get(r)}
                for r in self.radii
            ],
        }


def evaluate(
    model: nn.Module,
    loader: Iterable[Sequence[Tensor]],
    radii: Sequence[float],
    certificate: LipschitzCertificate | None = None,
    *,
    norm: Norm | None = None,
    attack: bool = True,
    steps: int = 40,
    restarts: int = 1,
    bounds: tuple[float, float] | None = None,
    exact: bool = False,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Certify a classifier, and find its clean, certified and attacked accuracy at each radius.

    One pass over the data: the certificate is made from its first sample, all radii are proved for
    the deployed forward pass, and [`pgd`][orthonet.certify.pgd] attacks what is still right.

    Args:
        model: The classifier, in eval mode.
        loader: Batches (inputs, labels); they are moved to the device of the model.
        radii: Radii in units of the input, in the norm of the certificate.
        certificate: The certificate of this model; without one, `certify` makes it.
        norm: The norm of the radii, `"l2"`, `"linf"` or `"l1"`: of the certificate that is made, or
            of the one that is given.
        attack: Whether to attack; without, the last column is missing, and it takes a fraction of
            the time.
        steps: Gradient steps of an attack.
        restarts: Starts of an attack.
        bounds: The box of valid inputs that an attack respects, such as (0.0, 1.0) for images that
            are not normalized outside of the model; None for no box, the stronger attack.
        exact: Leave the rounding of the forward pass out, see `LipschitzCertificate.radius`.
        generator: Source of the random starts.
        progress: Called as `progress(done, total, what)` for each step of the proof, and for each
            batch; its total is 0 where the loader has no length.

    Guarantee:
        Certified accuracy: as in `LipschitzCertificate.radius`. Attacked accuracy: an upper bound
        of the robust accuracy, at each radius at least the certified one.

    Raises:
        ValueError: The model is in train mode or not the certified one, the loader is empty, or a
            radius is negative.
        UncertifiableError: The model cannot be certified, or the rounding of one of its operations
            is not known: pass `exact=True`.

    Examples:
        >>> model = nn.Linear(2, 2).requires_grad_(False).eval()
        >>> _ = model.weight.copy_(torch.eye(2)), model.bias.zero_()
        >>> x, labels = torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 0])
        >>> print(evaluate(model, [(x, labels)], [0.0, 0.3]).table().split("; ")[0])
        2 samples
        >>> evaluate(model, [(x, labels)], [0.0, 0.3]).certified
        {0.0: 1.0, 0.3: 0.5}
    """
    check_model("evaluate", model)
    check_loader("evaluate", loader, "(model, loader, radii, certificate)")
    check_radii("evaluate", radii)
    _checks.boolean("evaluate", attack=attack, exact=exact)
    _checks.positive_int("evaluate", steps=steps, restarts=restarts)
    check_bounds("evaluate", bounds)
    _checks.one_of("evaluate", (None, *NORMS), norm=norm)
    _checks.require(
        generator is None or isinstance(generator, torch.Generator),
        "evaluate",
        "generator must be a torch.Generator, or None",
        "Pass torch.Generator().manual_seed(0)",
        generator=generator,
    )
    if certificate is not None:
        check_certificate("evaluate", certificate)
    wanted = tuple(float(radius) for radius in radii)
    tensor = next(iter((*model.parameters(), *model.buffers())), None)
    if certificate is not None and certificate.hashes:
        certificate.require_match(model)
    total = len(loader) if hasattr(loader, "__len__") else 0  # type: ignore[arg-type]
    found: list[Tensor] = []
    alive = dict.fromkeys(sorted({r for r in wanted if r > 0}) if attack else (), 0)
    right = broken = 0
    for done, batch in enumerate(loader):
        x, y = pair("evaluate", batch)
        x = x if tensor is None else x.to(tensor.device)
        if certificate is None:
            certificate = certify(model, x[:1], norm=norm or "l2", progress=progress)
        with reporting(progress):
            report(done, total, "batches")
        logits = outputs_of("evaluate", model, x, certificate)
        radius = certificate.radius(logits, norm=norm, labels=y, inputs=None if exact else x)
        found.append(radius)
        y = y.detach().reshape(-1).to(x.device)
        if logits.ndim == 1 or logits.shape[1] == 1:
            y = (y > 0).long()
        left = _predicted(logits) == y
        right += int(left.sum())
        for size in alive:
            with autocast_region(x.device, certificate.autocast):
                left = survivors(
                    model,
                    model,
                    x,
                    y,
                    left,
                    size,
                    batch_size=_BATCH,
                    steps=steps,
                    restarts=restarts,
                    bounds=bounds,
                    generator=generator,
                    norm=norm or certificate.norm,  # type: ignore[arg-type]
                )
            alive[size] += int(left.sum())
            broken += int(((radius.to(left.device) > size) & ~left).sum())
    count = sum(map(len, found))
    if certificate is None or not count:
        _checks.fail(
            "evaluate", "the loader must not be empty", "Pass at least one batch", samples=count
        )
    curve = RadiusCurve(
        torch.cat(found).sort(descending=True).values, right, norm or certificate.norm
    )
    at = {r: (alive[r] if r > 0 else right) / count for r in wanted} if attack else {}
    return Evaluation(certificate, curve, wanted, at, broken)
