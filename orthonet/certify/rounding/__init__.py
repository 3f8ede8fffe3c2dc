"""What a forward pass in floating point adds to exact arithmetic."""
