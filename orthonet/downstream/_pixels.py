"""Certificates for each pixel of a segmentation, and for all pixels of an image together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.certify import Bound, LipschitzCertificate
from orthonet.downstream._moves import (
    below,
    checked_classes,
    checked_outputs,
    plus,
    reach_of,
    rounding_of,
    times,
)
from orthonet.linalg.bounds.rounding import gamma

__all__ = ["PixelAccuracy", "certified_pixel_accuracy", "pixel_radii"]

_DOWN = torch.tensor(-math.inf, dtype=torch.float64)


def pixel_radii(
    logits: Tensor,
    certificate: LipschitzCertificate,
    inputs: Tensor | Sequence[Tensor] | None,
    *,
    labels: Tensor | None = None,
    constants: Tensor | None = None,
) -> Tensor:
    r"""Return the distance within which the class of each pixel cannot change.

    $r_p = \min_{j \ne y} (f_{py} - f_{pj}) / (\sqrt 2\, K_p)$ for an l2 perturbation of the whole
    image. The constant $K_p$ of the logits of a pixel is at most the constant of all outputs, which
    stands for it if `constants` is left out.

    Args:
        logits: What the model returned.
        certificate: The certificate of the model.
        inputs: The images: the rounding of the forward passes counts. None leaves it out.
        labels: The true classes; with them, a pixel that is wrong has radius 0.
        constants: Upper bounds of the constant of each pixel's logits, if they are known.

    Shape:
        logits: (N, classes, *sizes) with one dimension of pixels or more; labels (N, *sizes);
            constants: sizes; returns (N, *sizes), float64

    Guarantee:
        Lower bound of the distance to the nearest image for which the deployed model gives the
        pixel another class; without the inputs, in exact arithmetic.

    Raises:
        ValueError: The logits are not finite, or something does not fit them.
        UncertifiableError: With the inputs, the rounding of an operation is not known.

    Examples:
        >>> from orthonet.certify import certify
        >>> from orthonet.layers import OrthoConv2d
        >>> model = OrthoConv2d(1, 3, 3, padding=1).eval()
        >>> x = torch.rand(2, 1, 8, 8)
        >>> pixel_radii(model(x).detach(), certify(model, x), x).shape
        torch.Size([2, 8, 8])

    References:
        T. Massena et al., *Fast and flexible robustness certificates for semantic segmentation*,
        arXiv 2512.06010.
    """
    owner = "pixel_radii"
    flat, sizes = _pixels(owner, logits)
    known = _constants(owner, constants, sizes, certificate, logits)
    wanted = None
    if labels is not None:
        wanted = checked_classes(owner, labels, (len(logits), *sizes), flat.shape[1]).reshape(-1)

    costs = _costs(flat, wanted).reshape(len(logits), -1)

    def radii(e: Tensor) -> Tensor:
        """Of an l2 rounding for each image, which is made at both points."""
        left = torch.where(costs > 0, below(costs, 2.0 * e[:, None]), 0.0)
        return _over_constants(left, known).reshape(len(logits), *sizes)

    whole = radii(torch.zeros(len(logits), dtype=torch.float64))
    if inputs is None:
        return whole
    # The rounding grows with the ball: count that of the ball of the largest radius.
    far = whole.clamp(max=2.0**20).flatten(1).amax(1)
    e = rounding_of(owner, certificate, logits, 0.0, inputs)
    if bool((far > 0).any()):
        e = certificate.rounding(inputs, within=far).to("cpu", torch.float64)
    return torch.minimum(radii(e), far.reshape(-1, *[1] * len(sizes)))


@dataclass(frozen=True)
class PixelAccuracy:
    r"""The share of pixels that stay right under every perturbation of some sizes.

    Attributes:
        radii: The l2 sizes of the perturbations of an image.
        clean: Share of right pixels without a perturbation; ties count as wrong.
        pixelwise: For each radius, the share of the pixels that are right and certified on their
            own.
        collective: For each radius, a lower bound of the share that stays right, by what one
            perturbation can do to all pixels at once; at least `pixelwise`.
    """

    radii: tuple[float, ...]
    clean: float
    pixelwise: tuple[float, ...]
    collective: tuple[float, ...]


def certified_pixel_accuracy(
    logits: Tensor,
    labels: Tensor,
    certificate: LipschitzCertificate,
    radii: Sequence[float],
    inputs: Tensor | Sequence[Tensor] | None,
    *,
    constants: Tensor | None = None,
    ignore: int | None = None,
) -> PixelAccuracy:
    r"""Bound the share of right pixels under any l2 perturbation of each image from below.

    Pixelwise, a pixel counts if its radius exceeds the perturbation. But one perturbation cannot
    turn every other pixel: to turn pixel p, the logits of p must move by $m_p / \sqrt 2$, with its
    margin $m_p$. Different pixels have different logits, and all logits together move by at most
    $K \epsilon + 2 e$. So the set A of turned pixels obeys $\sum_{p \in A} m_p^2 / 2 \le (K
    \epsilon + 2 e)^2$: at most as many as the smallest margins fit into it.

    Args:
        logits: What the model returned.
        labels: The true classes.
        certificate: The certificate of the model.
        radii: l2 sizes of the perturbations.
        inputs: The images: the rounding e of the forward passes counts. None leaves it out.
        constants: As in [`pixel_radii`][orthonet.downstream.pixel_radii].
        ignore: A label whose pixels do not count.

    Shape:
        logits: (N, classes, *sizes); labels: (N, *sizes)

    Guarantee:
        For every image and every perturbation of at most the radius, the mean over the images of
        the share of right pixels is at least the share that is returned.

    Raises:
        ValueError: The logits are not finite, something does not fit them, or no pixel counts.
        UncertifiableError: With the inputs, the rounding of an operation is not known.

    Examples:
        >>> from orthonet.certify import certify
        >>> from orthonet.layers import OrthoConv2d
        >>> model = OrthoConv2d(1, 3, 3, padding=1).eval()
        >>> x, y = torch.rand(2, 1, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long)
        >>> logits = model(x).detach()
        >>> found = certified_pixel_accuracy(logits, y, certify(model, x), [0.1], x)
        >>> found.pixelwise[0] <= found.collective[0] <= found.clean
        True

    References:
        T. Massena et al., *Fast and flexible robustness certificates for semantic segmentation*,
        arXiv 2512.06010.
    """
    owner = "certified_pixel_accuracy"
    flat, sizes = _pixels(owner, logits)
    many = isinstance(radii, (Sequence, Tensor)) and len(radii) > 0
    _checks.require(
        many, owner, "radii must be a list of numbers >= 0", "Pass e.g. radii=[0.5]", radii=radii
    )
    known = _constants(owner, constants, sizes, certificate, logits)
    counts = torch.ones(len(logits), *sizes, dtype=torch.bool)
    if ignore is not None:
        _checks.integer(owner, ignore=ignore)
        _checks.tensor(owner, labels=labels)
        counts = labels.detach().to("cpu") != ignore
        labels = torch.where(counts, labels.detach().to("cpu"), 0)
    labels = checked_classes(owner, labels, (len(logits), *sizes), flat.shape[1])
    number = counts.flatten(1).sum(1)
    _checks.require(
        bool((number > 0).all()),
        owner,
        "every image must have a pixel that counts",
        "Leave out the images without one",
        ignore=ignore,
    )
    costs = _costs(flat, labels.reshape(-1)).reshape(len(logits), -1) * counts.flatten(1)
    right = (costs > 0).sum(1)
    pixelwise, collective = [], []
    for radius in map(float, radii):
        e = rounding_of(owner, certificate, logits, radius, inputs)
        alone = costs > plus(times(known, radius).expand(len(logits), -1), 2.0 * e[:, None])
        turned = _most_turned(costs, alone, reach_of(certificate, radius, e))
        kept = torch.maximum(right - turned, alone.sum(1))
        pixelwise.append(_mean_share(alone.sum(1), number))
        collective.append(_mean_share(kept, number))
    clean = _mean_share(right, number)
    return PixelAccuracy(tuple(map(float, radii)), clean, tuple(pixelwise), tuple(collective))


def _costs(flat: Tensor, labels: Tensor | None) -> Tensor:
    """How far the logits of a pixel must move in l2 until its class changes, from below.

    That is the radius of a classifier whose input is the logits, the identity.
    """
    return LipschitzCertificate(Bound(1.0), (), (flat.shape[1],)).radius(flat, labels=labels)


def _most_turned(costs: Tensor, alone: Tensor, budget: Tensor) -> Tensor:
    """The largest number of right pixels whose squared costs fit into the squared budget."""
    scale = budget.clamp_min(2.0**-500)
    open_ = (costs > 0) & ~alone
    ratios = torch.where(open_, costs / scale[:, None], math.inf).sort(1).values
    # A division, a square and a sum of at most all pixels, each rounded to nearest.
    sums = ratios.square().cumsum(1) * (1.0 - gamma(2 * ratios.shape[1] + 8))
    return (sums <= 1.0).sum(1)


def _mean_share(counts: Tensor, of: Tensor) -> float:
    """The mean of shares; of equal denominators the nearest float to it."""
    if bool((of == of[0]).all()):
        return int(counts.sum()) / int(of.sum())
    return math.fsum((counts.double() / of).tolist()) / len(of)


def _pixels(owner: str, logits: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The logits as (pixels of all images, classes) in float64, and the sizes of an image."""
    _checks.floating(owner, logits=logits)
    good = logits.ndim >= 3 and logits.numel() > 0 and logits.shape[1] >= 2
    text = "logits must be (N, classes, *sizes), with two classes or more and a pixel"
    values = checked_outputs(owner, "logits", logits, text, good)
    return values.movedim(1, -1).reshape(-1, logits.shape[1]), tuple(logits.shape[2:])


def _constants(
    owner: str,
    constants: Tensor | None,
    sizes: tuple[int, ...],
    certificate: LipschitzCertificate,
    logits: Tensor,
) -> Tensor:
    """The constant of each pixel, flat; one for all of them if they are not known."""
    rounding_of(owner, certificate, logits, 0.0, None)  # refuses what is no certificate
    value = torch.tensor([certificate.constant.value], dtype=torch.float64)
    if constants is None:
        return value
    _checks.floating(owner, constants=constants)
    found = constants.detach().to("cpu", torch.float64)
    _checks.require(
        tuple(found.shape) == sizes and bool(((found >= 0) & found.isfinite()).all()),
        owner,
        f"constants must be finite, non-negative and of the shape {sizes}",
        "Pass one bound for each pixel",
        constants=constants,
    )
    return torch.minimum(found.reshape(-1), value)


def _over_constants(costs: Tensor, constants: Tensor) -> Tensor:
    """Costs divided by the constant of each pixel, rounded downward; a negative cost is 0."""
    found = (costs / constants).nextafter(_DOWN).clamp_min(0.0)
    found = torch.where(constants == 0, math.inf, found)
    return torch.where(costs > 0, found, 0.0)
