"""Bounds of perceptrons: chains of affine maps and activations."""

__all__: list[str] = []
