"""The graph of a model: exported, marked, folded, compared with what the model calls."""

__all__: list[str] = []
