"""Accuracy, certificate and attack on held-out images."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from orthonet import _checks
from orthonet.certify import LipschitzCertificate, attack_certificate, certify, pgd
from orthonet.certify.attacks.accuracy import survivors
from orthonet.convert import to_plain
from orthonet.recipes.data.digits import Images, require_package, spaced

__all__ = ["Evaluation", "attack_radii", "evaluate", "wilson"]

_BATCH = 250


@dataclasses.dataclass(frozen=True)
class LocalRadii:
    """Radii from bounds in balls next to those from the global constant, for the same images.

    Attributes:
        whole: Radius from the global constant of every image; 0 where it is misclassified.
        local: Radius from bounds in a ball around every image, never smaller.
        broken: How many images change class under an attack just inside their local radius.
        seconds: Process time of the local radii.
    """

    whole: list[float]
    local: list[float]
    broken: int
    seconds: float = dataclasses.field(compare=False)

    def lines(self, radii: Sequence[float]) -> list[str]:
        """Return the medians over the images that are right, and the accuracies over all."""
        number = len(self.whole)
        pairs = [(w, n) for w, n in zip(self.whole, self.local, strict=True) if w > 0]
        if not pairs:
            return [f"local radii: none of {number} images is right"]
        whole, local = (statistics.median(column) for column in zip(*pairs, strict=True))
        gain = statistics.median(n / w for w, n in pairs)
        verdict = "none changed class" if not self.broken else f"{self.broken} CHANGED CLASS"
        return [
            f"l2 radius    global     local    ({number} images)",
            *(
                f"{r:<9g}  {_beyond(self.whole, r):7.1%}   {_beyond(self.local, r):7.1%}"
                for r in radii
            ),
            f"median     {whole:7.4f}   {local:7.4f}    (of {len(pairs)} right images; quotient "
            f"{gain:.2f}, {self.seconds / number:.2f} CPU s an image)",
            f"attacked just inside their local radius: {len(pairs)} images, {verdict}",
        ]


def _beyond(radii: Sequence[float], radius: float) -> float:
    return sum(each > radius for each in radii) / len(radii)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is known of a model on some images; every accuracy is a share in [0, 1].

    Attributes:
        accuracy: Share of rightly classified images.
        constant: Proved upper bound of the Lipschitz constant, in the norm of the certificate.
        table: The certificate as text, a line for each operation.
        rows: The certificate's rows as plain values, without their durations.
        radii: Certified radius of every image; 0 where it is misclassified.
        certified: Radius -> share of images that are right and certified beyond that radius.
        attacked: Radius -> share of images that stay right under an attack of that radius.
        attempts: Number of certified images that were attacked just inside their own radius.
        broken: How many of them changed class: 0, or the certificate is wrong.
        certificate: The certificate itself.
        local: Radii from bounds in balls, if they were asked for.
    """

    accuracy: float
    constant: float
    table: str = dataclasses.field(compare=False)  # it holds durations
    rows: list[dict[str, Any]]
    radii: list[float]
    certified: dict[float, float]
    attacked: dict[float, float]
    attempts: int
    broken: int
    certificate: LipschitzCertificate = dataclasses.field(compare=False, repr=False)
    local: LocalRadii | None = None

    def lines(self, *, certificate: bool = True) -> list[str]:
        """Return the outcome as lines of text, with the table of the certificate or without."""
        number, norm = len(self.radii), self.certificate.norm
        lines = [
            *([self.table, ""] if certificate else []),
            f"clean accuracy        {self.accuracy:7.1%}  ({number} images)",
            f"Lipschitz constant    {self.constant:.7f}  ({norm}, proved upper bound)",
            f"{norm + ' radius':<12} certified   (interval)         under attack   (interval)",
        ]
        lines += [
            f"{radius:<9g}    {value:8.1%}   {_interval(value, number)}       "
            f"{self.attacked[radius]:8.1%}   {_interval(self.attacked[radius], number)}"
            for radius, value in self.certified.items()
        ]
        lines.append(
            f"intervals: 95 %, for another draw of {number} test images; not the spread of seeds"
        )
        verdict = "none changed class" if not self.broken else f"{self.broken} CHANGED CLASS"
        lines.append(
            f"attacked just inside their certified radius: {self.attempts} images, {verdict}"
        )
        return lines if self.local is None else [*lines, *self.local.lines(list(self.certified))]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        at_radii = [
            {"radius": radius, "certified": self.certified.get(radius), "attacked": value}
            for radius, value in self.attacked.items()
        ]
        return {
            "accuracy": self.accuracy,
            "norm": self.certificate.norm,
            "constant": self.constant,
            "at_radii": at_radii,
            "inside_certified_radius": {"attacked": self.attempts, "changed_class": self.broken},
            "certificate": self.rows,
            "radii": self.radii,
            "local": None if self.local is None else dataclasses.asdict(self.local),
        }


