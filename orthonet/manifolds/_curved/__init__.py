"""Vectors in spaces of constant curvature: spheres, and two models of hyperbolic space."""
