"""`geoopt.tensor`: tensors and parameters that know their manifold."""

from orthonet.compat.geoopt._manifolds import ManifoldParameter, ManifoldTensor

__all__ = ["ManifoldParameter", "ManifoldTensor"]
