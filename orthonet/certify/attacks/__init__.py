"""Searches for points that break a certificate."""
