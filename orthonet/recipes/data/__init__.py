"""Where the samples of a recipe come from."""

__all__: list[str] = []
