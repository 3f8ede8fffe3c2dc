"""Models in and out: stock layers made orthogonal, and constraints baked into plain weights."""

from orthonet.convert._on_manifold import manifold_groups, on_manifold, trivialize
from orthonet.convert._orthogonalize import orthogonalize
from orthonet.convert._plain import to_plain
from orthonet.convert._report import Cause, ConversionReport, ConversionRow
from orthonet.convert._sums import ConvexSum, PrescaledSum

__all__ = [
    "Cause",
    "ConversionReport",
    "ConversionRow",
    "ConvexSum",
    "PrescaledSum",
    "manifold_groups",
    "on_manifold",
    "orthogonalize",
    "to_plain",
    "trivialize",
]
