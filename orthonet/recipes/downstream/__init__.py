"""Recipes of what a proved constant gives beyond a radius."""

__all__: list[str] = []
