"""Attacks and estimates: what a certificate is tried against. Nothing here proves anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify._bound import Bound
from orthonet.certify._certificate import LipschitzCertificate
from orthonet.certify._radius import Norm
from orthonet.certify.attacks.ball import Ball, ball_of, check_attack
from orthonet.certify.attacks.secants import _rows, lengths_in, steepest_secant

__all__ = ["AttackReport", "attack_certificate", "lipschitz_estimate", "pgd", "pgd_l2"]


def _predicted(logits: Tensor) -> Tensor:
    """The class; of a binary classifier with one output, 1 where it is positive."""
    if logits.ndim == 1 or logits.shape[1] == 1:
        return (logits.reshape(len(logits)) > 0).long()
    return logits.argmax(1)


def _rivals(logits: Tensor, y: Tensor) -> Tensor:
    """The logits with that of `y` at minus infinity, (N, classes)."""
    return logits.scatter(1, y[:, None], -torch.inf)


def _gain(logits: Tensor, y: Tensor, rival: Tensor | None = None) -> Tensor:
    """Rival logit, by default the best one, minus the logit of `y`: positive for a new class."""
    if logits.ndim == 1 or logits.shape[1] == 1:
        return torch.where(y > 0, -1.0, 1.0) * logits.reshape(len(logits))
    true = logits.gather(1, y[:, None])[:, 0]
    if rival is None:
        return _rivals(logits, y).amax(1) - true
    return logits.gather(1, rival[:, None])[:, 0] - true


def check_labels(owner: str, y: Tensor, logits: Tensor) -> None:
    """Every label must be the index of a logit; of one logit its sign counts."""
    classes = logits.shape[1] if logits.ndim > 1 else 1
    good = classes == 1 or not len(y) or (int(y.min()) >= 0 and int(y.max()) < classes)
    _checks.require(
        good,
        owner,
        f"y must hold class indices from 0 to {classes - 1}",
        "Pass the labels that the model was trained with",
        y=y,
        largest=int(y.max()) if len(y) else None,
    )


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    radius: float | Tensor,
    *,
    norm: Norm = "l2",
    steps: int = 40,
    restarts: int = 2,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Attack by projected gradient ascent on the margin, within a ball around each sample.

    The objective is the largest rival logit minus the one of `y`. The first start is the sample
    itself; restart k begins at a random point and pursues the k-th rival. The function returns the
    point with the largest objective of all steps.

    Args:
        model: A classifier in eval mode.
        x: The samples, inside `bounds`.
        y: The classes to leave, (N,); of a binary classifier with one output 0 or 1.
        radius: The radius, or one for each sample.
        norm: The norm of the ball: `"l2"`, `"linf"` or `"l1"`. Steps go along the gradient, along
            its signs, or along those of the 5 % of entries with the largest derivatives.
        steps: Steps of each start.
        restarts: Number of starts.
        bounds: The box of valid inputs, or None.
        generator: Source of the random starts.

    Shape:
        x: (N, *), returned with the same shape and dtype

    Guarantee:
        Every returned point lies in the box, and its distance to x, computed in float64 from the
        rounded points, is at most `radius`.

    Raises:
        ValueError: The model is in train mode, x lies outside the box, or a radius is negative or
            not finite.

    References:
        A. Madry et al., Towards deep learning models resistant to adversarial attacks, ICLR 2018;
        F. Croce, M. Hein, Mind the box: l1-APGD for sparse adversarial attacks, ICML 2021.
    """
    ball = ball_of("pgd", model, x, y, radius, bounds, steps, restarts, norm)
    return _climb("pgd", model, ball, steps, restarts, generator)


def _climb(
    owner: str,
    model: nn.Module,
    ball: Ball,
    steps: int,
    restarts: int,
    generator: torch.Generator | None,
) -> Tensor:
    """The points with the largest margin that gradient ascent with a fixed schedule meets."""
    x, y = ball.x, ball.y
    best = torch.zeros_like(x)
    with torch.no_grad():
        clean = model(x)
        check_labels(owner, y, clean)
        best_gain = _gain(clean, y)
    for restart in range(restarts):
        delta, rival = torch.zeros_like(x), None
        if restart:
            delta = ball.start(generator)
        if restart and clean.ndim > 1 and clean.shape[1] > 1:
            rank = (restart - 1) % (clean.shape[1] - 1)
            rival = _rivals(clean, y).argsort(1, descending=True)[:, rank]
        for step in range(steps + 1):
            point = ball.point(delta).requires_grad_()
            with torch.enable_grad():
                logits = model(point)
                (gradient,) = torch.autograd.grad(_gain(logits, y, rival).sum(), point)
            found = _gain(logits.detach(), y)
            better = found > best_gain
            best_gain = torch.where(better, found, best_gain)
            best = torch.where(_rows(better, x), delta, best)
            # From half the diameter down, so that the last steps settle on the sphere.
            length = 2.0 * (1.0 - step / (steps + 1)) ** 2
            delta = ball.project(delta + length * ball.rows * ball.ascent(gradient, delta))
    return ball.inside(best)


