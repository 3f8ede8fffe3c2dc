"""Models in and out: what remains when the constraints are baked into plain weights."""

from orthonet.convert._plain import to_plain

__all__ = ["to_plain"]
