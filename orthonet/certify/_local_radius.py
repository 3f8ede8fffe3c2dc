"""Radii of samples by what is known in balls around them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify._certify import walker_in_balls
from orthonet.certify._rows import batch_of
from orthonet.certify.local.radius import radii_of_balls
from orthonet.certify.mlp.chain import Layer, read_layers
from orthonet.certify.mlp.local import perceptron_radii
from orthonet.certify.mlp.perceptron import EFFORTS
from orthonet.certify.rounding.modes import exclusive
from orthonet.errors import UncertifiableError

__all__ = ["local_radius"]


def local_radius(
    model: Layer | Iterable[Layer] | nn.Module,
    x: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    steps: int = 6,
    effort: str = "default",
) -> Tensor:
    r"""Return the l2 distance within which the predicted class of each sample cannot change.

    For a ball of radius $\rho$ with local constants $K_{yj}(\rho)$, the class is certified within
    $\min(\rho, \min_j (f_y - f_j) / K_{yj}(\rho))$; the best $\rho$ of a search is returned. The
    margins are computed with bounds of their rounding. No global constant is needed: the model may
    hold softmax attention, products of activations, LayerNorm, all that `certify(..., radius=r)`
    takes. A model with one has larger radii, rounding included, by `certificate.local_radius`.

    Args:
        model: A classifier in eval mode, or the layers of a perceptron, see
            [`mlp_bound`][orthonet.certify.mlp_bound], which is bounded by LipSDP in every ball.
        x: A batch for it, or one batch for each of its arguments.
        labels: The true classes, (N,); with them, a wrong prediction has radius 0.
        steps: Number of balls to try for each sample.
        effort: As in `certify`; `"tight"` takes about a second for a ball of a perceptron.

    Shape:
        x: (N, *); returns (N,), float64

    Guarantee:
        Lower bound of the distance to the nearest point of another class, in exact arithmetic.

    Raises:
        UncertifiableError: As for `certify(model, x, radius=r)`.
        ValueError: There is one output only, or `x` does not fit.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, 3))
        >>> x = torch.randn(2, 4)
        >>> bool((local_radius(model.eval(), x) > 0).all())
        True
    """
    _checks.positive_int("local_radius", steps=steps)
    _checks.one_of("local_radius", EFFORTS, effort=effort)
    with torch.no_grad():
        try:
            layers = read_layers(model, "local_radius")
        except UncertifiableError:
            if not isinstance(model, nn.Module):
                raise
            layers = None
        if layers is not None and isinstance(x, Tensor):
            _check_classes(layers[0][-1].weight.shape[0])
            classes, radii = perceptron_radii(*layers, x, steps, effort)
        else:
            batch = tuple(batch_of(x))
            walker = walker_in_balls(model, batch, effort)  # type: ignore[arg-type]
            shapes = [tuple(node.meta["val"].shape[1:]) for node in walker.program.outputs]
            _check_classes(shapes[0][0] if len(shapes) == 1 and len(shapes[0]) == 1 else 0)
            with exclusive():
                classes, radii = radii_of_balls(walker, batch, steps)
    if labels is None:
        return radii
    _checks.require(
        isinstance(labels, Tensor) and labels.shape == classes.shape,
        "local_radius",
        "there must be one class index for each sample",
        "Pass integers (N,), not one-hot vectors",
        labels=labels,
    )
    return torch.where(classes == labels.cpu(), radii, 0.0)


def _check_classes(classes: int) -> None:
    _checks.require(
        2 <= classes <= 4096,
        "local_radius",
        "there must be one output of 2 to 4096 classes",
        "Use local_bound or certify(model, x, radius=r) for other outputs",
        classes=classes,
    )