def pgd_l2(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    radius: float | Tensor,
    *,
    steps: int = 40,
    restarts: int = 2,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Attack in l2: [`pgd`][orthonet.certify.pgd] with the same arguments, less `norm`."""
    ball = ball_of("pgd_l2", model, x, y, radius, bounds, steps, restarts)
    return _climb("pgd_l2", model, ball, steps, restarts, generator)


@dataclass(frozen=True, eq=False)
class AttackReport:
    """The result of an attack inside the certified radii.

    Attributes:
        attacked: How many samples had a positive finite radius.
        broken: How many of them changed their class inside it; a proof allows none.
        radii: The radii that were attacked, (N,); 0 where there was nothing to attack.
        distances: Distances of the returned points from the samples, in float64, (N,).
        changed: Which samples changed their class, (N,).
        clean_accuracy: Share of correct predictions before the attack.
        attacked_accuracy: Share of correct predictions after the attack.
    """

    attacked: int
    broken: int
    radii: Tensor
    distances: Tensor
    changed: Tensor
    clean_accuracy: float
    attacked_accuracy: float

    def __str__(self) -> str:
        return (
            f"{self.broken} of {self.attacked} certificates broken; accuracy "
            f"{self.clean_accuracy:.4f} clean, {self.attacked_accuracy:.4f} attacked"
        )


Attack = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def _allowed(
    points: Tensor, x: Tensor, radii: Tensor, bounds: tuple[float, float] | None, norm: str
) -> Tensor:
    """The points of an attack of another library, where they lie in the ball and in the box."""
    _checks.require(
        isinstance(points, Tensor) and points.shape == x.shape,
        "attack_certificate",
        "attack must return one point for each sample",
        "Return a tensor of the shape of x",
        points=points,
        x=x,
    )
    points = points.detach().to(x)
    low, high = bounds if bounds is not None else (-torch.inf, torch.inf)
    inside = ((points >= low) & (points <= high)).flatten(1).all(1)
    inside &= lengths_in(points.double() - x.detach().double(), norm) <= radii
    return torch.where(_rows(inside, x), points, x.detach())


def attack_certificate(
    model: nn.Module,
    certificate: LipschitzCertificate,
    x: Tensor,
    y: Tensor,
    *,
    steps: int = 40,
    restarts: int = 2,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
    attack: Attack | None = None,
) -> AttackReport:
    """Try to change the predicted class of each sample inside its certified radius.

    The ball is that of the norm of the certificate.

    Args:
        model: The certified model, in eval mode.
        certificate: The result of `certify` for this model.
        x: The samples, inside `bounds`.
        y: The true classes, (N,), for the two accuracies.
        steps: See `pgd`, as for the next three arguments.
        restarts: Number of starts.
        bounds: The box of valid inputs, or None.
        generator: Source of the random starts.
        attack: Another attack, called as `attack(model, x, classes, radii)`: `apgd_ensemble_l2`,
            or one of another library. Points outside the radius or the box count as unmoved.
            `steps` and `restarts` do not apply to it.

    Returns:
        A report; if `broken` is not 0, the certificate is wrong, or it does not cover the rounding
        of the forward pass.
    """
    _checks.require(
        isinstance(certificate, LipschitzCertificate),
        "attack_certificate",
        "the arguments must be (model, certificate, x, y)",
        "Pass what orthonet.certify(model, x) returned second",
        certificate=certificate,
    )
    check_attack("attack_certificate", model, x, y)
    with torch.no_grad():
        logits = model(x)
    before = _predicted(logits)
    norm, radii = certificate.norm, certificate.radius(logits)
    radii = torch.where(radii.isfinite(), radii, 0.0).to(x.device)
    if attack is None:
        points = pgd(
            model,
            x,
            before,
            radii,
            norm=norm,  # type: ignore[arg-type]
            steps=steps,
            restarts=restarts,
            bounds=bounds,
            generator=generator,
        )
    else:
        points = _allowed(attack(model, x, before, radii), x, radii, bounds, norm)
    with torch.no_grad():
        after = _predicted(model(points))
    labels = y.detach().reshape(-1).to(x.device)
    changed = after != before
    total = max(1, len(x))
    return AttackReport(
        attacked=int((radii > 0).sum()),
        broken=int((changed & (radii > 0)).sum()),
        radii=radii,
        distances=lengths_in(points.double() - x.detach().double(), norm),
        changed=changed,
        clean_accuracy=int((before == labels).sum()) / total,
        attacked_accuracy=int((after == labels).sum()) / total,
    )


def lipschitz_estimate(
    model: nn.Module,
    x: Tensor,
    *,
    steps: int = 60,
    step_size: float = 0.2,
    generator: torch.Generator | None = None,
) -> Bound:
    r"""Estimate the l2 Lipschitz constant from below, by ascent on secants.

    For pairs of near points $a, b$ the ratio $\|f(b) - f(a)\| / \|b - a\|$ is a finite difference
    of the Jacobian in the direction $b - a$. The direction turns as in a power iteration on
    $J^T J$, and the pair moves uphill, with some noise, where that helps. The function returns the
    largest ratio, less the rounding of the outputs. Secants, unlike Jacobians, are bounded by the
    constant for any code.

    Args:
        model: A module in eval mode.
        x: The points to start from.
        steps: Number of steps.
        step_size: Length of a move, relative to the root mean square length of the samples.
        generator: Source of the directions and of the noise.

    Shape:
        x: (N, *)

    Guarantee:
        None from above: `kind="estimate"`, which no certificate accepts.
    """
    _checks.tensor("lipschitz_estimate", x=x)
    _checks.require(
        x.ndim > 0 and len(x) > 0,
        "lipschitz_estimate",
        "x must hold at least one sample",
        "Pass a batch of points to start from",
        x=x,
    )
    check_attack("lipschitz_estimate", model, x, torch.zeros(len(x), dtype=torch.long))
    _checks.positive_int("lipschitz_estimate", steps=steps)
    found = steepest_secant(model, x, steps=steps, step_size=step_size, generator=generator)
    return Bound(0.0 if found is None else found[0], kind="estimate")
