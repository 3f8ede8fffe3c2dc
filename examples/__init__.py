"""Worked examples with pictures."""
