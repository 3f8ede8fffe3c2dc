"""Certified accuracy of a deployed network and, beside it, what an attack leaves."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify import apgd_l2, attack_certificate, certify
from orthonet.errors import UncertifiableError
from orthonet.recipes.data.digits import Images, spaced
from orthonet.recipes.zoo.autoattack import autoattack_l2

__all__ = ["Judgment", "judge", "require_below"]

_BATCH = 250


@dataclasses.dataclass(frozen=True)
class Judgment:
    """What is known of a network on some images; accuracies are shares in [0, 1].

    Attributes:
        accuracy: Share of right images.
        constant: Proved upper bound of the l2 constant.
        average_radius: Mean of the certified radii, 0 where an image is wrong.
        certified: Share of images that are right and certified beyond each radius.
        attacked: Share of the attacked images that stay right under APGD of each positive radius.
        certified_of_attacked: As `certified`, at the positive radii, of the attacked images alone.
        images: Number of images.
        attacked_images: Number of attacked images.
        attempts: Attacked images that have a certified radius and were attacked just inside it.
        broken: How many of them changed class.
        autoattack: Of the images that AutoAttack attacked too: their number, and at each positive
            radius the share that is certified, that APGD leaves and that both leave; else None.
    """

    accuracy: float
    constant: float
    average_radius: float
    certified: list[float]
    attacked: list[float]
    certified_of_attacked: list[float]
    images: int
    attacked_images: int
    attempts: int
    broken: int
    autoattack: dict[str, Any] | None = None


def judge(
    model: nn.Module,
    images: Images,
    radii: Sequence[float],
    *,
    attacked: int = 0,
    attack_steps: int = 20,
    autoattack: int = 0,
    seed: int = 0,
) -> Judgment:
    """Certify a deployed network on images and attack it on some of them.

    The radii include the rounding of the forward pass of `model`, in its dtype. At every positive
    radius APGD attacks all images that are chosen, also those that are certified, so that a wrong
    certificate shows.

    Args:
        model: The network in eval mode, as it is deployed.
        images: Images in [0, 1] and their classes.
        radii: Radii of certified accuracy and attacks.
        attacked: Number of images that are attacked, evenly spaced; 0 for all, -1 for none.
        attack_steps: Gradient steps of an attack.
        autoattack: Number of images that AutoAttack attacks too, evenly spaced among the attacked.
        seed: Seed of the attacks.

    Raises:
        UncertifiableError: The network has no known constant, or an attack changed the class of an
            image inside its certified radius.
    """
    dtype, number = next(model.parameters()).dtype, len(images.y)
    certificate = certify(model, images.x[:1].to(dtype), lower=False)
    found = [certificate.radius(model, x, labels=y) for x, y in _parts(images, dtype)]
    radius_of, right = torch.cat(found), _right(model, images)
    held = [right & ((radius_of > radius) | (radius <= 0)) for radius in radii]
    every = torch.arange(number)
    chosen = spaced(Images(every, images.y), attacked).x if attacked >= 0 else every[:0]
    few = Images(images.x[chosen], images.y[chosen])
    certain, tried = [part[chosen] for part in held], [r for r in radii if r > 0]
    certain = [part for part, radius in zip(certain, radii, strict=True) if radius > 0]
    attacker = copy.deepcopy(model).float()  # for speed: `model` decides what the points are
    generator = torch.Generator().manual_seed(seed)

    def apgd(x: Tensor, y: Tensor, radius: float) -> Tensor:
        return apgd_l2(attacker, x, y, radius, steps=attack_steps, generator=generator)

    def auto(x: Tensor, y: Tensor, radius: float) -> Tensor:
        return autoattack_l2(attacker, x, y, radius, seed=seed)

    alive = _survivors(model, few, tried, right[chosen], certain, apgd)
    strong = None
    if autoattack and len(chosen):
        some = spaced(Images(torch.arange(len(chosen)), few.y), autoattack).x
        part = Images(few.x[some], few.y[some])
        proved, left = ([share[some] for share in shares] for shares in (certain, alive))
        both = _survivors(model, part, tried, right[chosen][some], proved, auto)
        both = [one & other for one, other in zip(left, both, strict=True)]
        shares = {"certified": proved, "apgd": left, "both": both}
        strong = {"images": len(some), **{k: list(map(_share, v)) for k, v in shares.items()}}
    reports = [
        attack_certificate(
            model, certificate, x, y, steps=attack_steps, restarts=1, generator=generator
        )
        for x, y in _parts(few, dtype)
        if len(y)
    ]
    return Judgment(
        accuracy=_share(right),
        constant=certificate.constant.value,
        average_radius=float(radius_of.mean()),
        certified=[_share(certain) for certain in held],
        attacked=list(map(_share, alive)),
        certified_of_attacked=list(map(_share, certain)) if len(chosen) else [],
        images=number,
        attacked_images=len(chosen),
        attempts=sum(report.attacked for report in reports),
        broken=sum(report.broken for report in reports),
        autoattack=strong,
    )


def _survivors(
    model: nn.Module,
    images: Images,
    radii: Sequence[float],
    right: Tensor,
    certified: Sequence[Tensor],
    attack: Callable[[Tensor, Tensor, float], Tensor],
) -> list[Tensor]:
    """Which images an attack leaves right at each of rising radii; none where there are none."""
    alive, found = right, []
    for radius, certain in zip(radii, certified, strict=True):
        if len(images.y):
            points = [attack(x, y, radius) for x, y in _parts(images, torch.float32)]
            alive = alive & _right(model, Images(torch.cat(points), images.y))
            require_below(certain, alive, radius)
            found.append(alive)
    return found


def require_below(certified: Tensor, alive: Tensor, radius: float) -> None:
    """Require, image by image, that what is certified has survived the attack.

    Raises:
        UncertifiableError: It has not.
    """
    wrong = (certified & ~alive).nonzero()[:, 0].tolist()
    _checks.require(
        not wrong,
        "judge",
        "no attack may change the class of an image inside its certified radius",
        "A rule of the certifier is wrong: please report the network",
        UncertifiableError,
        radius=radius,
        images=wrong[:10],
    )


def _parts(images: Images, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images in a dtype, and their classes."""
    return zip(images.x.to(dtype).split(_BATCH), images.y.split(_BATCH), strict=True)


@torch.no_grad()
def _right(model: nn.Module, images: Images) -> Tensor:
    """Which images the network classifies rightly."""
    dtype = next(model.parameters()).dtype
    return torch.cat([model(x).argmax(1) == y for x, y in _parts(images, dtype)])


def _share(chosen: Tensor) -> float:
    return int(chosen.sum()) / len(chosen)
