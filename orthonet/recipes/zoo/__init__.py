"""The comparison of the layers of the zoo."""

__all__: list[str] = []
