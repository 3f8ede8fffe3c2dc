"""From the inputs of a graph to its outputs: what each node, and what nodes together, bound."""

__all__: list[str] = []
