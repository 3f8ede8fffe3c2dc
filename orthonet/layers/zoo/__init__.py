"""Lipschitz layers of the literature, one file a family; `orthonet.layers` re-exports them."""

__all__: list[str] = []
