"""Models in and out: what remains when the constraints are baked into plain weights."""

from orthonet.convert._on_manifold import manifold_groups, on_manifold, trivialize
from orthonet.convert._plain import to_plain

__all__ = ["manifold_groups", "on_manifold", "to_plain", "trivialize"]
