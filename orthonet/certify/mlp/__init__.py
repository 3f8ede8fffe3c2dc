"""Bounds of perceptrons: chains of affine maps and activations."""
