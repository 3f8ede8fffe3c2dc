"""Recipes beyond classification."""
