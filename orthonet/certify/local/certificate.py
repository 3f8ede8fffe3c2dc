"""What `certify` proves in balls around given samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from orthonet import _checks
from orthonet.certify.local.radius import Ends, local_constants, local_reaches
from orthonet.certify.proof import load_local, save_local
from orthonet.certify.walk.walker import Walker
from orthonet.errors import UncertifiableError

__all__ = ["LocalBound", "LocalCertificate"]


@dataclass(frozen=True)
class LocalBound:
    r"""A proved bound of the l2 slopes of a model in the ball around one sample.

    It is no `Bound`, and enters no arithmetic with bounds: it holds in its ball only.

    Attributes:
        value: The bound, from l2 to l2.
        radius: The l2 radius of the ball.
        kind: `"constant"`: of $\|f(a) - f(b)\| / \|a - b\|$ for all a, b in the ball, a Lipschitz
            constant. `"secant"`: of $\|f(a) - f(x)\| / \|a - x\|$ for all a in the ball, with x its
            center: smaller, and no Lipschitz constant.
    """

    value: float
    radius: float
    kind: Literal["constant", "secant"] = "constant"

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True, eq=False)
class LocalCertificate:
    r"""Proved bounds of a model in the l2 balls of one radius around given samples.

    `certify(model, x, radius=r)` returns it, also for models without a global Lipschitz constant:
    with products of activations, gates, softmax attention, LayerNorm or RMSNorm.

    Attributes:
        constants: A Lipschitz constant in the ball around each sample. Infinite where none is
            known: try a smaller radius.
        radius: The radius of the balls; the smallest one where a loaded file has several.
        labels: Of a loaded file, the class of each ball in exact arithmetic, or None.

    Examples:
        >>> from orthonet.certify import certify
        >>> class Gate(nn.Module):
        ...     def forward(self, x):
        ...         return x * x.sigmoid()
        >>> near = certify(Gate().eval(), torch.zeros(1, 4), radius=0.1)
        >>> round(near.constants[0].value, 6)
        0.6
    """

    constants: tuple[LocalBound, ...]
    radius: float
    _ends: Ends | None = field(default=None, repr=False)
    labels: tuple[int | None, ...] = ()
    _secants: tuple[LocalBound, ...] = field(default=(), repr=False)

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_ends": None}  # the graph stays behind

    @property
    def constant(self) -> LocalBound:
        """The largest of the constants: it holds in each of the balls, and not between them."""
        return max(self.constants, key=float)

    def secants(self) -> tuple[LocalBound, ...]:
        r"""Return bounds of $\|f(a) - f(x)\| / \|a - x\|$ for a in the ball around each sample x.

        The output moves by at most this times the distance from the sample. Two points of a ball
        may differ more: for them `constants` counts.

        Raises:
            UncertifiableError: The certificate was pickled, and has lost the graph.
        """
        if self._secants:
            return self._secants
        ends = self._graph()
        found = local_reaches(ends.walker, ends.batch, self.radius)
        return tuple(
            LocalBound(min(v, c.value), self.radius, "secant")
            for v, c in zip(found, self.constants, strict=True)
        )

    def save(self, path: str | Path, *, labels: Tensor | None = None) -> None:
        r"""Write bounds of the secants as claims that `orthonet-check` verifies.

        The file is that of `LipschitzCertificate.save(path, local=x, radius=r)`: the constant of
        the whole space, and for each sample what the checker's own pass proves in its ball. That
        is a bound of $\|f(a) - f(x)\| / \|a - x\|$, no Lipschitz constant.

        Args:
            path: The file to write, e.g. `"certificate.json"`.
            labels: The true classes, (N,): there is no claim about the class of a wrong prediction.

        Raises:
            UncertifiableError: The graph was lost, the model has no constant of the whole space, or
                the checker does not follow an operation in balls.
            ValueError: The radius is 0, or the labels do not fit.
        """
        ends = self._graph()
        save_local(ends.walker, ends.batch, self.radius, labels, path)

    @classmethod
    def load(cls, path: str | Path) -> LocalCertificate:
        """Read the claims about balls of a file, which the checker verifies.

        `constants` is then the constant of the whole space for each ball, `secants()` are the
        claims, and `labels` the classes.

        Args:
            path: The JSON file that `save` wrote, here or of a `LipschitzCertificate`.

        Raises:
            ValueError: The file is no certificate, or has no such claims.
        """
        whole, found = load_local(path)
        return cls(
            tuple(LocalBound(whole, r) for r, _, _ in found),
            min(r for r, _, _ in found),
            labels=tuple(label for _, _, label in found),
            _secants=tuple(LocalBound(s, r, "secant") for r, s, _ in found),
        )

    def _graph(self) -> Ends:
        if self._ends is None:
            _checks.fail(
                "LocalCertificate",
                "the graph of the model must be there",
                "Call certify again: a certificate that was pickled or loaded has none",
                UncertifiableError,
            )
        return self._ends


def local_certificate(walker: Walker, batch: Sequence[Tensor], radius: float) -> LocalCertificate:
    """Bound the constants in the balls around all samples."""
    found = local_constants(walker, batch, radius)
    constants = tuple(LocalBound(value, radius) for value in found)
    return LocalCertificate(constants, radius, Ends(walker, tuple(batch)))


def is_radius(radius: object) -> bool:
    """Whether this is the radius of a ball."""
    number = isinstance(radius, (int, float)) and not isinstance(radius, bool)
    return number and 0.0 <= radius < math.inf  # type: ignore[operator]
