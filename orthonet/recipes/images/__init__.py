"""Recipes that classify images."""

__all__: list[str] = []
