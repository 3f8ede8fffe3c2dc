"""Norms bounded from above, with the rounding of the bound itself."""

__all__: list[str] = []
