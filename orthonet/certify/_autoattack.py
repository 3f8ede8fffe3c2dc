"""AutoAttack through torchattacks, an extra: the attack that robustness papers report."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify._empirical import _ball, _rows

__all__ = ["auto_attack_l2"]

VERSIONS = ("standard", "rand")


@torch.no_grad()
def auto_attack_l2(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    radius: float | Tensor,
    *,
    version: str = "standard",
    seed: int = 0,
) -> Tensor:
    """Attack with AutoAttack in the l2 norm: points that may change the class, inside the ball.

    `"standard"` runs APGD on the cross-entropy, targeted APGD, FAB and 5000 queries of Square
    one after the other on the samples that still stand; `"rand"` two kinds of APGD only.

    Args:
        model: A classifier of at least four classes in eval mode.
        x: The samples, in float32 and in [0, 1].
        y: The classes to leave, (N,).
        radius: One for all, or one for each sample, (N,). Different radii are attacked one after
            the other, for AutoAttack knows one.
        version: What is run.
        seed: Of its random starts; the global generator is left as it was.

    Shape:
        x: (N, C, H, W) of at least 5x5 pixels, with `"rand"` any other shape that starts with N,
            too; returns the same shape and dtype

    Guarantee:
        Every returned point lies in [0, 1], and its distance to x, computed in float64 from the
        rounded points, is at most the radius. A sample that was not moved to another class is
        returned as it is.

    Raises:
        ModuleNotFoundError: `torchattacks` is missing: `pip install "orthonet[attack]"`.
        ValueError: x is not float32 or lies outside [0, 1], there are fewer than four classes, or
            as for `pgd_l2`.

    References:
        F. Croce, M. Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse
        parameter-free attacks, ICML 2020. H. Kim, Torchattacks, arXiv:2010.01950 (2020).
    """
    owner = "auto_attack_l2"
    _checks.one_of(owner, VERSIONS, version=version)
    ball = _ball(owner, model, x, y, radius, (0.0, 1.0), 1, 1)
    _checks.require(
        x.dtype == torch.float32, owner, "x must be float32",
        "Call x.float(): torchattacks computes in float32", dtype=x.dtype,
    )  # fmt: skip
    _checks.require(
        version == "rand" or (x.ndim == 4 and min(x.shape[-2:]) >= 5), owner,
        "x must be images (N, C, H, W) of at least 5x5 pixels",
        'Square moves windows of images: use version="rand" for anything else', x=x,
    )  # fmt: skip
    classes = model(ball.x[:1]).flatten(1).shape[1] if len(x) else 4
    _checks.require(
        classes >= 4, owner, "the model must have at least four classes",
        "The losses of AutoAttack compare four logits: use apgd_l2", classes=classes,
    )  # fmt: skip
    try:
        library: Any = importlib.import_module("torchattacks")
    except ImportError:
        _checks.fail(
            owner, "torchattacks must be installed", 'Run: pip install "orthonet[attack]"',
            ModuleNotFoundError,
        )  # fmt: skip
    delta = torch.zeros_like(ball.x)
    with torch.random.fork_rng(), torch.enable_grad():
        for size in ball.radius.unique().tolist():
            chosen = (ball.radius == size).nonzero()[:, 0]
            if size > 0.0:
                attack = library.AutoAttack(
                    model, norm="L2", eps=size, version=version, n_classes=classes, seed=seed
                )
                points = attack(ball.x[chosen], ball.y[chosen]).detach()
                delta[chosen] = points - ball.x[chosen]
    points = ball.inside(ball.project(delta))
    moved = model(points).argmax(1) != ball.y
    return torch.where(_rows(moved, x), points, ball.x)
