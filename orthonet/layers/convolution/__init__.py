"""Orthogonal convolutions and transposed convolutions."""

__all__: list[str] = []