def evaluate(
    model: nn.Module,
    images: Images,
    *,
    radii: Sequence[float],
    norm: Literal["l2", "linf"] = "l2",
    attack_steps: int = 40,
    local: int = 0,
    seed: int = 0,
    export: bool = True,
    progress: bool = False,
    tell: Callable[[Evaluation], None] | None = None,
) -> Evaluation:
    r"""Certify a classifier and attack it.

    What is certified is the plain copy of the model with its weights in float64, evaluated in
    float64; what the attack finds (in float32, for speed) is judged by the same copy. Two attacks
    are made: at every radius on all images that are still right, and on every certified image
    just inside its own certified radius, in float64.

    Args:
        model: A classifier of this library's layers, or of stock ones.
        images: Images in [0, 1] and their classes.
        radii: Radii at which certified accuracy is told; the attack also tries some between them.
        norm: The norm of the radii, "l2" or "linf".
        attack_steps: Gradient steps of an attack.
        local: Images, evenly spaced, whose l2 radii are enlarged by bounds in balls around them.
        seed: Seed of the random starts of the attacks.
        export: Whether to judge the plain copy. A copy of the model as it is takes its place
            where not: for layers whose export is certified less tightly, or depends on the image.
        progress: Whether to show a progress bar (of tqdm) on the standard error stream.
        tell: Called with the evaluation before the attacks, which take most of the time; it holds
            everything but them.

    Returns:
        The evaluation.

    Raises:
        UncertifiableError: A part of the model has no known constant, or local radii are asked for
            in another norm than l2.
        ValueError: `local` is negative.
        ModuleNotFoundError: A progress bar is asked for and tqdm is missing.
    """
    _checks.non_negative_int("evaluate", local=local)
    _checks.module("evaluate", model=model)
    _checks.require(
        isinstance(images, Images),
        "evaluate",
        "images must be of the class Images",
        "Pass Images(x, y), or call orthonet.evaluate(model, loader, radii)",
        images=images,
    )
    device = next(iter(model.parameters()), images.x).device
    attacker = to_plain(model) if export else copy.deepcopy(model)
    attacker = attacker.to(device).eval().requires_grad_(False)
    judge = copy.deepcopy(attacker).double()
    x, y = images.x.to(device), images.y.to(device)
    everything = torch.arange(len(x), device=device)
    certificate = certify(judge, x[:1].double(), norm=norm)
    with torch.no_grad():
        logits = torch.cat([judge(x[part].double()) for part in everything.split(_BATCH)])
    right = logits.argmax(1) == y
    alive = right.clone()
    certified = certificate.certified_accuracy(logits, y, radii)
    attacked, attempts, broken = {0.0: int(right.sum()) / len(x)}, 0, 0
    found = Evaluation(
        accuracy=attacked[0.0],
        constant=certificate.constant.value,
        table=certificate.table(),
        rows=[
            {name: value for name, value in dataclasses.asdict(row).items() if name != "seconds"}
            for row in certificate.rows
        ],
        radii=torch.where(right.cpu(), certificate.radius(logits), 0.0).tolist(),
        certified=dict(zip(radii, certified, strict=True)),
        attacked=dict(attacked),
        attempts=0,
        broken=0,
        certificate=certificate,
    )
    if tell is not None:
        tell(found)
    generator = torch.Generator().manual_seed(seed)
    with _progress_bar(progress, len(attack_radii(radii)) + 1 + bool(local)) as bar:
        for radius in attack_radii(radii):
            alive = survivors(
                attacker,
                judge,
                x,
                y,
                alive,
                radius,
                batch_size=_BATCH,
                steps=attack_steps,
                restarts=1,
                generator=generator,
                norm=norm,
            )
            attacked[radius] = int(alive.sum()) / len(x)
            bar.update()
        for part in everything.split(_BATCH):
            report = attack_certificate(
                judge,
                certificate,
                x[part].double(),
                y[part],
                steps=attack_steps,
                restarts=1,
                generator=generator,
            )
            attempts, broken = attempts + report.attacked, broken + report.broken
        bar.update()
        near = None
        if local:
            some = spaced(Images(x, y), local)
            near = _local_radii(judge, certificate, some, attack_steps, generator)
            bar.update()
    return dataclasses.replace(
        found, attacked=attacked, attempts=attempts, broken=broken, local=near
    )


