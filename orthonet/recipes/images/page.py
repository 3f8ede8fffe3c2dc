"""The HTML report of a trained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify import (
    LipschitzCertificate,
    RadiusCurve,
    certify,
    report_html,
)
from orthonet.convert import to_plain
from orthonet.recipes.images.evaluate import Evaluation
from orthonet.recipes.images.spectra import layer_spectra
from orthonet.recipes.running.files import write_atomically

__all__ = ["CertificateReport", "certificate_alone", "write_page"]


@dataclass(frozen=True, eq=False)
class CertificateReport:
    """A certificate that was made without data.

    Attributes:
        certificate: What `certify` returned.
        files: What was written.
    """

    certificate: LipschitzCertificate
    files: tuple[Path, ...] = ()

    def summary(self, *, certificate: bool = True) -> str:
        """Return the outcome as text, with the table of the certificate or without."""
        table = [self.certificate.table()] if certificate else []
        written = ["written:", *(f"  {path}" for path in self.files)] if self.files else []
        return "\n".join([*table, *written])


def certificate_alone(
    model: nn.Module,
    input_shape: Sequence[int],
    norm: str,
    page: Path | None,
    title: str,
    tell: Callable[[str], None] | None = None,
) -> CertificateReport:
    """Certify a model in a norm for inputs of a shape, and write the page if a file is named."""
    for size in input_shape:
        _checks.positive_int("orthonet certify", input_shape=size)
    plain = to_plain(model).cpu().double().eval().requires_grad_(False)
    x = torch.rand(16, *input_shape, generator=torch.Generator().manual_seed(0)).double()
    certificate = certify(plain, x, norm=norm)  # type: ignore[arg-type]
    if tell is not None:
        tell(certificate.table())
    if page is None:
        return CertificateReport(certificate)
    return CertificateReport(certificate, (_written(page, certificate, plain, x, title),))


def write_page(path: Path, model: nn.Module, x: Tensor, evaluation: Evaluation, title: str) -> Path:
    """Write the page of an evaluated model; without the attack, as long as there was none."""
    radii = torch.tensor(evaluation.radii, dtype=torch.float64).sort(descending=True).values
    curve = RadiusCurve(radii, round(evaluation.accuracy * len(radii)))
    plain = to_plain(model).cpu().double().eval().requires_grad_(False)
    attacked = evaluation.attacked if len(evaluation.attacked) > 1 else None
    return _written(
        path,
        evaluation.certificate,
        plain,
        x.cpu().double(),
        title,
        curve=curve,
        attacked=attacked,
    )


def _written(
    path: Path,
    certificate: LipschitzCertificate,
    plain: nn.Module,
    x: Tensor,
    title: str,
    **accuracies: Any,
) -> Path:
    spectra = layer_spectra(plain, x[:1])
    page = report_html(certificate, title=title, spectra=spectra, **accuracies)
    return write_atomically(path, lambda file: file.write(page.encode()))
