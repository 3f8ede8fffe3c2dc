"""The HTML report of a trained model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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

    def summary(self) -> str:
        """The outcome as text."""
        written = ["written:", *(f"  {path}" for path in self.files)] if self.files else []
        return "\n".join([self.certificate.table(), *written])


def certificate_alone(
    model: nn.Module,
    input_shape: Sequence[int],
    report: str | os.PathLike[str] | None,
    title: str,
) -> CertificateReport:
    """Certify for inputs of a shape, and write the report if a file is named."""
    for size in input_shape:
        _checks.positive_int("certify_checkpoint", input_shape=size)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(16, *input_shape, generator=generator)
    certificate, page = _page(model, x, title, None, None)
    if report is None:
        return CertificateReport(certificate)
    path = write_atomically(Path(report), lambda file: file.write(page.encode()))
    return CertificateReport(certificate, (path,))


def write_page(path: Path, model: nn.Module, x: Tensor, evaluation: Evaluation, title: str) -> Path:
    """Write the report of an evaluated model."""
    radii = torch.tensor(evaluation.radii, dtype=torch.float64).sort(descending=True).values
    curve = RadiusCurve(radii, round(evaluation.accuracy * len(radii)))
    page = _page(model, x, title, curve, evaluation.attacked)[1]
    return write_atomically(path, lambda file: file.write(page.encode()))


def _page(
    model: nn.Module,
    x: Tensor,
    title: str,
    curve: RadiusCurve | None,
    attacked: dict[float, float] | None,
) -> tuple[LipschitzCertificate, str]:
    plain = to_plain(model).cpu().double().eval().requires_grad_(False)
    x = x.cpu().double()
    certificate = certify(plain, x[:16])
    page = report_html(
        certificate,
        title=title,
        spectra=layer_spectra(plain, x[:1]),
        curve=curve,
        attacked=attacked,
    )
    return certificate, page
