"""The certified accuracy of a model on a data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify._certificate import LipschitzCertificate
from orthonet.certify._certify import certify
from orthonet.certify._radius import RadiusCurve, check_radii
from orthonet.certify.graph.regions import autocast_region

__all__ = ["certified_accuracy", "certified_curve"]


def certified_accuracy(
    model: nn.Module,
    loader: Iterable[Sequence[Tensor]],
    radii: Sequence[float],
    certificate: LipschitzCertificate | None = None,
    *,
    norm: str = "l2",
    exact: bool = False,
) -> list[float]:
    """Return the certified accuracy of a model on a data set, at each radius.

    Args:
        model: The model, in eval mode.
        loader: Batches (inputs, labels); they are moved to the device of the model.
        radii: Radii in units of the input; 0 gives the clean accuracy.
        certificate: The certificate of this model; without one, `certify` makes it.
        norm: The norm of the radii: `"l2"`, `"linf"` or `"l1"`.
        exact: Leave the rounding of the forward pass out, see `LipschitzCertificate.radius`.

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
    _check_order("certified_accuracy", loader, "(model, loader, radii, certificate)")
    check_radii("certified_accuracy", radii)
    curve = certified_curve(model, loader, certificate, norm=norm, exact=exact)
    return [curve.at(radius) for radius in radii]


def certified_curve(
    model: nn.Module,
    loader: Iterable[Sequence[Tensor]],
    certificate: LipschitzCertificate | None = None,
    *,
    norm: str = "l2",
    exact: bool = False,
) -> RadiusCurve:
    """Return the certified accuracy as a function of the radius, and the area under it.

    Args:
        model: The model, in eval mode.
        loader: Batches (inputs, labels); they are moved to the device of the model.
        certificate: The certificate of this model; without one, `certify` makes it.
        norm: The norm of the radii: `"l2"`, `"linf"` or `"l1"`.
        exact: Leave the rounding of the forward pass out, see `LipschitzCertificate.radius`.

    Raises:
        ValueError: The model is in train mode or not the certified one, or the loader is empty.
        UncertifiableError: See `certified_accuracy`.
    """
    _check_order("certified_curve", loader, "(model, loader, certificate)")
    _checks.require(
        not model.training, "certified_accuracy", "the model must be in eval mode",
        "Call model.eval() first",
    )  # fmt: skip
    if certificate is not None and certificate.hashes:
        certificate.require_match(model)
    tensor = next(iter((*model.parameters(), *model.buffers())), None)
    curves = []
    for batch in loader:
        inputs, labels = _pair(batch)
        inputs = inputs if tensor is None else inputs.to(tensor.device)
        certificate = certify(model, inputs[:1]) if certificate is None else certificate
        with autocast_region(inputs.device, certificate.autocast), torch.no_grad():
            logits = model(inputs)
        given = None if exact else inputs
        curves.append(certificate.curve(logits, labels, norm=norm, inputs=given))
    _checks.require(
        sum(curve.samples for curve in curves) > 0,
        "certified_accuracy",
        "the loader must not be empty",
        "Pass at least one batch",
    )
    radii = torch.cat([curve.radii for curve in curves]).sort(descending=True).values
    return RadiusCurve(radii, sum(curve.correct for curve in curves), norm)


def _check_order(owner: str, loader: Any, order: str) -> None:
    _checks.require(
        not isinstance(loader, (LipschitzCertificate, Tensor)) and hasattr(loader, "__iter__"),
        owner,
        f"the arguments must be {order}, the loader an iterable of (inputs, labels)",
        "Pass the certificate last, and one batch as [(inputs, labels)]",
        loader=type(loader).__name__,
    )


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    good = isinstance(batch, (tuple, list)) and len(batch) == 2
    _checks.require(
        good and all(isinstance(t, Tensor) for t in batch), "certified_accuracy",
        "every batch of the loader must be (inputs, labels)",
        "Pass pairs of tensors, e.g. a DataLoader of a TensorDataset", batch=type(batch).__name__,
    )  # fmt: skip
    return batch[0], batch[1]
