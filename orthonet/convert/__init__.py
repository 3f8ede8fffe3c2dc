"""Models in and out: stock layers made orthogonal, and constraints baked into plain weights."""

from orthonet.convert._orthogonalize import orthogonalize
from orthonet.convert._plain import to_plain
from orthonet.convert._report import ConversionReport, ConversionRow

__all__ = ["ConversionReport", "ConversionRow", "orthogonalize", "to_plain"]
