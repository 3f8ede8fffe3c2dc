"""Attention with a proved Lipschitz constant, and its parts; `orthonet.layers` re-exports them."""

__all__: list[str] = []
