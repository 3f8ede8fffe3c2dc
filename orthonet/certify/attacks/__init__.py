"""Searches for points that break a certificate."""

__all__: list[str] = []
