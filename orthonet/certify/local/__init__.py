"""Bounds of any graph in a ball around one input."""

__all__: list[str] = []
