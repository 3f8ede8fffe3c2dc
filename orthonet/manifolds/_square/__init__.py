"""Sets and groups of square matrices."""
