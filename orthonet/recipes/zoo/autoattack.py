"""AutoAttack, by the package torchattacks, where it is installed."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify.attacks.ball import ball_of

__all__ = ["autoattack_l2", "require_autoattack"]


def require_autoattack() -> None:
    """Require the package that holds AutoAttack.

    Raises:
        ModuleNotFoundError: It is missing.
    """
    _checks.require(
        importlib.util.find_spec("torchattacks") is not None,
        "AutoAttack",
        "the package torchattacks must be installed",
        "Run: pip install --no-deps torchattacks, or use autoattack=0",
        ModuleNotFoundError,
        missing="torchattacks",
    )


def autoattack_l2(
    model: nn.Module, x: Tensor, y: Tensor, radius: float, *, seed: int = 0
) -> Tensor:
    """Attack with the standard version of AutoAttack: Auto-PGD twice, FAB and Square.

    The points that the package returns are shortened until they lie within the radius, in float64.
    Torch's global generators are left as they were.

    Args:
        model: A classifier in eval mode.
        x: Images in [0, 1].
        y: Their classes.
        radius: The l2 radius.
        seed: Seed of the attack.

    Raises:
        ModuleNotFoundError: torchattacks is missing.
        ValueError: There are fewer than four classes.
    """
    require_autoattack()
    package = importlib.import_module("torchattacks")
    ball = ball_of("autoattack_l2", model, x, y, radius, (0.0, 1.0), 1, 1)
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    _checks.require(
        classes >= 4,
        "AutoAttack",
        "the targeted attacks of the standard version compare four classes",
        "Use autoattack=0",
        classes=classes,
    )
    with torch.random.fork_rng(devices=[]):
        attack = package.AutoAttack(model, norm="L2", eps=radius, n_classes=classes, seed=seed)
        points = attack(x, y).detach()
    return ball.inside(points - x)
