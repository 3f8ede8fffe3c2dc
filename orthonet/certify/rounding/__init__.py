"""What a forward pass in floating point adds to exact arithmetic."""

__all__: list[str] = []
