"""Open sets and groups of square matrices."""
