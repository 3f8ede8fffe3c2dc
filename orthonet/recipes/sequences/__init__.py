"""Recipes on sequences."""

__all__: list[str] = []
