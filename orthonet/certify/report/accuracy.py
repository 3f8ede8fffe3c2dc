"""The certified accuracy of a model on a data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify._certificate import LipschitzCertificate
from orthonet.certify._certify import certify
from orthonet.certify._radius import NORMS, Norm, RadiusCurve, check_radii
from orthonet.certify.attacks.ball import check_model
from orthonet.certify.graph.export import FAILURES
from orthonet.certify.graph.regions import autocast_region

__all__ = [
    "certified_accuracy",
    "certified_curve",
    "check_certificate",
    "check_loader",
    "pair",
]


def certified_accuracy(
    model: nn.Module,
    loader: Iterable[Sequence[Tensor]],
    radii: Sequence[float],
    certificate: LipschitzCertificate | None = None,
    *,
    norm: Norm = "l2",
    exact: bool = False,
) -> list[float]:
    """Return the certified accuracy of a model on a data set, at each radius.

    Args:
        model: The model, in eval mode.
        loader: Batches (inputs, labels); they are moved to the device of the model.
        radii: Radii in units of the input; 0 gives the clean accuracy.
        certificate: The certificate of this model; without one, `certify` makes it in `norm`.
        norm: The norm of the radii: `"l2"`, `"linf"` or `"l1"`.
        exact: Ignore the rounding of the forward pass, see `LipschitzCertificate.radius`.

    Raises:
        ValueError: The model is in train mode or not the certified one, the loader is empty, or a
            radius is negative.
        UncertifiableError: The model cannot be certified, or the rounding of one of its operations
            is not known: pass `exact=True`.

    Examples:
        >>> model = nn.Linear(2, 2).requires_grad_(False).eval()
        >>> _ = model.weight.copy_(torch.eye(2)), model.bias.zero_()
        >>> x, labels = torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 0])
        >>> certified_accuracy(model, [(x, labels)], [0.0, 0.3])
        [1.0, 0.5]
    """
    check_loader("certified_accuracy", loader, "(model, loader, radii, certificate)")
    check_radii("certified_accuracy", radii)
    curve = _curve("certified_accuracy", model, loader, certificate, norm, exact)
    return [curve.at(radius) for radius in radii]


def certified_curve(
    model: nn.Module,
    loader: Iterable[Sequence[Tensor]],
    certificate: LipschitzCertificate | None = None,
    *,
    norm: Norm = "l2",
    exact: bool = False,
) -> RadiusCurve:
    """Return the certified accuracy as a function of the radius, and the area under it.

    Args:
        model: The model, in eval mode.
        loader: Batches (inputs, labels); they are moved to the device of the model.
        certificate: The certificate of this model; without one, `certify` makes it in `norm`.
        norm: The norm of the radii: `"l2"`, `"linf"` or `"l1"`.
        exact: Ignore the rounding of the forward pass, see `LipschitzCertificate.radius`.

    Raises:
        ValueError: The model is in train mode or not the certified one, or the loader is empty.
        UncertifiableError: See `certified_accuracy`.
    """
    check_loader("certified_curve", loader, "(model, loader, certificate)")
    return _curve("certified_curve", model, loader, certificate, norm, exact)


def _curve(
    owner: str,
    model: nn.Module,
    loader: Iterable[Sequence[Tensor]],
    certificate: LipschitzCertificate | None,
    norm: Norm,
    exact: bool,
) -> RadiusCurve:
    check_model(owner, model)
    _checks.one_of(owner, NORMS, norm=norm)
    if certificate is not None:
        check_certificate(owner, certificate)
        if certificate.hashes:
            certificate.require_match(model)
    tensor = next(iter((*model.parameters(), *model.buffers())), None)
    curves = []
    for batch in loader:
        inputs, labels = pair(owner, batch)
        inputs = inputs if tensor is None else inputs.to(tensor.device)
        certificate = certify(model, inputs[:1], norm=norm) if certificate is None else certificate
        logits = outputs_of(owner, model, inputs, certificate)
        given = None if exact else inputs
        curves.append(certificate.curve(logits, labels, norm=norm, inputs=given))
    _checks.require(
        sum(curve.samples for curve in curves) > 0,
        owner,
        "the loader must not be empty",
        "Pass at least one batch",
    )
    radii = torch.cat([curve.radii for curve in curves]).sort(descending=True).values
    return RadiusCurve(radii, sum(curve.correct for curve in curves), norm)


def check_loader(owner: str, loader: Any, order: str) -> None:
    """Refuse what is no iterable of batches, and say how the arguments are ordered."""
    _checks.require(
        not isinstance(loader, (LipschitzCertificate, Tensor, nn.Module, str, dict))
        and hasattr(loader, "__iter__"),
        owner,
        f"the arguments must be {order}, the loader an iterable of (inputs, labels)",
        "Pass the certificate last, and one batch as [(inputs, labels)]",
        loader=loader,
    )


def check_certificate(owner: str, certificate: Any) -> None:
    """Refuse what is no certificate."""
    _checks.require(
        isinstance(certificate, LipschitzCertificate),
        owner,
        "certificate must be a LipschitzCertificate",
        "Pass what orthonet.certify(model, x) returns",
        certificate=certificate,
    )


def outputs_of(
    owner: str, model: nn.Module, inputs: Tensor, certificate: LipschitzCertificate
) -> Tensor:
    """The logits of a batch, under the autocast that was certified."""
    try:
        with autocast_region(inputs.device, certificate.autocast), torch.no_grad():
            return model(inputs)
    except FAILURES as error:
        _checks.fail(
            owner,
            "the model must run on the inputs of the loader",
            "Pass batches of the shape and dtype that the model takes",
            inputs=inputs,
            error=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
        )


def pair(owner: str, batch: Any) -> tuple[Tensor, Tensor]:
    """The inputs and the labels of a batch."""
    good = isinstance(batch, (tuple, list)) and len(batch) == 2
    _checks.require(
        good and all(isinstance(t, Tensor) for t in batch),
        owner,
        "every batch of the loader must be (inputs, labels)",
        "Pass pairs of tensors, e.g. a DataLoader of a TensorDataset, or one batch as "
        "[(inputs, labels)]",
        batch=batch,
    )
    return batch[0], batch[1]