def _local_radii(
    judge: nn.Module,
    certificate: LipschitzCertificate,
    images: Images,
    steps: int,
    generator: torch.Generator,
) -> LocalRadii:
    """Radii of both kinds, rounding included, and an attack inside the larger ones."""
    x, y = images.x.double(), images.y
    start = time.process_time()
    local = certificate.local_radius(judge, x, labels=y)
    seconds = time.process_time() - start
    whole = certificate.radius(judge, x, labels=y)
    near = torch.where(local.isfinite(), local, 0.0).to(x)
    points = pgd(judge, x, y, near, steps=steps, restarts=1, generator=generator)
    with torch.no_grad():
        changed = (judge(points).argmax(1) != y) & (local > 0).to(y.device)
    return LocalRadii(whole.tolist(), local.tolist(), int(changed.sum()), seconds)


def wilson(share: float, number: int, deviations: float = 1.96) -> tuple[float, float]:
    r"""Return Wilson's interval of a share of independent samples.

    \((p + z^2 / 2n \pm z \sqrt{p (1 - p) / n + z^2 / 4n^2}) / (1 + z^2 / n)\); with z = 1.96 it
    holds the true share in about 95 of 100 draws.

    Args:
        share: What was found, p.
        number: Number of samples, n.
        deviations: The z.
    """
    square = deviations**2 / number
    middle = (share + square / 2) / (1 + square)
    spread = deviations * math.sqrt(share * (1 - share) / number + square / (4 * number))
    return max(0.0, middle - spread / (1 + square)), min(1.0, middle + spread / (1 + square))


def _interval(share: float, number: int) -> str:
    low, high = wilson(share, number)
    return f"({100 * low:4.1f} to {100 * high:5.1f})"


def attack_radii(radii: Sequence[float]) -> list[float]:
    """The positive `radii`, a point between each and its neighbor, and two beyond the last."""
    marks = [0.0, *sorted({r for r in radii if r > 0})]
    between = [(a + b) / 2 for a, b in itertools.pairwise(marks[1:])]
    return sorted([*marks[1:], *between, 1.25 * marks[-1], 1.5 * marks[-1]])


def _progress_bar(progress: bool, total: int) -> Any:
    tqdm = require_package("tqdm", "tqdm").tqdm if progress else _Silent
    return tqdm(total=total, unit="attack", desc="attacking")


class _Silent(contextlib.nullcontext):
    """A progress bar that shows nothing."""

    def __init__(self, **_: Any) -> None:
        super().__init__(self)

    def update(self) -> None:
        """Nothing."""
