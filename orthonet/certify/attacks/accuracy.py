"""Robust accuracy as it is found by attacks; what is proved is in `certified_accuracy`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify._radius import Norm, check_radii
from orthonet.certify.attacks.pgd import _predicted, pgd

__all__ = ["empirical_accuracy", "survivors"]


def empirical_accuracy(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    radii: Sequence[float],
    *,
    norm: Norm = "l2",
    steps: int = 40,
    restarts: int = 2,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    batch_size: int = 250,
    generator: torch.Generator | None = None,
) -> list[float]:
    """Return the share of samples that stay correct under `pgd` of each radius.

    A sample that is misclassified at one radius counts as misclassified at all larger radii, whose
    balls contain the same point. The result bounds the true robust accuracy from above. It is never
    less than the certified accuracy, see
    [`certified_accuracy`][orthonet.certify.certified_accuracy].

    Args:
        model: A classifier in eval mode.
        x: The samples, inside `bounds`.
        y: The classes, (N,).
        radii: Radii >= 0, in any order.
        norm: The norm of the radii.
        steps: See `pgd`.
        restarts: See `pgd`.
        bounds: See `pgd`.
        batch_size: Samples that are attacked at once.
        generator: See `pgd`.

    Returns:
        The shares, in the order of `radii`.

    Raises:
        ValueError: `pgd` refuses the arguments, or there is no sample.

    Examples:
        >>> model = nn.Linear(2, 2).requires_grad_(False).eval()
        >>> _ = model.weight.copy_(torch.eye(2)), model.bias.zero_()
        >>> x, y = torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 0])
        >>> empirical_accuracy(model, x, y, [0.0, 0.3])
        [1.0, 0.5]
    """
    _checks.module("empirical_accuracy", model=model)
    _checks.tensor("empirical_accuracy", x=x, y=y)
    _checks.require(len(x) > 0, "empirical_accuracy", "there must be a sample", "Pass some", x=x)
    _checks.positive_int("empirical_accuracy", batch_size=batch_size)
    check_radii("empirical_accuracy", radii)
    labels = y.detach().reshape(-1).to(x.device)
    with torch.no_grad():
        clean = torch.cat([_predicted(model(part)) for part in x.split(batch_size)])
    alive, found = clean == labels, {}
    for radius in sorted(radii):
        if radius != 0:
            alive = survivors(
                model,
                model,
                x,
                labels,
                alive,
                radius,
                batch_size=batch_size,
                steps=steps,
                restarts=restarts,
                bounds=bounds,
                generator=generator,
                norm=norm,
            )
        found[radius] = int(alive.sum()) / len(x)
    return [found[radius] for radius in radii]


def survivors(
    attacker: nn.Module,
    judge: nn.Module,
    x: Tensor,
    y: Tensor,
    alive: Tensor,
    radius: float,
    *,
    batch_size: int,
    steps: int,
    restarts: int,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
    norm: Norm = "l2",
) -> Tensor:
    """Which of the samples marked by `alive` stay right: `attacker` is attacked, `judge` judges."""
    alive = alive.clone()
    dtype = next((p.dtype for p in judge.parameters()), x.dtype)
    for part in alive.nonzero().squeeze(1).split(batch_size) if alive.any() else ():
        points = pgd(
            attacker,
            x[part],
            y[part],
            radius,
            norm=norm,
            steps=steps,
            restarts=restarts,
            bounds=bounds,
            generator=generator,
        )
        with torch.no_grad():
            alive[part] = _predicted(judge(points.to(dtype))) == y[part]
    return alive
