"""Recipes that classify images."""
