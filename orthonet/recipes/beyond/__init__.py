"""Recipes beyond classification."""

__all__: list[str] = []
