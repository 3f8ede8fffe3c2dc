"""Recipes on sequences."""
